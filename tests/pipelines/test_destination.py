"""A wrong place is refused before any work, by the key that named it."""

import pytest

from pipelines.destination import folder, untaken


@pytest.mark.parametrize("wanted", ["there", "not/yet/there", "."])
def test_a_folder_may_be_there_or_not(tmp_path, monkeypatch, wanted):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder("out", wanted).absolute() == (tmp_path / wanted).absolute()
    assert not (tmp_path / "not").exists(), "nothing is made"


@pytest.mark.parametrize(("wanted", "told"), [("file", "is a file"), ("file/below", r"/.*/file is a file")])
def test_a_file_is_no_folder_and_none_can_be_made_below_it(tmp_path, wanted, told):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^out=.*{wanted}: {told}; expected a folder"):
        folder("out", str(tmp_path / wanted))


def test_what_is_there_is_not_written_over(tmp_path):
    assert untaken("to", str(tmp_path / "new")) == tmp_path / "new"
    with pytest.raises(ValueError, match=r"^to=.*: something is there already"):
        untaken("to", str(tmp_path))


def test_a_url_and_a_link_to_nothing_are_no_folders(tmp_path):
    with pytest.raises(ValueError, match=r"^run=s3://bucket/run: is a URL; expected a local folder"):
        folder("run", "s3://bucket/run")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"^run=.*link: is a link to nothing"):
        folder("run", str(tmp_path / "link"))
