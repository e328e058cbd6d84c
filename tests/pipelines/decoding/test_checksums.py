"""`published`: the check sums that lie beside files, as coreutils writes them."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from pipelines.decoding import checksums
from pipelines.decoding.checksums import digest, published

CONTENT = b"rain"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "2020" / "06" / "rain.h5"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return path


def test_a_file_without_any_has_none(file, tmp_path):
    (file.parent / "SHA256SUMS").write_text(f"{SHA256}  other.h5\n")
    assert list(published(file, tmp_path)) == []


@pytest.mark.parametrize("line", ["{0}\n", "{0}  rain.h5\n", "{0} *rain.h5\n", "{1}", "{0}  ./rain.h5\r\n"])
def test_one_beside_the_file_is_found(file, line):
    file.with_name("rain.h5.sha256").write_text(line.format(SHA256, SHA256.upper()))
    (found,) = published(file, None)
    assert (found.algorithm, found.digest, found.place.name) == ("sha256", SHA256, "rain.h5.sha256")


def test_those_that_coreutils_writes_are_found_in_every_folder_up_to_the_root(file, tmp_path):
    for command, folder in (("sha256sum", tmp_path), ("md5sum", file.parent)):
        listed = subprocess.run(
            [command, f"./{file.relative_to(folder)}"], cwd=folder, stdout=subprocess.PIPE, check=True
        )
        (folder / f"{command.upper()}S").write_bytes(listed.stdout)
    assert [(found.algorithm, found.digest) for found in published(file, tmp_path)] == [
        ("md5", MD5),
        ("sha256", SHA256),
    ]
    assert [found.algorithm for found in published(file, file.parent)] == ["md5"]
    for root in (tmp_path / "elsewhere", file, None):
        assert [found.algorithm for found in published(file, root)] == ["md5"]


@pytest.mark.parametrize("text", ["", "not a check sum\n", f"{SHA256}  another.h5\n", f"{MD5}\n", "\0" * 99])
def test_one_beside_the_file_that_says_nothing_of_it_is_an_error(file, text):
    file.with_name("rain.h5.sha256").write_text(text)
    with pytest.raises(ValueError, match=r"rain\.h5\.sha256 lies beside it and holds no sha256"):
        list(published(file, None))


def test_a_list_is_read_again_when_it_changed(file, tmp_path):
    listed = tmp_path / "SHA256SUMS"
    for turn, sha256 in enumerate((SHA256, "0" * 64)):
        listed.write_text(f"{sha256}  2020/06/rain.h5\n")
        os.utime(listed, (turn, turn))
        assert [found.digest for found in published(file, tmp_path)] == [sha256]


def test_a_list_that_is_too_large_is_not_read(file, monkeypatch):
    (file.parent / "SHA256SUMS").write_text(f"{SHA256}  rain.h5\n")
    monkeypatch.setattr(checksums, "LARGEST_LIST", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        list(published(file, None))


def test_only_plain_files_are_digested(file, tmp_path):
    assert digest(file, "sha256") == SHA256
    assert digest(file, "md5") == MD5
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "gone", "2020"):
        with pytest.raises(OSError, match=name):
            digest(tmp_path / name, "sha256")
