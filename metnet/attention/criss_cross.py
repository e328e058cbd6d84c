"""Criss-cross, row and column attention (CCNet: Huang et al. 2019, arXiv 1811.11721)."""

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.lines import no_autocast, nothing

COLUMN, ROW = 1, 2  # the axes of (batch, y, x, channel) along which a pixel looks
CPU_SCORES = 1 << 19  # bytes of scores at once: what stays in a core's cache
DEVICE_SCORES = 1 << 28  # and on an accelerator, which wants few large products

Places = Float[Tensor, "batch y x channel"]
Part = tuple[slice, slice]


class CrissCrossAttention(nn.Module):
    """Every pixel attends to its own row and column, itself counted once, and keeps what it was.

    `gamma * attended + x`, with `gamma` 0 at the start: put into a trained network, the block changes nothing
    until its first step, which moves only `gamma`. One round reaches w + h - 1 pixels, two rounds reach all.

    Args:
        in_dim: channels that come in and go out.
        recurrence: rounds, all with the same weights.
        q_k_dim: channels of query and key; by default `in_dim / 8`.
        scale: divide the scores by √q_k_dim, which the published block leaves out.
        device: ignored, as published code passes it.

    Raises:
        ValueError: naming the argument, for fewer than 1 of anything, or an `in_dim` that 8 does not divide
            where no `q_k_dim` is given.
    """

    def __init__(
        self,
        in_dim: int,
        recurrence: int = 1,
        q_k_dim: int | None = None,
        scale: bool = False,
        device: object = None,
    ):
        super().__init__()
        _ignore(device)
        _check_count("recurrence", recurrence)
        if q_k_dim is None:
            if in_dim < 8 or in_dim % 8:
                raise ValueError(
                    f"in_dim={in_dim}: expected a multiple of 8, for in_dim / 8 query channels; "
                    "or give q_k_dim"
                )
            q_k_dim = in_dim // 8
        self.recurrence = recurrence
        self.scale = scale
        _add_weights(self, in_dim, q_k_dim)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The map after all rounds.

        Raises:
            ValueError: for other channels than `in_dim`, or no map.
        """
        for _ in range(self.recurrence):
            x = _looked(self, x, (COLUMN, ROW), self.scale)
        return x


class RowAttention(nn.Module):
    """Every pixel attends to its own row: `gamma * attended + x`, `gamma` 0 at the start.

    Args:
        in_dim: channels that come in and go out.
        q_k_dim: channels of query and key.
        device: ignored, as published code passes it.

    Raises:
        ValueError: for fewer than 1 of anything.
    """

    def __init__(self, in_dim: int, q_k_dim: int, device: object = None):
        super().__init__()
        _ignore(device)
        _add_weights(self, in_dim, q_k_dim)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The map, each pixel with what its row says to it; ValueError for other channels."""
        return _looked(self, x, (ROW,))


class ColumnAttention(nn.Module):
    """Every pixel attends to its own column: `gamma * attended + x`, `gamma` 0 at the start.

    Args:
        in_dim: channels that come in and go out.
        q_k_dim: channels of query and key.
        device: ignored, as published code passes it.

    Raises:
        ValueError: for fewer than 1 of anything.
    """

    def __init__(self, in_dim: int, q_k_dim: int, device: object = None):
        super().__init__()
        _ignore(device)
        _add_weights(self, in_dim, q_k_dim)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The map, each pixel with what its column says to it; ValueError for other channels."""
        return _looked(self, x, (COLUMN,))


class RowColumnAttention(nn.Module):
    """Row and column attention together.

    One after the other reaches every pixel in one round, the sums only the cross.

    Args:
        in_dim: channels that come in and go out.
        q_k_dim: channels of query and key.
        mode: "sum" is `row(x) + column(x)` as published, which holds `x` twice; "sum_single" holds it once;
            "row_col" is `column(row(x))` and "col_row" is `row(column(x))`.

    Raises:
        ValueError: for another mode, or fewer than 1 of anything.
    """

    def __init__(
        self, in_dim: int, q_k_dim: int, mode: Literal["sum", "sum_single", "row_col", "col_row"] = "sum"
    ):
        super().__init__()
        if mode not in ("sum", "sum_single", "row_col", "col_row"):
            raise ValueError(f"mode={mode!r}: expected sum, sum_single, row_col or col_row")
        self.mode = mode
        self.row = RowAttention(in_dim, q_k_dim)
        self.col = ColumnAttention(in_dim, q_k_dim)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The map after both; ValueError for other channels than `in_dim`."""
        both: Tensor
        if self.mode == "row_col":
            both = self.col(self.row(x))
        elif self.mode == "col_row":
            both = self.row(self.col(x))
        else:
            both = self.row(x) + self.col(x)
            both = both - x if self.mode == "sum_single" else both
        return both


