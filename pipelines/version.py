"""The version of this software, as it goes into every artefact."""

from importlib.metadata import version as installed


def version() -> str:
    """The installed version, such as `0.1.0`."""
    return installed("metnet-nowcast")
