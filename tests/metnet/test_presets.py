"""The sizes of `configs/model/`, built on the meta device, where a tensor is its shape."""

import math
from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate

from metnet.batch import Batch
from metnet.head import Categorical, Ordinal
from metnet.metnet1 import MetNet1
from metnet.metnet2 import MetNet2
from metnet.model import MetNet
from metnet.rain import RainBins
from metnet.scaling import GOES

CONFIGS = Path(__file__).parents[2] / "configs"


def preset(name, *choices):
    """What a YAML file builds, without memory for its weights."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        make = instantiate(hydra.compose(f"model/{name}", list(choices))["model"])
    with torch.device("meta"):
        return make()


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def shapes(net, batch, watched):
    """The shape of what each watched part last gave."""
    seen = {}
    for name in watched:
        part = net.get_submodule(name)
        part.register_forward_hook(lambda part, x, out, name=name: seen.__setitem__(name, tuple(out.shape)))
    with torch.no_grad():
        seen["logits"] = tuple(net.logits(batch).shape)
    return seen


def published_batch(side, frames=7, images=7, device="cpu", batch=1, lead_time=(2.0, 480.0)):
    """Samples as MetNet-1 and -2 want them; times are numbers even where nothing else is."""
    random = torch.Generator().manual_seed(0)

    def field(*shape):
        if device == "meta":
            return torch.empty(batch, *shape, side, side, device=device)
        return torch.randn(batch, *shape, side, side, generator=random)

    kelvin = torch.tensor(GOES, device=device)[:, :, None, None]
    return Batch(
        radar=field(frames).exp(),
        age=(torch.arange(frames - 1, -1, -1.0) * 15).repeat(batch, 1).to(device),
        init_time=torch.full((batch,), 1_560_000_000),
        lead_time=torch.tensor(lead_time),
        cell_size=torch.full((batch,), 1000.0, device=device),
        static=field(1) * 600,
        satellite=field(images, 16) * kelvin[:, 1] + kelvin[:, 0],
        satellite_age=(torch.arange(images - 1, -1, -1.0) * 15).repeat(batch, 1)[..., None].to(device),
        place=field(2) + torch.tensor([-95.0, 37.0], device=device).view(2, 1, 1),
    )


def test_metnet1_has_the_published_shape_at_every_stage():
    net, batch = preset("metnet1"), published_batch(1024, device="meta")
    assert net.preprocess(batch).shape == (1, 7, 2 * (4 + 16) + 6, 256, 256)
    assert net.downsampler[0].in_channels == 286 == 46 + 240
    widths = [layer.out_channels for layer in net.downsampler if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [160, 256, 256, 256]
    stages = ["downsampler.0", "downsampler.2", "downsampler", "memory", "widen", "positions"]
    layers = [f"layers.{n}" for n in range(8)]
    assert shapes(net, batch, [*stages, *layers, "head"]) == {
        "downsampler.0": (2 * 7, 160, 256, 256),
        "downsampler.2": (2 * 7, 160, 128, 128),
        "downsampler": (2 * 7, 256, 64, 64),
        "memory": (2, 384, 64, 64),
        "widen": (2, 2048, 64, 64),
        "positions": (2, 2048, 64, 64),
        **dict.fromkeys(layers, (2, 2048, 64, 64)),
        "head": (2, 512, 64, 64),
        "logits": (1, 2, 512, 64, 64),
    }
    assert [layer.attention.axis for layer in net.layers] == [2, 3] * 4
    assert {layer.attention.fn.fn.heads for layer in net.layers} == {16}
    assert net.bins == RainBins.linear() and net.bins.top == 102.4
    assert size(net) == pytest.approx(225e6, rel=0.05)


def small_metnet1():
    torch.manual_seed(0)
    bins = RainBins.linear(1.0, 16)
    return MetNet1(
        64, 4, step=2.0, leads=240, first=8, channels=16, memory=16, width=32, heads=2, depth=4, bins=bins
    )


def test_metnet1_sees_all_frames_all_channels_and_the_whole_kilometres_around_its_middle():
    net, batch = small_metnet1(), published_batch(64, batch=2)
    radar, satellite = batch.radar.clone().requires_grad_(), batch.satellite.clone().requires_grad_()
    logits = net.logits(replace(batch, radar=radar, satellite=satellite))
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4, "each lead time has its own answer"
    logits[0, 0, :, 1, 2].square().sum().backward()
    assert (satellite.grad[0].abs().sum(dim=(2, 3)) > 0).all()
    for field in (radar.grad[0], satellite.grad[0].sum(dim=1)):
        parts = torch.nn.functional.avg_pool2d(field.abs().sum(dim=0)[None], 8)
        assert (parts > 0).all()
    assert not radar.grad[1].any()


def test_metnet1_sees_its_middle_finely_and_the_whole_coarsely():
    net, batch = small_metnet1(), published_batch(64)
    seen = net.preprocess(batch)[0, -1]
    rate = torch.tanh((batch.radar[0, -1] + 0.01).log() / 4)
    for channel, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        folded = rate[down::2, right::2]
        torch.testing.assert_close(seen[channel], folded[8:24, 8:24])
        torch.testing.assert_close(seen[20 + channel], folded.reshape(16, 2, 16, 2).mean(dim=(1, 3)))
    kelvin = (batch.satellite[0, -1, 6] - GOES[6][0]) / GOES[6][1]
    torch.testing.assert_close(seen[4 + 6], kelvin.reshape(32, 2, 32, 2).mean(dim=(1, 3))[8:24, 8:24])
    assert torch.equal(net.middle(batch.radar[:, None, -1])[0, 0], batch.radar[0, -1, 30:34, 30:34])


def test_metnet1_is_finite_whatever_is_missing_and_begins_as_climatology():
    net, batch = small_metnet1(), published_batch(64)
    for name in ("radar", "satellite", "static", "place"):
        batch = replace(batch, **{name: torch.full_like(getattr(batch, name), torch.nan)})
    said = net(batch)
    assert said.probability.isfinite().all()
    assert (said.probability_above(1.0) > 0.05).all()


def test_512_classes_are_told_in_float32_under_autocast_too():
    net, batch = small_metnet1(), published_batch(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        said = net(batch)
    assert said.probability.dtype == torch.float32
    torch.testing.assert_close(said.probability.sum(dim=2), torch.ones(1, 2, 4, 4))


def test_metnet1_says_what_is_missing():
    batch = published_batch(64)
    with pytest.raises(ValueError, match=r"no satellite: .* \(7, 16, 64, 64\)"):
        small_metnet1()(replace(batch, satellite=None))
    with pytest.raises(ValueError, match=r"radar has shape \(7, 48, 48\) a sample: expected \(7, 64, 64\)"):
        small_metnet1()(published_batch(48))
    with pytest.raises(ValueError, match="2 to 480 min"):
        small_metnet1()(replace(batch, lead_time=torch.tensor([481.0])))
    with pytest.raises(ValueError, match="side of 16 targets"):
        MetNet1(side=64, target=8)


def test_metnet2_has_the_published_shape_at_every_stage():
    net, batch = preset("metnet2"), published_batch(2048, 11, 3, "meta", lead_time=(2.0, 720.0))
    assert net.preprocess(batch).shape == (1, 11, (1 + 6) + (16 + 6), 512, 512)
    assert net.embed[0].in_features == 360 + 29
    stages = ["embed", "first", "second", "fine", "head.0"]
    blocks = [f"first.blocks.{n}" for n in range(16)] + [f"second.blocks.{n}" for n in range(8)]
    assert shapes(net, batch, [*stages, *blocks, "fine.blocks.0", "fine.blocks.1"]) == {
        "embed": (2, 2048),
        **dict.fromkeys(["first", *blocks[:16]], (2, 384, 512, 512)),
        **dict.fromkeys(["second", *blocks[16:]], (2, 384, 256, 256)),
        **dict.fromkeys(["fine", "fine.blocks.0", "fine.blocks.1"], (2, 512, 512, 512)),
        "head.0": (2, 4096, 512, 512),
        "logits": (1, 2, 512, 512, 512),
    }
    dilations = [net.get_submodule(name).first.dilation[0] for name in blocks]
    assert dilations == [1, 2, 4, 8, 16, 32, 64, 128] * 3
    assert net.first.blocks[0].project.in_channels == 2 * 128
    torch.testing.assert_close(
        torch.tensor((0.0, *net.bins.edges, net.bins.top)), torch.linspace(0, 102.4, 513), atol=1e-5, rtol=0
    )


def small_metnet2(**arguments):
    torch.manual_seed(0)
    small = {"told": 16, "memory": 8, "width": 8, "blocks": (3, 2), "fine_width": 8, "dense": 16}
    return MetNet2(64, 16, bins=RainBins.linear(1.0, 16), **{**small, **arguments})


def test_metnet2_is_told_a_rate_as_one_step_and_an_hours_sum_as_its_thirty():
    net = small_metnet2()
    rate = net.covered(torch.tensor([2.0, 60.0, 720.0]))
    assert [row.nonzero().flatten().tolist() for row in rate] == [[29], [58], [388]]
    whole = net.covered(torch.tensor([2.0, 60.0, 720.0]), summed=True)
    first_last = [row.nonzero().flatten()[[0, -1]].tolist() for row in whole]
    assert first_last == [[0, 29], [29, 58], [359, 388]]
    assert whole.sum(dim=1).tolist() == [30, 30, 30]
    for lead in (0.0, 3.0, 722.0):
        with pytest.raises(ValueError, match="multiple of 2 up to 720 min"):
            net.covered(torch.tensor([lead]))


def test_metnet2_scales_rain_as_its_published_table():
    rate = torch.tensor([torch.nan, -50.0, 0.0, 0.2, 1.0, 2.0, 10.0, 0.0])
    radar = rate.repeat_interleave(8).repeat(64, 1).expand(1, 11, 64, 64).clone()
    net, batch = small_metnet2(), published_batch(64, 11, 3)
    value = net.preprocess(replace(batch, radar=radar))[0, 0, 0, 0, ::2]
    expected = torch.tensor([-1, -1, 0, 0.046, 0.172, 0.268, 0.537, 0])
    torch.testing.assert_close(value, expected, atol=1e-3, rtol=0)
    radar[..., 1::2] = torch.nan  # half of the cells
    holed = net.preprocess(replace(batch, radar=radar))[0, 0, 0, 0, ::2]
    torch.testing.assert_close(holed, expected, atol=1e-3, rtol=0)


def test_metnet2_pads_the_shorter_series_in_front():
    seen = small_metnet2().preprocess(published_batch(64, 11, 3))
    assert not seen[:, :8, 7:].any()
    assert seen[:, 8:, 7:].any(dim=(3, 4)).all()


def test_metnet2_sees_all_frames_and_far_around_its_middle_and_is_finite_without_any():
    net, batch = small_metnet2(), published_batch(64, 11, 3, batch=2)
    for part in net.modules():  # shifts and scales begin so small that float32 would lose what is far
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.5)
    radar = batch.radar.clone().requires_grad_()
    logits = net.logits(replace(batch, radar=radar))
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-4
    assert (net.logits(batch, summed=True) - logits).abs().max() > 1e-4
    assert logits.shape == (2, 2, 16, 16, 16)
    logits[0, 0, :, 5, 9].square().sum().backward()
    assert (radar.grad[0].abs().sum(dim=(1, 2)) > 0).all()
    assert (torch.nn.functional.avg_pool2d(radar.grad[0].abs().sum(dim=0)[None], 16) > 0).all()
    assert not radar.grad[1].any()
    for name in ("radar", "satellite", "static", "place"):
        batch = replace(batch, **{name: torch.full_like(getattr(batch, name), torch.nan)})
    assert net(batch).probability.isfinite().all()


def test_metnet2_says_what_is_missing():
    batch = published_batch(64, 11, 3)
    with pytest.raises(ValueError, match=r"no satellite: .* \(3, 16, 64, 64\)"):
        small_metnet2()(replace(batch, satellite=None))
    with pytest.raises(ValueError, match="no larger than half the side"):
        MetNet2(side=64, target=48)


def radar_batch(frames, rows, columns, device="meta"):
    return Batch(
        radar=torch.empty(1, frames, rows, columns, device=device),
        age=torch.empty(1, frames, device=device),
        init_time=torch.zeros(1, dtype=torch.int64, device=device),
        lead_time=torch.tensor([5.0, 60.0], device=device),
        cell_size=torch.empty(1, device=device),
    )


@pytest.mark.parametrize(
    ("name", "least", "most"), [("small", 0.1e6, 0.2e6), ("base", 10e6, 30e6), ("large", 80e6, 100e6)]
)
def test_a_preset_has_the_size_it_names(name, least, most):
    net = preset(name)
    assert isinstance(net, MetNet)
    assert least < size(net) < most
    millions = (CONFIGS / "model" / f"{name}.yaml").read_text().split()[1]
    assert math.isclose(float(millions), size(net) / 1e6, rel_tol=0.07)


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_head_and_lead_time_are_choices_of_their_own(name):
    net = preset(name, "head@model.head=ordinal", "lead_time@model.lead_time=input")
    assert net.link == Ordinal()
    assert net.downsampler.first.in_channels == 3 + 12
    assert preset(name, "head@model.head=categorical").link == Categorical()


def test_sources_are_named_in_a_configuration_by_centre_and_spread():
    sources = ["satellite=[[250,25],[0.3,0.2]]", "static=[[300,500]]", "position=true", "surroundings=8"]
    net = preset("small", *(f"+model.{source}" for source in sources))
    assert net.downsampler.first.in_channels == 3 + (2 * 2 + 1) + 2 + 8
    assert net.surroundings.factor == 8


def test_another_radar_and_a_satellite_are_named_in_a_configuration_each_with_its_images():
    net = preset("small", "+model.satellite=[rain,[250,25]]", "+model.satellite_frames=[3,2]")
    assert net.downsampler.first.in_channels == 3 + 2 * 3
    assert net.scaling.images == (3, 2) and net.scaling.satellite.rain == (True, False)


@pytest.mark.parametrize(("name", "rows", "columns"), [("base", 256, 256), ("large", 700, 1100)])
def test_a_preset_takes_grids_of_its_kind(name, rows, columns):
    net = preset(name)
    net.prior = net.stream = None  # carrying rain along needs numbers
    width = 256, -(-rows // 4), -(-columns // 4)
    seen = shapes(net, radar_batch(12, rows, columns), ["memory", "blocks.0"])
    assert seen == {
        "memory": (1, *width),
        "blocks.0": (2, *width),
        "logits": (1, 2, len(net.bins), rows, columns),
    }
