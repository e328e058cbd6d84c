"""The report that a person reads and the numbers that a program reads."""

import html
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from metnet.rain import EnsembleForecast
from metnet.scores.bias import Bias
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score
from pipelines.figures import Case, thinned
from pipelines.grid import Grid
from pipelines.report import (
    DECIDED,
    Provenance,
    Report,
    as_json,
    best_rows,
    headline,
    second_sentence,
    text_table,
    verdict,
)
from pipelines.report_page import as_html, write
from pipelines.skill import Skill

START = datetime(2020, 6, 1, tzinfo=UTC)
GRID = Grid("EPSG:3035", 4_000_000.0, 1000.0, 12, 3_000_000.0, -1000.0, 10)
NAMES = ("forecast", "persistence", "extrapolation")
FOREIGN = '<b>5 < 6 & "so"</b>'
PROVENANCE = Provenance("out/cube", "AAA", "out/forecasts", "BBB", GRID, {"model": [FOREIGN]})


def skill_of(
    runs: int,
    errors: tuple[float, float, float] = (0.5, 2.0, 1.0),
    scores: tuple[Score, ...] = (Crps(), Brier(1.0), Csi(1.0), Reliability(1.0)),
    lead_times: tuple[float, ...] = (10.0, 30.0, 60.0),
    rain_above: float = 0.0,
) -> Skill:
    """Forecasters that add errors of a given size (mm/h) to what happens."""
    generator = torch.Generator().manual_seed(1)
    leads = len(lead_times)
    sums: dict[str, list[torch.Tensor]] = {score.name: [] for score in scores}
    for _ in range(runs):
        rain = rain_above + 6 * torch.rand(1, leads, 10, 12, generator=generator)
        for score in scores:
            said = []
            for size in errors:
                noise = size * torch.randn(1, 5, leads, 10, 12, generator=generator)
                said.append(score.sums(EnsembleForecast((rain[:, None] + noise).clamp(min=0)), rain))
            sums[score.name].append(torch.stack(said))
    count = torch.full((runs, leads), 120.0, dtype=torch.float64)
    return Skill(
        scores=scores,
        forecasters=NAMES,
        init_times=tuple(START + i * timedelta(hours=2) for i in range(runs)),
        lead_times=lead_times,
        sums={name: torch.stack(parts, dim=1) for name, parts in sums.items()},
        pixels=count,
        observed=count * 1.25,
        rain=count * 3,
    )


def report_of(skill: Skill, skipped: dict[str, str] | None = None) -> Report:
    return Report.of(skill, "extrapolation", 200, PROVENANCE, skipped or {})


