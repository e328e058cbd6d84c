"""`rollback`: a cube or a forecast store as it was at an earlier snapshot."""

from dataclasses import dataclass

from pipelines.repository import Repository


@dataclass(frozen=True)
class RolledBack:
    """What a rollback did."""

    path: str
    snapshot: str  # the newest from now on
    kept: str  # the tag under which what was the newest stays

    def __str__(self) -> str:
        """What a person wants to know of it."""
        return (
            f"{self.path}: is as it was at snapshot {self.snapshot}. What was the newest is kept: "
            f"metnet rollback path={self.path} snapshot={self.kept} returns to it"
        )


def rollback(path: str, snapshot: str) -> RolledBack:
    """Makes an earlier snapshot the newest again, or one that a rollback took back; nothing is deleted.

    Args:
        path: a local folder or URL of a cube or of forecasts.
        snapshot: as `inspect` lists them, or the tag of a rollback.

    Raises:
        ValueError: if nothing is there, or it has no such snapshot.
    """
    return RolledBack(path, *Repository.open(path).rollback(snapshot))
