"""What a network is told: every source as value, mask and age, on its own and in a MetNet."""

import copy
from dataclasses import fields, replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.attention.axial import AxialAttention
from metnet.batch import Batch
from metnet.head import Ordinal
from metnet.inputs import Inputs
from metnet.lead_time import LeadTimePlanes
from metnet.model import MetNet

KELVIN, REFLECTANCE, METRES = (250.0, 25.0), (0.3, 0.2), (300.0, 500.0)
SEES = {
    "satellite": (KELVIN, REFLECTANCE),
    "satellite_frames": 4,
    "static": (METRES,),
    "position": True,
}


def everything(batch=2, frames=3, images=4, rows=24, columns=20, seed=0):
    """Samples with all sources, wide surroundings (twice the grid) included."""
    random = torch.Generator().manual_seed(seed)

    def field(*shape, centre=0.0, spread=1.0):
        return centre + spread * torch.randn(batch, *shape, generator=random)

    lon = torch.linspace(4, 6, columns).expand(batch, rows, columns)
    lat = torch.linspace(53, 51, rows)[:, None].expand(batch, rows, columns)
    return Batch(
        radar=field(frames, rows, columns).exp() * (field(frames, rows, columns) > 0.5),
        age=torch.arange(frames - 1, -1, -1.0).mul(5).repeat(batch, 1),
        init_time=torch.tensor([1_560_000_000 + 40_000 * n for n in range(batch)]),
        lead_time=torch.tensor([5.0, 60.0]),
        cell_size=torch.full((batch,), 1000.0),
        motion=torch.full((batch, 2, rows, columns), 0.27),
        static=field(1, rows, columns, centre=300.0, spread=500.0),
        satellite=torch.stack(
            [field(images, rows, columns, centre=250.0, spread=25.0), field(images, rows, columns).sigmoid()],
            dim=2,
        ),
        satellite_age=torch.arange(images - 1, -1, -1.0).mul(15).add(7).repeat(batch, 1)[..., None],
        place=torch.stack([lon, lat], dim=1),
        surroundings=field(frames, rows // 2, columns // 2).exp(),
    )


def tiny(**arguments):
    """A small MetNet that sees everything, no weight of which is 0."""
    torch.manual_seed(0)
    attention = partial(AxialAttention, heads=2, dim_index=1)
    small = {"frames": 3, "channels": 8, "fine_channels": 4, "depth": 1, "lead_features": 8, "grid": (8, 8)}
    net = MetNet(**{**small, "attention": attention, "surroundings": 4, **SEES, **arguments})
    for name, weight in net.named_parameters():
        if "tell" in name or "classify" in name or "local.last" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return net.eval()


def test_the_shorter_series_begins_with_frames_that_are_not_observed():
    frames, stacked = Inputs(3, **SEES)(everything())
    assert frames.shape == (2, 4, 3 + 5 + 2 + 8, 24, 20)
    assert stacked.shape[1] == 3 * 3 + 4 * 5 + 2 + 8
    assert not frames[:, 0, :3].any(), "the radar has 3 frames, the satellite 4"
    assert frames[:, 1:, 1].all(), "the mask of the radar"
    torch.testing.assert_close(frames[0, :, 7, 0, 0] * 60, torch.tensor([52.0, 37.0, 22.0, 7.0]))


def test_each_channel_is_scaled_by_its_own_unit():
    batch = everything()
    frames, _ = Inputs(3, **SEES)(batch)
    torch.testing.assert_close(frames[:, -1, 3], (batch.satellite[:, -1, 0] - 250) / 25)
    torch.testing.assert_close(frames[:, -1, 4], (batch.satellite[:, -1, 1] - 0.3) / 0.2)
    torch.testing.assert_close(frames[:, 0, 8], (batch.static[:, 0] - 300) / 500)
    assert Inputs(3, **SEES).card()["satellite"][1] == pytest.approx({"centre": 0.3, "spread": 0.2})


def test_a_band_that_is_missing_has_a_mask_of_its_own():
    batch = everything()
    satellite = batch.satellite.clone()
    satellite[:, :, 1] = torch.nan  # the visible one
    frames, _ = Inputs(3, **SEES)(replace(batch, satellite=satellite))
    assert frames[:, :, 5].all()
    assert not frames[:, :, 6].any() and not frames[:, :, 4].any()


SEVERAL = {"satellite": ("rain", KELVIN, REFLECTANCE), "satellite_frames": (3, 2, 4)}
CADENCES, BEHIND = (10.0, 15.0, 5.0), (0.0, 5.0, 2.0)  # minutes, of these


def several():
    """Samples with another radar and two satellites, each with its own images and ages."""
    batch = everything(images=4)
    satellite = torch.cat([batch.radar[:, [0, 0, 1, 2], None], batch.satellite], dim=2)
    for band, images in enumerate(SEVERAL["satellite_frames"]):
        satellite[:, : 4 - images, band] = torch.nan
    age = torch.arange(3, -1, -1.0)[:, None] * torch.tensor(CADENCES) + torch.tensor(BEHIND)
    return replace(batch, satellite=satellite, satellite_age=age.repeat(2, 1, 1))


def test_each_source_has_values_a_mask_and_an_age_of_its_own():
    batch = several()
    frames, stacked = Inputs(3, **SEVERAL)(batch)
    assert frames.shape == (2, 4, 3 + 3 * 3, 24, 20)
    assert stacked.shape[1] == 3 * 3 + 4 * 9
    rain = torch.tanh(torch.log1p(batch.satellite[:, 1:, 0]) / 4)
    torch.testing.assert_close(frames[:, 1:, 3], rain)
    torch.testing.assert_close(frames[:, 2:, 4], (batch.satellite[:, 2:, 1] - 250) / 25)
    masks = frames[:, :, 6:9]
    assert (masks == masks[:1, :, :, :1, :1]).all()
    assert masks[0, :, :, 0, 0].T.tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    torch.testing.assert_close(frames[:, :, 9:, 5, 7] * 60, batch.satellite_age)


@pytest.mark.parametrize("source", range(3))
def test_a_hole_in_one_source_changes_its_value_and_its_mask_alone(source):
    batch, inputs = several(), Inputs(3, **SEVERAL)
    holed = batch.satellite.clone()
    holed[:, 2, source, 4:9, 3:8] = torch.nan
    (before, _), (after, _) = inputs(batch), inputs(replace(batch, satellite=holed))
    changed = before != after
    assert set(changed.any(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()) == {3 + source, 6 + source}
    assert not changed[:, [0, 1, 3]].any()
    assert changed[:, 2, 6 + source].sum() == 2 * 5 * 5 and changed[:, 2, 6 + source, 4:9, 3:8].all()


def test_the_output_depends_on_every_image_of_every_source_and_on_its_age():
    batch, net = several(), tiny(advection=False, **SEVERAL)
    told = {name: getattr(batch, name).clone().requires_grad_() for name in ("satellite", "satellite_age")}
    net.logits(replace(batch, **told)).square().sum().backward()
    there = (~batch.satellite.isnan()).any(dim=(0, 3, 4))
    assert there.sum() == sum(SEVERAL["satellite_frames"])
    assert torch.equal(told["satellite"].grad.abs().sum(dim=(0, 3, 4)) > 0, there)
    assert (told["satellite_age"].grad.abs().sum(dim=0) > 0).all()


@pytest.mark.parametrize("gone", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}, {0, 1, 2}])
def test_whichever_sources_are_missing_the_output_is_finite_and_so_is_its_gradient(gone):
    batch = several()
    batch.satellite[:, :, sorted(gone)] = torch.nan
    net = tiny(advection=False, **SEVERAL)
    logits = net.logits(batch)
    gradients = torch.autograd.grad(logits.square().mean(), list(net.parameters()), allow_unused=True)
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("frames", [0, (3, 2), (3, 2, 1, 1), (3, 0, 1), ()])
def test_images_that_are_not_told_of_each_source_are_refused(frames):
    with pytest.raises(ValueError, match=r"satellite_frames=.* at least 1 for all 3 .* a number for each"):
        Inputs(3, SEVERAL["satellite"], frames)


