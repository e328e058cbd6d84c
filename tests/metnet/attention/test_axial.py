import copy
import math
import warnings

import axial_attention
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from metnet.attention import lines
from metnet.attention.axial import AxialAttention, PermuteToFrom, calculate_permutations
from metnet.attention.multihead import SelfAttention
from tests.metnet.attention.check import Largest, check_block


@pytest.fixture(params=[1, 1000], ids=["line by line", "at once"])
def either_way(request, monkeypatch):
    """Short lines through both implementations."""
    monkeypatch.setattr(lines, "SHORTEST", request.param)


def by_the_equations(module, x):
    """Attention along every axis, in float64 and einsum over whole axes, straight from the definition."""
    total = torch.zeros_like(x)
    for attention in (pair.fn for pair in module.axial_attentions):
        axis = [pair.fn for pair in module.axial_attentions].index(attention)
        places = x.movedim(module.dim_index, -1)
        lined = places.movedim(axis + 1, -2)
        e = attention.to_q.weight.shape[0] // attention.heads
        to_k, to_v = attention.to_kv.weight.chunk(2)
        mixed = []
        for head in range(attention.heads):
            part = slice(head * e, (head + 1) * e)
            q, k, v = (lined @ to[part].T for to in (attention.to_q.weight, to_k, to_v))
            scores = torch.einsum("...ie,...je->...ij", q, k) / math.sqrt(e)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(torch.einsum("...ij,...je->...ie", weights, v))
        said = torch.cat(mixed, -1) @ attention.to_out.weight.T + attention.to_out.bias
        said = said.movedim(-2, axis + 1).movedim(-1, module.dim_index)
        if not module.sum_axial_out:
            x = said
        total = total + said if module.sum_axial_out else said
    return total


def slopes(module, x, direction):
    x = x.detach().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *module.parameters()], direction)


def pair(*args, **kwargs):
    """The published module and ours with its weights."""
    published = axial_attention.AxialAttention(*args, **kwargs).double()
    ours = AxialAttention(*args, **kwargs).double()
    ours.load_state_dict(published.state_dict(), strict=True)
    return published, ours


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    index=st.integers(-5, 5).filter(bool),
    summed=st.booleans(),
    scores=st.sampled_from([1, 400, 1 << 20]),
    shortest=st.sampled_from([1, 3, 16]),
    layout=st.sampled_from(["contiguous", "channels last", "strided"]),
)
def test_outputs_and_gradients_are_the_published_ones(sizes, index, summed, scores, shortest, layout):
    dims = len(sizes)
    index = max(-dims - 1, min(dims + 1, index))
    torch.manual_seed(dims)
    published, ours = pair(6, dims, 2, dim_index=index, sum_axial_out=summed)
    x = torch.randn(2, *sizes, 6, dtype=torch.float64).movedim(-1, index)
    if layout == "contiguous":
        x = x.contiguous()
    if layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    direction = torch.randn_like(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "SCORES", scores)  # whatever goes through at once
        patch.setattr(lines, "SHORTEST", shortest)  # and whichever way
        found = slopes(ours, x, direction)
    for one, other in zip(found, slopes(published, x, direction), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[0], by_the_equations(ours, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((1, 3, 20, 24), {"dim": 3, "dim_index": 1, "dim_heads": 32, "heads": 1}),
        ((1, 20, 20, 64), {"dim": 64, "dim_index": -1, "heads": 8}),
        ((1, 5, 10, 20, 20), {"dim": 10, "dim_index": 2, "heads": 5, "num_dimensions": 3}),
    ],
)
def test_published_examples_run_by_changing_the_import(shape, arguments, either_way):
    published, ours = pair(**arguments)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), published(x), rtol=0, atol=1e-10)


def test_self_attention_and_cross_attention_are_the_published_ones(either_way):
    published = axial_attention.axial_attention.SelfAttention(12, 3, 5).double()
    ours = SelfAttention(12, 3, 5).double()
    ours.load_state_dict(published.state_dict(), strict=True)
    x, other = torch.randn(4, 7, 12, dtype=torch.float64), torch.randn(4, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), published(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(x, kv=other), published(x, kv=other), rtol=0, atol=1e-10)


def test_it_behaves_as_a_block(either_way):
    check_block(lambda: AxialAttention(16, heads=4, dim_index=1))
    check_block(lambda: AxialAttention(16, heads=4, dim_index=1, sum_axial_out=False))
    check_block(lambda: SelfAttention(16, 4), (3, 5, 16))


def test_gradients_are_right_to_second_order(monkeypatch):
    monkeypatch.setattr(lines, "SHORTEST", 1)
    torch.manual_seed(0)
    block = AxialAttention(4, heads=2, dim_index=1).double()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weights = {name: weight.detach().requires_grad_() for name, weight in block.named_parameters()}

    def call(x, *values):
        return torch.func.functional_call(block, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights.values()))
    assert torch.autograd.gradgradcheck(call, (x, *weights.values()))


def test_frozen_weights_or_a_fixed_input_leave_the_other_gradients_as_they_are(either_way):
    torch.manual_seed(0)
    block = AxialAttention(8, heads=2, dim_index=1).double()
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64)
    _, to_x, *to_weights = slopes(block, x, torch.ones_like(x))
    block(x).sum().backward()
    for weight, gradient in zip(block.parameters(), to_weights, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    leaf = x.clone().requires_grad_()
    block.requires_grad_(False)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, to_x)


