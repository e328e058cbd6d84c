"""`Web`: requests to the services of others, made as a guest should.

Known by name, few tries, never sooner than a Retry-After says, never faster than a given rate, bounded in
time and bytes. obstore 0.12 has neither that rate nor Retry-After (its retries ignore it, and its errors do
not show it; apache/arrow-rs-object-store#410), so what a feed fetches goes through here.
"""

import base64
import hashlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pipelines.version import version

Answer = TypeVar("Answer")
TRANSIENT = {408, 425, 429}  # and all from 500: worth another try
LONGEST_REST = 86_400.0  # s: a Retry-After beyond a day is taken as a day
CHUNK = 2**16  # bytes
GRACE = 10.0  # s of reading that do not count, before a body may be called too slow


class Clock(Protocol):
    """What the time is, and how it passes."""

    @property
    def stopped(self) -> bool:
        """Whether the work is to end."""
        ...

    def now(self) -> datetime:
        """The time (UTC)."""
        ...

    def seconds(self) -> float:
        """Seconds that only ever rise."""
        ...

    def sleep(self, seconds: float) -> None:
        """Returns after so many seconds, or when the work is to end."""
        ...


class SystemClock:
    """The machine's clock; `stop` ends every sleep (set it from a signal handler)."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether the work is to end."""
        return self.stop.is_set()

    def now(self) -> datetime:
        """The time (UTC)."""
        return datetime.now(UTC)

    def seconds(self) -> float:
        """Seconds that only ever rise."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Returns after so many seconds, or when the work is to end."""
        self.stop.wait(seconds)


@dataclass(frozen=True)
class Manners:
    """What one request may cost, here and there."""

    tries: int = 3
    backoff: float = 1.0  # s, the longest wait after the first try; it doubles from try to try
    longest_backoff: float = 30.0  # s
    idle: float = 20.0  # s without a byte
    total: float = 300.0  # s of a request with all its tries and waits
    min_rate: float = 1000.0  # bytes/s below which a body is given up
    max_rate: float | None = None  # bytes/s of all bodies together; None: as fast as it comes

    def __post_init__(self) -> None:
        """Refuses what no request could meet.

        Raises:
            ValueError: for less than one try, or a time or rate that is not above 0.
        """
        if self.tries < 1 or min(self.backoff, self.longest_backoff, self.idle, self.total) <= 0:
            raise ValueError(f"{self}: expected at least 1 try, and times above 0 s")
        if self.min_rate < 0 or (self.max_rate is not None and self.max_rate <= 0):
            raise ValueError(f"{self}: expected a min_rate from 0 and a max_rate above 0 bytes/s")


class UnreachableError(OSError):
    """A service did not answer, or not whole, in all tries; `rest`: how long it wants no request (s)."""

    def __init__(self, message: str, rest: float = 0.0):
        super().__init__(message)
        self.rest = rest


class DeniedError(ValueError):
    """A service answered, and asking again would bring no other answer."""


class NothingThereError(DeniedError):
    """It answered that there is nothing at this address (404, 410)."""


class _FailedTryError(Exception):
    """One try failed in a way that the next may not; `rest`: the Retry-After (s)."""

    def __init__(self, message: str, rest: float | None = None):
        super().__init__(message)
        self.rest = rest


@dataclass(frozen=True)
class Page:
    """A small answer, whole."""

    body: bytes
    headers: Message


Opened = Callable[[socket.socket], None]


class _PlainConnection(HTTPConnection):
    """A connection that tells of its socket."""

    def __init__(self, opened: Opened, *words: Any, **options: Any):
        super().__init__(*words, **options)
        self._opened = opened

    def connect(self) -> None:
        """Opens it."""
        super().connect()
        self._opened(self.sock)


class _SecureConnection(HTTPSConnection):
    """The same with TLS."""

    def __init__(self, opened: Opened, *words: Any, **options: Any):
        super().__init__(*words, **options)
        self._opened = opened

    def connect(self) -> None:
        """Opens it."""
        super().connect()
        self._opened(self.sock)


class _Handler(request.AbstractHTTPHandler):
    """Opens http and https URLs through such connections."""

    def __init__(self, opened: Opened):
        super().__init__()
        self._plain = partial(_PlainConnection, opened)
        self._secure = partial(_SecureConnection, opened)
        self._context = ssl.create_default_context()

    def http_open(self, asked: request.Request) -> HTTPResponse:
        """The answer by http."""
        return self.do_open(self._plain, asked)

    def https_open(self, asked: request.Request) -> HTTPResponse:
        """The answer by https."""
        return self.do_open(self._secure, asked, context=self._context)

    http_request = https_request = request.AbstractHTTPHandler.do_request_


