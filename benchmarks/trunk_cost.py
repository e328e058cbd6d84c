"""`python -m benchmarks.trunk_cost`: draws docs/images/attention/trunk.png: plain and reversible trunks.

Time and memory of a forward and a backward pass against the side of the map and against the depth. Each point
is measured in a process of its own, whose memory is limited: what does not fit is told, and harms nobody.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch

from benchmarks.harness import machine
from metnet.attention.image_transformer import AxialImageTransformer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "attention" / "trunk.png"
DIM, HEADS = 32, 4
DEPTH, SIDE = 4, 128  # of the panels in which the other varies
SIDES = (64, 128, 256, 512, 1024)
DEPTHS = (1, 2, 4, 8, 16, 32)
KINDS = {"reversible": False, "plain": True}  # whether activations are kept


@dataclass(frozen=True)
class Point:
    """One measurement."""

    kind: str
    side: int
    depth: int
    seconds: float | None = None  # CPU seconds of a forward and a backward pass; None where it did not fit
    mib: float | None = None  # the most memory of the process meanwhile, above what it had before


def measure(point: Point, gib: float) -> Point:
    """One forward and backward pass of one map, on one thread, within so much memory."""
    limit = round(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trunk = AxialImageTransformer(DIM, point.depth, heads=HEADS, remember=KINDS[point.kind])
    there_and_back(trunk, 16)  # loads what is loaded once
    before = most_mib()
    start = time.process_time()
    there_and_back(trunk, point.side)
    return replace(point, seconds=time.process_time() - start, mib=most_mib() - before)


def there_and_back(trunk: AxialImageTransformer, side: int) -> None:
    """All gradients of one map."""
    out = trunk(torch.randn(1, DIM, side, side, requires_grad=True))
    out.backward(torch.ones_like(out))


def most_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(point: Point, gib: float) -> Point:
    """The measurement, or the point as it is where it did not fit."""
    command = [sys.executable, "-m", "benchmarks.trunk_cost", "--gib", str(gib), "--point"]
    done = subprocess.run([*command, json.dumps(asdict(point))], capture_output=True, text=True)
    if done.returncode == 0:
        return Point(**json.loads(done.stdout.splitlines()[-1]))
    if "allocate memory" in done.stderr or "MemoryError" in done.stderr or done.returncode < 0:
        return point
    raise RuntimeError(f"{point}: {done.stderr[-500:]}")


def points(sides: tuple[int, ...]) -> list[Point]:
    """All that is measured, the small ones first."""
    by_side = [Point(kind, side, DEPTH) for side in sides for kind in KINDS]
    by_depth = [Point(kind, SIDE, depth) for depth in DEPTHS for kind in KINDS if depth != DEPTH]
    return sorted(by_side + by_depth, key=lambda point: point.side**2 * point.depth)


def draw(measured: list[Point], told: str) -> None:
    """Four panels: time and memory, by side and by depth; a cross where a trunk did not fit."""
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 6.4), dpi=80)
    for panel_row, value in zip(panels, ("seconds", "mib"), strict=True):
        for panel, axis, other, fixed in zip(
            panel_row, ("side", "depth"), ("depth", "side"), (DEPTH, SIDE), strict=True
        ):
            for kind, mark in zip(KINDS, ("o-", "s--"), strict=True):
                some = [p for p in measured if p.kind == kind and getattr(p, other) == fixed]
                fit = sorted((getattr(p, axis), getattr(p, value)) for p in some if p.seconds is not None)
                panel.loglog(*zip(*fit, strict=True), mark, markersize=4, label=kind)
                for p in some:
                    if p.seconds is None:
                        panel.axvline(
                            getattr(p, axis), color="crimson", linestyle=":", label=f"{kind}: no room"
                        )
            ticks = sorted({getattr(p, axis) for p in measured if getattr(p, other) == fixed})
            panel.set_xticks(ticks, [f"{tick}²" if axis == "side" else str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.set_title(
                f"{'CPU seconds' if value == 'seconds' else 'MiB'}, "
                f"{f'depth {DEPTH}' if axis == 'side' else f'{SIDE}² pixels'}, by {axis}",
                fontsize=10,
            )
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.suptitle(f"AxialImageTransformer, {DIM} channels, forward + backward\n{told}", fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE)
    plt.close(figure)


def main() -> None:
    """Measures, keeping what was measured before, and draws."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trunk_cost", description=__doc__)
    parser.add_argument("--gib", type=float, default=16.0, help="memory of a measurement (default 16)")
    parser.add_argument("--side", type=int, default=SIDES[-1], help="the largest side (default 1024)")
    parser.add_argument(
        "--numbers", type=Path, help="a file of what earlier runs printed; not measured again"
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(asdict(measure(Point(**json.loads(asked.point)), asked.gib))))
        return
    lines = asked.numbers.read_text().splitlines() if asked.numbers else []
    known = {
        (point.kind, point.side, point.depth): point for point in (Point(**json.loads(x)) for x in lines)
    }
    measured = []
    for point in points(tuple(side for side in SIDES if side <= asked.side)):
        before = known.get((point.kind, point.side, point.depth))
        measured.append(before or in_a_process(point, asked.gib))
        print(json.dumps(asdict(measured[-1])), flush=True)
    draw(measured, f"{machine()}, at most {asked.gib:g} GiB")


if __name__ == "__main__":
    main()
