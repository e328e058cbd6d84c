"""`Quarantine`: what was refused of a cube's files, and why, in a file beside the cube."""

import errno
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.decoding import checksums
from pipelines.decoding.refusal import Code
from pipelines.frame import iso
from pipelines.sources.source import RemoteFile


@dataclass(frozen=True)
class Refused:
    """A file that gave no frame, and why."""

    file: RemoteFile
    code: Code
    reason: str
    misplaced: bool = False  # it was read, but does not cover the window or the grid that was asked for


class Quarantine:
    """The damaged files of a cube, and frames of files: a line of JSON for each in CUBE.quarantine.jsonl."""

    def __init__(self, cube: str):
        """Reads what is there."""
        name = f"{cube.rstrip('/').rsplit('/', 1)[-1]}.quarantine.jsonl"
        self.path = Path(name) if "://" in cube else Path(cube).with_name(name)
        self.reasons: list[str] = []  # of this time
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        self._known = set(filter(None, map(_recorded, lines)))

    def add(self, refused: Refused) -> None:
        """Writes a file down at once; once, however often it is met, and beside what others write."""
        self.reasons.append(refused.reason)
        file, sha256 = refused.file, sha256_of(Path(refused.file.url))
        valid_time = None if file.valid_time is None else iso(file.valid_time)
        known = (file.url, sha256, refused.reason, valid_time)
        if known in self._known:
            return
        self._known.add(known)
        record = {
            "path": file.url,
            "sha256": sha256,
            "valid_time": valid_time,
            "time": iso(datetime.now(UTC)),
            "code": refused.code,
            "reason": refused.reason,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record).encode() + b"\n"
        with self.path.open("a+b", buffering=0) as lines:
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - 1))
            if lines.read(1) not in (b"", b"\n"):  # the disk was full in the middle of a line
                line = b"\n" + line
            written = lines.write(line)  # in one call to the system, beside what others write
            if written != len(line):
                raise OSError(errno.ENOSPC, "no room to write down a damaged file", str(self.path))
            os.fsync(lines.fileno())


def _recorded(line: bytes) -> tuple[str, str | None, str, str | None] | None:
    """What tells a line of the quarantine from others; None for one that is no record."""
    try:
        record = json.loads(line)
        told = record["sha256"], record["valid_time"]
        sha256, valid_time = (None if each is None else str(each) for each in told)
        return str(record["path"]), sha256, str(record["reason"]), valid_time
    except (ValueError, KeyError, TypeError):
        return None


def sha256_of(path: Path) -> str | None:
    """Of a plain file's bytes; None if it is none, or cannot be opened."""
    try:
        return checksums.digest(path, "sha256")
    except OSError:
        return None
