import copy

import axial_attention
import pytest
import torch
from safetensors.torch import load, save

from benchmarks.published.axial_deeplab import PositionSensitive
from benchmarks.published.ccnet import CrissCross
from benchmarks.published.eanet import External
from metnet.attention import (
    AxialAttention,
    AxialImageTransformer,
    AxialPositionalEmbedding,
    ColumnAttention,
    CrissCrossAttention,
    ExternalAttention,
    MultiHeadExternalAttention,
    PositionSensitiveAxialAttention,
    RowAttention,
    RowColumnAttention,
    SelfAttention,
    TokenExternalAttention,
    dump_published,
    load_published,
)
from tests.metnet.attention.check import awake

published = axial_attention.axial_attention
MAP = (2, 16, 5, 6)
PAIRS = {
    "self_attention": (lambda: published.SelfAttention(16, 4), lambda: SelfAttention(16, 4), (3, 5, 16)),
    "axial_attention": (
        lambda: published.AxialAttention(16, heads=4, dim_index=1),
        lambda: AxialAttention(16, heads=4, dim_index=1),
        MAP,
    ),
    "axial_positional_embedding": (
        lambda: published.AxialPositionalEmbedding(16, (5, 6)),
        lambda: AxialPositionalEmbedding(16, (5, 6)),
        MAP,
    ),
    "axial_image_transformer": (
        lambda: published.AxialImageTransformer(16, 2, axial_pos_emb_shape=(5, 6)),
        lambda: AxialImageTransformer(16, 2, axial_pos_emb_shape=(5, 6)),
        MAP,
    ),
    "criss_cross": (lambda: CrissCross(16), lambda: CrissCrossAttention(16), MAP),
    "position_sensitive": (
        lambda: PositionSensitive(16, 16, 4, 6, width=True),
        lambda: PositionSensitiveAxialAttention(16, 16, 4, 6, width=True),
        MAP,
    ),
    "external": (lambda: External(16), lambda: ExternalAttention(16, eps=1e-9), MAP),
}
ALONE = {
    "row_attention": lambda: RowAttention(16, 2),
    "col_attention": lambda: ColumnAttention(16, 2),
    "row_col": lambda: RowColumnAttention(16, 2),
    "external_token": lambda: TokenExternalAttention(16),
    "multihead_external": lambda: MultiHeadExternalAttention(16),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_published_weights_give_the_published_output_and_go_back(kind):
    make_theirs, make_ours, shape = PAIRS[kind]
    torch.manual_seed(0)
    theirs, ours = awake(make_theirs()).double(), make_ours().double()
    load_published(kind, ours, theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-8)

    other = make_theirs().double()
    other.load_state_dict(load(save(dump_published(kind, ours))), strict=True)
    torch.testing.assert_close(other.eval()(x), theirs.eval()(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ALONE)
def test_a_dump_is_loaded_again(kind):
    torch.manual_seed(0)
    one, other = awake(ALONE[kind]()), ALONE[kind]()
    state = dump_published(kind, one)
    load_published(kind, other, state)
    for name, weight in other.named_parameters():
        assert torch.equal(weight, one.get_parameter(name)), name
        assert weight.data_ptr() not in [value.data_ptr() for value in state.values()]


def test_a_transformer_that_is_not_reversible_keeps_its_own_names_and_output():
    theirs = awake(published.AxialImageTransformer(16, 1, reversible=False)).double()
    ours = AxialImageTransformer(16, 1, reversible=False).double()
    load_published("axial_image_transformer", ours, theirs.state_dict())
    x = torch.randn(MAP, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("reversible", [True, False])
def test_one_stream_is_not_loaded_as_two(reversible):
    state = AxialImageTransformer(8, 1, reversible=not reversible).state_dict()
    with pytest.raises(ValueError, match=f"expected reversible={reversible}"):
        load_published("axial_image_transformer", AxialImageTransformer(8, 1, reversible=reversible), state)


def test_positions_saved_as_a_list_are_read():
    embed = AxialPositionalEmbedding(4, (3, 5))
    vectors = [torch.randn(1, 4, 3, 1), torch.randn(1, 4, 1, 5)]
    state = {f"params.{n}": vector for n, vector in enumerate(vectors)}
    load_published("axial_positional_embedding", embed, state)
    assert torch.equal(embed.param_0, vectors[0]) and torch.equal(embed.param_1, vectors[1])
    trunk = AxialImageTransformer(4, 1, heads=2, axial_pos_emb_shape=(3, 5))
    state = {name.replace("param_", "params."): value for name, value in trunk.state_dict().items()}
    assert "pos_emb.params.0" in state
    load_published("axial_image_transformer", trunk, {**state, "pos_emb.params.0": vectors[0]})
    assert torch.equal(trunk.pos_emb.param_0, vectors[0])


@pytest.mark.parametrize("kind", ["criss_cross", "row_attention", "col_attention", "row_col"])
def test_a_gamma_that_was_never_saved_becomes_zero_with_a_warning(kind):
    block = awake({**ALONE, "criss_cross": PAIRS["criss_cross"][1]}[kind]())
    state = {key: value for key, value in block.state_dict().items() if not key.endswith("gamma")}
    with pytest.warns(UserWarning, match="gamma is missing"):
        load_published(kind, block, state)
    assert [float(w) for name, w in block.named_parameters() if name.endswith("gamma") and w.any()] == []


def test_trained_memories_that_were_tied_once_do_not_overwrite_each_other():
    """The published module, fresh on a CPU, ends up with linear_1 transposed in the place of linear_0."""
    state = dump_published("external", awake(ExternalAttention(16)))
    assert not torch.equal(state["linear_0.weight"], state["linear_1.weight"].transpose(0, 1))
    fresh = ExternalAttention(16, tie_init=True)
    load_published("external", fresh, state)
    for name in ("linear_0", "linear_1"):
        assert torch.equal(fresh.get_submodule(name).weight, state[f"{name}.weight"])


def test_the_index_into_the_table_is_passed_over_and_given_back():
    layer = PositionSensitiveAxialAttention(16, 16, 4, kernel_size=3)
    state = dump_published("position_sensitive", layer)
    assert state["flatten_index"].tolist() == [2, 1, 0, 3, 2, 1, 4, 3, 2]
    load_published("position_sensitive", layer, state)
    del state["flatten_index"]
    load_published("position_sensitive", layer, state)
    bare = PositionSensitiveAxialAttention(16, 16, 4, kernel_size=3, norm="layer")
    with pytest.raises(ValueError, match="norm='layer'"):
        dump_published("position_sensitive", bare)


def test_what_does_not_fit_is_named():
    attention = SelfAttention(16, 4)
    state = attention.state_dict()
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="kind='attention': expected one of self_attention"):
        load_published("attention", attention, state)
    with pytest.raises(ValueError, match="SelfAttention: expected CrissCrossAttention"):
        load_published("criss_cross", attention, state)
    with pytest.raises(ValueError, match=r"missing to_q.weight; left over to_p.weight"):
        renamed = {"to_p.weight" if key == "to_q.weight" else key: value for key, value in state.items()}
        load_published("self_attention", attention, renamed)
    with pytest.raises(ValueError, match=r"to_q.weight has shape \(8, 16\): expected \(16, 16\)"):
        load_published("self_attention", attention, {**state, "to_q.weight": torch.zeros(8, 16)})
    for key, value in attention.state_dict().items():
        assert torch.equal(value, before[key])
