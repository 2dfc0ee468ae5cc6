"""Statistics against numpy on all values at once, and their refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from onnxq.calibrate.statistics import Amax, ChannelAmax, Histogram, NotFiniteError, make
from onnxq.errors import OnnxqError

FINITE = st.floats(width=16, allow_nan=False, allow_infinity=False)
BATCHES = st.lists(
    st.integers(1, 5).flatmap(
        lambda rows: arrays_of.arrays(np.float32, (rows, 3), elements=FINITE)
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BATCHES, st.integers(0, 4))
def test_any_split_and_merge_gives_the_same_state(batches: list[np.ndarray], cut: int) -> None:
    for names in ("amax", "histogram", "channel_amax:-1", "channel_amax:1"):
        (whole,) = make(names).values()
        whole.update(np.concatenate(batches))
        (left,), (right,) = make(names).values(), make(names).values()
        for index, batch in enumerate(batches):
            (left if index < cut else right).update(batch)
        right.merge(left)
        expected, found = whole.arrays(), right.arrays()
        assert expected.keys() == found.keys()
        for key in expected:
            assert np.array_equal(expected[key], found[key]), (names, key)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BATCHES)
def test_extremes_and_channels_are_numpys(batches: list[np.ndarray]) -> None:
    amax, channels = Amax(), ChannelAmax(-1)
    for batch in batches:
        amax.update(batch)
        channels.update(batch)
    values = np.concatenate(batches)
    assert (amax.low, amax.high) == (values.min(), values.max())
    assert amax.amax == np.abs(values).max()
    assert np.array_equal(channels.values, np.abs(values).max(axis=0))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_count_as_their_fp32_values(dtype: type) -> None:
    values = (np.random.default_rng(0).standard_normal(500) * 20).astype(dtype)
    narrow, wide = Histogram(), Histogram()
    narrow.update(values)
    wide.update(values.astype(np.float32))
    assert np.array_equal(narrow.bins.counts, wide.bins.counts)
    assert (narrow.low, narrow.high) == (wide.low, wide.high)


@pytest.mark.parametrize("bad, word", [(np.nan, "1 NaN"), (np.inf, "1 inf"), (-np.inf, "1 inf")])
@pytest.mark.parametrize("names", ["amax", "histogram", "channel_amax:-1"])
def test_nan_and_infinity_stop_before_anything_changes(names: str, bad: float, word: str) -> None:
    (statistic,) = make(names).values()
    statistic.update(np.ones((2, 3), np.float32))
    before = statistic.arrays()
    with pytest.raises(NotFiniteError, match=word):
        statistic.update(np.array([[1.0, bad, 2.0]], np.float32))
    after = statistic.arrays()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_nothing_seen_is_zero_and_empty_arrays_change_nothing() -> None:
    histogram = Histogram()
    histogram.update(np.empty((0, 4), np.float32))
    assert histogram.amax == 0.0
    assert histogram.bins.counts.sum() == 0


def test_names_are_checked() -> None:
    assert list(make("histogram+channel_amax:1")) == ["histogram", "channel_amax:1"]
    for name in ("median", "channel_amax:x", ""):
        with pytest.raises(OnnxqError, match="no statistic"):
            make(name)


def test_what_has_no_range_is_refused() -> None:
    with pytest.raises(OnnxqError, match="int64"):
        Amax().update(np.ones(3, np.int64))
    with pytest.raises(OnnxqError, match="axis 2"):
        ChannelAmax(2).update(np.ones((2, 2), np.float32))
    channels = ChannelAmax(-1)
    channels.update(np.ones((2, 3), np.float32))
    with pytest.raises(OnnxqError, match="4 channels here and 3 before"):
        channels.update(np.ones((2, 4), np.float32))
