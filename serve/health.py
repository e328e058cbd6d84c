"""Health: whether the server lives and reads its store, and whether its newest run is fresh."""

import json
from typing import Any

from fastapi import APIRouter, Response

from serve.forecasts import Forecasts

ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {}}}
    for status, description in ((200, "well"), (503, "not"))
}


def routes(forecasts: Forecasts) -> APIRouter:
    """The health checks."""
    router = APIRouter(tags=["health"], default_response_class=Response)

    @router.get("/healthz", responses=ANSWERS)
    def healthz() -> Response:
        """`ok`, `stale` (the newest run is old), `empty` (no run yet), or 503 `unreadable`."""
        return _told(forecasts, fine=("ok", "stale", "empty"))

    @router.get("/readyz", responses=ANSWERS)
    def readyz() -> Response:
        """As /healthz, but 503 for `stale` and `empty` too: whether clients are to be sent here."""
        return _told(forecasts, fine=("ok",))

    return router


def _told(forecasts: Forecasts, fine: tuple[str, ...]) -> Response:
    snapshot, runs = forecasts.newest(1)
    fresh = "empty" if not runs else "stale" if runs[0].stale else "ok"
    status = fresh if forecasts.reachable else "unreadable"
    newest = runs[0].stamp if runs else {}
    return Response(
        json.dumps({"status": status, "snapshot": snapshot, **newest}),
        status_code=200 if status in fine else 503,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
