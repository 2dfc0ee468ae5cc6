"""Calibration tables: saved, loaded, merged, and refused where they do not belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibrate.statistics import make
from onnxq.calibrate.table import CalibrationTable, DataOrigin, load_table
from onnxq.errors import OnnxqError

NAMES = "histogram+channel_amax:-1"


def table(seed: int = 0, fingerprint: str = "model-a", names: str = NAMES) -> CalibrationTable:
    rng = np.random.default_rng(seed)
    statistics = {name: make(names) for name in ("b/tensor:0", "a")}
    for of_tensor in statistics.values():
        values = (rng.standard_normal((30, 8)) * 10.0 ** rng.integers(-2, 3)).astype(np.float32)
        for statistic in of_tensor.values():
            statistic.update(values)
    return CalibrationTable(
        fingerprint, statistics, (DataOrigin(f"data {seed}", f"digest{seed}", 30),), notes=("n",)
    )


def test_a_saved_table_is_the_same_table_and_the_same_bytes(tmp_path: Path) -> None:
    made = table()
    made.save(tmp_path / "a.npz")
    made.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = load_table(tmp_path / "a.npz", "model-a")
    assert found.digest == made.digest
    assert (found.data, found.notes, found.version) == (made.data, made.notes, made.version)
    for tensor in ("a", "b/tensor:0"):
        for method in ("max", "percentile", "entropy", "mse"):
            assert found.range(tensor, method) == made.range(tensor, method)
        assert found.extremes(tensor) == made.extremes(tensor)
        assert np.array_equal(found.channels(tensor), made.channels(tensor))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_merging_is_calibrating_on_all_the_data_in_any_order(tmp_path: Path) -> None:
    tables = [table(seed) for seed in range(3)]
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    merged = [tables[a].merge(tables[b]).merge(tables[c]) for a, b, c in orders]
    assert len({t.digest for t in merged}) == 1
    assert len({t.data for t in merged}) == 1
    assert merged[0].samples == 90
    assert merged[0].range("a") == max(t.range("a") for t in tables)
    assert tables[0].digest == table(0).digest  # what was merged did not change
    counts = merged[0].of("a")["histogram"].arrays()["counts"]
    assert counts.sum() == 3 * 30 * 8


def test_tables_of_two_models_are_not_merged_and_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="model-a and model-b"):
        table().merge(table(1, "model-b"))
    table().save(tmp_path / "t.npz")
    with pytest.raises(OnnxqError, match=r"another model .*model-a.*model-b"):
        load_table(tmp_path / "t.npz", "model-b")


def test_tables_of_two_recipes_are_not_merged() -> None:
    with pytest.raises(OnnxqError, match=r"only one of the two .* channel_amax:-1 of 'a'"):
        table().merge(table(1, names="histogram"))


def test_shared_data_is_said() -> None:
    assert any("counts twice" in note for note in table(0).merge(table(0)).notes)
    assert not any("counts twice" in note for note in table(0).merge(table(1)).notes)


def test_what_is_not_there_is_said() -> None:
    plain = table(names="amax")
    assert plain.range("a") == plain.range("a", "max") > 0
    for ask, message in [
        (lambda: plain.range("a", "entropy"), "no histogram, which 'entropy' needs"),
        (lambda: plain.range("z"), "nothing on 'z'"),
        (lambda: plain.channels("a"), "channels of 'a' along axis -1"),
        (lambda: plain.require("model-a", {"a": "histogram"}), "lacks the histogram of 'a'"),
        (lambda: plain.require("model-a", {"z": "amax"}), "nothing on 'z'"),
        (lambda: plain.require("model-b"), "another model"),
    ]:
        with pytest.raises(OnnxqError, match=message):
            ask()
    table().require("model-a", {"a": "amax"})  # a histogram has the extremes too


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    table().save(path)
    whole = path.read_bytes()
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    other = (tmp_path / "other.npz").read_bytes()
    np.savez(tmp_path / "pickled.npz", table=np.array([{}], object))
    pickled = (tmp_path / "pickled.npz").read_bytes()
    for content in (b"", b"junk", whole[:200], whole[:-40], other, pickled):
        path.write_bytes(content)
        with pytest.raises(OnnxqError, match="cannot be read as a calibration table") as error:
            load_table(path)
        assert "\n" not in str(error.value)
    with pytest.raises(OnnxqError, match="cannot read"):
        load_table(tmp_path / "missing.npz")
    with pytest.raises(OnnxqError, match="cannot write"):
        table().save(tmp_path / "no" / "folder.npz")
