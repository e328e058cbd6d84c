"""The axial image transformer: the published weights and results, without the published faults."""

import math

import pytest
import torch
import torch.nn.functional as F
from axial_attention import AxialImageTransformer as Published
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from metnet.attention.image_transformer import (
    AxialImageTransformer,
    ChanLayerNorm,
    plain_keys,
    reversible_keys,
)
from metnet.attention.reversible import ReversibleSequence
from tests.metnet.attention.check import check_block


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are worked out faster by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def transformer(*args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return AxialImageTransformer(*args, **kwargs).double()


def gradients(module, x):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: w.grad for name, w in module.named_parameters()}}


def assert_same(ours, theirs, tolerance=1e-11):
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        assert (one - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max(), name


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((2, 8, 5, 7), {"heads": 4}),
        ((1, 8, 6, 6), {"heads": 2, "dim_heads": 3, "axial_pos_emb_shape": (6, 6)}),
        ((2, 8, 1, 4), {"heads": 8, "axial_pos_emb_shape": (1, 4)}),
        ((1, 6, 4, 1), {"heads": 6}),
    ],
)
def test_published_weights_give_the_published_outputs_and_gradients(reversible, shape, kwargs):
    published = Published(shape[1], 2, reversible=reversible, **kwargs).double()
    ours = transformer(shape[1], 2, reversible=reversible, seed=1, **kwargs)
    ours.load_state_dict(published.state_dict(), strict=True)
    assert_same(gradients(ours, image(*shape)), gradients(published, image(*shape)))


def attention(x, w, heads):
    """Equations of the axial attention, one line (place, dim) after the other."""
    k, v = w["to_kv.weight"].chunk(2)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normed = normed * w["norm.weight"] + w["norm.bias"]
    out = []
    for q_h, k_h, v_h in zip(
        *(m.reshape(heads, -1, x.shape[-1]) for m in (w["to_q.weight"], k, v)), strict=True
    ):
        scores = (normed @ q_h.T) @ (normed @ k_h.T).transpose(-1, -2) / math.sqrt(len(q_h))
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out.append(weights @ (normed @ v_h.T))
    return torch.cat(out, dim=-1) @ w["to_out.weight"].T + w["to_out.bias"]


def convolutions(x, w):
    """Equations of the convolution network, with a sum over the nine neighbours."""

    def convolved(x, weight, bias):
        padded = F.pad(x, (1, 1, 1, 1))
        y, width = x.shape[-2:]
        each = [
            torch.einsum("oi,biyx->boyx", weight[..., dy, dx], padded[..., dy : dy + y, dx : dx + width])
            for dy in range(3)
            for dx in range(3)
        ]
        return sum(each) + bias[:, None, None]

    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True).sqrt() + 1e-5)
    wide = convolved(normed * w["0.g"] + w["0.b"], w["1.weight"], w["1.bias"])
    return convolved(torch.where(wide > 0, wide, 0.01 * wide), w["3.weight"], w["3.bias"])


@pytest.mark.parametrize("reversible", [True, False])
def test_outputs_and_gradients_follow_from_the_equations(reversible):
    module = transformer(6, 2, heads=2, reversible=reversible)
    state = (
        dict(module.named_parameters()) if reversible else reversible_keys(dict(module.named_parameters()))
    )

    def branch(block, name):
        prefix = f"layers.blocks.{block}.{name}.net."
        w = {key.removeprefix(prefix).removeprefix("fn.").removeprefix("fn."): value
             for key, value in state.items() if key.startswith(prefix)}  # fmt: skip
        if block % 2:
            return lambda x: convolutions(x, w)
        order = (0, 3, 2, 1) if name == "f" else (0, 2, 3, 1)
        back = (0, 3, 2, 1) if name == "f" else (0, 3, 1, 2)
        return lambda x: attention(x.permute(order), w, 2).permute(back)

    class Reference(nn.Module):
        def forward(self, x):
            x1 = x2 = x
            for n in range(4):
                if reversible:
                    x1 = x1 + branch(n, "f")(x2)
                    x2 = x2 + branch(n, "g")(x1)
                else:
                    x1 = x1 + branch(n, "f")(x1)
                    x1 = x2 = x1 + branch(n, "g")(x1)
            return (x1 + x2) / 2

    reference = Reference()
    for name, weight in module.named_parameters():
        reference.register_parameter(name.replace(".", "_"), weight)
    x = image(2, 6, 3, 4)
    expected = {name: value.clone() for name, value in gradients(reference, x).items()}
    found = gradients(module, x)
    assert_same({name.replace(".", "_"): value for name, value in found.items()}, expected)


def test_the_published_example_keeps_its_channels():
    module = AxialImageTransformer(dim=16, depth=2, reversible=True)
    assert module(nn.Conv2d(3, 16, 1)(image(1, 3, 12, 12).float())).shape == (1, 16, 12, 12)


