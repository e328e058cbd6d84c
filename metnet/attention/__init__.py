"""Spatial attention, one family a file."""

from metnet.attention.axial import AxialAttention, PermuteToFrom, calculate_permutations
from metnet.attention.criss_cross import (
    ColumnAttention,
    CrissCrossAttention,
    RCCAModule,
    RowAttention,
    RowColumnAttention,
)
from metnet.attention.decoder import AxialDecoder, AxialSliceDecoder, ChannelEncoder, gumbel
from metnet.attention.external import ExternalAttention, MultiHeadExternalAttention, TokenExternalAttention
from metnet.attention.image_transformer import AxialImageTransformer, ChanLayerNorm, PreNorm, Sequential
from metnet.attention.multihead import SelfAttention
from metnet.attention.position_sensitive import PositionSensitiveAxialAttention, PositionSensitiveBlock
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.published import dump_published, load_published
from metnet.attention.reversible import Deterministic, ReversibleBlock, ReversibleSequence

__all__ = [
    "AxialAttention",
    "AxialDecoder",
    "AxialImageTransformer",
    "AxialPositionalEmbedding",
    "AxialSliceDecoder",
    "ChanLayerNorm",
    "ChannelEncoder",
    "ColumnAttention",
    "CrissCrossAttention",
    "Deterministic",
    "ExternalAttention",
    "MultiHeadExternalAttention",
    "PermuteToFrom",
    "PositionSensitiveAxialAttention",
    "PositionSensitiveBlock",
    "PreNorm",
    "RCCAModule",
    "ReversibleBlock",
    "ReversibleSequence",
    "RowAttention",
    "RowColumnAttention",
    "SelfAttention",
    "Sequential",
    "TokenExternalAttention",
    "calculate_permutations",
    "dump_published",
    "gumbel",
    "load_published",
]
