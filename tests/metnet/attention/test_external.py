import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from benchmarks.published.eanet import External
from metnet.attention.external import ExternalAttention, MultiHeadExternalAttention, TokenExternalAttention
from tests.metnet.attention.check import awake, check_block

DOUBLE = torch.float64


def by_slot(asked, eps=0.0):
    """The double normalisation one slot and one place after the other, [place, slot]."""
    places, slots = asked.shape
    share = [asked[:, s].exp() / asked[:, s].exp().sum() for s in range(slots)]
    return torch.stack(
        [torch.stack([share[s][n] / (eps + sum(share)[n]) for s in range(slots)]) for n in range(places)]
    )


def external_by_equations(block, x):
    """The block's equations on (sample, channel, pixel), no projection taken before another."""
    bn = block.conv2[1]
    memory = block.linear_0.weight[:, :, 0], block.linear_1.weight[:, :, 0]
    read = []
    for sample in x.flatten(2):
        features = block.conv1.weight[:, :, 0, 0] @ sample + block.conv1.bias[:, None]
        read.append(
            block.conv2[0].weight[:, :, 0, 0] @ memory[1] @ by_slot((memory[0] @ features).T, block.eps).T
        )
    read = torch.stack(read)
    mean, variance = bn.running_mean, bn.running_var
    if bn.training:
        mean, variance = read.mean((0, 2)), read.var((0, 2), correction=0)
    read = (read - mean[:, None]) / (variance[:, None] + bn.eps).sqrt() * bn.weight[:, None] + bn.bias[
        :, None
    ]
    return (read.view(x.shape) + x).relu()


def token_by_equations(block, x):
    return torch.stack([by_slot(sample @ block.mk.weight.T, block.eps) @ block.mv.weight.T for sample in x])


def heads_by_equations(block, x):
    samples = []
    for sample in x:
        heads = (sample @ block.trans_dims.weight.T + block.trans_dims.bias).chunk(block.heads, dim=1)
        asked = [(head @ block.linear_0.weight.T + block.linear_0.bias) * block.scale for head in heads]
        read = [by_slot(a, block.eps) @ block.linear_1.weight.T + block.linear_1.bias for a in asked]
        samples.append(torch.cat(read, 1) @ block.proj.weight.T + block.proj.bias)
    return torch.stack(samples)


