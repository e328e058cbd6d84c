"""Packed numbers, by table and by arithmetic."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.formats.packing import Packing


@dataclass
class Told:
    """An array of which only the attributes count."""

    attributes: dict[str, Any] = field(default_factory=dict)
    fill: float | None = None


def test_numbers_go_the_same_way_by_table_and_by_arithmetic():
    told = Told({"scale_factor": 0.01, "add_offset": -30.0, "_FillValue": -1, "valid_max": 20_000})
    packing = Packing.of(told, missing=(5,), factor=2.0)
    counts = np.random.default_rng(0).integers(-10, 32_000, (300, 300)).astype(np.int16)
    by_table = packing.unpacked(counts)  # more cells than an int16 has values
    by_arithmetic = packing.unpacked(counts.astype(np.int32))
    assert by_table.dtype == np.float32
    assert np.array_equal(by_table, by_arithmetic, equal_nan=True)
    expected = (counts * 0.01 - 30) * 2
    expected[(counts == -1) | (counts == 5) | (counts > 20_000)] = np.nan
    assert np.allclose(by_table, expected, equal_nan=True)


@given(st.sampled_from(["u1", "i1", "u2", "i2"]), st.integers(0, 127))
def test_every_code_of_a_small_type_is_itself_or_missing(kind, missing):
    codes = np.arange(np.iinfo(kind).min, np.iinfo(kind).max + 1, dtype=kind)
    values = Packing.of(Told(), missing=(missing,)).unpacked(np.tile(codes, 2))
    assert np.array_equal(values[: codes.size], np.where(codes == missing, np.nan, codes), equal_nan=True)


def test_a_missing_float_is_found_to_its_last_bit():
    fill = np.float32(1e20)
    packing = Packing.of(Told({"_FillValue": 1e20}))
    assert np.isnan(packing.unpacked(np.array([fill, 1.0], np.float32))).tolist() == [True, False]


def test_the_formats_own_fill_counts_only_where_no_other_is_named():
    counts = np.array([0, 7], np.int32)
    assert np.isnan(Packing.of(Told(fill=7)).unpacked(counts)).tolist() == [False, True]
    assert np.isnan(Packing.of(Told({"_FillValue": 0}, fill=7)).unpacked(counts)).tolist() == [True, False]
    assert not np.isnan(Packing.of(Told(fill=7), fill_is_missing=False).unpacked(counts)).any()


def test_what_is_no_number_is_refused():
    for attributes in ({"scale_factor": "big"}, {"valid_range": 3}, {"add_offset": [1, 2]}):
        with pytest.raises(ValueError, match=r"number"):
            Packing.of(Told(attributes))
    with pytest.raises(ValueError, match="expected numbers"):
        Packing.of(Told()).unpacked(np.array(["a"]))
