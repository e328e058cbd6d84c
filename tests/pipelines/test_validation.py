import json

import pytest
import torch

from metnet.rain import EnsembleForecast
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from pipelines.validation import BASELINES, NAMES, SCORES, Validation, write_down


def some(seed, lead=2):
    """Two members' forecast and what was observed, half of it dry and some of it not seen."""
    random = torch.Generator().manual_seed(seed)
    rain = torch.rand(3, lead, 6, 5, generator=random) * 4 - 2
    observed = rain.clamp(min=0)
    observed[:, :, 0] = torch.nan
    return EnsembleForecast(
        (rain[:, None] + torch.rand(3, 2, lead, 6, 5, generator=random)).clamp(min=0)
    ), observed


def test_batches_of_other_lead_times_add_up_to_the_scores_of_all_of_them():
    validation = Validation([5, 10, 20])
    (one, seen), (other, seen_too) = some(0), some(1)
    validation.begin()
    validation.add("forecast", one, seen, [5.0, 10.0])
    validation.add("forecast", other, seen_too, [10.0, 20.0])
    values = validation.scored("forecast").values
    sums = [Crps().sums(one, seen), Crps().sums(other, seen_too)]
    expected = torch.stack([sums[0][0], sums[0][1] + sums[1][0], sums[1][1]])
    assert values["crps"] == pytest.approx(Crps().value(expected).tolist())
    sums = [Csi(1.0).sums(one, seen), Csi(1.0).sums(other, seen_too)]
    expected = torch.stack([sums[0][0], sums[0][1] + sums[1][0], sums[1][1]])
    assert values["csi_1"] == pytest.approx(Csi(1.0).value(expected).tolist())
    assert set(values) == set(NAMES) and len(NAMES) == len(SCORES)


def test_lead_times_are_known_as_batches_have_them():
    validation = Validation([5 / 3, 10 / 3])
    validation.begin()
    validation.add("forecast", *some(0), torch.tensor([5 / 3, 10 / 3]).tolist())
    assert None not in validation.scored("forecast").values["crps"]


def test_a_lead_time_without_an_observation_has_no_score():
    validation = Validation([5, 10])
    forecast, observed = some(0, lead=1)
    validation.add("forecast", forecast, observed, [10.0])
    scored = validation.scored("forecast")
    assert scored.values["crps"][0] is None and scored.values["crps"][1] > 0
    assert scored.means()["crps"] == scored.values["crps"][1]


def test_baselines_are_scored_once_and_kept_through_a_checkpoint():
    validation = Validation([5, 10])
    forecast, observed = some(0)
    assert validation.wants_baselines
    for name in BASELINES:
        validation.add(name, forecast, observed, [5, 10])
    validation.begin()
    assert validation.forecasters() == (), "they were not completed"
    for name in BASELINES:
        validation.add(name, forecast, observed, [5, 10])
    validation.end(BASELINES)
    after = Validation([5, 10])
    after.restore(validation.state())
    after.begin()
    assert not after.wants_baselines
    assert after.scored("persistence") == validation.scored("persistence")


def test_sums_of_two_processes_are_those_of_one():
    alone, two = Validation([5, 10]), [Validation([5, 10]) for _ in range(2)]
    for part, validation in enumerate(two):
        for each in (alone, validation):
            each.add("forecast", *some(part), [5, 10])
    joined = sum(each.flat(["forecast"]) for each in two)
    two[0].unflatten(joined, ["forecast"])
    assert two[0].scored("forecast").values["crps"] == pytest.approx(alone.scored("forecast").values["crps"])


def test_a_step_that_is_validated_again_stands_in_the_file_once(tmp_path):
    validation = Validation([5, 10])
    validation.add("forecast", *some(0), [5, 10])
    for step in (0, 3, 6, 3):
        write_down(tmp_path / "scores.jsonl", step, validation)
    steps = [json.loads(line)["step"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert steps == [0, 3]
