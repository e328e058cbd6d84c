"""The server process: it starts, says where, stops in order, and tells plainly why it cannot start."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from serve.server import Served, serve
from tests.serve.conftest import write

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_order(tmp_path: Path, end: signal.Signals) -> None:
    write(tmp_path / "forecasts")
    code = f"from serve.server import serve; print(serve({str(tmp_path / 'forecasts')!r}, port=0))"
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
        serve(str(tmp_path / "forecasts"), host=host, port=port)
