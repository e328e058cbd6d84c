"""`Sampling`: which samples of which cubes a training learns from, and which it validates on."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipelines.augmentation import Augmentation
from pipelines.beside import Beside, Sides
from pipelines.drop_out import DropOut
from pipelines.frame import parse_interval
from pipelines.observations import Observations
from pipelines.samples import Samples, Span, check_apart, split
from pipelines.trained import Published

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn from a cube, whichever it is."""

    frames: int
    lead_times: Sequence[float]  # minutes
    all_leads: bool  # each must fit the cube; else those count that do
    crop: int
    beside: Beside
    seed: int
    augment: bool  # what is learned from
    drop_out: DropOut  # of what is learned from
    augmentation: Augmentation  # of what is learned from
    validation_samples: int

    def parted(
        self, cube: Observations, share: float, start: str | None, end: str | None
    ) -> tuple[Samples, Samples | None]:
        """What is learned from within [start, end], and its end to validate on; None if that is too short."""
        used = _between(cube, start, end)
        with _named(cube):
            span = self._span(cube)
            parts = split(cube.observed[used], span, share).later(used.start)
        learned = Samples(
            cube,
            parts.training,
            span,
            self.crop,
            seed=self.seed,
            augment=self.augment,
            beside=self.beside,
            drop_out=self.drop_out,
            augmentation=self.augmentation,
        )
        if learned.index.empty:
            raise ValueError(
                f"{cube.path}: nothing was observed at any of the {len(parts.training)} init times to learn "
                "from; leave the cube out, or choose others by start= and end="
            )
        for name, reason in learned.leeway.refused.items():
            log.info("%s: its samples are without augmentation.%s: %s", cube.path, name, reason)
        if len(parts.validation):
            kept = self._validating(cube, parts.validation, span)
            if not kept.index.empty:
                return learned, kept
            log.warning(
                "%s is not validated on: nothing was observed in the frames at its end that are kept for it",
                cube.path,
            )
            return learned, None
        if share:
            log.warning(
                "%s has %d frames: too few to keep %g of them for validation and learn from more, all are "
                "trained on",
                cube.path,
                cube.observed.sum(),
                share,
            )
        return learned, None

    def event(self, cube: Observations) -> Samples:
        """A whole cube to validate on."""
        with _named(cube):
            span = self._span(cube)
            inits = split(cube.observed, span, 0.0).training
        kept = self._validating(cube, inits, span)
        if kept.index.empty:
            raise ValueError(f"{cube.path}: nothing was observed that could be validated on; leave it out")
        return kept

    def _validating(self, cube: Observations, inits: NDArray[np.int64], span: Span) -> Samples:
        """Always the same samples, as they are."""
        count, seed = self.validation_samples, self.seed + 1
        return Samples(cube, inits, span, self.crop, count, seed, beside=self.beside)

    def _span(self, cube: Observations) -> Span:
        """What a sample of the cube covers."""
        made = (
            Span.of(cube.cadence, self.frames, self.lead_times)
            if self.all_leads
            else Span.of_those(cube, self.frames, self.lead_times)
        )
        return replace(made, back=Sides(cube, self.beside).back)


def knowable(augmentation: Augmentation, network: nn.Module) -> Augmentation:
    """Without other cadences and cells for a published network, which is told neither ages nor cell sizes."""
    if not isinstance(network, Published):
        return augmentation
    if augmentation.stride or augmentation.coarsen:
        log.info(
            "samples are without augmentation.stride and augmentation.coarsen: a published network is told "
            "neither ages nor cell sizes"
        )
    return replace(augmentation, stride=0.0, coarsen=0.0)


def samples_of(
    sampling: Sampling,
    learned: Sequence[Observations],
    kept: Sequence[Observations],
    share: float,
    start: str | None,
    end: str | None,
) -> tuple[list[Samples], list[Samples]]:
    """What is learned from, and what is validated on: whole events that are kept, or the end of each cube.

    Raises:
        ValueError: if there is too little of a cube, or the same rain is in both.
    """
    parts = [sampling.parted(cube, 0.0 if kept else share, start, end) for cube in learned]
    training = [learning for learning, _ in parts]
    ends = [validating for _, validating in parts if validating is not None]
    validating = [*ends, *(sampling.event(cube) for cube in kept)]
    check_apart(training, validating)
    if validating and not sampling.validation_samples:
        log.warning(
            "validation_samples=0: nothing is validated or calibrated, and the last weights are kept; "
            "to learn from what is held back for validation, set validation=0 and validation_cubes=[]"
        )
        return training, []
    return training, validating


@contextmanager
def _named(cube: Observations) -> Iterator[None]:
    """Says of which cube there is too little."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{cube.path}: {error}") from error


def _between(cube: Observations, start: str | None, end: str | None) -> slice:
    """The steps of the cube's time axis within [start, end].

    Raises:
        ValueError: if there is none.
    """
    first, last = parse_interval(start or None, end or None)
    low, high = first or cube.times[0], last or cube.times[-1]
    before = sum(time < low for time in cube.times)
    used = slice(before, before + sum(low <= time <= high for time in cube.times))
    if used.start == used.stop:
        raise ValueError(
            f"start={start}, end={end}: nothing of {cube.path} lies there, which reaches from "
            f"{cube.times[0]:%Y-%m-%dT%H:%MZ} to {cube.times[-1]:%Y-%m-%dT%H:%MZ}"
        )
    return used
