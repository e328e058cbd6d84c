"""`Readers`: processes that read hostile files; both ends of the pipes between them and us.

A fresh Python imports the source once and forks a reader, and another one after every file that was refused
or after some that were not. A reader confines itself to what it is to read (`pipelines.decoding.sandbox`)
and to limits of memory, time and written bytes before it opens the first file, and hands back plain bytes,
which are checked here as if a stranger had sent them.
"""

import contextlib
import fcntl
import gc
import json
import os
import pickle
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pipelines.cf import Variable
from pipelines.decoding import sandbox
from pipelines.decoding.refusal import Code, Refusal
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, Source

LARGEST_FRAME = 2 * 2**30  # bytes of values
LARGEST_HEAD = 2**20  # bytes of all the rest of a frame
LARGEST_LIST = 2**30  # bytes of a list of files
PIPE = 2**20  # bytes, the most that Linux grants anyone; a small pipe takes three times as long
LENGTH = struct.Struct("=Q")  # of a message, before it
START = 300.0  # s that importing a source may take, on a machine that is busy with other things

# What a reader inherits of our environment, which may hold keys to object stores, and what is set in it: one
# thread, and a GDAL that opens no files beside the one it is given and none that point to others.
INHERITED = re.compile(
    r"PATH|HOME|TZ|LANG|LC_.*|TMPDIR|LD_LIBRARY_PATH|(PYTHON|PROJ|GDAL|ECCODES|METNET)_?.*"
)
ENVIRONMENT = {
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "GDAL")},
    "OPENCV_FOR_THREADS_NUM": "1",
    "BLOSC_NTHREADS": "1",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_SKIP": "VRT",
    "PROJ_NETWORK": "OFF",
}

# What the shared parts of all readers say (`Frame`, `content`, `unzipped`), and libraries say of cut files.
SAID = (
    (re.compile(r"values of \w+ lie outside|infinite"), Code.OUT_OF_RANGE),
    (re.compile(r"larger than \d+ bytes|grows to more than"), Code.TOO_LARGE),
    (re.compile(r"ends too early|truncated"), Code.TRUNCATED),
)


@dataclass(frozen=True)
class Limits:
    """What reading one file may cost."""

    memory: int = 6 * 2**30  # bytes of address space; libraries reserve far more than they use
    seconds: float = 20.0  # of wall clock, and again of processor
    listing: float = 300.0  # seconds that listing a source's files may take, which opens some formats' files
    size: int = 8 * 2**30  # bytes of the file
    written: int = 2**20  # bytes of any one file, the reader's own messages included
    files: int = 100  # frames that one process reads before a fresh one takes over


