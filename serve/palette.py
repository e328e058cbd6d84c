"""`Palette`: the colours of a quantity, for tiles and for the legend beside them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.palette import MISSING_COLOUR, RAIN_COLOURS, RAIN_LEVELS

BELOW = 0
"""The index of values below the first level: forecast, and not worth a colour. Transparent."""

MISSING = 255
"""The index of NaN: no forecast. Transparent."""

HATCH = 254
"""The index of lines drawn over what is missing."""

HATCH_COLOUR = "#7d8790"


@dataclass(frozen=True)
class Palette:
    """Colour i is for values from `levels[i]` up to the next level; the last has no upper end."""

    units: str  # as the legend shows them
    scale: float  # a value times this is in the legend's units
    levels: tuple[float, ...]  # in the quantity's own units, rising
    colours: tuple[str, ...]  # #rrggbb

    def indices(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The palette index of each value: `BELOW`, 1 for the first colour and so on, or `MISSING`."""
        indices = np.searchsorted(np.asarray(self.levels, np.float32), values, side="right").astype(np.uint8)
        indices[np.isnan(values)] = MISSING
        return indices

    @cached_property
    def rgb(self) -> bytes:
        """Red, green and blue of all 256 indices."""
        table = np.zeros((256, 3), np.uint8)
        table[MISSING] = _rgb(MISSING_COLOUR)
        table[HATCH] = _rgb(HATCH_COLOUR)
        table[1 : 1 + len(self.colours)] = [_rgb(colour) for colour in self.colours]
        return table.tobytes()

    @cached_property
    def alpha(self) -> bytes:
        """Opacity of all 256 indices."""
        table = np.zeros(256, np.uint8)
        table[1 : 1 + len(self.colours)] = table[HATCH] = 255
        return table.tobytes()

    def legend(self) -> dict[str, object]:
        """Units and one entry a colour: where it begins, in those units."""
        begins = [f"{level * self.scale:.4g}" for level in self.levels]
        entries = [
            {"from": float(begin), "colour": colour}
            for begin, colour in zip(begins, self.colours, strict=True)
        ]
        return {"units": self.units, "entries": entries}


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


RATE = Palette("mm/h", 1.0, RAIN_LEVELS, RAIN_COLOURS)

PROBABILITY = Palette(
    "%",
    100.0,
    (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    (
        "#dceec2",
        "#bfe2ae",
        "#97d3a6",
        "#6cc1a3",
        "#43aca5",
        "#2893a6",
        "#2177a2",
        "#2a5a96",
        "#343d84",
        "#36226b",
    ),
)
"""Lightness falls from unlikely to certain, so that the order survives in grey and for colour-blind eyes."""
