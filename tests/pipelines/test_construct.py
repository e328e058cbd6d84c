"""A call that is written down makes only what is this software's own."""

from functools import partial
from pathlib import Path

import pytest

from pipelines.construct import construct, source_from_path
from pipelines.grid import Grid
from pipelines.sources.odim import Odim

EXAMPLIA = """
# Radar composite of Examplia
_target_: pipelines.sources.odim.Odim
path: ???
product: Examplia composite
quantity: DBZH
z_r: [200, 1.6]
cap: 60
name: comp_(\\d{12})\\.h5
time_format: "%Y%m%d%H%M"
cadence: 5
grid:
  _target_: pipelines.grid.Grid
  crs: EPSG:3035
  x_first: 500
  x_step: 1000
  x_size: 20
  y_first: -500
  y_step: -1000
  y_size: 10
"""


def test_a_service_that_speaks_a_known_format_needs_a_yaml_and_no_python(tmp_path):
    (tmp_path / "examplia.yaml").write_text(EXAMPLIA)
    source = source_from_path(str(tmp_path / "examplia.yaml"), str(tmp_path))
    assert isinstance(source, Odim) and isinstance(source.grid, Grid)
    assert (source.path, source.product) == (str(tmp_path), "Examplia composite")
    assert source.valid_time("comp_202406010005.h5") is not None
    with pytest.raises(ValueError, match=r"source=.*examplia.yaml: give its folder"):
        source_from_path(str(tmp_path / "examplia.yaml"))


@pytest.mark.parametrize(
    "target",
    ["os.system", "pathlib.Path.unlink", "pipelines.repository.Repository.open", "pipelines.grid._wkt", 3],
)
def test_targets_elsewhere_are_refused(tmp_path, target):
    (tmp_path / "evil.yaml").write_text(f"_target_: {target}\npath: /etc/passwd\n")
    with pytest.raises(ValueError, match=r"source=.*evil.yaml: _target_=.*`pipelines.sources`"):
        source_from_path(str(tmp_path / "evil.yaml"), "x")


def test_what_is_no_description_is_said(tmp_path):
    Path(tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="expected a mapping with _target_"):
        source_from_path(str(tmp_path / "list.yaml"))
    with pytest.raises(
        ValueError, match=r"source=nowhere: no such file.*configs/source/; expected.* arome_land,"
    ):
        source_from_path("nowhere")
    with pytest.raises(
        ValueError, match=r"source=mrs: .*; did you mean 'mrms'\?; expected .* odim, .* xband$"
    ):
        source_from_path("mrs")


def test_a_partial_call_waits_for_its_arguments():
    made = construct(
        {"_target_": "pipelines.grid.Grid", "_partial_": True, "crs": "EPSG:3035"}, ("pipelines.grid.",)
    )
    assert isinstance(made, partial) and made.func is Grid
    with pytest.raises(ValueError, match=r"_target_=pipelines.grid.Grid: .*argument"):
        construct({"_target_": "pipelines.grid.Grid"}, ("pipelines.grid.",))
