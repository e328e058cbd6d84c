"""The server process: a socket, uvicorn, and an orderly end."""

import errno
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import uvicorn
from prometheus_client import CollectorRegistry, start_http_server
from rich.console import Console

from serve.app import Output, create_app
from serve.forecasts import Forecasts

logger = logging.getLogger(__name__)

LACKING = "without TLS, a key, or a deadline for slow requests"


@dataclass(frozen=True)
class Served:
    """How a server's life ended."""

    address: str

    def __str__(self) -> str:
        """One line for the terminal."""
        return f"stopped serving {self.address}"


def serve(
    forecasts: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    stale_after: float = 60.0,
    cache: float = 512.0,
    max_in_flight: int = 64,
    public: bool = False,
    metrics_port: int | None = None,
    more_outputs: Sequence[Output] = (),
) -> Served:
    """Serves a forecast store until SIGINT or SIGTERM; requests in progress are answered first.

    `stale_after` is minutes, `cache` is megabytes of decoded fields, port 0 is any free one. What Prometheus
    asks for is answered at `metrics_port`, on this machine only; None: nowhere.

    Raises:
        ValueError: if there is no forecast store at `forecasts`, for a number out of range, or for a host
            that others can reach and not `public`.
        OSError: if the host and port, or the port for metrics, cannot be had.
    """
    if not (public or _is_loopback(host)):
        raise ValueError(
            f"host={host}: answers anyone who can reach this machine, {LACKING}; leave host=127.0.0.1 and "
            "put a proxy such as nginx in front that has them, or add public=true"
        )
    for key, number, unit in (("stale_after", stale_after, "minutes"), ("cache", cache, "megabytes")):
        if not 0 <= number <= 1e9:
            raise ValueError(f"{key}={number:g}: expected {unit}, from 0 to 1e9")
    reader = Forecasts(forecasts, timedelta(minutes=stale_after), cache_bytes=int(cache * 2**20))
    app = create_app(reader, more_outputs, max_in_flight)
    with _bound(host, port) as listener, _metrics_at(metrics_port, app.state.metrics):
        address = _address(host, listener.getsockname()[1])
        if not _is_loopback(host):
            logger.warning("host=%s answers anyone who can reach this machine, %s", host, LACKING)
        Console(stderr=True).print(
            f"serving {forecasts} at {address} (Ctrl+C stops)", highlight=False, soft_wrap=True
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=8,
                timeout_keep_alive=10,
            )
        )
        with _signals_end_quietly():
            server.run(sockets=[listener])
    return Served(address)


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is told before anything else starts."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends the body without waiting for the head's acknowledgement (40 ms) only if TCP is named
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, OverflowError) as error:
        raise OSError(f"host={host} port={port}: cannot be listened on ({error})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} on {host} is in use; stop what serves there or choose another with port=N"
            ) from error
        raise OSError(f"host={host} port={port}: cannot be listened on ({error})") from error
    return listener


@contextmanager
def _metrics_at(port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    """Answers Prometheus meanwhile, on the loopback."""
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"metrics_port={port}: cannot be listened on at 127.0.0.1 ({error}); choose another, or null"
        ) from error
    Console(stderr=True).print(f"metrics at http://127.0.0.1:{server.server_port}/metrics", soft_wrap=True)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches it; a name that is none is told of when it is listened on."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host or None, 0, flags=socket.AI_PASSIVE)}
    except (OSError, UnicodeError):
        return True
    addresses = map(ip_address, (address.partition("%")[0] for address in found))
    return all((getattr(each, "ipv4_mapped", None) or each).is_loopback for each in addresses)


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Has uvicorn stop on a signal without an error: it raises it again afterwards, for nobody."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
