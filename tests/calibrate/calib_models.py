"""Tiny models for the calibration tests, and the `make_model` that the graph room would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MakeModel = Callable[[Sequence[str]], tuple[bytes, Path]]


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, Sequence[int | str | None]]],
    outputs: dict[str, int],
    weights: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A model from {input: (type, shape)}, {output: type} and {initializer: array}."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def chain(layers: int = 3, width: int = 8, seed: int = 0) -> onnx.ModelProto:
    """x [batch, seq, width] -> `layers` times MatMul, Relu: tensors h0, a0, h1, a1, ..."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], {}, "x"
    for i in range(layers):
        weights[f"w{i}"] = rng.standard_normal((width, width)).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"a{i}"]))
        last = f"a{i}"
    return model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", "seq", width])},
        {last: TensorProto.FLOAT},
        weights,
    )


def maker(
    proto: onnx.ModelProto, folder: Path, types: dict[str, int] | None = None
) -> tuple[MakeModel, list[list[str]]]:
    """`make_model` over `proto`, and the list of what it was asked for."""
    asked: list[list[str]] = []

    def make(outputs: Sequence[str]) -> tuple[bytes, Path]:
        asked.append(list(outputs))
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        producers = {o: n for n in copy.graph.node for o in n.output}
        needed, todo = set(), list(outputs)
        while todo:
            node = producers.get(todo.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                todo += node.input
        kept = [n for n in copy.graph.node if id(n) in needed]
        del copy.graph.node[:], copy.graph.output[:]
        copy.graph.node.extend(kept)
        for name in outputs:
            kind = (types or {}).get(name, TensorProto.FLOAT)
            copy.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        return copy.SerializeToString(), folder

    return make, asked
