"""A table that is made up serves its recipe; quantizing is told beside the copy."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from core_graphs import initializer

import onnxq
from tools.bench.child import Usage
from tools.from_table import Round, lines, made_up, rounds


@pytest.mark.parametrize("recipe", ["sdxl-int8", "sdxl-fp8"])
def test_a_table_that_is_made_up_serves_its_recipe(
    recipe: str, models: Path, tmp_path: Path
) -> None:
    source, table = models / "sdxl-unet-tiny-fp16/model.onnx", tmp_path / "t.npz"
    made_up(source, recipe, table)
    done = onnxq.quantize(source, tmp_path / "m.onnx", recipe=recipe, load_calib=[table])
    assert done.report.facts["sites"]["linear"]["quantized"] == 181
    assert done.report.facts["sites"]["conv"]["quantized"] == 38
    folded = [e for e in done.report.edits if e.step == "smoothquant" and e.verb == "fold"]
    assert len(folded) == (113 if recipe == "sdxl-int8" else 0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    scales = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    found = {float(initializer(model, name)) for name in scales}
    assert len(found) > len(scales) / 2  # each tensor's numbers are its own


def test_a_round_copies_and_quantizes(models: Path, tmp_path: Path) -> None:
    source, table = models / "sdxl-unet-tiny-fp16/model.onnx", tmp_path / "t.npz"
    made_up(source, "sdxl-fp8", table)
    (found,) = rounds(source, "sdxl-fp8", table, 1)
    assert found.copy.code == found.ours.code == 0
    assert found.ratio == found.ours.wall / found.copy.wall


def test_what_is_printed() -> None:
    made = [
        Round(Usage(2.0, 1.0, 0, 0, ""), Usage(wall, wall + 1, peak, 0, ""))
        for wall, peak in ((8.0, 300_000_000), (30.0, 400_000_000), (9.0, 350_000_000))
    ]
    assert lines("fp8", made) == [
        "fp8: 4.5 x copying the file, 10.0 CPU seconds, 400 MB",
        "  seconds of each round, quantizing / copying: 8.0 / 2.0, 30.0 / 2.0, 9.0 / 2.0",
    ]
