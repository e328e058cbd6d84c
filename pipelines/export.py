"""`export`: a run as one NetCDF-4 file (CF-1.11)."""

from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import xarray as xr

from pipelines.runs import ForecastStore


def export(store: ForecastStore, name: str, path: Path) -> None:
    """Writes a run to `path`, whole or not at all, holding one field and lead time in memory at once.

    Raises:
        ValueError: if there is no such run.
    """
    dataset = store.dataset(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        dataset.drop_vars(list(dataset.data_vars)).to_netcdf(unfinished, engine="netcdf4")
        with netCDF4.Dataset(unfinished, "a") as file:
            if "coordinates" in file.ncattrs():
                file.delncattr("coordinates")  # each field names its own
            for name_of, field in dataset.data_vars.items():
                _write(file, str(name_of), field)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(file: Any, name: str, field: xr.DataArray) -> None:
    """One field, lead by lead, packed."""
    sizes = {"y": 256, "x": 256}
    chunks = [min(field.sizes[dimension], sizes.get(str(dimension), 1)) for dimension in field.dims]
    variable = file.createVariable(
        name, "f4", field.dims, fill_value=np.float32(np.nan), zlib=True, complevel=1, chunksizes=chunks
    )
    linked = {key: field.encoding[key] for key in ("grid_mapping", "coordinates") if key in field.encoding}
    variable.setncatts({**field.attrs, **linked})
    axis = field.dims.index("lead_time")
    for lead in range(field.sizes["lead_time"]):
        place = (slice(None),) * axis + (lead,)
        variable[place] = field.isel(lead_time=lead).values
