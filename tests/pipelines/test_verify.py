"""Forecast runs against what was then observed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from metnet.batch import Batch
from metnet.calibration import undone
from metnet.rain import EnsembleForecast, RainForecast
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.fss import Fss
from metnet.scores.reliability import Reliability
from pipelines import cf
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.run_facts import RunFacts
from pipelines.runs import ForecastStore, RunBlock, RunHeader
from pipelines.verify import Verified, verify

START = datetime(2020, 6, 1, tzinfo=UTC)
CADENCE = timedelta(minutes=5)
GRID = Grid("EPSG:3035", 4_000_000.0, 1000.0, 24, 3_000_000.0, -1000.0, 20)
FRAMES = 20
LEADS = (5.0, 10.0, 15.0)
THRESHOLDS = (0.1, 1.0, 5.0)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
SCORES = (Crps(), Brier(1.0), Csi(1.0), Fss(1.0, cells=3))
Fields = np.ndarray


@dataclass(frozen=True)
class Newest:
    """Persistence without its own file: the newest frame stays."""

    frames: int = 1

    def __call__(self, batch: Batch) -> EnsembleForecast:
        newest = batch.radar[:, -1, None, None]
        return EnsembleForecast(newest.expand(-1, -1, len(batch.lead_time), -1, -1))


@dataclass(frozen=True)
class Mean:
    """The mean of three frames, which knows nothing of some columns."""

    frames: int = 3
    unknown: tuple[int, ...] = ()  # columns

    def __call__(self, batch: Batch) -> EnsembleForecast:
        mean = batch.radar.nanmean(dim=1)
        mean[..., list(self.unknown)] = torch.nan
        return EnsembleForecast(mean[:, None, None].expand(-1, -1, len(batch.lead_time), -1, -1))


@dataclass(frozen=True)
class Unsure:
    """Of three members one stays as it is, two say that it will be dry."""

    frames: int = 1

    def __call__(self, batch: Batch) -> EnsembleForecast:
        stays = Newest()(batch).members
        return EnsembleForecast(torch.cat([stays, 0 * stays, 0 * stays], dim=1))


BASELINES = {"persistence": Newest(), "extrapolation": Mean()}


@dataclass(frozen=True)
class Spy:
    """A score that keeps what it is shown."""

    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    name: str = "pixels"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        self.seen.append((forecast.mean(), observed))
        return (~observed.isnan()).sum(dim=(0, 2, 3), dtype=torch.float64)[:, None]

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        return sums[:, 0]


def storm(index: int) -> Fields:
    """A shower that drifts two cells a frame, in drizzle; dry elsewhere."""
    y, x = np.mgrid[: GRID.y_size, : GRID.x_size]
    shower = 12 * np.exp(-((y - 10) ** 2 + (x - (2 * index) % 24) ** 2) / 12)
    drizzle = 0.4 * np.random.default_rng(index).random(GRID.shape)
    return np.where(shower + drizzle > 0.3, shower + drizzle, 0).astype(np.float32)


def fill(path: Path, missing: tuple[int, ...] = (), gap: tuple[int, ...] = ()) -> Cube:
    cube = Cube.open_or_create(str(path), GRID, cf.RAINFALL_RATE, START, CADENCE)
    frames = []
    for index in set(range(FRAMES)) - set(missing):
        rate = storm(index)
        rate[:3, :4] = np.nan
        if index in gap:
            rate[:] = np.nan
        frames.append(
            Frame(cf.RAINFALL_RATE, START + index * CADENCE, CADENCE, GRID, rate, "test", f"{index + 1:064x}")
        )
    cube.write(frames)
    return cube


def says(index: int) -> Fields:
    """Six members about what will be (lead, y, x)."""
    random = np.random.default_rng(100 + index)
    truth = np.stack([storm(index + 1 + lead) for lead in range(len(LEADS))])
    return np.stack([truth * random.gamma(4, 0.25, truth.shape) for _ in range(6)]).astype(np.float32)


def knows(index: int) -> Fields:
    """One member that will be right."""
    return np.stack([storm(index + 1 + lead) for lead in range(len(LEADS))])[None]


def forecast_into(
    path: Path,
    indices: range,
    members: Callable[[int], Fields],
    grid: Grid = GRID,
    leads: tuple[float, ...] = LEADS,
    facts: dict[str, str] | None = None,
) -> ForecastStore:
    store = ForecastStore.open_or_create(str(path))
    for index in indices:
        said = EnsembleForecast(torch.from_numpy(members(index))[None, :, : len(leads)].float())
        header = RunHeader(
            START + index * CADENCE,
            grid,
            leads,
            THRESHOLDS,
            LEVELS,
            {"model": "of the tests", **(facts or {})},
        )
        block = RunBlock(
            slice(None),
            slice(None),
            slice(None),
            torch.stack([said.probability_above(threshold)[0] for threshold in THRESHOLDS], dim=1).numpy(),
            torch.stack([said.quantile(level)[0] for level in LEVELS]).numpy(),
            said.quantile(0.5)[0].numpy(),
            said.mean()[0].numpy(),
        )
        store.write_run(header, [block])
    return store


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Cube:
    return fill(tmp_path_factory.mktemp("world") / "cube")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ForecastStore:
    return forecast_into(tmp_path_factory.mktemp("world") / "forecasts", range(3, 15, 2), says)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes longer to draw than the numbers to compute, and has its own tests."""
    monkeypatch.setattr(
        "pipelines.report_page.as_html", lambda report, case: f"{case.init_time} {case.lead_times}"
    )


