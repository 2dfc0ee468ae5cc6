"""Shared ranges, and factors moved to q, on an attention written out."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq
from onnxq.graph.model import Model
from onnxq.recipe import load

HEAD, ROWS = 64, 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-attention of one head; q and k times 64^-1/4 in FP16, v four times as large."""
    rng = np.random.default_rng(0)
    names = {"wq": 1.0, "wk": 1.0, "wv": 4.0}
    weights = [
        numpy_helper.from_array(
            (rng.standard_normal((HEAD, HEAD)) * size / 8).astype(np.float16), name
        )
        for name, size in names.items()
    ]
    weights.append(numpy_helper.from_array(np.array(HEAD**-0.25, np.float16), "c"))
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], "attn/to_q"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], "attn/to_k"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], "attn/to_v"),
        helper.make_node("Mul", ["q", "c"], ["qc"], "scale_q"),
        helper.make_node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]),
        helper.make_node("Mul", ["kt", "c"], ["kc"], "scale_k"),
        helper.make_node("MatMul", ["qc", "kc"], ["s"], "scores"),
        helper.make_node("Softmax", ["s"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"], "values"),
    ]
    shape = [1, ROWS, HEAD]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)],
        weights,
    )
    folder = tmp_path_factory.mktemp("sharing")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        folder / "model.onnx",
    )
    x = rng.standard_normal((8, ROWS, HEAD)).astype(np.float16)
    np.savez(folder / "calib.npz", x=x)
    return folder


def _scales(path: Path) -> dict[str, float]:
    """Of each product's operand by its node and index: the scale of its DequantizeLinear."""
    model = onnx.load(path)
    made = {out: node for node in model.graph.node for out in node.output}
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            for index, name in enumerate(node.input):
                if made[name].op_type == "DequantizeLinear":
                    found[f"{node.name}.{index}"] = float(values[made[name].input[1]])
    return found


def test_q_k_and_v_share_one_scale_and_q_takes_the_factors(source: Path) -> None:
    made = source / "shared.onnx"
    onnxq.quantize(source / "model.onnx", made, recipe="sdxl-fp8", calib=source / "calib.npz")
    scales = _scales(made)
    assert scales["scores.1"] == scales["values.1"]  # k and v
    assert scales["scores.0"] == scales["scores.1"] / 8  # q, times 64^-1/2
    assert len({scales[f"attn/to_{x}.1"] for x in "qkv"}) == 1  # their weights
    # The largest of v under the largest code; v is four times as large as q and k.
    weights = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(source / "model.onnx").graph.initializer
    }
    x = np.load(source / "calib.npz")["x"].astype(np.float32)
    v = x @ weights["wv"].astype(np.float32)
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    assert scales["values.1"] == pytest.approx(np.abs(v).max() / largest, rel=2e-3)


def test_q_k_and_v_of_one_attention_read_codes_a_last_place_apart(source: Path) -> None:
    """One product of the three would write what the fused attention cannot read as it lies."""
    for level in (3, 4):
        made = source / f"apart.{level}.onnx"
        changes, calib = [f"level={level}"], source / "calib.npz"
        onnxq.quantize(source / "model.onnx", made, recipe="sdxl-fp8", changes=changes, calib=calib)
        scales = sorted({_scales(made)[f"attn/to_{x}.0"] for x in "qkv"})
        assert len(scales) == (3 if level == 4 else 1)
        assert scales[-1] <= scales[0] * (1 + 3 * 2**-10)  # none loses range or digits by it


def test_what_differs_too_much_keeps_its_own_scale(source: Path, tmp_path: Path) -> None:
    model = onnx.load(source / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "wv":
            loud = numpy_helper.to_array(tensor) * np.float16(64)
            tensor.CopyFrom(numpy_helper.from_array(loud, "wv"))
    onnx.save(model, tmp_path / "loud.onnx")
    made = tmp_path / "own.onnx"
    onnxq.quantize(tmp_path / "loud.onnx", made, recipe="sdxl-fp8", calib=source / "calib.npz")
    scales = _scales(made)
    assert scales["scores.1"] < scales["values.1"] / 32


@pytest.mark.parametrize(("level", "own"), [(3, "fp8"), (4, "fp8-attention")])
def test_as_accurate_as_with_scales_of_their_own(source: Path, level: int, own: str) -> None:
    def snr(recipe: str, *changes: str) -> float:
        made = source / f"{recipe}.{level}.onnx"
        calib = source / "calib.npz"
        onnxq.quantize(source / "model.onnx", made, recipe=recipe, changes=changes, calib=calib)
        found = onnxq.compare(source / "model.onnx", made, data=calib, fp16=False).comparison
        assert found is not None
        return float(found.rows[0].found.error.snr or 0)

    # Under one scale the rounding is another, not a larger one: a decibel is luck.
    assert snr("sdxl-fp8", f"level={level}") > snr(own) - 1.0


def test_only_recipes_by_role_share(source: Path) -> None:
    made = source / "own.onnx"
    recipe = load("fp8-attention")
    onnxq.quantize(source / "model.onnx", made, recipe=recipe, calib=source / "calib.npz")
    scales = _scales(made)
    assert scales["scores.1"] != scales["values.1"]
    assert Model.load(made).opset >= 19