def test_ages_of_another_number_of_sources_are_refused():
    batch = several()
    with pytest.raises(ValueError, match=r"satellite_age has shape \(4, 1\) a sample: expected \(4, 3\)"):
        Inputs(3, **SEVERAL)(replace(batch, satellite_age=batch.satellite_age[..., :1]))


def test_a_place_is_a_point_on_the_unit_sphere_and_none_is_its_middle():
    batch = everything()
    place = batch.place.clone()
    place[:, :, :, 0] = torch.nan
    frames, _ = Inputs(3, position=True)(replace(batch, place=place))
    distance = frames[:, 0, 3:6].norm(dim=1)
    torch.testing.assert_close(distance[..., 1:], torch.ones(2, 24, 19))
    assert not distance[..., 0].any()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"satellite": None}, r"no satellite: .* \(4, 2, 24, 20\)"),
        ({"satellite_age": None}, r"no satellite_age"),
        ({"static": None}, r"no static: .* \(1, 24, 20\)"),
        ({"place": None}, r"no place"),
        ({"surroundings": None}, r"no surroundings: .* 4 x 4 cells"),
        ({"motion": None}, r"no motion"),
    ],
)
def test_a_batch_without_a_source_is_refused_by_name(missing, message):
    with pytest.raises(ValueError, match=message):
        tiny()(replace(everything(), **missing))


