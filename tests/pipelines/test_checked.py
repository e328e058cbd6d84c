"""An array in a file is what was written, or refused."""

import numpy as np
import pytest

from pipelines import checked


@pytest.mark.parametrize("at_once", [2**24, 7])
def test_an_array_comes_back_mapped_and_to_the_last_bit(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(checked, "AT_ONCE", at_once)
    array = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    array[0, 0, 0] = np.nan
    checked.save(tmp_path / "a.npy", array)
    loaded = checked.load(tmp_path / "a.npy")
    assert isinstance(loaded, np.memmap)
    assert np.array_equal(loaded.view(np.uint32), array.view(np.uint32))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("place", [0, 70, 128, 150, -5, -1])
def test_a_changed_byte_anywhere_is_found(tmp_path, place):
    path = tmp_path / "a.npy"
    checked.save(path, np.arange(9))
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy: damaged.*delete it"):
        checked.load(path)


@pytest.mark.parametrize("left", [0, 3, 100, 199])
def test_a_file_that_was_cut_off_is_found(tmp_path, left):
    path = tmp_path / "a.npy"
    checked.save(path, np.arange(9))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="damaged"):
        checked.load(path)
