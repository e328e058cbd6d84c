"""The rain colours: one scale in mm/h for maps, reports and tiles.

Lightness falls from light drizzle to the heaviest rain and hue runs from blue over green and amber to
magenta, so that the order survives in grey print and for colour-blind eyes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import BoundaryNorm, Colormap

RAIN_LEVELS: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 40.0, 70.0, 100.0)
"""mm/h at which each colour begins; the last colour has no upper end. Below the first it is dry."""

RAIN_COLOURS: tuple[str, ...] = (
    "#d3e9f7",
    "#a9d3ee",
    "#79b8e2",
    "#4b98d0",
    "#2c79b8",
    "#1f8a8c",
    "#3fa34d",
    "#e3b505",
    "#ef7d0c",
    "#d6322b",
    "#9b1b6a",
    "#4a1259",
)
"""One colour for each level of `RAIN_LEVELS`."""

DRY_COLOUR = "#ffffff"
"""Observed and below the first level; on a map over a base map it is transparent instead."""

MISSING_COLOUR = "#c9c9c9"
"""NaN: not observed, or no forecast there."""


def rain_colours() -> "tuple[Colormap, BoundaryNorm]":
    """A matplotlib colour map and norm for rates in mm/h: dry is white, NaN is grey."""
    from matplotlib.colors import BoundaryNorm, ListedColormap  # heavy; the values above serve without it

    colours = ListedColormap([DRY_COLOUR, *RAIN_COLOURS], name="rain").with_extremes(bad=MISSING_COLOUR)
    return colours, BoundaryNorm([0.0, *RAIN_LEVELS, 1e4], ncolors=len(RAIN_COLOURS) + 1)
