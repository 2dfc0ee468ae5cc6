"""Ranges by the error of what layers make of their input: the search, and what it is tried with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net, run, snr

import onnxq
from onnxq.algorithms.smoothquant import Trial
from onnxq.clipping import candidates
from onnxq.formats import quant_format
from onnxq.recipe import load
from onnxq.smoothing import input_rounding

RNG = np.random.default_rng(0)


def _nearest(rows: Any, step: Any) -> Any:
    """INT8 and back, of codes from -127 to 127."""
    return np.clip(np.rint(rows / step), -127, 127) * step


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows that each stand for 10, and a loud one that stands for itself."""
    rows = RNG.standard_normal((64, 16)).astype(np.float32)
    rows[7] *= 50
    counts = np.full(64, 10.0)
    counts[7] = 1
    return rows, counts


def _trial(rows: np.ndarray, counts: np.ndarray, peaks: np.ndarray | None = None) -> Trial:
    """Judged by the rows that may be looked at."""
    return Trial(rows, counts, np.abs(rows).max(0) if peaks is None else peaks, rows, counts)


def test_dynamic_scales_are_each_rows_own() -> None:
    rows, counts = _rows()
    quantized = input_rounding(load("int8-smoothquant-dynamic"))
    (found,) = quantized(_trial(rows, counts), np.ones(16))
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(found, _nearest(rows, step), atol=1e-5 * 50)


def test_the_calibrator_max_knows_peaks_that_no_row_has() -> None:
    rows, counts = _rows()
    peaks, s = np.abs(rows).max(0) * 3, np.linspace(0.5, 2, 16)
    chosen = replace(load("int8-smoothquant"), calibrator="max", center=False)
    (found,) = input_rounding(chosen)(_trial(rows, counts, peaks), s)
    step = np.float32((peaks / s).max() / 127)
    np.testing.assert_allclose(found, _nearest((rows / s).astype(np.float32), step), atol=1e-4)


def test_the_calibrator_output_is_tried_from_the_loudest_row_to_the_ordinary_ones() -> None:
    rows, counts = _rows()
    chosen = replace(load("int8-smoothquant"), calibrator="output", center=False)
    found = input_rounding(chosen)(_trial(rows, counts), np.ones(16))
    whole, usual = np.abs(rows).max(), np.abs(np.delete(rows, 7, 0)).max()
    for got, top in zip(found, (whole, np.sqrt(whole * usual), usual), strict=True):
        np.testing.assert_allclose(got, _nearest(rows, top / 127), atol=1e-4)


def test_histograms_count_what_rows_stand_for() -> None:
    """At 99 % the loud row, one of 631, is clipped; if all rows were alike it would not be."""
    rows, counts = _rows()
    chosen = replace(load("int8-smoothquant"), calibrator="percentile:99", center=False)
    (found,) = input_rounding(chosen)(_trial(rows, counts), np.ones(16))
    peaks = np.abs(rows).max(0, keepdims=True)  # counted once more
    every = np.concatenate([np.repeat(np.abs(rows), counts.astype(int), axis=0), peaks])
    top = np.quantile(every, 0.99, method="inverted_cdf")
    assert np.abs(found).max() == pytest.approx(top, rel=0.02)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 8.0), (-8.0, 1.0), (-8.0, 8.0)])
def test_candidates_reach_from_the_whole_range_down(low: float, high: float) -> None:
    fmt = quant_format("int8")
    plain = candidates(low, high, fmt, False)
    assert {offset for offset, _ in plain} == {0}
    assert max(reach for _, reach in plain) == 8.0
    assert min(reach for _, reach in plain) == 8.0 / 256
    other = [each for each in candidates(low, high, fmt, True) if each[0]]
    assert bool(other) == (low != -high)
    for offset, reach in other:
        middle, step = offset * reach / 127, reach / 127
        assert np.sign(middle) == np.sign(low + high)
        shorter = -low if middle > 0 else high
        assert abs(middle) - reach <= -shorter + step  # covered, to a step
    if other:
        widest = max(reach + abs(offset) * reach / 127 for offset, reach in other)
        assert widest == pytest.approx(8.0, abs=0.1)
    assert candidates(low, high, quant_format("fp8"), True) == candidates(
        low, high, quant_format("fp8"), False
    )


def test_values_to_one_side_get_a_middle_of_their_own(tmp_path: Path) -> None:
    """Of values from 10 to 11 half of the codes stand for nothing: a bit, 6 dB."""
    net = Net()
    h = net.op("Add", net.op("Sigmoid", net.input("x", ["batch", 8, 32])), net.const("ten", 10.0))
    exact = np.vstack([np.full((1, 32), 127), RNG.integers(-127, 128, (31, 32))]) / 127
    net.output(net.op("MatMul", h, net.const("w", exact.astype(np.float32)), name="/a"))
    source = net.save(tmp_path / "net.onnx")
    calib, held = RNG.standard_normal((2, 16, 8, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=calib)
    wanted, found = run(onnx.load(source), {"x": held})[0], {}
    for center in (False, True):
        chosen = replace(load("int8"), calibrator="output", center=center)
        made = tmp_path / "m.onnx"
        onnxq.quantize(source, made, recipe=chosen, calib=tmp_path / "x.npz", precision="keep")
        found[center] = snr(wanted, run(onnx.load(made), {"x": held})[0])
    assert found[True] > found[False] + 5
