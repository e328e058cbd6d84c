"""`RunFacts`: what the attributes of a run say of how its probabilities were made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pipelines.frame import parse_time
from pipelines.runs import INPUT_AGE, RunHeader

MISSING = "inputs_missing"  # the valid times of past frames that were not there, or "none"
SILENT = "sources_missing"  # the satellite groups and static fields of which nothing was there, or "none"
CALIBRATED = "calibrated"  # "true" or "false"
CALIBRATION = "calibration"  # by threshold (mm/h): offset and slope of the logit at each lead time
Line = tuple[float, float]


@dataclass(frozen=True)
class RunFacts:
    """Whether and how a run was calibrated, and how old its newest frame was; nothing where nothing is said.

    A run may be calibrated and tell no line, where none of its thresholds is an edge between the classes.
    """

    calibration: Mapping[float, tuple[Line, ...]] = field(default_factory=dict)  # by mm/h: of each lead time
    input_age: timedelta = timedelta(0)
    calibrated: bool = False
    missing: frozenset[datetime] = frozenset()  # valid times (UTC) of the frames that it was made without

    def attributes(self) -> dict[str, str]:
        """As a run keeps them."""
        told = {CALIBRATED: "true" if self.calibrated else "false"}
        if self.calibration:
            told[CALIBRATION] = json.dumps({f"{rate:g}": lines for rate, lines in self.calibration.items()})
        return told

    @classmethod
    def of(cls, header: RunHeader) -> "RunFacts":
        """Of a run; of one that says nothing, that nothing was done.

        Raises:
            ValueError: if its attributes say what cannot be.
        """
        attributes, count = header.attributes, len(header.lead_times)
        try:
            calibration = {
                float(rate): tuple((float(offset), float(slope)) for offset, slope in lines)
                for rate, lines in json.loads(attributes.get(CALIBRATION, "{}")).items()
            }
            age = timedelta(minutes=float(attributes.get(INPUT_AGE, "0")))
            told = attributes.get(MISSING, "none")
            missing = frozenset(map(parse_time, () if told == "none" else told.split()))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"run {header.name}: its attributes cannot be read: {error}") from error
        if {count} | {len(row) for row in calibration.values()} != {count}:
            raise ValueError(
                f"run {header.name}: {CALIBRATION} tells of another number of lead times than its {count}; "
                "make the run again"
            )
        return cls(calibration, age, attributes.get(CALIBRATED, "false") == "true", missing)
