import torch

from metnet.scaling import RainScaling


def scaled(*rates):
    radar = torch.tensor(rates).reshape(1, 1, 1, -1)
    return RainScaling()(radar, torch.tensor([[30.0]]))[0, 0, :, 0]


def test_the_values_are_those_of_the_published_table():
    value, _, _ = scaled(0.0, 0.2, 1.0, 2.0, 10.0)
    # MetNet-2's official preprocessing says this of the same rates
    torch.testing.assert_close(value, torch.tensor([0.0, 0.046, 0.172, 0.268, 0.537]), atol=6e-4, rtol=0)


def test_only_the_mask_tells_dry_from_not_observed():
    value, mask, age = scaled(0.0, torch.nan)
    assert value.tolist() == [0.0, 0.0]
    assert mask.tolist() == [1.0, 0.0]
    assert age.tolist() == [0.5, 0.5]  # hours


def test_stronger_rain_never_gets_a_smaller_value_and_none_leaves_the_unit_interval():
    value, _, _ = scaled(*torch.logspace(-2, 3.3, 50).tolist())
    assert (value.diff() > 0).all()
    assert 0 < value.min() < value.max() < 1


def test_each_frame_has_its_own_age():
    radar = torch.zeros(2, 3, 2, 2)
    age = torch.tensor([[20.0, 10.0, 0.0], [60.0, 30.0, 0.0]])
    out = RainScaling()(radar, age)
    torch.testing.assert_close(out[:, :, 2].amax(dim=(2, 3)), age / 60)
    torch.testing.assert_close(out[:, :, 2].amin(dim=(2, 3)), age / 60)