def verified(cube: Cube, store: ForecastStore, folder: Path, **keys: object) -> Verified:
    arguments = {"scores": SCORES, "baselines": BASELINES, "resamples": 50, **keys}
    return verify(cube.path, store.path, str(folder), **arguments)  # type: ignore[arg-type]


def test_yes_is_said_from_the_one_cut_that_each_forecaster_expects_most_of(
    cube: Cube, tmp_path: Path
) -> None:
    runs, baselines = range(6, 8), {"extrapolation": Mean(), "unsure": Unsure()}
    store = forecast_into(tmp_path / "made", runs, says)

    def tallied(score: Csi) -> Tensor:
        report = verified(cube, store, tmp_path / "report", scores=(score,), baselines=baselines).report
        return torch.stack([score.decided(sums.sum(dim=0)) for sums in report.skill.sums[score.name]])

    own, usual = tallied(Csi(1.0)), tallied(Csi(1.0, cut=0.5))
    assert torch.equal(own[1], usual[1]), "of one that says a number"
    assert (own[2, :, 0] > 0).all() and (usual[2, :, 0] == 0).all(), "of one that never says one half"
    observed = np.stack([[storm(run + 1 + lead) for lead in range(3)] for run in runs])
    observed[..., :3, :4] = np.nan
    table = np.stack(
        [store.dataset(name)["probability_of_exceedance"].values[:, 1] for name in store.names()]
    )
    for lead in range(3):
        known = ~np.isnan(observed[:, lead])
        said, fell = table[:, lead][known], observed[:, lead][known] >= 1.0

        def expected(cut: float, said: NDArray[np.float32] = said) -> float:
            return float(said[said >= cut].sum() / ((said >= cut).sum() + said[said < cut].sum()))

        yes = said >= max(np.unique(said[said > 0]).tolist(), key=expected)
        assert own[0, lead].tolist() == [(yes & fell).sum(), (~yes & fell).sum(), (yes & ~fell).sum()]


