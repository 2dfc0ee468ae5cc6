from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.evaluate.metrics import DiscreteError, FloatError, OutputError

FLOATS = st.floats(-1e6, 1e6, width=32)
PAIRS = hnp.array_shapes(min_dims=1, max_dims=3, max_side=6).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=FLOATS),
        hnp.arrays(np.float32, shape, elements=FLOATS),
    )
)


def error_of(reference: np.ndarray, candidate: np.ndarray) -> FloatError:
    error = FloatError()
    error.add(np.asarray(reference), np.asarray(candidate))
    return error


@given(PAIRS)
def test_equals_the_definitions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, candidate = (array.astype(np.float64) for array in pair)
    found = error_of(*pair)
    difference = reference - candidate
    # The sums hold at most 216 terms: their rounding is below 216 * 2**-53 = 2.4e-14 relative.
    assert found.mean_error == pytest.approx(np.abs(difference).mean(), rel=1e-12)
    assert found.max_error == np.abs(difference).max()
    signal, noise = (reference**2).sum(), (difference**2).sum()
    if noise == 0:
        assert found.snr == math.inf and found.cosine == 1.0 and found.relative == 0.0
    elif signal == 0:
        assert found.snr == -math.inf and found.cosine == 0.0
    else:
        assert found.snr == pytest.approx(10 * np.log10(signal / noise), abs=1e-9)
        assert found.relative == pytest.approx(np.sqrt(noise / signal), rel=1e-12)
        lengths = np.linalg.norm(reference) * np.linalg.norm(candidate)
        expected = (reference * candidate).sum() / lengths if lengths else 0.0
        # Cancellation in the product is relative to the lengths, so the tolerance is absolute.
        assert found.cosine == pytest.approx(expected, abs=1e-12)


@given(PAIRS, st.integers(0, 5))
def test_samples_add_up_to_the_whole(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    whole, parts = error_of(*pair), FloatError()
    for piece in (slice(None, cut), slice(cut, None)):
        parts.merge(error_of(pair[0][piece], pair[1][piece]))
    assert parts.elements == whole.elements and parts.max_error == whole.max_error
    assert parts.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
    assert parts.product == pytest.approx(whole.product, rel=1e-12, abs=1e-12 * 216 * 1e12)


def test_ten_percent_more_everywhere_is_20_db() -> None:
    reference = np.ones(1000)
    assert error_of(reference, 1.1 * reference).snr == pytest.approx(20.0, abs=1e-9)
    assert error_of(reference, -reference).cosine == -1.0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_small_dtypes_neither_overflow_nor_round_the_sums(dtype: type) -> None:
    # 40000 elements of 240: squares of 57600 and their sum overflow float16 and float8, and from
    # 2**11 * 57600 on a float16 or bfloat16 sum would no longer grow.
    reference = np.full(40000, 240, dtype)
    candidate = np.full(40000, 224, dtype)
    found = error_of(reference, candidate)
    assert found.squared_reference == 40000 * 240.0**2
    assert found.snr == pytest.approx(10 * math.log10((240 / 16) ** 2), abs=1e-9)


def test_more_elements_than_a_piece() -> None:
    reference = np.ones((1 << 20) + 3, np.float32)
    candidate = reference.copy()
    candidate[-1], candidate[-2] = 3.0, np.nan
    found = error_of(reference, candidate)
    assert (found.elements, found.broken, found.max_error) == (reference.size, 1, 2.0)


def test_nan_and_inf_are_counted_and_leave_no_figure() -> None:
    reference = np.array([1.0, 2.0, np.inf, np.nan, -np.inf, 3.0], np.float32)
    assert error_of(reference, reference).snr == math.inf
    agreeing = error_of(reference, np.where(np.isfinite(reference), 1.1 * reference, reference))
    assert agreeing.snr == pytest.approx(20.0, abs=1e-5)  # 1.1 and 10 % in FP32
    candidate = np.array([np.nan, 2.0, np.inf, np.nan, np.inf, np.inf], np.float32)
    found = error_of(reference, candidate)
    assert found.broken == 3
    assert found.snr is found.cosine is found.mean_error is found.relative is None
    assert found.as_dict()["nan_or_inf"] == 3


def test_a_difference_too_small_to_square_is_not_exact() -> None:
    found = error_of(np.ones(3), np.ones(3) + np.array([0, 0, 2.3e-16]))
    assert found.snr is not None and 300 < found.snr < math.inf
    tiny = error_of(np.array([1e-200]), np.array([2e-200]))
    assert tiny.snr is not None and tiny.snr < math.inf


def test_huge_float64_do_not_end_in_nan() -> None:
    found = error_of(np.array([1e200, 1.0]), np.array([2e200, 1.0]))
    assert found.snr == -math.inf and found.cosine is not None and not math.isnan(found.cosine)


def test_discrete_outputs_count_equal_elements() -> None:
    error = DiscreteError()
    error.add(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4]))
    error.add(np.array([True, False]), np.array([True, True]))
    assert error.share == 4 / 6


