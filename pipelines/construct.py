"""`construct`: a call that is written down, made; of this software's own classes and functions only."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipelines.words import nearest

SOURCES = ("pipelines.sources.", "pipelines.grid.")  # where what a source's file names may come from
NAMED = Path(__file__).parents[1] / "configs" / "source"


def construct(call: Any, within: tuple[str, ...]) -> Any:
    """What a written-down call makes: a `_target_` with its arguments, or its `_partial_`.

    Args:
        call: as YAML or JSON gives it.
        within: how the dotted names of targets may begin.

    Raises:
        ValueError: for another target, or one that refuses its arguments.
    """
    if isinstance(call, list):
        return [construct(item, within) for item in call]
    if not isinstance(call, Mapping):
        return call
    arguments = {
        str(key): construct(value, within)
        for key, value in call.items()
        if key not in ("_target_", "_partial_")
    }
    if "_target_" not in call:
        return arguments
    target = _target(call["_target_"], within)
    if call.get("_partial_", False):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except TypeError as error:
        raise ValueError(f"_target_={call['_target_']}: {error}") from error


def _target(name: Any, within: tuple[str, ...]) -> Callable[..., Any]:
    """The class, function or class method with this dotted name, if it is defined where it may be."""
    allowed = " or ".join(f"`{beginning.rstrip('.')}`" for beginning in within)
    refused = ValueError(f"_target_={name!r}: expected a class or function of this software's {allowed}")
    if not isinstance(name, str) or not name.startswith(within):
        raise refused
    parts = name.split(".")
    for cut in (len(parts) - 1, len(parts) - 2):  # module.Class, module.Class.method
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if part.startswith("_"):
                raise refused
            found = getattr(found, part, None)
        if callable(found) and f"{getattr(found, '__module__', '')}.".startswith(within):
            made: Callable[..., Any] = found
            return made
    raise refused


def source_from_path(file: str, path: str | None = None) -> Any:
    """The source that a YAML file describes, as those of configs/source/ do.

    Args:
        file: the YAML file.
        path: the source's folder or URL; None: the one that the file names.

    Raises:
        ValueError: if the file is no such description.
    """
    if not Path(file).is_file():
        names = sorted(named.stem for named in NAMED.glob("*.yaml") if named.stem != "from_path")
        raise ValueError(
            f"source={file}: no such file, and no source of that name in configs/source/"
            f"{nearest(file, names)}; expected a YAML file such as those are, or one of {', '.join(names)}"
        )
    call = yaml.safe_load(Path(file).read_text())
    if not isinstance(call, Mapping) or "_target_" not in call:
        raise ValueError(
            f"source={file}: expected a mapping with _target_, such as pipelines.sources.odim.Odim"
        )
    if path is not None:
        call = {**call, "path": path}
    if call.get("path") == "???":
        raise ValueError(f"source={file}: give its folder or URL too: source.path=...")
    try:
        return construct(call, SOURCES)
    except ValueError as error:
        raise ValueError(f"source={file}: {error}") from error
