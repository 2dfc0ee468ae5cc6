"""The yardstick on a real model; `python -m models.smollm2` and `models.wiki` build it."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.evaluate.perplexity import perplexity

OUT = Path(__file__).parents[2] / "models" / "out"
MODEL, TEXT = OUT / "smollm2-fp32" / "model.onnx", OUT / "wiki" / "wiki_eval.txt"


@pytest.mark.skipif(not (MODEL.exists() and TEXT.exists()), reason="SmolLM2 is not built")
def test_full_precision_over_three_windows() -> None:
    found = perplexity(MODEL, TEXT, MODEL.with_name("tokenizer.json"), limit=3)
    assert found.tokens == 3 * 511
    # 20.02187 with and without ONNX Runtime's optimizations, which move it by 1e-6.
    assert found.value == pytest.approx(20.02187, abs=1e-4)
