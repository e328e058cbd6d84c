"""`answer`: what the model that ships says of made-up rain. `python -m tests.pipelines.known_answer` writes it.

The weights that ship know what they are told by its place in a row of numbers, in units of its own. Whoever
changes how a pixel is described changes what they say, and no error tells. Whoever means to, raises `FORWARD`.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metnet.batch import Batch
from metnet.forward import FORWARD
from pipelines.trained import TrainedModel, trained

FILE = Path(__file__).with_suffix(".json")
LEADS = (10.0, 30.0, 60.0)  # minutes
SIDES = 96, 112
THRESHOLDS = (0.1, 1.0, 5.0)  # mm/h
EVERY = 13  # of the rows and columns


def rain(minutes: float, cell: float) -> Tensor:
    """Showers and a band that move, grow and die, in mm/h on a grid with cells of so many km."""
    y, x = (torch.arange(side, dtype=torch.float64) * cell for side in SIDES)
    total = torch.zeros(SIDES, dtype=torch.float64)
    for place in range(6):
        way = (0.6 + 0.05 * place) * minutes, (0.1 - 0.08 * place) * minutes
        east, south = 17.0 * cell * place + way[0], (61 * place % 89) * cell + way[1]
        rate = (3.0 + 4 * place) * math.exp((0.01 - 0.006 * place) * minutes)
        wide, long = (4 + place) * cell, (7 + 2 * place) * cell
        total += rate * torch.exp(-(((x - east) / long) ** 2) - (((y[:, None] - south) / wide) ** 2))
    ripple = 1 + 0.5 * torch.sin(x / (3.1 * cell) + minutes / 40) * torch.cos(y[:, None] / (2.3 * cell))
    return (total * ripple).where(total > 0.08, 0.0).float()


def batches() -> dict[str, Batch]:
    """Rain of three kinds: whole; with a sector and a frame unobserved; told in steps, every 15 minutes."""
    whole = torch.stack([rain(-minutes, 1.0) for minutes in (15, 10, 5, 0)])
    holes = torch.stack([rain(-minutes, 1.0) for minutes in (21, 15, 9, 3)])
    holes[:, 50:, :30] = torch.nan
    holes[1] = torch.nan
    coarse = torch.stack([rain(-minutes, 2.0) for minutes in (45, 30, 15, 0)])
    steps = (coarse * 2).round() / 2
    ages = {"whole": (15, 10, 5, 0), "in part": (21, 15, 9, 3), "in steps": (45, 30, 15, 0)}
    return {
        name: Batch(
            radar=frames[None],
            age=torch.tensor([ages[name]], dtype=torch.float32),
            init_time=torch.tensor([1_593_000_000]),
            lead_time=torch.tensor(LEADS),
            cell_size=torch.tensor([size]),
        )
        for name, frames, size in (("whole", whole, 1e3), ("in part", holes, 1e3), ("in steps", steps, 2e3))
    }


def answer(model: TrainedModel) -> dict[str, Any]:
    """Probabilities of exceeding `THRESHOLDS`, by kind of rain, lead time, threshold and place."""
    told: dict[str, Any] = {"sha256": model.sha256, "forward": FORWARD}
    for name, batch in batches().items():
        forecast = model(batch)
        said = torch.stack([forecast.probability_above(threshold)[0] for threshold in THRESHOLDS], dim=1)
        rounded = [round(number, 4) for number in said[..., ::EVERY, ::EVERY].flatten().tolist()]
        told[name] = [None if math.isnan(number) else number for number in rounded]
    return told


if __name__ == "__main__":
    FILE.write_text(json.dumps(answer(trained("pretrained"))) + "\n")
