"""Every attention that a configuration names does its work in a MetNet."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate

from metnet.attention.image_transformer import AxialImageTransformer
from metnet.attention.residual import BothAxes, ResidualBlock, ToldTrunk
from metnet.batch import Batch
from metnet.loss import cross_entropy
from metnet.model import MetNet
from tests.metnet.attention.check import check_block

CONFIGS = Path(__file__).parents[3] / "configs"
ATTENTIONS = ("axial", "axial_sequential", "criss_cross", "position_sensitive", "external", "row_col")
WHOLE_MAP = {"axial_sequential", "criss_cross", "position_sensitive", "external", "row_col"}
SMALL = {"frames": 2, "channels": 16, "fine_channels": 8, "grid": (4, 4), "advection": False}


@cache
def chosen(group, name):
    """What a YAML file builds."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(hydra.compose(f"{group}/{name}")[group])


def choices():
    """Arguments of a MetNet for every attention and for the trunk."""
    made = [
        pytest.param({"attention": chosen("attention", name), "depth": 1}, id=name) for name in ATTENTIONS
    ]
    trunk = partial(chosen("trunk", "axial_image_transformer"), depth=1)
    return [*made, pytest.param({"trunk": trunk}, id="trunk")]


def rain(rows=16, columns=16):
    """Four maps of blocks of rain, and another two of what comes of them."""
    random = torch.Generator().manual_seed(0)

    def field():
        blocks = torch.randn(4, 2, rows // 4, columns // 4, generator=random).exp() * 2
        blocks *= torch.rand(blocks.shape, generator=random) < 0.5
        return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)

    return Batch(
        radar=field(),
        age=torch.tensor([[5.0, 0.0]]).repeat(4, 1),
        init_time=torch.zeros(4, dtype=torch.int64),
        lead_time=torch.tensor([5.0, 30.0]),
        cell_size=torch.full((4,), 1000.0),
        target=field(),
    )


def spread(x):
    """How much of a map's size is what tells one pixel from the next."""
    return float(x.std(dim=(2, 3)).mean() / x.square().mean().sqrt())


def test_the_choices_are_the_files_there_are():
    assert {path.stem for path in (CONFIGS / "attention").glob("*.yaml")} == set(ATTENTIONS)
    assert {path.stem for path in (CONFIGS / "trunk").glob("*.yaml")} == {"axial_image_transformer"}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("smooth", [False, True])
def test_sixteen_blocks_keep_what_tells_one_pixel_from_the_next(name, smooth):
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16, 16)
    if smooth:  # over a level of its own in each channel, as after a ConvLSTM
        x = torch.nn.functional.interpolate(x[..., :4, :4], (16, 16), mode="bilinear") + torch.randn(64, 1, 1)
    before = spread(x)
    with torch.no_grad():
        for _ in range(16):
            x = ResidualBlock(chosen("attention", name)(64), 64, 8)(x, torch.randn(2, 8))
    assert 0.3 < spread(x) / before < 3


def test_sixteen_layers_of_the_trunk_do_too():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 16, 16)
    trunk = ToldTrunk(chosen("trunk", "axial_image_transformer")(32, depth=16), 32, 8)
    with torch.no_grad():
        assert 0.3 < spread(trunk(x, torch.randn(2, 8))) / spread(x) < 3


def test_bare_attention_without_the_block_does_not():
    """What the block is for: the published stack of bare attentions leaves nothing after eight."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16, 16)
    before = spread(x)
    with torch.no_grad():
        for _ in range(8):
            x = chosen("attention", "axial")(64)(x)
    assert spread(x) / before < 0.01


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_block_sees_its_cross_or_the_whole_map(name):
    torch.manual_seed(0)
    attention = chosen("attention", name)(16).double()
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(1, 16, 7, 6, dtype=torch.float64, requires_grad=True)
    attention(x)[0, :, 2, 3].square().sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1)) > 0
    expected = torch.ones(7, 6, dtype=torch.bool)
    if name not in WHOLE_MAP:
        expected[:] = False
        expected[2] = expected[:, 3] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("choice", choices())
def test_every_weight_of_a_net_learns_and_other_grids_will_do(choice):
    torch.manual_seed(0)
    net, batch = MetNet(**SMALL, **choice), rain()
    for name, weight in net.named_parameters():
        if name.endswith("gamma"):  # 0 at the start, when nothing behind it learns
            torch.nn.init.ones_(weight)
    cross_entropy(net.logits(batch), batch.target, net.bins).backward()
    silent = [name for name, weight in net.named_parameters() if not weight.grad.abs().sum() > 0]
    assert [name for name in silent if "blocks" in name] == []
    with torch.no_grad():
        assert net.eval()(replace(rain(24, 12), target=None)).probability.shape[-2:] == (24, 12)


@pytest.mark.slow
@pytest.mark.parametrize("choice", choices())
def test_a_net_learns_four_samples_by_heart(choice):
    torch.manual_seed(0)
    net, batch = MetNet(**SMALL, **choice), rain()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    first = cross_entropy(net.logits(batch), batch.target, net.bins).item()
    for _ in range(150):
        loss = cross_entropy(net.logits(batch), batch.target, net.bins)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_a_trunk_stands_in_the_place_of_the_blocks_and_is_told_the_lead_time():
    torch.manual_seed(0)
    net = MetNet(**SMALL, depth=3, trunk=partial(AxialImageTransformer, depth=1, heads=2))
    assert len(net.blocks) == 1
    torch.nn.init.normal_(net.blocks[0].tell.dense.weight)
    x, told = torch.randn(1, 16, 4, 4), torch.randn(2, 64)
    assert (net.blocks[0](x, told[:1]) - net.blocks[0](x, told[1:])).abs().max() > 1e-3


def test_both_axes_behave_as_a_block():
    layer = partial(chosen("attention", "position_sensitive").keywords["layer"], kernel_size=4, span=4)
    check_block(lambda: BothAxes(16, layer))