def test_the_reliability_before_a_run_was_calibrated_is_told_beside_it(cube: Cube, tmp_path: Path) -> None:
    """The store of the plain run stands for what the network said; half of the runs are calibrated."""
    score = Reliability(1.0)
    shift, slope = 0.7, 1.5
    facts = RunFacts({1.0: ((shift, slope),) * 3}, calibrated=True).attributes()
    said = forecast_into(tmp_path / "said", range(3, 6), says, facts=facts)
    forecast_into(tmp_path / "said", range(6, 9), says)

    report = verified(cube, said, tmp_path / "report", scores=(score,)).report

    before, after = report.skill.uncalibrated[score.name], report.skill.sums[score.name][0]
    assert (before[3:] == 0).all() and (
        before[:3, :, : score.bins].sum(dim=2) == report.skill.pixels[:3]
    ).all()
    probability = (after[:3, :, : 2 * score.bins].sum(), before[:3, :, : 2 * score.bins].sum())
    assert probability[0] != probability[1]
    table = forecast_into(tmp_path / "said", range(0), says).dataset("20200601T001500Z")
    raw = undone(
        torch.from_numpy(table["probability_of_exceedance"].values[:, 1]),
        torch.tensor(shift),
        torch.tensor(slope),
    )
    observed = torch.from_numpy(np.stack([storm(4 + lead) for lead in range(3)]))
    observed[:, :3, :4] = torch.nan
    told = RainAbove(raw[None])
    torch.testing.assert_close(before[0], score.sums(told, observed[None]))


@dataclass(frozen=True)
class RainAbove:
    """A forecast of a single threshold."""

    above: Tensor

    def probability_above(self, threshold: float) -> Float[Tensor, "batch lead y x"]:
        return self.above

    quantile = crps = probability_above

    def mean(self) -> Float[Tensor, "batch lead y x"]:
        return self.above


def test_a_run_of_a_late_source_is_compared_with_baselines_of_the_same_frames(
    cube: Cube, tmp_path: Path
) -> None:
    late = forecast_into(tmp_path / "late", range(6, 7), says, facts={"input_age_minutes": "15"})

    skill = verified(cube, late, tmp_path / "report", scores=(Brier(1.0),)).report.skill

    seen = np.ones(GRID.shape, bool)
    seen[:3, :4] = False
    wrong = [((storm(7 + lead) >= 1) != (storm(3) >= 1))[seen].mean() for lead in range(3)]
    assert skill.values(Brier(1.0))[skill.forecasters.index("persistence")].tolist() == pytest.approx(wrong)


def test_a_baseline_is_not_told_the_frames_that_came_after_the_forecast(cube: Cube, tmp_path: Path) -> None:
    gone = " ".join(f"{START + index * CADENCE:%Y-%m-%dT%H:%M:%SZ}" for index in (4, 5))
    degraded = forecast_into(tmp_path / "degraded", range(6, 7), says, facts={"inputs_missing": gone})

    skill = verified(cube, degraded, tmp_path / "report", scores=(Brier(1.0),)).report.skill

    seen = np.ones(GRID.shape, bool)
    seen[:3, :4] = False
    wrong = [((storm(7 + lead) >= 1) != (storm(6) >= 1))[seen].mean() for lead in range(3)]
    mean = skill.values(Brier(1.0))[skill.forecasters.index("extrapolation")]
    assert mean.tolist() == pytest.approx(wrong), "of the only frame that is left"


def test_a_forecast_that_knew_it_all_is_perfect_and_its_baselines_are_not(cube: Cube, tmp_path: Path) -> None:
    store = forecast_into(tmp_path / "forecasts", range(3, 9), knows)

    skill = verified(cube, store, tmp_path / "report").report.skill

    assert skill.values(SCORES[1])[0].tolist() == [0.0] * 3
    assert skill.values(SCORES[2])[0].tolist() == [1.0] * 3
    torch.testing.assert_close(skill.values(SCORES[3])[0], torch.ones(3, dtype=torch.float64))
    crps = skill.values(SCORES[0])
    assert (crps[0] < 0.05 * crps[1:]).all()  # the store keeps points of the distribution, not all of it
    assert (skill.values(SCORES[2])[1:] < 0.9).all()


