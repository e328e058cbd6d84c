"""`Source`: the contract of every service and format."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Protocol

from pipelines.frame import Frame


@dataclass(frozen=True)
class RemoteFile:
    """A file that a source knows of, and the time it is valid at by its name."""

    url: str  # a local path, or a URL
    valid_time: datetime  # UTC


class Source(Protocol):
    """Where frames come from. Sources do not know each other, nor the cube."""

    trusted: ClassVar[bool]  # whether it reads no bytes from outside, and so needs no process of its own

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time."""
        ...

    def read(self, path: Path) -> Frame:
        """The frame in a local file, on its native grid.

        Raises:
            ValueError: naming the file, what was expected and what was got, if it is not this
                source's product or is damaged.
        """
        ...
