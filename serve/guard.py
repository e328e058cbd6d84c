"""`Guard`: what holds for every request and answer, whatever the route (plain ASGI)."""

import logging
import time
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics
from serve.problems import problem_response

logger = logging.getLogger(__name__)

CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)

ALWAYS_ANSWERED = ("/healthz", "/readyz", "/static/")  # from memory, and not to be waited for


class Guard:
    """Lets GET and HEAD through, bounds addresses and the work at one time, adds security headers, counts."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, max_in_flight: int = 64, longest_address: int = 4096
    ) -> None:
        self.app = app
        self.max_in_flight = max_in_flight
        self.longest_address = longest_address  # bytes of path and query
        self.in_flight = 0
        self.metrics = metrics
        metrics.in_flight.set_function(lambda: self.in_flight)
        metrics.limit.set(max_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or hands on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}
        send = _secured(send if scope["method"] != "HEAD" else _without_body(send))
        send = _counted(send, inner, self.metrics)
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await self.app(inner, receive, send)
        except Exception:  # none of a route's own faults may reach the client as anything but this
            logger.exception("a request failed")
            fault = problem_response(500, "the server could not answer; the fault is in its log")
            await fault(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        """The answer to a request that is not let through: 400, 405, 414 or 503."""
        if scope["method"] not in ("GET", "HEAD"):
            return problem_response(405, "only GET and HEAD are answered", {"Allow": "GET, HEAD"})
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > self.longest_address:
            return problem_response(414, f"the address is longer than {self.longest_address} bytes")
        query = scope["query_string"].decode("latin-1")  # any bytes may come
        keys = [key for key, _ in parse_qsl(query, keep_blank_values=True)]
        if len(keys) != len(set(keys)):
            return problem_response(400, "a query key is given twice; expected each once")
        if self.in_flight >= self.max_in_flight and not scope["path"].startswith(ALWAYS_ANSWERED):
            return problem_response(503, "too many requests at this moment", {"Retry-After": "1"})
        return None


def _secured(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *SECURITY_HEADERS]}
        await send(message)

    return send_with_headers


def _counted(send: Send, scope: Scope, metrics: Metrics) -> Send:
    begun = time.perf_counter()

    async def send_and_count(message: Message) -> None:
        if message["type"] == "http.response.start":
            metrics.answered(scope, message["status"], time.perf_counter() - begun)
        await send(message)

    return send_and_count


def _without_body(send: Send) -> Send:
    """HEAD: the headers of GET, and no body."""

    async def send_headers(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_headers
