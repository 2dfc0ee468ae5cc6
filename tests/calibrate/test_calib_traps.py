"""Traps of calibration that peers fall into, each by name: a clear error, or the right result.

Numbers are those of NVIDIA ModelOpt's list (the others are in `test_traps.py`); the rest are
onnxruntime's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net
from onnx import TensorProto, numpy_helper

import onnxq
from onnxq.errors import OnnxqError
from onnxq.samples import Data

Array = np.ndarray[Any, Any]
WIDE = 32


def net() -> Net:
    made = Net()
    y = made.op("MatMul", made.input("x", ["b", WIDE]), made.weight("v", WIDE, WIDE), name="/fc1")
    y = made.op("Relu", y)
    made.output(made.op("MatMul", y, made.weight("w", WIDE, WIDE), name="/fc2"))
    return made


def laplace(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).laplace(size=(count, WIDE)).astype(np.float32)


def scale(path: Path, of: str = "x") -> float:
    """The activation scale that a model divides `of` by."""
    model = onnx.load(path)
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makes = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            origin = node.input[0]
            while origin in makes and makes[origin].op_type in ("Cast", "Sub"):
                origin = makes[origin].input[0]
            if origin == of:
                return float(known[node.input[1]])
    raise AssertionError(f"{of} is not quantized")


def made(folder: Path, name: str = "q", **options: Any) -> Path:
    source = folder / "m.onnx"
    if not source.exists():
        net().save(source)
    return onnxq.quantize(source, folder / f"{name}.onnx", **options).files[0]


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_6_nan_and_infinity_in_the_data_are_refused(bad: float, word: str, tmp_path: Path) -> None:
    x = laplace(8)
    x[5, 3] = bad
    np.savez(tmp_path / "c.npz", x=x)
    with pytest.raises(OnnxqError, match=rf"sample 5.*{word}|{word}.*sample 5"):
        made(tmp_path, recipe="int8", calib=tmp_path / "c.npz")
    assert not (tmp_path / "q.onnx").exists()


def test_6_nan_that_the_model_makes_is_named(tmp_path: Path) -> None:
    bad = Net()
    y = bad.op("Log", bad.input("x", ["b", WIDE]), name="/log")
    bad.output(bad.op("MatMul", y, bad.weight("w", WIDE, WIDE), name="/fc"))
    bad.save(tmp_path / "m.onnx")
    x = np.ones((8, WIDE), np.float32)
    x[6, 0] = -1
    np.savez(tmp_path / "c.npz", x=x)
    with pytest.raises(OnnxqError, match=r"/log:0.*not finite in sample 6"):
        made(tmp_path, recipe="int8", calib=tmp_path / "c.npz")


def test_7_entropy_is_no_maximum_in_disguise(tmp_path: Path) -> None:
    """One batch, as where theirs gave the maximum. No calibrator may be another one's alias."""
    np.savez(tmp_path / "c.npz", x=laplace(4000))
    calib = Data(tmp_path / "c.npz", batch=4000)
    found = {
        calibrator: scale(made(tmp_path, recipe="int8", calibrator=calibrator, calib=calib))
        for calibrator in ("max", "entropy", "percentile:99.9", "percentile:99", "mse", "mse:2")
    }
    assert len(set(found.values())) == len(found), found
    for calibrator, value in found.items():
        assert calibrator == "max" or value < 0.9 * found["max"], found


@pytest.mark.parametrize("calibrator", ["entropy", "percentile:99.9", "mse:2"])
def test_7_the_order_and_the_batches_decide_nothing(calibrator: str, tmp_path: Path) -> None:
    x = laplace(400)
    x[:200] *= 3  # a histogram whose bins are laid by its first batch would show it
    scales = set()
    for order in (x, x[::-1], np.random.default_rng(1).permutation(x)):
        for batch in (1, 7, 400):
            np.savez(tmp_path / "c.npz", x=order)
            calib = Data(tmp_path / "c.npz", batch=batch)
            scales.add(scale(made(tmp_path, recipe="int8", calibrator=calibrator, calib=calib)))
    assert len(scales) == 1


