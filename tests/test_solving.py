"""Second-order rounding through the whole spine: less output error, in the file that is written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net, recipe, run, snr

import onnxq
from onnxq import solving
from onnxq.algorithms import gptq
from onnxq.drafts import rounding_damp
from onnxq.errors import OnnxqError
from onnxq.inputs import Moments
from onnxq.recipe import Recipe, from_dict

STEPS = ("search", "gptq")


def _data(folder: Path, rows: int = 64, seed: int = 1) -> tuple[Path, np.ndarray]:
    """Inputs whose neighbours are alike, as real activations are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 8, 96)).astype(np.float32)
    for k in range(1, 96):
        x[..., k] = 0.9 * x[..., k - 1] + np.sqrt(1 - 0.81) * x[..., k]
    path = folder / f"data{seed}.npz"
    np.savez(path, x=x)
    return path, x


def _linear(folder: Path) -> Path:
    """A MatMul and, behind it, a Gemm with a transposed weight."""
    net = Net()
    x = net.input("x", ["batch", 8, 96])
    h = net.op("MatMul", x, net.weight("a", 96, 64), name="/a")
    flat = net.op("Reshape", h, net.const("shape", [-1, 64], np.int64), name="/flat")
    bias = net.weight("b.bias", 48)
    net.output(net.op("Gemm", flat, net.weight("b", 48, 64), bias, name="/b", transB=1))
    return net.save(folder / "net.onnx")


def _with(name: str, *steps: str) -> Recipe:
    return replace(recipe(name), name=f"{name}-{len(steps)}", steps=steps)


def _error(folder: Path, source: Path, name: str, *steps: str, x: np.ndarray) -> float:
    made = folder / f"{name}{len(steps)}.onnx"
    calib, _ = _data(folder)
    target = "onnxruntime" if name.startswith("uint4") else "sm89"
    chosen = _with(name, *steps)
    onnxq.quantize(source, made, recipe=chosen, calib=calib, precision="keep", target=target)
    wanted, found = (run(onnx.load(p), {"x": x})[0] for p in (source, made))
    return snr(wanted, found)


@pytest.mark.parametrize(
    ("name", "gain"),
    [("int4-rtn", 3.0), ("uint4-rtn", 3.0), ("int8-weight-only", 3.0), ("fp8-weight-only", 3.0)],
)
def test_held_out_error_falls(name: str, gain: float, tmp_path: Path) -> None:
    """On an AR(1) input, rho .9, GPTQ leaves at most .3 of the error of rounding: 5.2 dB.

    Two layers, of which the second reads less alike inputs, and data it has not seen: 3 dB.
    """
    source, (_, x) = _linear(tmp_path), _data(tmp_path, 32, seed=2)
    plain = _error(tmp_path, source, name, x=x)
    assert _error(tmp_path, source, name, *STEPS, x=x) >= plain + gain


@pytest.mark.parametrize(
    ("name", "gain"), [("int4-rtn", 0.2), ("uint4-rtn", 0.15), ("fp8-weight-only", 0.15)]
)
def test_scales_fitted_to_their_codes_gain_more(name: str, gain: float, tmp_path: Path) -> None:
    """Held out, behind the descent: of codes that gain no more by themselves."""
    source, (_, x) = _linear(tmp_path), _data(tmp_path, 32, seed=2)
    before = _error(tmp_path, source, name, *STEPS, "descent", x=x)
    assert _error(tmp_path, source, name, *STEPS, "descent", "scales", x=x) >= before + gain


