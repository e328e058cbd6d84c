"""`confine`: takes from this process, for good, every file but the named ones, the network and new processes.

Files by Landlock (Linux 5.13 and later; the kernel's Documentation/userspace-api/landlock.rst), the rest by
a filter of system calls (seccomp, on x86-64 and ARM64). Both need no privilege. Other systems have neither.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on every processor
VERSION = 1  # flag of CREATE_RULESET: asks for the version only
PATH_BENEATH = 1  # the kind of rule

READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights over files a version knows; 16 since version 5
TCP = 0b11  # to bind and to connect, since version 4
OUTSIDE = 0b11  # abstract sockets and signals to processes that are not confined so, since version 6

NO_NEW_PRIVILEGES, SET_FILTER, DIE_WITH_PARENT = 38, 22, 1  # options of prctl
FILTER_MODE = 2


def landlock_version() -> int:
    """0 where the system has no Landlock."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION))


def confine(readable: Iterable[Path]) -> None:
    """From now on this process reads only `readable` (files, and folders with all below) and the libraries.

    It writes nowhere, runs nothing and, where the system has a filter for it, opens no connection.

    Raises:
        OSError: if one of them is a link or not there, or if the kernel has the means and refuses them.
    """
    if sys.platform != "linux":
        return
    _done(_libc().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    version = landlock_version()
    if version:
        _restrict(version, [*readable])
    _filter_calls()


def die_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        _done(_libc().prctl(DIE_WITH_PARENT, 9, 0, 0, 0))


@lru_cache(maxsize=1)
def libraries() -> tuple[Path, ...]:
    """What Python and its libraries may need while they run: code, and the tables of PROJ and GDAL."""
    prefixes = {sys.prefix, sys.base_prefix, "/usr", "/usr/local"}
    told = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    told += [os.environ[name] for name in ("PROJ_DATA", "PROJ_LIB", "GDAL_DATA") if name in os.environ]
    told += [str(Path(prefix) / folder) for prefix in prefixes for folder in ("lib", "lib64", "share")]
    told += ["/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"]
    told += ["/sys/devices/system/cpu", str(Path(__file__).parent)]
    found = {Path(path).resolve() for path in told if Path(path).exists()}
    return tuple(path for path in sorted(found) if not found & set(path.parents))


def _restrict(version: int, readable: list[Path]) -> None:
    rights = (1 << FILE_RIGHTS.get(version, 16)) - 1
    told = struct.pack("=QQQ", rights, TCP, OUTSIDE)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _done(_libc().syscall(CREATE_RULESET, told, ctypes.c_size_t(len(told)), 0))
    for path in libraries():
        _allow(ruleset, path, READ_FILE | READ_FOLDER, os.O_PATH)
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_FOLDER, os.O_PATH | os.O_NOFOLLOW)
    _allow(ruleset, Path(os.devnull), READ_FILE | WRITE_FILE, os.O_PATH)
    _done(_libc().syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    if not path.is_dir():
        rights &= ~READ_FOLDER
    rule = struct.pack("=Qi", rights, descriptor)
    _done(_libc().syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0))
    os.close(descriptor)


# By processor: its AUDIT_ARCH; the numbers of socket, execve, execveat, ptrace and io_uring_setup, and of
# fork and vfork where there are any; of clone; and of clone3 (the C library falls back from it to clone).
CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 425, 57, 58), 56, 435),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 425), 220, 435),
}
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the filter
NUMBER, PROCESSOR, FIRST_ARGUMENT = 0, 4, 16  # what they load
ALLOWED, FAILS = 0x7FFF0000, 0x00050000  # FAILS takes an errno
THREAD = 0x00010000  # flag of clone
OTHER_NUMBERING = 0x40000000  # x86-64: the calls of x32


def _filter_calls() -> None:
    """No sockets, no other programs, no processes; threads remain."""
    if platform.machine() not in CALLS:
        return
    processor, forbidden, clone, clone3 = CALLS[platform.machine()]
    refused = FAILS | errno.EPERM
    program = [
        (LOAD, 0, 0, PROCESSOR),
        (EQUAL, 1, 0, processor),
        (RETURN, 0, 0, refused),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, OTHER_NUMBERING),
        (RETURN, 0, 0, refused),
        *(line for number in forbidden for line in ((EQUAL, 0, 1, number), (RETURN, 0, 0, refused))),
        (EQUAL, 0, 1, clone3),
        (RETURN, 0, 0, FAILS | errno.ENOSYS),
        (EQUAL, 0, 3, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 1, 0, THREAD),
        (RETURN, 0, 0, refused),
        (RETURN, 0, 0, ALLOWED),
    ]
    lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    told = struct.pack("@HP", len(program), ctypes.addressof(lines))
    _done(_libc().prctl(SET_FILTER, FILTER_MODE, told, 0, 0))


def _done(result: int) -> int:
    """What a call of the C library returned.

    Raises:
        OSError: if that says it failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"confining a reader failed: {os.strerror(number)}")
    return result


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
