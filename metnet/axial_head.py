"""`AxialHead`: members that cohere in space and time, drawn around the distributions that a network says.

The maps of a forecast are decoded lead time by lead time and pixel by pixel, each from all before it, by the
axial decoder (Ho et al. 2019, arXiv 1912.12180, sections 3.1 and 3.2).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from metnet.attention.decoder import AxialDecoder, AxialSliceDecoder, ChannelEncoder, gumbel
from metnet.batch import Batch
from metnet.calibration import Calibration
from metnet.model import MetNet
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins

RAREST = 1e-6  # probability of a class: a calibration may say 0, of which there is no logarithm


class AxialHead(nn.Module):
    """How the pixels of all lead times hang together, beyond what a network says of each.

    The decoder's logits are added to the network's. They start at all but 0, so members are at first
    independent draws from the network's distributions, and the likelihood begins where the network's is: what
    is learned is only what the maps before, the rows above and the pixels to the left tell in addition. The
    mean over many members may leave the network's distribution where that makes what fell likelier.

    A map of N pixels takes N steps one after the other, for any number of members. The positions are learned,
    so a head is for one grid and one number of lead times.

    Args:
        bins: the classes of the network.
        grid: rows and columns, in pixels.
        leads: how many lead times.
        dim: channels inside.
        heads: of each attention.
        encoder_layers: layers that read the maps of earlier lead times; an even number.
        outer_layers: layers that read the rows above; an even number.
        inner_layers: layers that read what lies to the left.
        dropout: the share of what a layer adds that is dropped in training.

    Raises:
        ValueError: for sizes that do not go together, or a dropout that is no share below 1.
    """

    def __init__(
        self,
        bins: RainBins,
        grid: Sequence[int],
        leads: int,
        dim: int = 64,
        heads: int = 4,
        encoder_layers: int = 2,
        outer_layers: int = 2,
        inner_layers: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: expected a share from 0 to below 1")
        rows, columns = grid
        codes = len(bins) + 1
        self.bins, self.grid, self.leads = bins, (rows, columns), leads
        self.decoder = AxialSliceDecoder(
            ChannelEncoder(
                rows, columns, codes, leads, dim, heads, encoder_layers, cond_dim=len(bins), dropout=dropout
            ),
            AxialDecoder(
                rows,
                columns,
                codes,
                dim,
                heads,
                outer_layers,
                inner_layers,
                cond_dim=dim,
                dropout=dropout,
            ),
        )

    def given_before(
        self,
        logits: Float[Tensor, "batch lead bin y x"],
        target: Float[Tensor, "batch lead y x"],
        index: Int[Tensor, "batch"],
    ) -> Float[Tensor, "batch bin y x"]:
        """Logits of each pixel of lead time number `index` of each sample, given the target (mm/h) before it.

        Before it are the maps of earlier lead times, the rows above, and what lies to the left.

        Raises:
            ValueError: for another grid or number of lead times.
        """
        self._check(logits)
        codes = self.bins.classify(target) + 1  # 0: not observed
        each = torch.arange(len(codes), device=codes.device)
        of_lead = logits[each, index].log_softmax(dim=1)
        told = self.decoder.encoder(codes, index, _above(of_lead))
        added = self.decoder.decoder.logits(codes[each, index], told)[..., 1:]
        return rearrange(added, "batch y x bin -> batch bin y x") + of_lead

    @torch.no_grad()
    def members(
        self,
        logits: Float[Tensor, "batch lead bin y x"],
        count: int,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch member lead y x"]:
        """Draws `count` members of each sample (mm/h); the same generator draws the same.

        Within a wet class, a member's rates lie at one level all over the map: any level is as likely.

        Raises:
            ValueError: for another grid or number of lead times.
        """
        self._check(logits)
        batch, leads, bins, rows, columns = logits.shape
        drawn_on = logits.device if generator is None else generator.device
        every = repeat(logits.log_softmax(dim=2), "batch ... -> (batch member) ...", member=count)
        codes = torch.zeros(batch * count, leads, rows, columns, dtype=torch.long, device=logits.device)
        for lead in range(leads):
            index = torch.full((len(codes),), lead, device=codes.device)
            told = self.decoder.encoder(codes, index, _above(every[:, lead]), dropout=0.0)
            noise = gumbel(len(codes), rows, columns, bins, generator=generator, device=drawn_on)
            chance = noise.to(every) + rearrange(every[:, lead], "n bin y x -> n y x bin")
            codes[:, lead] = self.decoder.decoder.sample(F.pad(chance, (1, 0), value=-torch.inf), told)
        level = torch.rand(len(codes), leads, 1, 1, generator=generator, device=drawn_on).to(every)
        rates = self._rates(codes - 1, level)
        return rearrange(rates, "(batch member) lead y x -> batch member lead y x", member=count)

    def _check(self, logits: Float[Tensor, "batch lead bin y x"]) -> None:
        """Refuses what the head was not made for."""
        leads, grid = logits.shape[1], tuple(logits.shape[3:])
        if leads != self.leads:
            raise ValueError(f"{leads} lead times: expected the {self.leads} that this head draws")
        if grid != self.grid:
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} cells: this head draws maps of {self.grid[0]} x "
                f"{self.grid[1]}; give it a window of that size, or train one for this grid"
            )

    def _rates(
        self, classes: Int[Tensor, "n lead y x"], level: Float[Tensor, "n lead 1 1"]
    ) -> Float[Tensor, "n lead y x"]:
        """mm/h at a level of each class, 0 its lower edge and 1 its upper; the dry class is 0."""
        knots = torch.tensor((0.0, *self.bins.edges, self.bins.top)).to(level)
        low, high = knots[classes], knots[classes + 1]
        return torch.where(classes == 0, 0.0, low + level * (high - low))


class Coherent(nn.Module):
    """A `Forecaster` of members that cohere: a network says what each pixel's rain may be, a head draws maps.

    The network is frozen: learning from `logits` teaches the head alone.

    Args:
        network: whose distributions are drawn around.
        head: made for the network's classes.
        count: members of a forecast.
        seed: the same seed draws the same members of the same batch.
        lead_times: minutes that the head draws, all of them whichever are asked for; none: any, as many as
            the head draws.
        calibration: of the network's probabilities; None: they are taken as they are.
    """

    def __init__(
        self,
        network: MetNet,
        head: AxialHead,
        count: int = 24,
        seed: int = 0,
        lead_times: Sequence[float | int] = (),
        calibration: Calibration | None = None,
    ):
        super().__init__()
        if network.bins != head.bins:
            raise ValueError(f"the head draws classes {head.bins}: expected the network's, {network.bins}")
        if count < 1:
            raise ValueError(f"count={count}: expected at least 1 member")
        if lead_times and len(lead_times) != head.leads:
            raise ValueError(f"lead_times={list(lead_times)}: expected the {head.leads} that the head draws")
        self.network, self.head = network.requires_grad_(False).eval(), head
        self.count, self.seed = count, seed
        self.lead_times = tuple(torch.tensor(list(lead_times), dtype=torch.float32).tolist())  # as batches
        self.calibration = calibration

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self.network.frames

    @property
    def bins(self) -> RainBins:
        """The classes of rain."""
        return self.network.bins

    def train(self, mode: bool = True) -> "Coherent":
        """Sets the head to learn, or to forecast; the network only ever forecasts."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, batch: Batch) -> EnsembleForecast:
        """The members (mm/h) at `batch.lead_time`, whose shares are the marginal distributions.

        Raises:
            ValueError: for another grid, or lead times that the head does not draw.
        """
        whole, asked = self._whole(batch)
        members = self.members(whole, self.count, torch.Generator().manual_seed(self.seed))
        return EnsembleForecast(members[:, :, asked])

    def members(
        self, batch: Batch, count: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch member lead y x"]:
        """Draws `count` members (mm/h) of each sample."""
        return self.head.members(self.alone(batch), count, generator)

    def logits(self, batch: Batch) -> Float[Tensor, "batch lead bin y x"]:
        """Logits of each pixel given the pixels of `batch.target` before it: what a loss wants.

        The loss of these is -log P of the maps that fell. They are no forecast, since they know what fell
        beside each pixel.

        Raises:
            ValueError: if the batch has no target, or is not what the head was made for.
        """
        if batch.target is None:
            raise ValueError("the batch has no target: expected one made by Samples")
        alone, target = self.alone(batch), batch.target
        each = [torch.full((len(target),), lead, device=target.device) for lead in range(target.shape[1])]
        return torch.stack([self.head.given_before(alone, target, index) for index in each], dim=1)

    @torch.no_grad()
    def alone(self, batch: Batch) -> Float[Tensor, "batch lead bin y x"]:
        """Logits of the network alone, calibrated: of draws that know nothing of each other."""
        logits = self.network.logits(batch)
        if self.calibration is None:
            return logits
        said = BinnedForecast(logits.float().softmax(dim=2), self.bins)
        return self.calibration(said, batch.lead_time).probability.clamp(min=RAREST).log()

    def _whole(self, batch: Batch) -> tuple[Batch, list[int]]:
        """The batch at all lead times of the head, and the places of those that are asked for."""
        leads = batch.lead_time.tolist()
        if not self.lead_times:
            return batch, list(range(len(leads)))
        if unknown := [lead for lead in leads if lead not in self.lead_times]:
            known = ", ".join(f"{lead:g}" for lead in self.lead_times)
            raise ValueError(
                f"lead_times={unknown}: this head draws maps at {known} min; ask for some of these, or train "
                "a head for others"
            )
        every = torch.tensor(self.lead_times).to(batch.lead_time)
        return replace(batch, lead_time=every), [self.lead_times.index(lead) for lead in leads]


def window_mean(
    members: Float[Tensor, "batch member lead y x"], lead_time: Float[Tensor, "lead"]
) -> EnsembleForecast:
    """The distribution of the mean rate (mm/h) from the first lead time to the last (minutes, rising).

    By the trapezoidal rule, member by member: a sum over a window cannot be had from the distributions of its
    lead times, since how they hang together is in none of them. Times the hours of the window it is the
    accumulation in mm.

    Raises:
        ValueError: if there are not two lead times at least.
    """
    if len(lead_time) < 2:
        raise ValueError(f"lead_time={lead_time.tolist()}: expected the two ends of a window at least")
    total = torch.trapezoid(members, lead_time.to(members), dim=2)
    return EnsembleForecast((total / (lead_time[-1] - lead_time[0]).to(total))[:, :, None])


def _above(log_probability: Float[Tensor, "n bin y x"]) -> Float[Tensor, "n y x bin"]:
    """The probability of each class or a higher one: what the decoder is told, within 0 and 1."""
    above = log_probability.exp().flip(1).cumsum(dim=1).flip(1)
    return rearrange(above, "n bin y x -> n y x bin")
