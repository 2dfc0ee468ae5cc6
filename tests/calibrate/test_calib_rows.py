"""The rows that are kept of what a layer reads: the loudest, and a draw of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibrate.rows import DRAWN, LOUD, Rows
from onnxq.calibrate.statistics import NotFiniteError, make
from onnxq.calibrate.table import CalibrationTable, load_table
from onnxq.errors import OnnxqError

ROWS = np.random.default_rng(0).standard_normal((5000, 8)).astype(np.float32)


def _fed(*batches: np.ndarray) -> Rows:
    rows = Rows()
    for batch in batches:
        rows.update(batch)
    return rows


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


def test_few_rows_are_all_kept() -> None:
    kept, counts = _fed(ROWS[:100].reshape(10, 10, 8)).sample
    np.testing.assert_array_equal(_sorted(kept), _sorted(ROWS[:100]))
    assert (counts == 1).all()


def test_the_loudest_are_kept_and_the_rest_are_drawn_evenly() -> None:
    kept, counts = _fed(ROWS).sample
    loudness = np.sort(np.abs(ROWS).max(1))
    np.testing.assert_array_equal(np.sort(np.abs(kept[:LOUD]).max(1)), loudness[-LOUD:])
    assert len(kept) == LOUD + DRAWN and (counts[:LOUD] == 1).all()
    assert counts.sum() == pytest.approx(5000)
    # 192 of 4936: the mean square of each channel has a standard error of sqrt(2 / 192) = 10 %.
    power = (counts[:, None] * kept.astype(np.float64) ** 2).sum(0) / 5000
    assert (np.abs(power / (ROWS.astype(np.float64) ** 2).mean(0) - 1) < 0.4).all()


def test_the_order_and_the_split_of_the_data_do_not_matter() -> None:
    wanted, counts = _fed(ROWS).sample
    pieces = [_fed(ROWS[3000:], ROWS[1000:3000]), _fed(ROWS[:1000])]
    pieces[0].merge(pieces[1])
    pieces[0].merge(Rows())
    found, others = pieces[0].sample
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(others, counts)


def test_halves_keep_their_peaks_whatever_the_order() -> None:
    """Each row is of the half that it is of alone."""
    whole = _fed(ROWS)
    sides, peaks = whole.halves
    assert 80 < sides.sum() < 176  # of 256: 4 standard deviations of 8 and more
    alone = np.array([_fed(row[None]).halves[0][0] for row in ROWS])
    for side in (False, True):
        np.testing.assert_array_equal(peaks[int(side)], np.abs(ROWS[alone == side]).max(0))
    for row, side in zip(whole.sample[0][::32], sides[::32], strict=True):
        assert _fed(row[None]).halves[0][0] == side
    pieces = [_fed(ROWS[3000:], ROWS[1000:3000]), _fed(ROWS[:1000])]
    pieces[0].merge(pieces[1])
    for found in (pieces[0].halves, whole.divided(np.ones(8)).halves):
        for one, other in zip(found, (sides, peaks), strict=True):
            np.testing.assert_array_equal(one, other)


def test_saved_and_loaded(tmp_path: Path) -> None:
    table = CalibrationTable("f", {"x": {"rows": _fed(ROWS)}, "y": make("rows")}, ())
    table.save(tmp_path / "t.npz")
    loaded = load_table(tmp_path / "t.npz")
    for one, other in zip(table.rows("x"), loaded.rows("x"), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(table.halves("x"), loaded.halves("x"), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(OnnxqError, match="empty throughout"):
        loaded.rows("y")
    with pytest.raises(OnnxqError, match="empty throughout"):
        loaded.halves("y")
    with pytest.raises(OnnxqError, match="nothing on 'z'"):
        loaded.rows("z")


def test_divided_rows_are_those_of_the_divided_data() -> None:
    s = np.array([2.0, 4, 0.5, 1, 8, 1, 2, 1])
    kept, _ = _fed(ROWS).divided(s).sample
    peaks = _fed(ROWS).divided(s).halves[1]
    np.testing.assert_array_equal(peaks, _fed(ROWS).halves[1] / s.astype(np.float32))
    np.testing.assert_array_equal(kept, _fed(ROWS).sample[0] / s.astype(np.float32))


def test_what_cannot_be_kept() -> None:
    rows = _fed(ROWS)
    with pytest.raises(OnnxqError, match="7 channels here and 8 before"):
        rows.update(ROWS[:, :7])
    with pytest.raises(NotFiniteError):
        rows.update(np.full((1, 8), np.nan, np.float32))
    rows.update(np.zeros((0, 8), np.float32))
    assert rows.seen == 5000