class Readers:
    """The readers of one source."""

    def __init__(self, source: Source, limits: Limits):
        """Starts the Python that they are forked from.

        Raises:
            Refusal: if it does not come up, as where it cannot import the source.
        """
        self.limits = limits
        self.messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.control, theirs = Pipe()
        self._reader: _Reader | None = None
        paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
        inherited = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.decoding.reader", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**inherited, **ENVIRONMENT, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=self.messages,
            stderr=self.messages,
        )
        theirs.close()
        self._order(pickle.dumps((source, limits)))

    def frame(self, file: RemoteFile, readable: list[Path]) -> Frame:
        """The frame in a file, read by a process that can open nothing but `readable`.

        Raises:
            Refusal: if it refuses the file, dies of it, exceeds a limit, or gives no valid frame.
        """
        reader = self._for(Path(file.url).name, readable, self.limits.seconds)
        reader.frames += 1
        head = self._answer(reader, {"url": file.url, "valid_time": _text(file.valid_time)}, LARGEST_HEAD)
        try:
            grid = _grid(head["grid"])
            values = np.empty(grid.shape, np.float32)
            self._fill(values.data.cast("B"), reader)
            return _frame(head, grid, values)
        except Refusal:
            raise
        except Exception as error:  # whatever there is to trip over in what a stranger sends
            self._end_reader()
            reason = f"{reader.name}: its reader gave no valid frame: {error}"
            raise Refusal(_code(error, Code.INVALID), reason) from error

    def files(
        self, start: datetime | None, end: datetime | None, place: Path | None, part: Path | None = None
    ) -> list[RemoteFile]:
        """What the source has within [start, end], listed by a process that can open nothing but `place`.

        That is where the source's files lie; `part`: the only one of its `places` to be listed, as long as
        reading a file may take.

        Raises:
            Refusal: as `frame`, or if the source finds nothing of its own.
        """
        name, seconds = "listing the files", self.limits.listing
        if part is not None:
            name, seconds = part.name, self.limits.seconds
        request = {"start": _text(start), "end": _text(end), "part": None if part is None else str(part)}
        told = self._listed(name, seconds, place, request)
        return [RemoteFile(url, _time(valid_time)) for url, valid_time in told]

    def places(self, place: Path | None) -> list[Path]:
        """What the source would open to list its files; raises as `files` does."""
        told = self._listed("listing the files", self.limits.listing, place, {"places": "all"})
        return [Path(path) for path, _ in told]

    def _listed(
        self, name: str, seconds: float, place: Path | None, request: dict[str, str | None]
    ) -> list[tuple[str, str | None]]:
        """The pairs of a path and a time, or none, that a process answers."""
        reader = self._for(name, [] if place is None else [place], seconds)
        told = self._answer(reader, request, LARGEST_LIST)
        try:
            pairs = [(str(path), None if time is None else str(time)) for path, time in told["listed"]]
            for _, time in pairs:
                _time(time)
        except Exception as error:
            self._end_reader()
            raise Refusal(Code.INVALID, f"{name}: its reader gave no list: {error}") from error
        return pairs

    @property
    def alive(self) -> bool:
        """Whether the Python that they are forked from still runs; nothing else forks another reader."""
        return self.process.poll() is None

    def end(self) -> None:
        """Ends all processes, whatever they are doing."""
        self._leave()
        self.control.close()  # at which the Python that forks ends what it has forked, and itself
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.messages.close()

    def _for(self, name: str, readable: list[Path], seconds: float) -> "_Reader":
        """A process that may read this: the last one, unless that may not, or has read its share."""
        reader = self._reader
        if reader is None or reader.readable != readable or reader.frames >= self.limits.files:
            reader = self._fresh(readable)
        reader.name, reader.seconds = name, seconds
        reader.deadline = time.monotonic() + seconds
        return reader

    def _fresh(self, readable: list[Path]) -> "_Reader":
        self._leave()
        self.messages.seek(0)
        self.messages.truncate()
        requested, requests = Pipe(duplex=False)
        answers, answered = Pipe(duplex=False)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # beyond what one user's pipes may hold together
                fcntl.fcntl(answers.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
        with requested, answered:
            order = json.dumps({"readable": [str(path) for path in readable]}).encode()
            self._order(order, requested.fileno(), answered.fileno())
        self._reader = _Reader(readable, requests, answers)
        return self._reader

    def _answer(self, reader: "_Reader", request: dict[str, str | None], largest: int) -> dict[str, Any]:
        """What the process answers, if that is no refusal."""
        try:
            reader.requests.send_bytes(json.dumps(request).encode())
        except OSError:
            raise self._death(reader) from None
        size = bytearray(LENGTH.size)
        self._fill(memoryview(size), reader)
        try:
            (length,) = LENGTH.unpack(size)
            if length > largest:
                raise ValueError(f"{length} bytes of it")
            answer = bytearray(length)
            self._fill(memoryview(answer), reader)
            told: dict[str, Any] = dict(json.loads(answer))
        except Refusal:
            raise
        except Exception as error:
            self._end_reader()
            raise Refusal(Code.INVALID, f"{reader.name}: its reader gave no valid answer: {error}") from error
        if "refused" in told:
            self._leave()  # who knows what the file did to it
            code = told.get("code")
            raise Refusal(Code(code) if code in list(Code) else Code.DAMAGED, str(told["refused"]))
        return told

    def _fill(self, left: memoryview, reader: "_Reader") -> None:
        """Receives as many bytes as there is room for, however many are sent, or none."""
        while left:
            self._wait(reader)
            received = os.readv(reader.answers.fileno(), [left])
            if not received:
                raise self._death(reader)
            left = left[received:]

    def _wait(self, reader: "_Reader") -> None:
        """Until there is something to receive."""
        if not reader.answers.poll(max(0.0, reader.deadline - time.monotonic())):
            self._end_reader()
            reason = f"{reader.name}: reading it took more than {reader.seconds:g} s; given up"
            raise Refusal(Code.TIMEOUT, reason)

    def _death(self, reader: "_Reader") -> Refusal:
        """How the process ended, and the last line that it wrote."""
        code = self._end_reader(patience=5)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        why = Code.TIMEOUT if code == -signal.SIGXCPU else Code.CRASHED
        return Refusal(why, f"{reader.name}: reading it crashed: its process {how}{self._last_words()}")

    def _last_words(self) -> str:
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()})" if lines else ""

    def _end_reader(self, patience: float = 0) -> int:
        """Kills the process that reads after some seconds; returns how it ended, as `subprocess` tells it."""
        self._leave()
        return int(self._order(json.dumps({"patience": patience}).encode()))

    def _leave(self) -> None:
        """Lets go of the process that reads; it ends when it sees that, or when the next one is forked."""
        if self._reader is not None:
            self._reader.requests.close()
            self._reader.answers.close()
            self._reader = None

    def _order(self, order: bytes, *descriptors: int) -> bytes:
        """Has the Python that forks do something; returns its answer.

        Raises:
            Refusal: if it is dead.
        """
        try:
            self.control.send_bytes(order)
            if descriptors:
                with socket.socket(fileno=os.dup(self.control.fileno())) as control:
                    socket.send_fds(control, [b"+"], descriptors)
            if self.control.poll(START):
                return self.control.recv_bytes(LARGEST_HEAD)
        except (EOFError, OSError):
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        words = self._last_words()
        self.end()
        reason = f"its readers' process ended with code {self.process.returncode}{words}"
        raise Refusal(Code.CRASHED, f"reading crashed: {reason}")