def test_few_rows_are_trusted_less(tmp_path: Path) -> None:
    """48 rows of 96 inputs, most of them alike: a table says so as well as the data itself."""
    gram = np.eye(96, dtype=np.float32)
    assert rounding_damp(Moments(gram, gram, gram, rows=48)) == pytest.approx(0.6)
    assert (
        rounding_damp(Moments(gram, gram, gram, rows=4800))
        == rounding_damp(Moments(gram, gram, gram))
        == 0.1
    )
    source, table = _linear(tmp_path), tmp_path / "t.npz"
    path, x = _data(tmp_path, 6)
    chosen = _with("int4-rtn", *STEPS)
    onnxq.quantize(source, tmp_path / "a.onnx", recipe=chosen, calib=path, save_calib=table)
    seen: list[int] = []
    for name, options in (("b", {"load_calib": [table]}), ("c", {"calib": path})):
        steps = STEPS if name == "b" else ("sequential", *STEPS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                solving,
                "output_power",
                lambda weight, parts: seen.extend(m.rows for m in parts) or 1.0,
            )
            chosen = _with("int4-rtn", *steps)
            onnxq.quantize(source, tmp_path / f"{name}.onnx", recipe=chosen, **options)
    assert seen == [x.size // 96] * 4


def test_going_layer_by_layer_makes_up_for_the_layers_before(tmp_path: Path) -> None:
    """Behind a layer in INT4, held out: the second layer's share of the error at least is less."""
    source, (_, x) = _linear(tmp_path), _data(tmp_path, 32, seed=2)
    alone = _error(tmp_path, source, "int4-rtn", *STEPS, x=x)
    assert _error(tmp_path, source, "int4-rtn", "sequential", *STEPS, x=x) > alone + 0.3


def test_layer_by_layer_needs_the_data_itself(tmp_path: Path) -> None:
    source, (calib, _) = _linear(tmp_path), _data(tmp_path)
    table = tmp_path / "t.npz"
    onnxq.quantize(source, tmp_path / "a.onnx", recipe="fp8-gptq", calib=calib, save_calib=table)
    with pytest.raises(OnnxqError, match="a calibration table is not enough"):
        onnxq.quantize(source, tmp_path / "b.onnx", recipe="int4-best", load_calib=[table])


def test_the_error_reported_is_that_of_the_file(tmp_path: Path) -> None:
    """Of the first layer, whose input is the data itself: recomputed from the stored codes."""
    source, (calib, x) = _linear(tmp_path), _data(tmp_path)
    made = tmp_path / "m.onnx"
    done = onnxq.quantize(source, made, recipe=_with("int4-rtn", *STEPS), calib=calib)
    (edit,) = [e for e in done.report.edits if e.step == "round" and e.target == "/a"]
    said = dict(re.findall(r"(\S+) (-?[\d.]+) dB", edit.reason))
    assert list(said) == ["nearest", "search", "search+gptq"]
    assert edit.verb == min(said, key=lambda name: float(said[name]))

    weight = onnx.numpy_helper.to_array(onnx.load(source).graph.initializer[0])
    stored = _dequantized(made)
    rows = x.reshape(-1, 96).astype(np.float64)
    share = np.sum((rows @ (stored - weight)) ** 2) / np.sum((rows @ weight) ** 2)
    assert 10 * np.log10(share) == pytest.approx(float(said[edit.verb]), abs=0.06)
    assert done.report.facts["rounding"]["improved"] == 2


def _dequantized(path: Path) -> np.ndarray:
    """The weight of /a as its INT4 codes and block scales give it."""
    model = onnx.load(path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    (node,) = [n for n in model.graph.node if n.name.startswith("a_DequantizeLinear")]
    codes, scale = stored[node.input[0]].astype(np.float64), stored[node.input[1]]
    size = next(a.i for a in node.attribute if a.name == "block_size")
    return codes * np.repeat(scale.astype(np.float64), size, axis=0)


def test_a_step_that_does_not_help_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(self: Any, weight: np.ndarray, *_: Any) -> np.ndarray:
        return np.zeros_like(weight)

    monkeypatch.setattr(gptq.Sweep, "round", spoiled)
    source, (calib, _) = _linear(tmp_path), _data(tmp_path)
    done = onnxq.quantize(
        source, tmp_path / "m.onnx", recipe=_with("int4-rtn", "gptq"), calib=calib
    )
    edits = [e for e in done.report.edits if e.step == "round"]
    assert [e.verb for e in edits] == ["nearest", "nearest"]
    assert all("gptq 0.0 dB" in e.reason for e in edits)
    assert done.report.facts["rounding"]["improved"] == 0


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", ["batch", 8, 96])
    values = np.ones((96, 32), np.float32)
    values[3, 4] = np.inf
    net.output(net.op("MatMul", x, net.const("w", values), name="/a"))
    source, (calib, _) = net.save(tmp_path / "net.onnx"), _data(tmp_path)
    with pytest.raises(OnnxqError, match=r"not finite|NaN or infinite"):
        onnxq.quantize(source, tmp_path / "m.onnx", recipe=_with("int4-rtn", "gptq"), calib=calib)
    assert not (tmp_path / "m.onnx").exists()


def test_without_data_the_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="needs calibration data"):
        onnxq.quantize(_linear(tmp_path), recipe="int4-gptq")


def test_steps_in_an_order_that_makes_no_sense_are_refused() -> None:
    with pytest.raises(OnnxqError, match="no sense in this order"):
        from_dict({"steps": ["gptq", "search"]}, "x.yaml")
    with pytest.raises(OnnxqError, match="no sense in this order"):
        from_dict({"steps": ["gptq", "gptq"]}, "x.yaml")
    with pytest.raises(
        OnnxqError,
        match="choose one of: smoothquant, awq, sequential, magnitude, wanda, sparsegpt, alps",
    ):
        from_dict({"steps": ["magic"]}, "x.yaml")


@pytest.mark.parametrize("name", ["int4-gptq", "fp8-gptq"])
def test_a_run_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    source, (calib, _) = _linear(tmp_path), _data(tmp_path)
    made = [onnxq.quantize(source, tmp_path / f"{i}.onnx", recipe=name, calib=calib) for i in "ab"]
    first, second = (m.files[0].read_bytes() for m in made)
    assert first == second


def test_a_saved_calibration_serves(tmp_path: Path) -> None:
    source, (calib, _) = _linear(tmp_path), _data(tmp_path)
    table = tmp_path / "t.npz"
    first = onnxq.quantize(
        source, tmp_path / "a.onnx", recipe="fp8-gptq", calib=calib, save_calib=table
    )
    second = onnxq.quantize(source, tmp_path / "b.onnx", recipe="fp8-gptq", load_calib=[table])
    assert first.files[0].read_bytes() == second.files[0].read_bytes()
    with pytest.raises(OnnxqError, match="lacks the amax"):
        onnxq.quantize(
            source, tmp_path / "c.onnx", recipe="int4-gptq", calib=calib, save_calib=table
        )
        onnxq.quantize(source, tmp_path / "d.onnx", recipe="fp8-gptq", load_calib=[table])


def test_a_table_of_other_inputs_is_refused(tmp_path: Path) -> None:
    """A Gram matrix of fewer channels than the layer has, as no calibration of it gives."""
    source, (calib, _) = _linear(tmp_path), _data(tmp_path)
    table, chosen = tmp_path / "t.npz", _with("int4-rtn", "gptq")
    onnxq.quantize(source, tmp_path / "a.onnx", recipe=chosen, calib=calib, save_calib=table)
    arrays = dict(np.load(table))
    cut = {n: a[:8, :8] if n.endswith("gram") else a for n, a in arrays.items()}
    np.savez(table, **cut)
    with pytest.raises(OnnxqError, match="is that of 8 inputs, but '/a' has 96"):
        onnxq.quantize(source, tmp_path / "b.onnx", recipe=chosen, load_calib=[table])


def test_moments_that_no_input_has_are_refused(tmp_path: Path) -> None:
    source, (calib, x) = _linear(tmp_path), _data(tmp_path)
    table, chosen = tmp_path / "t.npz", _with("int4-rtn", "gptq")
    onnxq.quantize(source, tmp_path / "a.onnx", recipe=chosen, calib=calib, save_calib=table)
    arrays = dict(np.load(table))
    made = {
        n: a + 100 * np.eye(len(a))[::-1] if n.endswith("gram") else a for n, a in arrays.items()
    }
    np.savez(table, **made)
    with pytest.raises(OnnxqError, match="what '/a' reads are those of no input"):
        onnxq.quantize(source, tmp_path / "b.onnx", recipe=chosen, load_calib=[table])
    np.savez(calib, x=x * np.float32(1e20))
    with pytest.raises(OnnxqError, match="what '/a' reads overflow"):
        onnxq.quantize(source, tmp_path / "b.onnx", recipe=chosen, calib=calib)
