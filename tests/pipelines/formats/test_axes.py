"""Axes by their marks, and clocks by their units."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from cftime import date2num
from hypothesis import given
from hypothesis import strategies as st

from pipelines.formats.arrays import Read
from pipelines.formats.axes import Line, TimeAxis, marked, microseconds, moment, times


@dataclass
class Coordinate:
    """An array in memory."""

    values: Any = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    fill: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.values)

    def read(self, fixed: object) -> Read:
        return Read(np.asarray(self.values), [], "")


def test_the_attribute_axis_counts_more_than_the_name():
    lines = {"x": Coordinate(attributes={"axis": "Y"}), "y": Coordinate(attributes={"axis": "X"})}
    assert (marked("x", lines.items()), marked("y", lines.items())) == ("y", "x")


def test_each_kind_of_mark_is_known_and_two_of_a_kind_tell_nothing():
    for attributes in ({"standard_name": "longitude"}, {"units": "degrees_east"}, {"axis": "x"}):
        assert marked("x", [("a", Coordinate(attributes=attributes)), ("b", Coordinate())]) == "a"
    assert marked("time", [("t", Coordinate(attributes={"units": "days since 2000-01-01"}))]) == "t"
    assert marked("x", [("LON", Coordinate()), ("b", Coordinate())]) == "LON"
    assert marked("x", [("lon", Coordinate()), ("x", Coordinate())]) is None
    assert marked("y", []) is None


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)).map(lambda time: time.replace(microsecond=0)),
    st.sampled_from(["seconds", "minutes", "hours", "days", "milliseconds", "h", "d", "sec"]),
    st.sampled_from(["1970-01-01", "1901-01-01 00:00:00.0", "1999-1-1T6:30", "2000-01-01 00:00:00 UTC"]),
    st.sampled_from(["i8", "f8"]),
)
def test_times_are_those_of_cftime(time, unit, begin, kind):
    units = f"{unit} since {begin}"
    count = date2num(time, units.removesuffix(" UTC"), calendar="standard")
    whole = np.asarray(count, kind)
    if kind == "i8" and float(count) != int(count):
        return
    (found,) = times(Coordinate(whole, {"units": units, "calendar": "gregorian"}), "time")
    assert moment(found) == time.replace(tzinfo=UTC)


def test_rounded_even_numbers_are_even_and_others_stay():
    even = np.linspace(43.4, 46.001, 290, dtype=np.float32)
    line = Line.of("lat", Coordinate(even, {"units": "degrees_north"}))
    assert np.ptp(np.diff(line.stored)) < 1e-12
    uneven = even.copy()
    uneven[100] += np.float32(1e-4)
    assert np.ptp(np.diff(Line.of("lat", Coordinate(uneven)).stored)) > 1e-5


def test_a_line_needs_two_numbers_of_which_none_is_missing():
    for values in ([1.0], [[1.0, 2.0]], [1.0, np.nan], ["a", "b"]):
        with pytest.raises(ValueError, match="x "):
            Line.of("x", Coordinate(values))
    with pytest.raises(ValueError, match="some of x is missing"):
        Line.of("x", Coordinate([1.0, 9.0], {"_FillValue": 9.0}))


def test_a_field_is_found_by_its_time_alone():
    ends = np.array([microseconds(datetime(2020, 1, 1, hour, tzinfo=UTC)) for hour in (0, 1, 2)])
    axis = TimeAxis("time", ends, np.array([True, False, True]), timedelta(hours=1))
    assert axis.find(datetime(2020, 1, 1, 2, tzinfo=UTC)) == 2
    for hour, minute in ((0, 1), (1, 0), (3, 0)):
        with pytest.raises(ValueError, match="holds no field valid at"):
            axis.find(datetime(2020, 1, 1, hour, minute, tzinfo=UTC))
    with pytest.raises(ValueError, match="holds 3 times"):
        axis.find(None)
