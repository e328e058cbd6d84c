"""What is asked of a forecast, judged on numbers that are known."""

import math
from dataclasses import replace
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
    rows = [found[f"fair CRPS, ratio to {words}"] for words in ("STEPS", WIDENED)]
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
    worse = found["lead times with CRPS significantly above that of STEPS"]
    assert (worse.value, worse.met) == (2, False)
    equal = found[f"lead times with CRPS significantly above that of {WIDENED}"]
    assert (equal.value, equal.met) == (0, True)


def test_a_difference_whose_interval_holds_nothing_is_not_significant() -> None:
    skill = skill_of({Crps(): means(1.0, 1.0, 1.0)})
    sums = skill.sums[Crps().name]
    sums[0, :, :, 0] += torch.tensor([30.0, -20.0] * 4)[
        :, None
    ]  # worse on average, by turns worse and better
    found = {goal.name: goal for goal in goals(skill, 30.0, 200)}
    assert skill.difference(Crps(), "steps").value.min() > 0
    assert found["lead times with CRPS significantly above that of STEPS"].met is True


def yes_or_no(csi: Tensor) -> Tensor:
    """Sums of a forecast of one number with this CSI (forecaster, lead): rain that is hit, or missed."""
    score, rain = Csi(1.0, cut=0.5), torch.ones(1, 1, 1, 1)
    hit, missed = (score.sums(EnsembleForecast(said * rain[None]), rain)[0] for said in (1, 0))
    return 1000 * (csi[:, :, None] * hit + (1 - csi[:, :, None]) * missed)


def test_csi_is_that_of_the_lead_time_nearest_to_half_an_hour_and_names_it() -> None:
    csi = torch.full((4, len(LEADS)), 1 / 3)
    csi[0, 1] = 1.6 / 3  # at 28 minutes alone
    found = told({Csi(5.0, cut=0.5): yes_or_no(csi)})
    for words in ("the extrapolation", "STEPS"):
        goal = found[f"CSI >= 5 mm/h at 28 min, ratio to {words}"]
        assert goal.value == pytest.approx(1.6) and goal.met is True
    assert f"CSI >= 5 mm/h at 28 min, ratio to {WIDENED}" not in found


@pytest.mark.parametrize(("ratio", "met"), [(1.04, False), (1.06, True)])
def test_csi_must_be_a_twentieth_above_the_baselines(ratio: float, met: bool) -> None:
    csi = torch.tensor([ratio, 1.0, 1.0, 1.0])[:, None].expand(-1, len(LEADS)) / 2
    found = told({Csi(5.0, cut=0.5): yes_or_no(csi)})
    assert {goal.met for goal in found.values()} == {met}


def test_a_baseline_without_hits_is_nothing_to_be_compared_with() -> None:
    csi = torch.full((4, len(LEADS)), 0.5)
    csi[list(NAMES).index("steps")] = 0
    found = told({Csi(5.0, cut=0.5): yes_or_no(csi)})
    nothing = found["CSI >= 5 mm/h at 28 min, ratio to STEPS"]
    assert nothing.met is None and math.isnan(nothing.value) and math.isnan(nothing.high)
    assert found["CSI >= 5 mm/h at 28 min, ratio to the extrapolation"].met is False


@pytest.mark.parametrize("unknown", ["steps", "widened"])
def test_brier_beside_a_baseline_that_has_none_is_not_measured(unknown: str) -> None:
    values = means(0.5, 1.0, 1.0).clone()
    values[list(NAMES).index(unknown)] = 0
    [goal] = [goal for name, goal in told({Brier(1.0): values}).items() if "better" in name]
    assert str(goal) == "not measured"


def test_what_lacks_its_baseline_or_its_score_is_not_measured() -> None:
    skill = skill_of({Crps(): means(0.5, 1.0, 1.0), Brier(1.0): means(0.5, 1.0, 1.0)})
    alone = replace(skill, forecasters=NAMES[:1], sums={name: part[:1] for name, part in skill.sums.items()})
    found = goals(alone, 1.0, 50)
    assert {str(goal) for goal in found} == {"not measured"}
    assert {goal.name for goal in found} == {goal.name for goal in goals(skill, 1.0, 50)}
    assert "FSS >= 5 mm/h, 5 km, ratio to STEPS" in {goal.name for goal in found}


def test_where_it_never_rained_and_nobody_said_so_nothing_is_measured() -> None:
    dry = torch.zeros(1, len(LEADS), 4, 4)
    forecast = EnsembleForecast(dry[:, None])
    scores = (Crps(), Brier(1.0), Csi(1.0), Reliability(1.0), *neighbourhoods(1.0).values())
    found = told({score: score.sums(forecast, dry).expand(4, -1, -1) for score in scores}, kilometres=1.0)
    assert {name: str(goal) for name, goal in found.items() if goal.met is not None} == {}


