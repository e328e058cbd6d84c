"""Words that messages share."""


def plural(number: int, noun: str) -> str:
    """Such as `1 run`, `3 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
