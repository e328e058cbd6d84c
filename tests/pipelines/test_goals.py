"""What is asked of a forecast, judged on numbers that are known."""

import math
from datetime import UTC, datetime, timedelta

import pytest
import torch
from torch import Tensor

from metnet.rain import EnsembleForecast
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.goals import BASELINES, Goal, goal_table, goals, neighbourhoods, tally
from pipelines.skill import Skill

START = datetime(2020, 6, 1, tzinfo=UTC)
LEADS = (10.0, 28.0, 60.0)
NAMES = ("trained", *BASELINES)
WIDENED = "the widened extrapolation"


def skill_of(sums: dict[Score, Tensor], runs: int = 8) -> Skill:
    """A skill of runs far apart; `sums` holds by score what each forecaster has of one run."""
    count = torch.full((runs, len(LEADS)), 100.0, dtype=torch.float64)
    return Skill(
        scores=tuple(sums),
        forecasters=NAMES,
        init_times=tuple(START + i * timedelta(hours=2) for i in range(runs)),
        lead_times=LEADS,
        sums={
            score.name: part[:, None].double().expand(-1, runs, -1, -1).contiguous()
            for score, part in sums.items()
        },
        pixels=count,
        observed=count,
        rain=count,
    )


def means(trained: float, steps: float, widened: float, extrapolation: float = 2.0) -> Tensor:
    """Sums of a score that is a mean over pixels: the same at each lead time."""
    values = torch.tensor([trained, steps, widened, extrapolation])
    return torch.stack([100 * values, torch.full((4,), 100.0)], dim=1)[:, None].expand(-1, len(LEADS), -1)


def told(sums: dict[Score, Tensor], runs: int = 8, kilometres: float = 30.0) -> dict[str, Goal]:
    """The goals by name; on cells that are larger than any neighbourhood, without FSS."""
    return {goal.name: goal for goal in goals(skill_of(sums, runs), kilometres, resamples=50)}


@pytest.mark.parametrize(
    ("trained", "met"), [(0.94, (True, False)), (0.95, (True, False)), (0.85, (True, True))]
)
def test_crps_is_measured_against_steps_and_against_the_widened(
    trained: float, met: tuple[bool, bool]
) -> None:
    found = told({Crps(fair=True): means(trained, 1.0, 0.9)})
    rows = [found[f"fair CRPS mm/h of {words}"] for words in ("STEPS", WIDENED)]
    assert tuple(row.met for row in rows) == met
    assert [row.value for row in rows] == [pytest.approx(trained), pytest.approx(trained / 0.9)]
    assert rows[0].low == pytest.approx(rows[0].value) == rows[0].high, "of runs that are all alike"


@pytest.mark.parametrize(("steps", "widened"), [(0.2, 0.1), (0.1, 0.2)])
def test_brier_is_measured_against_the_better_of_both(steps: float, widened: float) -> None:
    for trained, met in ((0.0969, True), (0.0971, False)):
        [goal] = [
            goal
            for name, goal in told({Brier(1.0): means(trained, steps, widened)}).items()
            if "better" in name
        ]
        assert goal.met is met and goal.value == pytest.approx(trained / 0.1)


def test_lead_times_that_are_significantly_worse_are_counted_and_none_is_allowed() -> None:
    part = means(1.0, 1.0, 1.0).clone()
    part[1, :2, 0] -= 10  # STEPS is better at two lead times, in every run
    found = told({Crps(): part})
    worse = found["lead times with CRPS mm/h significantly above that of STEPS"]
    assert (worse.value, worse.met) == (2, False)
    equal = found[f"lead times with CRPS mm/h significantly above that of {WIDENED}"]
    assert (equal.value, equal.met) == (0, True)


def test_a_difference_whose_interval_holds_nothing_is_not_significant() -> None:
    skill = skill_of({Crps(): means(1.0, 1.0, 1.0)})
    sums = skill.sums[Crps().name]
    sums[0, :, :, 0] += torch.tensor([30.0, -20.0] * 4)[
        :, None
    ]  # worse on average, by turns worse and better
    found = {goal.name: goal for goal in goals(skill, 30.0, 200)}
    assert skill.difference(Crps(), "steps").value.min() > 0
    assert found["lead times with CRPS mm/h significantly above that of STEPS"].met is True


