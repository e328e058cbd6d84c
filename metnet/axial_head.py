"""`AxialHead`: members that cohere in space and time, drawn around the distributions that a network says.

The maps of a forecast are decoded lead time by lead time and pixel by pixel, each from all before it, by the
axial decoder (Ho et al. 2019, arXiv 1912.12180, sections 3.1 and 3.2).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from metnet.attention.decoder import AxialDecoder, AxialSliceDecoder, ChannelEncoder, gumbel
from metnet.batch import Batch
from metnet.model import MetNet
from metnet.rain import EnsembleForecast, RainBins

UNSEEN = 0  # the code of a pixel that was not observed; class k has the code k + 1


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
        rows, columns = grid
        codes = len(bins) + 1
        self.bins, self.leads = bins, leads
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

    def loss(
        self,
        logits: Float[Tensor, "batch lead bin y x"],
        target: Float[Tensor, "batch lead y x"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """-log P of a pixel given the pixels before it, of one lead time drawn for each sample (nats).

        The mean over the observed pixels of the target (mm/h); a pixel that is NaN is known to be unseen and
        costs nothing. Detach `logits` to leave the network as it is.

        Raises:
            ValueError: for another grid or number of lead times.
        """
        index = torch.randint(self.leads, (len(target),), generator=generator).to(target.device)
        return -self.log_likelihood(logits, target, index)

    def log_likelihood(
        self,
        logits: Float[Tensor, "batch lead bin y x"],
        target: Float[Tensor, "batch lead y x"],
        index: Int[Tensor, "batch"],
    ) -> Float[Tensor, ""]:
        """The mean of log P over the observed pixels of lead time number `index` of each sample (nats)."""
        codes = self.bins.classify(target) + 1
        each = torch.arange(len(codes), device=codes.device)
        of_lead = logits[each, index].log_softmax(dim=1)
        told = self.decoder.encoder(codes, index, _above(of_lead))
        added = self.decoder.decoder.logits(codes[each, index], told)[..., 1:]
        joint = rearrange(added, "batch y x bin -> batch bin y x") + of_lead
        fell = codes[each, index] - 1
        score = F.cross_entropy(joint, fell, ignore_index=UNSEEN - 1, reduction="sum")
        return -score / (fell >= 0).sum().clamp(min=1)

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
        batch, leads, bins, rows, columns = logits.shape
        if leads != self.leads:
            raise ValueError(f"logits have {leads} lead times: expected the {self.leads} of this head")
        every = repeat(logits.log_softmax(dim=2), "batch ... -> (batch member) ...", member=count)
        codes = torch.zeros(batch * count, leads, rows, columns, dtype=torch.long, device=logits.device)
        for lead in range(leads):
            index = torch.full((len(codes),), lead, device=codes.device)
            told = self.decoder.encoder(codes, index, _above(every[:, lead]), dropout=0.0)
            noise = gumbel(len(codes), rows, columns, bins, generator=generator, device=logits.device)
            chance = noise.to(every) + rearrange(every[:, lead], "n bin y x -> n y x bin")
            codes[:, lead] = self.decoder.decoder.sample(F.pad(chance, (1, 0), value=-torch.inf), told)
        level = torch.rand(len(codes), leads, 1, 1, generator=generator).to(every)
        rates = self._rates(codes - 1, level)
        return rearrange(rates, "(batch member) lead y x -> batch member lead y x", member=count)

    def _rates(
        self, classes: Int[Tensor, "n lead y x"], level: Float[Tensor, "n lead 1 1"]
    ) -> Float[Tensor, "n lead y x"]:
        """mm/h at a level of each class, 0 its lower edge and 1 its upper; the dry class is 0."""
        knots = torch.tensor((0.0, *self.bins.edges, self.bins.top)).to(level)
        low, high = knots[classes], knots[classes + 1]
        return torch.where(classes == 0, 0.0, low + level * (high - low))


class Coherent(nn.Module):
    """A `Forecaster` of members that cohere: a network says what each pixel's rain may be, a head draws maps.

    Args:
        network: whose distributions are drawn around.
        head: made for the network's classes.
        count: members of a forecast.
        seed: the same seed draws the same members of the same batch.
    """

    def __init__(self, network: MetNet, head: AxialHead, count: int = 24, seed: int = 0):
        super().__init__()
        if network.bins != head.bins:
            raise ValueError(f"the head draws classes {head.bins}: expected the network's, {network.bins}")
        if count < 1:
            raise ValueError(f"count={count}: expected at least 1 member")
        self.network, self.head = network, head
        self.count, self.seed = count, seed

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self.network.frames

    def forward(self, batch: Batch) -> EnsembleForecast:
        """The members (mm/h) at `batch.lead_time`, whose shares are the marginal distributions."""
        return EnsembleForecast(self.members(batch, self.count, torch.Generator().manual_seed(self.seed)))

    def members(
        self, batch: Batch, count: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch member lead y x"]:
        """Draws `count` members (mm/h) of each sample."""
        with torch.no_grad():
            return self.head.members(self.network.logits(batch), count, generator)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """What the head is trained by (nats a pixel); the network stays as it is.

        Raises:
            ValueError: if the batch has no target.
        """
        if batch.target is None:
            raise ValueError("the batch has no target: expected one made by Samples")
        with torch.no_grad():
            logits = self.network.logits(batch)
        return self.head.loss(logits, batch.target, generator)


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
