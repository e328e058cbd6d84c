"""`cached`: answers with a strong ETag, and 304 to a client that has them (RFC 9110, sections 8.8 and 13)."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response

from pipelines.frame import iso
from pipelines.version import version
from serve.forecasts import Run

REVALIDATE = "no-cache"
"""The client keeps the answer, and asks each time whether it still holds: even a run of the past may be
rolled back and made anew under its name."""


def answers(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """What a route that is `cached` answers, for the description of the interface."""
    return {
        200: {"content": {media_type: {} for media_type in media_types}},
        304: {"description": "the client has the answer already"},
    }


def cached(
    request: Request,
    seed: tuple[object, ...],
    make: Callable[[], bytes],
    media_type: str,
    run: Run | None = None,
) -> Response:
    """The answer of `make`, unless the client has it already; of a run, the headers tell how fresh it is.

    `seed` and the run are all that the answer depends on: equal ones have equal bytes and headers, in every
    process that runs this version of the software.
    """
    of_run = () if run is None else (run.snapshot, run.name, run.stale)
    told = "\0".join(str(part) for part in (version(), media_type, *of_run, *seed))
    etag = f'"{hashlib.sha256(told.encode()).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": REVALIDATE}
    if run is not None:
        headers |= {"Metnet-Init-Time": iso(run.header.init_time), "Metnet-Stale": str(run.stale).lower()}
        headers["Metnet-Degraded"] = str(run.degraded).lower()
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    return Response(make(), media_type=media_type, headers=headers)


def cached_json(
    request: Request,
    seed: tuple[object, ...],
    make: Callable[[], object],
    media_type: str = "application/json",
    run: Run | None = None,
) -> Response:
    """As `cached`, for what is written as JSON; NaN is refused."""

    def body() -> bytes:
        return json.dumps(make(), allow_nan=False).encode()

    return cached(request, seed, body, media_type, run)


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the client's list of tags names this one (weak comparison, as GET asks for)."""
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in (etag, "*") for tag in tags)
