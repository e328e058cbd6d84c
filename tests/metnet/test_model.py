import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.loss import cross_entropy
from metnet.model import Head, MetNet, climatology
from metnet.rain import RainBins

small_attention = partial(AxialAttention, heads=2, dim_index=1)


def tiny():
    """A net small enough for a test, whose lead times already matter (FiLM would start as the identity)."""
    torch.manual_seed(0)
    net = MetNet(
        frames=3,
        channels=16,
        fine_channels=8,
        depth=2,
        attention=small_attention,
        advection=False,
        grid=(8, 8),
    )
    for name, weight in net.named_parameters():
        if "tell" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return net.eval()


def storms(batch=2, frames=3, rows=32, columns=32, lead_time=(5.0, 10.0, 60.0), seed=0):
    """Rain on a third of the pixels, of any strength."""
    random = torch.Generator().manual_seed(seed)

    def field(count):
        rain = torch.randn(batch, count, rows, columns, generator=random).exp() * 2
        return rain * (torch.rand(rain.shape, generator=random) < 0.3)

    return Batch(
        radar=field(frames),
        age=torch.arange(frames - 1, -1, -1.0).mul(5).repeat(batch, 1),
        init_time=torch.zeros(batch, dtype=torch.int64),
        lead_time=torch.tensor(lead_time),
        cell_size=torch.full((batch,), 1000.0),
        target=field(len(lead_time)),
    )


def test_the_probabilities_are_a_distribution():
    probability = tiny()(storms()).probability
    assert probability.shape == (2, 3, 20, 32, 32)
    assert (probability > 0).all()
    torch.testing.assert_close(probability.sum(dim=2), torch.ones(2, 3, 32, 32))