def test_fss_must_be_above_that_of_steps() -> None:
    small, large = neighbourhoods(1.0).values()
    parts = torch.tensor([[0.5, 1.0], [0.6, 1.0], [0.1, 1.0], [0.1, 1.0]])[:, None].expand(-1, len(LEADS), -1)
    found = told({small: parts, large: parts[[1, 0, 2, 3]]}, kilometres=1.0)
    near, far = (found[f"FSS >= 5 mm/h, {scale} km, ratio to STEPS"] for scale in (5, 20))
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


def bins(count: Tensor, said: Tensor, seen: Tensor) -> Tensor:
    """Sums of reliability of all forecasters: pixels by bin at the first lead time, and their means."""
    part = torch.cat([count, count * said, count * seen])
    return torch.stack([part, *(torch.zeros_like(part),) * (len(LEADS) - 1)]).expand(4, -1, -1)


@pytest.mark.parametrize(("error", "met"), [(0.0198, True), (0.0202, False)])
def test_the_distance_from_the_diagonal_must_be_below_two_hundredths(error: float, met: bool) -> None:
    count, said = torch.zeros(10), torch.full((10,), 0.5)
    count[5] = 1000.0
    score = Reliability(1.0)
    goal = told({score: bins(count, said, said - error)})["Calibration error >= 1 mm/h"]
    assert goal.met is met and goal.value == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("slope", "met"), [(0.891, False), (0.909, True), (1.089, True), (1.111, False)])
def test_the_slope_must_lie_within_a_tenth_of_one(slope: float, met: bool) -> None:
    count, said = torch.zeros(10), torch.arange(10) / 10 + 0.05
    count[[3, 6]] = 1000.0
    score = Reliability(1.0)
    goal = told({score: bins(count, said, 0.5 + slope * (said - 0.5))})["Reliability slope >= 1 mm/h"]
    assert goal.met is met and goal.value == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("ratio", "met"), [(0.99, False), (1.01, True)])
def test_the_least_fss_is_just_above_that_of_steps(ratio: float, met: bool) -> None:
    [score, _] = neighbourhoods(1.0).values()
    parts = torch.tensor([[1 - ratio / 2, 1.0]] + [[0.5, 1.0]] * 3)[:, None].expand(-1, len(LEADS), -1)
    sums: dict[Score, Tensor] = dict.fromkeys(neighbourhoods(1.0).values(), parts)
    goal = told(sums, kilometres=1.0)[f"FSS >= {score.threshold:g} mm/h, 5 km, ratio to STEPS"]
    assert goal.met is met and goal.value == pytest.approx(ratio)


@pytest.mark.parametrize(("factor", "met"), [(0.99, True), (1.01, False)])
def test_crps_and_brier_lie_just_within_what_is_asked(factor: float, met: bool) -> None:
    found = told(
        {Crps(): means(0.95 * factor, 1.0, 1.0), Brier(1.0): means(0.97 * factor, 1.0, 1.0)},
    )
    assert {goal.met for name, goal in found.items() if "ratio" in name} == {met}


def test_one_lead_time_that_is_significantly_worse_is_one_too_many() -> None:
    part = means(1.0, 1.0, 1.0).clone()
    part[1, 1, 0] -= 10
    worse = told({Crps(): part})["lead times with CRPS significantly above that of STEPS"]
    assert (worse.value, worse.met) == (1, False)


def test_no_difference_that_is_known_is_no_lead_time_without_a_worse_one() -> None:
    nothing = torch.zeros(4, len(LEADS), 2)  # no pixel: a mean that is not known
    found = told({Crps(): nothing, Brier(1.0): nothing}, runs=8)
    assert {str(goal) for goal in found.values()} == {"not measured"}
    assert tally(list(found.values())) == "0 of 0"


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    forecast, observed = EnsembleForecast(torch.zeros(1, 1, 3, 1, 1)), torch.zeros(1, 3, 1, 1)
    never = Csi(5.0).sums(forecast, observed).expand(4, -1, -1)
    found = told({Csi(5.0): never, Crps(): means(0.5, 1.0, 1.0)}, runs=3)
    assert found["CSI >= 5 mm/h at 28 min, ratio to STEPS"].met is None
    worse = found["lead times with CRPS significantly above that of STEPS"]
    assert worse.met is None and str(worse) == "not measured", "three runs have no interval"
    ratio = found["CRPS, ratio to STEPS"]
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
