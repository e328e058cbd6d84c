"""`ordinary_user`: a while in which the rights of files bind this thread, also where tests run as root."""

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

VERSION = 0x20080522  # of capget and capset, see capabilities(7)
READ_ANYTHING = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, both of the first 32


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Takes from this thread the power to read what the rights of a file forbid; skips where it cannot."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("runs as root, whom no rights of files bind here")
    library = ctypes.CDLL(None, use_errno=True)
    head = ctypes.create_string_buffer(struct.pack("=Ii", VERSION, 0))
    before = ctypes.create_string_buffer(24)
    assert library.capget(head, before) == 0
    effective, *others = struct.unpack("=6I", before.raw)
    library.capset(head, struct.pack("=6I", effective & ~READ_ANYTHING, *others))
    try:
        yield
    finally:
        library.capset(head, before)
