"""The Gram statistic: products of all pairs of channels, summed over every row seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calib_models import chain, maker

from onnxq.calibrate.data import open_samples
from onnxq.calibrate.run import calibrate
from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.statistics import Gram, NotFiniteError, make
from onnxq.calibrate.table import CalibrationTable, load_table
from onnxq.errors import OnnxqError


def _batches(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 7, 12), (1, 3, 12))]


def _expected(batches: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate([b.reshape(-1, 12) for b in batches]).astype(np.float64)
    return rows.T @ rows / len(rows)


def _fed(batches: list[np.ndarray]) -> Gram:
    gram = Gram()
    for batch in batches:
        gram.update(batch)
    return gram


# float32 sums of 17 products of numbers near 1: relative to the diagonal, 17 x 2^-24 x 4.
TOLERANCE = 5e-6


@pytest.mark.parametrize("parked", [False, True])
def test_it_is_the_mean_outer_product(parked: bool) -> None:
    gram = Gram()
    for batch in _batches():
        gram.update(batch)
        if parked:
            gram.park()
    np.testing.assert_allclose(gram.matrix, _expected(_batches()), atol=TOLERANCE)
    assert gram.count == 17


def test_narrow_types_are_widened() -> None:
    halves = [b.astype(np.float16) for b in _batches()]
    np.testing.assert_allclose(_fed(halves).matrix, _expected(halves), atol=TOLERANCE)


def test_merged_is_as_if_seen_together() -> None:
    first, second = (_fed([b]) for b in _batches())
    second.park()
    first.merge(second)
    first.merge(Gram())
    np.testing.assert_allclose(first.matrix, _expected(_batches()), atol=TOLERANCE)
    empty = Gram()
    empty.merge(first)
    np.testing.assert_array_equal(empty.matrix, first.matrix)


def test_a_value_that_is_not_finite_changes_nothing() -> None:
    gram = _fed(_batches())
    before = gram.matrix
    bad = _batches()[0]
    bad[0, 0, 0] = np.nan
    with pytest.raises(NotFiniteError, match="1 NaN"):
        gram.update(bad)
    np.testing.assert_array_equal(gram.matrix, before)


def test_values_whose_squares_overflow_are_finite() -> None:
    gram = Gram()
    gram.update(np.array([[2e19, 1.0]], np.float32))
    assert gram.matrix[1, 1] == 1.0


def test_channels_must_not_change() -> None:
    gram = _fed(_batches())
    with pytest.raises(OnnxqError, match="5 channels here and 12 before"):
        gram.update(np.zeros((2, 5), np.float32))


def test_a_table_keeps_it(tmp_path: Path) -> None:
    statistics = make("amax+gram")
    for statistic in statistics.values():
        for batch in _batches():
            statistic.update(batch)
    CalibrationTable("f", {"x": statistics}, ()).save(tmp_path / "t.npz")
    loaded = load_table(tmp_path / "t.npz", "f")
    np.testing.assert_array_equal(loaded.gram("x"), statistics["gram"].matrix)  # type: ignore[attr-defined]
    loaded.require("f", {"x": "amax+gram"})
    with pytest.raises(OnnxqError, match="histogram of 'x'"):
        loaded.require("f", {"x": "histogram"})
    plain = CalibrationTable("f", {"x": make("amax")}, ())
    with pytest.raises(OnnxqError, match="Gram matrix of 'x'"):
        plain.gram("x")
    with pytest.raises(OnnxqError, match="empty throughout"):
        CalibrationTable("f", {"x": make("gram")}, ()).gram("x")


def test_gram_matrices_count_as_memory_and_are_the_same_in_several_passes(tmp_path: Path) -> None:
    """8 channels: 256 bytes of sums beside the values of 4 rows, 128 bytes."""
    make_model, asked = maker(chain(), tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    data = open_samples(tmp_path / "data.npz", [InputSpec("x", np.dtype(np.float32), (None, 4, 8))])
    watched = dict.fromkeys(("h0", "h1", "a1"), "gram")
    whole = calibrate(make_model, watched, data, memory=1152)
    assert [a for a in asked if len(a) == 3]
    del asked[:]
    split = calibrate(make_model, watched, data, memory=1151)
    assert ["h0", "h1"] in asked
    assert ["a1"] in asked
    for name in watched:
        np.testing.assert_array_equal(split.gram(name), whole.gram(name))


@pytest.mark.parametrize(
    ("gram", "said"),
    [
        (np.ones((3, 4), np.float32), "of shape"),
        (np.ones(4, np.float32), "of shape"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
    ],
)
def test_a_table_that_holds_something_else_is_refused(
    gram: np.ndarray, said: str, tmp_path: Path
) -> None:
    found = make("gram")
    found["gram"].update(np.ones((2, 4), np.float32))
    CalibrationTable("f", {"x": found}, ()).save(tmp_path / "t.npz")
    arrays = dict(np.load(tmp_path / "t.npz"))
    np.savez(tmp_path / "t.npz", **{**arrays, "0.gram.gram": gram})
    with pytest.raises(OnnxqError, match=said):
        load_table(tmp_path / "t.npz")
