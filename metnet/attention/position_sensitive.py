"""Position-sensitive axial attention (Axial-DeepLab: Wang et al. 2020, arXiv 2003.07853)."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metnet.attention.lines import no_autocast, nothing

CPU_SCORES = 1 << 20  # bytes of scores at once: what stays in a core's cache
DEVICE_SCORES = 1 << 28  # and on an accelerator, which wants few large products

Lines = Float[Tensor, "batch group channel line place"]
Part = tuple[slice, slice]


class PositionSensitiveAxialAttention(nn.Module):
    """Every place attends to its line along one axis, and learns vectors for how far off the others lie.

    With r the vectors of the offset p - o, place o weighs place p by q_o·k_p + q_o·r^q + k_p·r^k, each of the
    three normalised over everything, and takes v_p + r^v. All groups (heads) share the vectors.

    Args:
        in_planes: channels that come in.
        out_planes: channels that go out.
        groups: heads.
        kernel_size: places along the axis that the table of vectors is for; shorter lines use its middle.
        stride: the output is the mean over squares of this side.
        bias: whether the projection to query, key and value has one.
        width: attend along x; else along y.
        span: look only at places less than this far away, and so at lines of any length.
        norm: "batch" as published, which couples the samples of a batch while training; "layer", over the
            channels of each place; or "none". The latter two scale the scores by 1 / √(query channels).

    Raises:
        ValueError: naming the argument, for fewer than 1 of anything, an `out_planes` that does not give
            every group an even number of channels, a `span` beyond the table, or another norm.
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        groups: int = 8,
        kernel_size: int = 56,
        stride: int = 1,
        bias: bool = False,
        width: bool = False,
        span: int | None = None,
        norm: Literal["batch", "layer", "none"] = "batch",
    ):
        super().__init__()
        for name, value in (
            ("in_planes", in_planes),
            ("out_planes", out_planes),
            ("groups", groups),
            ("kernel_size", kernel_size),
            ("stride", stride),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if out_planes % (2 * groups):
            raise ValueError(
                f"out_planes={out_planes}: expected a multiple of 2 * groups={2 * groups}, "
                "so that every group has as many channels of query as of key"
            )
        if span is not None and not 1 <= span <= kernel_size:
            raise ValueError(f"span={span}: expected 1..kernel_size={kernel_size}")
        if norm not in ("batch", "layer", "none"):
            raise ValueError(f"norm={norm!r}: expected batch, layer or none")
        self.in_planes, self.out_planes = in_planes, out_planes
        self.groups, self.kernel_size = groups, kernel_size
        self.stride, self.width, self.span, self.norm = stride, width, span, norm
        planes = out_planes // groups
        self.qkv_transform = nn.Conv1d(in_planes, 2 * out_planes, 1, bias=bias)
        nn.init.normal_(self.qkv_transform.weight, 0, math.sqrt(1 / in_planes))
        if norm == "batch":
            self.bn_qkv = nn.BatchNorm1d(2 * out_planes)
            self.bn_similarity = nn.BatchNorm2d(3 * groups)
            self.bn_output = nn.BatchNorm1d(2 * out_planes)
        elif norm == "layer":
            self.norm_qkv = nn.LayerNorm(2 * out_planes)
            self.norm_output = nn.LayerNorm(out_planes)
        self.relative = nn.Parameter(torch.randn(2 * planes, 2 * kernel_size - 1) / math.sqrt(planes))

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch out_channel y2 x2"]:
        """The map after attention along one axis, `stride` times smaller.

        Raises:
            ValueError: for other channels than `in_planes`, or lines longer than the table with no `span`.
        """
        places = self._check(x)
        if x.numel() == 0:
            empty = x.sum() + x.new_zeros(len(x), self.out_planes, *x.shape[2:])
            return nothing(F.avg_pool2d(empty, self.stride), self.parameters())
        lines = x if self.width else x.mT
        shape = lines.shape[2:]
        qkv = self._projected(lines.flatten(2)).view(len(x), self.groups, -1, *shape)
        window, band = self._windows(places)
        both = _attend(qkv, self._factor(qkv, window, band), window.to(qkv.dtype), _mask(band))
        out = self._merged(both.flatten(1, 3).flatten(2)).view(len(x), -1, *shape)
        out = out if self.width else out.mT
        return F.avg_pool2d(out, self.stride) if self.stride > 1 else out

    def _check(self, x: Tensor) -> int:
        """The number of places along the axis."""
        if x.ndim != 4 or x.shape[1] != self.in_planes:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected 4 dimensions "
                f"with in_planes={self.in_planes} channels at index 1"
            )
        places = x.shape[3 if self.width else 2]
        if self.span is None and places > self.kernel_size:
            raise ValueError(
                f"x has {places} places along {'x' if self.width else 'y'}: expected at most "
                f"kernel_size={self.kernel_size}, or a span to look no further"
            )
        return places

    def _projected(self, x: Float[Tensor, "batch channel pixel"]) -> Float[Tensor, "batch qkv pixel"]:
        """Query, key and value of every place, normalised."""
        weight, bias = self.qkv_transform.weight.squeeze(-1), self.qkv_transform.bias
        if self.norm == "batch" and not self.bn_qkv.training:
            scale, shift = _affine(self.bn_qkv, x.dtype)
            weight = weight * scale[:, None]
            bias = shift if bias is None else bias * scale + shift
        qkv = torch.bmm(weight.to(x.dtype).expand(len(x), -1, -1), x)
        qkv = qkv if bias is None else qkv + bias[:, None].to(qkv.dtype)
        if self.norm == "batch":
            qkv = self.bn_qkv(qkv) if self.bn_qkv.training else qkv
        elif self.norm == "layer":
            qkv = self.norm_qkv(qkv.mT).mT
        return qkv

    def _merged(self, both: Float[Tensor, "batch both pixel"]) -> Float[Tensor, "batch out pixel"]:
        """The sum of what content and offsets gave (neighbouring channels of `both`), normalised."""
        if self.norm == "batch":
            both = self.bn_output(both)
        first, second = torch.unflatten(both, 1, (-1, 2)).unbind(2)
        out: Tensor = first + second
        return self.norm_output(out.mT).mT if self.norm == "layer" else out

    def _windows(
        self, places: int
    ) -> tuple[Float[Tensor, "row channel column"], Float[Tensor, "row column"] | None]:
        """The table spread out, [i, c, j] the vector of i - j; and, for a span, the pairs within it."""
        more = places - self.kernel_size
        offsets = F.pad(self.relative, (more, more + 1)).flip(1)
        rows = offsets.expand(places + 1, -1, -1).transpose(0, 1).flatten(1)
        shifted = rows[:, : places * (2 * places + 1)].view(-1, places, 2 * places + 1)[:, :, 1 : places + 1]
        window = shifted.flip(1).transpose(0, 1)
        if self.span is None or self.span >= places:
            return window.contiguous(), None
        place = torch.arange(places, device=window.device)
        band = ((place[:, None] - place).abs() < self.span).to(window.dtype)
        return window * band[:, None], band

    def _factor(
        self,
        qkv: Lines,
        window: Float[Tensor, "row channel column"],
        band: Float[Tensor, "row column"] | None,
    ) -> Float[Tensor, "3 group"]:
        """What each of the three scores is multiplied by; what a norm would add cancels in the softmax."""
        half = qkv.shape[2] // 4
        if self.norm != "batch":
            return torch.full((3, self.groups), half**-0.5, dtype=qkv.dtype, device=qkv.device)
        bn = self.bn_similarity
        if not bn.training:
            factor = _affine(bn, qkv.dtype)[0]
            return (factor + 0 * bn.bias).view(3, self.groups).to(qkv.dtype)
        asked = qkv[:, :, : 2 * half].to(window.dtype)
        content, offset = _content_moments(asked, band), _offset_moments(asked, window[:, : 2 * half])
        first, second = (torch.cat(parts) for parts in zip(content, offset, strict=True))
        lines, places = qkv.shape[0] * qkv.shape[3], qkv.shape[4]
        count = lines * (band.sum().double() if band is not None else places**2)
        mean = first / count
        variance = (second / count - mean**2).clamp_min(0)
        _remember(bn, mean.detach(), variance.detach(), count)
        factor = bn.weight.double() * (variance + bn.eps).rsqrt()
        return (factor + 0 * bn.bias).view(3, self.groups).to(qkv.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Published checkpoints also hold an index into the table, which follows from its size."""
        state_dict.pop(prefix + "flatten_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class PositionSensitiveBlock(nn.Module):
    """A residual bottleneck with attention along y, then along x, in the place of its 3 x 3 convolution.

    Args:
        inplanes: channels that come in.
        planes: half the channels that go out.
        stride: the output is this many times smaller.
        downsample: makes of `x` what is added at the end; needed where its shape changes.
        groups: heads.
        base_width: channels inside, in 64ths of `planes`.
        dilation: 1, since attention has none to dilate.
        norm_layer: makes the two normalisations of the bottleneck from a number of channels.
        kernel_size: of both attentions: places along each axis.
        span: of both attentions.

    Raises:
        ValueError: naming the argument, as the attentions do, for a dilation, or a missing `downsample`.
    """

    expansion = 2

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        kernel_size: int = 56,
        span: int | None = None,
    ):
        super().__init__()
        if dilation != 1:
            raise ValueError(f"dilation={dilation}: expected 1, since attention has no taps to spread")
        outplanes = planes * self.expansion
        if downsample is None and (stride != 1 or inplanes != outplanes):
            raise ValueError(
                f"downsample=None: expected a module from inplanes={inplanes} to {outplanes} channels "
                f"at stride={stride}"
            )
        width = int(planes * (base_width / 64))
        make_norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.conv_down = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = make_norm(width)
        self.hight_block = PositionSensitiveAxialAttention(width, width, groups, kernel_size, span=span)
        self.width_block = PositionSensitiveAxialAttention(
            width, width, groups, kernel_size, stride, width=True, span=span
        )
        self.conv_up = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn2 = make_norm(outplanes)
        self.downsample = downsample
        if isinstance(self.bn2, nn.BatchNorm2d):
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch out_channel y2 x2"]:
        """The map after the block, nowhere negative; ValueError as the attentions say."""
        inner = F.relu(self.bn1(self.conv_down(x)))
        inner = F.relu(self.width_block(self.hight_block(inner)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv_up(inner)) + shortcut)


def _affine(bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A trained normalisation as scale and shift."""
    wide = torch.promote_types(dtype, torch.float32)
    scale = bn.weight.to(wide) * (bn.running_var.to(wide) + bn.eps).rsqrt()
    return scale, bn.bias.to(wide) - bn.running_mean.to(wide) * scale


def _remember(bn: Any, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
    """Moves the running statistics towards a batch's, as the normalisation itself would."""
    if not bn.track_running_stats:
        return
    bn.num_batches_tracked.add_(1)
    share = bn.momentum if bn.momentum is not None else 1 / bn.num_batches_tracked
    unbiased = variance * (count / (count - 1))
    with torch.no_grad():
        bn.running_mean.add_(share * (mean.to(bn.running_mean.dtype) - bn.running_mean))
        bn.running_var.add_(share * (unbiased.to(bn.running_var.dtype) - bn.running_var))


def _content_moments(asked: Lines, band: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of q_i·k_j and of its square over all lines, i and j, for each group, without a single score.

    Sum over i, j of (q_i·k_j)² = <QᵀQ, KᵀK>, since both are sums over the same pairs of channels.
    """
    if band is not None:
        query, key = asked.chunk(2, dim=2)
        return _banded_moments(query, key, band)
    q, k = asked.permute(0, 3, 1, 2, 4).contiguous().chunk(2, dim=3)
    first = (q.sum(-1).double() * k.sum(-1)).sum((0, 1, 3))
    second = ((q @ q.mT).double() * (k @ k.mT)).sum((0, 1, 3, 4))
    return first, second


def _banded_moments(query: Lines, key: Lines, band: Tensor) -> tuple[Tensor, Tensor]:
    """The same over the pairs in the band, from scores that are worked out part by part and not kept."""

    def moments(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bgcni,bgcnj->bgnij", q, k)
        inside = scores * band
        return inside.double().sum((0, 2, 3, 4)), (inside * scores).double().sum((0, 2, 3, 4))

    parts = [
        checkpoint(moments, query[samples, :, :, lines], key[samples, :, :, lines], use_reentrant=False)
        for samples, lines in _parts(query)
    ]
    first, second = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
    return first, second


def _offset_moments(asked: Lines, window: Float[Tensor, "row channel column"]) -> tuple[Tensor, Tensor]:
    """Sums of q_i·r_ij, then of k_j·r_ji, and of their squares over all lines, i and j, for each group."""
    batch, groups, channels, lines, places = asked.shape
    by_place = asked.reshape(-1, places).t().contiguous().view(places, batch, groups, 2, channels // 2, lines)
    of_each = window.view(places, 2, channels // 2, places)
    sums = by_place.sum((1, 5)).double()
    first = (sums * of_each.sum(3)[:, None]).sum((0, 3))
    gram = (by_place @ by_place.mT).double().sum(1)
    second = (gram * (of_each @ of_each.mT)[:, None]).sum((0, 3, 4))
    return first.t().flatten(), second.t().flatten()


def _mask(band: Tensor | None) -> Float[Tensor, "row column"] | None:
    return None if band is None else torch.where(band > 0, 0.0, -math.inf)


def _attend(
    qkv: Lines,
    factor: Float[Tensor, "3 group"],
    window: Float[Tensor, "row channel column"],
    mask: Tensor | None,
) -> Float[Tensor, "batch group taken both line place"]:
    """What each place takes from the content of its line, and from its offsets."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _plain(qkv, factor, window, mask)
    both: Tensor = _Attended.apply(qkv, factor, window, mask)  # type: ignore[no-untyped-call]
    return both


def _plain(qkv: Tensor, factor: Tensor, window: Tensor, mask: Tensor | None) -> Tensor:
    """The equations as they stand: what is compiled, exported or differentiated twice."""
    half = qkv.shape[2] // 4
    parts = [half, half, 2 * half]
    q, k, v = torch.split(qkv, parts, dim=2)
    of_q, of_k, of_v = torch.split(window, parts, dim=1)
    content, at_q, at_k = factor[:, :, None, None, None].unbind(0)
    scores = content * torch.einsum("bgcni,bgcnj->bgnij", q, k)
    scores = scores + at_q * torch.einsum("bgcni,icj->bgnij", q, of_q)
    scores = scores + at_k * torch.einsum("bgcnj,jci->bgnij", k, of_k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    weights = (scores if mask is None else scores + mask).softmax(-1).to(v.dtype)
    taken = torch.einsum("bgnij,bgcnj->bgcni", weights, v)
    placed = torch.einsum("bgnij,icj->bgcni", weights, of_v)
    return torch.stack([taken, placed], dim=3)


class _Attended(torch.autograd.Function):
    """The same for a few lines at a time: scores are worked out where they are used, and never kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, factor: Tensor, window: Tensor, mask: Tensor | None) -> Tensor:
        batch, groups, channels, lines, places = qkv.shape
        both = qkv.new_empty(batch, groups, channels // 2, 2, lines, places)
        with no_autocast(qkv.device):
            of_v = window[:, channels // 2 :]
            for part in _parts(qkv):
                t, scale = _taken(qkv, part), _per_line(factor, qkv, part)
                weights = _weights(t, _turned(t, scale), scale, window, mask)
                v = t[:, channels // 2 :]
                target = both[part[0], :, :, :, part[1]]
                content = torch.bmm(v, weights.mT)
                offset = _turned_back(torch.bmm(weights.transpose(0, 1), of_v.mT))
                for n, value in enumerate((content, offset)):
                    target[:, :, :, n].copy_(_as_part(value, target.shape))
        ctx.save_for_backward(qkv, factor, window, mask)
        return both

    @staticmethod
    def backward(ctx: Any, dboth: Tensor) -> tuple[Tensor | None, ...]:
        qkv, factor, window, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            given = (qkv, factor, window)
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(_plain(*given, mask), wanted, dboth, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None)
        dqkv, dfactor = torch.empty_like(qkv), torch.zeros_like(factor)
        dwindow = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in _split(window)]
        with no_autocast(qkv.device):
            for part in _parts(qkv):
                t, scale = _taken(qkv, part), _per_line(factor, qkv, part)
                dt, dscale = _back(t, scale, window, mask, _taken(dboth.flatten(2, 3), part), dwindow)
                target = dqkv[part[0], :, :, part[1]]
                target.copy_(_as_part(dt, target.shape))
                dfactor += dscale.view(3, -1, factor.shape[1]).sum(1)
        return dqkv, dfactor, torch.cat(dwindow, dim=1), None


def _parts(qkv: Lines) -> Iterator[Part]:
    """Which samples and which of their lines to take at once, for scores that fit."""
    batch, groups, _, lines, places = qkv.shape
    most = max(1, (CPU_SCORES if qkv.device.type == "cpu" else DEVICE_SCORES) // (4 * groups * places**2))
    if most >= lines:
        for first in range(0, batch, most // lines):
            yield slice(first, first + most // lines), slice(None)
        return
    for sample in range(batch):
        for first in range(0, lines, most):
            yield slice(sample, sample + 1), slice(first, first + most)


def _taken(t: Lines, part: Part) -> Float[Tensor, "line_group channel place"]:
    """One part, every group of every line by itself."""
    return t[part[0], :, :, part[1]].permute(0, 3, 1, 2, 4).flatten(0, 2).contiguous()


def _as_part(t: Tensor, shape: torch.Size) -> Lines:
    """The other way: (line and group) channel place, as a part of that shape."""
    samples, groups, channels, lines, places = shape[0], shape[1], t.shape[1], shape[-2], shape[-1]
    return t.reshape(samples, lines, groups, channels, places).permute(0, 2, 3, 1, 4)


def _per_line(factor: Tensor, qkv: Lines, part: Part) -> Float[Tensor, "3 line_group 1 1"]:
    """Each group's factors for every line of a part."""
    lines = qkv[part[0], :, :, part[1]].shape
    return factor[:, None].expand(-1, lines[0] * lines[3], -1).reshape(3, -1, 1, 1)


def _split(window: Tensor) -> tuple[Tensor, ...]:
    """The parts of the table for query, key and value."""
    half = window.shape[1] // 4
    return torch.split(window, [half, half, 2 * half], dim=1)


def _turned(t: Tensor, scale: Tensor) -> Float[Tensor, "place line_group channel"]:
    """Query and key by place, scaled for their scores with offsets; a plain transpose is the fastest copy."""
    half = t.shape[1] // 4
    scaled = torch.cat([t[:, :half] * scale[1], t[:, half : 2 * half] * scale[2]], dim=1)
    return scaled.flatten(0, 1).t().contiguous().view(t.shape[2], t.shape[0], 2 * half)


def _turned_back(t: Float[Tensor, "place line_group channel"]) -> Float[Tensor, "line_group channel place"]:
    """Places last again."""
    return t.flatten(1).t().contiguous().view(t.shape[1], t.shape[2], t.shape[0])


def _weights(t: Tensor, turned: Tensor, scale: Tensor, window: Tensor, mask: Tensor | None) -> Tensor:
    """How much each place takes from each other, [line_group, i, j]."""
    half = t.shape[1] // 4
    of_q, of_k, _ = _split(window)
    scores = torch.bmm((t[:, :half] * scale[0]).mT, t[:, half : 2 * half])
    low, scores = scores.dtype, scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores += torch.bmm(turned[:, :, :half], of_q).transpose(0, 1)
    scores += torch.bmm(turned[:, :, half:], of_k).flatten(1).t().contiguous().view(scores.shape)
    if mask is not None:
        scores += mask
    return scores.softmax(-1).to(low)


def _back(
    t: Tensor, scale: Tensor, window: Tensor, mask: Tensor | None, dboth: Tensor, dwindow: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients to a part and to its factors; those to the table are added to `dwindow`."""
    half = t.shape[1] // 4
    of_q, of_k, of_v = _split(window)
    q, k, v = torch.split(t, [half, half, 2 * half], dim=1)
    turned = _turned(t, scale)
    weights = _weights(t, turned, scale, window, mask)
    dcontent = dboth[:, 0::2]
    doffset = dboth[:, 1::2].flatten(0, 1).t().contiguous().view(t.shape[2], t.shape[0], 2 * half)
    dwindow[2].baddbmm_(doffset.mT, weights.transpose(0, 1))
    dweights = torch.bmm(dcontent.mT, v)
    dweights += torch.bmm(doffset, of_v).transpose(0, 1)
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
    dt = torch.empty_like(t)
    dt[:, 2 * half :] = torch.bmm(dcontent, weights)
    to_q, to_k = torch.bmm(k, dscores.mT), torch.bmm(q, dscores)
    by_query = dscores.transpose(0, 1)
    by_key = dscores.flatten(0, 1).t().contiguous().view(t.shape[2], *dscores.shape[:2])
    dwindow[0].baddbmm_(turned[:, :, :half].mT, by_query)
    dwindow[1].baddbmm_(turned[:, :, half:].mT, by_key)
    dturned = torch.cat([torch.bmm(by_query, of_q.mT), torch.bmm(by_key, of_k.mT)], dim=2)
    to_both = _turned_back(dturned)
    dt[:, :half] = to_q * scale[0] + to_both[:, :half] * scale[1]
    dt[:, half : 2 * half] = to_k * scale[0] + to_both[:, half:] * scale[2]
    products = (q * to_q, q * to_both[:, :half], k * to_both[:, half:])
    return dt, torch.stack([product.sum((1, 2)) for product in products])
