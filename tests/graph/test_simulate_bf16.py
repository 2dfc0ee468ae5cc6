"""BF16 without kernels for it, against ml_dtypes: the same bits, operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from onnxq.calibrate.session import open_session
from onnxq.errors import OnnxqError
from onnxq.graph.simulate import runnable

BF16 = ml_dtypes.bfloat16
Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def some(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(BF16)


def constant(name: str, values: Array, number: int = T.BFLOAT16) -> onnx.TensorProto:
    return h.make_tensor(name, number, values.shape, values.tobytes(), raw=True)


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    outputs: dict[str, int],
    constants: list[onnx.TensorProto],
    shape: tuple[int, ...] = (3, 40),
) -> Path:
    """A model whose input x is BF16."""
    made = [h.make_tensor_value_info(name, number, None) for name, number in outputs.items()]
    x = h.make_tensor_value_info("x", T.BFLOAT16, shape)
    graph = h.make_graph(nodes, "g", [x], made, constants)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def run(path: Path, x: Array) -> list[Array]:
    with pytest.raises(OnnxqError):  # if this ONNX Runtime can run it, nothing is proven
        open_session(path)
    with runnable(path, bf16=False) as (usable, notes):
        assert usable != path and "BF16" in notes[-1]
        return open_session(usable, device="cpu").run(None, {"x": x})


def test_every_step_is_rounded(tmp_path: Path) -> None:
    """Mul, Add and Div of ml_dtypes compute in FP32 and round, once each."""
    a, b, c = some(40), some(3, 40), some(40)
    nodes = [
        h.make_node("Mul", ["x", "a"], ["m"]),
        h.make_node("Add", ["m", "b"], ["s"]),
        h.make_node("Div", ["s", "c"], ["y"]),
    ]
    constants = [constant("a", a), constant("b", b), constant("c", c)]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.BFLOAT16}, constants)
    x = some(3, 40)
    (found,) = run(path, x)
    expected = (x * a + b) / c
    wide = [v.astype(np.float32) for v in (x, a, b, c)]
    unrounded = ((wide[0] * wide[1] + wide[2]) / wide[3]).astype(BF16)
    assert found.dtype == BF16 and (unrounded != expected).any()  # else nothing is proven
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_products_sum_in_fp32(tmp_path: Path) -> None:
    """Whole numbers: their sums are exact in FP32, and are then rounded to 8 bits, once."""
    w = RNG.integers(-9, 10, (40, 16)).astype(BF16)
    nodes = [h.make_node("MatMul", ["x", "w"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.BFLOAT16}, [constant("w", w)])
    x = RNG.integers(-9, 10, (3, 40)).astype(BF16)
    (found,) = run(path, x)
    exact = x.astype(np.int64) @ w.astype(np.int64)
    assert (np.abs(exact) > 256).any()  # beyond what BF16 holds exactly
    np.testing.assert_array_equal(found, exact.astype(np.float32).astype(BF16))


def test_codes_and_scales(tmp_path: Path) -> None:
    """DequantizeLinear under a BF16 scale a channel, and Q/DQ of the activation."""
    codes = RNG.integers(-127, 128, (40, 16)).astype(np.int8)
    scale = np.abs(some(16)) + np.array(0.01, BF16)
    nodes = [
        h.make_node("QuantizeLinear", ["x", "xs", "zero"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "xs", "zero"], ["d"]),
        h.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=1),
        h.make_node("Cast", ["d"], ["y"], to=T.FLOAT),
        h.make_node("Cast", ["w"], ["v"], to=T.FLOAT),
    ]
    constants = [
        nh.from_array(codes, "codes"),
        nh.from_array(np.int8(0), "zero"),
        constant("scale", scale),
        constant("xs", np.array(0.03, BF16)),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.FLOAT, "v": T.FLOAT}, constants)
    x = some(3, 40)
    y, v = run(path, x)
    step = np.float32(np.array(0.03, BF16))
    rounded = np.clip(np.rint(x.astype(np.float32) / step), -128, 127)
    np.testing.assert_array_equal(y, (rounded * step).astype(BF16).astype(np.float32))
    product = codes.astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(v, product.astype(BF16).astype(np.float32))


def test_casts_to_bf16_round(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Cast", ["x"], ["wide"], to=T.FLOAT),
        h.make_node("Mul", ["wide", "third"], ["product"]),
        h.make_node("Cast", ["product"], ["narrow"], to=T.BFLOAT16),
        h.make_node("Mul", ["narrow", "narrow"], ["square"]),
        h.make_node("Cast", ["square"], ["y"], to=T.FLOAT),
    ]
    constants = [nh.from_array(np.float32(1 / 3), "third")]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.FLOAT}, constants)
    x = some(3, 40)
    (found,) = run(path, x)
    narrow = (x.astype(np.float32) * np.float32(1 / 3)).astype(BF16)
    np.testing.assert_array_equal(found, (narrow * narrow).astype(np.float32))


@pytest.mark.parametrize("inside", ["cast", "constant"])
def test_bf16_inside_alone_is_seen(tmp_path: Path, inside: str) -> None:
    """Inputs and outputs in FP32, and no types stated between."""
    c = some(40)
    nodes = [h.make_node("Mul", ["c", "c"], ["square"])]
    if inside == "cast":
        nodes.insert(0, h.make_node("Cast", ["x"], ["c"], to=T.BFLOAT16))
    nodes.append(h.make_node("Cast", ["square"], ["wide"], to=T.FLOAT))
    nodes.append(h.make_node("Add", ["x", "wide"], ["y"]))
    constants = [constant("c", c)] if inside == "constant" else []
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.FLOAT}, constants, (40,))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = T.FLOAT
    onnx.save(model, path)
    x = RNG.standard_normal(40).astype(np.float32)
    (found,) = run(path, x)
    c = x.astype(BF16) if inside == "cast" else c
    np.testing.assert_array_equal(found, x + (c * c).astype(np.float32))


def test_outputs_that_are_read_inside_too(tmp_path: Path) -> None:
    """Outputs keep name and type; what moves values stays what it was."""
    nodes = [
        h.make_node("Mul", ["x", "a"], ["m"]),
        h.make_node("Transpose", ["m"], ["t"], perm=[1, 0]),
        h.make_node("Exp", ["t"], ["e"]),
        h.make_node("Identity", ["x"], ["same"]),
    ]
    a = some(40)
    outputs = dict.fromkeys(("m", "t", "e", "same"), T.BFLOAT16)
    path = saved(tmp_path / "m.onnx", nodes, outputs, [constant("a", a)])
    x = some(3, 40)
    m, t, e, same = run(path, x)
    np.testing.assert_array_equal(m, x * a)
    np.testing.assert_array_equal(t, (x * a).T)
    np.testing.assert_array_equal(same, x)
    # Exp of two libraries: one step of 8 bits.
    exact = np.exp((x * a).T.astype(np.float64))
    assert (np.abs(e.astype(np.float64) - exact) <= exact * 2.0**-7).all()


def test_values_in_attributes(tmp_path: Path) -> None:
    filled = constant("value", np.array([0.3], BF16))
    nodes = [
        h.make_node("Shape", ["x"], ["shape"]),
        h.make_node("ConstantOfShape", ["shape"], ["fill"], value=filled),
        h.make_node("Constant", [], ["half"], value=constant("h", np.array(0.5, BF16))),
        h.make_node("Add", ["x", "fill"], ["s"]),
        h.make_node("Mul", ["s", "half"], ["y"]),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.BFLOAT16}, [])
    x = some(3, 40)
    (found,) = run(path, x)
    expected = (x + np.array(0.3, BF16)) * np.array(0.5, BF16)
    np.testing.assert_array_equal(found, expected)


def test_a_body_that_reads_bf16_is_refused(tmp_path: Path) -> None:
    inner = h.make_graph(
        [h.make_node("Neg", ["x"], ["z"])],
        "body",
        [],
        [h.make_tensor_value_info("z", T.BFLOAT16, [3, 40])],
    )
    yes = nh.from_array(np.array(True), "yes")
    nodes = [h.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.BFLOAT16}, [yes])
    with pytest.raises(OnnxqError, match="a subgraph reads the BF16 tensor 'x'"):
        run(path, some(3, 40))


def test_where_there_are_kernels_nothing_changes(tmp_path: Path) -> None:
    nodes = [h.make_node("Mul", ["x", "x"], ["y"])]
    path = saved(tmp_path / "m.onnx", nodes, {"y": T.BFLOAT16}, [])
    with runnable(path, bf16=True) as (usable, notes):
        assert usable == path and notes == ()


def test_a_bf16_model_is_measured(tmp_path: Path, models: Path) -> None:
    """The whole of MiniLM: BF16 has 8 bits of digits, INT8 costs more than it does."""
    import onnxq

    source = models / "minilm" / "model.onnx"
    made = onnxq.quantize(source, tmp_path / "q.onnx", recipe="int8-dynamic", precision="bf16")
    data = models / "minilm" / "heldout.npz"
    found = onnxq.compare(source, made.files[0], data=data, fp16=False, min_snr=20)
    assert found.passed and found.comparison is not None
    assert "rounded to BF16" in found.comparison.notes["candidate"][0]
