"""Ranges by denoising step: against sums done by hand, in any order, saved and merged."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from onnxq.calibrate.statistics import make
from onnxq.calibrate.steps import NO_STEP, StepAmax, denoising_step
from onnxq.calibrate.table import CalibrationTable, DataOrigin, load_table
from onnxq.errors import OnnxqError

# Step -> the samples' largest magnitudes. Means 5, 3 and 4; the first of them in time is 900.
SEEN = {900.0: [2.0, 8.0], 500.0: [3.0], 100.0: [4.0, 1.0, 7.0]}


def collected(order: list[tuple[float, float]]) -> StepAmax:
    statistic = StepAmax()
    for step, amax in order:
        statistic.now = step
        statistic.update(np.array([0.5, -amax, amax / 2], np.float32))
    return statistic


ALL = [(step, amax) for step, found in SEEN.items() for amax in found]


@pytest.mark.parametrize("order", list(permutations(ALL))[::131])
def test_any_order(order: list[tuple[float, float]]) -> None:
    found = collected(order)
    assert found.steps == (900.0, 500.0, 100.0)
    assert found.means() == [5.0, 3.0, 4.0]
    assert found.peaks() == [8.0, 3.0, 7.0]
    assert (found.low, found.high, found.amax) == (-8.0, 4.0, 8.0)


@pytest.mark.parametrize(
    ("percent", "smallest"), [(100, 3.0), (67, 3.0), (66, 5.0), (34, 5.0), (1, 5.0)]
)
def test_the_smallest_mean_of_the_first_steps(percent: float, smallest: float) -> None:
    assert collected(ALL).smallest_mean(percent) == smallest


def test_nothing_seen() -> None:
    assert StepAmax().smallest_mean() == 0.0 and StepAmax().steps == ()


def table(statistic: StepAmax) -> CalibrationTable:
    return CalibrationTable("f", {"x": {"steps": statistic}}, (DataOrigin("d", "0", 1),))


def test_saved_merged_and_asked_for(tmp_path: Path) -> None:
    table(collected(ALL[:3])).save(tmp_path / "a.npz")
    table(collected(ALL[3:])).save(tmp_path / "b.npz")
    both = load_table(tmp_path / "a.npz").merge(load_table(tmp_path / "b.npz"))
    assert both.range("x", "steps") == 3.0
    assert both.range("x", "steps:66") == 5.0
    assert both.range("x", "max") == 8.0 and both.peaks() == {"x": 8.0}
    assert both.digest == table(collected(ALL)).digest
    both.require("f", {"x": "amax"})
    assert both.by_step("x").peaks() == [8.0, 3.0, 7.0]
    plain = CalibrationTable("f", {"x": make("amax")}, both.data)
    with pytest.raises(OnnxqError, match="by denoising step"):
        plain.range("x", "steps")


def test_the_step_of_a_sample() -> None:
    assert denoising_step({"x": np.zeros(2), "timestep": np.array([7, 7])}) == 7.0
    assert denoising_step({"timesteps": np.array(3.5, np.float16)}) == 3.5
    assert denoising_step({"x": np.zeros(2)}) == NO_STEP
    with pytest.raises(OnnxqError, match="sample 4 has rows of 2 denoising steps"):
        denoising_step({"timestep": np.array([7, 9])}, "sample 4")
