"""The forecast at one place, by valid time, as plain JSON."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BeforeValidator

from pipelines import cf
from pipelines.frame import iso
from serve.caching import answers, cached_json
from serve.forecasts import LATEST, Cell, Forecasts, Run, Values, number


def _spelt_out(degrees: object) -> object:
    """What is not spelt as Python spells digits in groups: 5_2 is a slip of the hand, not 52."""
    if "_" in str(degrees):
        raise ValueError("expected a number")
    return degrees


SPELT_OUT = BeforeValidator(_spelt_out)
Longitude = Annotated[
    float, Query(ge=-180, le=180, allow_inf_nan=False, description="degrees east"), SPELT_OUT
]
Latitude = Annotated[float, Query(ge=-90, le=90, allow_inf_nan=False, description="degrees north"), SPELT_OUT]


def routes(forecasts: Forecasts) -> APIRouter:
    """The point query."""
    router = APIRouter(tags=["point"])

    @router.get("/forecast", response_class=Response, responses=answers("application/json"))
    def forecast(
        request: Request,
        lat: Latitude,
        lon: Longitude,
        run: Annotated[str, Query(max_length=64, description="a run's name, or latest")] = LATEST,
    ) -> Response:
        """Probabilities and rates (mm/h) by valid time in the cell that holds a place; null: no forecast."""
        found = forecasts.run(run)
        cell = found.cell(lon, lat)

        def make() -> object:
            return _described(found, cell, lat, lon)

        return cached_json(request, ("forecast", lat, lon), make, run=found)

    return router


def _described(run: Run, cell: Cell, lat: float, lon: float) -> dict[str, object]:
    series = run.series(cell)
    return {
        **run.stamp,
        "snapshot": run.snapshot,
        "place": {"lat": lat, "lon": lon},
        "cell": {"lat": cell.lat, "lon": cell.lon, "row": cell.row, "column": cell.column},
        "units": {"lead_time": "min", "threshold": "mm/h", "rate": "mm/h", "probability": "1"},
        "forecast": [_at(run, series, index) for index in range(len(run.valid_times))],
    }


def _at(run: Run, series: dict[str, Values], index: int) -> dict[str, object]:
    """All quantities at one valid time."""
    exceedance, quantile = cf.PROBABILITY_OF_EXCEEDANCE.name, cf.RAINFALL_RATE_QUANTILE.name
    return {
        "valid_time": iso(run.valid_times[index]),
        "lead_time": run.header.lead_times[index],
        exceedance: {
            f"{threshold:g}": number(series[f"{exceedance}_{threshold:g}"][index])
            for threshold in run.header.thresholds
        },
        **{
            variable.name: number(series[variable.name][index])
            for variable in (cf.RAINFALL_RATE_MEDIAN, cf.RAINFALL_RATE_MEAN)
        },
        quantile: {
            f"{level:g}": number(series[f"{quantile}_{level:g}"][index]) for level in run.header.quantiles
        },
    }