def test_14_seven_samples_at_batch_four_are_a_batch_of_four_and_one_of_three(
    tmp_path: Path,
) -> None:
    """And each counts: the largest is the last, in the batch that is not full."""
    x = laplace(7)
    x[6] *= 50
    np.savez(tmp_path / "c.npz", x=x)
    steps: list[tuple[int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "calibrate":
            steps.append((done, total))

    calib = Data(tmp_path / "c.npz", batch=4)
    path = made(tmp_path, recipe="fp8", calibrator="max", calib=calib, progress=progress)
    assert steps == [(1, 2), (2, 2)]
    assert scale(path) == pytest.approx(np.abs(x).max() / 448, rel=1e-3)


def test_14_steps_are_not_counted_on_the_first_input(tmp_path: Path) -> None:
    """The first input is one row, given at every step; the second has 6, fed 2 at a time."""
    two = Net()
    one = two.input("one", [1, WIDE])
    y = two.op("MatMul", two.input("x", [2, WIDE]), two.weight("v", WIDE, WIDE), name="/fc1")
    two.output(two.op("Add", y, one))
    two.save(tmp_path / "m.onnx")
    x = laplace(6)
    x[5] *= 50
    np.savez(tmp_path / "c.npz", one=laplace(1), x=x)
    path = made(tmp_path, recipe="fp8", calibrator="max", calib=tmp_path / "c.npz")
    assert scale(path) == pytest.approx(np.abs(x).max() / 448, rel=1e-3)


def test_15_no_data_is_refused_and_random_data_is_seeded(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="needs calibration data") as refused:
        made(tmp_path, recipe="int8")
    assert "int8-dynamic" in refused.value.hint and "--random-calib" in refused.value.hint
    written = [
        made(tmp_path, name, recipe="int8", calib=Data(random=seed, samples=4)).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no samples", "no sample"),
        ("no files", "no .npz"),
        ("too few rows", "4 at a time"),
        ("short text", "too short"),
        ("no input of the model", "'x'"),
    ],
)
def test_17_too_little_data_is_said(case: str, said: str, tmp_path: Path) -> None:
    """Theirs stops with an AssertionError without a text."""
    fixed = Net()
    kind = np.int64 if case == "short text" else np.float32
    name = "input_ids" if case == "short text" else "x"
    x = fixed.input(name, ["b", "s"] if case == "short text" else [4, WIDE], kind)
    if case == "short text":
        x = fixed.op("Gather", fixed.weight("table", 100, WIDE), x)
    fixed.output(fixed.op("MatMul", x, fixed.weight("w", WIDE, WIDE), name="/fc"))
    fixed.save(tmp_path / "m.onnx")
    calib: Any = tmp_path / "c.npz"
    if case == "no samples":
        np.savez(calib, x=laplace(0))
    elif case == "no files":
        calib = tmp_path / "empty"
        calib.mkdir()
    elif case == "too few rows":
        np.savez(calib, x=laplace(3))
    elif case == "no input of the model":
        np.savez(calib, y=laplace(4))
    else:
        calib = Data(text=tmp_path / "t.txt", tokenizer=tokenizer(tmp_path), seq_len=512)
        (tmp_path / "t.txt").write_text("a b a b")
    with pytest.raises(OnnxqError) as refused:
        made(tmp_path, recipe="int8", calib=calib)
    assert re.search(said, refused.value.message), refused.value.message
    assert refused.value.hint and "\n" not in refused.value.message


def tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_data_is_not_dropped_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's CalibMaxIntermediateOutputs throws away what came before: here are passes."""
    from onnxq.calibrate import within

    x = laplace(64)
    x[0] *= 50
    np.savez(tmp_path / "c.npz", x=x)
    plenty = made(tmp_path, "a", recipe="int8", calib=tmp_path / "c.npz").read_bytes()
    real = within.calibrate
    monkeypatch.setattr(within, "calibrate", lambda *a, **more: real(*a, **more | {"memory": 1}))
    little = made(tmp_path, "b", recipe="int8", calib=tmp_path / "c.npz").read_bytes()
    assert plenty == little


def test_what_is_kept_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """onnxruntime's histograms keep every activation: 29 MB an image of a ResNet-18."""
    sizes = []
    for count in (10, 10_000):
        np.savez(tmp_path / "c.npz", x=laplace(count))
        made(tmp_path, recipe="int8", calib=tmp_path / "c.npz", save_calib=tmp_path / "t.calib")
        with np.load(tmp_path / "t.calib") as table:
            sizes.append(sum(table[name].nbytes for name in table.files))
    # More values fill more of the same bins: 6,529 at most for each of two tensors.
    assert sizes[1] < sizes[0] + 2 * 8 * 7000


@pytest.mark.parametrize("calibrator", ["max", "percentile", "entropy", "mse", "mse:2"])
def test_every_calibrator_serves_fp8(calibrator: str, tmp_path: Path) -> None:
    """onnxruntime has FP8 with one calibrator only."""
    np.savez(tmp_path / "c.npz", x=laplace(200))
    path = made(tmp_path, recipe="fp8", calibrator=calibrator, calib=tmp_path / "c.npz")
    found = onnxq.compare(tmp_path / "m.onnx", path, data=tmp_path / "c.npz", min_snr=20)
    assert found.passed, found.as_dict()


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic"])
def test_no_integer_bias_no_unsigned_codes_no_zero_points_but_0(
    recipe: str, tmp_path: Path
) -> None:
    """onnxruntime writes the bias as INT32 behind DequantizeLinear, and UINT8: neither builds."""
    conv = Net()
    x = conv.op("Relu", conv.input("x", ["b", 32, 8, 8]))
    bias = conv.const("bias", np.arange(32.0))
    y = conv.op("Conv", x, conv.weight("k", 32, 32, 3, 3), bias, pads=[1] * 4, name="/conv")
    conv.output(conv.op("GlobalAveragePool", y))
    conv.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).random((4, 32, 8, 8), np.float32))
    model = onnx.load(made(tmp_path, recipe=recipe, calib=tmp_path / "c.npz"))
    known = {t.name: t for t in model.graph.initializer}
    assert not {t.data_type for t in known.values()} & {TensorProto.INT32, TensorProto.UINT8}
    pairs = [n for n in model.graph.node if n.op_type.endswith("uantizeLinear")]
    assert len(pairs) >= 3
    for node in pairs:
        for zero in node.input[2:]:
            assert not numpy_helper.to_array(known[zero]).astype(np.float32).any()


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic", "fp8-dynamic"])
def test_scales_are_positive_where_everything_is_zero(recipe: str, tmp_path: Path) -> None:
    """TensorRT: "Scale coefficients must all be positive". A dead channel, weight and input."""
    dead = Net()
    x = dead.op("Mul", dead.input("x", ["b", WIDE]), dead.const("zero", 0.0))
    channel = np.ones((WIDE, WIDE))
    channel[:, 3] = 0
    y = dead.op("MatMul", x, dead.const("v", channel), name="/input")
    z = dead.op("MatMul", dead.op("Add", y, "x"), dead.const("w", channel), name="/channel")
    last = dead.op("MatMul", z, dead.const("u", np.zeros((WIDE, WIDE))), name="/weight")
    dead.output(dead.op("Add", last, z))
    dead.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=laplace(16))
    path = made(tmp_path, recipe=recipe, calib=tmp_path / "c.npz")
    model = onnx.load(path)
    known = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scales = [known[n.input[1]] for n in model.graph.node if n.op_type.endswith("izeLinear")]
    assert scales and all((s.astype(np.float32) > 0).all() for s in scales)
    found = onnxq.compare(tmp_path / "m.onnx", path, data=tmp_path / "c.npz", min_snr=20)
    assert found.passed, found.as_dict()