@dataclass
class _Reader:
    """Our end of a process that reads."""

    readable: list[Path]
    requests: Connection
    answers: Connection
    frames: int = 0
    name: str = ""  # of the file it is asked for
    seconds: float = 0  # that this may take
    deadline: float = 0  # by the monotonic clock


def _code(error: BaseException | None, otherwise: Code) -> Code:
    """What kind of refusal an exception is, or one that it came from."""
    if error is None:
        return otherwise
    if isinstance(error, Refusal):
        return error.code
    kinds = ((MemoryError, Code.MEMORY), (PermissionError, Code.FORBIDDEN), (EOFError, Code.TRUNCATED))
    known = [code for kind, code in kinds if isinstance(error, kind)]
    known += [code for said, code in SAID if said.search(str(error))]
    return known[0] if known else _code(error.__cause__ or error.__context__, otherwise)


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _head(frame: Frame) -> dict[str, object]:
    """All of a frame but its values, as JSON holds it."""
    return {
        "variable": asdict(frame.variable),
        "valid_time": frame.valid_time.isoformat(),
        "cadence": None if frame.cadence is None else frame.cadence.total_seconds(),
        "grid": asdict(frame.grid),
        "source": frame.source,
        "sha256": frame.sha256,
        "group": frame.group,
        "scale_factor": frame.scale_factor,
    }


def _grid(fields: dict[str, Any]) -> Grid:
    """The grid that a reader sent.

    Raises:
        ValueError: if it is none, or has more cells than a frame may.
    """
    grid = Grid(**fields)
    if not np.isfinite([grid.x_first, grid.x_step, grid.y_first, grid.y_step]).all():
        raise ValueError(f"a grid whose numbers are not finite: {grid.x_first}, {grid.y_first}")
    if 4 * grid.y_size * grid.x_size > LARGEST_FRAME:
        raise ValueError(f"{grid.y_size} x {grid.x_size} cells: more than {LARGEST_FRAME // 4}")
    return grid


def _frame(head: dict[str, Any], grid: Grid, values: NDArray[np.float32]) -> Frame:
    """The frame that a reader sent, with all the checks of `Frame`."""
    low, high = head["variable"].pop("valid_range")
    classes = tuple((int(value), str(meaning)) for value, meaning in head["variable"].pop("classes"))
    return Frame(
        variable=Variable(valid_range=(low, high), classes=classes, **head["variable"]),
        valid_time=datetime.fromisoformat(str(head["valid_time"])),
        cadence=None if head["cadence"] is None else timedelta(seconds=float(head["cadence"])),
        grid=grid,
        values=values,
        source=str(head["source"]),
        sha256=str(head["sha256"]),
        group=str(head["group"]),
        scale_factor=None if head["scale_factor"] is None else float(head["scale_factor"]),
    )