def case(shape: tuple[int, int] = (10, 12)) -> Case:
    fields = np.random.default_rng(0).gamma(0.5, 4, (4, 2, *shape)).astype(np.float32)
    fields[:, :, :2] = np.nan
    return Case(
        START, (10.0, 60.0), 1.0, "extrapolation", fields[0], fields[1], np.clip(fields[2], 0, 1), fields[3]
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(skill_of(8), {"20200602T000000Z": "no observation"})


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return as_html(report, case())


def strict(text: str) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_headline_tells_the_difference_at_half_an_hour_and_how_sure_it_is(report: Report) -> None:
    crps = report.skill.values(Crps())[:, 1]
    percent = round(100 * (1 - float(crps[0] / crps[2])))

    text = headline(report)

    assert text.startswith(
        f"At 30 minutes the forecast's CRPS is {percent} % lower than extrapolation's (90 % interval "
    )
    assert text.endswith("%), over 8 runs.")
    low, high = (int(end) for end in re.search(r"interval (\d+) to (\d+) %", text).groups())  # type: ignore[union-attr]
    assert low <= percent <= high


def test_a_worse_forecast_is_called_worse() -> None:
    report = report_of(skill_of(8, errors=(2.0, 2.0, 0.5)))

    assert "higher than extrapolation's" in headline(report)
    assert second_sentence(report) == "By CRPS, beside extrapolation: clearly worse at 10 to 60 minutes."


def test_a_bias_to_either_side_is_better_or_worse_by_its_distance_from_none() -> None:
    rain = torch.full((1, 3, 10, 12), 2.0)
    generator = torch.Generator().manual_seed(0)

    def told(*biases: float) -> set[str]:
        score = Bias()
        noise = 0.3 * torch.randn(40, 3, 10, 12, generator=generator)
        sums = [
            torch.stack([score.sums(EnsembleForecast((rain + bias + own)[:, None]), rain) for own in noise])
            for bias in (biases[0], 5.0, biases[1])
        ]
        skill = replace(skill_of(40, scores=(score,)), sums={score.name: torch.stack(sums)})
        return {verdict(report_of(skill), score, "extrapolation", lead) for lead in range(3)}

    assert told(0.1, -0.1) == told(-0.1, 0.1) == {""}
    assert told(0.1, -1.0) == told(-0.1, 1.0) == {"better"}
    assert told(1.0, -0.1) == {"worse"}


def test_no_difference_is_called_none() -> None:
    report = report_of(skill_of(8, errors=(1.0, 2.0, 1.0)))

    assert headline(report).endswith(": no clear difference.")
    assert "no clear difference at" in second_sentence(report)


def test_few_runs_are_called_too_few() -> None:
    report = report_of(skill_of(1))

    assert headline(report).endswith("over 1 run: too few to say how sure that is.")
    assert "no intervals" in second_sentence(report)


def test_a_baseline_whose_score_is_0_is_not_compared_by_a_share() -> None:
    skill = skill_of(8)
    sums = skill.sums[Crps().name].clone()
    sums[2, :, :, 0] = 0  # extrapolation is always right
    report = report_of(replace(skill, sums={**skill.sums, Crps().name: sums}))

    assert "not comparable with extrapolation's: extrapolation's is 0, over 8 runs" in headline(report)
    strict(json.dumps(as_json(report), allow_nan=False))


def test_lead_times_of_one_verdict_stand_together() -> None:
    skill = skill_of(8, lead_times=(5.0, 10.0, 15.0, 20.0))
    sums = skill.sums[Crps().name].clone()
    sums[0, :, 2, 0] = 2 * sums[2, :, 2, 0]  # at 15 minutes twice as bad as extrapolation

    text = second_sentence(report_of(replace(skill, sums={**skill.sums, Crps().name: sums})))

    assert (
        text
        == "By CRPS, beside extrapolation: clearly better at 5 to 10, 20 minutes; clearly worse at 15 minutes."
    )


def test_the_best_are_nearest_to_a_perfect_score_and_none_where_nothing_counts() -> None:
    skill = skill_of(6)
    sums = {name: values.clone() for name, values in skill.sums.items()}
    sums[Csi(1.0).name][:, :, 1] = 0

    rows = best_rows(replace(skill, sums=sums), Csi(1.0))

    assert rows == [{0}, set(), {0}]
    assert best_rows(skill, Crps()) == [{0}, {0}, {0}]


def test_the_table_marks_the_best_and_holds_every_score_of_everyone(report: Report) -> None:
    lines = text_table(report).splitlines()

    header = next(line for line in lines if line.startswith("lead time"))
    assert header.split()[-3:] == ["10", "30", "60"]
    for score in report.skill.scores:
        first = next(i for i, line in enumerate(lines) if line.startswith(score.name))
        for row, name in enumerate(NAMES):
            cells = lines[first + row].removeprefix(score.name).split()
            assert cells[0] == name
            shown = [float(cell.rstrip("*")) for cell in cells[1:]]
            np.testing.assert_allclose(shown, report.skill.values(score)[row], atol=6e-4)
    assert re.search(r"CRPS mm/h +forecast( +[\d.]+\*){3}", text_table(report))


@pytest.mark.parametrize(("cut", "told"), [(None, True), (0.5, False)])
def test_table_and_page_tell_how_yes_is_decided_where_the_forecast_decides(
    cut: float | None, told: bool
) -> None:
    report = report_of(skill_of(2, scores=(Csi(1.0, cut),)))
    assert (DECIDED in text_table(report)) == told
    assert (DECIDED in as_html(report, case())) == told


def test_the_table_names_what_was_left_out_and_why() -> None:
    skipped = {f"2020060{day}T000000Z": "no observation" for day in range(2, 8)} | {
        "20200609T000000Z": "no frame"
    }

    text = text_table(report_of(skill_of(5), skipped))

    assert "left out: 20200602T000000Z, 20200603T000000Z, 20200604T000000Z and 3 more: no observation" in text
    assert "left out: 20200609T000000Z: no frame" in text
    assert "7 runs left out" in text


def test_a_table_of_many_lead_times_fits_a_terminal() -> None:
    lines = text_table(
        report_of(skill_of(5, lead_times=tuple(float(5 * i) for i in range(1, 41))))
    ).splitlines()

    assert max(len(line) for line in lines[2:]) <= 110
    assert next(line for line in lines if line.startswith("lead time")).split()[-1] == "200"


def test_the_json_holds_every_number_and_only_json(report: Report) -> None:
    skill = report.skill
    numbers = strict(json.dumps(as_json(report), allow_nan=False))

    assert numbers["headline"] == headline(report)
    assert numbers["lead_times_min"] == [10, 30, 60]
    assert numbers["pixels"] == [960] * 3 and numbers["observed_pixels"] == [1200] * 3
    assert numbers["provenance"] == {"model": [FOREIGN]}
    assert numbers["skipped_runs"] == [{"run": "20200602T000000Z", "reason": "no observation"}]
    assert len(numbers["runs"]) == 8 and numbers["runs"][1]["init_time"] == "2020-06-01T02:00:00Z"
    crps = numbers["scores"][0]
    assert crps["best"] == 0
    np.testing.assert_allclose(list(crps["values"].values()), skill.values(Crps()))
    sums = np.array(crps["sums"]["forecast"])
    np.testing.assert_allclose(sums[:, 0] / sums[:, 1], crps["values"]["forecast"])
    difference = crps["differences"]["persistence"]
    assert all(
        a < b < c < 0 for a, b, c in zip(*(difference[k] for k in ("low", "difference", "high")), strict=True)
    )
    curve = numbers["reliability"][0]["curves"]["forecast"]
    assert np.sum(curve["count"], axis=1).tolist() == [960] * 3
    reliability = skill.sums[Reliability(1.0).name][0].sum(dim=0)
    np.testing.assert_allclose(curve["slope"], Reliability(1.0).slope(reliability))


def test_what_calibrating_did_is_told_in_numbers_words_and_the_diagram() -> None:
    skill = skill_of(8)
    name = Reliability(1.0).name
    raw = skill.sums[name][2]  # as if a baseline's probabilities had been the network's own
    before = replace(skill, uncalibrated={name: raw})

    numbers = strict(json.dumps(as_json(report_of(before)), allow_nan=False))
    curves = numbers["reliability"][0]["curves"]
    page = as_html(report_of(before), case())

    assert curves["forecast, not calibrated"] == curves[NAMES[2]] != curves["forecast"]
    errors = [
        100 * float(Reliability(1.0).value(sums.sum(dim=(0, 1))[None])[0])
        for sums in (raw, skill.sums[name][0])
    ]
    assert f">= 1 mm/h from {errors[0]:.1f} to {errors[1]:.1f} %" in html.unescape(page)
    assert "not calibrated" in page and "not calibrated" not in as_html(report_of(skill), case())


def test_what_calibrating_did_is_told_of_the_runs_that_were_calibrated_alone() -> None:
    skill, score = skill_of(8), Reliability(1.0)
    raw = skill.sums[score.name][2].clone()
    raw[3:] = 0  # as of runs that were not
    page = as_html(report_of(replace(skill, uncalibrated={score.name: raw})), case())
    before, after = (
        100 * float(score.value(sums[:3].sum(dim=(0, 1))[None])[0])
        for sums in (raw, skill.sums[score.name][0])
    )
    assert f">= 1 mm/h from {before:.1f} to {after:.1f} %" in html.unescape(page)


def test_what_was_not_counted_is_null_in_json_and_a_dash_in_the_table() -> None:
    report = report_of(skill_of(2, scores=(Crps(), Csi(100.0), Reliability(1.0))))

    numbers = strict(json.dumps(as_json(report), allow_nan=False))

    assert numbers["scores"][1]["values"]["forecast"] == [None] * 3
    assert numbers["scores"][0]["differences"]["persistence"]["low"] == [None] * 3
    assert None in numbers["reliability"][0]["curves"]["persistence"]["frequency"][0]
    assert re.search(r"CSI >= 100 mm/h +forecast +- +- +-", text_table(report))


class Links(HTMLParser):
    """Everything a page would fetch, and the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and value and value[0] != "#":
                self.fetched.append(value)
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert tag in ("meta", "br"), f"</{tag}> closes {self.open[-1:]}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_in_itself(page: str) -> None:
    parser = Links()
    parser.feed(page)

    assert parser.open == []
    assert all(link.startswith("data:image/png;base64,") for link in parser.fetched)
    assert len(parser.fetched) >= 8  # the maps: four quantities at two lead times
    assert (
        "url(http" not in page
        and "@import" not in page
        and "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    )


def test_the_page_says_it_in_words_and_defines_its_scores(page: str, report: Report) -> None:
    parser = Links()
    parser.feed(page)
    text = " ".join(" ".join(parser.text).split())

    assert headline(report) in text and second_sentence(report) in text
    for score in report.skill.scores:
        assert score.name in text
    assert "the share where both say so" in text and "Csi(threshold=1.0, cut=None)" in text
    assert "for which its probabilities expect the highest CSI over all of them" in text, "how yes is decided"
    assert "8 verified, 1 left out" in text and "80 % at 10 min" in text
    assert "snapshot AAA" in text and "10 x 12 cells of 1 km" in text
    assert FOREIGN in text and FOREIGN not in page, "text from a file must be escaped"


def test_the_interval_of_every_difference_is_there_to_read(page: str, report: Report) -> None:
    table = re.search(r"<details><summary>90 % intervals .*? extrapolation</summary>.*?</details>", page)
    assert table is not None and "title=" not in page, "pointing at something needs a mouse"
    read = [
        float(number) for number in re.findall(r"[+-]?\d\.\d+", html.unescape(table[0]).replace("−", "-"))
    ]
    differences = [report.differences[score.name]["extrapolation"] for score in report.skill.scores]
    there = [[d.low[lead], d.high[lead]] for d in differences for lead in range(3)]
    np.testing.assert_allclose(read, np.ravel(there), atol=6e-4)


def test_of_few_runs_the_page_tells_no_intervals() -> None:
    assert "<details>" not in as_html(report_of(skill_of(2)), case())


def test_figures_are_drawn_in_the_colour_of_the_page_with_a_name_for_those_who_cannot_see_them(
    page: str,
) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)

    assert len(figures) == 4
    names = set()
    for figure in figures:
        root = ElementTree.fromstring(figure)
        names.add(root.attrib["aria-label"])
        assert root.attrib["role"] == "img"
        assert "currentColor" in figure and "#010203" not in figure and "width" not in root.attrib
    assert len(names) == 4
    defined = [set(re.findall(r'id="([^"]+)"', figure)) for figure in figures]
    assert all(not (a & b) for i, a in enumerate(defined) for b in defined[:i]), (
        "one page, one meaning of an id"
    )


def test_a_page_without_probability_scores_leaves_those_sections_out() -> None:
    page = as_html(report_of(skill_of(2, scores=(Csi(1.0),), lead_times=(10.0,))), case())

    assert "<h2>Reliability</h2>" not in page and "<h2>Against the baselines</h2>" not in page
    assert page.count("<svg") == 2


def test_both_files_are_written_whole_and_replace_older_ones(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    write(report, case(), str(folder))
    (folder / "report.html").write_text("older")

    write(report, case(), str(folder))

    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert strict((folder / "report.json").read_text())["headline"] == headline(report)
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_a_write_that_fails_leaves_the_older_file(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text("older")
    monkeypatch.setattr("pipelines.report_page.as_html", lambda report, case: "page")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(report, case(), str(tmp_path))

    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "older"


def test_a_thinned_map_keeps_the_mean_of_what_was_observed() -> None:
    field = np.random.default_rng(1).random((7, 10)).astype(np.float32)
    field[0:2, 0:2] = np.nan
    field[2, 0] = np.nan

    small = thinned(field, side=5)

    assert small.shape == (4, 5)
    assert np.isnan(small[0, 0]) and np.isnan(small).sum() == 1
    assert small[1, 0] == pytest.approx(np.nanmean(field[2:4, 0:2]))
    assert small[3, 4] == pytest.approx(field[6, 8:10].mean())  # half a block, at the edge
    assert thinned(field, side=10).shape == (7, 10)
