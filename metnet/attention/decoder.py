"""`AxialDecoder`: a map drawn pixel by pixel, each from all before it (Ho et al. 2019, arXiv 1912.12180)."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

SPREAD = 5.0  # standard deviation of the embeddings at the start, times sqrt(dim)
NEARLY_ZERO = 1e-10  # variance of the layers that end a branch: the first logits are uniform


def gumbel(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gumbel noise: the place of the largest of logits + noise is a draw from their softmax."""
    waiting = torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator)
    return -waiting.clamp(min=torch.finfo(waiting.dtype).tiny).log()


class _Seen:
    """The keys and values of the places that a masked block has been through, line by line."""

    def __init__(self, like: Tensor, lines: int, heads: int, places: int, e: int):
        self.k = like.new_empty(lines, heads, places, e)
        self.v = torch.empty_like(self.k)
        self.count = 0

    def joined_by(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values including these, of the next place."""
        at = self.count
        self.count = at + 1
        self.k[:, :, at : self.count] = k
        self.v[:, :, at : self.count] = v
        return self.k[:, :, : self.count], self.v[:, :, : self.count]


class DecoderBlock(nn.Module):
    """A pre-norm transformer block along the rows or the columns of a map, its channels last.

    Args:
        dim: channels.
        heads: heads; each has `dim / heads` channels.
        axis: the lines that attend to themselves.
        masked: whether a place sees only itself and what comes before it on its line.
        mlp_factor: width of the dense network over `dim`.
    """

    def __init__(
        self, dim: int, heads: int, axis: Literal["row", "column"], masked: bool, mlp_factor: int = 1
    ):
        super().__init__()
        self.heads, self.e = heads, dim // heads
        self.axis = axis
        self.masked = masked
        self.ln1 = nn.LayerNorm(dim)
        self.q = _dense(dim, dim)
        self.k = _dense(dim, dim)
        self.v = _dense(dim, dim)
        self.o = _dense(dim, dim, NEARLY_ZERO)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp_in = _dense(dim, mlp_factor * dim)
        self.mlp_out = _dense(mlp_factor * dim, dim, NEARLY_ZERO)

    def forward(
        self, x: Float[Tensor, "batch y x dim"], dropout: float = 0.0
    ) -> Float[Tensor, "batch y x dim"]:
        """The map after attention and dense network, each added to what it read."""
        lines = x if self.axis == "row" else x.transpose(1, 2)
        split = "batch line place (head e) -> (batch line) head place e"
        normed = self.ln1(lines)
        q, k, v = (rearrange(to(normed), split, head=self.heads) for to in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.masked)
        mixed = rearrange(
            mixed, "(batch line) head place e -> batch line place (head e)", line=lines.shape[1]
        )
        lines = lines + F.dropout(self.o(mixed), dropout)
        lines = lines + F.dropout(self._dense(lines), dropout)
        return lines if self.axis == "row" else lines.transpose(1, 2)

    def nothing_seen(self, lines: int, places: int, like: Tensor) -> _Seen:
        """Room for what `step` will have seen of that many lines."""
        return _Seen(like, lines, self.heads, places, self.e)

    def step(self, x: Float[Tensor, "line dim"], seen: _Seen) -> Float[Tensor, "line dim"]:
        """The next place of every line, from the keys and values of those before it, which it joins."""
        normed = self.ln1(x)
        q, k, v = (to(normed).view(len(x), self.heads, 1, self.e) for to in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, *seen.joined_by(k, v))
        x = x + self.o(mixed.reshape(x.shape))
        return x + self._dense(x)

    def _dense(self, x: Tensor) -> Tensor:
        wide = self.mlp_in(self.ln2(x))
        narrowed: Tensor = self.mlp_out(wide * torch.sigmoid(1.702 * wide))
        return narrowed


class AxialDecoder(nn.Module):
    """The probability of a map of bins as a product over its pixels, in raster order.

    An outer network reads all rows above, an inner one what lies to the left in the row. Each pixel's
    logits depend on exactly the pixels before it, and on `cond` at its own and all earlier places: what lies
    elsewhere must have been mixed into `cond` already. Channels last, as are the logits.

    Args:
        height: rows of the map.
        width: its columns.
        num_bins: bins of a pixel.
        dim: channels inside.
        heads: heads of each attention.
        num_outer_layers: layers over the rows above: along rows, down columns, in turn; an even number.
        num_inner_layers: layers along the row.
        mlp_factor: width of the dense networks over `dim`.
        cond_dim: channels of the map that the decoder is conditioned on; none without it.
        dropout: the share of what a layer adds that is dropped in training, and never while sampling.

    Raises:
        ValueError: naming the argument that cannot be.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_bins: int,
        dim: int,
        heads: int,
        num_outer_layers: int,
        num_inner_layers: int,
        mlp_factor: int = 1,
        cond_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_sizes(
            height=height, width=width, num_bins=num_bins, dim=dim, heads=heads, mlp_factor=mlp_factor
        )
        _check_sizes(num_inner_layers=num_inner_layers, num_outer_layers=num_outer_layers)
        _check_shared(dim, heads)
        _check_even(num_outer_layers=num_outer_layers)
        self.height, self.width, self.num_bins, self.cond_dim = height, width, num_bins, cond_dim
        self.dropout = dropout
        self.emb = nn.Embedding(num_bins, dim)
        nn.init.normal_(self.emb.weight, std=SPREAD / math.sqrt(dim))
        self.pos_h = _positions(height, dim)
        self.pos_w = _positions(width, dim)
        self.outer = _row_column_pairs(num_outer_layers, dim, heads, mlp_factor, masked=True)
        self.inner = nn.ModuleList(
            DecoderBlock(dim, heads, "row", masked=True, mlp_factor=mlp_factor)
            for _ in range(num_inner_layers)
        )
        self.final_ln = nn.LayerNorm(dim)
        self.final = _dense(dim, num_bins, NEARLY_ZERO)
        self.cond_proj = None if cond_dim is None else _dense(cond_dim, dim)

    def logits(
        self, x: Int[Tensor, "batch y x"], cond: Float[Tensor, "some y x cond"] | None = None
    ) -> Float[Tensor, "batch y x bin"]:
        """The unnormalised log-probabilities of each pixel's bins, given all pixels before it.

        Args:
            x: bins, 0 to `num_bins - 1`.
            cond: what the maps are conditioned on, if there is a `cond_dim`; a single one serves all maps.

        Raises:
            ValueError: for another grid, a bin that is none, or a `cond` that does not fit.
        """
        _check_bins(x, (self.height, self.width), self.num_bins)
        dropout = self.dropout if self.training else 0.0
        here = _known_beforehand(self.pos_h, self.pos_w, self.cond_proj, cond, len(x))
        pixels = self.emb(x.long())
        above = pixels + here
        for block in self.outer:
            above = block(above, dropout)
        row = F.pad(pixels[:, :, :-1], (0, 0, 1, 0)) + F.pad(above[:, :-1], (0, 0, 0, 0, 1, 0)) + here
        for block in self.inner:
            row = block(row, dropout)
        unnormed: Tensor = self.final(self.final_ln(row))
        return unnormed

    forward = logits

    def log_prob(
        self, x: Int[Tensor, "batch y x"], cond: Float[Tensor, "some y x cond"] | None = None
    ) -> Float[Tensor, "batch"]:
        """The natural logarithm of each map's probability.

        Raises:
            ValueError: as `logits` does.
        """
        return _log_prob(self.logits(x, cond), x)

    @torch.no_grad()
    def sample(
        self,
        noise: Float[Tensor, "batch y x bin"],
        cond: Float[Tensor, "some y x cond"] | None = None,
        temperature: float | int = 1.0,
    ) -> Int[Tensor, "batch y x"]:
        """Draws maps: in raster order, the bin with the largest of logits + `temperature` * noise.

        Keys and values are kept, so that a map of N pixels costs O(N sqrt(N)), and the members of an
        ensemble go through the network together.

        Args:
            noise: Gumbel noise (`gumbel`), one field a map; the same noise draws the same map.
            cond: as in `logits`; a single one serves all maps.
            temperature: 1 draws from the distribution, less draws likelier maps, 0 the likeliest bins.

        Raises:
            ValueError: for another grid, NaN in the noise, or a `temperature` or `cond` that does not fit.
        """
        noise = _tempered(noise, temperature, (self.height, self.width, self.num_bins))
        batch = len(noise)
        here = _known_beforehand(self.pos_h, self.pos_w, self.cond_proj, cond, batch)
        here = here.expand(batch, -1, -1, -1)
        above = torch.zeros_like(here[:, 0])
        columns = [b.nothing_seen(batch * self.width, self.height, here) for b in _blocks(self.outer)[1::2]]
        rows: list[Tensor] = []
        for y in range(self.height):
            if y > 0:
                above = self._read_row(self.emb(rows[-1]) + here[:, y - 1], columns)
            rows.append(self._drawn_row(above + here[:, y], noise[:, y]))
        return torch.stack(rows, dim=1)

    def _drawn_row(self, known: Tensor, noise: Tensor) -> Tensor:
        """The bins of a row, one after the other; `known` is all that is known without the row itself."""
        layers = [(b, b.nothing_seen(len(known), self.width, known)) for b in _blocks(self.inner)]
        left = torch.zeros_like(known[:, 0])
        drawn: list[Tensor] = []
        for x in range(self.width):
            pixel = left + known[:, x]
            for block, seen in layers:
                pixel = block.step(pixel, seen)
            drawn.append((self.final(self.final_ln(pixel)) + noise[:, x]).argmax(-1))
            left = self.emb(drawn[-1])
        return torch.stack(drawn, dim=1)

    def _read_row(self, row: Tensor, columns: Sequence[_Seen]) -> Tensor:
        """What the row below learns from all rows so far, of which `row` is the last."""
        shape = row.shape
        layers = _blocks(self.outer)
        for along, down, seen in zip(layers[::2], layers[1::2], columns, strict=True):
            row = along(row[:, None])
            row = down.step(row.reshape(-1, shape[-1]), seen).view(shape)
        return row


class ChannelEncoder(nn.Module):
    """What the earlier slices of a series (lead times, variables) say of the next, as a map to condition on.

    The earlier slices, scaled to 0..1, and which slice is to come go through a 3 x 3 convolution and unmasked
    attention along rows and down columns, so that every place of the result knows of every place before.

    Args:
        num_slices: slices of the series.
        num_layers: layers along rows, down columns, in turn; an even number.
        height, width, num_bins, dim, heads, mlp_factor, cond_dim, dropout: as for `AxialDecoder`.

    Raises:
        ValueError: naming the argument that cannot be.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_bins: int,
        num_slices: int,
        dim: int,
        heads: int,
        num_layers: int,
        mlp_factor: int = 1,
        cond_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_sizes(height=height, width=width, num_bins=num_bins, num_slices=num_slices)
        _check_sizes(dim=dim, heads=heads, mlp_factor=mlp_factor)
        _check_shared(dim, heads)
        _check_even(num_layers=num_layers)
        self.height, self.width, self.num_bins, self.num_slices = height, width, num_bins, num_slices
        self.dropout = dropout
        self.pos_h = _positions(height, dim)
        self.pos_w = _positions(width, dim)
        self.cond_proj = None if cond_dim is None else _dense(cond_dim, dim)
        self.conv = nn.Conv2d(2 * num_slices, dim, 3, padding=1)
        _scaled_variance(self.conv)
        self.layers = _row_column_pairs(num_layers, dim, heads, mlp_factor, masked=False)

    def forward(
        self,
        slices: Int[Tensor, "batch slice y x"],
        index: Int[Tensor, "batch"],
        cond: Float[Tensor, "batch y x cond"] | None = None,
        dropout: float | None = None,
    ) -> Float[Tensor, "batch y x dim"]:
        """The map to condition slice `index` on; that slice and all after it are not looked at.

        Args:
            slices: bins; where they are not looked at, any.
            index: the number of each sample's slice, from 0.
            cond: as for `AxialDecoder`.
            dropout: by default the constructor's in training, none in evaluation.

        Raises:
            ValueError: for another grid or number of slices, or a `cond` that does not fit.
        """
        expected = (self.num_slices, self.height, self.width)
        if slices.shape[1:] != expected:
            raise ValueError(f"slices has shape {tuple(slices.shape)}: expected (batch, {expected})")
        if dropout is None:
            dropout = self.dropout if self.training else 0.0
        to_come = F.one_hot(index.long(), self.num_slices)[:, :, None, None].to(self.pos_h.dtype)
        is_earlier = 1 - to_come.cumsum(dim=1)
        scaled = slices * is_earlier / max(1, self.num_bins - 1)
        told = self.conv(torch.cat([scaled, to_come.expand_as(scaled)], dim=1)).permute(0, 2, 3, 1)
        told = told + _known_beforehand(self.pos_h, self.pos_w, self.cond_proj, cond, len(slices))
        for block in _blocks(self.layers):
            told = block(told, dropout)
        mixed: Tensor = told
        return mixed


class AxialSliceDecoder(nn.Module):
    """A series of maps, slice after slice: what the encoder makes of the earlier ones conditions the decoder.

    With lead times for slices, its samples are ensemble members that cohere in space and in time.

    Args:
        encoder: reads the earlier slices, and a `cond` of its own.
        decoder: draws one slice; its `cond_dim` is the encoder's `dim`.

    Raises:
        ValueError: for an encoder and a decoder that do not fit.
    """

    def __init__(self, encoder: ChannelEncoder, decoder: AxialDecoder):
        super().__init__()
        dim = encoder.conv.out_channels
        if decoder.cond_dim != dim:
            raise ValueError(f"decoder has cond_dim={decoder.cond_dim}: expected the encoder's dim={dim}")
        for name in ("height", "width", "num_bins"):
            if getattr(encoder, name) != getattr(decoder, name):
                both = f"{getattr(encoder, name)} and {getattr(decoder, name)}"
                raise ValueError(f"encoder and decoder have {name}={both}: expected the same")
        self.encoder = encoder
        self.decoder = decoder

    def logits(
        self, x: Int[Tensor, "batch slice y x"], cond: Float[Tensor, "batch y x cond"] | None = None
    ) -> Float[Tensor, "batch slice y x bin"]:
        """The unnormalised log-probabilities of all pixels, given earlier slices and earlier pixels."""
        _check_bins(x, (self.encoder.num_slices, *self._grid), self.decoder.num_bins)
        each = [self._slice_logits(x, self._all_at(n, x), cond) for n in range(x.shape[1])]
        return torch.stack(each, dim=1)

    forward = logits

    def log_prob(
        self, x: Int[Tensor, "batch slice y x"], cond: Float[Tensor, "batch y x cond"] | None = None
    ) -> Float[Tensor, "batch"]:
        """The natural logarithm of each series' probability."""
        return _log_prob(self.logits(x, cond), x)

    def slice_log_prob(
        self,
        x: Int[Tensor, "batch slice y x"],
        index: Int[Tensor, "one_each"],
        cond: Float[Tensor, "batch y x cond"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """`log_prob` of one slice of each series given those before it; draw `index` at random to train.

        Raises:
            ValueError: for other bins, or an `index` of another length or beyond the slices.
        """
        _check_bins(x, (self.encoder.num_slices, *self._grid), self.decoder.num_bins)
        if index.shape != x.shape[:1]:
            raise ValueError(
                f"index has shape {tuple(index.shape)}: expected one for each of {len(x)} series"
            )
        _check_values("index", index, self.encoder.num_slices, "num_slices")
        return _log_prob(self._slice_logits(x, index, cond), _slice(x, index))

    @torch.no_grad()
    def sample(
        self,
        noise: Float[Tensor, "batch slice y x bin"],
        cond: Float[Tensor, "batch y x cond"] | None = None,
        temperature: float | int = 1.0,
    ) -> Int[Tensor, "batch slice y x"]:
        """Draws series, as `AxialDecoder.sample` draws maps."""
        expected = (self.encoder.num_slices, *self._grid, self.decoder.num_bins)
        if noise.shape[1:] != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}: expected (batch, {expected})")
        x = torch.zeros(noise.shape[:-1], dtype=torch.long, device=noise.device)
        for n in range(x.shape[1]):
            told = self.encoder(x, self._all_at(n, x), cond, dropout=0.0)
            x[:, n] = self.decoder.sample(noise[:, n], told, temperature)
        return x

    @property
    def _grid(self) -> tuple[int, int]:
        return self.decoder.height, self.decoder.width

    def _slice_logits(self, x: Tensor, index: Tensor, cond: Tensor | None) -> Tensor:
        return self.decoder.logits(_slice(x, index), self.encoder(x, index, cond))

    def _all_at(self, n: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), n, dtype=torch.long, device=x.device)


def _slice(x: Tensor, index: Tensor) -> Tensor:
    """Slice number `index[b]` of each sample b."""
    return x[torch.arange(len(x), device=x.device), index]


def _known_beforehand(
    pos_h: Tensor, pos_w: Tensor, cond_proj: nn.Module | None, cond: Tensor | None, batch: int
) -> Tensor:
    """What is known of every place before any pixel: where it lies, and what the map is conditioned on.

    Raises:
        ValueError: for a `cond` that is missing, not expected, or of another shape.
    """
    where = (pos_h[:, None] + pos_w)[None]
    if (cond is None) != (cond_proj is None):
        raise ValueError(f"cond is {'missing' if cond is None else 'given'}, and cond_dim says otherwise")
    if cond is None or cond_proj is None:
        return where
    grid = (len(pos_h), len(pos_w), cond_proj.get_parameter("weight").shape[1])
    if cond.shape[1:] != grid or len(cond) not in (1, batch):
        raise ValueError(
            f"cond has shape {tuple(cond.shape)}: expected {(batch, *grid)}, or 1 for all {batch}"
        )
    told: Tensor = where + cond_proj(cond)
    return told


def _log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """The log-probability of the bins `x`, summed over all pixels of a sample, in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide.movedim(-1, 1), x.long(), reduction="none").flatten(1).sum(dim=1)


def _tempered(noise: Tensor, temperature: float | int, expected: tuple[int, ...]) -> Tensor:
    """The noise as it is added to logits.

    Raises:
        ValueError: for noise of another shape or with NaN, or a temperature that is none.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected 0 or more, and finite")
    if noise.shape[1:] != expected:
        raise ValueError(f"noise has shape {tuple(noise.shape)}: expected (batch, {expected})")
    scaled = noise * temperature
    if scaled.isnan().any():
        raise ValueError(
            "noise holds NaN, or infinite values at temperature=0: expected numbers, as of gumbel()"
        )
    return scaled


def _check_bins(x: Tensor, expected: tuple[int, ...], num_bins: int) -> None:
    """Raises ValueError for another shape, or a value that is no bin (not looked at while compiling)."""
    if x.shape[1:] != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (batch, {expected})")
    _check_values("x", x, num_bins, "num_bins")


def _check_values(name: str, numbers: Tensor, count: int, of: str) -> None:
    """Raises ValueError for a number that is none of 0 to count - 1 (not looked at while compiling)."""
    if torch.compiler.is_compiling() or numbers.numel() == 0:
        return
    least, most = (int(end) for end in numbers.aminmax())
    if least < 0 or most >= count:
        raise ValueError(f"{name} holds {least}..{most}: expected 0..{count - 1} for {of}={count}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: expected at least 1")


def _check_shared(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim={dim} must be a multiple of heads={heads}")


def _check_even(**layers: int) -> None:
    for name, count in layers.items():
        if count < 2 or count % 2:
            raise ValueError(
                f"{name}={count}: expected 2, 4, ...; they go along rows and down columns in turn"
            )


def _row_column_pairs(layers: int, dim: int, heads: int, mlp_factor: int, masked: bool) -> nn.ModuleList:
    """Blocks along rows and down columns in turn; only the columns may be masked."""
    blocks = []
    for _ in range(layers // 2):
        blocks.append(DecoderBlock(dim, heads, "row", False, mlp_factor))
        blocks.append(DecoderBlock(dim, heads, "column", masked, mlp_factor))
    return nn.ModuleList(blocks)


def _blocks(layers: nn.ModuleList) -> list[DecoderBlock]:
    return cast("list[DecoderBlock]", list(layers))


def _positions(places: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(places, dim) * SPREAD / math.sqrt(dim))


def _dense(inputs: int, outputs: int, variance: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    _scaled_variance(layer, variance)
    return layer


def _scaled_variance(layer: nn.Linear | nn.Conv2d, variance: float = 1.0) -> None:
    """Weights of variance `variance` / inputs, from a normal cut at two deviations; no bias."""
    std = math.sqrt(variance / layer.weight[0].numel()) / 0.87962566103423978  # what the cut leaves of it
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
