"""Piece by piece: the moments are those of the whole model, run with and without other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq.calibrate.data import Samples, open_samples
from onnxq.calibrate.staged import Staged
from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.segments import Segments

pytest.importorskip("onnxruntime")


def _residual(folder: Path) -> Path:
    """Two blocks x + relu(x a) b, a mask that both read, and a body that captures the stream."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Sigmoid", ["x"], ["mask"])]
    weights, last = [], "x"
    for i in range(2):
        for name, shape in (("a", (8, 12)), ("b", (12, 8))):
            values = rng.standard_normal(shape).astype(np.float32) / 3
            weights.append(onnx.numpy_helper.from_array(values, f"{name}{i}"))
        nodes += [
            helper.make_node("Mul", [last, "mask"], [f"n{i}"]),
            helper.make_node("MatMul", [f"n{i}", f"a{i}"], [f"p{i}"]),
            helper.make_node("Relu", [f"p{i}"], [f"r{i}"]),
            helper.make_node("MatMul", [f"r{i}", f"b{i}"], [f"q{i}"]),
            helper.make_node("Add", [last, f"q{i}"], [f"s{i}"]),
        ]
        last = f"s{i}"
    body = helper.make_graph(
        [helper.make_node("Add", ["s0", "s1"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    weights.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    nodes.append(helper.make_node("If", ["yes"], ["u"], then_branch=body, else_branch=body))
    nodes.append(helper.make_node("Relu", ["u"], ["v"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 8])],
        [helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        weights,
    )
    path = folder / "net.onnx"
    imports = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


STOPS = ["n0", "r0", "n1", "r1", "v"]


def _samples(folder: Path, model: Model) -> Samples:
    x = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)
    np.savez(folder / "d.npz", x=x)
    return open_samples(folder / "d.npz", model.inputs(), batch=1)


def _values(path: Path, x: np.ndarray, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every stop of the whole model, by onnx's own evaluator, in rows."""
    from onnx.reference import ReferenceEvaluator

    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    del proto.graph.output[:]
    for name in STOPS:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    found = ReferenceEvaluator(proto).run(None, {"x": x})
    return {n: v.reshape(-1, v.shape[-1]) for n, v in zip(STOPS, found, strict=True)}


def test_moments_follow_the_weights_that_are_replaced(tmp_path: Path) -> None:
    path = _residual(tmp_path)
    model = Model.load(path)
    samples = _samples(tmp_path, model)
    x = np.load(tmp_path / "d.npz")["x"]
    plain = _values(path, x, {})
    changed: dict[str, np.ndarray] = {}
    with Staged(Segments(model, STOPS), samples) as staged:
        for stop, weight in zip(STOPS, ("a0", "b0", None, "b1", None), strict=True):
            found = staged.moments(stop)["gram"][0]
            full, other = plain[stop], _values(path, x, changed)[stop]
            rows = len(full)
            for got, expected in (
                (found.full, full.T @ full),
                (found.rounded, other.T @ other),
                (found.cross, other.T @ full),
            ):
                # float32 sums of 12 rows, another order: 12 x 2^-24 of the largest, and some.
                np.testing.assert_allclose(got, expected / rows, rtol=1e-5, atol=1e-5)
            if weight is not None:
                stored = next(t for t in onnx.load(path).graph.initializer if t.name == weight)
                changed[weight] = np.round(onnx.numpy_helper.to_array(stored) * 4) / 4
                staged.replace(weight, changed[weight])
    assert len(changed) == 3


def test_before_anything_is_rounded_there_is_one_run(tmp_path: Path) -> None:
    model = Model.load(_residual(tmp_path))
    with Staged(Segments(model, STOPS), _samples(tmp_path, model)) as staged:
        found = staged.moments("n1")["gram"][0]  # stops may be left out
        assert found.full is found.rounded is found.cross
        with pytest.raises(ValueError, match="r0"):
            staged.moments("r0")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    model = Model.load(_residual(tmp_path))
    with Staged(Segments(model, STOPS), _samples(tmp_path, model)) as staged:
        staged.moments("r1")
        kept = sorted(p.name for p in (tmp_path / "tmp").rglob("*") if p.is_file())
        # s1 and s0 for the body, r1 for the product behind it: three tensors of three samples.
        assert len(kept) <= 12
    assert not list((tmp_path / "tmp").iterdir())


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = Model.load(_residual(tmp_path))
    with Staged(Segments(model, STOPS), _samples(tmp_path, model)) as staged:
        staged.moments("n0")
        staged.replace("a0", np.full((8, 12), np.inf, np.float32))
        with pytest.raises(OnnxqError, match=r"'r0' is not finite in sample 0"):
            staged.moments("r0")
