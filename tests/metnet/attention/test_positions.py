import axial_attention
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metnet.attention.positions import AxialPositionalEmbedding
from tests.metnet.attention.check import check_block


def by_the_equations(embed, x):
    """Every place plus its vector of each axis, place by place."""
    channels = x.movedim(embed.index, -1).clone()
    for place in torch.cartesian_prod(*(torch.arange(size) for size in embed.shape)).view(
        -1, len(embed.shape)
    ):
        for n, at in enumerate(place.tolist()):
            vectors = embed.get_parameter(f"param_{n}").movedim(embed.index, -1).reshape(embed.shape[n], -1)
            channels[:, *place.tolist()] += vectors[at]
    return channels.movedim(-1, embed.index)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    index=st.integers(-5, 5).filter(bool),
    interpolate=st.booleans(),
)
def test_every_place_gets_the_vectors_of_its_own_row_and_column(shape, index, interpolate):
    dims = len(shape)
    index = max(-dims - 1, min(dims + 1, index))
    embed = AxialPositionalEmbedding(3, shape, index, interpolate).double()
    x = torch.randn(2, *shape, 3, dtype=torch.float64).movedim(-1, index)
    torch.testing.assert_close(embed(x), by_the_equations(embed, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 4)])
def test_outputs_and_gradients_are_the_published_ones(shape):
    published = axial_attention.AxialPositionalEmbedding(6, shape).double()
    ours = AxialPositionalEmbedding(6, shape).double()
    ours.load_state_dict(published.state_dict(), strict=True)
    x = torch.randn(2, 6, *shape, dtype=torch.float64)
    weight = torch.randn_like(x)
    torch.testing.assert_close(ours(x), published(x), rtol=0, atol=1e-12)
    for module in (ours, published):
        (module(x) * weight).sum().backward()
    for one, other in zip(ours.parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", [(1, 6), (5, 1), (1, 1)])
def test_a_grid_with_a_side_of_one_does_not_grow(grid):
    """The published (1, 4, 1, 6) -> (1, 4, 5, 6)."""
    x = torch.randn(1, 4, *grid)
    with pytest.raises(ValueError, match=r"expected shape=\(5, 6\)"):
        AxialPositionalEmbedding(4, (5, 6))(x)
    assert AxialPositionalEmbedding(4, (5, 6), interpolate=True)(x).shape == x.shape


@settings(max_examples=30)
@given(trained=st.integers(2, 6), factor=st.integers(1, 4), index=st.sampled_from([1, 2, 3]))
def test_a_ramp_stays_a_ramp_on_any_grid(trained, factor, index):
    embed = AxialPositionalEmbedding(2, (trained, 3), index, interpolate=True).double()
    ramp = torch.arange(trained, dtype=torch.float64)
    with torch.no_grad():
        for n, axis in enumerate(embed.axes):
            sizes = [-1 if dim == axis else 1 for dim in range(4)]
            weight = embed.get_parameter(f"param_{n}")
            weight.copy_((ramp if n == 0 else torch.zeros(3)).view(sizes).expand_as(weight))
    x = torch.zeros(1, 2, trained * factor, 5, dtype=torch.float64).movedim(1, index)
    rows = embed(x).movedim(index, 1)[0, 0, :, 0]
    centres = (torch.arange(trained * factor, dtype=torch.float64) + 0.5) / factor - 0.5
    torch.testing.assert_close(rows, centres.clamp(0, trained - 1))


def test_it_behaves_as_a_block():
    check_block(lambda: AxialPositionalEmbedding(16, (6, 5), scale=0.02))
    check_block(lambda: AxialPositionalEmbedding(16, (3, 9), interpolate=True))


@pytest.mark.parametrize(("dim", "shape"), [(0, (3, 4)), (8, (0, 6)), (8, (3, -1))])
def test_a_grid_without_places_is_refused(dim, shape):
    with pytest.raises(ValueError, match=rf"dim={dim}, shape=.*: expected at least 1 of each"):
        AxialPositionalEmbedding(dim, shape)


def test_the_scale_is_the_standard_deviation_at_the_start():
    torch.manual_seed(0)
    weights = torch.cat(
        [w.flatten() for w in AxialPositionalEmbedding(256, (40, 40), scale=0.02).parameters()]
    )
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
