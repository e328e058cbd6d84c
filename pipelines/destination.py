"""Where something is to be written: looked at before any work, so that nothing is lost at its end."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def folder(key: str, path: str) -> Path:
    """A folder that is there, or can be made.

    Raises:
        ValueError: naming the key if a file stands there or in the way, it is a URL, or a link to nothing.
    """
    if "://" in path:
        raise ValueError(f"{key}={path}: is a URL; expected a local folder, which is made if it is not there")
    place = Path(path)
    if place.is_symlink() and not place.exists():
        raise ValueError(f"{key}={path}: is a link to nothing; remove it, or give another folder")
    nearest = next(each for each in (place, *place.absolute().parents) if each.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == place else f"{nearest} is a file"
        raise ValueError(f"{key}={path}: {what}; expected a folder, which is made if it is not there")
    return place


def file(key: str, path: str, ending: str) -> Path:
    """A file whose name ends so, in a folder that is there, or can be made.

    Raises:
        ValueError: naming the key if it ends otherwise, is a URL, or a folder, or its folder cannot be made.
    """
    place = Path(path)
    if "://" in path or place.suffix.lower() != ending:
        raise ValueError(f"{key}={path}: expected a file that ends in {ending}, on this machine")
    if place.is_dir():
        raise ValueError(f"{key}={path}: is a folder; expected a file that ends in {ending}")
    folder(f"{key}={path}: its folder", str(place.parent))
    return place


def untaken(key: str, path: str) -> Path:
    """A place at which there is nothing yet.

    Raises:
        ValueError: naming the key if there is something.
    """
    place = Path(path)
    if place.exists():
        raise ValueError(f"{key}={path}: something is there already; remove it, or give another place")
    return place


@contextmanager
def alone_in(folder: Path, lock: str, taken: str) -> Iterator[None]:
    """Keeps out of a folder, which is made if it is not there, other processes that ask by the same `lock`.

    Raises:
        ValueError: saying `taken` if one is in there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f"{lock}.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(taken) from error


def replace_folder(new: Path, place: Path) -> None:
    """Moves a folder to where another may be, which goes once the new one stands, and stays if it cannot."""
    if not place.is_dir():
        new.rename(place)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{place.name}.before.", dir=place.parent))
    try:
        place.rename(aside / place.name)
        new.rename(place)
    except BaseException:
        if (aside / place.name).exists():
            (aside / place.name).rename(place)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
