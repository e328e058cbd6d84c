"""Fixtures that every room shares."""

import os
import signal
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import settings

import cli  # noqa: F401  (sets how OpenMP waits, before torch is loaded)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors of tests are small: more threads only wait

settings.register_profile("untimed", deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")

ROOT = Path(__file__).parent.parent
ALL = "1/1"
LONGEST = "test_main_job"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Slow tests may take turns, of which one is run."""
    parser.addoption(
        "--turn", default=ALL, metavar="K/N", help="of the slow tests only one in N, the Kth part"
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Says which of the slow tests are left for another time."""
    turn = config.getoption("--turn")
    return "all slow tests" if turn == ALL else f"slow tests: part {turn} (make test TURN={ALL} runs all)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests whose turn it is not: those of a file together, one with parameters by each.

    The longest come first, so that at the end no process waits for the one that has drawn them.
    """
    part, parts = map(int, config.getoption("--turn").split("/"))
    kept, left = [], []
    for item in items:
        own = item.nodeid if "[" in item.nodeid else item.nodeid.split("::")[0]
        waits = item.get_closest_marker("slow") and crc32(own.encode()) % parts != part - 1
        (left if waits else kept).append(item)
    items[:] = sorted(
        kept, key=lambda item: not (item.get_closest_marker("slow") or item.path.stem == LONGEST)
    )
    config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real radar and satellite files."""
    folder = Path(os.environ.get("METNET_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have the real files, and {folder} is not there")
        pytest.skip(f"no real radar files at {folder}; set METNET_DATA to their folder")
    return folder
