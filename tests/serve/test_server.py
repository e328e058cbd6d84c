"""The server process: it starts, says where, stops in order, and tells plainly why it cannot start."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serve.app import create_app
from serve.forecasts import Forecasts
from serve.server import Served, _bound, _is_loopback, _metrics_at, serve
from tests.serve.conftest import write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_order(tmp_path: Path, end: signal.Signals) -> None:
    write(tmp_path / "forecasts")
    code = (
        f"from serve.server import _is_loopback, serve; print(serve({str(tmp_path / 'forecasts')!r}, port=0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            first = server.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", first)
            assert found, first
            assert httpx.get(found[0] + "healthz", timeout=10).status_code == 200
            server.send_signal(end)
            out, err = server.communicate(timeout=15)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert out.strip() == str(Served(found[0]))
    assert "Traceback" not in err


def test_a_body_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    """Nagle's algorithm and delayed acknowledgements would together add 40 ms to every tile of a kept connection."""

    async def without_delay() -> int:
        with _bound("127.0.0.1", 0) as listener:
            seen = asyncio.get_running_loop().create_future()
            server = await asyncio.start_server(lambda _, writer: seen.set_result(writer), sock=listener)
            async with server:
                _, client = await asyncio.open_connection(*listener.getsockname())
                writer = await seen
                delay = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                client.close()
                return delay

    assert asyncio.run(without_delay())


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    write(tmp_path / "forecasts")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} on 127\.0\.0\.1 is in use.*port=N"):
            serve(str(tmp_path / "forecasts"), port=port)


def test_a_wrong_path_is_told_before_the_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="nothing"):
            serve(str(tmp_path / "nothing"), port=taken.getsockname()[1])


@pytest.mark.parametrize("key", ["stale_after", "cache"])
@pytest.mark.parametrize("number", [float("nan"), -1.0, float("inf")])
def test_a_number_out_of_range_is_named(tmp_path: Path, key: str, number: float) -> None:
    write(tmp_path / "forecasts")
    with pytest.raises(ValueError, match=f"^{key}={number:g}: expected m"):
        serve(str(tmp_path / "forecasts"), port=0, **{key: number})


@pytest.mark.parametrize(
    ("host", "port"), [("203.0.113.77", 8000), ("127.0.0.1", 99999), ("no such host", 8000)]
)
def test_an_address_that_cannot_be_had_is_named(tmp_path: Path, host: str, port: int) -> None:
    write(tmp_path / "forecasts")
    with pytest.raises(OSError, match=re.escape(f"host={host} port={port}")):
        serve(str(tmp_path / "forecasts"), host=host, port=port, public=True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "203.0.113.77"])
def test_others_are_let_in_only_where_that_is_meant(tmp_path: Path, host: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^host={host}: .* without TLS, a key.*host=127\.0\.0\.1.*public=true"
    ):
        serve(str(tmp_path / "forecasts"), host=host, port=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "LOCALHOST", "::1", "::ffff:127.0.0.1"])
def test_what_this_machine_alone_reaches_needs_no_leave(host: str) -> None:
    assert _is_loopback(host)


def test_metrics_have_a_port_of_their_own_on_this_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "forecasts")
    app = create_app(Forecasts(str(tmp_path / "forecasts")))
    with _metrics_at(0, app.state.metrics):
        address = capfd.readouterr().err.split()[-1]
        assert address.startswith("http://127.0.0.1:")
        answer = httpx.get(address)
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert "metnet_store_reachable 1.0" in answer.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    with _metrics_at(None, app.state.metrics):
        assert capfd.readouterr().err == ""


def test_a_port_for_metrics_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    write(tmp_path / "forecasts")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises(OSError, match=rf"metrics_port={port}: .*choose another"):
                serve(str(tmp_path / "forecasts"), port=0, metrics_port=port)
