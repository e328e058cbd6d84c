"""`chances`: of what was seen as often as it was seen, and the surer the less is left open."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from metnet.cascade import WIDE, Continued, Lags, continued, decibel
from metnet.chances import DOUBLED, ERRS, LASTS, MOST, SURE, _at, _place, chances, displaced, grown_by, growth
from metnet.rain import RainBins

BINS = RainBins((0.1, 0.5, 1.0, 5.0, 20.0), 100.0)
AGE = torch.tensor([[0.0, 5.0, 10.0]])
SIDE = 192


def rain(seed=0, wet=-4.0, lump=6, side=SIDE):
    """Rain in lumps, dry between them, mm/h."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(1, side, side)), (0, lump, lump))
    return torch.from_numpy((10 ** ((wet + 9 * noise / noise.std()) / 10)).astype(np.float32)).where(
        torch.from_numpy(noise / noise.std() > -0.3), 0.0
    )


def everywhere(newest, grown=0.0):
    """The same growth in all areas."""
    rows, columns = (-(-size // WIDE) for size in newest.shape[1:])
    return torch.full((len(newest), 1, rows, columns), grown)


def edges(frames):
    """What a sensor tells each class from whose values are fine."""
    return torch.tensor(BINS.edges).expand(len(frames), -1)


def said(newest, spread, minutes=0.0, onward=None, grown=0.0):
    """The chances where rain goes on to `onward`, or to itself."""
    told = decibel(newest) if onward is None else onward
    open_ = torch.full_like(told, spread)
    ahead = torch.full_like(told, minutes)
    return chances(Continued(told, open_, open_), newest, ahead, edges(newest), everywhere(newest, grown))


def above(told):
    """The chance to reach each edge."""
    return told.flip(1).cumsum(dim=1).flip(1)[:, 1:]


def often(newest):
    """The share of cells that reach each edge."""
    return torch.stack([(newest >= edge).float().mean() for edge in BINS.edges])


def test_they_are_probabilities():
    told = said(rain(), 3.0, 30.0)
    assert told.shape == (1, len(BINS), SIDE, SIDE)
    assert told.min() >= 0
    torch.testing.assert_close(told.sum(dim=1), torch.ones(1, SIDE, SIDE))


def test_where_nothing_is_left_open_the_rain_goes_on_as_it_is():
    newest = rain()
    told = said(newest, 0.0)
    assert (told.argmax(dim=1) == BINS.classify(newest)).float().mean() > 0.98


@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_each_rate_is_as_frequent_as_in_the_newest_frame_however_much_is_left_open(spread):
    newest = rain(1)
    found = above(said(newest, spread)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(found, often(newest), rtol=0.08, atol=0.003)


def test_a_forecast_that_has_lost_its_extremes_keeps_their_frequency_in_the_same_places():
    newest = rain(2)
    smooth = torch.from_numpy(gaussian_filter(decibel(newest).numpy(), (0, 5, 5)))
    told = above(said(newest, 3.0, onward=smooth))
    torch.testing.assert_close(told.mean(dim=(0, 2, 3)), often(newest), rtol=0.1, atol=0.003)
    strong, weak = (smooth >= smooth.flatten().quantile(q) for q in (0.95, 0.5))
    assert told[:, 3][strong].mean() > 20 * told[:, 3][~weak].mean()


def test_what_is_left_open_widens_them_and_so_does_the_time():
    newest = rain(3)
    entropy = [
        -(told * told.clamp(min=1e-9).log()).sum(dim=1).mean()
        for told in (said(newest, 1.0), said(newest, 3.0), said(newest, 3.0, DOUBLED), said(newest, 6.0))
    ]
    assert entropy[0] < entropy[1] - 0.05 < entropy[2] - 0.1
    assert entropy[2] == pytest.approx(entropy[3].item(), abs=1e-4)


def test_they_know_of_rain_that_is_far_apart_by_itself():
    """The frequency is that of the area around, not of the whole grid."""
    side = 1200
    newest = torch.zeros(1, 64, side)
    newest[:, :, :300] = rain(4, side=300)[:, :64]
    told = above(said(newest, 3.0))[0, 0]
    assert told[:, :250].mean() == pytest.approx((newest[0, :, :250] >= 0.1).float().mean().item(), abs=0.1)
    assert told[:, 900:].max() < 0.02


@pytest.mark.parametrize("seen", [0, 20])
def test_where_next_to_nothing_is_seen_its_frequency_is_not_believed(seen):
    newest = torch.full((1, 128, 128), torch.nan)
    newest[:, :1, :seen] = 30.0
    told = above(said(newest, 2.0, onward=torch.full((1, 128, 128), -15.0)))
    assert torch.isfinite(told).all()
    assert told[:, 2].max() < 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0, 200.0])
def test_flat_fields_give_finite_chances_of_their_own_rate(rate):
    newest = torch.full((2, 64, 40), rate)
    told = said(newest, 0.5)
    assert torch.isfinite(told).all()
    assert told.mean(dim=(0, 2, 3)).argmax() == BINS.classify(newest)[0, 0, 0]


def test_a_piece_of_the_grid_that_is_not_a_multiple_of_blocks_changes_little():
    newest = rain(5)
    whole, part = said(newest, 3.0)[:, :, :100, :100], said(newest[:, :124, :116], 3.0)[:, :, :100, :100]
    assert (above(whole) - above(part)).abs().mean() < 0.05


def test_they_say_what_members_say_that_are_drawn():
    """Noise around what goes on, given the newest frame's rates in order."""
    frames = rain(6)[:, None].repeat(1, 3, 1, 1)
    frames[:, 1], frames[:, 2] = (frames[:, 0].roll(n, -1) for n in (1, 2))
    coefficients = Lags.of(frames, AGE).after(torch.tensor([[20.0]]))[:, 0]
    onward = continued(frames[:, 0], frames[:, 1], coefficients)
    told = above(
        chances(onward, frames[:, 0], torch.zeros(1, SIDE, SIDE), edges(frames), everywhere(frames[:, 0]))
    )[0]
    random = torch.Generator().manual_seed(0)
    ordered = frames[0, 0].flatten().sort().values
    drawn = torch.zeros_like(told)
    for _ in range(60):
        field = onward.rain[0] + onward.close[0] * torch.randn(SIDE, SIDE, generator=random)
        member = ordered[field.flatten().argsort().argsort()].reshape(SIDE, SIDE)
        drawn += torch.stack([(member >= edge).float() for edge in BINS.edges]) / 60
    assert (told - drawn).abs().mean() < 0.03
    assert (told - drawn).mean(dim=(1, 2)).abs().max() < 0.02


def test_rates_that_a_sensor_tells_as_a_class_come_as_often_as_it_tells_it():
    """One that rounds to 0.6 mm/h: what lies between two cells' values has the class that it rounds to."""
    newest = (rain(5) / 0.6).round() * 0.6
    between = 0.5 * (newest + newest.roll(1, 1))
    rounding = torch.tensor([[0.3, 0.3, 0.9, 4.5, 20.0]])
    told = Continued(decibel(between), *2 * [torch.full_like(between, 0.1)])
    said = above(chances(told, between, torch.zeros_like(between), rounding, everywhere(between)))
    wanted = torch.stack([(between >= edge).float().mean() for edge in rounding[0]])
    torch.testing.assert_close(said.mean(dim=(0, 2, 3)), wanted, atol=0.01, rtol=0)
    assert said[0, 0].mean() > often(between)[1] + 0.02
    torch.testing.assert_close(said[:, 0], said[:, 1])


def test_samples_are_told_of_by_themselves_and_the_spread_is_that_of_each_cell():
    pair = torch.cat([rain(7), rain(8, wet=-12.0)])
    close = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 6
    minutes = torch.full_like(close, 15.0)

    def of(part, close):
        onward = Continued(decibel(pair[part]), torch.full_like(close, 99.0), close)
        return chances(onward, pair[part], minutes[part], edges(pair[part]), everywhere(pair[part]))

    both = of(slice(None), close)
    for sample in (0, 1):
        part = slice(sample, sample + 1)
        torch.testing.assert_close(both[part], of(part, close[part]))
    narrower = torch.where(torch.arange(SIDE) % 16 < 8, close, 0.1 * close)
    changed = (of(slice(None), narrower) - both).abs().mean(dim=(0, 1, 2))
    assert changed[torch.arange(SIDE) % 16 >= 8].min() > 3 * changed[torch.arange(SIDE) % 16 < 8].max()


def test_a_curve_is_read_and_turned_around_as_numpy_interpolates():
    random = torch.Generator().manual_seed(0)
    curve = torch.rand(2, 9, 3, 4, generator=random).cumsum(dim=1).flip(1)
    places = torch.tensor([[0.0, 0.4, 3.0, 6.7, 8.0], [7.0, 2.2, 0.1, 8.0, 5.5]])
    read = _at(curve, places[:, :, None, None])
    for n, y, x in np.ndindex(2, 3, 4):
        line = curve[n, :, y, x].numpy()
        np.testing.assert_allclose(read[n, :, y, x], np.interp(places[n], np.arange(9), line), rtol=1e-5)
        back = np.interp(-read[n, :, y, x].numpy(), -line, np.arange(9))
        np.testing.assert_allclose(_place(curve, read)[n, :, y, x], back, atol=1e-4)
    beyond = torch.tensor([99.0, -99.0])[None, :, None, None].expand(2, 2, 3, 4)
    torch.testing.assert_close(_place(curve, beyond)[:, :, 0, 0], torch.tensor([[0.0, 8.0]] * 2))


def test_rates_just_below_an_edge_by_rounding_have_reached_it():
    there = torch.arange(SIDE) % 2 == 0
    newest, whole = (rain(9).where(there, rate) for rate in (5.0 * (1 - 3e-7), 5.0))
    torch.testing.assert_close(said(newest, 2.0), said(whole, 2.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("grown", [-0.3, 0.2])
def test_an_area_that_grows_or_shrinks_changes_how_often_it_rains_little_and_not_how_often_it_rains_hard(
    grown,
):
    newest = rain(10, wet=-6.0)
    by = above(said(newest, 3.0, grown=grown)).mean(dim=(0, 2, 3)) / above(said(newest, 3.0)).mean(
        dim=(0, 2, 3)
    )
    assert by[0] == pytest.approx(np.exp(grown), rel=0.05)
    assert by[1] == pytest.approx(np.exp(0.3 * grown), rel=0.05)  # 0.5 mm/h lies at 0.7 of the way to 1
    torch.testing.assert_close(by[2:], torch.ones(3), rtol=0.01, atol=0)


@pytest.mark.parametrize("grown", [-MOST, MOST])
@pytest.mark.parametrize("rate", [0.15, 0.7, 30.0])
def test_rain_of_one_rate_everywhere_stays_a_distribution_however_it_grows(grown, rate):
    newest = torch.full((1, 64, 64), rate)
    told = said(newest, 2.0, grown=grown)
    assert told.min() >= 0
    torch.testing.assert_close(told.sum(dim=1), torch.ones(1, 64, 64))
    assert (above(told).diff(dim=1) <= 1e-6).all()


def test_growth_is_that_of_the_wet_area_seen_in_both_frames_the_less_believed_the_less_is_wet():
    frames = torch.zeros(1, 3, 64, 64)
    frames[:, 0, :, :32], frames[:, 1, :, :8], frames[:, 2, :, :16] = 2.0, 2.0, 2.0
    told = growth(frames, AGE)
    assert told.shape == (1, 1, 4, 4)
    assert told.mean().item() == pytest.approx(np.log(0.501 / 0.251) / 10 * 0.5 / (0.5 + SURE), rel=1e-3)
    frames[:, 0, 32:] = torch.nan  # half as much seen now: not a sign of less rain
    torch.testing.assert_close(growth(frames, AGE), told)
    frames[:, 2] = torch.nan  # the oldest shows nothing: the one before tells
    assert growth(frames, AGE).mean().item() == pytest.approx(np.log(0.501 / 0.126) / 5 * 0.5 / 0.7, rel=1e-3)


@pytest.mark.parametrize("frames", [torch.full((2, 3, 40, 40), torch.nan), torch.ones(2, 1, 40, 40)])
def test_what_is_not_seen_twice_has_no_growth(frames):
    told = growth(frames, AGE[:, : frames.shape[1]].repeat(2, 1))
    torch.testing.assert_close(told, torch.zeros(2, 1, 3, 3))


def test_growth_comes_to_an_end():
    rate = torch.tensor([-0.02, 0.002])[:, None, None, None]
    told = grown_by(rate, torch.tensor([[0.0, 5.0, 1e4]]).repeat(2, 1)).view(2, 3)
    assert told[1].tolist() == pytest.approx([0.0, 0.002 * LASTS * (1 - np.exp(-5 / LASTS)), 0.002 * LASTS])
    assert told[0, [0, 2]].tolist() == pytest.approx([0.0, -MOST])


def test_rain_whose_motion_is_known_stays_where_it_is():
    onward = Continued(decibel(rain(11)), torch.full((1, SIDE, SIDE), 4.0), torch.full((1, SIDE, SIDE), 3.0))
    told = displaced(onward, torch.zeros(1, SIDE, SIDE))
    for part, was in zip(told, onward, strict=True):
        torch.testing.assert_close(part, was)


@pytest.mark.parametrize("errs", [1.5, 6.0, 20.0])
def test_a_motion_in_doubt_tells_what_members_tell_that_are_carried_elsewhere(errs):
    """Mean and variance of the field around, as a normal displacement would have them."""
    field = decibel(rain(12, side=256))
    still = torch.full_like(field, 2.0)
    told = displaced(Continued(field, still, still), torch.full_like(field, errs / ERRS))
    near = (0, errs, errs)
    mean = gaussian_filter(field.double().numpy(), near, mode="nearest")
    square = gaussian_filter(field.double().numpy() ** 2, near, mode="nearest")
    middle = (0, slice(64, -64), slice(64, -64))
    spread = field[middle].std().item()
    assert np.abs(told.rain[middle].numpy() - mean[middle]).mean() < 0.1 * spread
    found, wanted = told.close[middle].numpy(), np.sqrt(4 + square - mean**2)[middle]
    assert np.abs(found - wanted).mean() < 0.2 * wanted.mean()  # squares for a bell
    torch.testing.assert_close(told.spread, still)


def test_only_where_motion_is_in_doubt_and_beyond_the_grid_nothing_comes_from():
    field = torch.full((1, 64, 96), 7.0)
    still = torch.ones_like(field)
    told = displaced(Continued(field, still, still), torch.full_like(field, 500.0))
    torch.testing.assert_close(told.rain, field)
    torch.testing.assert_close(told.close, still, atol=2e-2, rtol=0)
    field = decibel(rain(13))
    errs = torch.zeros_like(field)
    errs[:, :, SIDE // 2 :] = 10.0
    still = torch.ones_like(field)
    told = displaced(Continued(field, still, still), errs)
    known = (0, slice(None), slice(0, SIDE // 2 - 8))
    torch.testing.assert_close(told.rain[known], field[known])
    assert (told.close[0, :, SIDE // 2 + 8 :] > 1.2).float().mean() > 0.9
