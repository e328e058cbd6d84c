"""Forecasts of 60 lead times and steps of training against openclimatefix/metnet, a pass for each lead time.

`EncodeOnce` sees the peer's own input and gives its output, at its widths, of this package's parts: what
telling the lead time by FiLM is worth. `MetNet` is what is trained here; its forecast is at the full
resolution of the input, where the peer's is at a sixteenth of it along each side. In a row of its own a
`MetNet` that is told the lead time at its input, as the peer is, is the peer of one that is not.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, Work
from benchmarks.published import ocf_metnet
from metnet.attention.axial import AxialAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ResidualBlock
from metnet.axial_head import AxialHead
from metnet.batch import Batch
from metnet.conv_lstm import ConvLSTM
from metnet.lead_time import LeadTimeEmbedding, LeadTimePlanes
from metnet.model import MetNet
from metnet.rain import RainBins

LEADS, STEP = 60, 2.0  # lead times, and minutes from one to the next
TRAINED = 4  # lead times of a sample that a step learns from
IMAGE, OTHER, OUT = 12, 4, 12  # channels: of the satellite, of all else, and of the forecast
HEADS, DEPTH = 16, 2
Size = tuple[int, int, int]  # width, frames, side of the input
README: Size = (32, 12, 128)
WIDE: Size = (128, 7, 256)


class EncodeOnce(nn.Module):
    """The peer's order of parts, with the lead time behind the memory and all of them as one batch."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.preprocess = ocf_metnet.Preprocessor(IMAGE, side // 4)
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.downsampler = nn.Sequential(
            convolution(8 * IMAGE + OTHER, 160),
            nn.ReLU(),
            nn.MaxPool2d(2),
            convolution(160, 256),
            nn.ReLU(),
            convolution(256, 256),
            nn.ReLU(),
            convolution(256, 256),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.memory = ConvLSTM(256, width)
        self.positions = AxialPositionalEmbedding(width, (side // 16, side // 16))
        self.lead_time = LeadTimeEmbedding(64)
        self.blocks = nn.ModuleList(
            ResidualBlock(AxialAttention(width, heads=HEADS, dim_index=1), width, 64) for _ in range(DEPTH)
        )
        self.head = nn.Conv2d(width, OUT, 1)

    def forward(self, frames: Tensor, lead_time: Tensor) -> Tensor:
        """Maps (lead, channel, y, x) from one sample (1, time, channel, Y, X) and minutes."""
        seen = self.preprocess(frames)[0].contiguous(memory_format=torch.channels_last)
        field = self.positions(self.memory(self.downsampler(seen)[None]))
        field = field.expand(len(lead_time), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        told = self.lead_time(lead_time)
        for block in self.blocks:
            field = block(field, told)
        maps: Tensor = self.head(field)
        return maps


def minutes(count: int = LEADS) -> Tensor:
    """The first lead times."""
    return STEP * torch.arange(1.0, count + 1)


def peer(size: Size) -> tuple[nn.Module, Tensor]:
    """The published network, and what it is shown."""
    torch.manual_seed(0)
    width, frames, side = size
    network = ocf_metnet.MetNet(
        IMAGE + OTHER,
        IMAGE,
        side // 4,
        OUT,
        width,
        num_att_layers=DEPTH,
        num_att_heads=HEADS,
        forecast_steps=LEADS,
    )
    return network, torch.randn(1, frames, IMAGE + OTHER, side, side)


def forecast(size: Size) -> tuple[Work, Work]:
    """All lead times of one sample: in one pass, and in a pass each."""
    theirs, shown = peer(size)
    ours = EncodeOnce(size[0], size[2]).eval()
    theirs.eval()

    @torch.no_grad()
    def once() -> tuple[Tensor, ...]:
        return (ours(shown, minutes()),)

    return once, _by_lead(theirs, shown)


def _by_lead(network: nn.Module, shown: Tensor) -> Work:
    @torch.no_grad()
    def every() -> tuple[Tensor, ...]:
        return (torch.cat([network(shown, lead) for lead in range(LEADS)]),)

    return every


def forecast_by_metnet(size: Size) -> tuple[Work, Work]:
    """`MetNet` at full resolution, and the peer."""
    theirs, shown = peer(size)
    network, batch = metnet(size, planes=False)
    return _logits(network, batch), _by_lead(theirs.eval(), shown)


def forecast_by_planes(size: Size) -> tuple[Work, Work]:
    """`MetNet` with FiLM, and the same with planes at its input."""
    return _logits(*metnet(size, planes=False)), _logits(*metnet(size, planes=True))


def _logits(network: MetNet, batch: Batch) -> Work:
    @torch.no_grad()
    def forecast() -> tuple[Tensor, ...]:
        return (network(batch).probability,)

    return forecast


def metnet(size: Size, planes: bool) -> tuple[MetNet, Batch]:
    """A plain `MetNet` of the same width and frames, that sees radar and as many satellite channels."""
    torch.manual_seed(0)
    width, frames, side = size
    network = MetNet(
        frames,
        width,
        depth=DEPTH,
        attention=partial(AxialAttention, heads=HEADS, dim_index=1),
        advection=False,
        lead_time=LeadTimePlanes(STEP, LEADS) if planes else None,
        satellite=[(0.0, 1.0)] * IMAGE,
        satellite_frames=frames,
    )
    age = torch.arange(frames - 1, -1, -1.0)[None]
    batch = Batch(
        radar=torch.randn(1, frames, side, side).exp(),
        age=age,
        init_time=torch.zeros(1, dtype=torch.int64),
        lead_time=minutes(),
        cell_size=torch.full((1,), 1000.0),
        satellite=torch.randn(1, frames, IMAGE, side, side),
        satellite_age=age[..., None],
    )
    return network.eval(), batch


def training(size: Size, leads: int) -> tuple[Work, Work]:
    """Forward and backward of one sample at `leads` lead times; the peer adds up gradients pass by pass."""
    theirs, shown = peer(size)
    ours = EncodeOnce(size[0], size[2])

    def at_once() -> tuple[Tensor, ...]:
        ours.zero_grad(set_to_none=True)
        loss = ours(shown, minutes(leads)).square().mean()
        loss.backward()
        return (loss.detach(),)

    def one_by_one() -> tuple[Tensor, ...]:
        theirs.zero_grad(set_to_none=True)
        losses = []
        for lead in range(leads):
            loss = theirs(shown, lead).square().mean() / leads
            loss.backward()
            losses.append(loss.detach())
        return (torch.stack(losses).sum(),)

    return at_once, one_by_one


def members() -> tuple[Work, Work]:
    """All members of a forecast that coheres, and one of them."""
    torch.manual_seed(0)
    bins = RainBins.preferred()
    head = AxialHead(bins, (FIELD, FIELD), DRAWN).eval()
    logits = torch.randn(1, DRAWN, len(bins), FIELD, FIELD)

    def draw(count: int) -> tuple[Tensor, ...]:
        return (head.members(logits, count, torch.Generator().manual_seed(0)),)

    return partial(draw, MEMBERS), partial(draw, 1)


def _row(
    name: str, work: str, peer: str, make: Callable[[], tuple[Work, Work]], goal: float, memory: float | None
) -> Row:
    return Row(name, work, peer, make, goal, memory, tolerance=None, rounds=1)


FIELD, DRAWN, MEMBERS = 32, 2, 24  # side of a map, lead times, members
OCF = "openclimatefix/metnet 4.1.25"
PLANES = "lead_time=input"
SIZES = {
    "readme": (README, "12 x 16 x 128^2, width 32"),
    "wide": (WIDE, "7 x 16 x 256^2, width 128"),
}
ROWS = (
    *(
        row
        for name, (size, said) in SIZES.items()
        for row in (
            _row(f"leads_60_{name}", f"{LEADS} leads, {said}", OCF, partial(forecast, size), 40, None),
            _row(
                f"leads_60_metnet_{name}",
                f"the same, MetNet, {size[2]}^2 out",
                f"{OCF}, {size[2] // 16}^2 out",
                partial(forecast_by_metnet, size),
                1,
                None,
            ),
            _row(f"step_1_{name}", f"step, 1 lead, {said}", OCF, partial(training, size, 1), 2, 0.5),
            _row(
                f"step_{TRAINED}_{name}",
                f"step, {TRAINED} leads, {said}",
                OCF,
                partial(training, size, TRAINED),
                2,
                0.5,
            ),
        )
    ),
    _row(
        "leads_60_planes_readme",
        f"{LEADS} leads, MetNet, {SIZES['readme'][1]}",
        PLANES,
        partial(forecast_by_planes, README),
        1,
        None,
    ),
    _row(
        "members",
        f"{MEMBERS} members, {DRAWN} leads, {FIELD}^2, AxialHead",
        "1 member",
        members,
        1 / 8,
        None,
    ),
)