def test_a_source_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(
        ValueError, match=r"satellite has shape \(3, 2, 24, 20\) .* expected \(4, 2, 24, 20\)"
    ):
        tiny()(everything(images=3))
    with pytest.raises(ValueError, match=r"surroundings are 12 x 12 cells .* at least the 24 x 20"):
        tiny()(replace(everything(), surroundings=torch.zeros(2, 3, 3, 3)))
    with pytest.raises(ValueError, match="its spread above 0"):
        tiny(static=((1.0, 0.0),))


def test_a_network_that_asks_for_nothing_more_does_not_look_at_it():
    net = tiny(satellite=(), static=(), position=False, surroundings=1)
    full = everything()
    bare = replace(full, static=None, satellite=None, satellite_age=None, place=None, surroundings=None)
    assert torch.equal(net.logits(full), net.logits(bare))


@pytest.mark.parametrize("source", ["radar", "satellite", "static", "place", "surroundings"])
def test_the_output_depends_on_every_frame_and_channel_of_every_source(source):
    net, batch = tiny(advection=False), everything()
    field = getattr(batch, source).clone().requires_grad_()
    net.logits(replace(batch, **{source: field})).square().sum().backward()
    each = field.grad.abs().sum(dim=(0, -2, -1))
    assert (each > 0).all()


def test_the_output_depends_on_ages_time_and_lead_time():
    net, batch = tiny(advection=False), everything()
    usual = net.logits(batch)
    for change in (
        {"age": batch.age + 30},
        {"satellite_age": batch.satellite_age + 30},
        {"init_time": batch.init_time + 6 * 3600},
        {"init_time": batch.init_time + 182 * 86400},
    ):
        assert (net.logits(replace(batch, **change)) - usual).abs().max() > 1e-3
    assert (usual[:, 0] - usual[:, 1]).abs().max() > 1e-3


def test_one_pixel_of_the_output_depends_on_the_whole_context():
    """Pixels of every part of the grid, and surroundings far beyond it."""
    net, batch = tiny(advection=False, depth=2), everything(rows=64, columns=64)
    fields = {name: getattr(batch, name).clone().requires_grad_() for name in ("radar", "surroundings")}
    net.logits(replace(batch, **fields))[0, :, :, 3, 5].square().sum().backward()
    for field in fields.values():
        parts = torch.nn.functional.avg_pool2d(field.grad[0].abs().sum(dim=0)[None], 8)
        assert (parts > 0).all()
    assert not fields["radar"].grad[1].any(), "the other sample does not count"


@cache
def nets():
    return tiny(), tiny(advection=False), tiny(head=Ordinal(), lead_time=LeadTimePlanes(5.0, 12))


SOURCES = ("radar", "satellite", "static", "place", "surroundings")


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000), share=st.sampled_from([0.1, 0.5, 0.95]), whole=st.booleans(), data=st.data()
)
def test_no_nan_leaves_the_network_whatever_is_missing(seed, share, whole, data):
    """Single pixels of any source, and whole frames or all of it."""
    random = torch.Generator().manual_seed(seed)
    batch = everything(seed=seed)
    gone = data.draw(st.sets(st.sampled_from(SOURCES)))
    holed = {}
    for name in SOURCES:
        field = getattr(batch, name)
        shape = (*field.shape[:-2], 1, 1) if whole else field.shape
        missing = torch.rand(shape, generator=random) < (1.0 if name in gone else share)
        holed[name] = field.masked_fill(missing, torch.nan)
    batch = replace(batch, **holed)
    for net in nets():
        weights = list(net.parameters())
        logits = net.logits(batch)
        assert logits.isfinite().all()
        assert all(
            gradient.isfinite().all()
            for gradient in torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
            if gradient is not None
        )


def test_values_that_cannot_be_right_stay_finite():
    batch = everything()
    wild = replace(batch, satellite=batch.satellite * 1e30, static=torch.full_like(batch.static, torch.inf))
    for net in nets():
        assert net.logits(wild).isfinite().all()


def test_in_bfloat16_it_says_nearly_the_same_and_learns_finitely():
    batch = everything()
    for net in nets():
        with torch.no_grad():
            exact = net(batch).probability
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net.logits(batch)
        assert logits.dtype == torch.float32
        assert (logits.softmax(dim=2) - exact).abs().max() < 0.02
        gradients = torch.autograd.grad(logits.square().mean(), list(net.parameters()), allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("position", [False, True])
def test_in_double_precision_it_says_the_same(position):
    batch, net = everything(), tiny(position=position)
    with torch.no_grad():
        single = net(batch).probability
        precise = replace(
            batch,
            **{
                field.name: getattr(batch, field.name).double()
                for field in fields(batch)
                if field.name not in ("init_time", "target")
            },
        )
        double = copy.deepcopy(net).double()(precise).probability
    torch.testing.assert_close(double, single.double(), rtol=1e-3, atol=1e-4)
