"""Accuracy on data the calibration never saw, against the bars the project set itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnxq
from onnxq.evaluate.perplexity import perplexity
from tools.bench.models import wordsim


@pytest.mark.parametrize(
    ("recipe", "snr", "cosine"),
    [("int8", 11.0, 0.96), ("fp8", 20.0, 0.995), ("int8-dynamic", 21.0, 0.995)],
)
def test_minilm(recipe: str, snr: float, cosine: float, models: Path, tmp_path: Path) -> None:
    source = models / "minilm"
    made = tmp_path / "model.onnx"
    calib = None if "dynamic" in recipe else source / "calib.npz"
    onnxq.quantize(source / "model.onnx", made, recipe=recipe, calib=calib)
    found = onnxq.compare(
        source / "model.onnx",
        made,
        data=source / "heldout.npz",
        min_snr=snr,
        min_cosine=cosine,
        fp16=False,
    )
    assert found.passed, found.as_dict()


def test_minilm_fp8_keeps_its_task(models: Path, tmp_path: Path) -> None:
    source = models / "minilm"
    onnxq.quantize(source / "model.onnx", tmp_path / "m.onnx", calib=source / "calib.npz")
    assert wordsim(tmp_path / "m.onnx") >= 0.724


@pytest.mark.parametrize(("recipe", "bar"), [("int8-dynamic", 1.04), ("fp8-dynamic", 1.02)])
def test_smollm2_without_data(recipe: str, bar: float, models: Path, tmp_path: Path) -> None:
    """Four windows here; `make bench` takes sixteen. FP8 with calibration is the demo's."""
    source = models / "smollm2-fp32"
    made = onnxq.quantize(source / "model.onnx", tmp_path / "m.onnx", recipe=recipe).files[0]
    found = perplexity(
        made,
        models / "wiki/wiki_eval.txt",
        source / "tokenizer.json",
        limit=4,
        reference=source / "model.onnx",
    )
    assert found.ratio is not None and found.ratio <= bar
