"""A wrong place is refused before any work, by the key that named it."""

from pathlib import Path

import pytest

from pipelines.destination import file, folder, replace_folder, untaken


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


@pytest.mark.parametrize("wanted", ["map.png", "new/map.PNG"])
def test_a_file_of_its_kind_may_lie_in_a_folder_that_is_yet_to_be_made(tmp_path, wanted):
    assert file("picture", str(tmp_path / wanted), ".png") == tmp_path / wanted
    assert not list(tmp_path.iterdir()), "nothing is made"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("map.jpg", "expected a file that ends in .png, on this machine"),
        ("s3://bucket/map.png", "expected a file that ends in .png, on this machine"),
        ("folder.png", "is a folder; expected a file that ends in .png"),
        ("folder.png/taken/map.png", "its folder=folder.png/taken: is a file"),
    ],
)
def test_what_can_be_no_file_of_its_kind_is_refused(tmp_path, monkeypatch, wanted, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "taken").touch()
    with pytest.raises(ValueError, match=rf"^picture={wanted}: {told}"):
        file("picture", wanted, ".png")


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


@pytest.fixture
def folders(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    return tmp_path


def test_a_folder_takes_the_place_of_another_and_nothing_else_is_left(folders):
    replace_folder(folders / "new", folders / "old")
    assert [path.name for path in folders.iterdir()] == ["old"]
    assert (folders / "old" / "new").read_text() == "new" and not (folders / "old" / "old").exists()


def test_a_folder_is_put_where_there_is_none(folders):
    replace_folder(folders / "new", folders / "third")
    assert (folders / "third" / "new").read_text() == "new"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_stays_if_another_cannot_be_put_there(folders, monkeypatch, error):
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        replace_folder(folders / "new", folders / "old")
    assert (folders / "old" / "old").read_text() == "old"
    assert sorted(path.name for path in folders.iterdir()) == ["new", "old"]
