"""`cubes`: hours of radar of several networks, each made into a cube of its own."""

from collections.abc import Mapping
from pathlib import Path

from pipelines.ingest import ingest
from pipelines.sources.source import Source


def cubes(data: str, events: Mapping[str, Source], folder: str) -> list[str]:
    """The cube of each event, in their order; what one holds already is not read again.

    Args:
        data: folder that the files of the events lie in.
        events: how to read them, by name.
        folder: where the cubes go, each under the name of its event; made if it is not there.

    Raises:
        ValueError: if there is no such folder of files.
    """
    if not Path(data).is_dir():
        raise ValueError(f"data={data}: no such folder; give the one with the radar files")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [ingest(source, str(Path(folder) / name), group="radar").cube for name, source in events.items()]
