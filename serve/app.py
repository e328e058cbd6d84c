"""The HTTP service: every output mounted on one reader of forecasts."""

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI, Request, Response

from pipelines.version import version
from serve import edr, health, page, point, problems, tiles
from serve.caching import cached_json
from serve.forecasts import Forecasts
from serve.guard import Guard
from serve.metrics import Metrics

Output = Callable[[Forecasts], APIRouter]
"""A kind of answer: given the forecasts, its routes."""

OUTPUTS: tuple[Output, ...] = (page.routes, tiles.routes, point.routes, edr.routes, health.routes)


def create_app(forecasts: Forecasts, more_outputs: Sequence[Output] = (), max_in_flight: int = 64) -> FastAPI:
    """The service over these forecasts; beyond `max_in_flight` requests at a time it answers 503.

    `app.state.metrics` is the registry of what Prometheus is told.
    """
    app = FastAPI(
        title="metnet nowcast",
        summary="A probabilistic rain forecast for the next hours",
        version=version(),
        openapi_url=None,  # it would have no tag, and could be kept
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to an address made of whatever host the client, or a proxy, names
        responses=problems.ANSWERS,
    )
    problems.install(app)
    for output in (*OUTPUTS, *more_outputs):
        app.include_router(output(forecasts))
    _describe(app)
    metrics = Metrics(forecasts)
    app.state.metrics = metrics.registry
    app.add_middleware(Guard, metrics=metrics, max_in_flight=max_in_flight)
    return app


def _describe(app: FastAPI) -> None:
    """Adds the description of all that the app answers."""

    @app.get("/openapi.json", include_in_schema=False)
    def description(request: Request) -> Response:
        described = app.openapi()
        return cached_json(request, ("openapi", described), lambda: described)