def results(function, block, x):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return y, *torch.autograd.grad(y, [leaf, *block.parameters()], direction)


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize(
    ("make", "equations", "shape"),
    [
        (lambda eps: ExternalAttention(5, 3, eps), external_by_equations, (2, 5, 3, 2)),
        (lambda eps: ExternalAttention(5, 3, eps).eval(), external_by_equations, (2, 5, 3, 2)),
        (lambda eps: TokenExternalAttention(5, 3, eps), token_by_equations, (2, 4, 5)),
        (lambda eps: MultiHeadExternalAttention(4, 2, S=3, eps=eps), heads_by_equations, (2, 4, 4)),
        (
            lambda eps: MultiHeadExternalAttention(4, 2, qk_scale=0.5, S=3, eps=eps),
            heads_by_equations,
            (2, 4, 4),
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations(make, equations, shape, eps):
    torch.manual_seed(0)
    block = awake(make(eps)).to(DOUBLE)
    x = torch.randn(shape, dtype=DOUBLE)
    for ours, theirs in zip(
        results(block, block, x), results(lambda x: equations(block, x), block, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_grid_gives_what_the_published_formulation_gives(batch, height, width, training):
    if training and batch * height * width == 1:
        batch = 2
    published = awake(External(8, slots=6)).to(DOUBLE).train(training)
    block = ExternalAttention(8, 6, eps=1e-9).to(DOUBLE).train(training)
    block.load_state_dict(published.state_dict(), strict=True)
    x = torch.randn(batch, 8, height, width, dtype=DOUBLE)
    for ours, theirs in zip(results(block, block, x), results(published, published, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(block.buffers(), published.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_grid_of_any_number_of_axes_is_only_pixels(grid):
    block = awake(ExternalAttention(6, 4)).eval()
    x = torch.randn(2, 6, *grid)
    torch.testing.assert_close(block(x), block(x.flatten(2)).view(x.shape))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ExternalAttention(16), (2, 16, 6, 5)),
        (lambda: ExternalAttention(16, k=3, tie_init=True), (2, 16, 30)),
        (lambda: TokenExternalAttention(16, 5), (2, 30, 16)),
        (lambda: MultiHeadExternalAttention(16, 4, S=7), (2, 30, 16)),
    ],
)
def test_the_blocks_behave(make, shape):
    check_block(make, shape)


def test_derivatives_are_right():
    block = awake(ExternalAttention(3, 2)).to(DOUBLE)
    assert torch.autograd.gradcheck(block, torch.randn(2, 3, 2, 2, dtype=DOUBLE, requires_grad=True))


def test_moving_the_pixels_moves_the_output_with_them():
    block = awake(ExternalAttention(8, 4)).eval()
    x, order = torch.randn(1, 8, 20), torch.randperm(20)
    torch.testing.assert_close(block(x[:, :, order]), block(x)[:, :, order])


def test_every_pixel_reaches_every_other():
    block = awake(TokenExternalAttention(4, 3)).to(DOUBLE)
    x = torch.randn(1, 12, 4, dtype=DOUBLE)
    moved = x.clone()
    moved[0, 7] += 5.0
    assert (block(x) != block(moved)).any(dim=-1).all()


def test_the_two_memories_are_apart_and_a_trained_checkpoint_stays_what_it_is():
    block = ExternalAttention(8, 4)
    weights = block.linear_0.weight, block.linear_1.weight
    assert all(weight.is_contiguous() for weight in weights)
    state = {
        name: torch.randn_like(t) if t.is_floating_point() else t for name, t in block.state_dict().items()
    }
    block.load_state_dict(load(save(state)), strict=True)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for same in (block, copy.deepcopy(block)):
        kept = same.linear_0.weight.detach().clone()
        with torch.no_grad():
            same.linear_1.weight.add_(1.0)
        assert torch.equal(same.linear_0.weight, kept)


def test_each_memory_starts_by_its_own_rule():
    torch.manual_seed(0)
    block = ExternalAttention(512, 64)
    assert block.linear_0.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)
    assert block.linear_1.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.03)
    token = TokenExternalAttention(512, 64)
    assert token.mk.weight.std().item() == pytest.approx(0.001, rel=0.03)


def test_a_tied_start_is_a_copy():
    block = ExternalAttention(8, 4, tie_init=True)
    assert torch.equal(block.linear_1.weight, block.linear_0.weight.transpose(0, 1))
    with torch.no_grad():
        block.linear_0.weight.zero_()
    assert block.linear_1.weight.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("below", [25.0, 200.0])
def test_a_pixel_that_every_slot_leaves_for_others_still_takes_parts_of_one(below, dtype):
    block = TokenExternalAttention(3, 3)
    with torch.no_grad():
        block.mk.weight.copy_(torch.eye(3))
        block.mv.weight.copy_(torch.eye(3))
    x = torch.zeros(1, 50, 3)
    x[0, 0] = -below
    assert block.to(dtype)(x.to(dtype))[0, 0].sum().item() == pytest.approx(1.0, rel=0.01)
    with torch.no_grad():
        spread = torch.softmax(x[0].double(), 0)[0]
        assert (spread / (1e-9 + spread.sum())).sum() < 0.1, "as published it would fall silent"


def test_the_scale_of_the_scores_is_used():
    plain, scaled = MultiHeadExternalAttention(8, 2), MultiHeadExternalAttention(8, 2, qk_scale=0.25)
    scaled.load_state_dict(awake(plain).state_dict(), strict=True)
    x = torch.randn(1, 6, 8)
    assert not torch.allclose(plain(x), scaled(x), atol=1e-4)
    with torch.no_grad():
        plain.linear_0.weight.mul_(0.25)
        plain.linear_0.bias.mul_(0.25)
    torch.testing.assert_close(plain(x), scaled(x))


def test_dropout_acts_while_training_only():
    block = awake(MultiHeadExternalAttention(8, 2, attn_drop=0.5, proj_drop=0.5))
    x = torch.randn(1, 6, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_published_names_and_shapes_are_kept():
    heads = {name: tuple(t.shape) for name, t in MultiHeadExternalAttention(16, 4).state_dict().items()}
    assert heads["linear_0.weight"] == (64, 4) and heads["linear_1.weight"] == (4, 64)
    assert heads["trans_dims.weight"] == (64, 16) and heads["proj.weight"] == (16, 64)
    assert set(TokenExternalAttention(512, S=8).state_dict()) == {"mk.weight", "mv.weight"}
    assert TokenExternalAttention(512, S=8)(torch.randn(50, 49, 512)).shape == (50, 49, 512)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExternalAttention(0), "c=0"),
        (lambda: ExternalAttention(8, k=0), "k=0"),
        (lambda: ExternalAttention(8, eps=-1.0), "eps=-1.0"),
        (lambda: TokenExternalAttention(8, S=0), "S=0"),
        (lambda: MultiHeadExternalAttention(10, 4), "dim=10.*num_heads=4"),
        (lambda: MultiHeadExternalAttention(8, 4, qkv_bias=True), "qkv_bias=True"),
        (lambda: ExternalAttention(8)(torch.zeros(2, 7, 3, 3)), r"\(2, 7, 3, 3\).*c=8"),
        (lambda: ExternalAttention(8)(torch.zeros(2, 8)), r"\(2, 8\)"),
        (lambda: TokenExternalAttention(8)(torch.zeros(2, 3, 7)), r"\(2, 3, 7\).*d_model=8"),
        (lambda: MultiHeadExternalAttention(8)(torch.zeros(2, 3, 7)), r"\(2, 3, 7\).*dim=8"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.compile
def test_it_compiles_whole_and_exports():
    for block, x in (
        (ExternalAttention(8, 4), torch.randn(2, 8, 5, 4)),
        (MultiHeadExternalAttention(8, 2), torch.randn(2, 9, 8)),
    ):
        expected = awake(block).eval()(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.export.export(block, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5
        )
