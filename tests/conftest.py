"""Fixtures that every room shares."""

import os
import signal
from pathlib import Path

import pytest

import cli  # noqa: F401  (sets how OpenMP waits, before torch is loaded)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors of tests are small: more threads only wait

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real radar and satellite files."""
    folder = Path(os.environ.get("METNET_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have the real files, and {folder} is not there")
        pytest.skip(f"no real radar files at {folder}; set METNET_DATA to their folder")
    return folder
