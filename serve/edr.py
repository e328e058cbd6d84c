"""OGC API - Environmental Data Retrieval 1.1 (OGC 19-086r6): the newest run, asked at a position."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import JsonValue

from pipelines.frame import iso, parse_time
from serve.caching import answers, cached_json
from serve.coverage_json import point_series
from serve.forecasts import Forecasts, Quantity, Run
from serve.problems import Problem

COLLECTION = "nowcast"

CONFORMANCE = (
    "http://www.opengis.net/spec/ogcapi-common-1/1.0/conf/core",
    "http://www.opengis.net/spec/ogcapi-common-2/1.0/conf/collections",
    "http://www.opengis.net/spec/ogcapi-edr-1/1.1/conf/core",
    "http://www.opengis.net/spec/ogcapi-edr-1/1.1/conf/collections",
    "http://www.opengis.net/spec/ogcapi-edr-1/1.1/conf/json",
    "http://www.opengis.net/spec/ogcapi-edr-1/1.1/conf/covjson",
)

CRS84 = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]]'
)
GREGORIAN = 'TIMECRS["DateTime",TDATUM["Gregorian Calendar"],CS[TemporalDateTime,1],AXIS["Time (T)",future]]'
CRS_NAMES = ("CRS84", "OGC:CRS84", "http://www.opengis.net/def/crs/OGC/1.3/CRS84")
FORMATS = ("CoverageJSON", "application/prs.coverage+json", "json")
COVERAGE_JSON = "application/prs.coverage+json"

LONGEST_POINT = 128  # characters
LONGEST_TIME = 64  # characters
DIGITS = frozenset("0123456789+-.eE")


def routes(forecasts: Forecasts) -> APIRouter:
    """Conformance, collections and the position query."""
    router = APIRouter(tags=["edr"], default_response_class=Response)

    @router.get("/conformance", responses=answers("application/json"))
    def conformance(request: Request) -> Response:
        """The classes of the standard that this server implements."""
        return cached_json(request, ("conformance",), lambda: {"conformsTo": CONFORMANCE})

    @router.get("/collections", responses=answers("application/json"))
    def collections(request: Request) -> Response:
        """The collections: one, the newest run."""
        run = forecasts.run()
        return cached_json(
            request,
            ("collections",),
            lambda: {
                "links": [_link("collections", "self")],
                "collections": [_collection(run, f"collections/{COLLECTION}")],
            },
            run=run,
        )

    @router.get("/collections/{collection}", responses=answers("application/json"))
    def one_collection(request: Request, collection: str) -> Response:
        """What the collection holds: where, when, which parameters."""
        run = _run(forecasts, collection)
        return cached_json(request, ("collection",), lambda: _collection(run, COLLECTION), run=run)

    @router.get("/collections/{collection}/position", responses=answers(COVERAGE_JSON))
    def position(
        request: Request,
        collection: str,
        coords: Annotated[str, Query(description="POINT(longitude latitude), in degrees")],
        datetime: Annotated[str | None, Query(description="a time, or first/last with .. for open")] = None,
        parameter_name: Annotated[str | None, Query(alias="parameter-name", description="a,b,c")] = None,
        crs: Annotated[str, Query(description="only CRS84", json_schema_extra=_one_of(CRS_NAMES))] = "CRS84",
        f: Annotated[
            str, Query(description="only CoverageJSON", json_schema_extra=_one_of(FORMATS))
        ] = "CoverageJSON",
    ) -> Response:
        """The forecast by valid time in the cell that holds a point, as CoverageJSON; null: no forecast."""
        if crs not in CRS_NAMES:
            raise Problem(400, f"crs: expected one of {', '.join(CRS_NAMES)}")
        if f not in FORMATS:
            raise Problem(400, f"f: expected one of {', '.join(FORMATS)}")
        run = _run(forecasts, collection)
        lon, lat = parse_point(coords)
        cell = run.cell(lon, lat)
        times = select_times(run.valid_times, datetime)
        quantities = _select_quantities(run, parameter_name)

        def make() -> object:
            series = {name: values[times] for name, values in run.series(cell).items()}
            chosen = [run.valid_times[index] for index in times]
            return point_series(cell, chosen, quantities, series) | {"metnet": run.stamp}

        seed = ("position", cell, times, [quantity.name for quantity in quantities])
        return cached_json(request, seed, make, COVERAGE_JSON, run)

    return router


def _one_of(names: tuple[str, ...]) -> dict[str, JsonValue]:
    """The part of a parameter's schema that tells what may be given; the route says so in its own words."""
    return {"enum": list(names)}


