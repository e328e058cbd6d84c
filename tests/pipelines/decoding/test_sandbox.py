"""`confine`: what a process may do afterwards, tried out in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.decoding import sandbox

landlock = pytest.mark.skipif(
    sandbox.landlock_version() == 0, reason="this kernel has no Landlock: files cannot be closed to a process"
)
filtered = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in sandbox.CALLS,
    reason="no filter of system calls for this system",
)

# Confines itself to the files it is given, then says of each line of its input what became of it.
ATTEMPTS = """
import os, socket, subprocess, sys, threading
from pathlib import Path
from pipelines.decoding import sandbox

sandbox.confine([Path(path) for path in sys.argv[1:]])
for line in sys.stdin:
    try:
        exec(line)
    except OSError as error:
        print(type(error).__name__)
    else:
        print("done")
"""


def fates(readable: list[Path], attempts: list[str]) -> dict[str, str]:
    """What became of each attempt in a process that may read only `readable`."""
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, *map(str, readable)],
        input="\n".join(attempts),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(zip(attempts, done.stdout.split(), strict=True))


@landlock
def test_only_the_named_files_and_the_libraries_can_be_read_and_nothing_can_be_written(tmp_path):
    mine, other, folder = tmp_path / "mine", tmp_path / "other", tmp_path / "folder"
    folder.mkdir()
    for path in (mine, other, folder / "below"):
        path.write_text("x")
    allowed = [
        f"Path('{mine}').read_text()",
        f"Path('{folder}/below').read_text()",
        f"os.listdir('{folder}')",
        "import sqlite3, zoneinfo",
        "Path(os.devnull).write_text('x')",
    ]
    denied = [
        f"Path('{other}').read_text()",
        f"os.listdir('{tmp_path}')",
        "Path('/etc/passwd').read_text()",
        "Path('/proc/self/environ').read_text()",
        f"Path('{mine}').open('a')",
        f"Path('{mine}').unlink()",
        f"Path('{folder}/new').write_text('x')",
        f"Path('{folder}/new').mkdir()",
        f"Path('{folder}/below').rename('{folder}/moved')",
        f"Path('{folder}/link').symlink_to('/etc/passwd')",
        f"os.truncate('{mine}', 0)",
    ]
    got = fates([mine, folder], allowed + denied)
    assert {attempt: got[attempt] for attempt in allowed} == dict.fromkeys(allowed, "done")
    assert {attempt: got[attempt] for attempt in denied} == dict.fromkeys(denied, "PermissionError")
    assert mine.read_text() == "x"


@filtered
def test_no_sockets_no_programs_and_no_processes_but_threads(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("x")
    denied = [
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['/bin/true'])",
    ]
    thread = "thread = threading.Thread(target=len, args=([],)); thread.start(); thread.join()"
    got = fates([mine], [*denied, thread])
    assert got == {**dict.fromkeys(denied, "PermissionError"), thread: "done"}


@landlock
def test_a_link_in_place_of_a_file_opens_nothing(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/etc/passwd")
    assert fates([link], ["Path('/etc/passwd').read_text()"]) == {
        "Path('/etc/passwd').read_text()": "PermissionError"
    }


def test_where_the_system_has_no_such_means_nothing_is_confined(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sandbox.landlock_version() == 0
    sandbox.confine([tmp_path])
    sandbox.die_with_parent()
    (tmp_path / "new").write_text("x")


def test_the_libraries_hold_no_home_and_no_settings():
    for path in sandbox.libraries():
        assert not Path.home().is_relative_to(path)
        assert not Path("/etc/passwd").is_relative_to(path)
        assert not Path("/proc/self/environ").is_relative_to(path)