def test_forward_is_the_softmax_of_the_logits_whatever_the_lead_times_are_cut_into(monkeypatch):
    net, batch = tiny(), storms()
    whole = net.logits(batch).softmax(dim=2)
    monkeypatch.setattr("metnet.model.PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(net(batch).probability, whole)


def test_the_output_depends_on_every_frame():
    net, batch = tiny(), storms()
    radar = batch.radar.clone().requires_grad_()
    net.logits(replace(batch, radar=radar)).square().sum().backward()
    assert (radar.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


def test_the_memory_alone_sees_every_frame():
    net, batch = tiny(), storms()
    radar = batch.radar.clone().requires_grad_()
    net.encode(replace(batch, radar=radar)).coarse.square().sum().backward()
    assert (radar.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


def test_each_lead_time_has_its_own_answer_and_does_not_know_of_the_others():
    net, batch = tiny(), storms()
    together = net.logits(batch)
    assert (together[:, 0] - together[:, 2]).abs().max() > 1e-3
    alone = net.logits(replace(batch, lead_time=torch.tensor([60.0]), target=None))
    torch.testing.assert_close(together[:, 2:], alone)


def test_training_tells_the_net_the_lead_time_from_the_first_step():
    torch.manual_seed(0)
    net = MetNet(
        frames=3,
        channels=16,
        fine_channels=8,
        depth=1,
        attention=small_attention,
        advection=False,
        grid=(8, 8),
    )
    batch = storms()
    cross_entropy(net.logits(batch), batch.target, net.bins).backward()
    told = {name: weight.grad.abs().sum() for name, weight in net.named_parameters() if "tell" in name}
    assert len(told) == 6
    assert all(gradient > 0 for gradient in told.values())


def test_a_storm_in_one_corner_is_seen_from_the_opposite_one():
    net, batch = tiny(), storms(rows=64, columns=64)
    radar = batch.radar.clone()
    radar[:, :, :4, :4] = 80.0
    change = (net.logits(replace(batch, radar=radar)) - net.logits(batch)).abs()
    assert change[..., -4:, -4:].max() > 1e-6


def test_samples_do_not_see_each_other():
    net, batch = tiny(), storms(batch=3)
    order = torch.tensor([2, 0, 1])
    moved = replace(batch, radar=batch.radar[order], age=batch.age[order], target=None)
    torch.testing.assert_close(net.logits(moved), net.logits(batch)[order])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (32, 30), (41, 64)])
def test_any_grid_gets_an_answer_of_its_own_size(rows, columns):
    probability = tiny()(storms(rows=rows, columns=columns)).probability
    assert probability.shape[-2:] == (rows, columns)
    assert probability.isfinite().all()


def test_filling_up_to_a_multiple_of_four_is_the_same_as_not_observing():
    net, batch = tiny(), storms(rows=30, columns=29)
    wider = torch.full((2, 3, 32, 32), torch.nan)
    wider[:, :, :30, :29] = batch.radar
    filled = net.logits(replace(batch, radar=wider, target=None))
    torch.testing.assert_close(net.logits(batch), filled[..., :30, :29])


def test_nothing_observed_gives_the_climatology_wide_and_finite():
    net, batch = tiny(), storms()
    forecast = net(replace(batch, radar=torch.full_like(batch.radar, torch.nan)))
    assert forecast.probability.isfinite().all()
    expected = torch.tensor(climatology(net.bins)).reshape(1, 1, -1, 1, 1)
    assert (forecast.probability - expected).abs().max() < 0.1
    assert (forecast.probability_above(0.1) > 0.05).all()
    assert (forecast.quantile(0.99) > 1).all()


def test_not_observed_is_not_dry():
    net, batch = tiny(), storms()
    gone = batch.radar.clone()
    gone[:, :, :, 16:] = torch.nan
    dry = gone.nan_to_num(nan=0.0)
    change = net.logits(replace(batch, radar=gone)) - net.logits(replace(batch, radar=dry))
    assert change.abs().max() > 1e-4


def test_no_gradient_is_nan_where_rain_is_missing():
    net, batch = tiny(), storms()
    radar = batch.radar.masked_fill(torch.rand(batch.radar.shape) < 0.5, torch.nan)
    cross_entropy(net.logits(replace(batch, radar=radar)), batch.target, net.bins).backward()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())
    assert [name for name, weight in net.named_parameters() if not weight.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("place", [(3, 5), (9, 2)])
def test_what_the_coarse_map_says_stands_over_its_own_pixels(place):
    torch.manual_seed(0)
    usual = climatology(RainBins.preferred())
    head = Head(channels=6, fine_channels=8, features=4, count=len(usual), usual=usual)
    fine, told = torch.zeros(1, 8, 48, 48), torch.zeros(1, 4)
    coarse = torch.zeros(1, 6, 12, 12)
    dry = head(coarse, fine, told)
    coarse[0, :, place[0], place[1]] = 5.0
    change = (head(coarse, fine, told) - dry).square().sum(dim=1)[0]
    centre = [(change.sum(dim=1 - d) * torch.arange(48.0)).sum() / change.sum() for d in (0, 1)]
    torch.testing.assert_close(torch.stack(centre), torch.tensor(place) * 4 + 1.5, atol=1.0, rtol=0)


def test_the_net_says_how_many_frames_it_wants():
    net = tiny()
    assert net.frames == 3
    with pytest.raises(ValueError, match="has 4 frames: expected frames=3"):
        net(storms(frames=4))


def test_the_climatology_is_a_distribution_that_falls():
    for bins in (RainBins.preferred(), RainBins.linear()):
        shares = torch.tensor(climatology(bins), dtype=torch.float64)
        assert shares.sum().item() == pytest.approx(1)
        assert (shares > 0).all()
        assert shares[0] > 0.5
    edges = torch.tensor((*RainBins.linear().edges, RainBins.linear().top))
    assert (shares[1:].diff() <= 0).all(), edges


def test_it_learns_four_samples_by_heart():
    torch.manual_seed(0)
    net = MetNet(
        frames=3,
        channels=32,
        fine_channels=16,
        depth=1,
        attention=small_attention,
        advection=False,
        grid=(4, 4),
    )
    small = storms(batch=4, rows=4, columns=4, lead_time=(5.0, 30.0))
    radar, target = (
        field.repeat_interleave(4, 2).repeat_interleave(4, 3) for field in (small.radar, small.target)
    )
    batch = replace(small, radar=radar, target=target)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first = cross_entropy(net.logits(batch), batch.target, net.bins).item()
    for _ in range(120):
        loss = cross_entropy(net.logits(batch), batch.target, net.bins)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_with_stochastic_depth_a_training_sample_hears_twice_the_network_or_only_the_prior():
    torch.manual_seed(0)
    net = MetNet(frames=3, channels=16, fine_channels=8, depth=1, attention=small_attention, grid=(8, 8))
    net.stochastic_depth = 0.5
    batch = storms(batch=12)
    batch = replace(batch, motion=torch.zeros(12, 2, 32, 32))
    unheard = net.eval().logits(batch).log_softmax(dim=2)  # its last layer starts at zero
    torch.nn.init.normal_(net.head.classify.weight, std=0.1)
    whole = net.eval().logits(batch)
    with torch.no_grad():
        net.head.classify.weight.mul_(2)
        net.head.get_parameter("classify.bias").mul_(2)
        doubled = net.eval().logits(batch).log_softmax(dim=2)
        net.head.classify.weight.div_(2)
        net.head.get_parameter("classify.bias").div_(2)
        said = net.train().logits(batch).log_softmax(dim=2)
    assert not torch.allclose(unheard, doubled, atol=0.01)
    near = [
        [torch.allclose(one, other, atol=1e-4) for one, other in zip(said, of, strict=True)]
        for of in (unheard, doubled)
    ]
    assert all(left != right for left, right in zip(*near, strict=True)), "each sample is one or the other"
    assert any(near[0]) and any(near[1])
    assert torch.equal(net.eval().logits(batch), whole), "a forecast is never random"


def test_a_motion_in_doubt_makes_the_far_future_unsurer_and_one_that_nobody_doubts_needs_no_third_component():
    torch.manual_seed(0)
    net = MetNet(
        frames=3, channels=16, fine_channels=8, depth=1, attention=small_attention, grid=(8, 8)
    ).eval()
    assert net.local is not None
    net.local.pool.copy_(torch.tensor([0.0, 1.0]))  # as a fit leaves it
    batch = storms()
    lumps = F.avg_pool2d(batch.radar[:, :1], 9, stride=1, padding=4).sub(1.0).clamp(min=0) * 5
    batch = replace(batch, radar=lumps.repeat(1, 3, 1, 1))  # which last
    motion = torch.full((2, 2, 32, 32), 0.01)
    doubts = [motion, *(F.pad(motion, (0, 0, 0, 0, 0, 1), value=doubt) for doubt in (0.0, 0.05, 0.3))]
    with torch.no_grad():
        told = [net(replace(batch, motion=doubt)).probability for doubt in doubts]
    assert torch.equal(told[0], told[1])
    entropy = [-(p * p.log()).sum(dim=2).mean(dim=(0, 2, 3)) for p in told[1:]]
    assert (entropy[1] > entropy[0] + 1e-4).all() and (entropy[2] > entropy[1] + 1e-3).all()
    assert entropy[2][2] - entropy[0][2] > entropy[2][0] - entropy[0][0], "the farther ahead, the more"


def slopes(net, batch):
    """The gradients of a loss by the weights that are heard."""
    net.zero_grad()
    net.logits(batch).log_softmax(dim=2).square().mean().backward()
    return [weight.grad for weight in net.parameters() if weight.grad is not None]


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
def test_compiled_it_learns_the_same_and_other_lead_times_compile_nothing_anew():
    net = MetNet(frames=3, channels=16, fine_channels=8, depth=1, attention=small_attention, grid=(8, 8))
    torch.nn.init.normal_(net.head.classify.weight)
    batch = replace(storms(), motion=torch.full((2, 2, 32, 32), 0.3))
    expected = slopes(net, batch)
    net.compile(backend="aot_eager")
    for slope, other in zip(slopes(net, batch), expected, strict=True):
        torch.testing.assert_close(slope, other)
    with torch.compiler.set_stance("fail_on_recompile"):
        net.logits(replace(storms(seed=1), lead_time=torch.tensor([10.0, 15.0, 30.0]), motion=batch.motion))


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_stochastic_depth_that_is_no_probability_is_refused(share):
    with pytest.raises(ValueError, match=r"stochastic_depth=.*expected a probability below 1"):
        MetNet(stochastic_depth=share)


@pytest.mark.parametrize(
    "sizes", [{"fine_channels": 0}, {"lead_features": 0}, {"grid": (4,)}, {"grid": (4, 4, 4)}]
)
def test_a_network_without_a_width_or_on_a_grid_that_is_none_is_refused_by_its_argument(sizes):
    [(name, size)] = sizes.items()
    said = re.escape(f"{name}={list(size) if name == 'grid' else size}")
    with pytest.raises(ValueError, match=rf"{said}.*: expected at least 1 of each, and the rows and the col"):
        MetNet(channels=8, **sizes)


@pytest.mark.parametrize("minutes", [[], [0.0], [-5.0, 5.0], [float("nan")]])
def test_lead_times_of_which_there_is_no_forecast_are_refused_and_not_answered_by_nan(minutes):
    asked = {"lead_time": torch.tensor(minutes), "target": None}
    batch = replace(storms(), motion=torch.zeros(2, 2, 32, 32), **asked)
    net = MetNet(frames=3, channels=8, fine_channels=4, depth=0, attention=small_attention, grid=(8, 8))
    for answer in (net, net.logits):
        with pytest.raises(ValueError, match=r"^lead_time=.*: expected one or more, in minutes above 0"):
            answer(batch)


def test_without_a_prior_that_could_answer_in_its_place_the_network_is_always_heard():
    with pytest.raises(ValueError, match=r"stochastic_depth=0.5: expected 0 with advection=false"):
        MetNet(advection=False, stochastic_depth=0.5)
