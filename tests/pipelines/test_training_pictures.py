import io

import numpy as np
import torch
from PIL import Image

from metnet.batch import Batch
from metnet.rain import BinnedForecast, EnsembleForecast, RainBins
from pipelines.task import Shown
from pipelines.training_pictures import drawn


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
