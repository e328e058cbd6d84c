"""OGC EDR and CoverageJSON: valid, right, and unmoved by whatever a client writes."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import quote, urljoin

import numpy as np
import pytest
from covjson_pydantic.coverage import Coverage
from edr_pydantic.capabilities import ConformanceModel, LandingPageModel
from edr_pydantic.collections import Collection, Collections
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.edr import parse_point, select_times
from serve.problems import Problem
from tests.serve.conftest import EUROPE, INIT, LEADS, Service, service_at
from tests.serve.test_outline import GRIDS

POSITION = "/collections/nowcast/position?coords=POINT(8.54 47.37)"


def test_the_landing_page_leads_to_everything(service: Service) -> None:
    landing = LandingPageModel.model_validate_json(service.client.get("/?f=json").content)
    assert {link.rel for link in landing.links} >= {"self", "service-desc", "conformance", "data"}
    asked = service.client.get("/", {"accept": "application/json"})
    assert asked.json() == service.client.get("/?f=json").json()


def links(node: object) -> Iterator[str]:
    """Where all that is told in JSON leads to."""
    if isinstance(node, dict):
        yield from [node["href"]] if "href" in node else []
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from links(part)


@pytest.mark.parametrize("folder", ["", "/weather/rain"])
@pytest.mark.parametrize("address", ["/?f=json", "/collections", "/collections/nowcast"])
def test_links_lead_to_what_is_there_behind_a_proxy_in_a_folder_of_its_too(
    service: Service, address: str, folder: str
) -> None:
    given = list(links(service.client.get(address).json()))
    assert given
    for link in given:
        path = urljoin(f"http://host{folder}{address}", link).removeprefix(f"http://host{folder}")
        status = service.client.get(path).status_code
        assert status == (400 if path.endswith("/position") else 200), "400: it asks for coords"


def test_conformance_names_the_core_of_edr(service: Service) -> None:
    named = ConformanceModel.model_validate_json(service.client.get("/conformance").content).conformsTo
    assert "http://www.opengis.net/spec/ogcapi-edr-1/1.1/conf/core" in named
    described = service.client.get("/openapi.json").json()["openapi"]
    assert any(name.endswith("/oas30") for name in named) == described.startswith("3.0.")


def test_the_description_names_the_systems_and_formats_that_are_answered(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    parameters = paths["/collections/{collection}/position"]["get"]["parameters"]
    named = {each["name"]: each["schema"]["enum"] for each in parameters if "enum" in each["schema"]}
    assert set(named) == {"crs", "f"}
    for key, choices in named.items():
        assert len(choices) == 3
        for choice in choices:
            assert service.client.get(f"{POSITION}&{key}={quote(choice)}").status_code == 200


def test_the_collection_says_where_and_when_and_what(service: Service) -> None:
    listed = Collections.model_validate_json(service.client.get("/collections").content)
    answer = service.client.get("/collections/nowcast")
    alone = Collection.model_validate_json(answer.content)
    [other] = listed.collections
    apart = {"links", "data_queries"}  # they lead from elsewhere
    assert other.model_dump(exclude=apart) == alone.model_dump(exclude=apart)
    lon, lat = EUROPE.lonlat()
    west, south, east, north = alone.extent.spatial.bbox[0]
    assert west < lon.min() < lon.max() < east
    assert south < lat.min() < lat.max() < north
    assert alone.extent.temporal.interval == [[INIT + timedelta(minutes=10), INIT + timedelta(minutes=60)]]
    assert set(answer.json()["parameter_names"]) == set(service.forecasts.run().quantities)
    assert service.client.get("/collections/other").status_code == 404


@pytest.mark.parametrize("name", ["across 180", "across 180, projected", "round the north pole"])
def test_the_extent_across_180_and_round_a_pole_is_told_as_the_standard_has_it(
    tmp_path: Path, name: str
) -> None:
    """West above east where it crosses 180 degrees (RFC 7946, 5.2); either side of it is the domain's."""
    grid, expected = GRIDS[name]
    client = service_at(tmp_path / "forecasts", grid).client
    answer = client.get("/collections/nowcast")
    (bbox,) = Collection.model_validate_json(answer.content).extent.spatial.bbox
    assert bbox == pytest.approx(expected, abs=1e-4)
    for lon in (178.5, -178.5, 180, -180):
        lat = 0 if "180" in name else 80
        assert client.get(f"/collections/nowcast/position?coords=POINT({lon} {lat})").status_code == 200
        assert client.get(f"/forecast?lon={lon}&lat={lat}").status_code == 200
    told = client.get("/forecast?lon=20&lat=-40").json()["detail"]
    assert f"{bbox[0]:.2f}..{bbox[2]:.2f} east{' (across 180)' if '180' in name else ''} and" in told


