"""Models that ONNX Runtime has no kernel for are measured all the same, and the report says how."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from evaluate_models import samples, write
from tokenizers import Tokenizer, models, pre_tokenizers

import onnxq
from onnxq.evaluate.compare import compare
from onnxq.evaluate.perplexity import perplexity
from onnxq.evaluate.runners import any_model, runnable
from onnxq.samples import Data

CODES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
VALUES = CODES.astype(np.float32)
LINEAR = """agraph (float[N,4] x) => (float[N,4] y)
    { w = DequantizeLinear(codes, scale)  z = MatMul(x, w)  y = Relu(z) }"""
FLOAT = "agraph (float[N,4] x) => (float[N,4] y) { z = MatMul(x, w)  y = Relu(z) }"


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders of the run, which must be gone afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fp4(path: Path, graph: str, **constants: np.ndarray[Any, Any]) -> Path:
    return write(path, graph, opset=23, codes=CODES.reshape(4, 4), **constants)


def test_perplexity_of_fp4(tmp_path: Path, scratch: Path) -> None:
    words = models.WordLevel({w: i for i, w in enumerate("abcd")}, unk_token="a")
    built = Tokenizer(words)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c d d b a c")
    graph = """agraph (int64[B,S] input_ids) => (float[B,S,4] logits)
        { t = DequantizeLinear(codes, scale)  logits = Gather(t, input_ids) }"""
    model = fp4(tmp_path / "m.onnx", graph, scale=np.float32(0.5))
    found = perplexity(model, tmp_path / "text.txt", tmp_path / "tokenizer.json", window=4)
    rows = VALUES.reshape(4, 4).astype(np.float64) / 2
    surprisal = [
        math.log(np.exp(rows[before]).sum()) - rows[before][token]
        for ids in ([0, 1, 2, 3], [3, 1, 0, 2])
        for before, token in itertools.pairwise(ids)
    ]
    assert found.value == pytest.approx(math.exp(np.mean(surprisal)), rel=1e-6)
    assert "simulated" in found.notes[0] and "1 FLOAT4E2M1" in found.notes[0]
    assert any("simulated" in line for line in found.lines())
    assert not list(scratch.iterdir())


def test_comparison_with_fp4(tmp_path: Path, scratch: Path) -> None:
    original = write(tmp_path / "r.onnx", FLOAT, w=VALUES.reshape(4, 4))
    candidate = fp4(tmp_path / "c.onnx", LINEAR, scale=np.float32(1.01))
    found = compare({"original": original, "candidate": candidate}, samples(3, 5, 4))
    error = found.row("candidate", "y").found.error
    # As the scale is off by 0.01: 40 dB, but for roundings of 2^-24.
    assert error is not None and error.as_dict()["snr_db"] == pytest.approx(40.0, abs=1e-3)
    assert "simulated" in found.notes["candidate"][0] and not found.notes["original"]
    assert not list(scratch.iterdir())


HALVES = """agraph (float16[N,64] x) => (float16[N,64] y)
    { q = QuantizeLinear<axis=1>(x, scale, zero)  y = DequantizeLinear<axis=1>(q, scale, zero) }"""


@pytest.mark.parametrize("shape", [(), (64,)])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_fp16_is_rounded_whatever_onnx_runtime_does(
    dtype: Any, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime before 1.30 cuts x / scale off: its own error then is 4 times as large."""
    scale = np.full(shape, 0.1, np.float16)
    model = write(tmp_path / "m.onnx", HALVES, scale=scale, zero=np.zeros(shape, dtype))
    x = np.random.default_rng(0).uniform(-12, 12, (8, 64)).astype(np.float16)
    steps = np.rint(x.astype(np.float32) / scale.astype(np.float32))
    if dtype is ml_dtypes.float8_e4m3fn:
        steps = (x.astype(np.float32) / scale.astype(np.float32)).astype(dtype)
    else:
        steps = np.clip(steps, np.iinfo(dtype).min, np.iinfo(dtype).max)
    # One multiplication of two FP16 numbers is exact in FP32: rounded once, as the operator does.
    wanted = (steps.astype(np.float32) * scale.astype(np.float32)).astype(np.float16)
    monkeypatch.setattr("onnxruntime.__version__", "1.29.0")
    with runnable(model) as (usable, notes):
        with any_model("m", usable, None, "cpu") as opened:
            np.testing.assert_array_equal(opened.infer({"x": x})["y"], wanted)
        integers = dtype is not ml_dtypes.float8_e4m3fn
        assert [("before 1.30" in note) for note in notes] == [True] * integers
    monkeypatch.setattr("onnxruntime.__version__", "1.30.0")
    with runnable(model) as (usable, notes):
        assert usable == model and not notes


def test_the_report_says_that_fp16_is_rounded_by_other_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = np.float16(0.1)
    model = write(tmp_path / "m.onnx", HALVES, scale=scale, zero=np.zeros((), np.int8))
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    feeds = [{"x": np.ones((1, 64), np.float16)}]
    found = compare({"original": model, "candidate": model}, feeds)
    assert any("before 1.30" in line for line in found.lines())


def test_errors_layer_by_layer_with_fp4(tmp_path: Path, scratch: Path) -> None:
    original = write(tmp_path / "r.onnx", FLOAT, w=VALUES.reshape(4, 4))
    candidate = fp4(tmp_path / "c.onnx", LINEAR, scale=np.float32(1.01))
    np.savez(tmp_path / "data.npz", x=samples(1, 5, 4)[0]["x"])
    data = Data(path=tmp_path / "data.npz")
    found = onnxq.compare(original, candidate, data=data, fp16=False, per_layer=True).comparison
    assert found is not None
    lines = found.layers["candidate"].lines()
    assert any("MatMul" in line and "40.0" in line for line in lines)
    assert not list(scratch.iterdir())
