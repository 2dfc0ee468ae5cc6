"""A prediction from a real compile: fixed shapes, dynamic ones, and the original beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq
from onnxq.errors import OnnxqError

ROWS, K, N = 64, 128, 256


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [rows, 128] @ w [128, 256], FP32, rows dynamic."""
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "multiply")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])],
        [numpy_helper.from_array(weight, "w")],
    )
    folder = tmp_path_factory.mktemp("linear")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        folder / "linear.onnx",
    )
    onnxq.quantize(folder / "linear.onnx", folder / "fp8.onnx", recipe="fp8-weight-only")
    return folder


def test_all_cards_of_the_target_at_fixed_shapes(linear: Path) -> None:
    built = onnxq.build(linear / "fp8.onnx", linear / "a.plan", shapes=[f"x:{ROWS}x{K}"])
    assert built.predicted is not None
    cards = {time.card for time in built.predicted.times}
    assert cards == {"L4", "L40S", "RTX 4090", "RTX 6000 Ada"}
    first = built.predicted.times[0]
    (product,) = [share for share in first.shares if share.flops]
    assert (product.flops, product.dtype) == (2 * ROWS * K * N, "fp16 x fp8")
    assert first.before is None and first.speed_up is None
    said = "\n".join(built.predicted.lines())
    assert "predicted on L4" in said
    assert "4.19 MFLOP" in said and f"{product.nbytes / 1e3:.3g} kB" in said
    assert built.as_dict()["predicted"]["assumed"]["compute"] == 0.6


def test_beside_its_original_in_fp16_at_the_optimum(linear: Path) -> None:
    built = onnxq.build(
        linear / "fp8.onnx",
        linear / "b.plan",
        shapes=[f"x:1x{K},{ROWS}x{K},512x{K}"],
        cards=["l40s"],
        beside=linear / "linear.onnx",
    )
    assert built.predicted is not None
    (time,) = built.predicted.times
    assert built.predicted.shapes == (f"x:{ROWS}x{K}",)
    (product,) = [share for share in time.shares_before if share.flops]
    assert (product.flops, product.dtype) == (2 * ROWS * K * N, "fp16")
    assert time.before is not None and time.speed_up == time.before / time.seconds


def test_dynamic_shapes_are_not_compiled_twice_unless_asked(linear: Path) -> None:
    shapes = [f"x:1x{K},{ROWS}x{K},512x{K}"]
    built = onnxq.build(linear / "fp8.onnx", linear / "c.plan", shapes=shapes)
    assert built.predicted is None and built.as_dict()["predicted"] is None


def test_a_card_that_the_engine_does_not_run_on(linear: Path) -> None:
    with pytest.raises(OnnxqError, match="H100 SXM is sm90"):
        onnxq.build(
            linear / "fp8.onnx", linear / "d.plan", shapes=[f"x:{ROWS}x{K}"], cards=["h100"]
        )
    assert not (linear / "d.plan").exists()