def test_a_position_is_a_valid_coverage_with_the_numbers_of_the_store(service: Service) -> None:
    answer = service.client.get(POSITION)
    assert answer.headers["content-type"] == "application/prs.coverage+json"
    coverage = Coverage.model_validate_json(answer.content)
    body = answer.json()
    cell = service.forecasts.run().cell(8.54, 47.37)
    assert body["domain"]["axes"]["t"]["values"][0] == "2019-06-10T00:40:00Z"
    assert coverage.domain.axes.t.values == [INIT + timedelta(minutes=lead) for lead in LEADS]
    assert coverage.domain.axes.x.values == [cell.lon]
    assert set(body["parameters"]) == set(body["ranges"])
    for name, written in (
        ("rainfall_rate_median", service.written.median),
        ("rainfall_rate_mean", service.written.mean),
        ("probability_of_exceedance_2", service.written.exceedance[:, 2]),
        ("rainfall_rate_quantile_0.75", service.written.quantile[3]),
    ):
        np.testing.assert_allclose(
            body["ranges"][name]["values"], written[:, cell.row, cell.column], rtol=1e-5
        )


def test_no_forecast_is_null_in_a_valid_coverage(service: Service) -> None:
    lon, lat = EUROPE.lonlat()
    answer = service.client.get(
        f"/collections/nowcast/position?coords=POINT({lon[120, 115]} {lat[120, 115]})"
    )
    Coverage.model_validate_json(answer.content)
    assert {value for named in answer.json()["ranges"].values() for value in named["values"]} == {None}


@pytest.mark.parametrize(
    ("asked", "minutes"),
    [
        ("2019-06-10T01:00:00Z", [30]),
        ("2019-06-10T03:00:00%2B02:00", [30]),
        ("2019-06-10T00:50:00Z/2019-06-10T01:10:00Z", [20, 30, 40]),
        ("2019-06-10T00:55:00Z/2019-06-10T01:05:00Z", [30]),
        ("../2019-06-10T00:50:00Z", [10, 20]),
        ("2019-06-10T01:20:00Z/..", [50, 60]),
        ("../..", [10, 20, 30, 40, 50, 60]),
    ],
)
def test_times_choose_what_lies_between_them_both_ends_included(
    service: Service, asked: str, minutes: list[int]
) -> None:
    answer = service.client.get(f"{POSITION}&datetime={asked}&parameter-name=rainfall_rate_mean")
    coverage = Coverage.model_validate_json(answer.content)
    assert coverage.domain.axes.t.values == [INIT + timedelta(minutes=lead) for lead in minutes]
    cell = service.forecasts.run().cell(8.54, 47.37)
    chosen = [LEADS.index(lead) for lead in minutes]
    expected = service.written.mean[chosen, cell.row, cell.column]
    np.testing.assert_allclose(answer.json()["ranges"]["rainfall_rate_mean"]["values"], expected, rtol=1e-5)


