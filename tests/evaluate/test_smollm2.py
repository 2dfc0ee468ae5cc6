"""The yardstick on a real model; built by `python -m models.smollm2` and `python -m models.wiki`."""

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
    # torch gives 20.022; kernels of other CPUs sum in another order, which moves FP32 logits by
    # about 1e-5 and the perplexity by less than half of its last printed digit.
    assert found.value == pytest.approx(20.022, abs=1e-3)
