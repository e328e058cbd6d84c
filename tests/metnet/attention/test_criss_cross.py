import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.published.ccnet import CrissCross
from metnet.attention import criss_cross
from metnet.attention.criss_cross import (
    ColumnAttention,
    CrissCrossAttention,
    RCCAModule,
    RowAttention,
    RowColumnAttention,
)
from tests.metnet.attention.check import Largest, awake, check_block

DOUBLE = torch.float64


def by_pixel(block, x, column=True, row=True):
    """The equations, one pixel after the other: softmax over the places it sees, each once."""
    q, k, v = (conv(x) for conv in (block.query_conv, block.key_conv, block.value_conv))
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                seen = {(a, j) for a in range(x.shape[2])} if column else set()
                seen |= {(i, a) for a in range(x.shape[3])} if row else set()
                weights = torch.stack([q[b, :, i, j] @ k[b, :, *place] for place in sorted(seen)]).softmax(0)
                mixed = sum(w * v[b, :, *place] for w, place in zip(weights, sorted(seen), strict=True))
                y[b, :, i, j] = block.gamma * mixed + x[b, :, i, j]
    return y


def results(function, block, x):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return y, *torch.autograd.grad(y, [leaf, *block.parameters()], direction)


def changed_by_one_pixel(block, shape=(1, 16, 5, 6), place=(2, 3)):
    """How many pixels of the output move when one of the input does."""
    x = torch.randn(shape, dtype=DOUBLE)
    moved = x.clone()
    moved[:, :, *place] += 1.0
    with torch.no_grad():
        return int((block(x) != block(moved)).any(dim=1).sum())


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: CrissCrossAttention(16), {}),
        (lambda: RowAttention(16, 3), {"column": False}),
        (lambda: ColumnAttention(16, 3), {"row": False}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations_pixel_by_pixel(make, seen):
    torch.manual_seed(0)
    block = awake(make()).to(DOUBLE)
    x = torch.randn(2, 16, 4, 3, dtype=DOUBLE)
    for ours, theirs in zip(
        results(block, block, x), results(lambda x: by_pixel(block, x, **seen), block, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([40, 400, 1 << 19]))
def test_every_grid_gives_what_the_published_formulation_gives(batch, height, width, budget):
    published = awake(CrissCross(16)).to(DOUBLE)
    block = CrissCrossAttention(16).to(DOUBLE)
    block.load_state_dict(published.state_dict(), strict=True)
    x = 3 * torch.randn(batch, 16, height, width, dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criss_cross, "CPU_SCORES", budget)  # however many lines are taken at once
        ours = results(block, block, x)
    for mine, theirs in zip(ours, results(published, published, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_first_and_second_derivatives_are_right():
    block = awake(CrissCrossAttention(8)).to(DOUBLE)
    x = torch.randn(1, 8, 2, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x, fast_mode=True)


def test_derivatives_by_torch_func_are_those_of_autograd():
    block = awake(CrissCrossAttention(8)).to(DOUBLE)
    x = torch.randn(1, 8, 3, 2, dtype=DOUBLE, requires_grad=True)
    (by_autograd,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: block(x).square().sum())(x.detach()), by_autograd)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrissCrossAttention(16),
        lambda: CrissCrossAttention(16, recurrence=2, scale=True),
        lambda: RowAttention(16, 4),
        lambda: ColumnAttention(16, 4),
        *[
            lambda mode=mode: RowColumnAttention(16, 4, mode)
            for mode in ("sum", "sum_single", "row_col", "col_row")
        ],
    ],
)
def test_the_blocks_behave(make):
    check_block(make)


def test_the_whole_head_behaves():
    def without_dropout():
        head = RCCAModule(32, 12, 5)
        head.bottleneck[2].p = 0.0
        return head

    check_block(without_dropout, shape=(2, 32, 6, 5), out_shape=(2, 5, 6, 5))


def test_the_centre_counts_once_when_all_scores_are_equal():
    block = CrissCrossAttention(8)
    with torch.no_grad():
        for weight in block.parameters():
            weight.zero_()
        block.gamma.fill_(1.0)
        block.value_conv.weight.copy_(torch.eye(8)[:, :, None, None])
    x = torch.zeros(1, 8, 4, 3)
    x[0, :, 1, 2] = 6.0
    mean = (block(x) - x)[0, 0]
    assert mean[1].tolist() == pytest.approx([1.0, 1.0, 1.0])  # 6 / (4 + 3 - 1), its own pixel among them
    assert mean[:, 2].tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0])
    assert mean[0, 0] == 0.0


