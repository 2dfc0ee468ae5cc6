"""Bins cut by the float's bits: where they lie, and that no order or split changes the counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from onnxq.calibrate.bins import BINS, MagnitudeBins

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = arrays_of.arrays(np.float32, st.integers(1, 60), elements=FINITE)


def counted(*parts: np.ndarray) -> MagnitudeBins:
    bins = MagnitudeBins()
    for part in parts:
        bins.count(part, float(np.abs(part).max()))
    return bins


def same(one: MagnitudeBins, other: MagnitudeBins) -> bool:
    return one.top == other.top and bool(np.array_equal(one.counts, other.counts))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ARRAYS)
def test_every_value_lies_between_the_edges_of_its_bin(values: np.ndarray) -> None:
    bins = counted(values)
    expected = np.zeros(BINS, np.int64)
    index = np.searchsorted(bins.edges(), np.abs(values.astype(np.float64)), side="right") - 1
    np.add.at(expected, index, 1)
    assert np.array_equal(bins.counts, expected)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ARRAYS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_order_split_and_merge_counts_the_same(parts: list[np.ndarray], random) -> None:
    whole = counted(np.concatenate(parts))
    shuffled = list(parts)
    random.shuffle(shuffled)
    assert same(whole, counted(*shuffled))
    merged = counted(shuffled[0])
    for part in shuffled[1:]:
        other = counted(part)
        other.merge(merged)  # either may have the larger maximum
        merged = other
    assert same(whole, merged)


@pytest.mark.parametrize("size", [1000, 70_000, 600_000])  # looked up, counted fine, two chunks
def test_large_arrays_count_like_their_pieces(size: int) -> None:
    rng = np.random.default_rng(size)
    values = (rng.standard_normal(size) * np.exp(3 * rng.standard_normal(size))).astype(np.float32)
    pieces = np.array_split(rng.permutation(values), 37)
    whole = counted(values)
    assert same(whole, counted(*pieces))
    assert whole.counts.sum() == size


@pytest.mark.parametrize("largest", [1.0, 1.5, 50.0, 65504.0, 3.4e38, 1e-20, 2.0**-96])
def test_2048_bins_or_more_of_one_width_below_the_maximum(largest: float) -> None:
    bins = counted(np.array([largest], np.float32))
    edges = bins.edges()
    widths = np.diff(edges)
    upper = (edges[:-1] >= largest / 16) & (edges[:-1] <= largest)
    assert np.all(widths[upper] == widths[-1])
    assert 2048 <= largest / widths[-1] <= 4096
    # Below: 128 bins an octave, no bin wider than 1/128 of its values for thirty octaves.
    lower = (edges[:-1] >= largest * 2.0**-29) & (edges[:-1] < largest)
    assert np.all(widths[lower] <= edges[:-1][lower] / 127)


def test_saved_state_is_the_whole_state() -> None:
    bins = counted(np.array([0.0, 3.0, -7.5, 1e-30], np.float32))
    arrays = bins.arrays()
    assert same(bins, MagnitudeBins.from_arrays(arrays))
    assert same(MagnitudeBins(), MagnitudeBins.from_arrays(MagnitudeBins().arrays()))
