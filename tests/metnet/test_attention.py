import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.attention.axial import AxialAttention
from metnet.attention.multihead import SelfAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ChannelNorm, ResidualBlock


@torch.no_grad()
def along_a_line(attention, line):
    """Attention of one line (place, dim) in plain loops, from the equations."""
    e = attention.to_q.weight.shape[0] // attention.heads
    q = line @ attention.to_q.weight.T
    k, v = (line @ attention.to_kv.weight.T).chunk(2, dim=1)
    mixed = torch.zeros_like(q)
    for head, i in itertools.product(range(attention.heads), range(len(line))):
        part = slice(head * e, (head + 1) * e)
        weights = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(e)) for j in range(len(line))]
        for j, weight in enumerate(weights):
            mixed[i, part] += weight / sum(weights) * v[j, part]
    return mixed @ attention.to_out.weight.T + attention.to_out.bias


def test_axial_attention_is_the_sum_of_the_lines_through_each_place():
    attention = AxialAttention(dim=6, heads=2, dim_index=1).double()
    x = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for column in range(4):
        expected[0, :, :, column] += along_a_line(attention.axial_attentions[0].fn, x[0, :, :, column].T).T
    for row in range(3):
        expected[0, :, row] += along_a_line(attention.axial_attentions[1].fn, x[0, :, row].T).T
    torch.testing.assert_close(attention(x), expected)


def test_one_axis_after_the_other_starts_with_the_first():
    attention = AxialAttention(dim=6, heads=2, dim_index=1, sum_axial_out=False).double()
    x = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    down = torch.stack(
        [along_a_line(attention.axial_attentions[0].fn, x[0, :, :, j].T).T for j in range(4)], dim=2
    )
    expected = torch.stack(
        [along_a_line(attention.axial_attentions[1].fn, down[:, i].T).T for i in range(3)], dim=1
    )
    torch.testing.assert_close(attention(x)[0], expected)


@pytest.mark.parametrize("moved", [(0, 0), (2, 3), (5, 4)])
def test_a_pixel_is_seen_from_its_own_row_and_column_only(moved):
    attention = AxialAttention(dim=8, heads=2, dim_index=1)
    storm = torch.randn(1, 8, 6, 5)
    changed_storm = storm.clone()
    changed_storm[:, :, moved[0], moved[1]] += 1.0

    changed = (attention(storm) - attention(changed_storm)).abs().amax(dim=(0, 1)) > 1e-6

    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[moved[0]] = expected[:, moved[1]] = True
    assert torch.equal(changed, expected)


def test_one_axis_after_the_other_sees_every_pixel():
    attention = AxialAttention(dim=8, heads=2, dim_index=1, sum_axial_out=False).double()
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64, requires_grad=True)
    attention(x)[0, :, 2, 3].sum().backward()
    assert (x.grad.abs().amax(dim=(0, 1)) > 0).all()


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    index=st.integers(1, 4),
    summed=st.booleans(),
    negative=st.booleans(),
)
def test_where_the_channels_stand_changes_nothing_but_the_layout(sizes, index, summed, negative):
    torch.manual_seed(len(sizes))
    dims = len(sizes) + 2
    index = min(index, dims - 1)
    last = AxialAttention(4, len(sizes), heads=2, dim_index=-1, sum_axial_out=summed)
    here = AxialAttention(
        4, len(sizes), heads=2, dim_index=index - dims if negative else index, sum_axial_out=summed
    )
    here.load_state_dict(last.state_dict())
    x = torch.randn(2, *sizes, 4)
    torch.testing.assert_close(here(x.movedim(-1, index)).movedim(index, -1), last(x))


