"""`python -m benchmarks.parts RUN CUBE... [--others RUN...]`: what each part of a trained model earns.

Each cube, none of which RUN has learned from, is forecast by the run as it is and again without a part: the
network, the training, what is local, the chances, or all but one of them. Other runs, trained without
something on the same cubes as RUN, may stand beside them. Scores are those of `metnet bench-skill`, of the
run as it is by those without the part: below 1 the part earns something. None is calibrated.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load

from metnet.forecaster import Forecaster
from metnet.local import PARTS, SHUT, Local
from metnet.model import MetNet
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from pipelines.beginning import LOCAL
from pipelines.bench_skill import THRESHOLDS, skill_on
from pipelines.plain import rain_cube
from pipelines.skill import Skill
from pipelines.trained import TrainedModel, trained, untrained

AS_IT_IS = "as it is"
ALL = 12.0  # logit of the chances' share where nothing else is to be heard
SCORES = (Crps(), *(Brier(threshold) for threshold in THRESHOLDS))


def without_network(model: MetNet) -> None:
    """What it adds to the prior is nothing; prior, what is local and the chances stay as trained."""
    with torch.no_grad():
        for weight in model.head.classify.parameters():
            weight.zero_()


def without_local(model: MetNet) -> None:
    """Nothing of the prior's probability goes to the smooth distributions; the chances stay."""
    with torch.no_grad():
        last = _local(model).last
        last.weight.zero_()
        last.get_parameter("bias")[2 * PARTS : 3 * PARTS] = SHUT


def without_chances(model: MetNet) -> None:
    """Nothing is pooled."""
    _local(model).pool.copy_(torch.tensor([SHUT, 0.0]))


def chances_alone(model: MetNet) -> None:
    """All that is said where anything was observed is what the chances say."""
    without_network(model)
    _local(model).pool.copy_(torch.tensor([ALL, 0.0]))


def variants(run: Path) -> Iterator[tuple[str, TrainedModel]]:
    """The model of a run folder, as it is and without its parts, by what is left out.

    Raises:
        ValueError: if it holds no finished run of a network that has these parts, and was not given their
            start by another (`weights=`).
    """
    whole = trained(run).uncalibrated()
    network = whole.network
    if not isinstance(network, MetNet) or network.local is None or network.prior is None:
        raise ValueError(
            f"{run}: expected a MetNet with advection and local > 0, whose parts can be left out"
        )
    if not (run / LOCAL).is_file():
        raise ValueError(f"{run}: no {LOCAL} there; expected a training that fitted its own start")
    yield AS_IT_IS, whole
    yield "its network", _changed(whole, without_network)
    yield "its training: prior and what is local as fitted", _start(run)
    yield "what is local", _changed(whole, without_local)
    yield "the chances", _changed(whole, without_chances)
    yield "all but the chances", _changed(whole, chances_alone)
    yield "all but the prior as fitted", untrained(run)


def outcomes(cube: str, models: Mapping[str, Forecaster], runs: int, side: int) -> Skill:
    """The scores of each on one cube, at the same pixels."""
    return skill_on(rain_cube(cube), models, SCORES, runs, side)


def rows(skills: Sequence[Skill], resamples: int = 1000) -> Iterator[str]:
    """The table, as lines of Markdown: a row for each part, a column for each cube."""
    for name in skills[0].forecasters[1:]:
        cells = (
            " / ".join(
                [
                    str(skill.ratio(SCORES[0], name, resamples)),
                    *(f"{skill.ratio(score, name, 1).value:.3f}" for score in SCORES[1:]),
                ]
            )
            for skill in skills
        )
        yield f"| {name} | {' | '.join(cells)} |"


def _changed(model: TrainedModel, change: Callable[[MetNet], None]) -> TrainedModel:
    """A copy of the model with something done to its network."""
    network = copy.deepcopy(model.network)
    assert isinstance(network, MetNet)
    change(network)
    return replace(model, network=network)


def _start(run: Path) -> TrainedModel:
    """The model as its training began: a network that says nothing yet, upon what was fitted."""
    start = untrained(run)
    assert isinstance(start.network, MetNet) and start.network.local is not None
    start.network.local.load_state_dict(load((run / LOCAL).read_bytes()))
    return start


def _local(model: MetNet) -> Local:
    assert model.local is not None
    return model.local


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of metnet train")
    parser.add_argument("cubes", nargs="+", help="cubes that it has not learned from")
    parser.add_argument("--others", nargs="*", default=[], help="run folders trained without something")
    parser.add_argument("--only-others", action="store_true", help="beside the run as it is these alone")
    parser.add_argument("--inits", type=int, default=9, help="forecasts of each cube (default 9)")
    parser.add_argument("--side", type=int, default=512, help="cells of the window's sides (default 512)")
    given = parser.parse_args()
    alone = given.only_others
    models: dict[str, Forecaster] = {}
    models |= {AS_IT_IS: trained(given.run).uncalibrated()} if alone else dict(variants(given.run))
    models |= {other: trained(other).uncalibrated() for other in given.others}
    skills = [outcomes(cube, models, given.inits, given.side) for cube in given.cubes]
    print(f"| without | {' | '.join(Path(cube).name for cube in given.cubes)} |")
    print("|---" * (1 + len(skills)) + "|")
    print("\n".join(rows(skills)))


if __name__ == "__main__":
    main()