def parse_point(text: str) -> tuple[float, float]:
    """Longitude and latitude of a `POINT(longitude latitude)` (WKT), in degrees.

    Raises:
        Problem: 400 if it is anything else.
    """
    expected = Problem(400, "coords: expected POINT(longitude latitude) in degrees, such as POINT(8.5 47.4)")
    if len(text) > LONGEST_POINT:
        raise expected
    keyword, opening, rest = text.strip().partition("(")
    numbers, closing, after = rest.partition(")")
    parts = numbers.split()
    if keyword.rstrip().upper() != "POINT" or not opening or not closing or after or len(parts) != 2:
        raise expected
    if not all(DIGITS.issuperset(part) for part in parts):
        raise expected
    try:
        lon, lat = (float(part) for part in parts)
    except ValueError:
        raise expected from None
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise Problem(400, "coords: expected a longitude in -180..180 and a latitude in -90..90")
    return lon, lat


def select_times(valid_times: list[datetime], text: str | None) -> list[int]:
    """The indices of the times that a `datetime` parameter asks for: a time, `a/b`, `../b` or `a/..`.

    Raises:
        Problem: 400 if it is not one of these, or no valid time lies in it.
    """
    if text is None:
        return list(range(len(valid_times)))
    if len(text) > LONGEST_TIME:
        raise Problem(400, "datetime: too long")
    first, slash, last = text.partition("/")
    begin = _time(first, datetime.min.replace(tzinfo=UTC), bool(slash))
    end = _time(last, datetime.max.replace(tzinfo=UTC), True) if slash else begin
    chosen = [index for index, time in enumerate(valid_times) if begin <= time <= end]
    if not chosen:
        raise Problem(
            400,
            "datetime: no valid time of the forecast lies in it; "
            f"they run from {iso(valid_times[0])} to {iso(valid_times[-1])}",
        )
    return chosen


def _time(text: str, end: datetime, may_be_open: bool) -> datetime:
    if text in ("..", "") and may_be_open:
        return end
    try:
        return parse_time(text)
    except (ValueError, OverflowError):
        raise Problem(
            400, "datetime: expected a time such as 2019-06-10T00:30:00Z, or first/last with .. for open"
        ) from None


def _select_quantities(run: Run, names: str | None) -> list[Quantity]:
    if names is None:
        return list(run.quantities.values())
    asked = set(names.split(","))
    if not asked <= set(run.quantities):
        raise Problem(400, f"parameter-name: expected names out of {', '.join(run.quantities)}")
    return [quantity for name, quantity in run.quantities.items() if name in asked]


def _run(forecasts: Forecasts, collection: str) -> Run:
    if collection != COLLECTION:
        raise Problem(404, f"no such collection; there is {COLLECTION}")
    return forecasts.run()


def _link(href: str, rel: str, media_type: str = "application/json") -> dict[str, str]:
    return {"href": href, "rel": rel, "type": media_type}


def _collection(run: Run, home: str) -> dict[str, object]:
    """What it holds; `home` leads to it from where it is asked for, whatever a proxy has before that."""
    times = [iso(time) for time in run.valid_times]
    query = {
        **_link(f"{home}/position", "data", COVERAGE_JSON),
        "variables": {
            "query_type": "position",
            "output_formats": ["CoverageJSON"],
            "default_output_format": "CoverageJSON",
        },
    }
    return {
        "id": COLLECTION,
        "title": "Rain nowcast",
        "description": f"Probabilistic rain forecast made at {iso(run.header.init_time)} (run {run.name})",
        "links": [_link(home, "self"), _link(f"{home}/position", "data", COVERAGE_JSON)],
        "extent": {
            "spatial": {"bbox": [list(run.bounds)], "crs": CRS84},
            "temporal": {
                "interval": [[times[0], times[-1]]],
                "values": times,
                "trs": GREGORIAN,
            },
        },
        "data_queries": {"position": {"link": query}},
        "crs": ["CRS84"],
        "output_formats": ["CoverageJSON"],
        "parameter_names": {name: _parameter(quantity) for name, quantity in run.quantities.items()},
    }


def _parameter(quantity: Quantity) -> dict[str, object]:
    return {
        "type": "Parameter",
        "label": quantity.label,
        "data-type": "float",
        "unit": {"label": quantity.units},
        "observedProperty": {"id": quantity.name, "label": quantity.label},
    }