def test_an_empty_batch_and_a_strided_input_are_fine():
    attention = AxialAttention(dim=8, heads=2, dim_index=1)
    assert attention(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    x = torch.randn(2, 8, 8, 6)[:, :, ::2]
    torch.testing.assert_close(attention(x), attention(x.contiguous()))


@pytest.mark.parametrize("index", [0, -4, 4, 7, -9])
def test_a_dim_index_that_names_no_channel_dimension_is_refused(index):
    with pytest.raises(ValueError, match=f"dim_index={index}:"):
        AxialAttention(dim=8, dim_index=index)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dim": 10, "heads": 8}, "dim=10 must be a multiple of heads=8"),
        ({"dim": 4, "heads": 8}, "dim=4 must be a multiple of heads=8"),
        ({"dim": 8, "heads": 0}, "heads=0"),
        ({"dim": 8, "dim_heads": 0}, "dim_heads=0"),
        ({"dim": 8, "num_dimensions": 0}, "num_dimensions=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        AxialAttention(**arguments)


def test_dim_heads_frees_dim_from_the_heads():
    x = torch.randn(2, 10, 3, 3)
    assert AxialAttention(dim=10, heads=4, dim_heads=3, dim_index=1)(x).std() > 0


@pytest.mark.parametrize("shape", [(1, 7, 4, 4), (1, 8, 4), (1, 8, 4, 4, 4)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="x has shape"):
        AxialAttention(dim=8, heads=2, dim_index=1)(torch.zeros(shape))


def test_cross_attention_mixes_only_what_it_is_given():
    attention = SelfAttention(dim=4, heads=2)
    x = torch.randn(2, 5, 4)
    same = torch.randn(2, 1, 4)
    out = attention(x, kv=same.expand(2, 3, 4))
    value = attention.to_out(attention.to_kv(same).chunk(2, dim=2)[1])
    torch.testing.assert_close(out, value.expand(2, 5, 4))


def test_positions_are_the_sum_of_one_vector_per_axis():
    embed = AxialPositionalEmbedding(4, shape=(3, 5))
    x = torch.randn(2, 4, 3, 5)
    added = embed(x) - x
    expected = embed.param_0[0, :, :, 0][:, :, None] + embed.param_1[0, :, 0][:, None, :]
    torch.testing.assert_close(added, expected.expand(2, 4, 3, 5))


@pytest.mark.parametrize(
    ("index", "shape"), [(1, (2, 4, 3, 5)), (-3, (2, 4, 3, 5)), (3, (2, 3, 5, 4)), (-1, (2, 3, 5, 4))]
)
def test_positions_know_where_the_channels_stand(index, shape):
    torch.manual_seed(0)
    embed = AxialPositionalEmbedding(4, shape=(3, 5), emb_dim_index=index, interpolate=True)
    added = embed(torch.zeros(shape)).movedim(index, 1)
    other = AxialPositionalEmbedding(4, shape=(3, 5))
    with torch.no_grad():
        for name in ("param_0", "param_1"):
            other.get_parameter(name).copy_(embed.get_parameter(name).movedim(index, 1))
    torch.testing.assert_close(added, other(torch.zeros(2, 4, 3, 5)))
    stretched = embed(torch.zeros(2, 4, 6, 10).movedim(1, index))
    torch.testing.assert_close(stretched.movedim(index, 1)[:, :, ::2].mean(dim=3), _halves(other))


def _halves(embed):
    """The even rows of the vectors at twice the rows: each a quarter of the way back to its neighbour."""
    rows = embed.param_0[:, :, :, 0]
    before = torch.cat([rows[:, :, :1], rows[:, :, :-1]], dim=2)
    return (0.75 * rows + 0.25 * before + embed.param_1.mean(dim=3)).expand(2, -1, -1)


def test_another_grid_is_refused_and_a_size_of_one_is_not_broadcast():
    embed = AxialPositionalEmbedding(4, shape=(5, 6))
    for grid in ((1, 6), (5, 1), (4, 6)):
        with pytest.raises(ValueError, match=r"expected shape=\(5, 6\)"):
            embed(torch.zeros(1, 4, *grid))
    with pytest.raises(ValueError, match="dim=4"):
        embed(torch.zeros(1, 1, 5, 6))


def test_interpolated_positions_are_exact_on_the_learned_grid_and_monotone_between():
    embed = AxialPositionalEmbedding(2, shape=(4, 4), interpolate=True)
    exact = AxialPositionalEmbedding(2, shape=(4, 4))
    ramp = torch.arange(4.0)
    with torch.no_grad():
        for module in (embed, exact):
            module.param_0.copy_(ramp.reshape(1, 1, 4, 1).expand(1, 2, 4, 1))
            module.param_1.zero_()
    x = torch.zeros(1, 2, 4, 4)
    assert torch.equal(embed(x), exact(x))
    finer = embed(torch.zeros(1, 2, 16, 3))[0, 0]
    assert torch.equal(finer[:, 0], finer[:, 2])
    assert (finer[:, 0].diff() >= 0).all()
    assert (finer[0, 0], finer[-1, 0]) == (0.0, 3.0)


@pytest.mark.parametrize("index", [0, -4, 4])
def test_an_emb_dim_index_that_names_no_channel_dimension_is_refused(index):
    with pytest.raises(ValueError, match=f"emb_dim_index={index}:"):
        AxialPositionalEmbedding(4, shape=(3, 5), emb_dim_index=index)


def test_eight_blocks_keep_what_tells_one_pixel_from_the_next():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 32, 32)
    before = float(x.std(dim=(2, 3)).mean() / x.square().mean().sqrt())
    with torch.no_grad():
        for _ in range(8):
            x = ResidualBlock(AxialAttention(64, heads=4, dim_index=1), 64, 8)(x, torch.randn(1, 8))
    after = float(x.std(dim=(2, 3)).mean() / x.square().mean().sqrt())
    assert 0.3 < after / before < 3


def test_every_weight_of_a_block_gets_a_gradient_and_samples_do_not_mix():
    torch.manual_seed(0)
    block = ResidualBlock(AxialAttention(8, heads=2, dim_index=1), 8, 4)
    x, told = torch.randn(3, 8, 5, 6), torch.randn(3, 4)
    block(x, told).square().sum().backward()
    assert [name for name, weight in block.named_parameters() if not weight.grad.abs().sum() > 0] == []
    torch.testing.assert_close(block(x, told)[1:2], block(x[1:2], told[1:2]))


def test_the_channel_norm_looks_at_one_pixel_at_a_time():
    norm = ChannelNorm(6)
    x = torch.randn(1, 6, 4, 4)
    louder = x.clone()
    louder[:, :, 0, 0] *= 50
    torch.testing.assert_close(norm(louder), norm(x), atol=1e-4, rtol=1e-4)
