"""`Pictures`: what a network says of a validation sample, drawn at each validation of its training."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pipelines.palette import MISSING_COLOUR, rain_colours
from pipelines.pictures import CHANCE_COLOURS, CHANCES
from pipelines.task import Shown, Task

THRESHOLD = 1.0  # mm/h, of the probabilities
MOST = 4  # lead times
SIDE = 1.9  # inches of a panel
DOTS = 80  # an inch


class Pictures(Callback):
    """Draws the rainiest sample of the first validation batch: seen, extrapolated and forecast.

    One file a validation, and an image in TensorBoard.

    Args:
        folder: for `step-00000100.png` and so on.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the newest."""
        assert isinstance(pl_module, Task)
        if pl_module.shown is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        png = drawn(pl_module.shown, f"step {step}")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"step-{step:08d}.png").write_bytes(png)
        image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("validation sample", image, step, dataformats="HWC")


def drawn(shown: Shown, title: str) -> bytes:
    """A PNG of one sample: a row for what was seen and for each forecaster, a column for each lead time."""
    sample = int(shown.target.nan_to_num().flatten(1).sum(dim=1).argmax())
    leads = shown.batch.lead_time.tolist()
    columns = sorted({round(place) for place in np.linspace(0, len(leads) - 1, min(MOST, len(leads)))})
    rows: list[tuple[str, NDArray[np.float32], bool]] = [
        ("observed", shown.target[sample].cpu().numpy(), False)
    ]
    for name, forecast in shown.forecasts.items():
        if name == "forecast":
            chance = forecast.probability_above(THRESHOLD)[sample].cpu().numpy()
            rows.append((f"P(rain >= {THRESHOLD:g} mm/h)", chance, True))
        else:
            rows.append((name, forecast.mean()[sample].cpu().numpy(), False))
    rates, norm = rain_colours()
    chances = ListedColormap(list(CHANCE_COLOURS), name="probability").with_extremes(bad=MISSING_COLOUR)
    chance_norm = BoundaryNorm([*CHANCES, 1.0001], len(CHANCE_COLOURS))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(SIDE * len(columns) + 0.4, SIDE * len(rows) + 0.5), dpi=DOTS)
        panels = figure.subplots(len(rows), len(columns), squeeze=False)
        for line, (label, fields, chance_row) in zip(panels, rows, strict=True):
            for panel, column in zip(line, columns, strict=True):
                colours, scale = (chances, chance_norm) if chance_row else (rates, norm)
                panel.imshow(fields[column], cmap=colours, norm=scale, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
            line[0].set_ylabel(label)
        for panel, column in zip(panels[0], columns, strict=True):
            panel.set_title(f"+{leads[column]:g} min")
        figure.suptitle(title, x=0.01, ha="left")
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.01, top=0.92, wspace=0.03, hspace=0.05)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
