"""What is local: zeros before it has learned, then what a pixel's surroundings tell beyond the prior."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from scipy.stats import logistic

from metnet.advection import advect
from metnet.batch import Batch
from metnet.cascade import AREA, WIDE, Lags, continued
from metnet.head import Categorical, Ordinal, climatology
from metnet.local import (
    FARTHEST,
    FARTHEST_SHIFT,
    LATER,
    LEAST_RATE,
    LIKELIEST,
    PARTS,
    POOL,
    SEEN,
    USUAL_WIDTH,
    Local,
    describe,
    described,
    pace,
)
from metnet.model import MetNet
from metnet.prior import NEAR, REFERENCE, AdvectionPrior, Pixels
from metnet.rain import RainBins
from metnet.scaling import scaled_rain

BINS = RainBins((0.1, 1.0, 5.0), 50.0)
EDGES = torch.tensor([BINS.edges])
LEADS = torch.tensor([5.0, 30.0])
FRAMES = 3
REACH = (
    AREA + 4
) * WIDE  # cells: half of the widest area, of means over as much, and what lies between blocks
every_link = pytest.mark.parametrize("link", (Categorical(), Ordinal()), ids=lambda link: type(link).__name__)


def rain(rows, columns, seed=0, side=5):
    """Rain everywhere, mm/h, of lumps about `side` cells wide."""
    random = np.random.default_rng(seed)
    field = uniform_filter(random.gamma(0.5, 6.0, (rows, columns)), side, mode="wrap")
    return torch.from_numpy(field.astype(np.float32))


def carried_rain(frames=FRAMES, side=64, leads=2, seed=0):
    """As many frames at each lead time, none like another, with dry ground among the rain."""
    fields = [rain(side, side, 100 * seed + n) - 2.0 for n in range(frames * leads)]
    return torch.stack(fields).clamp(min=0).reshape(1, frames, leads, side, side)


def told_of(carried, **changed):
    """What `describe` tells of these frames, in rain that drifts."""
    frames, leads, rows, columns = carried.shape[1:]
    ahead = LEADS[:leads, None, None].expand(1, leads, rows, columns)
    arguments = {
        "ahead": ahead,
        "age": torch.arange(frames)[None] * 5.0,
        "paces": torch.ones(1, 2, rows, columns),
        **changed,
    }
    coefficients = arguments.pop("coefficients", None)
    if coefficients is None:
        coefficients = Lags.of(carried[:, :, 0], arguments["age"]).after(LEADS[None, :leads])
    return describe(carried, **arguments, onward=onward_of(carried, coefficients))


def onward_of(carried, coefficients):
    """What the cascade makes of the newest two frames."""
    now, before = (carried[:, frame].flatten(0, 1) for frame in (0, min(1, carried.shape[1] - 1)))
    return continued(now, before, coefficients.flatten(0, 1))


def a_batch(seed=0, change=1.0, side=32):
    """Rain that drifts and becomes `change` times as strong from frame to frame, and ever after."""
    newest = (rain(side, side, seed) - 1.5).clamp(min=0)[None]
    motion = torch.tensor([0.3, -0.1])[None, :, None, None].expand(1, 2, side, side).contiguous()
    age = torch.arange(FRAMES - 1, -1, -1.0) * 5
    strength = change ** torch.arange(1 - FRAMES, 1.0)
    radar = advect(newest, motion, -age).nan_to_num() * strength[:, None, None]
    target = advect(newest, motion, LEADS) * change
    return Batch(radar, age[None], torch.tensor([0]), LEADS, torch.tensor([1000.0]), motion, target)


def network(link=Categorical(), local=16, **arguments):  # noqa: B008 (links are frozen)
    torch.manual_seed(0)
    sizes = {"channels": 8, "fine_channels": 4, "depth": 0, "grid": (8, 8)}
    return MetNet(FRAMES, **sizes, bins=BINS, head=link, local=local, **arguments).eval()


def some_pixels(made, seeds, count=400):
    """Of rain that grows, and of rain that decays, in batches which the newest frame alone does not tell."""
    batches = [a_batch(seed, change) for seed in seeds for change in (0.4, 2.5)]
    random = torch.Generator().manual_seed(0)
    return Pixels.joined([made.pixels(batch, count, random) for batch in batches])


def spoken(local):
    """Makes every weight say something, and the cascade too."""
    torch.manual_seed(1)
    for weight in local.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    local.pool.copy_(torch.tensor(POOL))


@every_link
def test_before_it_has_learned_the_forecast_is_that_of_a_network_without(link):
    with_it, without = network(link), network(link, local=0)
    torch.nn.init.normal_(with_it.head.classify.weight, std=0.1)
    without.load_state_dict({n: x for n, x in with_it.state_dict().items() if not n.startswith("local.")})
    with torch.no_grad():
        expected = without(a_batch()).probability
        torch.testing.assert_close(with_it(a_batch()).probability, expected, atol=2e-5, rtol=0)
        spoken(with_it.local)
        assert not torch.allclose(with_it(a_batch()).probability, expected, atol=0.01)


def test_the_further_ahead_the_more_the_cascade_counts_and_nothing_where_nothing_was_seen():
    made = Local(BINS, FRAMES, 8)
    prior = torch.full((1, len(BINS), 1, 1), 1 / len(BINS)).log()
    likely = torch.zeros(1, len(BINS), 1, 1)
    likely[:, 2] = 1.0

    def share(minutes, seen=1.0):
        told = torch.zeros(1, described(FRAMES), 1, 1)
        told[:, made.rates + SEEN], told[:, LATER] = seen, math.log(minutes / REFERENCE)
        return (
            (made(told, prior, likely, EDGES).exp()[0, 2, 0, 0] - 1 / len(BINS)) / (1 - 1 / len(BINS))
        ).item()

    assert share(60.0) == pytest.approx(0.0, abs=1e-4), "before anything was fitted"
    made.pool.copy_(torch.tensor(POOL))
    assert share(60.0, seen=0.0) == pytest.approx(0.0, abs=1e-4)
    assert 0.1 < share(5.0) < 0.2 < share(20.0) < 0.4 < share(60.0) < 0.65


def test_what_is_told_of_being_observed_and_of_the_lead_time_is_where_it_is_looked_for():
    carried = carried_rain()
    carried[:, :, :, 20:30, 10:40] = torch.nan
    told = told_of(carried)
    seen = (~carried[0, 0].isnan()).float()
    torch.testing.assert_close(told[:, Local(BINS, FRAMES, 8).rates + SEEN], seen)
    torch.testing.assert_close(told[:, LATER], (LEADS / REFERENCE).log()[:, None, None].expand(2, 64, 64))


def test_the_highest_rate_close_by_is_told_to_the_very_edge():
    carried = carried_rain(side=20)
    expected = F.max_pool2d(scaled_rain(carried[0, 0])[:, None], 5, stride=1, padding=2)[:, 0]
    assert torch.equal(told_of(carried)[:, FRAMES - 1], expected)


def missing(pattern, carried):
    """Frames of which some is not observed, the newest filled by older ones as `describe` expects it."""
    carried = carried.clone()
    if pattern == "all":
        carried[:] = torch.nan
    elif pattern == "all but the newest":
        carried[:, 1:] = torch.nan
    elif pattern == "the oldest":
        carried[:, -1] = torch.nan
    elif pattern == "a sector":
        carried[..., :40, 10:50] = torch.nan
    elif pattern == "all but a cell":
        carried[..., 1:, 1:] = torch.nan
    elif pattern == "one lead time":
        carried[:, :, -1] = torch.nan
    elif pattern == "dry":
        carried[:] = 0.0
    return carried


PATTERNS = ("none", "all", "all but the newest", "the oldest", "a sector", "all but a cell", "one lead time")


@pytest.mark.parametrize("pattern", [*PATTERNS, "dry"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_whatever_is_missing_what_is_told_is_finite_and_of_the_promised_count(pattern, frames):
    carried = missing(pattern, carried_rain(frames, side=52))
    told = told_of(carried)
    assert told.shape == (2, described(frames), 52, 52)
    assert torch.isfinite(told).all()
    assert told.abs().max() < 100, "and no small share blows it up"
    paces = pace(carried[:, :, 0])
    assert torch.isfinite(paces).all()
    assert paces.min() >= 0 and paces.max() <= math.log2(NEAR[-1]) + 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whatever_is_missing_the_forecast_is_a_distribution(pattern):
    made = network()
    spoken(made.local)
    batch = a_batch(side=52)
    radar = missing(pattern, batch.radar.flip(1)[:, :, None])[:, :, 0].flip(1)
    with torch.no_grad():
        said = made(replace(batch, radar=radar)).probability
    torch.testing.assert_close(said.sum(dim=2), torch.ones(1, 2, 52, 52))


def test_what_is_not_observed_is_not_told_as_dry():
    dry = carried_rain()
    dry[..., 20:40, 20:40] = 0.0
    blind = dry.clone()
    blind[..., 20:40, 20:40] = torch.nan
    apart = (told_of(dry) - told_of(blind)).abs().amax(dim=1)
    assert (apart[:, 20:40, 20:40] > 0.5).all()
    half = dry.clone()
    half[:, 0, :, 20:40, 20:40] = torch.nan
    assert (told_of(dry) - told_of(half)).abs().amax(dim=1)[:, 20:40, 20:40].min() > 0.1, "of one frame"


def test_nothing_is_told_of_rain_beyond_the_widest_area():
    here = torch.cat([carried_rain(side=64)] * 14, dim=-1)
    changed = here.clone()
    changed[..., 880:] += 3.0
    moved = (told_of(here) != told_of(changed)).any(dim=1)
    assert not moved[..., : 880 - REACH].any()
    assert moved[..., 880 - NEAR[-1] // 4 :].all()


@pytest.mark.parametrize(
    "turn",
    [lambda x: torch.rot90(x, 1, (-2, -1)), lambda x: x.flip(-1), lambda x: x.mT],
    ids=["turned", "mirrored", "both"],
)
def test_what_is_told_turns_and_mirrors_with_the_rain(turn):
    carried = missing("a sector", carried_rain())
    paces = pace(carried[:, :, 0])
    torch.testing.assert_close(pace(turn(carried[:, :, 0])), turn(paces), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        told_of(turn(carried), paces=turn(paces)), turn(told_of(carried, paces=paces)), atol=1e-4, rtol=0
    )


def test_lead_times_and_samples_are_told_of_by_themselves():
    carried = carried_rain()
    onward = Lags.of(carried[:, :, 0], torch.tensor([[0.0, 5.0, 10.0]])).after(LEADS[None])
    both = told_of(carried, coefficients=onward)
    for lead in range(2):
        one = {"ahead": LEADS[lead].expand(1, 1, 64, 64), "coefficients": onward[:, lead : lead + 1]}
        torch.testing.assert_close(told_of(carried[:, :, lead : lead + 1], **one)[0], both[lead])
    pair = torch.cat([carried, carried_rain(seed=1)])[:, :, 0]
    torch.testing.assert_close(pace(pair)[:1], pace(pair[:1]))


def test_rain_that_does_not_change_has_the_narrowest_pace_and_noise_the_widest():
    still = rain(64, 64)[None, None].expand(1, FRAMES, 64, 64)
    torch.testing.assert_close(pace(still), torch.zeros(1, 2, 64, 64))
    noise = torch.stack([rain(64, 64, seed, side=1) for seed in range(FRAMES)])[None]
    torch.testing.assert_close(pace(noise), torch.full((1, 2, 64, 64), math.log2(NEAR[-1])))


@pytest.mark.parametrize("side", [3, 5, 13, 29])
def test_rain_that_a_box_has_widened_has_the_pace_of_the_box(side):
    """In rain that has lumps of every size, as real rain has."""
    scales = [rain(192, 192, seed, lumps) for seed, lumps in enumerate((3, 9, 27, 81))]
    newest = 1.5 * (sum((x - x.mean()) / x.std() for x in scales) - 1).clamp(min=0)
    wide = torch.from_numpy(uniform_filter(scaled_rain(newest).numpy(), side, mode="wrap"))
    older = (4 * wide.atanh()).expm1()
    middle = pace(torch.stack([newest, older])[None])[0, :, 64:128, 64:128]
    torch.testing.assert_close(middle, torch.full_like(middle, math.log2(side)), atol=0.3, rtol=0)


def test_the_more_has_changed_the_wider_the_pace_and_the_oldest_frame_is_told_apart():
    newest = rain(96, 96, side=9)
    frames = [newest, newest.roll(1, 1), newest.roll(3, 1)]
    paces = [pace(torch.stack([newest, other])[None]).mean().item() for other in frames]
    assert paces[0] < paces[1] - 0.1 < paces[2] - 0.2
    both = pace(torch.stack(frames)[None])
    assert both.mean(dim=(0, 2, 3)).tolist() == pytest.approx(paces[1:])


def test_where_there_is_no_rain_no_pace_is_made_up():
    dry, blind = torch.zeros(1, FRAMES, 64, 64), torch.full((1, FRAMES, 64, 64), torch.nan)
    assert torch.equal(pace(dry), pace(blind))
    assert 0 < pace(dry).min() == pace(dry).max() < math.log2(NEAR[-1])


@every_link
def test_it_learns_that_rain_which_has_grown_grows_on_and_beats_the_prior_on_other_rain(link):
    made = network(link)
    learned, others = some_pixels(made, range(4)), some_pixels(made, range(100, 103))
    made.prior.fit(learned, 30)
    before = {name: weight.clone() for name, weight in made.prior.state_dict().items()}
    made.local.fit(learned, made.prior, 150)
    assert made.local.gain(others, made.prior) > 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in made.prior.state_dict().items())


@every_link
def test_an_unfitted_one_gains_nothing(link):
    made = network(link)
    assert abs(made.local.gain(some_pixels(made, [0]), made.prior)) < 1e-3


@every_link
def test_what_is_gained_at_a_pixel_is_what_the_forecast_gains_there(link):
    made, batch = network(link), a_batch()
    spoken(made.local)
    target = torch.full_like(batch.target, torch.nan)
    target[0, 1, 13, 18] = 2.0
    pixels = made.pixels(replace(batch, target=target), 3, torch.Generator())
    assert pixels.fell.tolist() == [2, 2, 2]
    with torch.no_grad():
        said = made(batch).probability[0, 1, 2, 13, 18].log()
        local, made.local = made.local, None
        alone = made(batch).probability[0, 1, 2, 13, 18].log()
    assert abs(said - alone) > 0.01
    assert local.gain(pixels, made.prior) == pytest.approx((said - alone).item(), abs=1e-5)


def test_a_fit_is_the_same_for_the_same_seed_and_leaves_the_random_numbers_of_others_alone():
    made = network()
    pixels = some_pixels(made, [0])

    def fitted(seed):
        local = Local(BINS, FRAMES, 8)
        torch.manual_seed(7)
        for weight in local.first.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        torch.manual_seed(seed + 50)  # which nothing may hang on
        before = torch.get_rng_state()
        local.fit(pixels, made.prior, 4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([weight.flatten() for weight in local.state_dict().values()])

    first = fitted(0)
    torch.manual_seed(99)
    assert torch.equal(fitted(0), first)
    assert not torch.equal(fitted(1), first)


def test_nothing_in_it_is_random_while_the_network_trains():
    """So that several processes learn what one would, and a training goes on bit for bit."""
    made, batch = network().train(), a_batch()
    spoken(made.local)
    assert torch.equal(made.logits(batch), made.logits(batch))


def test_what_it_scales_by_is_kept_with_its_weights():
    made = network()
    made.local.fit(some_pixels(made, [0]), made.prior, 2)
    again = network()
    again.load_state_dict(made.state_dict())
    assert not torch.equal(made.local.spread, network().local.spread)
    with torch.no_grad():
        assert torch.equal(again(a_batch()).probability, made(a_batch()).probability)


def test_it_scales_by_what_is_told_and_by_the_logits_of_exceeding_some_rates_by_the_prior():
    made = network()
    pixels = some_pixels(made, [0])
    made.local.fit(pixels, made.prior, 2)
    said = made.prior.at(pixels).double().exp()
    above = torch.stack([said[:, first:].sum(dim=1) for first in made.local.classes], dim=1)
    scaled = torch.cat([pixels.told, above.logit().clamp(-LIKELIEST, LIKELIEST).float()], dim=1)
    torch.testing.assert_close(made.local.centre, scaled.mean(dim=0), atol=1e-4, rtol=1e-4)
    spread = scaled.std(dim=0, correction=0).clamp(min=0.02)
    torch.testing.assert_close(made.local.spread, spread, atol=1e-4, rtol=1e-3)


def test_a_single_pixel_spoils_nothing():
    made = network()
    made.local.fit(some_pixels(made, [0]).some(torch.tensor([3])), made.prior, 2)
    assert all(torch.isfinite(weight).all() for weight in made.local.state_dict().values())


def test_without_pixels_it_says_so():
    made = network()
    batch = a_batch()
    none = made.pixels(replace(batch, target=torch.full_like(batch.target, torch.nan)), 3, torch.Generator())
    assert len(none) == 0
    prior = AdvectionPrior(BINS, climatology(BINS))
    with pytest.raises(ValueError, match="no observed pixel"):
        made.local.fit(none, prior, 3)


def one_sided(made, shift=0.0, width=0.0, rate=0, part=0):
    """Gives all probability to one part, around one of the known rates."""
    with torch.no_grad():
        made.last.weight.zero_()
        bias = made.last.bias.zero_()
        bias[2 * PARTS : 3 * PARTS] = -30.0
        bias[part], bias[PARTS + part], bias[2 * PARTS + part] = shift, width, 30.0
        bias[3 * PARTS + part * made.rates + rate] = 50.0
    return made


@pytest.mark.parametrize("edges", [BINS.edges, (0.06, 0.75, 5.0)])
@pytest.mark.parametrize(("shift", "width"), [(0.0, 0.0), (0.5, 0.7), (-1.0, -1.5)])
@pytest.mark.parametrize("part", range(PARTS))
def test_a_part_is_a_logistic_distribution_of_the_logarithm_of_the_rate(part, shift, width, edges):
    """And its classes begin where the sensor tells them."""
    made = one_sided(Local(BINS, FRAMES, 8), shift, width, 3, part)
    told = torch.zeros(1, described(FRAMES), 1, 1)
    told[:, 3] = scaled_rain(torch.tensor(4.0))
    prior = torch.full((1, len(BINS), 1, 1), 1 / len(BINS)).log()
    middle = math.log(4.0 + LEAST_RATE) + FARTHEST_SHIFT * math.tanh(shift / FARTHEST_SHIFT)
    below = logistic.cdf(
        [math.log(edge + LEAST_RATE) for edge in edges], middle, math.exp(USUAL_WIDTH + width)
    )
    expected = np.diff([0.0, *below, 1.0])
    np.testing.assert_allclose(
        made(told, prior, prior.exp(), torch.tensor([edges])).exp().detach().flatten(), expected, atol=1e-5
    )


def test_numbers_far_off_count_as_the_farthest_that_may_be():
    torch.manual_seed(0)
    made = Local(BINS, FRAMES, 8)
    torch.nn.init.normal_(made.last.weight)
    torch.nn.init.zeros_(made.last.bias)
    made.centre.fill_(2.0)
    made.spread.fill_(0.5)
    prior = torch.full((1, len(BINS), 1, 1), 1 / len(BINS)).log()
    told = torch.zeros(3, described(FRAMES), 1, 1)
    told[:, made.rates :] = torch.tensor([1e6, 2.0 + 0.5 * FARTHEST, 5.0])[:, None, None, None]
    told[:, [made.rates + SEEN, LATER]] = 1.0  # which are no numbers to be far off
    far, farthest, near = made(
        told, *(part.expand(3, *part.shape[1:]) for part in (prior, prior.exp(), EDGES))
    )
    torch.testing.assert_close(far, farthest)
    assert (far - near).abs().max() > 1e-3