def test_a_call_without_gradients_keeps_nothing(either_way):
    block = AxialAttention(8, heads=2, dim_index=1)
    with torch.no_grad():
        assert block(torch.randn(1, 8, 4, 5)).grad_fn is None


def test_no_tensor_grows_with_the_scores():
    """The published code holds all scores of an axis: 8 heads x 40 lines x 40 x 40 places."""
    block = AxialAttention(16, heads=8, dim_index=1)
    x = torch.randn(1, 16, 40, 40, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch, Largest() as watch:
        patch.setattr(lines, "SCORES", 1)
        block(x).sum().backward()
    assert watch.elements == x.numel()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions_see_every_step():
    block = AxialAttention(8, heads=2, dim_index=1).double()
    x = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(block)(x), torch.stack([block(one) for one in x]))
    slope = torch.func.grad(lambda x: block(x).square().sum())(x[0])
    leaf = x[0].clone().requires_grad_()
    block(leaf).square().sum().backward()
    torch.testing.assert_close(slope, leaf.grad)


def test_checkpointing_gets_the_same_gradients(either_way):
    block = AxialAttention(8, heads=2, dim_index=1).double()
    x = torch.randn(1, 8, 4, 5, dtype=torch.float64, requires_grad=True)
    kept = torch.autograd.grad(block(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(again, kept)


def test_large_inputs_in_half_precision_stay_finite():
    """Scores scaled only after the product overflow float16; the input here gives some of 2e5."""
    block = SelfAttention(64, 1)
    with torch.no_grad():
        block.to_q.weight.copy_(torch.eye(64))
        block.to_kv.weight.copy_(torch.eye(64).repeat(2, 1))
    x = torch.full((1, 3, 64), 60.0)
    assert block.half()(x.half()).isfinite().all()


def test_a_line_of_one_place_says_its_own_value():
    attention = SelfAttention(8, 2).double()
    x = torch.randn(5, 1, 8, dtype=torch.float64)
    value = attention.to_kv(x).chunk(2, -1)[1]
    torch.testing.assert_close(attention(x), attention.to_out(value))


def test_an_empty_batch_has_gradients_of_zero_for_every_weight():
    block = AxialAttention(8, heads=2, dim_index=1)
    block(torch.zeros(0, 8, 4, 4)).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in block.parameters())


def test_nothing_to_attend_to_is_refused():
    attention = SelfAttention(8, 2)
    with pytest.raises(ValueError, match=r"kv has shape \(2, 0, 8\)"):
        attention(torch.zeros(2, 3, 8), kv=torch.zeros(2, 0, 8))
    for x, kv in ((2, 1), (2, 3), (2, 0), (0, 2)):
        with pytest.raises(ValueError, match=rf"kv has shape \({kv}, 4, 8\): expected the {x} lines of x"):
            attention(torch.zeros(x, 3, 8), kv=torch.zeros(kv, 4, 8))
    with pytest.raises(ValueError, match=r"kv has shape \(2, 3, 7\)"):
        attention(torch.zeros(2, 3, 8), kv=torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match="dim=8"):
        attention(torch.zeros(2, 3, 7))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_permutations_are_the_published_ones_and_a_wrong_index_is_refused(dims):
    for index in [*range(-dims - 1, 0), *range(1, dims + 2)]:
        expected = axial_attention.axial_attention.calculate_permutations(dims, index)
        assert calculate_permutations(dims, index) == expected
    for index in (0, dims + 2, -dims - 2):
        with pytest.raises(ValueError, match=f"emb_dim={index}:"):
            calculate_permutations(dims, index)


def test_permute_to_from_puts_every_line_back_in_its_place():
    seen = []

    class Look(nn.Module):
        def forward(self, x, by=1.0):
            seen.append(tuple(x.shape))
            return x * by

    x = torch.randn(2, 3, 4, 5)
    for permutation in calculate_permutations(2, 1):
        assert torch.equal(PermuteToFrom(permutation, Look())(x, by=2.0), 2 * x)
    assert seen == [(10, 4, 3), (8, 5, 3)]


def test_each_axis_can_be_called_by_itself_as_published():
    published, ours = pair(6, 2, 2, dim_index=1)
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    for one, other in zip(ours.axial_attentions, published.axial_attentions, strict=True):
        torch.testing.assert_close(one(x), other(x), rtol=0, atol=1e-10)


@pytest.mark.compile
def test_it_compiles_to_one_graph_and_exports():
    torch.manual_seed(0)
    block = AxialAttention(8, heads=2, dim_index=1)
    x = torch.randn(1, 8, 4, 5)
    expected = slopes(block, x, torch.ones_like(x))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    for one, other in zip(slopes(compiled, x, torch.ones_like(x)), expected, strict=True):
        torch.testing.assert_close(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), expected[0])


@pytest.mark.compile
def test_the_compiler_of_kernels_gives_the_same():
    block = AxialAttention(8, heads=2, dim_index=1)
    x = torch.randn(1, 8, 4, 5)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))
