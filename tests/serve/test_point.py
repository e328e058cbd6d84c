"""The point query: the numbers of the store, null where there is no forecast."""

import numpy as np
import pytest
from pyproj import Transformer

from tests.serve.conftest import EUROPE, LEADS, QUANTILES, THRESHOLDS, Service


def cell_of(lon: float, lat: float) -> tuple[int, int]:
    """Row and column of the nearest centre, by PROJ and a search over all centres."""
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:3035", always_xy=True).transform(lon, lat)
    return int(np.abs(EUROPE.y - y).argmin()), int(np.abs(EUROPE.x - x).argmin())


@pytest.mark.parametrize(
    ("lat", "lon"), [(47.37, 8.54), (50.11, 8.68), (45.46, 9.19), (48.21, 16.37), (52.2, 5.6)]
)
def test_the_numbers_are_those_of_the_store_at_that_place(service: Service, lat: float, lon: float) -> None:
    row, column = cell_of(lon, lat)
    answer = service.client.get(f"/forecast?lat={lat}&lon={lon}").json()
    assert answer["run"] == "20190610T003000Z"
    assert answer["init_time"] == "2019-06-10T00:30:00Z"
    assert answer["stale"] is False
    assert answer["place"] == {"lat": lat, "lon": lon}
    assert (answer["cell"]["row"], answer["cell"]["column"]) == (row, column)
    assert [at["valid_time"] for at in answer["forecast"]] == [
        "2019-06-10T00:40:00Z", "2019-06-10T00:50:00Z", "2019-06-10T01:00:00Z",
        "2019-06-10T01:10:00Z", "2019-06-10T01:20:00Z", "2019-06-10T01:30:00Z",
    ]  # fmt: skip
    for i, at in enumerate(answer["forecast"]):
        written = service.written
        assert at["lead_time"] == LEADS[i]
        assert at["rainfall_rate_median"] == pytest.approx(written.median[i, row, column], rel=1e-5)
        assert at["rainfall_rate_mean"] == pytest.approx(written.mean[i, row, column], rel=1e-5)
        assert at["probability_of_exceedance"] == pytest.approx(
            {f"{t:g}": written.exceedance[i, k, row, column] for k, t in enumerate(THRESHOLDS)}, rel=1e-5
        )
        assert at["rainfall_rate_quantile"] == pytest.approx(
            {f"{q:g}": written.quantile[k, i, row, column] for k, q in enumerate(QUANTILES)}, rel=1e-5
        )


def test_no_forecast_is_null_and_dry_is_zero(service: Service) -> None:
    lon, lat = EUROPE.lonlat()
    unseen = service.client.get(f"/forecast?lat={lat[120, 115]}&lon={lon[120, 115]}").json()
    for at in unseen["forecast"]:
        assert at["rainfall_rate_median"] is None
        assert set(at["probability_of_exceedance"].values()) == {None}
        assert set(at["rainfall_rate_quantile"].values()) == {None}
    row, column = np.argwhere(service.written.mean[0] == 0)[0]
    dry = service.client.get(f"/forecast?lat={lat[row, column]}&lon={lon[row, column]}").json()["forecast"][0]
    assert dry["rainfall_rate_mean"] == 0
    assert set(dry["probability_of_exceedance"].values()) == {0}


@pytest.mark.parametrize(
    ("query", "status", "told"),
    [
        ("lat=0&lon=0", 400, "outside the domain"),
        ("lat=47&lon=-100", 400, "outside the domain"),
        ("lat=-47&lon=8", 400, "outside the domain"),
        ("lat=90&lon=0", 400, "outside the domain"),
        ("lat=91&lon=8", 400, "lat: "),
        ("lat=47&lon=181", 400, "lon: "),
        ("lat=nan&lon=8", 400, "lat: "),
        ("lat=47&lon=inf", 400, "lon: "),
        ("lat=north&lon=8", 400, "lat: "),
        ("lat=4_7&lon=8", 400, "lat: "),
        ("lat=47&lon=0_8", 400, "lon: "),
        ("lat=47", 400, "lon: "),
        ("lat=47&lon=8&lat=48", 400, "given twice"),
        ("lat=47&lon=8&run=&run=", 400, "given twice"),
        ("lat=47&lon=8&run=20190610T004000Z", 404, "no such run"),
        ("lat=47&lon=8&run=../../etc/passwd", 404, "no such run"),
    ],
)
def test_a_question_without_an_answer_is_a_problem(
    service: Service, query: str, status: int, told: str
) -> None:
    answer = service.client.get(f"/forecast?{query}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert told in answer.json()["detail"]
    assert "passwd" not in answer.text
    assert str(service.path) not in answer.text
