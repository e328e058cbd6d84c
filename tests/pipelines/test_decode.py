"""`Decoder`: whatever a file does to its reader, this process gets a frame or a reason."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipelines.decode import Decoder, Limits, decode
from pipelines.sources.simulated import Simulated
from pipelines.sources.source import RemoteFile, Source

MIDNIGHT = datetime(2020, 6, 1, tzinfo=UTC)

# A source whose reader does what stands in the file.
ACTOR = """
import ctypes, os, time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame
from pipelines.grid import Grid


@dataclass(frozen=True)
class Actor:
    trusted: ClassVar[bool] = False

    def read(self, path):
        play = path.read_text()
        if play == "crash":
            ctypes.string_at(0)
        if play == "abort":
            print("double free or corruption", flush=True)
            os.abort()
        if play == "hang":
            time.sleep(60)
        if play == "spin":
            while True:
                pass
        if play == "exhaust":
            np.ones(2**34, np.uint8)
        if play == "fill the disk":
            with open(path.with_suffix(".big"), "wb") as file:
                file.write(bytes(3 * 2**20))
        if play == "stumble":
            {}["data1"]
        if play == "refuse":
            raise ValueError(f"{path.name}: not mine")
        values = np.full((3, 4), os.getpid() if play == "pid" else 7.5, np.float32)
        values[1, 2] = np.nan
        time_ = datetime(2020, 6, 1, tzinfo=UTC)
        grid = Grid("EPSG:3035", 0.0, 1000.0, 4, 0.0, -1000.0, 3)
        if play == "pid":
            values = values % 1000
        frame = Frame(RAINFALL_RATE, time_, timedelta(minutes=5), grid, values, "actor", "ab" * 32)
        if play == "lie":
            values[0, 0] = -99
        return frame
"""


@pytest.fixture
def actor(tmp_path, monkeypatch) -> Source:
    (tmp_path / "actor_source.py").write_text(ACTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "actor_source", raising=False)
    import actor_source

    return actor_source.Actor()


@pytest.fixture
def play(tmp_path):
    def write(text: str) -> RemoteFile:
        path = tmp_path / f"{text.replace(' ', '_')}.txt"
        path.write_text(text)
        return RemoteFile(str(path), MIDNIGHT)

    return write


def test_a_frame_comes_back_whole(actor, play):
    file = play("well")
    got, read = decode(actor, file), actor.read(Path(file.url))
    assert np.array_equal(got.values, read.values, equal_nan=True)
    for field in ("variable", "valid_time", "cadence", "grid", "source", "sha256"):
        assert getattr(got, field) == getattr(read, field)


def test_every_misfortune_becomes_a_reason_with_the_file_and_the_next_file_is_read(actor, play):
    fates = {
        "crash": "crashed: its process was killed by signal 11",
        "abort": "killed by signal 6 .double free or corruption",
        "exhaust": "too large to read",
        "fill the disk": "signal 25|File too large",
        "stumble": "KeyError: 'data1'",
        "refuse": "not mine",
        "lie": "no valid frame: 1 of 12 values of rainfall_rate lie outside",
    }
    with Decoder(actor, Limits(memory=4 * 2**30)) as decoder:
        for text, reason in fates.items():
            file = play(text)
            with pytest.raises((ValueError, OSError), match=reason) as caught:
                decoder.decode(file)
            assert text == "fill the disk" or Path(file.url).name in str(caught.value)
        assert decoder.decode(play("well")).values[0, 0] == 7.5


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_a_reader_that_takes_too_long_is_given_up(actor, play, text):
    with (
        Decoder(actor, Limits(seconds=1.5)) as decoder,
        pytest.raises(ValueError, match=rf"{text}.txt: reading it (took more than 1.5 s|crashed.*signal 24)"),
    ):
        decoder.decode(play(text))


def test_one_child_reads_many_files_and_then_a_fresh_one_takes_over(actor, play):
    with Decoder(actor, Limits(files=2)) as decoder:
        pids = [float(decoder.decode(play("pid")).values[0, 0]) for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_frame_of_another_time_than_the_name_says_is_refused(actor, play):
    file = RemoteFile(play("well").url, MIDNIGHT.replace(hour=3))
    with pytest.raises(
        ValueError, match=r"well.txt: .* 2020-06-01T00:00:00Z, but its name says 2020-06-01T03"
    ):
        decode(actor, file)


def test_a_missing_file_is_an_os_error(actor):
    with pytest.raises(OSError, match=r"No such file.*gone.txt"):
        decode(actor, RemoteFile("gone.txt", MIDNIGHT))


def test_a_trusted_source_needs_no_child():
    with Decoder(Simulated()) as decoder:
        frame = decoder.decode(next(Simulated().files(None, None)))
        assert decoder._child is None
    assert (frame.values > 0).any()


def test_the_child_ends_with_the_decoder(actor, play):
    with Decoder(actor) as decoder:
        decoder.decode(play("well"))
        process = decoder._child.process
        assert process.poll() is None
    assert process.poll() is not None