class RCCAModule(nn.Module):
    """CCNet's whole head: fewer channels, rounds of criss-cross attention, and classes from both.

    Its normalisations end in a leaky ReLU, as those of the published network do.

    Args:
        in_channels: channels of the map that comes in.
        out_channels: channels before the classifier.
        num_classes: channels that go out.
        negative_slope: of the leaky ReLU; 1.0 leaves the normalisation bare.

    Raises:
        ValueError: for an `in_channels` that 32 does not divide.
    """

    def __init__(self, in_channels: int, out_channels: int, num_classes: int, negative_slope: float = 0.01):
        super().__init__()
        if in_channels < 32 or in_channels % 32:
            raise ValueError(
                f"in_channels={in_channels}: expected a multiple of 32, for in_channels / 32 queries"
            )
        inner = in_channels // 4
        self.negative_slope = negative_slope
        self.conva = nn.Sequential(
            nn.Conv2d(in_channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        )
        self.cca = CrissCrossAttention(inner)
        self.convb = nn.Sequential(nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels + inner, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, num_classes, 1),
        )

    def forward(
        self, x: Float[Tensor, "batch channel y x"], recurrence: int = 1
    ) -> Float[Tensor, "batch class y x"]:
        """Scores of the classes, after `recurrence` rounds of attention.

        Raises:
            ValueError: for fewer than 1 round.
        """
        _check_count("recurrence", recurrence)
        seen = F.leaky_relu(self.conva(x), self.negative_slope)
        for _ in range(recurrence):
            seen = self.cca(seen)
        seen = F.leaky_relu(self.convb(seen), self.negative_slope)
        joined = F.leaky_relu(self.bottleneck[:2](torch.cat([x, seen], 1)), self.negative_slope)
        classes: Tensor = self.bottleneck[2:](joined)
        return classes


def _ignore(device: object) -> None:
    if device is not None:
        warnings.warn("device is ignored: move the module with .to(device)", DeprecationWarning, stacklevel=3)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value}: expected a whole number, at least 1")


def _add_weights(module: nn.Module, in_dim: int, q_k_dim: int) -> None:
    _check_count("in_dim", in_dim)
    _check_count("q_k_dim", q_k_dim)
    module.query_conv = nn.Conv2d(in_dim, q_k_dim, 1)
    module.key_conv = nn.Conv2d(in_dim, q_k_dim, 1)
    module.value_conv = nn.Conv2d(in_dim, in_dim, 1)
    module.gamma = nn.Parameter(torch.zeros(1))


def _looked(module: Any, x: Tensor, along: tuple[int, ...], scale: bool = False) -> Tensor:
    """`gamma * value(attended x) + x`, by the weights of `module`.

    Since weights add up to 1, the value projection can wait until the pixels are mixed, where it is one
    product with `gamma` in it, whose result needs no other layout.
    """
    query, key, value, gamma = module.query_conv, module.key_conv, module.value_conv, module.gamma
    if x.ndim != 4 or x.shape[1] != value.in_channels:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: expected 4 dimensions "
            f"with in_dim={value.in_channels} channels at index 1"
        )
    root = math.sqrt(query.out_channels) if scale else 1.0
    ask = torch.cat([query.weight / root, key.weight]).flatten(1)
    ask_bias = torch.cat([query.bias / root, key.bias])
    tell, tell_bias = gamma * value.weight.flatten(1), gamma * value.bias
    if x.numel() == 0:
        return nothing(x, (ask, ask_bias, tell, tell_bias))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(x, ask, ask_bias, tell, tell_bias, along)
    result: Tensor = _Looked.apply(x, ask, ask_bias, tell, tell_bias, along)  # type: ignore[no-untyped-call]
    return result


