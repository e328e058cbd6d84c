import io

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from PIL import Image

from metnet.batch import Batch
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins
from pipelines.construct import construct
from pipelines.palette import RAIN_COLOURS
from pipelines.pictures import CHANCE_COLOURS
from pipelines.task import Habits, Learning, Shown, Task
from pipelines.training_pictures import drawn
from tests.pipelines.training import MODEL

LEADS = torch.tensor([5.0, 10.0, 15.0])


def samples(rain):
    """A sample for each rate (mm/h), with two frames and all lead times of it."""
    rates = torch.tensor(rain)[:, None, None, None].expand(-1, 3, 16, 16)
    age, many = torch.tensor([[5.0, 0.0]] * len(rain)), len(rain)
    return Batch(
        radar=rates[:, :2],
        age=age,
        init_time=torch.zeros(many, dtype=torch.int64),
        lead_time=LEADS,
        cell_size=torch.full((many,), 1000.0),
        motion=torch.zeros(many, 2, 16, 16),
        target=rates,
    )


def test_of_all_validation_samples_the_rainiest_is_shown_and_in_the_next_validation_anew():
    network = construct({**MODEL, "_partial_": False}, ("metnet.",))
    task = Task(network, Learning(), Habits(), lead_times=LEADS.tolist())
    batches = [samples([0.0, 0.5]), samples([0.0, 4.0, torch.nan]), samples([1.0, 2.0])]
    for _ in range(2):
        task.on_validation_epoch_start()
        assert task.shown is None
        for index, batch in enumerate(batches):
            task.validation_step(batch, index)
        assert task.shown.batch is batches[1] and int(task.shown.rain.argmax()) == 1


def test_a_picture_tells_its_colours():
    found = {tuple(pixel) for pixel in picture(0.5).reshape(-1, 3).tolist()}
    for colour in (*RAIN_COLOURS, *CHANCE_COLOURS):
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in found


def test_a_picture_tells_when_its_forecast_was_made_and_for_when(monkeypatch):
    told = []
    for owner, name in ((Figure, "suptitle"), (Axes, "set_title")):
        monkeypatch.setattr(owner, name, lambda self, text, *_, **__: told.append(text))
    picture(0.5)
    assert told == ["step 3: forecast from 1970-01-01 00:00 UTC",
                    "+5 min, 00:05", "+10 min, 00:10", "+15 min, 00:15"]  # fmt: skip


def test_what_is_grey_was_not_observed_or_has_no_forecast(monkeypatch):
    told = []
    monkeypatch.setattr(Colorbar, "set_label", lambda self, text, **_: told.append(text))
    picture(0.5)
    assert list(filter(None, told)) == [
        "mm/h; grey: not observed",
        "probability, %; grey: no forecast",
        "mm/h; grey: no forecast",
    ]


def picture(wet):
    """Of two samples, the second of which has rain in its left half, forecast with probability `wet`."""
    rain = torch.zeros(2, 3, 24, 24)
    rain[1, :, :, :12] = 5.0
    bins = RainBins((1.0, 10.0), 50.0)
    probability = torch.zeros(2, 3, 3, 24, 24)
    probability[:, :, 1] = wet
    probability[:, :, 0] = 1 - wet
    batch = Batch(
        radar=rain[:, :2],
        age=torch.tensor([[5.0, 0.0]] * 2),
        init_time=torch.zeros(2, dtype=torch.int64),
        lead_time=torch.tensor([5.0, 10.0, 15.0]),
        cell_size=torch.full((2,), 1000.0),
    )
    forecasts = {
        "forecast": BinnedForecast(probability, bins),
        "persistence": EnsembleForecast(rain[:, None]),
    }
    png = drawn(Shown(batch, rain, forecasts), "step 3")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_probability_is_drawn_and_the_rest_stays():
    unlikely, likely = picture(0.01), picture(0.99)
    changed = (unlikely != likely).any(axis=2)
    rows = np.flatnonzero(changed.any(axis=1))
    third = len(changed) / 3
    assert third - 20 < rows.min() < rows.max() < 2 * third + 20, "only the middle of three rows"
    assert changed.mean() > 0.2


def test_rain_is_where_it_fell():
    image = picture(0.5)
    first = image[: len(image) // 3, int(0.07 * image.shape[1]) : int(0.35 * image.shape[1])]
    coloured = (first.max(axis=2) - first.min(axis=2) > 60).any(axis=0)
    assert coloured[: first.shape[1] // 2].sum() > 3 * coloured[first.shape[1] // 2 :].sum()
