"""`Pictures`: what a network says of a validation sample, drawn at each validation of its training."""

import io
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from pipelines.pictures import Panel, scale_of, show_scale
from pipelines.task import Shown, Task

THRESHOLD = 1.0  # mm/h, of the probabilities
MOST = 4  # lead times
SIDE = 1.9  # inches of a panel
BAR = 0.9  # inches, of the colour bars
DOTS = 100  # an inch


class Pictures(Callback):
    """Draws the rainiest validation sample: seen, extrapolated and forecast.

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
    """A PNG of the rainiest sample: a row for what was seen and for each forecaster, a column a lead time."""
    sample = int(shown.rain.argmax())
    init = datetime.fromtimestamp(int(shown.batch.init_time[sample]), UTC)
    leads = shown.batch.lead_time.tolist()
    columns = sorted({round(place) for place in np.linspace(0, len(leads) - 1, min(MOST, len(leads)))})
    rows = _rows(shown, sample)
    with matplotlib.rc_context({"font.size": 8, "axes.edgecolor": "#999999"}):
        size = SIDE * len(columns) + BAR, SIDE * len(rows) + 0.6
        figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
        figure.suptitle(f"{title}: forecast from {init:%Y-%m-%d %H:%M} UTC", x=0.01, ha="left", fontsize=10)
        panels = figure.subplots(len(rows), len(columns), squeeze=False)
        for line, row in zip(panels, rows, strict=True):
            scale = scale_of([row])
            for panel, column in zip(line, columns, strict=True):
                field = row.field[column]
                panel.imshow(field, cmap=scale.colours, norm=scale.norm, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
            line[0].set_ylabel(row.title)
        for panel, column in zip(panels[0], columns, strict=True):
            valid = init + timedelta(minutes=leads[column])
            panel.set_title(f"+{leads[column]:g} min, {valid:%H:%M}", fontsize=8)
        for _, group in groupby(
            zip(panels, rows, strict=True), lambda pair: (pair[1].probability, pair[1].missing)
        ):
            alike = list(group)
            show_scale(figure, [panel for line, _ in alike for panel in line], scale_of([alike[0][1]]))
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _rows(shown: Shown, sample: int) -> list[Panel]:
    """What was seen and what each forecaster said of a sample, at all lead times: fields (lead, y, x)."""
    rows, grey = [Panel("observed", shown.target[sample].cpu().numpy())], "no forecast"
    for name, forecast in shown.forecasts.items():
        if name == "forecast":
            chance = forecast.probability_above(THRESHOLD)[sample].cpu().numpy()
            rows.append(Panel(f"P(rain ≥ {THRESHOLD:g} mm/h)", chance, True, missing=grey))
        else:
            rows.append(Panel(name, forecast.mean()[sample].cpu().numpy(), missing=grey))
    return rows
