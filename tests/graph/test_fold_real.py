"""Real models, the inputs of their layers divided by random factors: they compute what they did."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import graph_models as g
import numpy as np
import pytest

from onnxq.base import convert_base
from onnxq.graph.edit import Editor
from onnxq.graph.fold import Fold, find_fold
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.sites import find_sites


@dataclass
class Found:
    """The inputs that layers of a model read, each with its fold or the reason for none."""

    model: Model
    inputs: dict[str, Fold | str]

    @property
    def folds(self) -> list[Fold]:
        return [f for f in self.inputs.values() if isinstance(f, Fold)]


def find(name: str, without: str = "") -> Found:
    model = prepare(Model.load(g.real_model(name)), 0)[0]
    readers: dict[str, list[object]] = {}
    for site in find_sites(model):
        if site.kind == "linear" and site.operand and not (without and without in site.node.name):
            readers.setdefault(site.node.inputs[0].name, []).append(site.node)
    tensors = model.graph.tensors()
    return Found(model, {t: find_fold(model, tensors[t], n) for t, n in readers.items()})


def words(text: str) -> str:
    """Without names, and lists of names."""
    text = re.sub(r"'[^']*'", "*", text)
    return re.sub(r"[^ ,]+ (and [^ ,]+ )?of", "* of", text) if text.startswith("into") else text


SMOLLM2 = {"into * of Mul *": 61, "into * of MatMul *, heads share": 30, "into * of MatMul *": 30}
REASONS: dict[str, dict[str, int]] = {
    "smollm2-fp32": SMOLLM2,
    "smollm2-torch": SMOLLM2,
    "smollm2-torch-fp16": SMOLLM2,
    # The cache leaves the model: v_proj must give what it gave.
    "smollm2-torch-decode": {
        "into * of Mul *": 61,
        "* is an output of the model": 30,
        "into * of MatMul *": 30,
    },
    "minilm": {
        "* is read by Add * too": 12,
        "into * of Add *, * of MatMul *": 6,
        "Gelu * passes no factor on": 6,
    },
    # Its Gelu ends in a Mul by 0.5, which becomes a vector.
    "minilm-legacy": {
        "* is read by Add * too": 12,
        "into * of Add *, * of MatMul *": 6,
        "into * of Mul *": 6,
    },
    "sdxl-unet-tiny-fp16": {
        "into * of LayerNormalization *": 51,
        "into * of MatMul *": 34,
        "into * of Add *, * of MatMul *": 17,
        "into * of GroupNormalization *": 11,
        "* is read by LayerNormalization * too": 11,
        "* is read by Sigmoid * too; Sigmoid * passes no factor on": 3,
        "* is an input of the model": 2,
        "Cos * passes no factor on": 1,
    },
}


@pytest.mark.parametrize("name", REASONS)
def test_how_many_fold_and_why_others_do_not(name: str) -> None:
    found = find(name)
    said = Counter(
        words(f)
        if isinstance(f, str)
        else words(f.reason) + (", heads share" if f.tie is not None else "")
        for f in found.inputs.values()
    )
    assert said == REASONS[name]


@pytest.mark.parametrize("name", ["smollm2-fp32", "smollm2-torch", "minilm", "minilm-legacy"])
def test_powers_of_two_change_no_bit(tmp_path: Path, name: str) -> None:
    """FP32: exponents change, digits do not.

    Left out is lm_head, whose transposed copy ONNX Runtime multiplies by another kernel, in
    another order, than the Transpose of the embedding it has in the original.
    """
    head = {"smollm2-fp32": "lm_head", "smollm2-torch": "node_linear_210"}.get(name, "")
    found = find(name, without=head)
    feed = g.feed_of(g.real_model(name))
    want = g.outputs_of(g.real_model(name), feed)
    rng = np.random.default_rng(2)
    editor = Editor(found.model)
    before = Counter(n.op for n in found.model.graph.nodes)
    for fold in found.folds:
        fold.apply(editor, fold.shared(2.0 ** rng.integers(-3, 4, fold.size), "max"))
    editor.finish()
    assert Counter(n.op for n in found.model.graph.nodes) == before
    out = save(found.model, tmp_path / "out.onnx")[0]
    for now, then in zip(g.outputs_of(out, feed), want, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        # ONNX Runtime with and without its optimizations differs by 2e-7 (SmolLM2) to 1e-6 (MiniLM)
        # in FP32, by 4e-4 (SmolLM2) and 6e-4 (SDXL) in FP16: a few times that is rounding.
        ("smollm2-fp32", 5e-6),
        ("smollm2-torch", 5e-6),
        ("smollm2-torch-fp16", 3e-3),
        ("minilm", 5e-6),
        ("minilm-legacy", 5e-6),
        ("sdxl-unet-tiny-fp16", 3e-3),
    ],
)
@pytest.mark.parametrize("explicit", [False, True])
def test_random_factors_to_rounding(tmp_path: Path, name: str, most: float, explicit: bool) -> None:
    found = find(name)
    if explicit and len(found.folds) == len(found.inputs):
        return  # none is needed
    feed = g.feed_of(g.real_model(name))
    want = g.outputs_of(g.real_model(name), feed)
    rng = np.random.default_rng(1)
    editor = Editor(found.model)
    tensors = found.model.graph.tensors()
    for tensor, fold in found.inputs.items():
        if isinstance(fold, str) and explicit:
            readers = [n for n in tensors[tensor].outputs if n.op in ("MatMul", "Gemm")]
            fold = find_fold(found.model, tensors[tensor], readers, explicit=True)
        if isinstance(fold, Fold):
            low, high = fold.bounds()
            drawn = np.clip(fold.shared(rng.lognormal(0, 1, fold.size)), low, high)
            fold.apply(editor, drawn)
    editor.finish()
    out = save(found.model, tmp_path / "out.onnx")[0]
    for now, then in zip(g.outputs_of(out, feed), want, strict=True):
        now, then = now.astype(np.float64), then.astype(np.float64)
        assert 0 < np.linalg.norm(now - then) < most * np.linalg.norm(then)


@pytest.mark.parametrize("name", ["minilm-legacy", "smollm2-fp32"])
def test_a_folded_model_in_fp16_is_as_good_as_the_model_in_fp16(tmp_path: Path, name: str) -> None:
    """Folded before the base precision, within its bounds: no further from FP32, on average.

    The error of one sample varies by 2 with the factors drawn, as any rounding's does.
    """
    feeds = [g.feed_of(g.real_model(name), seed=seed) for seed in range(3)]
    want = [g.outputs_of(g.real_model(name), f)[0].astype(np.float64) for f in feeds]
    errors = []
    for folded in (False, True):
        found = find(name)
        editor, rng = Editor(found.model), np.random.default_rng(3)
        for fold in found.folds if folded else ():
            low, high = fold.bounds("fp16")
            s = np.clip(fold.shared(rng.lognormal(0, 1, fold.size)), low, high)
            fold.apply(editor, fold.rounded(s, "fp16"))
        editor.finish()
        convert_base(found.model, "fp16")
        out = save(found.model, tmp_path / "out.onnx")[0]
        got = [g.outputs_of(out, f)[0] for f in feeds]
        pairs = zip(got, want, strict=True)
        each = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
        errors.append(float(np.exp(np.mean(np.log(each)))))
    assert errors[0] < 1e-2
    assert errors[1] < 1.4 * errors[0]