@pytest.mark.parametrize(("index", "order"), [(-3, (0, 1, 2, 3)), (2, (0, 2, 1, 3)), (-1, (0, 2, 3, 1))])
def test_channels_may_stand_elsewhere_even_where_all_sizes_agree(index, order):
    first = transformer(6, 2, heads=2)
    elsewhere = transformer(6, 2, heads=2, dim_index=index)
    x = image(1, 6, 6, 6)
    there = x.permute(order)
    assert torch.allclose(elsewhere(there), first(x).permute(order), atol=1e-12)


def test_positions_of_channels_that_stand_last_are_added_in_place():
    module = transformer(4, 1, heads=2, dim_index=-1, axial_pos_emb_shape=(3, 5))
    unplaced = transformer(4, 1, heads=2, dim_index=-1)
    unplaced.load_state_dict({k: v for k, v in module.state_dict().items() if "pos_emb" not in k})
    x = image(2, 3, 5, 4)
    placed = x + module.pos_emb.param_0.view(1, 3, 1, 4) + module.pos_emb.param_1.view(1, 1, 5, 4)
    assert torch.allclose(module(x), unplaced(placed), atol=1e-12)


def test_another_grid_than_that_of_the_positions_is_refused_or_interpolated():
    with pytest.raises(ValueError, match=r"grid of \(1, 5\): expected shape=\(3, 5\)"):
        transformer(4, 1, heads=2, axial_pos_emb_shape=(3, 5))(image(1, 4, 1, 5))
    stretched = transformer(4, 1, heads=2, axial_pos_emb_shape=(3, 5), interpolate=True)
    assert stretched(image(1, 4, 6, 9)).shape == (1, 4, 6, 9)


def test_channel_norm_is_its_formula_with_eps_outside_the_root():
    norm = ChanLayerNorm(7).double()
    nn.init.normal_(norm.g)
    nn.init.normal_(norm.b)
    x = image(2, 7, 3, 4)
    mean, std = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
    assert torch.allclose(norm(x), (x - mean) / (std + 1e-5) * norm.g + norm.b, atol=1e-12)

    faint = ChanLayerNorm(64)(1e-3 * image(1, 64, 8, 8, dtype=torch.float32))
    assert 0.98 < faint.std().item() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 3.0])
def test_where_all_channels_are_equal_the_slope_is_finite(dtype, level):
    norm = ChanLayerNorm(8).to(dtype)
    x = torch.full((1, 8, 2, 2), level, dtype=dtype, requires_grad=True)
    y = norm(x)
    (y * torch.arange(8.0, dtype=dtype).view(1, 8, 1, 1)).sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_numeric_slopes_of_the_channel_norm_agree():
    norm = ChanLayerNorm(5).double()
    assert torch.autograd.gradcheck(norm, (image(1, 5, 2, 2).requires_grad_(),))


@pytest.mark.parametrize("reversible", [True, False])
def test_an_all_dry_map_gives_finite_gradients(reversible):
    module = transformer(8, 2, heads=2, reversible=reversible)
    for name, weight in module.named_parameters():
        if "to_out" in name:
            nn.init.zeros_(weight)
    found = gradients(module, torch.zeros(1, 8, 4, 4, dtype=torch.float64))
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_the_two_key_layouts_turn_into_each_other():
    two, one = transformer(6, 2, heads=2), transformer(6, 2, heads=2, reversible=False, seed=1)
    one.load_state_dict(plain_keys(two.state_dict()), strict=True)
    back = reversible_keys(one.state_dict())
    assert {k: v.data_ptr() for k, v in back.items()} == {
        k: one.state_dict()[plain].data_ptr() for k, plain in zip(back, one.state_dict(), strict=True)
    }
    assert all(torch.equal(back[key], value) for key, value in two.state_dict().items())
    assert back.keys() == two.state_dict().keys()
    x = image(1, 6, 4, 5)
    assert not torch.allclose(one(x), two(x), atol=0.01)  # another function of the same weights


def test_recomputed_is_remembered():
    module = transformer(6, 3, heads=2, dropout=0.2)
    assert isinstance(module.layers, ReversibleSequence)
    found = []
    for remember in (False, True):
        module.layers.remember = remember
        torch.manual_seed(2)
        found.append(gradients(module, image(2, 6, 5, 4)))
    assert_same(*found)
    assert transformer(6, 1, heads=2, remember=True).layers.remember


@pytest.mark.parametrize("reversible", [True, False])
def test_dropout_drops_in_training_only(reversible):
    module = transformer(8, 1, heads=2, dropout=0.5, reversible=reversible)
    sure = transformer(8, 1, heads=2, reversible=reversible)
    x = image(1, 8, 4, 4)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), sure(x))


