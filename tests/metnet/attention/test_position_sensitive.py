import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.published.axial_deeplab import PositionSensitive
from metnet.attention import position_sensitive
from metnet.attention.position_sensitive import PositionSensitiveAxialAttention, PositionSensitiveBlock
from tests.metnet.attention.check import Largest, awake, check_block

DOUBLE = torch.float64
SILENT = ("bn_similarity.bias",)  # what it adds is the same for all places of a line, and cancels


def by_equations(layer, x, within=math.inf):
    """The layer from its equations: every vector of an offset looked up by itself, batch norms written out."""
    x = x if layer.width else x.mT
    batch, _, lines, places = x.shape
    groups, planes = layer.groups, layer.out_planes // layer.groups
    half, centre = planes // 2, layer.kernel_size - 1
    qkv = torch.einsum("oc,bcni->boni", layer.qkv_transform.weight[:, :, 0], x)
    if layer.qkv_transform.bias is not None:
        qkv = qkv + layer.qkv_transform.bias[:, None, None]
    qkv = normed(layer.bn_qkv, qkv).unflatten(1, (groups, 2 * planes))
    q, k, v = qkv[:, :, :half], qkv[:, :, half:planes], qkv[:, :, planes:]
    of_q, of_k, of_v = layer.relative[:half], layer.relative[half:planes], layer.relative[planes:]
    pairs = [(i, j) for i in range(places) for j in range(places) if abs(i - j) < within]
    content = torch.stack([(q[..., i] * k[..., j]).sum(2) for i, j in pairs], -1)
    from_q = torch.stack([(q[..., i] * of_q[:, None, i - j + centre]).sum(2) for i, j in pairs], -1)
    from_k = torch.stack([(k[..., j] * of_k[:, None, j - i + centre]).sum(2) for i, j in pairs], -1)
    parts = normed(layer.bn_similarity, torch.cat([content, from_q, from_k], 1)).unflatten(1, (3, groups))
    scores = torch.full((batch, groups, lines, places, places), -math.inf, dtype=x.dtype)
    index = torch.tensor(pairs).T
    scores[..., index[0], index[1]] = parts.sum(1)
    weights = scores.softmax(-1)
    taken = torch.zeros(batch, groups, planes, 2, lines, places, dtype=x.dtype)
    for i, j in pairs:
        taken[:, :, :, 0, :, i] += weights[:, :, None, :, i, j] * v[..., j]
        taken[:, :, :, 1, :, i] += weights[:, :, None, :, i, j] * of_v[:, None, i - j + centre]
    out = normed(layer.bn_output, taken.flatten(1, 3)).unflatten(1, (-1, 2)).sum(2)
    out = out if layer.width else out.mT
    return torch.nn.functional.avg_pool2d(out, layer.stride) if layer.stride > 1 else out


