"""`Decoder`: whatever a file does to its reader, this process gets a frame or a reason."""

import hashlib
import logging
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pipelines import decode as decoding
from pipelines.decode import Decoder, decode
from pipelines.decoding import sandbox
from pipelines.decoding.reader import Limits, Readers
from pipelines.decoding.refusal import Code, Refusal
from pipelines.grid import Grid
from pipelines.sources.simulated import Simulated
from pipelines.sources.source import RemoteFile, Source

MIDNIGHT = datetime(2020, 6, 1, tzinfo=UTC)
GRID = Grid("EPSG:3035", 0.0, 1000.0, 4, 0.0, -1000.0, 3)

landlock = pytest.mark.skipif(
    sandbox.landlock_version() == 0, reason="this kernel has no Landlock: files cannot be closed to a process"
)

# A source whose reader does what stands in the file: a word, and what to do it with.
ACTOR = """
import contextlib, ctypes, hashlib, os, socket, time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile


@dataclass(frozen=True)
class Actor:
    path: str | None = None
    beside: bool = False
    trusted: ClassVar[bool] = False

    def places(self):
        place = Path(self.path)
        found = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not found:
            raise ValueError(f"{place}: no text in it")
        return found

    def files(self, start, end):
        for path in self.places():
            if path.read_text() == "crash":
                ctypes.string_at(0)
            if path.read_text() == "hang":
                time.sleep(60)
            yield RemoteFile(path.read_text(), start)

    def read(self, file):
        path = Path(file.url)
        play, _, subject = path.read_text().partition(" ")
        if play == "crash":
            ctypes.string_at(0)
        if play == "abort":
            print("double free or corruption", flush=True)
            os.abort()
        if play == "leave":
            os._exit(3)
        if play == "hang":
            time.sleep(60)
        if play == "spin":
            while True:
                pass
        if play == "exhaust":
            np.ones(2**34, np.uint8)
        if play == "shout":
            print("x" * 3 * 2**20, flush=True)
        if play == "stumble":
            {}["data1"]
        if play == "refuse":
            raise ValueError(f"{path.name}: {subject}")
        if play == "open":
            Path(subject).read_bytes()
        if play == "write":
            Path(subject).write_text("something")
        if play == "connect":
            socket.create_connection(("127.0.0.1", int(subject)), timeout=5)
        if play == "fork":
            os.fork()
        values = np.full((3, 4), 7.5, np.float32)
        if play in ("dribble", "nest", "boast"):
            message = {"dribble": b"", "nest": b"[" * 200_000, "boast": b""}[play]
            length = {"dribble": 9, "nest": len(message), "boast": 2**50}[play]
            for descriptor in range(3, 30):
                with contextlib.suppress(OSError):
                    os.write(descriptor, length.to_bytes(8, "little") + message)
            time.sleep(60)
        if play == "tell":
            values[0, 0] = {"pid": os.getpid() % 1000, "keys": "AWS_SECRET_ACCESS_KEY" in os.environ}[subject]
        if play == "fill":
            values[:] = float(subject)
        else:
            values[0, 1] = 0
        values[1, 2] = np.nan
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        time_ = datetime(2020, 6, 1, tzinfo=UTC)
        if play == "foresee":
            time_ = datetime.now(UTC) + timedelta(hours=2)
        cadence = timedelta(minutes=5)
        if play == "stand":
            time_, cadence = ALWAYS, None
            values[:] = float(subject)
        grid = Grid("EPSG:3035", 0.0, 1000.0, 4, 0.0, -1000.0, 3)
        frame = Frame(RAINFALL_RATE, time_, cadence, grid, values, "actor", sha256)
        if play == "count":
            frame = replace(frame, scale_factor=float(subject))
        if play == "lie":
            values[0, 0] = -99
        if play == "swap":
            object.__setattr__(frame, "sha256", "ab" * 32)
        if play == "inflate":
            object.__setattr__(grid, "x_size", 2**40)
        if play == "babble":
            object.__setattr__(frame, "grid", None)
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
def play(tmp_path) -> Callable[[str], RemoteFile]:
    def write(text: str) -> RemoteFile:
        path = tmp_path / "plays" / f"{text.split()[0]}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return RemoteFile(str(path), None)

    return write


def test_a_frame_comes_back_whole(actor, play):
    file = play("well")
    got, read = decode(actor, file), actor.read(file)
    assert np.array_equal(got.values, read.values, equal_nan=True)
    assert got.values.flags.writeable
    for field in ("variable", "valid_time", "cadence", "grid", "source", "sha256", "group"):
        assert getattr(got, field) == getattr(read, field)


FATES = {
    "crash": (Code.CRASHED, "crashed: its process was killed by signal 11"),
    "abort": (Code.CRASHED, "killed by signal 6 .double free or corruption"),
    "leave": (Code.CRASHED, "ended with code 3"),
    "exhaust": (Code.MEMORY, "too large to read"),
    "shout": (Code.DAMAGED, "File too large"),
    "stumble": (Code.DAMAGED, "KeyError: 'data1'"),
    "refuse not mine": (Code.DAMAGED, "not mine"),
    "refuse 3 of 9 values of rainfall_rate lie outside 0..1": (Code.OUT_OF_RANGE, "lie outside"),
    "refuse a gzip file that ends too early": (Code.TRUNCATED, "ends too early"),
    "refuse larger than 9 bytes": (Code.TOO_LARGE, "larger than"),
    "lie": (Code.OUT_OF_RANGE, "no valid frame: 1 of 12 values of rainfall_rate lie outside"),
    "babble": (Code.DAMAGED, "TypeError"),
    "inflate": (Code.INVALID, "no valid frame: 3 x 1099511627776 cells"),
    "swap": (Code.INVALID, "names the sha256 abab"),
    "count 2": (Code.INVALID, "its value 7.5 is no whole multiple of 2 within 65534 of 0"),
    "foresee": (Code.FUTURE, "yet to come"),
    "fill 7.5": (Code.ALL_EQUAL, "all of its 11 observed cells are 7.5 mm h-1"),
    "fill nan": (Code.UNOBSERVED, "not one of its 12 cells was observed"),
}


def test_every_misfortune_becomes_a_reason_with_the_file_and_the_next_file_is_read(actor, play):
    with Decoder(actor, Limits(memory=4 * 2**30)) as decoder:
        for text, (code, reason) in FATES.items():
            file = play(text)
            with pytest.raises(Refusal, match=rf"(?s)^{Path(file.url).name}: .*({reason})") as caught:
                decoder.decode(file)
            assert caught.value.code == code, text
        assert decoder.decode(play("well")).values[0, 0] == 7.5


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_a_reader_that_takes_too_long_is_given_up(actor, play, text):
    with Decoder(actor, Limits(seconds=1)) as decoder:
        reason = rf"^{text}.txt: reading it (took more than 1 s|crashed.*signal 24)"
        with pytest.raises(Refusal, match=reason) as caught:
            decoder.decode(play(text))
        assert caught.value.code == Code.TIMEOUT
        assert decoder.decode(play("well")).values[0, 0] == 7.5


@pytest.mark.parametrize(
    ("text", "code"),
    [("dribble", Code.TIMEOUT), ("nest", Code.INVALID), ("boast", Code.INVALID)],
)
def test_a_reader_that_was_taken_over_neither_hangs_nor_upsets_this_process(actor, play, text, code):
    with Decoder(actor, Limits(seconds=1)) as decoder:
        with pytest.raises(Refusal, match=f"^{text}.txt") as caught:
            decoder.decode(play(text))
        assert caught.value.code == code
        assert decoder.decode(play("well")).values[0, 0] == 7.5


@landlock
@pytest.mark.parametrize(
    "text",
    ["open /etc/passwd", "open {there}/sibling.txt", "open /proc/self/environ", "write {there}/new.txt"],
)
def test_a_reader_can_open_no_file_but_its_own(actor, play, tmp_path, text):
    secret = play("well")
    Path(secret.url).rename(tmp_path / "plays" / "sibling.txt")
    with pytest.raises(Refusal, match="Permission") as caught:
        decode(actor, play(text.format(there=tmp_path / "plays")))
    assert caught.value.code == Code.FORBIDDEN
    assert not (tmp_path / "plays" / "new.txt").exists()


@landlock
@pytest.mark.parametrize("text", ["connect 9", "fork"])
def test_a_reader_connects_to_nothing_and_starts_nothing(actor, play, text):
    with pytest.raises(Refusal, match="Operation not permitted") as caught:
        decode(actor, play(text))
    assert caught.value.code == Code.FORBIDDEN


@pytest.mark.parametrize("beside", [False, True])
def test_a_link_that_the_user_gives_as_the_place_is_followed_and_none_below_it(actor, play, tmp_path, beside):
    play("well")
    link, source = tmp_path / "link", type(actor)(path=str(tmp_path / "link"), beside=beside)
    link.symlink_to("plays")
    (tmp_path / "plays" / "well.txt").write_text(str(link / "well.txt"))
    with Decoder(source) as decoder:
        (file,) = decoder.files(MIDNIGHT, None)
        assert file.url == str(link / "well.txt"), "named as the user names it"
        (tmp_path / "plays" / "well.txt").write_text("well")
        assert decoder.decode(replace(file, valid_time=None)).values[0, 0] == 7.5
        (tmp_path / "plays" / "other.txt").symlink_to("/etc/passwd")
        with pytest.raises(Refusal, match="a link"):
            decoder.decode(RemoteFile(str(link / "other.txt"), None))


def test_a_link_to_one_file_that_the_user_gives_as_the_place_is_followed(actor, play, tmp_path):
    play("well")
    link = tmp_path / "latest.txt"
    link.symlink_to("plays/well.txt")
    assert decode(type(actor)(path=str(link)), RemoteFile(str(link), None)).values[0, 0] == 7.5


@landlock
def test_only_a_source_that_says_so_reads_what_lies_beside_its_file(actor, play, tmp_path):
    neighbour = play("well")
    source = type(actor)(path=str(tmp_path / "plays"), beside=True)
    assert decode(source, play(f"open {neighbour.url}")).values[0, 0] == 7.5
    with pytest.raises(Refusal, match="Permission"):
        decode(source, play("open /etc/passwd"))


def test_a_reader_inherits_no_keys(actor, play, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert decode(actor, play("tell keys")).values[0, 0] == 0


def test_without_landlock_it_says_once_that_readers_are_less_confined(actor, play, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    decoding._warn_of_open_files.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            decode(actor, play("well"))
    assert [record.message for record in caplog.records] == [
        "this system has no Landlock: what reads a file from outside can open other files as well"
    ]
    decoding._warn_of_open_files.cache_clear()


def test_a_reader_reads_some_files_and_no_further_one_after_a_refusal(actor, play):
    with Decoder(actor, Limits(files=2)) as decoder:

        def pid() -> float:
            return float(decoder.decode(play("tell pid")).values[0, 0])

        first, second, third = pid(), pid(), pid()
        assert first == second != third
        with pytest.raises(Refusal):
            decoder.decode(play("refuse it"))
        assert pid() != third


def test_a_frame_of_another_time_than_the_name_says_is_refused(actor, play):
    file = RemoteFile(play("well").url, MIDNIGHT.replace(hour=3))
    expected = r"well.txt: .* 2020-06-01T00:00:00Z, but its name says 2020-06-01T03"
    with pytest.raises(Refusal, match=expected) as caught:
        decode(actor, file)
    assert caught.value.code == Code.WRONG_TIME


def test_what_values_are_multiples_of_is_told(actor, play):
    assert [decode(actor, play(text)).scale_factor for text in ("count 0.5", "well")] == [0.5, None]


def test_a_dry_field_is_no_alarm_and_what_never_changes_may_be_the_same_everywhere(actor, play):
    assert decode(actor, play("fill 0")).values[0, 0] == 0
    assert decode(actor, play("stand 1")).values[0, 0] == 1


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, Code.UNREADABLE),
        (lambda path: path.symlink_to("/etc/passwd"), Code.UNSAFE_NAME),
        (os.mkfifo, Code.UNREADABLE),
        (lambda path: path.write_bytes(bytes(2000)), Code.TOO_LARGE),
    ],
    ids=["missing", "link", "pipe", "large"],
)
def test_what_is_no_plain_file_of_a_sensible_size_is_not_even_opened(actor, tmp_path, make, code):
    path = tmp_path / "it.txt"
    make(path)
    with Decoder(actor, Limits(size=1000)) as decoder:
        with pytest.raises(Refusal, match=r"it\.txt") as caught:
            decoder.decode(RemoteFile(str(path), None))
        assert caught.value.code == code
        assert decoder._readers is None


@pytest.mark.parametrize("name", ["a b.txt", "a\nb.txt", "a;b.txt", "é.txt", "x" * 201, "a\0b"])
def test_unsafe_names_are_refused(actor, tmp_path, name):
    with pytest.raises(Refusal) as caught:
        decode(actor, RemoteFile(str(tmp_path / name), None))
    assert caught.value.code == Code.UNSAFE_NAME


def test_a_file_that_the_user_names_may_be_called_anything(actor, tmp_path):
    path = tmp_path / "my radar.txt"
    path.write_text("well")
    assert decode(type(actor)(path=str(path)), RemoteFile(str(path), None)).values[0, 0] == 7.5


def test_a_list_that_leads_out_of_the_sources_folder_is_refused(actor, play, tmp_path):
    inside = play("well")
    source = type(actor)(path=str(tmp_path / "plays"))
    Path(inside.url).write_text(inside.url)
    with Decoder(source) as decoder:
        assert decoder.files(MIDNIGHT, None) == [RemoteFile(inside.url, MIDNIGHT)]
        Path(inside.url).write_text(f"{tmp_path}/plays/../actor_source.py")
        with pytest.raises(Refusal, match="not within"):
            decoder.files(None, None)


@pytest.mark.parametrize(("text", "said"), [("crash", "signal 11"), ("hang", "took more than 1 s")])
def test_a_file_that_holds_up_whoever_lists_it_costs_its_own_time_and_no_other_file(
    actor, play, tmp_path, text, said
):
    files = [play(text) for text in ("well", "fill 0", text)]
    for file in files[:2]:
        Path(file.url).write_text(file.url)
    source = type(actor)(path=str(tmp_path / "plays"))
    with Decoder(source, Limits(seconds=1, listing=3600)) as decoder:
        listed = decoder.files(MIDNIGHT, None)
        assert listed == [
            RemoteFile(files[1].url, MIDNIGHT),
            RemoteFile(files[0].url, MIDNIGHT),
            RemoteFile(files[2].url, None),
        ]
        with pytest.raises(Refusal, match=rf"^{text}.txt: .*{said}"):
            decoder.decode(listed[2])
        with pytest.raises(Refusal, match=said):  # the refusal was of then: it is read when asked for again
            decoder.decode(listed[2])


def test_a_file_that_cannot_be_listed_is_a_reason_too(actor, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with Decoder(type(actor)(path=str(tmp_path))) as decoder:
        (file,) = decoder.files(None, None)
        assert file == RemoteFile(str(tmp_path / "bad.txt"), None)
        with pytest.raises(Refusal, match=r"^bad.txt: UnicodeDecodeError"):
            decoder.decode(file)


def test_a_folder_that_cannot_be_listed_is_an_error(actor, tmp_path):
    with Decoder(type(actor)(path=str(tmp_path))) as decoder, pytest.raises(Refusal, match="no text in it"):
        decoder.files(None, None)


@pytest.mark.parametrize("name", ["{name}.sha256", "{name}.md5", "SHA256SUMS", "../MD5SUMS"])
def test_a_file_that_is_not_what_its_provider_published_is_refused(actor, play, tmp_path, name):
    file = play("well")
    source = type(actor)(path=str(tmp_path))
    path = Path(file.url)
    place = path.parent / name.format(name=path.name)
    algorithm = "md5" if "md5" in name.lower() else "sha256"
    listed = path.relative_to(place.resolve().parent)
    place.write_text(f"{hashlib.new(algorithm, b'well').hexdigest()}  {listed}\n")
    assert decode(source, file).values[0, 0] == 7.5
    path.write_text("wel1")
    with pytest.raises(Refusal, match=rf"well.txt: its {algorithm} is \w+, but .* fetch it again") as caught:
        decode(source, file)
    assert caught.value.code == Code.CHECKSUM


def test_a_file_that_changes_while_it_is_read_is_refused(actor, play, monkeypatch):
    file = play("well")
    read = Readers.frame

    def meddling(self, given, readable):
        with Path(file.url).open("a") as path:
            path.write(" more")
        return read(self, given, readable)

    with Decoder(actor) as decoder:
        for text in ("well", "refuse what is half of it"):
            Path(file.url).write_text(text)
            with monkeypatch.context() as patched, pytest.raises(Refusal, match="changed while") as caught:
                patched.setattr(Readers, "frame", meddling)
                decoder.decode(file)
            assert caught.value.code == Code.CHANGED
        Path(file.url).write_text("well more")
        whole = decoder.decode(file)
    assert whole.sha256 == hashlib.sha256(b"well more").hexdigest()


def test_a_file_is_read_again_after_another_one_was_refused_unread(actor, play, tmp_path):
    first, second = play("well"), play("fill 0")
    Path(f"{second.url}.md5").write_text("0" * 32)
    with Decoder(actor) as decoder:
        for _ in range(2):
            assert decoder.decode(first).values[0, 0] == 7.5
            with pytest.raises(Refusal, match="fetch it again"):
                decoder.decode(second)


def test_a_large_file_is_read_where_it_lies(actor, play, monkeypatch):
    monkeypatch.setattr(decoding, "COPIED", 3)
    with Decoder(actor) as decoder:
        assert decoder.decode(play("well")).sha256 == hashlib.sha256(b"well").hexdigest()
        assert decoder._inbox is None
        with pytest.raises(Refusal, match="not mine"):
            decoder.decode(play("refuse not mine"))


def test_a_trusted_source_needs_no_process():
    with Decoder(Simulated()) as decoder:
        frame = decoder.decode(next(Simulated().files(None, None)))
        assert decoder._readers is None
    assert (frame.values > 0).any()


def test_what_a_trusted_source_refuses_has_a_code_too():
    with pytest.raises(Refusal, match="expected a name such as") as caught:
        decode(Simulated(), RemoteFile("simulated:2:20200601T000000Z", None))
    assert caught.value.code == Code.DAMAGED


def test_processes_and_copies_end_with_the_decoder(actor, play):
    with Decoder(actor) as decoder:
        pid = decoder._running().process.pid
        decoder.decode(play("well"))
        inbox = Path(decoder._inbox.name)
        assert [path.name for path in inbox.iterdir()] == ["well.txt"]
        os.kill(pid, 0)
        children = Path(f"/proc/{pid}/task/{pid}/children")
        readers = [int(reader) for reader in children.read_text().split()] if children.exists() else []
    assert not inbox.exists()
    for ended in (pid, *readers):
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)


def test_a_decoder_goes_on_when_its_processes_were_killed(actor, play):
    with Decoder(actor) as decoder:
        decoder.decode(play("well"))
        decoder._readers.process.kill()
        decoder._readers.process.wait()
        assert decoder.decode(play("well")).values[0, 0] == 7.5


def test_a_source_that_cannot_be_imported_there_is_a_reason(actor, play, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    with pytest.raises(Refusal, match=r"ended with code 1 .*No module named 'actor_source'"):
        decode(actor, play("well"))


def test_a_refusal_survives_a_pickle():
    refusal = pickle.loads(pickle.dumps(Refusal(Code.TIMEOUT, "x.h5: too slow")))
    assert (refusal.code, str(refusal)) == ("timeout", "x.h5: too slow")
    assert isinstance(refusal, ValueError)


def test_a_refusal_says_nothing_that_a_terminal_would_obey():
    hostile = "x.h5: follows \x1b]0;title\x07\x1b[2J\r\nall \u202e well, 5 °C, 雨\udc80" + "!" * 3000
    said = str(Refusal(Code.DAMAGED, hostile))
    assert said.startswith(r"x.h5: follows \x1b]0;title\x07\x1b[2J all \u202e well, 5 °C, 雨\udc80!")
    assert said.endswith("! ... (1049 signs more)")
    assert str(Refusal(Code.DAMAGED, said[:1900])) == said[:1900]