class Web:
    """Requests with manners. A Retry-After that one request meets holds for all of them."""

    def __init__(self, manners: Manners | None = None, clock: Clock | None = None, seed: int | None = None):
        """`seed` is of the jitter; None: other waits each time."""
        self.manners = manners or Manners()
        self.clock = clock or SystemClock()
        self.random = random.Random(seed)
        self._opener = request.OpenerDirector()  # without files, FTP, and redirects to who knows where
        for handler in (
            request.ProxyHandler(),
            _Handler(self._opened),
            request.HTTPDefaultErrorHandler(),
            request.HTTPErrorProcessor(),
            request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)
        self._socket: socket.socket | None = None  # of the request under way
        self._rest_until: dict[str, float] = {}  # by host, in seconds of the clock
        self._free_at = 0.0  # when the bandwidth allows the next byte

    def page(self, url: str, largest: int, known: dict[str, str] | None = None) -> Page | None:
        """The answer to a GET; None if the service says that what is `known` (by headers) is still true.

        Raises:
            UnreachableError: if no try brought it whole.
            DeniedError: if the service refuses it, or it has more than `largest` bytes.
        """

        def once(deadline: float) -> Page | None:
            with self._answer(url, known or {}, deadline) as response:
                if response is None:
                    return None
                return Page(b"".join(self._body(response, deadline, largest)), response.headers)

        return self._tried(url, once)

    def download(self, url: str, path: Path, largest: int, size: int | None, etag: str | None) -> None:
        """Stores what a URL gives: whole, with the size and the ETag that were announced, or not at all.

        An ETag that is an MD5 (S3) is compared with the bytes.

        Raises:
            UnreachableError: if no try brought it whole.
            DeniedError: if the service refuses it, it has more than `largest` bytes, or is another by now.
            OSError: if it cannot be stored.
        """
        part = path.with_name(f".{path.name}.part")

        def once(deadline: float) -> None:
            with self._answer(url, {}, deadline) as response, part.open("wb") as file:
                assert response is not None  # nothing was said to be known
                _check_announced(response, size, etag)
                md5, received = hashlib.md5(usedforsecurity=False), 0
                for chunk in self._body(response, deadline, largest):
                    file.write(chunk)
                    md5.update(chunk)
                    received += len(chunk)
            if size is not None and received != size:
                raise _FailedTryError(f"{received} bytes arrived of {size}")
            expected = _md5(response.headers)
            if expected is not None and md5.hexdigest() != expected:
                raise _FailedTryError(
                    f"the bytes that arrived have the MD5 {md5.hexdigest()}, not {expected}"
                )
            part.replace(path)

        try:
            self._tried(url, once)
        finally:
            part.unlink(missing_ok=True)

    def _tried(self, url: str, once: Callable[[float], Answer]) -> Answer:
        """What one of the tries brings; each knows until when (in seconds of the clock) it may go on."""
        host, shown, problem = urlsplit(url).netloc, _shown(url), ""
        deadline = self.clock.seconds() + self.manners.total
        for attempt in range(self.manners.tries):
            self._await_rest(host, shown, deadline, problem)
            try:
                return once(deadline)
            except _FailedTryError as error:
                problem = str(error)
                wait = self._wait(attempt)
                if error.rest is not None:
                    self._rest_until[host] = self.clock.seconds() + error.rest + wait
            if attempt + 1 < self.manners.tries:
                if self.clock.seconds() + wait > deadline:
                    raise UnreachableError(f"{shown}: {problem}; {self.manners.total:g} s were not enough")
                self.clock.sleep(wait)
        rest = self._rest_until.get(host, 0.0) - self.clock.seconds()
        raise UnreachableError(
            f"{shown}: {problem} (in the last of {self.manners.tries} tries)", max(0.0, rest)
        )

    def _wait(self, attempt: int) -> float:
        """How long to wait after a try, with full jitter, so that not all guests come back at once."""
        longest = min(self.manners.longest_backoff, self.manners.backoff * 2**attempt)
        return self.random.uniform(0, longest)

    def _await_rest(self, host: str, shown: str, deadline: float, problem: str) -> None:
        """Waits until the host wants requests again; raises if that is beyond the deadline."""
        rest = self._rest_until.get(host, 0.0) - self.clock.seconds()
        if rest > 0:
            if self.clock.seconds() + rest > deadline:
                because = f"{problem}; " if problem else ""
                raise UnreachableError(
                    f"{shown}: {because}{host} asked for {rest:.0f} s without requests", rest
                )
            self.clock.sleep(rest)
        if self.clock.stopped:
            raise UnreachableError(f"{shown}: stopped before it was fetched")

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str], deadline: float) -> Iterator[HTTPResponse | None]:
        """The open answer to a GET; None: nothing changed (304)."""
        asked = request.Request(url, headers={"User-Agent": f"metnet-nowcast/{version()}", **headers})
        try:
            with self._ended_at(deadline):
                response = self._opener.open(asked, timeout=self.manners.idle)
        except HTTPError as error:
            with error:
                if error.code != 304:
                    raise self._refusal(error) from None
            yield None
            return
        except (OSError, HTTPException) as error:
            raise _FailedTryError(_said(error)) from None
        with response:
            yield response

    def _refusal(self, error: HTTPError) -> Exception:
        """What a status that is no success means."""
        said = f"HTTP {error.code} {error.reason}"
        if error.code in TRANSIENT or error.code >= 500:
            return _FailedTryError(said, retry_after(error.headers.get("Retry-After"), self.clock.now()))
        shown = _shown(error.url)
        if 300 <= error.code < 400:
            region = error.headers.get("x-amz-bucket-region")
            place = f"the region {region}" if region else error.headers.get("Location", "nowhere")
            return DeniedError(
                f"{shown}: {said}: it lies at {place}; redirects are not followed, name that place"
            )
        if error.code in (404, 410):
            return NothingThereError(f"{shown}: {said}")
        advice = " (or no right to read it)" if error.code in (401, 403) else ""
        return DeniedError(f"{shown}: {said}{advice}")

    def _body(self, response: HTTPResponse, deadline: float, largest: int) -> Iterator[bytes]:
        """The bytes of an answer as they come, at no more than the allowed rate."""
        announced, received, reading, slept = _length(response.headers), 0, 0.0, 0.0
        if announced is not None and announced > largest:
            shown = _shown(response.geturl())
            raise DeniedError(f"{shown}: {announced} bytes, more than the allowed {largest}")
        while True:
            before = self.clock.seconds()
            try:
                with self._ended_at(deadline + slept):
                    chunk = response.read1(CHUNK)
            except (OSError, HTTPException) as error:
                raise _FailedTryError(f"{_said(error)} after {received} bytes") from None
            reading += self.clock.seconds() - before
            if self.clock.stopped:
                raise UnreachableError(f"{_shown(response.geturl())}: stopped before it was fetched")
            if not chunk:
                break
            received += len(chunk)
            if received > largest:
                raise DeniedError(f"{_shown(response.geturl())}: more than the allowed {largest} bytes")
            if self.clock.seconds() - slept > deadline:
                raise _FailedTryError(f"{received} bytes arrived in {self.manners.total:g} s")
            if received < self.manners.min_rate * (reading - GRACE):
                raise _FailedTryError(f"too slow: {received / reading:.0f} bytes/s")
            slept += self._throttle(len(chunk))
            yield chunk
        if announced is not None and received != announced:
            raise _FailedTryError(f"{received} bytes arrived of {announced}")
        if announced is None and not response.chunked:
            raise _FailedTryError("an answer without a length, so that nobody knows whether it is whole")

    @contextmanager
    def _ended_at(self, deadline: float) -> Iterator[None]:
        """Ends the connection at the deadline, even if bytes drip in that make up no answer."""
        timer = threading.Timer(max(0.0, deadline - self.clock.seconds()), self._hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _opened(self, connected: socket.socket) -> None:
        self._socket = connected

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it was closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # of the bare connection, below TLS

    def _throttle(self, count: int) -> float:
        """Waits until the bandwidth allows what comes after `count` bytes; how long that was (s)."""
        if self.manners.max_rate is None:
            return 0.0
        now = self.clock.seconds()
        self._free_at = max(now, self._free_at) + count / self.manners.max_rate
        self.clock.sleep(self._free_at - now)
        return self._free_at - now


def retry_after(text: str | None, now: datetime) -> float | None:
    """The seconds that a Retry-After asks for (RFC 9110 10.2.3: seconds, or a date); None: nothing."""
    if text is None:
        return None
    if re.fullmatch(r"\s*\d{1,10}\s*", text):
        return min(float(text), LONGEST_REST)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(max(0.0, (date - now).total_seconds()), LONGEST_REST)


def _shown(url: str) -> str:
    """A URL without its query, which may hold a signature."""
    return url.partition("?")[0]


def _said(error: Exception) -> str:
    """What went wrong with a connection, in a few words."""
    reason = getattr(error, "reason", None) or error
    return f"{reason}" if str(reason) else type(error).__name__


def _length(headers: Message) -> int | None:
    """The Content-Length, if there is a sound one."""
    text = headers.get("Content-Length", "")
    return int(text) if re.fullmatch(r"\d{1,15}", text) else None


def _check_announced(response: HTTPResponse, size: int | None, etag: str | None) -> None:
    """Refuses an answer that is not what the listing announced."""
    answered = response.headers.get("ETag")
    if etag is not None and answered is not None and _plain(answered) != _plain(etag):
        raise DeniedError(
            f"{_shown(response.geturl())}: replaced since it was listed; the next listing has the new one"
        )
    length = _length(response.headers)
    if size is not None and length is not None and length != size:
        raise _FailedTryError(f"{length} bytes announced, but {size} listed")


def _plain(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _md5(headers: Message) -> str | None:
    """The MD5 of S3's and Google's whole objects.

    An ETag is none where S3 encrypts with a key of its own service, for an object in parts, or elsewhere.
    """
    if encoded := re.search(r"md5=([A-Za-z0-9+/]{22}==)", headers.get("x-goog-hash", "")):
        return base64.b64decode(encoded[1]).hex()
    encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    of_customer = headers.get("x-amz-server-side-encryption-customer-algorithm") is not None
    etag = _plain(headers.get("ETag", ""))
    is_s3 = any(name.lower().startswith("x-amz") for name in headers)
    plain = is_s3 and not encrypted and not of_customer and re.fullmatch("[0-9a-f]{32}", etag)
    return etag if plain else None
