"""`cached`: answers with a strong ETag, and 304 to a client that has them (RFC 9110, sections 8.8 and 13)."""

import hashlib
import json
from collections.abc import Callable

from fastapi import Request, Response

from pipelines.version import version

REVALIDATE = "no-cache"
"""The client keeps the answer, and asks each time whether it still holds."""

UNCHANGING = "public, max-age=3600"
"""What a run of the store says never changes."""


def cached(
    request: Request, seed: tuple[object, ...], make: Callable[[], bytes], media_type: str, cache_control: str
) -> Response:
    """The answer of `make`, unless the client has it already.

    `seed` is all that the answer depends on (the snapshot id and the canonical query): equal seeds, equal
    bytes, in every process that runs this version of the software.
    """
    told = "\0".join(str(part) for part in (version(), media_type, *seed))
    etag = f'"{hashlib.sha256(told.encode()).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": cache_control}
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    return Response(make(), media_type=media_type, headers=headers)


def cached_json(
    request: Request,
    seed: tuple[object, ...],
    make: Callable[[], object],
    media_type: str = "application/json",
) -> Response:
    """As `cached`, for what is written as JSON and may change with the next run; NaN is refused."""

    def body() -> bytes:
        return json.dumps(make(), allow_nan=False).encode()

    return cached(request, seed, body, media_type, REVALIDATE)


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether the client's list of tags names this one (weak comparison, as GET asks for)."""
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in (etag, "*") for tag in tags)
