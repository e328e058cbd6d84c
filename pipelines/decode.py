"""`Decoder`: a source's `read` in a bounded child process, and its contract checked on this side.

A file from outside may crash, hang or exhaust its reader. The child takes that: it has limits of memory, time
and written bytes, is replaced after some files, and hands back plain bytes, which are checked as if a
stranger had sent them.
"""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from pipelines.cf import Variable
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, Source

LARGEST_FRAME = 2 * 2**30  # bytes that the child may send


@dataclass(frozen=True)
class Limits:
    """What reading one file may cost."""

    memory: int = 6 * 2**30  # bytes of address space; libraries reserve far more than they use
    seconds: float = 60.0  # of wall clock, and again of processor
    written: int = 2**20  # bytes of any one file, the child's own messages included
    files: int = 200  # that one child reads before a fresh one takes over


def decode(source: Source, file: RemoteFile, limits: Limits | None = None) -> Frame:
    """The frame in one local file; see `Decoder`."""
    with Decoder(source, limits) as decoder:
        return decoder.decode(file)


class Decoder:
    """Reads the files of one source, in a child process unless the source is trusted."""

    def __init__(self, source: Source, limits: Limits | None = None):
        """The child starts with the first file."""
        self.source = source
        self.limits = limits or Limits()
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        """The decoder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the child."""
        self._end()

    def decode(self, file: RemoteFile) -> Frame:
        """The frame in a local file.

        Raises:
            ValueError: naming the file, if the source refuses it, if reading it crashes or exceeds a
                limit, or if the frame is not valid at the time that the file's name says.
            OSError: if the file cannot be opened.
        """
        frame = self._read(file)
        if frame.valid_time != file.valid_time:
            raise ValueError(
                f"{Path(file.url).name}: the frame in it is valid at {frame.valid_time:%Y-%m-%dT%H:%M:%SZ}, "
                f"but its name says {file.valid_time:%Y-%m-%dT%H:%M:%SZ}"
            )
        return frame

    def _read(self, file: RemoteFile) -> Frame:
        if self.source.trusted:
            return self.source.read(Path(file.url))
        if self._child is None:
            self._child = _Child(self.source, self.limits)
        try:
            frame = self._child.read(Path(file.url))
        except _ChildDiedError as death:
            self._end()
            raise ValueError(f"{Path(file.url).name}: {death}") from None
        if self._child.files_read >= self.limits.files:
            self._end()
        return frame

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _ChildDiedError(Exception):
    """Why there is no answer from the child."""


class _Child:
    """A fresh Python that runs `serve_reads` below; requests and answers are messages on a pipe."""

    def __init__(self, source: Source, limits: Limits):
        self.limits = limits
        self.files_read = 0
        self.connection, theirs = Pipe()
        self.messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.decode", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.messages,
            stderr=self.messages,
        )
        theirs.close()
        self._send(pickle.dumps((source, limits)))

    def read(self, path: Path) -> Frame:
        """The frame in a file.

        Raises:
            ValueError, OSError: as the source's `read` does.
            _ChildDiedError: if it gave no answer.
        """
        self._send(str(path).encode())
        deadline = time.monotonic() + self.limits.seconds
        head = self._receive(deadline)
        self.files_read += 1
        try:
            told = json.loads(head)
            if "value_error" in told:
                refusal: Exception = ValueError(told["value_error"])
            elif "os_error" in told:
                refusal = OSError(told["os_error"])
            else:
                return _frame(told, self._receive(deadline))
        except (ValueError, TypeError, KeyError) as error:
            raise _ChildDiedError(f"its reader gave no valid frame: {error}") from error
        raise refusal

    def _send(self, message: bytes) -> None:
        try:
            self.connection.send_bytes(message)
        except OSError:
            raise _ChildDiedError(self._last_words()) from None

    def _receive(self, deadline: float) -> bytes:
        try:
            if not self.connection.poll(max(0.0, deadline - time.monotonic())):
                raise _ChildDiedError(f"reading it took more than {self.limits.seconds:g} s; given up")
            return self.connection.recv_bytes(LARGEST_FRAME)
        except (EOFError, OSError):
            raise _ChildDiedError(self._last_words()) from None

    def _last_words(self) -> str:
        """How the child ended, and the last line that it wrote."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines()
        return f"reading it crashed: its process {how}" + (f" ({lines[-1].strip()})" if lines else "")

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.messages.close()


def _head(frame: Frame) -> dict[str, object]:
    """All of a frame but its values, as JSON holds it."""
    return {
        "variable": asdict(frame.variable),
        "valid_time": frame.valid_time.isoformat(),
        "cadence": frame.cadence.total_seconds(),
        "grid": asdict(frame.grid),
        "source": frame.source,
        "sha256": frame.sha256,
    }


def _frame(head: dict[str, Any], values: bytes) -> Frame:
    """The frame that the child sent, with all the checks of `Frame`."""
    low, high = head["variable"].pop("valid_range")
    grid = Grid(**head["grid"])
    return Frame(
        Variable(valid_range=(low, high), **head["variable"]),
        datetime.fromisoformat(str(head["valid_time"])),
        timedelta(seconds=float(head["cadence"])),
        grid,
        np.frombuffer(values, np.float32).reshape(grid.shape),
        str(head["source"]),
        str(head["sha256"]),
    )


def serve_reads(connection: Connection) -> None:
    """Answers read requests until the other side closes: what the child process does."""
    source: Source
    limits: Limits
    source, limits = pickle.loads(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.written, limits.written))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            path = Path(connection.recv_bytes().decode())
        except EOFError:
            return
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + limits.seconds) + 1, resource.RLIM_INFINITY))
        _answer(connection, source, path)


def _answer(connection: Connection, source: Source, path: Path) -> None:
    """Sends the frame in a file, or why there is none."""
    try:
        frame = source.read(path)
    except OSError as error:
        connection.send_bytes(json.dumps({"os_error": str(error)}).encode())
    except MemoryError:
        connection.send_bytes(json.dumps({"value_error": f"{path.name}: too large to read"}).encode())
    except Exception as error:  # a reader that trips over a damaged file, in whatever way, refuses it
        named = f"{path.name}: {type(error).__name__}: {error}"
        reason = str(error) if isinstance(error, ValueError) else named
        connection.send_bytes(json.dumps({"value_error": reason}).encode())
    else:
        connection.send_bytes(json.dumps(_head(frame)).encode())
        connection.send_bytes(np.ascontiguousarray(frame.values).data.cast("B"))


if __name__ == "__main__":
    serve_reads(Connection(int(sys.argv[1])))