def test_parameter_names_choose(service: Service) -> None:
    names = "probability_of_exceedance_0.1,rainfall_rate_median"
    answer = service.client.get(f"{POSITION}&parameter-name={names}").json()
    assert set(answer["ranges"]) == set(names.split(",")) == set(answer["parameters"])
    everything = ",".join(service.forecasts.run().quantities)
    asked = service.client.get(f"{POSITION}&parameter-name={everything}").json()
    assert asked == service.client.get(POSITION).json()


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("coords=POINT(0 0)", "outside the domain"),
        ("coords=POINT(47.37 8.54)", "outside the domain"),
        ("coords=POINT(8.54)", "POINT(longitude latitude)"),
        ("coords=LINESTRING(8 47,9 48)", "POINT(longitude latitude)"),
        ("coords=POINT(8.54 47.37 400)", "POINT(longitude latitude)"),
        ("coords=POINT(NaN 47)", "POINT(longitude latitude)"),
        ("coords=(8.54 47.37)", "POINT(longitude latitude)"),
        ("coords=POINT 8.54 47.37)", "POINT(longitude latitude)"),
        ("coords=POINT(8.54 47.37", "POINT(longitude latitude)"),
        ("coords=POINT(8.54 47.37) x", "POINT(longitude latitude)"),
        ("coords=MULTIPOINT(8.54 47.37)", "POINT(longitude latitude)"),
        ("coords=POINT(180.5 47)", "-180..180"),
        ("coords=POINT(8.54 90.5)", "-90..90"),
        ("coords=POINT(999 47)", "-180..180"),
        ("", "coords: "),
        ("coords=POINT(8.54 47.37)&datetime=yesterday", "datetime: "),
        ("coords=POINT(8.54 47.37)&datetime=2019-06-10T01:05:00Z", "no valid time"),
        ("coords=POINT(8.54 47.37)&datetime=2020-01-01T00:00:00Z/..", "no valid time"),
        ("coords=POINT(8.54 47.37)&datetime=2019-06-10T01:20:00Z/2019-06-10T00:20:00Z", "no valid time"),
        ("coords=POINT(8.54 47.37)&datetime=..", "datetime: "),
        ("coords=POINT(8.54 47.37)&datetime=0001-01-01T00:00:00%2B14:00/..", "datetime: "),
        ("coords=POINT(8.54 47.37)&parameter-name=snow", "parameter-name: "),
        ("coords=POINT(8.54 47.37)&crs=EPSG:3857", "crs: "),
        ("coords=POINT(8.54 47.37)&f=GRIB", "f: "),
    ],
)
def test_a_question_that_is_not_understood_is_a_400_that_teaches(
    service: Service, query: str, told: str
) -> None:
    answer = service.client.get(f"/collections/nowcast/position?{query}")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.json()["detail"]


numbers = st.one_of(
    st.floats(-180, 180).map(repr),
    st.integers(-90, 90).map(str),
    st.sampled_from(["+1.5e1", ".5", "-0", "1e-320"]),
)


@given(
    numbers,
    st.floats(-90, 90).map(repr),
    st.sampled_from(["POINT({} {})", "point ({}  {})", " Point( {} {} ) "]),
)
def test_every_point_that_is_one_is_read_as_written(lon: str, lat: str, form: str) -> None:
    assert parse_point(form.format(lon, lat)) == (float(lon), float(lat))


WKT = st.text(alphabet="POINTpoint()0123456789.-+eE, \tnaif\u0663_Z", max_size=60) | st.text(max_size=300)


@given(WKT | WKT.map(lambda inside: f"POINT({inside})"))
@example("POINT(1_0 2)")
@example("POINT(\u0661 2)")
@example("POINT(1 2)" * 2)
@example("POINT((1 2))")
@example("POINT(1e999 2)")
@example("(" * 100_000)
def test_anything_else_is_refused_and_nothing_breaks(text: str) -> None:
    try:
        lon, lat = parse_point(text)
    except Problem as problem:
        assert problem.status == 400
        assert len(problem.detail) < 200
    else:
        assert abs(lon) <= 180
        assert abs(lat) <= 90
        assert text.strip().upper().startswith("POINT")
        assert text.isascii()


TIMES = [INIT + timedelta(minutes=lead) for lead in LEADS]
moments = st.datetimes(datetime(2019, 6, 10), datetime(2019, 6, 10, 3)).map(
    lambda t: t.replace(microsecond=0)
)


@given(moments, moments)
def test_an_interval_holds_a_time_exactly_if_it_lies_between(first: datetime, last: datetime) -> None:
    inside = [i for i, time in enumerate(TIMES) if first <= time.replace(tzinfo=None) <= last]
    asked = f"{first.isoformat()}Z/{last.isoformat()}Z"
    if inside:
        assert select_times(TIMES, asked) == inside
    else:
        with pytest.raises(Problem, match="no valid time"):
            select_times(TIMES, asked)


@given(st.text(max_size=80) | st.text(alphabet="0123456789-:TZ/.+", max_size=70))
def test_no_text_breaks_the_times(text: str) -> None:
    try:
        assert select_times(TIMES, text)
    except Problem as problem:
        assert problem.status == 400


@settings(max_examples=60)
@given(st.text(max_size=60), st.text(max_size=40), st.text(max_size=40))
def test_no_query_breaks_the_service(service: Service, coords: str, when: str, names: str) -> None:
    query = f"coords={quote(coords)}&datetime={quote(when)}&parameter-name={quote(names)}"
    assert service.client.get(f"/collections/nowcast/position?{query}").status_code in (200, 400)
