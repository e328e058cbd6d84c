"""The front page: a map for people, a list of links for programs, and the files that the map is made of."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response

from pipelines.frame import iso
from serve.caching import answers, cached, cached_json
from serve.forecasts import Forecasts, Run
from serve.palette import PROBABILITY, RATE
from serve.problems import Problem

FOLDER = Path(__file__).parent / "map_page"

FILES = {
    "map.css": "text/css",
    "map.mjs": "text/javascript",
    "server.mjs": "text/javascript",
    "chart.mjs": "text/javascript",
    "basemap.mjs": "text/javascript",
    "places.json": "application/json",
    "icon.svg": "image/svg+xml",
    "vendor/maplibre-gl.css": "text/css",
    "vendor/maplibre-gl.mjs": "text/javascript",
    "vendor/maplibre-gl-worker.mjs": "text/javascript",
    "vendor/topojson-client.mjs": "text/javascript",
    "vendor/countries-50m.json": "application/json",
    "vendor/states-10m.json": "application/json",
}
"""All that is served below /static, and nothing else."""

TOLD = (
    "model",
    "model_sha256",
    "software_version",
    "created",
    "input_snapshot",
    "degraded",
    "inputs_missing",
    "sources_missing",
)
"""What the world may know of how a run was made; the rest names folders of this machine."""

SHOWN = 24
"""The newest runs that the page offers."""


@dataclass(frozen=True)
class Asset:
    """A file of the page, read once."""

    body: bytes
    media_type: str
    sha256: str

    @classmethod
    def read(cls, name: str, media_type: str) -> "Asset":
        """The file of that name in the page's folder."""
        body = (FOLDER / name).read_bytes()
        return cls(body, media_type, sha256(body).hexdigest())

    def answer(self, request: Request) -> Response:
        """The file, or 304 to a client that has it."""
        return cached(request, (self.sha256,), lambda: self.body, self.media_type)


def routes(forecasts: Forecasts) -> APIRouter:
    """The page, its files, and the runs it lists."""
    router = APIRouter(tags=["map"], default_response_class=Response)
    page = Asset.read("index.html", "text/html")
    assets = {name: Asset.read(name, media_type) for name, media_type in FILES.items()}

    @router.get("/", responses=answers("text/html", "application/json"))
    def home(request: Request, f: Literal["", "json", "html"] = "") -> Response:
        """The map page; the links of the OGC landing page with `?f=json` or `Accept: application/json`."""
        accepted = request.headers.get("accept", "")
        wants_json = "application/json" in accepted and "text/html" not in accepted
        if f == "json" or (f != "html" and wants_json):
            answer = cached_json(request, ("landing",), lambda: LANDING)
        else:
            answer = page.answer(request)
        answer.headers["Vary"] = "Accept"
        return answer

    @router.get("/static/{name:path}", include_in_schema=False)
    def static(request: Request, name: str) -> Response:
        if name not in assets:
            raise Problem(404, "no such file")
        return assets[name].answer(request)

    @router.get("/runs", responses=answers("application/json"))
    def runs(request: Request) -> Response:
        """The newest runs, newest first: times, domain, quantities; and the legends of their colours."""
        snapshot, newest = forecasts.newest(SHOWN)
        stale = [run.stale for run in newest]

        def listed() -> object:
            return {
                "snapshot": snapshot,
                "runs": [_listed(run) for run in newest],
                "legends": {"rate": RATE.legend(), "probability": PROBABILITY.legend()},
            }

        return cached_json(request, ("runs", snapshot, stale), listed, run=newest[0] if newest else None)

    return router


LANDING = {
    "title": "metnet nowcast",
    "description": "A probabilistic rain forecast for the next hours",
    "links": [
        {"href": ".", "rel": "self", "type": "application/json"},
        {"href": ".", "rel": "alternate", "type": "text/html", "title": "the map"},
        {"href": "openapi.json", "rel": "service-desc", "type": "application/json", "title": "OpenAPI 3.1"},
        {"href": "conformance", "rel": "conformance", "type": "application/json"},
        {"href": "collections", "rel": "data", "type": "application/json"},
        {"href": "runs", "rel": "related", "type": "application/json", "title": "the runs"},
        {"href": "healthz", "rel": "status", "type": "application/json", "title": "health"},
    ],
}
"""Links from where this is asked for: a proxy may have put a folder before it."""


def _listed(run: Run) -> dict[str, object]:
    return {
        **run.stamp,
        "name": run.name,
        "leads": [
            {"lead_time": f"{lead:g}", "valid_time": iso(time)}
            for lead, time in zip(run.header.lead_times, run.valid_times, strict=True)
        ],
        "quantities": [
            {"name": quantity.name, "label": quantity.label, "kind": quantity.kind}
            for quantity in run.quantities.values()
        ],
        "bounds": run.bounds,
        "outline": run.outline,
        "cell_size": round(run.header.grid.cell_size),
        "made_by": {name: run.header.attributes[name] for name in TOLD if name in run.header.attributes},
    }
