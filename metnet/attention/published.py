"""`load_published`, `dump_published`: weights under the names that the published modules give them."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metnet.attention.axial import AxialAttention
from metnet.attention.criss_cross import (
    ColumnAttention,
    CrissCrossAttention,
    RowAttention,
    RowColumnAttention,
)
from metnet.attention.external import ExternalAttention, MultiHeadExternalAttention, TokenExternalAttention
from metnet.attention.image_transformer import AxialImageTransformer
from metnet.attention.multihead import SelfAttention
from metnet.attention.position_sensitive import PositionSensitiveAxialAttention, PositionSensitiveBlock
from metnet.attention.positions import AxialPositionalEmbedding

KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "self_attention": (SelfAttention,),
    "axial_attention": (AxialAttention,),
    "axial_positional_embedding": (AxialPositionalEmbedding,),
    "axial_image_transformer": (AxialImageTransformer,),
    "criss_cross": (CrissCrossAttention,),
    "row_attention": (RowAttention,),
    "col_attention": (ColumnAttention,),
    "row_col": (RowColumnAttention,),
    "position_sensitive": (PositionSensitiveAxialAttention, PositionSensitiveBlock),
    "external": (ExternalAttention,),
    "external_token": (TokenExternalAttention,),
    "multihead_external": (MultiHeadExternalAttention,),
}


def load_published(kind: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts published weights into `module`, in place; what `state` holds is copied, and left alone.

    Also read are positions saved as a list (`params.0`, axial_attention before 0.6.1), and criss-cross, row
    and column weights without `gamma`, which some published code never saved: 0, and a warning. The index
    into the table of Axial-DeepLab (`flatten_index`) follows from its size, and is passed over.

    Raises:
        ValueError: for another kind, a module of another class, weights that are missing, left over or of
            another shape, or those of a transformer with another value of `reversible`.
    """
    _check_kind(kind, module)
    given = {_name(key): value for key, value in state.items() if not key.endswith("flatten_index")}
    if kind == "axial_image_transformer":
        _check_streams(module, given)
    wanted = module.state_dict()
    for key in wanted.keys() - given.keys():
        if key.rpartition(".")[2] == "gamma":
            warnings.warn(f"{key} is missing and becomes 0: the block passes on what it reads", stacklevel=2)
            given[key] = torch.zeros_like(wanted[key])
        elif key.endswith("num_batches_tracked"):  # not counted before torch 0.4.1
            given[key] = wanted[key]
    _check_weights(kind, wanted, given)
    module.load_state_dict(given, strict=True)


def dump_published(kind: str, module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights of `module` that the published module of this kind loads.

    Raises:
        ValueError: for another kind, a module of another class, or one that no published module equals.
    """
    _check_kind(kind, module)
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    for name, layer in module.named_modules():
        if isinstance(layer, PositionSensitiveAxialAttention):
            if layer.norm != "batch":
                raise ValueError(f"norm={layer.norm!r}: expected batch, the only norm of the published layer")
            place = torch.arange(layer.kernel_size, device=layer.relative.device)
            index = (place[:, None] - place + layer.kernel_size - 1).flatten()
            state[f"{name}.flatten_index" if name else "flatten_index"] = index
    return state


def _name(key: str) -> str:
    """The name of a weight here."""
    before, dot, number = key.rpartition(".")
    if dot and number.isdigit() and before.rpartition(".")[2] == "params":
        return f"{before.removesuffix('params')}param_{number}"
    return key


def _check_kind(kind: str, module: nn.Module) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if not isinstance(module, KINDS[kind]):
        names = " or ".join(each.__name__ for each in KINDS[kind])
        raise ValueError(f"module is a {type(module).__name__}: expected {names} for kind={kind!r}")


def _check_streams(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Two streams and one are different functions of the same numbers."""
    two = [".f.net." in key or ".g.net." in key for key in given if key.startswith("layers.")]
    has_two = any(".f.net." in key for key in module.state_dict())
    if two and all(two) != has_two:
        raise ValueError(
            f"state is of a transformer with reversible={not has_two}: expected reversible={has_two}; build "
            "the module as the weights were trained, or rename them with plain_keys or reversible_keys"
        )


def _check_weights(kind: str, wanted: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(
            f"state does not hold the weights of kind={kind!r}: "
            f"missing {', '.join(missing) or 'none'}; left over {', '.join(unknown) or 'none'}"
        )
    for key, value in wanted.items():
        if given[key].shape != value.shape:
            raise ValueError(
                f"{key} has shape {tuple(given[key].shape)}: expected {tuple(value.shape)}; "
                "build the module with the sizes that the weights were trained with"
            )
