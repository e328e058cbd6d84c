"""The gallery is drawn where it is asked for, and by no other word."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import gallery


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A folder in place of the committed one; two blocks, of which nothing is worked out."""
    everything = np.ones((gallery.ROWS_SEEN, gallery.COLUMNS_SEEN))
    monkeypatch.setattr(gallery, "FOLDER", tmp_path / "committed")
    monkeypatch.setattr(gallery, "blocks", lambda side: dict.fromkeys(("axial", "external"), lambda _: None))
    monkeypatch.setattr(gallery, "seen", lambda block: everything)
    monkeypatch.setattr(gallery, "seen_by_decoder", lambda: everything)
    monkeypatch.setattr(gallery, "cost", lambda make, side: (float(side), 1.0))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return gallery.FOLDER


@pytest.mark.parametrize("word", ["--help", "--nonsense"])
def test_who_asks_for_help_or_mistypes_draws_nothing(committed, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["gallery", word])
    with pytest.raises(SystemExit):
        gallery.main()
    assert not committed.exists()


def test_all_is_drawn_into_the_folder_that_is_asked_for(committed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gallery", "--out", str(tmp_path / "mine")])
    gallery.main()
    drawn = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert drawn == ["axial.png", "cost.png", "decoder.png", "external.png"]
    assert not committed.exists()
