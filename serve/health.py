"""Health: whether the server lives and reads its store, and how fresh the newest run is."""

import json

from fastapi import APIRouter, Response

from serve.forecasts import Forecasts, iso


def routes(forecasts: Forecasts) -> APIRouter:
    """The health check."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz", response_class=Response, responses={200: {"content": {"application/json": {}}}})
    def healthz() -> Response:
        """`ok`, `stale` (the newest run is old), `empty` (no run yet), or 503 `unreadable`."""
        snapshot, runs = forecasts.newest(1)
        fresh = "empty" if not runs else "stale" if runs[0].stale else "ok"
        status = fresh if forecasts.reachable else "unreadable"
        newest = {"run": runs[0].name, "init_time": iso(runs[0].header.init_time)} if runs else {}
        return Response(
            json.dumps({"status": status, "snapshot": snapshot, **newest}),
            status_code=200 if forecasts.reachable else 503,
            media_type="application/json",
            headers={"Cache-Control": "no-store"},
        )

    return router
