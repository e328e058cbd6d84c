import pytest
import torch

from metnet.downsampler import Downsampler


def test_a_storm_moved_by_four_pixels_moves_by_one_cell():
    torch.manual_seed(0)
    downsampler = Downsampler(3, 16)
    storm = torch.zeros(1, 3, 64, 64)
    storm[:, :, 24:36, 20:30] = torch.rand(1, 3, 12, 10)
    moved = torch.roll(storm, (4, -8), dims=(2, 3))

    inner = slice(4, -4)
    here, there = downsampler(storm), downsampler(moved)
    expected = torch.roll(here, (1, -2), dims=(2, 3))
    torch.testing.assert_close(there[:, :, inner, inner], expected[:, :, inner, inner])
    assert here.std(dim=(2, 3)).max() > 0.01


def test_samples_do_not_see_each_other():
    downsampler = Downsampler(3, 16)
    frames = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(downsampler(frames)[1:2], downsampler(frames[1:2]))


@pytest.mark.parametrize("sides", [(15, 16), (16, 18)])
def test_sides_that_are_no_multiple_of_4_are_refused(sides):
    with pytest.raises(ValueError, match="multiples of 4"):
        Downsampler(3, 16)(torch.zeros(1, 3, *sides))


def test_a_width_that_cannot_be_quartered_is_refused():
    with pytest.raises(ValueError, match="channels=18"):
        Downsampler(3, 18)