@pytest.mark.parametrize("reversible", [True, False])
def test_it_behaves_as_every_block_must(reversible):
    check_block(lambda: AxialImageTransformer(16, 1, reversible=reversible, axial_pos_emb_shape=(6, 5)))


@pytest.mark.parametrize("reversible", [True, False])
def test_every_weight_learns_and_no_sample_sees_another(reversible):
    module = transformer(8, 2, heads=2, reversible=reversible, axial_pos_emb_shape=(4, 5))
    x = image(3, 8, 4, 5)
    assert all(gradient.any() for gradient in gradients(module, x).values())
    x = x.requires_grad_()
    (seen,) = torch.autograd.grad(module(x)[1].sum(), x)
    assert seen[1].all()
    assert not seen[[0, 2]].any()


def test_every_pixel_sees_every_pixel_after_one_layer():
    module = transformer(4, 1, heads=2)
    x = image(1, 4, 5, 6).requires_grad_()
    (seen,) = torch.autograd.grad(module(x)[0, :, 0, 0].sum(), x)
    assert seen.abs().sum(1).all()


@given(st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_any_grid_and_layout_gives_the_same_as_a_plain_copy(batch, y, x, reversible, last):
    module = transformer(4, 1, heads=2, reversible=reversible)
    there = image(y, batch, x, 4).permute(1, 3, 0, 2)  # not contiguous
    before = there.clone()
    out = module(there.requires_grad_())
    out.sum().backward()
    assert out.shape == there.shape
    assert torch.equal(there, before)
    memory = torch.channels_last if last else torch.contiguous_format
    assert torch.allclose(module(before.clone(memory_format=memory)), out, atol=1e-12)


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("depth", [1, 16])
def test_the_signal_survives_a_deep_stack(reversible, depth):
    torch.manual_seed(3)
    module = AxialImageTransformer(64, depth, reversible=reversible)
    x = image(1, 64, 12, 12, dtype=torch.float32)

    def health(x):
        return x.std((2, 3)).square().mean().sqrt() / x.square().mean().sqrt()

    with torch.no_grad():
        assert 0.3 < health(module(x)) / health(x) < 3


def test_four_maps_are_learned_by_heart():
    torch.manual_seed(0)
    module = AxialImageTransformer(8, 2, heads=2)
    x, target = image(2, 4, 8, 6, 6, dtype=torch.float32)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_finite_and_near(reversible, autocast):
    torch.manual_seed(0)
    module = AxialImageTransformer(16, 2, heads=2, reversible=reversible)
    x = image(2, 16, 6, 6, dtype=torch.float32)
    full = gradients(module, x)
    if not autocast:
        module, x = module.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        half = gradients(module, x)
    assert half["y"].dtype == x.dtype
    assert all(value.isfinite().all() for value in half.values())
    for name, value in half.items():
        assert (value - full[name]).norm() < 0.1 * full[name].norm(), name


@pytest.mark.parametrize("reversible", [True, False])
def test_weights_go_through_a_safe_file(reversible):
    module = transformer(8, 2, heads=2, reversible=reversible, axial_pos_emb_shape=(3, 4))
    twin = transformer(8, 2, heads=2, reversible=reversible, axial_pos_emb_shape=(3, 4), seed=1)
    twin.load_state_dict(load(save(module.state_dict())), strict=True)
    x = image(1, 8, 3, 4)
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim_index": 0}, "dim_index=0: expected 1..3"),
        ({"dim_index": -4}, "dim_index=-4: expected"),
        ({"depth": 0}, "depth=0: expected at least 1"),
        ({"heads": 3}, "dim=8 must be a multiple of heads=3"),
        ({"axial_pos_emb_shape": (4,)}, "axial_pos_emb_shape"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AxialImageTransformer(**{"dim": 8, "depth": 1, "heads": 2, **kwargs})


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (1, 8, 4), (1, 8, 4, 4, 4)])
def test_a_wrong_input_is_told_what_was_expected(shape):
    with pytest.raises(ValueError, match=r"expected 4 dimensions with dim=8 channels at dim_index=1"):
        transformer(8, 1, heads=2)(image(*shape))


@pytest.mark.compile
def test_one_stream_compiles_into_one_graph():
    module = transformer(8, 1, heads=2, reversible=False)
    x = image(1, 8, 4, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-10)


@pytest.mark.compile
@pytest.mark.parametrize("reversible", [True, False])
def test_an_exported_transformer_gives_the_same(reversible):
    module = transformer(8, 1, heads=2, reversible=reversible, axial_pos_emb_shape=(4, 5)).eval()
    x = image(2, 8, 4, 5)
    exported = torch.export.export(module, (x,)).module()
    assert torch.allclose(exported(x), module(x), atol=1e-10)