def fork_readers(control: Connection) -> None:
    """Forks a reader whenever the other side asks for one, until that closes; reads no file itself."""
    source, limits = pickle.loads(control.recv_bytes())
    gc.freeze()  # what all readers share is not written to by the collector of each
    control.send_bytes(b"ready")
    reader = None
    with contextlib.suppress(EOFError):
        while True:
            order = json.loads(control.recv_bytes())
            if "patience" in order:
                control.send_bytes(b"%d" % _ended(reader, order["patience"]))
                reader = None
                continue
            with socket.socket(fileno=os.dup(control.fileno())) as handing:
                _, descriptors, _, _ = socket.recv_fds(handing, 1, 2)
            before, reader = reader, os.fork()
            if reader == 0:
                _read(control, descriptors, source, limits, [Path(path) for path in order["readable"]])
            for descriptor in descriptors:
                os.close(descriptor)
            control.send_bytes(b"started")
            _ended(before, 0)
    _ended(reader, 0)


def _ended(process: int | None, patience: float) -> int:
    """How a process ended, which is killed if it has not by then."""
    if process is None:
        return 0
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _read(
    control: Connection, descriptors: list[int], source: Source, limits: Limits, readable: list[Path]
) -> NoReturn:
    """Answers requests until the other side closes: what a forked process does."""
    try:
        control.close()
        requests, answers = Connection(descriptors[0]), descriptors[1]
        sandbox.die_with_parent()
        for which, most in (
            (resource.RLIMIT_AS, limits.memory),
            (resource.RLIMIT_FSIZE, limits.written),
            (resource.RLIMIT_CORE, 0),
        ):
            most = _within(resource.getrlimit(which)[1], most)
            resource.setrlimit(which, (most, most))
        sandbox.confine(readable)
        while True:
            request = json.loads(requests.recv_bytes())
            seconds = limits.seconds if request.get("url") or request.get("part") else limits.listing
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (_within(hard, int(used + seconds) + 1), hard))
            _answer(answers, source, request)
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # libraries that a damaged file has upset crash when they are taken down in order


def _within(hard: int, most: int) -> int:
    """A limit that is not above the one that this process was given, which it may not raise."""
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


def _answer(answers: int, source: Source, request: dict[str, str | None]) -> None:
    """Sends what was asked for, or why there is none."""
    name = Path(request.get("url") or request.get("part") or "listing the files").name
    try:
        if "url" not in request:
            _send(answers, json.dumps({"listed": _list(source, request)}).encode())
            return
        frame = source.read(RemoteFile(str(request["url"]), _time(request["valid_time"])))
        head = json.dumps(_head(frame)).encode()
    except Exception as error:  # a reader that trips over a damaged file, in whatever way, refuses it
        told = {"refused": _reason(name, error), "code": _code(error, Code.DAMAGED)}
        _send(answers, json.dumps(told).encode())
    else:
        _send(answers, head, np.ascontiguousarray(frame.values).data.cast("B"))


def _list(source: Source, request: dict[str, str | None]) -> list[tuple[str, str | None]]:
    """The files that are asked for, each with its time, or the places to look for some, without one."""
    told: Any = source
    if "places" in request:
        return [(str(path), None) for path in told.places()]
    if request["part"] is not None:
        told = replace(told, path=request["part"])
    found = told.files(_time(request["start"]), _time(request["end"]))
    return [(file.url, _text(file.valid_time)) for file in found]


def _send(answers: int, message: bytes, values: memoryview | None = None) -> None:
    """A message behind its length, and what follows it."""
    for part in (memoryview(LENGTH.pack(len(message)) + message), values or memoryview(b"")):
        left = part
        while left:
            left = left[os.write(answers, left) :]


def _reason(name: str, error: Exception) -> str:
    """What a reader says against a file, in a sentence that names the file."""
    if type(error) in (ValueError, Refusal):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{name}: too large to read"
    return f"{name}: {type(error).__name__}: {error}"


if __name__ == "__main__":
    fork_readers(Connection(int(sys.argv[1])))