@pytest.mark.parametrize(
    ("make", "reached"),
    [
        (lambda: CrissCrossAttention(16), 10),
        (lambda: CrissCrossAttention(16, recurrence=2), 30),
        (lambda: RowColumnAttention(16, 2, "sum"), 10),
        (lambda: RowColumnAttention(16, 2, "row_col"), 30),
        (lambda: RowColumnAttention(16, 2, "col_row"), 30),
    ],
)
def test_two_rounds_or_one_axis_after_the_other_reach_all_30_pixels(make, reached):
    assert changed_by_one_pixel(awake(make()).to(DOUBLE)) == reached


def test_rounds_share_their_weights():
    once, twice = CrissCrossAttention(16), CrissCrossAttention(16, recurrence=2)
    twice.load_state_dict(awake(once).state_dict(), strict=True)
    x = torch.randn(1, 16, 4, 5)
    torch.testing.assert_close(twice(x), once(once(x)))


def test_gamma_is_a_trained_and_saved_weight_on_every_device():
    block = CrissCrossAttention(8).to("meta")
    assert isinstance(block.gamma, torch.nn.Parameter) and block.gamma.is_leaf
    assert "gamma" in block.state_dict() and any(p is block.gamma for p in block.parameters())


def test_nothing_of_a_call_is_made_on_another_device_than_its_input():
    block = CrissCrossAttention(8).to("meta")
    x = torch.empty(2, 8, 5, 4, device="meta", requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.device.type == "meta" and x.grad.shape == x.shape


def test_a_device_as_published_code_passes_it_is_ignored_with_a_warning():
    for make in (
        lambda: CrissCrossAttention(8, device="cuda"),
        lambda: RowAttention(in_dim=8, q_k_dim=4, device="cuda"),
        lambda: ColumnAttention(8, 4, "cuda"),
    ):
        with pytest.warns(DeprecationWarning, match="device is ignored"):
            block = make()
        assert block.gamma.device.type == "cpu"


def test_channels_that_8_does_not_divide_are_refused_unless_the_query_is_told():
    for in_dim in (4, 12):
        with pytest.raises(ValueError, match=f"in_dim={in_dim}"):
            CrissCrossAttention(in_dim)
    assert CrissCrossAttention(12, q_k_dim=1).query_conv.weight.shape == (1, 12, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrissCrossAttention(8, recurrence=0), "recurrence=0"),
        (lambda: CrissCrossAttention(8, q_k_dim=0), "q_k_dim=0"),
        (lambda: RowAttention(0, 4), "in_dim=0"),
        (lambda: ColumnAttention(8, 0), "q_k_dim=0"),
        (lambda: RCCAModule(48, 8, 2), "in_channels=48"),
        (lambda: RCCAModule(32, 8, 2)(torch.zeros(1, 32, 4, 4), recurrence=0), "recurrence=0"),
        (lambda: CrissCrossAttention(8)(torch.zeros(1, 9, 4, 4)), r"\(1, 9, 4, 4\).*in_dim=8"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_mode_is_named():
    with pytest.raises(Exception, match="mode"):  # by the block, or by the types before it
        RowColumnAttention(8, 4, "both")


def test_at_the_start_the_block_is_the_identity_and_only_gamma_moves():
    block = CrissCrossAttention(16)
    x = torch.randn(2, 16, 4, 5)
    y = block(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    moving = [name for name, weight in block.named_parameters() if weight.grad.abs().max() > 0]
    assert moving == ["gamma"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), x)


def test_scale_divides_the_scores_by_the_root_of_the_query_channels():
    plain, scaled = awake(CrissCrossAttention(32)), CrissCrossAttention(32, scale=True)
    scaled.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        plain.query_conv.weight.div_(math.sqrt(4))
        plain.query_conv.bias.div_(math.sqrt(4))
    x = torch.randn(1, 32, 4, 5)
    torch.testing.assert_close(scaled(x), plain(x))


def test_the_published_sum_holds_its_input_twice_and_sum_single_once():
    x = torch.randn(1, 8, 4, 5)
    torch.testing.assert_close(RowColumnAttention(8, 4, "sum")(x), 2 * x)
    torch.testing.assert_close(RowColumnAttention(8, 4, "sum_single")(x), x)


def test_orders_of_row_and_column_are_what_they_are_called():
    block = awake(RowColumnAttention(8, 4, "row_col"))
    x = torch.randn(1, 8, 4, 5)
    torch.testing.assert_close(block(x), block.col(block.row(x)))
    block.mode = "col_row"
    torch.testing.assert_close(block(x), block.row(block.col(x)))


def test_scores_too_large_for_an_exponential_stay_finite():
    block = awake(CrissCrossAttention(8))
    y = block(1e3 * torch.randn(1, 8, 5, 6))
    assert y.isfinite().all()


def test_the_head_is_the_published_chain_of_steps():
    torch.manual_seed(2)
    head = awake(RCCAModule(32, 12, 5)).eval()
    x = torch.randn(2, 32, 5, 4)
    leaky = torch.nn.functional.leaky_relu
    with torch.no_grad():
        inner = leaky(head.conva[1](head.conva[0](x)), 0.01)
        inner = by_pixel(head.cca, by_pixel(head.cca, inner))
        inner = leaky(head.convb[1](head.convb[0](inner)), 0.01)
        joined = leaky(head.bottleneck[1](head.bottleneck[0](torch.cat([x, inner], 1))), 0.01)
        expected = head.bottleneck[3](joined)
        torch.testing.assert_close(head(x, recurrence=2), expected, rtol=1e-4, atol=1e-5)
    assert set(RCCAModule(32, 12, 5).state_dict()) >= {"conva.0.weight", "cca.gamma", "bottleneck.3.bias"}


def test_published_weights_load_strictly_from_a_file():
    published = awake(CrissCross(16))
    file = io.BytesIO()
    torch.save(published.state_dict(), file)
    block = CrissCrossAttention(16)
    block.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)
    x = torch.randn(1, 16, 4, 5)
    torch.testing.assert_close(block(x), published(x), rtol=1e-4, atol=1e-5)


def test_training_never_holds_the_scores(monkeypatch):
    monkeypatch.setattr(criss_cross, "CPU_SCORES", 1 << 14)
    x = torch.randn(1, 16, 32, 32)
    largest = []
    for block in (CrissCross(16), CrissCrossAttention(16)):
        with Largest() as watch:
            block(x.requires_grad_()).sum().backward()
        largest.append(watch.elements)
    assert largest[0] >= 2 * 32**3, "the published formulation holds both axes' scores"
    assert largest[1] == x.numel(), "ours holds nothing larger than the map"


@pytest.mark.compile
def test_it_compiles_whole_and_exports():
    block = awake(CrissCrossAttention(16, recurrence=2)).eval()
    x = torch.randn(2, 16, 5, 4)
    expected = results(block, block, x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, block, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(block, (x,)).module()
    torch.testing.assert_close(exported(x), expected[0], rtol=1e-4, atol=1e-4)