@pytest.mark.parametrize("kind", [FloatError, DiscreteError])
def test_shapes_must_agree_even_where_numpy_would_broadcast(kind: type) -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        kind().add(np.ones((2, 3)), np.ones((1, 3)))


def test_the_worst_sample_is_found() -> None:
    found = OutputError()
    for scale in (1.01, 1.1, 1.001):
        found.add(np.ones(5), np.full(5, scale))
    assert found.worst_sample == 1 and found.worst_snr == pytest.approx(20.0)
    found.add(np.ones(5), np.full(5, np.nan))
    found.add(np.ones(5), np.full(5, 9.0))
    assert found.worst_sample == 3 and found.worst_snr is None


def test_a_float_against_integers_is_measured_as_float() -> None:
    found = OutputError()
    found.add(np.array([1, 2]), np.array([1.0, 2.5]))
    assert isinstance(found.error, FloatError) and found.error.max_error == 0.5


def test_the_report_is_valid_json() -> None:
    found = OutputError()
    found.add(np.ones(2), np.ones(2))
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text)["snr_db"] == "inf"


@pytest.mark.parametrize("masked", [-65504.0, -60000.0, -np.inf])
def test_a_mask_agrees_however_it_is_written(masked: float) -> None:
    reference = np.array([np.finfo(np.float32).min, 1.0, 2.0], np.float32)
    candidate = np.array([masked, 1.0, 2.2], np.float16)
    found = error_of(reference, candidate)
    assert (found.masked, found.broken, found.elements) == (1, 0, 3)
    assert found.mean_error == pytest.approx(0.19921875 / 2, rel=1e-12)
    with_nan = error_of(np.append(reference, np.nan), np.append(candidate, np.float16(1)))
    assert (with_nan.masked, with_nan.broken) == (1, 1)
    # Only 1 and 2.2 against 1 and 2 count: 2.2 in float16 is 2.19921875.
    assert found.noise == pytest.approx(0.19921875**2 / 5, rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "candidate"), [(-3.4e38, 0.0), (-3.4e38, -20000.0), (-1.0, -np.inf)]
)
def test_a_mask_on_one_side_only_does_not_agree(reference: float, candidate: float) -> None:
    found = error_of(np.float32([reference, 1]), np.float16([candidate, 1]))
    assert found.masked == 0 and (found.broken or (found.snr is not None and found.snr <= 0.01))


def test_large_negative_values_that_are_no_mask_count() -> None:
    found = error_of(np.float32([-40000.0, 1.0]), np.float32([-44000.0, 1.0]))
    assert found.masked == 0 and found.snr == pytest.approx(20.0, abs=1e-6)


def test_an_empty_output_is_exact() -> None:
    assert error_of(np.empty((0, 4)), np.empty((0, 4))).snr == math.inf
