"""`rollback`: a cube or a forecast store as it was at an earlier snapshot."""

from dataclasses import dataclass

from pipelines.repository import Repository


@dataclass(frozen=True)
class RolledBack:
    """What a rollback did."""

    path: str
    snapshot: str  # the newest from now on
    kept: str  # the tag under which the later snapshots stay

    def __str__(self) -> str:
        """What a person wants to know of it."""
        return (
            f"{self.path}: is as it was at snapshot {self.snapshot}; what came later is kept under the tag "
            f"{self.kept}. Run the ingest again to fetch anew what was taken back."
        )


def rollback(path: str, snapshot: str) -> RolledBack:
    """Makes an earlier snapshot the newest again; nothing is deleted.

    Args:
        path: a local folder or URL of a cube or of forecasts.
        snapshot: as `inspect` lists them.

    Raises:
        ValueError: if nothing is there, or it has no such earlier snapshot.
    """
    return RolledBack(path, snapshot, Repository.open(path).rollback(snapshot))
