"""The reversible trunk against axial_attention 0.6.1, the cached sampler against recomputation per pixel."""

import torch
from axial_attention import AxialImageTransformer as Published
from torch import Tensor

from benchmarks.harness import Row, Work, forward_backward
from metnet.attention.decoder import AxialDecoder, gumbel
from metnet.attention.image_transformer import AxialImageTransformer

DIM, SIDE = 64, 128
BINS, FIELD, EVERY = 32, 64, 64  # the peer of the sampler recomputes one pixel in EVERY


def trunk(depth: int) -> tuple[Work, Work]:
    """Ours and the published one, with the same weights, on the same map."""
    torch.manual_seed(0)
    published = Published(DIM, depth)
    ours = AxialImageTransformer(DIM, depth)
    ours.load_state_dict(published.state_dict())
    x = torch.randn(1, DIM, SIDE, SIDE)
    return forward_backward(ours, x), forward_backward(published, x)


def trunk_that_remembers(depth: int) -> tuple[Work, Work]:
    """Ours recomputing, and ours keeping all activations."""
    torch.manual_seed(0)
    recomputing, remembering = (AxialImageTransformer(DIM, depth, remember=kept) for kept in (False, True))
    remembering.load_state_dict(recomputing.state_dict())
    x = torch.randn(1, DIM, SIDE, SIDE)
    return forward_backward(recomputing, x), forward_backward(remembering, x)


def decoder() -> tuple[AxialDecoder, Tensor]:
    """A decoder whose logits are not all equal, and noise for 8 maps."""
    torch.manual_seed(0)
    module = AxialDecoder(FIELD, FIELD, BINS, DIM, 8, num_outer_layers=4, num_inner_layers=4)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return module, gumbel(8, FIELD, FIELD, BINS)


def sampler() -> tuple[Work, Work]:
    """Ours draws a whole map; the peer draws one pixel in `EVERY` of the same map, each from a whole pass."""
    module, noise = decoder()
    drawn = module.sample(noise[:1])
    chosen = range(EVERY - 1, FIELD * FIELD, EVERY)

    def ours() -> tuple[Tensor, ...]:
        return (module.sample(noise[:1]).flatten()[list(chosen)].float(),)

    def recomputed() -> tuple[Tensor, ...]:
        pixels = []
        with torch.no_grad():
            for at in chosen:
                so_far = drawn.flatten().clone()
                so_far[at:] = 0
                logits = module.logits(so_far.view_as(drawn)) + noise[:1]
                pixels.append(logits.flatten(0, 2)[at].argmax())
        return (torch.stack(pixels).float(),)

    return ours, recomputed


def members() -> tuple[Work, Work]:
    """Eight members in one call, and one member in each of two calls."""
    module, noise = decoder()

    def eight() -> tuple[Tensor, ...]:
        return (module.sample(noise)[:2],)

    def two() -> tuple[Tensor, ...]:
        return (torch.cat([module.sample(noise[:1]), module.sample(noise[1:2])]),)

    return eight, two


MAP = f"{DIM} channels, {SIDE}^2, f+b"
DRAW = f"{FIELD}^2, {BINS} bins, 4 + 4 layers of {DIM}"
PUBLISHED = "axial_attention 0.6.1, reversible"
KEPT = "ours, remember=True"
NEAR = 0.02  # of the largest value: in float32 some signs of LeakyReLU flip with the rounding
ROWS = (
    Row("trunk_4", f"depth 4, {MAP}", PUBLISHED, lambda: trunk(4), 1 / 0.7, 0.5, NEAR, 3),
    Row("trunk_24", f"depth 24, {MAP}", PUBLISHED, lambda: trunk(24), 1 / 0.7, 0.5, NEAR, 1),
    Row("trunk_kept_4", f"depth 4, {MAP}", KEPT, lambda: trunk_that_remembers(4), 1 / 1.35, 0.5, NEAR, 3),
    Row("sampler", f"{DRAW}, a map", f"one pixel in {EVERY} recomputed", sampler, 20 / EVERY, None, 0.0, 3),
    Row("sampler_8", f"{DRAW}, 8 members", "2 members, one by one", members, 1.0, None, None, 3),
)