def test_the_numbers_are_those_of_a_loop_over_pixels(cube: Cube, tmp_path: Path) -> None:
    store = forecast_into(tmp_path / "forecasts", range(4, 7), says)

    skill = verified(cube, store, tmp_path / "report").report.skill

    brier = np.zeros((3, 3))
    for lead in range(3):
        total, count = np.zeros(3), 0
        for index in range(4, 7):
            event = storm(index + 1 + lead) >= 1.0
            said = [
                (says(index)[:, lead] >= 1.0).mean(axis=0),
                storm(index) >= 1.0,
                (storm(index) + storm(index - 1) + storm(index - 2)) / 3 >= 1.0,
            ]
            for y, x in np.ndindex(GRID.shape):
                if y < 3 and x < 4:
                    continue  # not observed
                total += [(float(p[y, x]) - event[y, x]) ** 2 for p in said]
                count += 1
        brier[:, lead] = total / count
    np.testing.assert_allclose(skill.values(Brier(1.0)).numpy(), brier, atol=1e-6)


def test_all_forecasters_are_asked_at_the_same_pixels_those_that_all_know(cube: Cube, tmp_path: Path) -> None:
    def some(index: int) -> Fields:
        members = says(index)
        members[:, :, 15:] = np.nan  # the forecast knows nothing of the south
        return members

    store = forecast_into(tmp_path / "forecasts", range(4, 6), some)
    spy = Spy()
    baselines = {"persistence": Newest(), "extrapolation": Mean(unknown=(20, 21, 22, 23))}

    skill = verified(cube, store, tmp_path / "report", scores=[spy], baselines=baselines).report.skill

    expected = np.ones(GRID.shape, bool)
    expected[:3, :4] = expected[15:] = expected[:, 20:] = False
    assert len(spy.seen) >= 6
    asked = spy.seen[:6]  # two runs of three forecasters; what follows is `perfect`
    for mean, observed in asked:
        assert (~observed[0].isnan() == torch.from_numpy(expected)).all()
        assert not mean[:, :, torch.from_numpy(expected)].isnan().any()
    assert skill.pixels.tolist() == [[expected.sum()] * 3] * 2
    assert skill.observed.tolist() == [[GRID.y_size * GRID.x_size - 12] * 3] * 2


