"""`Refusal`: why a file does not enter a cube: a code for machines and a sentence for people."""

from enum import StrEnum

from pipelines.words import printable


class Code(StrEnum):
    """Every reason there is, as it stands in quarantine.jsonl."""

    UNSAFE_NAME = "unsafe_name"  # a name that may not become a path, or a link
    UNREADABLE = "unreadable"  # not there, no plain file, or not to be opened: worth another try
    TOO_LARGE = "too_large"  # more bytes than any file of its kind has
    CHANGED = "changed"  # while it was read: worth another try
    CHECKSUM = "checksum"  # not the one its provider published, or not of what was read
    FORBIDDEN = "forbidden"  # reading it meant opening another file, writing, or a connection
    DAMAGED = "damaged"  # its reader refuses it: also another product, quantity, scale or layout
    TRUNCATED = "truncated"  # it ends too early
    MEMORY = "memory"  # it takes more than a reader may have
    TIMEOUT = "timeout"  # it takes longer than a reader may run
    CRASHED = "crashed"  # its reader died of it
    INVALID = "invalid"  # what its reader gave is no frame
    OUT_OF_RANGE = "out_of_range"  # numbers that the quantity cannot have
    WRONG_TIME = "wrong_time"  # valid at another time than its name says
    FUTURE = "future"  # valid in the future
    WRONG_GRID = "wrong_grid"  # on other cells than the registered ones
    ALL_EQUAL = "all_equal"  # every observed cell has one value, and it is not "nothing there"
    UNOBSERVED = "unobserved"  # not one cell was observed
    OTHER_CUBE = "not_of_this_cube"  # another quantity, grid or cadence than the cube's, or off its time axis
    UNREACHABLE = "unreachable"  # its service did not give it, or not whole, in all tries


class Refusal(ValueError):  # noqa: N818 - no error of ours, a finding
    """A file that was not accepted; its text is a sentence that names the file."""

    def __init__(self, code: Code, reason: str):
        """What it says is `reason`, which may hold text out of the file, made fit for a terminal."""
        reason = printable(reason)
        super().__init__(code, reason)  # all arguments, as pickling needs them
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        """The sentence."""
        return self.reason
