"""A model whose layers are rounded or not by a switch each, an input of the model.

One session then tells what the outputs lose with any choice of layers rounded. What a layer reads,
activation and weight, goes through `Where(switch, rounded, exact)`; ONNX Runtime rounds the weights
when it loads the model, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxq.formats import QuantFormat
from onnxq.graph.ir import Node
from onnxq.graph.model import Model
from onnxq.graph.query import type_number

SWITCHES = "onnxq_switches"
"""The input: bool [layers], true where a layer is rounded."""
SIZES = "onnxq_sizes"
"""An output beside the model's own: how many elements each layer gives, int64 [layers]."""


@dataclass(frozen=True)
class Switched:
    """A layer that can be switched.

    Attributes:
        node: it reads its activation first, its weight second.
        weights: format of the weight.
        weight_step: what a code of each element is worth, broadcast against the weight.
        inputs: format of the activation.
        step: what a code is worth; None: computed from the largest magnitude along `axes`.
        center: what is subtracted before the activation is rounded, and added to it again.
        axes: what has one scale together, where it is computed.
    """

    node: Node
    weights: QuantFormat
    weight_step: np.ndarray[Any, Any]
    inputs: QuantFormat
    step: float | None
    center: float = 0.0
    axes: tuple[int, ...] = (-1,)


def with_switches(model: Model, layers: Sequence[Switched]) -> tuple[bytes, Path]:
    """The model for a session, and the folder of its weights; its own outputs come first."""
    proto, folder = model.session_proto()
    graph = proto.graph
    writer = _Writer(graph)
    before: dict[str, list[onnx.NodeProto]] = {}
    made = {node.output[0]: node for node in graph.node if node.output}
    sizes = []
    for index, layer in enumerate(layers):
        name = layer.node.outputs[0].name
        node = made[name]
        kinds = type_number(layer.node.inputs[0]), type_number(layer.node.inputs[1])
        switch = writer.switch(index)
        exact = node.input[0], node.input[1]
        node.input[0] = writer.op(
            "Where", switch, writer.input(exact[0], layer, kinds[0]), exact[0]
        )
        node.input[1] = writer.op(
            "Where", switch, writer.weight(exact[1], layer, kinds[1]), exact[1]
        )
        before[name] = writer.take()
        shape = writer.op("Shape", name)
        sizes.append(writer.op("ReduceProd", shape, keepdims=1))
    writer.op("Concat", *sizes, output=SIZES, axis=0)
    nodes = [n for old in graph.node for n in (*before.get(old.output[0], ()), old)]
    nodes += writer.take()
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(writer.constants)
    switches = onnx.helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(layers)])
    graph.input.append(switches)
    graph.output.append(onnx.helper.make_tensor_value_info(SIZES, TensorProto.INT64, [len(layers)]))
    return proto.SerializeToString(deterministic=True), folder


class _Writer:
    """Nodes with names of their own, in the order they are made."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._count = 0
        self._rounded: dict[tuple[Any, ...], str] = {}

    def take(self) -> list[onnx.NodeProto]:
        """The nodes made since the last time."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def op(self, kind: str, *inputs: str, output: str = "", **attrs: Any) -> str:
        self._count += 1
        output = output or f"onnxq_switch_{self._count}"
        self._nodes.append(onnx.helper.make_node(kind, inputs, [output], **attrs))
        return output

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        self._count += 1
        name = f"onnxq_switch_{self._count}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, name: str, layer: Switched, kind: int) -> str:
        step = self.constant(layer.weight_step)
        wide = self._to(name, kind, TensorProto.FLOAT)
        return self._to(self._nearest(wide, step, layer.weights), TensorProto.FLOAT, kind)

    def switch(self, index: int) -> str:
        return self.op("Gather", SWITCHES, self.constant(index, np.int64), axis=0)

    def input(self, name: str, layer: Switched, kind: int) -> str:
        key = (name, layer.inputs, layer.step, layer.center, layer.axes)
        if key not in self._rounded:
            wide = self._to(name, kind, TensorProto.FLOAT)
            step = self.constant(layer.step) if layer.step else self._step(wide, layer)
            center = self.constant(layer.center)
            rounded = self._nearest(self.op("Sub", wide, center), step, layer.inputs)
            rounded = self.op("Add", rounded, center)
            self._rounded[key] = self._to(rounded, TensorProto.FLOAT, kind)
        return self._rounded[key]

    def _step(self, name: str, layer: Switched) -> str:
        """The largest magnitude that shares a scale, over the largest code."""
        axes = self.constant(layer.axes, np.int64)
        peak = self.op("ReduceMax", self.op("Abs", name), axes, keepdims=1)
        least = self.op("Max", peak, self.constant(np.float32(2.0**-100)))
        return self.op("Div", least, self.constant(layer.inputs.qmax))

    def _nearest(self, name: str, step: str, fmt: QuantFormat) -> str:
        codes = self.op("Div", name, step)
        low, high = self.constant(fmt.qmin), self.constant(fmt.qmax)
        codes = self.op("Clip", codes, low, high)
        if fmt.is_float:
            narrow = self.op("Cast", codes, to=TensorProto.DataType.Value(fmt.onnx_type))
            codes = self.op("Cast", narrow, to=TensorProto.FLOAT)
        else:
            codes = self.op("Round", codes)
        return self.op("Mul", codes, step)

    def _to(self, name: str, old: int, new: int) -> str:
        return name if old == new else self.op("Cast", name, to=new)
