"""CoverageJSON (OGC 21-069r2): a time series at one point."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from pipelines.frame import iso
from serve.forecasts import Cell, Quantity, Values, number

REFERENCING = [
    {
        "coordinates": ["x", "y"],
        "system": {"type": "GeographicCRS", "id": "http://www.opengis.net/def/crs/OGC/1.3/CRS84"},
    },
    {"coordinates": ["t"], "system": {"type": "TemporalRS", "calendar": "Gregorian"}},
]

UCUM = "http://www.opengis.net/def/uom/UCUM/"


def point_series(
    cell: Cell, times: Sequence[datetime], quantities: Sequence[Quantity], series: Mapping[str, Values]
) -> dict[str, object]:
    """The coverage of these quantities at a cell's centre, one value for each time; null: no forecast."""
    return {
        "type": "Coverage",
        "domain": {
            "type": "Domain",
            "domainType": "PointSeries",
            "axes": {
                "x": {"values": [cell.lon]},
                "y": {"values": [cell.lat]},
                "t": {"values": [iso(time) for time in times]},
            },
            "referencing": REFERENCING,
        },
        "parameters": {quantity.name: parameter(quantity) for quantity in quantities},
        "ranges": {
            quantity.name: {
                "type": "NdArray",
                "dataType": "float",
                "axisNames": ["t"],
                "shape": [len(times)],
                "values": [number(value) for value in series[quantity.name]],
            }
            for quantity in quantities
        },
    }


def parameter(quantity: Quantity) -> dict[str, object]:
    """What a quantity is and its unit (UCUM)."""
    unit = {"rate": "mm/h", "probability": "1"}[quantity.kind]
    return {
        "type": "Parameter",
        "description": {"en": quantity.label},
        "unit": {"label": {"en": quantity.units}, "symbol": {"value": unit, "type": UCUM}},
        "observedProperty": {"id": quantity.name, "label": {"en": quantity.label}},
    }