def normed(bn, x):
    """Batch normalisation of dim 1, by its moments."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    dims = [dim for dim in range(x.ndim) if dim != 1]
    if bn.training:
        mean, variance = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
    else:
        mean, variance = bn.running_mean.view(shape), bn.running_var.view(shape)
    return (x - mean) / (variance + bn.eps).sqrt() * bn.weight.view(shape) + bn.bias.view(shape)


def results(function, weights, x):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return y, *torch.autograd.grad(y, [leaf, *weights], direction)


def trained(layer):
    """Weights and running statistics away from their start."""
    awake(layer)
    for name, buffer in layer.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return layer.to(DOUBLE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"kernel_size": 5}, (2, 6, 5, 4)),
        ({"kernel_size": 4, "width": True, "bias": True}, (2, 6, 5, 4)),
        ({"kernel_size": 7, "stride": 2}, (1, 6, 4, 6)),
        ({"kernel_size": 3, "span": 2}, (2, 6, 6, 2)),
        ({"kernel_size": 3, "span": 3, "width": True}, (1, 6, 2, 3)),
        ({"kernel_size": 1}, (2, 6, 1, 3)),
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations(training, arguments, shape):
    torch.manual_seed(0)
    layer = trained(PositionSensitiveAxialAttention(6, 8, 2, **arguments)).train(training)
    x = torch.randn(shape, dtype=DOUBLE)
    within = arguments.get("span", math.inf)
    weights = list(layer.parameters())
    expected = results(lambda x: by_equations(layer, x, within), weights, x)
    for ours, theirs in zip(results(layer, weights, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=12)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 1500, 1 << 20]),
)
def test_every_grid_gives_what_the_published_formulation_gives(
    batch, height, width, along_x, training, budget
):
    size = width if along_x else height
    if training and batch * height * width == 1:
        batch = 2
    published = trained(PositionSensitive(8, 8, 2, size, along_x)).train(training)
    layer = PositionSensitiveAxialAttention(8, 8, 2, size, width=along_x).to(DOUBLE).train(training)
    layer.load_state_dict(published.state_dict(), strict=True)
    x = torch.randn(batch, 8, height, width, dtype=DOUBLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(position_sensitive, "CPU_SCORES", budget)  # however many lines are taken at once
        ours = results(layer, list(layer.parameters()), x)
    theirs = results(published, [published.get_parameter(name) for name, _ in layer.named_parameters()], x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_running_statistics_move_as_those_of_the_published_layer():
    published = trained(PositionSensitive(8, 8, 2, 5))
    layer = PositionSensitiveAxialAttention(8, 8, 2, 5).to(DOUBLE)
    layer.load_state_dict(published.state_dict(), strict=True)
    for n in range(3):
        x = torch.randn(2, 8, 5, 4, dtype=DOUBLE) + n
        layer(x)
        published(x)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, published.get_buffer(name), rtol=1e-9, atol=1e-9)
    assert layer.bn_similarity.num_batches_tracked == 3


def test_first_and_second_derivatives_are_right():
    layer = trained(PositionSensitiveAxialAttention(2, 4, 2, 3))
    x = torch.randn(1, 2, 3, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize(
    ("make", "silent"),
    [
        (lambda: PositionSensitiveAxialAttention(16, 16, 2, 6), SILENT),
        (lambda: PositionSensitiveAxialAttention(16, 16, 2, 7, width=True, bias=False), SILENT),
        (lambda: PositionSensitiveAxialAttention(16, 16, 4, 3, span=2), SILENT),
        (lambda: PositionSensitiveAxialAttention(16, 16, 2, 6, norm="layer"), ()),
        (lambda: PositionSensitiveAxialAttention(16, 16, 2, 6, norm="none", bias=True), ()),
        (lambda: PositionSensitiveBlock(16, 8, groups=2, kernel_size=6), SILENT),
    ],
)
def test_the_blocks_behave(make, silent):
    check_block(make, silent=silent)


def test_a_shorter_line_uses_the_middle_of_the_table():
    wide = awake(PositionSensitiveAxialAttention(4, 8, 2, 9)).eval()
    narrow = PositionSensitiveAxialAttention(4, 8, 2, 4).eval()
    narrow.load_state_dict({**wide.state_dict(), "relative": wide.relative[:, 5:12]}, strict=True)
    x = torch.randn(2, 4, 4, 3)
    torch.testing.assert_close(wide(x), narrow(x))


def test_a_line_longer_than_the_table_needs_a_span():
    with pytest.raises(ValueError, match=r"6 places along y.*kernel_size=5.*span"):
        PositionSensitiveAxialAttention(4, 8, 2, 5)(torch.zeros(1, 4, 6, 3))


def test_a_span_looks_no_further_than_it_says():
    layer = awake(PositionSensitiveAxialAttention(4, 8, 2, 4, span=3)).eval()
    x = torch.randn(1, 4, 11, 2)
    moved = x.clone()
    moved[:, :, 5, 1] += 1.0
    changed = (layer(x) != layer(moved)).any(dim=1)[0]
    assert changed[:, 0].sum() == 0
    assert changed[:, 1].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_a_place_knows_how_far_and_in_which_direction_the_others_lie():
    layer = awake(PositionSensitiveAxialAttention(4, 8, 2, 5, norm="none"))
    x = torch.randn(1, 4, 5, 1)
    assert not torch.allclose(layer(x).flip(2), layer(x.flip(2)), atol=1e-3)
    with torch.no_grad():
        layer.relative.zero_()
    torch.testing.assert_close(layer(x).flip(2), layer(x.flip(2)))


def test_a_bias_is_a_weight_that_moves_the_output():
    layer = PositionSensitiveAxialAttention(4, 8, 2, 5, bias=True, norm="none")
    x = torch.randn(1, 4, 5, 3)
    before = layer(x)
    with torch.no_grad():
        layer.qkv_transform.bias.add_(1.0)
    assert not torch.allclose(layer(x), before, atol=1e-3)
    assert PositionSensitiveAxialAttention(4, 8, 2, 5).qkv_transform.bias is None


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_batch_norm_samples_stay_apart_while_training(norm):
    layer = awake(PositionSensitiveAxialAttention(4, 8, 2, 5, norm=norm)).train()
    x = torch.randn(3, 4, 5, 4)
    torch.testing.assert_close(layer(x)[1], layer(x[1:2])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_planes": 10}, "out_planes=10.*4"),  # 5 channels a group: half a channel of query
        ({"out_planes": 6, "groups": 4}, "out_planes=6"),
        ({"span": 9}, "span=9.*kernel_size=8"),
        ({"span": 0}, "span=0"),
        ({"stride": 0}, "stride=0"),
        ({"kernel_size": 0}, "kernel_size=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionSensitiveAxialAttention(
            **{"in_planes": 4, "out_planes": 8, "groups": 2, "kernel_size": 8, **arguments}
        )


def test_wrong_inputs_and_blocks_are_named():
    with pytest.raises(ValueError, match=r"\(1, 5, 4, 4\).*in_planes=4"):
        PositionSensitiveAxialAttention(4, 8, 2, 8)(torch.zeros(1, 5, 4, 4))
    with pytest.raises(ValueError, match="dilation=2"):
        PositionSensitiveBlock(8, 4, dilation=2)
    with pytest.raises(ValueError, match="downsample"):
        PositionSensitiveBlock(8, 4, stride=2)
    with pytest.raises(Exception, match="norm"):  # by the layer, or by the types before it
        PositionSensitiveAxialAttention(4, 8, 2, 8, norm="instance")


def test_a_published_index_in_a_checkpoint_is_accepted_and_not_kept():
    published = PositionSensitive(8, 8, 2, 5)
    assert "flatten_index" in published.state_dict()
    layer = PositionSensitiveAxialAttention(8, 8, 2, 5)
    layer.load_state_dict(published.state_dict(), strict=True)
    assert set(layer.state_dict()) == set(published.state_dict()) - {"flatten_index"}
    assert "flatten_index" in published.state_dict(), "the checkpoint itself is left alone"


def test_the_block_is_the_published_chain_of_steps():
    torch.manual_seed(1)
    down = nn.Sequential(nn.Conv2d(6, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    block = awake(PositionSensitiveBlock(6, 8, 2, down, groups=2, kernel_size=6)).eval()
    x = torch.randn(2, 6, 6, 4)
    with torch.no_grad():
        inner = block.bn1(block.conv_down(x)).relu()
        inner = by_equations(block.hight_block, inner)
        inner = by_equations(block.width_block, inner).relu()
        expected = (block.bn2(block.conv_up(inner)) + down(x)).relu()
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 16, 3, 2)


def test_a_block_starts_as_its_shortcut():
    block = PositionSensitiveBlock(16, 8, groups=2, kernel_size=6)
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_training_never_holds_the_scores(monkeypatch):
    monkeypatch.setattr(position_sensitive, "CPU_SCORES", 1 << 17)
    x = torch.randn(1, 16, 32, 32)
    largest = []
    for layer in (PositionSensitive(16, 16, 8, 32), PositionSensitiveAxialAttention(16, 16, 8, 32)):
        with Largest() as watch:
            layer(x.requires_grad_()).sum().backward()
        largest.append(watch.elements)
    assert largest[0] >= 3 * 8 * 32**3, "the published formulation holds all three scores of every pair"
    assert largest[1] < 8 * 32**3 / 4


def test_fields_of_one_value_have_finite_gradients():
    layer = PositionSensitiveAxialAttention(4, 8, 2, 5)
    x = torch.zeros(2, 4, 5, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and all(weight.grad.isfinite().all() for weight in layer.parameters())


@pytest.mark.compile
def test_it_compiles_whole_and_exports():
    layer = awake(PositionSensitiveAxialAttention(8, 8, 2, 5)).eval()
    x = torch.randn(2, 8, 5, 4)
    weights = list(layer.parameters())
    expected = results(layer, weights, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, weights, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected[0], rtol=1e-4, atol=1e-4)
    training = torch.compile(layer.train(), fullgraph=True, backend="eager")
    torch.testing.assert_close(training(x), layer(x), rtol=1e-4, atol=1e-4)
