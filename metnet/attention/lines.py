"""Self-attention along the axes of a grid, a few lines at a time (Dao et al. 2022, arXiv 2205.14135).

Scores never exist all at once: forwards they are used while they are in a core's cache, backwards they are
worked out again. That saves their memory, and the time of fetching and filling it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SCORES = 1 << 20  # bytes of scores at once: what stays in a core's cache
SHORTEST, LONGEST = 16, 1024  # places; shorter lines have scores too few, longer ones too many for that

Lines = Float[Tensor, "line place channel"]
Places = Float[Tensor, "outer place inner channel"]


class Projections(NamedTuple):
    """The weights of the attention along one axis."""

    to_q: Float[Tensor, "width dim"]
    to_kv: Float[Tensor, "two_widths dim"]
    to_out: Float[Tensor, "dim width"]
    bias: Float[Tensor, "dim"]


def attend(
    x: Float[Tensor, "batch *places"], index: int, axes: Sequence[int], heads: int, weights: list[Projections]
) -> Float[Tensor, "batch *places"]:
    """The sum over `axes` of what all places of a line say to each; channels stand at `index`.

    On a CPU in full precision the lines go through a few at a time; elsewhere, and wherever somebody must see
    every step (`torch.compile`, `torch.export`, `torch.func`), through torch's own kernels.
    """
    flat = [weight for of_axis in weights for weight in of_axis]
    if x.numel() == 0:
        return nothing(x, flat)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and torch.is_autocast_enabled("cpu"):
        # backwards, torch's own attention takes twice as long in bfloat16 on a CPU as lines in float32
        wide = [Projections(*map(_wide, of_axis)) for of_axis in weights]
        with torch.autocast("cpu", enabled=False):
            y = attend(_wide(x), index, axes, heads, wide)
        return y.to(torch.promote_types(x.dtype, flat[0].dtype))
    fits = [_fits(x, axis) for axis in axes]
    if not any(fits):
        return _plain(x, index, axes, heads, flat)
    if not all(fits):
        halves = ([n for n, fit in enumerate(fits) if fit is which] for which in (True, False))
        by_line, at_once = (
            attend(x, index, [axes[n] for n in half], heads, [weights[n] for n in half]) for half in halves
        )
        return by_line + at_once
    kept = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *flat))
    attended: Tensor = _Attended.apply(x, index, tuple(axes), heads, kept, *flat)  # type: ignore[no-untyped-call]
    return attended


def nothing(like: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """What comes of no place at all: as empty as `like`; the gradient of the weights is then 0, not None."""
    empty: Tensor = like + 0 * sum(weight.sum() for weight in weights)
    return empty


def _wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _fits(x: Tensor, axis: int) -> bool:
    if x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return exact and SHORTEST <= x.shape[axis] <= LONGEST


def _plain(x: Tensor, index: int, axes: Sequence[int], heads: int, flat: Sequence[Tensor]) -> Tensor:
    """All lines at once."""
    y: Tensor | None = None
    for axis, of_axis in zip(axes, _by_axis(flat), strict=True):
        lines = x.movedim((axis, index), (-2, -1))
        q = F.linear(lines.flatten(0, -3), of_axis.to_q)
        k, v = F.linear(lines.flatten(0, -3), of_axis.to_kv).chunk(2, dim=-1)
        mixed = mixture(q, k, v, heads)
        out = F.linear(mixed, of_axis.to_out, of_axis.bias).view(lines.shape)
        out = out.movedim((-2, -1), (axis, index))
        y = out if y is None else y + out
    assert y is not None
    return y


def mixture(
    q: Lines, k: Float[Tensor, "line other channel"], v: Float[Tensor, "line other channel"], heads: int
) -> Lines:
    """softmax(q·k / √e) v of each head, whose `e` channels lie side by side."""
    q, k, v = (torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _by_axis(flat: Sequence[Tensor]) -> list[Projections]:
    return [Projections(*flat[at : at + 4]) for at in range(0, len(flat), 4)]


class _Attended(torch.autograd.Function):
    """`_plain`, line by line; what is kept for the backward pass is the mixtures, not scores nor queries."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: int, axes: tuple[int, ...], heads: int, kept: bool, *flat: Tensor
    ) -> Tensor:
        last = _channels_last(x, index)
        y, mixtures = _mixed(last, index, axes, heads, kept, _by_axis(flat))
        ctx.index, ctx.axes, ctx.heads = index, axes, heads
        if kept:
            ctx.save_for_backward(x, last, *flat, *mixtures)
        del last  # its memory may be wanted for what goes out
        return _channels_back(y, x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, last, *saved = ctx.saved_tensors
        flat, mixtures = saved[: 4 * len(ctx.axes)], saved[4 * len(ctx.axes) :]
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        if torch.is_grad_enabled():  # a second derivative is wanted
            given = [t for t, needed in zip((x, *flat), wanted, strict=True) if needed]
            with sdpa_kernel(SDPBackend.MATH):
                y = _plain(x, ctx.index, ctx.axes, ctx.heads, flat)
                found = iter(torch.autograd.grad(y, given, dy, create_graph=True))
            slopes = [next(found) if needed else None for needed in wanted]
            return slopes[0], None, None, None, None, *slopes[1:]
        dlast = _channels_last(dy, ctx.index)
        own = dlast.data_ptr() != dy.data_ptr()
        dx, dflat = _slopes(ctx, last, dlast, _by_axis(flat), mixtures, wanted)
        if dx is not None:
            dx = _channels_back(dx, x, ctx.index, dlast if own else None)
        return dx, None, None, None, None, *dflat


def _mixed(
    last: Tensor, index: int, axes: Sequence[int], heads: int, kept: bool, weights: Sequence[Projections]
) -> tuple[Tensor, list[Tensor]]:
    """The sum over the axes (channels last), and the mixtures of all lines if they are to be kept."""
    y = torch.empty_like(last)
    y.copy_(torch.stack([of_axis.bias for of_axis in weights]).sum(0))
    mixtures = []
    for axis, of_axis in zip(axes, weights, strict=True):
        along = _Along(_folded(last, axis, index), of_axis, heads)
        mixed = last.new_empty(along.count if kept else along.most, along.width, along.places)
        along.forward(_folded(y, axis, index), mixed)
        mixtures += [mixed] if kept else []
    return y, mixtures


def _slopes(
    ctx: Any,
    last: Tensor,
    dlast: Tensor,
    weights: Sequence[Projections],
    mixtures: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the map (channels last) and of all weights, where they are wanted."""
    dx = torch.zeros_like(last) if wanted[0] else None
    dflat: list[Tensor | None] = []
    dbias = dlast.flatten(0, -2).sum(0) if any(wanted[1:]) else None
    with no_autocast(last.device):
        for n, (axis, of_axis) in enumerate(zip(ctx.axes, weights, strict=True)):
            along = _Along(_folded(last, axis, ctx.index), of_axis, ctx.heads)
            target = None if dx is None else _folded(dx, axis, ctx.index)
            weights_too = any(wanted[1 + 4 * n : 5 + 4 * n])
            dflat += along.backward(_folded(dlast, axis, ctx.index), mixtures[n], target, weights_too)
            dflat.append(dbias.clone() if dbias is not None and weights_too else None)
    return dx, dflat


class _Along:
    """The lines of a map along one axis, and what happens to them; channels stand before places here."""

    def __init__(self, x: Places, weights: Projections, heads: int):
        outer, self.places, self.inner, _ = x.shape
        self.x, self.heads, self.width = x, heads, len(weights.to_q)
        self.count = outer * self.inner
        scores = x.element_size() * self.places**2
        at_once = SCORES * (torch.get_num_threads() if x.device.type == "cpu" else 1)
        self.most = min(self.count, max(1, at_once // (scores * heads)))
        self.heads_at_once = min(self.most * heads, max(1, at_once // scores))
        self.scale = math.sqrt(heads / self.width)
        to_qkv = torch.cat([weights.to_q * self.scale, weights.to_kv])
        # query, key and value of a single line lie side by side, and are one product
        self.to_qkv = (to_qkv,) if self.most == 1 else to_qkv.chunk(3)
        self.to_out = weights.to_out

    def forward(self, y: Places, mixed: Float[Tensor, "line width place"]) -> None:
        """Adds to `y`; leaves in `mixed` the mixtures of all lines, or those of the last part."""
        scores, qkv = self._scores(), self._lines(3)
        for at, part in self._parts():
            lines = _taken(self.x, part)
            n = len(lines)
            self._project(lines, qkv)
            here = mixed[at : at + n] if len(mixed) == self.count else mixed[:n]
            for q, k, v, out in self._head_by_head(n, *qkv, here):
                weights = torch.bmm(q.mT, k, out=scores[: len(q)])
                torch.softmax(weights, -1, out=weights)
                torch.bmm(v, weights.mT, out=out)
            _add(y, part, here.mT, self.to_out.t())

    def backward(
        self, dy: Places, mixed: Tensor, dx: Places | None, weights_too: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the three weights; adds to `dx` that of the map."""
        scores, dscores = self._scores(), self._scores()
        qkv, dqkv, dmixed = self._lines(3), self._lines(3), self._lines(1)[0]
        dto_qkv = [torch.zeros_like(to) for to in self.to_qkv]
        dto_out = torch.zeros_like(self.to_out)
        for at, part in self._parts():
            lines, dlines = _taken(self.x, part), _taken(dy, part)
            n = len(lines)
            self._project(lines, qkv)
            torch.bmm(self.to_out.t().expand(n, -1, -1), dlines.mT, out=dmixed[:n])
            for q, k, v, dout, *into in self._head_by_head(n, *qkv, dmixed, *dqkv):
                _back(q, k, v, dout, into, scores[: len(q)], dscores[: len(q)])
            if weights_too:
                _accumulate(dto_out, dlines.mT, mixed[at : at + n])
            for to, made, gradient in zip(self.to_qkv, self._products(dqkv), dto_qkv, strict=True):
                if weights_too:
                    _accumulate(gradient, made[:n], lines.mT)
                if dx is not None:
                    _add(dx, part, made[:n].mT, to)
        if not weights_too:
            return None, None, None
        dto_q, dto_kv = torch.split(torch.cat(dto_qkv), [self.width, 2 * self.width])
        return dto_q * self.scale, dto_kv, dto_out

    def _project(self, lines: Lines, qkv: Float[Tensor, "3 room width place"]) -> None:
        for to, made in zip(self.to_qkv, self._products(qkv), strict=True):
            torch.bmm(to.expand(len(lines), -1, -1), lines.mT, out=made[: len(lines)])

    def _products(self, qkv: Float[Tensor, "3 room width place"]) -> Sequence[Tensor]:
        """As many as there are projections."""
        return (qkv.view(1, -1, self.places),) if self.most == 1 else qkv.unbind()

    def _lines(self, count: int) -> Float[Tensor, "{count} {self.most} {self.width} {self.places}"]:
        return self.x.new_empty(count, self.most, self.width, self.places)

    def _scores(self) -> Tensor:
        return self.x.new_empty(self.heads_at_once, self.places, self.places)

    def _parts(self) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """Which lines to take at once: the number of the first, and where they lie (outer, inner)."""
        if self.most >= self.inner:
            for first in range(0, self.x.shape[0], self.most // self.inner):
                outer = slice(first, first + self.most // self.inner)
                yield first * self.inner, (outer, slice(0, self.inner))
            return
        for first in range(self.x.shape[0]):
            for at in range(0, self.inner, self.most):
                yield first * self.inner + at, (slice(first, first + 1), slice(at, at + self.most))

    def _head_by_head(self, count: int, *lines: Tensor) -> Iterator[list[Tensor]]:
        """The first `count` lines of each, a few heads at a time."""
        by_head = [t[:count].view(count * self.heads, -1, self.places) for t in lines]
        split = [torch.split(t, self.heads_at_once) for t in by_head]
        yield from ([*parts] for parts in zip(*split, strict=True))


def _back(
    q: Tensor, k: Tensor, v: Tensor, dmixed: Tensor, into: list[Tensor], scores: Tensor, dscores: Tensor
) -> None:
    """The gradients of query, key and value of a few heads (channel before place)."""
    dq, dk, dv = into
    weights = torch.bmm(q.mT, k, out=scores)
    torch.softmax(weights, -1, out=weights)
    torch.bmm(dmixed, weights, out=dv)
    torch.bmm(dmixed.mT, v, out=dscores)
    torch._softmax_backward_data(dscores, weights, -1, weights.dtype, grad_input=dscores)
    torch.bmm(k, dscores.mT, out=dq)
    torch.bmm(q, dscores, out=dk)


def _taken(t: Places, part: tuple[slice, slice]) -> Lines:
    """The lines of a part; a view where they are of one outer place, or inner ones have but one."""
    outer, inner = part
    return t[outer, :, inner].transpose(1, 2).flatten(0, 1)


def _accumulate(
    total: Tensor, left: Float[Tensor, "line a place"], right: Float[Tensor, "line b place"]
) -> None:
    """Adds to `total` (a, b) the products of all lines over their places, as one: `addbmm_` makes many."""
    total.addmm_(left.transpose(0, 1).flatten(1), right.transpose(0, 1).flatten(1).t())


def _add(t: Places, part: tuple[slice, slice], left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` to the lines of a part."""
    outer, inner = part
    lines = t[outer, :, inner].transpose(1, 2)
    right = right.expand(len(left), -1, -1)
    if len(lines) == 1:
        lines[0].baddbmm_(left, right)
    elif t.shape[2] == 1:
        lines[:, 0].baddbmm_(left, right)
    else:
        lines.add_(torch.bmm(left, right).view(lines.shape))


def _folded(last: Tensor, axis: int, index: int) -> Places:
    """A contiguous map with its channels last, all axes before `axis` as one, all behind it as another."""
    at = axis - (axis > index)
    outer, places = math.prod(last.shape[:at]), last.shape[at]
    return last.view(outer, places, -1, last.shape[-1])


def _channels_last(x: Tensor, index: int) -> Tensor:
    """Contiguous, with the channels last; where it must be copied, plain transposes beat one permutation."""
    last = x.movedim(index, -1)
    if last.is_contiguous() or not x.is_contiguous():
        return last.contiguous()
    made = torch.empty(last.shape, dtype=x.dtype, device=x.device)
    _transpose(x.flatten(0, index - 1).flatten(2), made.flatten(0, index - 1).flatten(1, -2))
    return made


def _channels_back(last: Tensor, like: Tensor, index: int, memory: Tensor | None = None) -> Tensor:
    """With the channels at `index` again; contiguous if `like` is, then in `memory` of that size if given."""
    back = last.movedim(-1, index)
    if back.is_contiguous() or not like.is_contiguous():
        return back
    made = (
        torch.empty(back.shape, dtype=last.dtype, device=last.device)
        if memory is None
        else memory.view(back.shape)
    )
    _transpose(last.flatten(0, index - 1).flatten(1, -2), made.flatten(0, index - 1).flatten(2))
    return made


def _transpose(given: Float[Tensor, "n a b"], into: Float[Tensor, "n b a"]) -> None:
    for one, other in zip(given, into, strict=True):
        other.copy_(one.t())


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products inside are taken in the type of what is multiplied."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