def test_few_lead_times_at_once_give_the_same_scores(
    cube: Cube, store: ForecastStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = verified(cube, store, tmp_path / "whole").report.skill

    monkeypatch.setattr("pipelines.verify.CELLS_AT_ONCE", 1)
    parts = verified(cube, store, tmp_path / "parts").report.skill

    for score in SCORES:
        torch.testing.assert_close(parts.sums[score.name], whole.sums[score.name], rtol=1e-6, atol=1e-6)


def test_a_run_counts_at_the_lead_times_that_were_observed(tmp_path: Path) -> None:
    cube = fill(tmp_path / "cube", missing=(6,), gap=(12,))
    store = forecast_into(tmp_path / "forecasts", range(3, 20), says)

    result = verified(cube, store, tmp_path / "report").report

    counted = dict(zip(result.skill.init_times, (result.skill.pixels > 0).tolist(), strict=True))
    assert counted[START + 3 * CADENCE] == [True, True, False]  # frame 6 is missing
    assert counted[START + 4 * CADENCE] == [True, False, True]
    assert counted[START + 10 * CADENCE] == [True, False, True]  # frame 12 saw nothing
    assert counted[START + 18 * CADENCE] == [True, False, False]  # the cube ends
    reasons = result.skipped
    assert set(reasons) == {"20200601T003000Z", "20200601T010000Z", "20200601T013500Z"}
    assert "lacks the newest frame that it was made from" in reasons["20200601T003000Z"]
    assert "all have a forecast" in reasons["20200601T010000Z"]  # persistence of nothing
    assert "no observation" in reasons["20200601T013500Z"]


def test_lead_times_between_two_frames_are_not_verified(cube: Cube, tmp_path: Path) -> None:
    store = forecast_into(tmp_path / "forecasts", range(4, 6), says, leads=(5.0, 7.0, 10.0))

    assert verified(cube, store, tmp_path / "report").report.skill.lead_times == (5.0, 10.0)


def test_runs_of_other_lead_times_stand_beside_each_other(cube: Cube, tmp_path: Path) -> None:
    store = forecast_into(tmp_path / "forecasts", range(4, 6), says, leads=(5.0, 10.0))
    forecast_into(tmp_path / "forecasts", range(6, 7), says, leads=(10.0, 15.0))

    skill = verified(cube, store, tmp_path / "report").report.skill

    assert skill.lead_times == (5.0, 10.0, 15.0)
    assert (skill.pixels > 0).tolist() == [[True, True, False], [True, True, False], [False, True, True]]
    assert skill.values(SCORES[0]).isfinite().all()


def test_runs_of_several_models_are_said_to_be_scored_as_one(
    cube: Cube, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = forecast_into(tmp_path / "forecasts", range(4, 6), says)
    verified(cube, store, tmp_path / "report")
    assert "several models" not in caplog.text
    forecast_into(tmp_path / "forecasts", range(6, 7), says, facts={"model": "other"})
    verified(cube, store, tmp_path / "report")
    assert "2 runs of of the tests (), 1 run of other ()" in caplog.text


def test_start_and_end_choose_runs_by_init_time(cube: Cube, store: ForecastStore, tmp_path: Path) -> None:
    keys = {"start": "2020-06-01T00:25", "end": "2020-06-01T00:45Z"}

    skill = verified(cube, store, tmp_path / "report", **keys).report.skill

    assert [time.strftime("%H:%M") for time in skill.init_times] == ["00:25", "00:35", "00:45"]


def test_a_run_on_another_grid_is_left_out_with_its_reason(cube: Cube, tmp_path: Path) -> None:
    shifted = replace(GRID, x_first=GRID.x_first + 500)
    store = forecast_into(tmp_path / "forecasts", range(4, 5), says, grid=shifted)
    reason = r"made on a grid of .*, the cube's is one of "
    with pytest.raises(ValueError, match=rf"none of 1 run, .* {reason}"):
        verified(cube, store, tmp_path / "report")

    forecast_into(tmp_path / "forecasts", range(5, 6), says)
    report = verified(cube, store, tmp_path / "report").report
    assert [f"{time:%H:%M}" for time in report.skill.init_times] == ["00:25"]
    assert report.skipped["20200601T002000Z"].startswith("made on a grid of ")


def test_lead_times_between_the_frames_are_told_from_observations_that_are_not_in_yet(
    cube: Cube, tmp_path: Path
) -> None:
    store = forecast_into(tmp_path / "forecasts", range(4, 5), says, leads=(7.0, 13.0))
    said = r"no frame at its lead times, but every 5 min \(1 run\)"
    with pytest.raises(ValueError, match=said):
        verified(cube, store, tmp_path / "report")


def test_a_cube_that_holds_nothing_yet_is_told_as_that(store: ForecastStore, tmp_path: Path) -> None:
    empty = Cube.open_or_create(str(tmp_path / "cube"), GRID, cf.RAINFALL_RATE, START, CADENCE)
    with pytest.raises(ValueError, match=r"can be verified: .*holds no frame; ingest the observations"):
        verified(empty, store, tmp_path / "report")


def test_a_store_without_runs_is_refused(cube: Cube, tmp_path: Path) -> None:
    store = ForecastStore.open_or_create(str(tmp_path / "forecasts"))

    with pytest.raises(ValueError, match="holds no run"):
        verified(cube, store, tmp_path / "report")


def test_forecasts_of_a_future_without_observations_are_refused_with_what_the_cube_holds(
    cube: Cube, tmp_path: Path
) -> None:
    store = forecast_into(tmp_path / "forecasts", range(FRAMES - 1, FRAMES), says)

    with pytest.raises(ValueError, match=r"none of 1 run, .*2020-06-01T00:00Z to 2020-06-01T01:35Z"):
        verified(cube, store, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_period_without_runs_is_refused_with_those_there_are(
    cube: Cube, store: ForecastStore, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="there are 6, from 20200601T001500Z to 20200601T010500Z"):
        verified(cube, store, tmp_path / "report", start="2021-01-01")


def test_a_file_in_place_of_the_report_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "report").touch()
    with pytest.raises(ValueError, match=r"^report=.*: is a file; expected a folder"):
        verify("no cube", "no forecasts", str(tmp_path / "report"), [], {})


def test_a_score_corrected_for_few_members_is_refused_for_a_store_keeps_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fair CRPS.*keeps no members.*expected fair=false"):
        verify("no cube", "no forecasts", str(tmp_path / "report"), [Crps(fair=True)], {})


def test_no_resamples_are_refused(cube: Cube, store: ForecastStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resamples=0: expected at least 1"):
        verified(cube, store, tmp_path / "report", resamples=0)


def test_a_reference_that_is_no_baseline_is_refused(cube: Cube, store: ForecastStore, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="reference=steps: expected one of the baselines persistence, extrapolation"
    ):
        verified(cube, store, tmp_path / "report", reference="steps")


def test_the_result_reads_as_a_table_and_says_where_the_report_is(
    cube: Cube, store: ForecastStore, tmp_path: Path
) -> None:
    text = str(verified(cube, store, tmp_path / "report"))

    lines = text.splitlines()
    assert lines[0].startswith("At 15 minutes the forecast's CRPS is ")
    assert "6 runs from 2020-06-01 00:15 to 2020-06-01 01:05 UTC" in lines[1]
    assert [line.split()[0] for line in lines if "persistence" in line] == ["persistence"] * len(SCORES)
    assert str(tmp_path / "report") in lines[-1]
    assert all(len(line) < 200 for line in lines)


def test_the_report_names_the_snapshots_and_the_model(
    cube: Cube, store: ForecastStore, tmp_path: Path
) -> None:
    verified(cube, store, tmp_path / "report")

    numbers = json.loads((tmp_path / "report" / "report.json").read_text())

    assert numbers["cube"] == {"path": cube.path, "snapshot": cube.snapshot}
    assert numbers["forecasts"]["snapshot"] == ForecastStore.open(store.path).snapshot
    assert numbers["provenance"] == {"model": ["of the tests"]}


def test_the_page_shows_the_run_with_the_most_rain(cube: Cube, tmp_path: Path) -> None:
    rain = {index: sum(np.nansum(storm(index + 1 + lead)) for lead in range(3)) for index in range(3, 15)}
    store = forecast_into(tmp_path / "forecasts", range(3, 15), says)

    verified(cube, store, tmp_path / "report")

    wettest = START + max(rain, key=lambda index: rain[index]) * CADENCE
    assert (tmp_path / "report" / "report.html").read_text() == f"{wettest} (5.0, 10.0, 15.0)"


def test_the_same_forecast_scores_the_same_in_the_store_and_as_a_baseline(cube: Cube, tmp_path: Path) -> None:
    newest = lambda index: np.repeat(storm(index)[None, None], len(LEADS), axis=1)  # noqa: E731
    store = forecast_into(tmp_path / "forecasts", range(3, 9), newest)

    skill = verified(cube, store, tmp_path / "report").report.skill

    for score in SCORES:
        stored, persistence, _ = skill.sums[score.name]
        torch.testing.assert_close(stored, persistence, rtol=1e-5, atol=1e-6)