def _plain(
    x: Tensor, ask: Tensor, ask_bias: Tensor, tell: Tensor, tell_bias: Tensor, along: tuple[int, ...]
) -> Tensor:
    """The equations as they stand: what is compiled, exported or differentiated twice."""
    pixels = x.permute(0, 2, 3, 1)
    query, key = F.linear(pixels, ask, ask_bias).chunk(2, dim=-1)
    scores = []
    for n, axis in enumerate(along):
        lines = query.movedim(axis, -2) @ key.movedim(axis, -2).mT
        if n + 1 < len(along):
            lines = lines.masked_fill(
                torch.eye(lines.shape[-1], dtype=torch.bool, device=x.device), -math.inf
            )
        scores.append(lines.movedim(-2, axis).to(_wide(lines.dtype)))
    weights = torch.split(torch.cat(scores, -1).softmax(-1), [part.shape[-1] for part in scores], -1)
    mean = torch.zeros_like(pixels)
    for axis, weight in zip(along, weights, strict=True):
        lines = weight.to(query.dtype).movedim(axis, -2) @ pixels.to(query.dtype).movedim(axis, -2)
        mean = mean + lines.movedim(-2, axis)
    return x + F.linear(mean, tell, tell_bias).permute(0, 3, 1, 2).to(x.dtype)


class _Looked(torch.autograd.Function):
    """The same line by line: scores are worked out where they are used, and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ask: Tensor,
        ask_bias: Tensor,
        tell: Tensor,
        tell_bias: Tensor,
        along: tuple[int, ...],
    ) -> Tensor:
        low = _autocast_dtype(x)
        with no_autocast(x.device):
            pixels = _pixels(x.to(low))
            asked = F.linear(pixels, ask.to(low), ask_bias.to(low))
            query, key = asked.chunk(2, dim=-1)
            mean, log_total = _mean_along(query, key, pixels, along)
            y = x.flatten(2) + tell_bias.to(x.dtype)[:, None]
            told, mixed = tell.to(low).expand(len(x), -1, -1), mean.flatten(1, 2).mT
            y = y.baddbmm_(told, mixed) if low == x.dtype else y + torch.bmm(told, mixed)
        ctx.save_for_backward(x, ask, ask_bias, tell, tell_bias, pixels, asked, mean, log_total)
        ctx.along = along
        return y.view(x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ask, ask_bias, tell, tell_bias, pixels, asked, mean, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            given = (x, ask, ask_bias, tell, tell_bias)
            y = _plain(*given, ctx.along)
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None)
        with no_autocast(x.device):
            low = pixels.dtype
            dy3 = dy.to(low).flatten(2)
            dmean = torch.bmm(dy3.mT, tell.to(low).expand(len(x), -1, -1)).view_as(pixels)
            dasked, dpixels = _mean_along_backward(asked, pixels, mean, log_total, dmean, ctx.along)
            dtell = torch.bmm(dy3, mean.flatten(1, 2)).sum(0)
            flat = dasked.flatten(0, 2)
            dask = flat.mT @ pixels.flatten(0, 2)
            dpixels.view(-1, dpixels.shape[-1]).addmm_(flat, ask.to(low))
            dx = _add_map(dy, dpixels)
        return (
            dx,
            dask.to(ask.dtype),
            flat.sum(0).to(ask.dtype),
            dtell.to(tell.dtype),
            dy.sum((0, 2, 3)).to(tell.dtype),
            None,
        )


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What products are taken in."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of exponentials are taken in."""
    return torch.promote_types(dtype, torch.float32)


def _pixels(x: Tensor) -> Places:
    """The map with its channels last, contiguous; two plain transposes beat one permuted copy on a CPU."""
    last = x.permute(0, 2, 3, 1)
    if last.is_contiguous():
        return last
    pixels = torch.empty(last.shape, dtype=x.dtype, device=x.device)
    for one, other in zip(pixels, x, strict=True):
        one.flatten(0, 1).copy_(other.flatten(1).t())
    return pixels


def _add_map(x: Tensor, pixels: Places) -> Tensor:
    """`x` plus a map whose channels are last."""
    total = torch.empty(x.shape, dtype=pixels.dtype, device=x.device)
    for one, other in zip(total, pixels, strict=True):
        one.flatten(1).copy_(other.flatten(0, 1).t())
    return total.add_(x) if total.dtype == x.dtype else total + x