def test_csi_is_that_of_the_lead_time_nearest_to_half_an_hour() -> None:
    counts = torch.ones(4, len(LEADS), 3) * 100.0  # hits, misses, false alarms: CSI 1/3
    counts[0, 1] = torch.tensor([160.0, 90.0, 50.0])  # 0.533, at 28 minutes alone
    found = told({Csi(5.0): counts})
    for words in ("the extrapolation", "STEPS"):
        goal = found[f"CSI >= 5 mm/h at 30 min of {words}"]
        assert goal.value == pytest.approx(1.6) and goal.met is True
    assert f"CSI >= 5 mm/h at 30 min of {WIDENED}" not in found


def test_fss_must_be_above_that_of_steps() -> None:
    small, large = neighbourhoods(1.0).values()
    parts = torch.tensor([[0.5, 1.0], [0.6, 1.0], [0.1, 1.0], [0.1, 1.0]])[:, None].expand(-1, len(LEADS), -1)
    found = told({small: parts, large: parts[[1, 0, 2, 3]]}, kilometres=1.0)
    near, far = (found[f"FSS >= 5 mm/h, {scale} km, of STEPS"] for scale in (5, 20))
    assert (near.value, near.met) == (pytest.approx(0.5 / 0.4), True)
    assert (far.value, far.met) == (pytest.approx(0.4 / 0.5), False)


@pytest.mark.parametrize(
    ("kilometres", "cells"), [(0.5, [9, 41]), (1.0, [5, 21]), (4.0, [1, 5]), (10.0, [1]), (30.0, [])]
)
def test_neighbourhoods_are_the_odd_numbers_of_cells_nearest_to_their_scale(
    kilometres: float, cells: list[int]
) -> None:
    found = neighbourhoods(kilometres)
    assert [score.cells for score in found.values()] == cells
    assert all(abs(score.cells * kilometres - scale) <= kilometres for scale, score in found.items())


@pytest.mark.parametrize(("sureness", "met"), [(1.0, (True, True)), (1.6, (False, False))])
def test_reliability_is_pooled_over_lead_times(sureness: float, met: tuple[bool, bool]) -> None:
    random = torch.Generator().manual_seed(0)
    chance = 0.2 + 0.6 * torch.rand(1, 1, len(LEADS), 60, 60, generator=random)
    rank = (torch.arange(200)[:, None, None, None] + 0.5) / 200
    said = EnsembleForecast((rank[None] < 0.5 + sureness * (chance - 0.5)).float() * 2)
    fell = (torch.rand(1, len(LEADS), 60, 60, generator=random) < chance[0]).float() * 2
    score = Reliability(1.0)
    found = told({score: score.sums(said, fell).expand(4, -1, -1)})
    error, slope = found["Calibration error >= 1 mm/h"], found["Reliability slope >= 1 mm/h"]
    assert (error.met, slope.met) == met
    assert slope.value == pytest.approx(1 / sureness, abs=0.04)
    assert error.value < 0.02 if sureness == 1 else error.value > 0.05
    assert error.low <= error.value <= error.high


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    never = {Csi(5.0): torch.zeros(4, len(LEADS), 3), Crps(): means(0.5, 1.0, 1.0)}
    found = told(never, runs=3)
    assert found["CSI >= 5 mm/h at 30 min of STEPS"].met is None
    worse = found["lead times with CRPS mm/h significantly above that of STEPS"]
    assert worse.met is None and str(worse) == "not measured", "three runs have no interval"
    ratio = found["CRPS mm/h of STEPS"]
    assert ratio.met is True and math.isnan(ratio.low) and str(ratio) == "0.5 met"
    assert tally(list(found.values())) == "2 of 2"


def test_the_table_has_a_row_for_each_goal_and_a_column_for_each_event() -> None:
    one = [Goal("A", "at most 1", 0.5, 0.4, 0.6, True), Goal("B", "none", 2.0, math.nan, math.nan, False)]
    other = [Goal("A", "at most 1", math.nan, math.nan, math.nan, None)]
    assert list(goal_table({"fmi": one, "knmi": other})) == [
        "| goal | wanted | fmi | knmi |",
        "|---|---|---|---|",
        "| A | at most 1 | 0.5 (0.4-0.6) met | not measured |",
        "| B | none | 2 **missed** | - |",
        "| met | all | 1 of 2 | 0 of 0 |",
    ]
