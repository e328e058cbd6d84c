"""Words that messages share."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def plural(number: int, noun: str) -> str:
    """Such as `1 run`, `3 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, words: Iterable[str], alike: float = 0.5) -> str:
    """Such as `; did you mean 'mrms'?`; nothing where no word is alike."""
    near = get_close_matches(word, list(words), n=1, cutoff=alike)
    return f"; did you mean {near[0]!r}?" if near else ""


def printable(text: str, most: int = 2000) -> str:
    """In one line, and nothing in it that a terminal would obey: such signs are written as escapes."""
    line = " ".join(text.split())
    shown = line if len(line) <= most else f"{line[:most]} ... ({len(line) - most} signs more)"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in shown)


def z_r_law(z_r: Sequence[float]) -> str:
    """Such as `Z = 200 R^1.6`, of a and b."""
    return f"Z = {z_r[0]:g} R^{z_r[1]:g}"
