"""`python -m benchmarks.gallery`: draws what each block of attention sees, and what it costs."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import forward_backward, peak_mib
from metnet.attention import (
    AxialAttention,
    AxialDecoder,
    AxialImageTransformer,
    ColumnAttention,
    CrissCrossAttention,
    ExternalAttention,
    PositionSensitiveAxialAttention,
    RowAttention,
    RowColumnAttention,
    SelfAttention,
)
from metnet.attention.residual import BothAxes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "attention"
ROWS_SEEN, COLUMNS_SEEN = 24, 32
ASKING = (9, 20)  # the pixel that looks: row, column
SIDES = (16, 32, 64, 128)
CHANNELS = 64
HALF = 6  # places to each side, of the position-sensitive block with a span


class WholeMap(nn.Module):
    """Every pixel attends to all pixels: what the others do without."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention = SelfAttention(channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        """The map, as one line."""
        mixed: Tensor = self.attention(x.flatten(2).mT).mT
        return mixed.reshape(x.shape)


def position_sensitive(places: int, span: int | None) -> Callable[[int], nn.Module]:
    """Columns, then rows."""
    layer = partial(PositionSensitiveAxialAttention, groups=8, kernel_size=places, span=span, norm="layer")
    return lambda channels: BothAxes(channels, layer)


def blocks(side: int) -> Mapping[str, Callable[[int], nn.Module]]:
    """What makes each block from its channels, for maps of up to `side` pixels."""
    return {
        "axial": partial(AxialAttention, heads=8, dim_index=1),
        "axial_sequential": partial(AxialAttention, heads=8, dim_index=1, sum_axial_out=False),
        "row": partial(RowAttention, q_k_dim=8),
        "column": partial(ColumnAttention, q_k_dim=8),
        "row_col_sum": partial(RowColumnAttention, q_k_dim=8, mode="sum"),
        "row_col": partial(RowColumnAttention, q_k_dim=8, mode="row_col"),
        "criss_cross_1": partial(CrissCrossAttention, recurrence=1),
        "criss_cross_2": partial(CrissCrossAttention, recurrence=2),
        "position_sensitive": position_sensitive(side, None),
        "position_sensitive_span": position_sensitive(HALF + 1, HALF + 1),
        "external": ExternalAttention,
        "image_transformer": partial(AxialImageTransformer, depth=1),
    }


def seen(block: nn.Module) -> np.ndarray:
    """How much the output at the asking pixel moves with each pixel of the input; 0 where not at all."""
    torch.manual_seed(0)
    for name, weight in block.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(weight)
    x = torch.randn(1, CHANNELS, ROWS_SEEN, COLUMNS_SEEN, dtype=torch.float64, requires_grad=True)
    out = block.double().eval()(x)[0, :, ASKING[0], ASKING[1]]
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad is not None
    strength: np.ndarray = x.grad[0].norm(dim=0).numpy()
    return strength


def seen_by_decoder() -> np.ndarray:
    """How much the decoder's logits at the asking pixel move when the bin of another pixel changes."""
    torch.manual_seed(0)
    decoder = AxialDecoder(ROWS_SEEN, COLUMNS_SEEN, 4, 16, 2, num_outer_layers=2, num_inner_layers=2).double()
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=0.3)
    drawn = torch.randint(4, (ROWS_SEEN, COLUMNS_SEEN))
    pixels = ROWS_SEEN * COLUMNS_SEEN
    others = drawn.flatten().repeat(pixels, 1)
    others.diagonal().add_(1).remainder_(4)
    with torch.no_grad():
        before = decoder.logits(drawn[None])[0, ASKING[0], ASKING[1]]
        moved = [
            decoder.logits(part.view(-1, ROWS_SEEN, COLUMNS_SEEN))[:, ASKING[0], ASKING[1]]
            for part in others.split(64)
        ]
    change: np.ndarray = (torch.cat(moved) - before).norm(dim=1).view(ROWS_SEEN, COLUMNS_SEEN).numpy()
    return change


def draw_seen(folder: Path, name: str, strength: np.ndarray) -> None:
    """White: not seen at all; the darker, the more it matters (logarithmic)."""
    shown = np.full(strength.shape, np.nan)
    inside = strength > 0
    shown[inside] = np.log10(strength[inside] / strength.max())
    figure, axes = plt.subplots(figsize=(2.4, 1.9), dpi=80)
    colours = matplotlib.colormaps["Blues"].copy()
    axes.imshow(shown, cmap=colours, vmin=-5.5, vmax=0)
    axes.plot(ASKING[1], ASKING[0], "s", color="crimson", markersize=4, markerfacecolor="none")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{name.replace('_', ' ')}: {inside.mean():.0%}", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)


def cost(make: Callable[[int], nn.Module], side: int) -> tuple[float, float]:
    """CPU milliseconds and peak MiB of forward + backward on one thread."""
    torch.manual_seed(0)
    work = forward_backward(make(CHANNELS), torch.randn(1, CHANNELS, side, side))
    peak = peak_mib(work)
    taken = []
    for _ in range(3):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken) * 1e3, peak


def draw_costs(folder: Path) -> None:
    """Time and memory against the side of the map, for each block and for attention over the whole map."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.4), dpi=80)
    names = [name for name in blocks(1) if name not in ("row", "column", "row_col_sum")]
    styles = ["-", "--", ":"]
    for n, name in enumerate(["whole_map", *names]):
        sides = [side for side in SIDES if name != "whole_map" or side < SIDES[-1]]
        costs = [cost(WholeMap if name == "whole_map" else blocks(side)[name], side) for side in sides]
        look = {"color": "black" if n == 0 else f"C{n - 1}", "linestyle": styles[n % 3], "marker": "."}
        for panel, values in zip(panels, zip(*costs, strict=True), strict=True):
            panel.loglog(sides, values, label=name.replace("_", " "), **look)
    for panel, label in zip(panels, ("CPU ms", "peak MiB"), strict=True):
        panel.set_xticks(SIDES, [f"{side}²" for side in SIDES])
        panel.minorticks_off()
        panel.set_xlabel("pixels")
        panel.set_title(f"{label}, forward + backward, {CHANNELS} channels", fontsize=10)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.savefig(folder / "cost.png")
    plt.close(figure)


def main() -> None:
    """Draws all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help=f"folder for the pictures (default {FOLDER})"
    )
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in blocks(max(ROWS_SEEN, COLUMNS_SEEN)).items():
        draw_seen(folder, name, seen(make(CHANNELS)))
    draw_seen(folder, "decoder", seen_by_decoder())
    torch.set_num_threads(1)
    draw_costs(folder)


if __name__ == "__main__":
    main()
