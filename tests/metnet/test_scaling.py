import pytest
import torch
from jaxtyping import TypeCheckError

from metnet.scaling import FieldScaling, RainScaling, scaled_rain, unscaled_rain


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


def test_a_channel_of_rain_is_valued_as_the_radar_is_and_the_others_by_their_units():
    both = torch.tensor([[0.0, 2.0, 10.0, torch.nan], [250.0, 275.0, torch.nan, 300.0]])
    rain, kelvin, seen, warm = FieldScaling(("rain", (250.0, 25.0)))(both[:, None])[:, 0]
    value, mask, _ = scaled(*both[0].tolist())
    assert torch.equal(rain, value) and torch.equal(seen, mask)
    assert kelvin.tolist() == [0.0, 1.0, 0.0, 2.0] and warm.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_the_gradient_of_rain_is_finite_where_it_was_not_observed_and_where_it_cannot_be_right():
    field = torch.tensor([torch.nan, torch.inf, -5.0, 0.0, 3.0]).reshape(1, 1, 5).requires_grad_()
    scaled = FieldScaling(("rain",))(field)
    scaled.sum().backward()
    assert scaled.isfinite().all() and field.grad.isfinite().all()
    assert field.grad[0, 0, 4] > 0


def test_only_centre_and_spread_are_kept_with_the_weights():
    assert set(FieldScaling(("rain", (250.0, 25.0))).state_dict()) == {"centre", "spread"}


@pytest.mark.parametrize("unit", ["rian", (250.0,), (250.0, 0.0), (250.0, float("nan")), (1.0, 2.0, 3.0)])
def test_what_is_neither_rain_nor_centre_and_spread_is_refused(unit):
    with pytest.raises(ValueError, match=r"the unit of a channel is .* its spread above 0, or the word rain"):
        FieldScaling(("rain", unit))


def test_one_pair_in_place_of_a_list_of_pairs_is_refused_by_what_it_is():
    with pytest.raises((ValueError, TypeCheckError), match="250"):  # types are checked first where they are
        FieldScaling((250, 25))


def test_a_card_says_of_each_channel_how_it_is_scaled():
    rain, kelvin = FieldScaling(("rain", (250.0, 25.0))).card()
    assert rain["value"] == RainScaling().card()["value"]
    assert kelvin == {"centre": 250.0, "spread": 25.0}


def test_the_rate_of_a_value_is_the_rate_that_was_scaled():
    rate = torch.tensor([0.0, 0.1, 1.0, 20.0, 150.0])
    torch.testing.assert_close(unscaled_rain(scaled_rain(rate)), rate, rtol=1e-3, atol=1e-5)
