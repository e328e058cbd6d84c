"""`python -m pipelines.ship RUN_DIR`: makes a finished run the model that comes with metnet."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from pipelines.bench_skill import Event, measured, ratio_tables
from pipelines.destination import replace_folder
from pipelines.goals import goal_table
from pipelines.pretrained import FOLDER, NAME
from pipelines.terms import TERMS
from pipelines.trained import CARD, WEIGHTS, TrainedModel, trained

MODEL_CARD = "MODEL_CARD.md"
TEMPLATE = Path(__file__).with_name("model_card.md")
UNMEASURED = "Not measured: it was shipped without a `skill.json` of `metnet bench-skill`."
LARGEST = 20e6  # bytes of a folder that ships
PATHS = ("/", "~", "\\", "./", "../", "file:", "s3:")  # how a place on some machine begins


@dataclass(frozen=True)
class Shipped:
    """What a call of `ship` left behind."""

    folder: Path
    events: tuple[str, ...]  # that the model learned from
    size: int  # bytes

    def __str__(self) -> str:
        """For a person at a terminal."""
        return f"{self.folder}: learned from {', '.join(self.events)}; {self.size / 1e6:.2f} MB"


def ship(run: str, machine: str, skill: str | None = None, folder: Path = FOLDER) -> Shipped:
    """Puts weights, card and model card of a finished run into the package, in place of what is there.

    No place on this machine is told in them.

    Args:
        run: folder of a finished `metnet train`.
        machine: what it was trained on, in words.
        skill: `skill.json` of a `metnet bench-skill` of the same recipe; None: no skill is told.
        folder: where to.

    Raises:
        ValueError: if the run is not finished, began with other weights, learned from an event whose terms
            are not known to allow it, or is too large; or the `skill.json` is none. What is in the folder
            then stays as it was.
    """
    model = trained(Path(run))
    if model.card.get("weights") is not None:
        raise ValueError(
            f"{run}: began with other weights; expected one that learned from nothing but its cubes"
        )
    card = without_places(model.card)
    learned = tuple(cube["path"] for cube in (*card["cubes"], *card["validation_cubes"]))
    if unknown := sorted(set(learned) - {terms.event for terms in TERMS}):
        raise ValueError(
            f"{run}: learned from {', '.join(unknown)}; expected none but those whose terms allow it "
            f"({', '.join(terms.event for terms in TERMS)}); train with experiment=pretrained"
        )
    told = () if skill is None else measured(Path(skill))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        made = Path(aside) / folder.name
        made.mkdir()
        shutil.copyfile(Path(run) / WEIGHTS, made / WEIGHTS)
        (made / CARD).write_text(json.dumps(card, indent=1))
        (made / MODEL_CARD).write_text(model_card(model, learned, machine, told))
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > LARGEST:
            raise ValueError(
                f"{run}: {size / 1e6:.1f} MB with its cards; expected at most {LARGEST / 1e6:g} MB "
                "in a package; train a smaller network"
            )
        trained(made)  # opens as it will be opened
        replace_folder(made, folder)
    return Shipped(folder, learned, size)


def without_places(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card of a run with the names of its cubes in place of their paths.

    Raises:
        ValueError: if it names a place on the machine otherwise.
    """
    names = {cube["path"]: Path(cube["path"]).name for cube in (*card["cubes"], *card["validation_cubes"])}
    cubes = [names[cube["path"]] for cube in card["cubes"]]
    told: dict[str, Any] = _renamed({**card, "config": {**card["config"], "run": NAME, "cube": cubes}}, names)
    if places := [text for text in _texts(told) if text.startswith(PATHS)]:
        raise ValueError(
            f"{CARD} of the run names {', '.join(places)}; expected no place on a machine, for others "
            "have not got it; train without"
        )
    return told


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """What JSON holds, each text that has another name told by that."""
    if isinstance(node, Mapping):
        return {key: _renamed(value, names) for key, value in node.items()}
    if isinstance(node, list):
        return [_renamed(value, names) for value in node]
    return names.get(node, node) if isinstance(node, str) else node


def _texts(node: Any) -> Iterator[str]:
    """All texts in what JSON holds, keys among them."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        yield from (text for item in node.items() for inner in item for text in _texts(inner))
    elif isinstance(node, list):
        yield from (text for inner in node for text in _texts(inner))


def _told(skill: Sequence[Event]) -> Iterator[str]:
    """What the skill is: the ratios to the baselines, then the goals, as lines of Markdown."""
    yield from ratio_tables(skill)
    if goals := {event.name: event.goals for event in skill if event.goals}:
        yield "What the project wants of it, and what was met:"
        yield ""
        yield from goal_table(goals)


def model_card(model: TrainedModel, learned: Sequence[str], machine: str, skill: Sequence[Event]) -> str:
    """The model card, in Markdown: the template with what the run and its `skill.json` tell."""
    card = model.card
    cells = sorted(cube["cell_size"] / 1000 for cube in card["cubes"])  # km
    rows = [each for each in TERMS if each.event in learned]
    return Template(TEMPLATE.read_text()).substitute(
        network=type(model.network).__name__,
        frames=model.frames,
        parameters=f"{card['parameters']:,}",
        events=len(rows),
        cells=f"{cells[0]:.2g} to {cells[-1]:.2g}",
        cadences=", ".join(f"{minutes:g}" for minutes in card["cadence_minutes"]),
        first=f"{model.lead_times[0]:g}",
        last=f"{model.lead_times[-1]:g}",
        date=card["created"][:10],
        steps=f"{card['steps']:,}",
        minutes=f"{card['seconds'] / 60:.0f}",
        machine=machine,
        kept=_kept((card["scores"] or {}).get("step")),
        software=card["software"],
        sha256=card["sha256"],
        data="\n".join(f"| {row.event} | {row.rain} | {row.source} | {row.licence} |" for row in rows),
        skill="\n".join(_told(skill)).rstrip() if skill else UNMEASURED,
    )


def _kept(step: int | None) -> str:
    """Which weights of a training are in the model."""
    if step is None:
        return "the last weights; nothing was validated on"
    if step == 0:
        return (
            "the start, prior and what is local as fitted on pixels: it validated best, and no step is in it"
        )
    return f"the weights of step {step:,}, which validated best"


def main() -> None:
    """Ships a run and says what was shipped."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.ship", description=__doc__)
    parser.add_argument("run", help="run folder of a finished metnet train experiment=pretrained")
    parser.add_argument("--machine", required=True, help="what it was trained on, such as 'one H200'")
    parser.add_argument("--skill", help="skill.json of metnet bench-skill with the same recipe")
    given = parser.parse_args()
    try:
        shipped = ship(given.run, given.machine, given.skill)
    except (OSError, ValueError) as error:
        parser.exit(1, f"ship: {error}\n")
    parser.exit(0, f"{shipped}\n")


if __name__ == "__main__":
    main()