def _parts(shape: torch.Size, axis: int, device: torch.device) -> Iterator[Part]:
    """Which samples and which of their lines to take at once, for scores that fit."""
    batch, lines, places = shape[0], shape[COLUMN + ROW - axis], shape[axis]
    most = max(1, (CPU_SCORES if device.type == "cpu" else DEVICE_SCORES) // (4 * places**2))
    if most >= lines:
        for first in range(0, batch, most // lines):
            yield slice(first, first + most // lines), slice(None)
        return
    for sample in range(batch):
        for first in range(0, lines, most):
            yield slice(sample, sample + 1), slice(first, first + most)


def _lines(t: Tensor, axis: int, part: Part) -> Float[Tensor, "sample line place channel"]:
    """A view on the lines of one part."""
    samples, lines = part
    return t[samples].transpose(1, 2)[:, lines] if axis == COLUMN else t[samples][:, lines]


def _scores(query: Tensor, key: Tensor, axis: int, part: Part, centre: bool) -> Tensor:
    """Scores along lines; without `centre` a pixel does not look at itself."""
    scores = torch.bmm(_lines(query, axis, part).flatten(0, 1), _lines(key, axis, part).flatten(0, 1).mT)
    scores = scores.to(_wide(scores.dtype))
    if not centre:
        scores.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    return scores


def _put(target: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Puts `left @ right` in the place of `target`, or adds it there."""
    if target.is_contiguous() and target.dtype == left.dtype:
        target.flatten(0, 1).baddbmm_(left, right, beta=int(add))
    elif not add:
        target.copy_(torch.bmm(left, right).view(target.shape))
    else:
        target.add_(torch.bmm(left, right).view(target.shape))


def _mean_along(query: Tensor, key: Tensor, pixels: Places, along: tuple[int, ...]) -> tuple[Places, Tensor]:
    """The attended mean of `pixels` over all lines `along`, and the logarithm of its total weight."""
    wide = _wide(pixels.dtype)
    mean = torch.empty(pixels.shape, dtype=wide, device=pixels.device)
    top = torch.full((*pixels.shape[:3], 1), torch.finfo(wide).min, dtype=wide, device=pixels.device)
    total = torch.zeros_like(top)
    for n, axis in enumerate(along):
        for part in _parts(pixels.shape, axis, pixels.device):
            scores = _scores(query, key, axis, part, n + 1 == len(along))
            peak, seen, mixed = (_lines(t, axis, part) for t in (top, total, mean))
            higher = torch.maximum(peak, scores.amax(-1).view(peak.shape))
            weights = scores.sub_(higher.reshape(*scores.shape[:2], 1)).exp_()
            fade = (peak - higher).exp_()
            peak.copy_(higher)
            seen.mul_(fade).add_(weights.sum(-1).view(seen.shape))
            if n:
                mixed.mul_(fade)
            _put(mixed, weights.to(pixels.dtype), _lines(pixels, axis, part).flatten(0, 1), n > 0)
    return mean.div_(total).to(pixels.dtype), total.log_().add_(top)


def _mean_along_backward(
    asked: Tensor, pixels: Places, mean: Places, log_total: Tensor, dmean: Places, along: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients to `asked` (query and key) and to `pixels`."""
    query, key = asked.chunk(2, dim=-1)
    dasked, dpixels = torch.empty_like(asked), torch.empty_like(pixels)
    dquery, dkey = dasked.chunk(2, dim=-1)
    common = torch.linalg.vecdot(dmean.to(log_total.dtype), mean.to(log_total.dtype)).unsqueeze(-1)
    for n, axis in enumerate(along):
        for part in _parts(pixels.shape, axis, pixels.device):
            scores = _scores(query, key, axis, part, n + 1 == len(along))
            lines = [
                _lines(t, axis, part).flatten(0, 1) for t in (query, key, pixels, dmean, log_total, common)
            ]
            q, k, x, dm, log, shared = lines
            weights = scores.sub_(log).exp_()
            dscores = torch.bmm(dm, x.mT).to(weights.dtype).sub_(shared).mul_(weights).to(x.dtype)
            for gradient, left, right in (
                (dquery, dscores, k),
                (dkey, dscores.mT, q),
                (dpixels, weights.to(x.dtype).mT, dm),
            ):
                _put(_lines(gradient, axis, part), left, right, n > 0)
    return dasked, dpixels
