"""The verbs that change a graph. Nothing else may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.query import label
from onnxq.graph.weights import Array, DerivedValues, onnx_dtype, payload_bytes
from onnxq.graph.wire import STRIP_THRESHOLD


class Editor:
    """Edits one model; keeps new names unique and the node order topological.

    New nodes are collected and placed by `finish`, which must be called once at the end.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._names = set(model.graph.tensors())
        self._names |= {n.name for n in model.graph.nodes}

    def unique(self, name: str) -> str:
        """`name`, or `name_2`, `name_3`, ...: the first that nothing has."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def constant(self, name: str, values: Array, onnx_type: int | None = None) -> gs.Constant:
        """A new small constant, held in memory."""
        onnx_type = onnx_dtype(values.dtype) if onnx_type is None else onnx_type
        if values.nbytes >= STRIP_THRESHOLD:
            return self.derived(name, onnx_type, values.shape, lambda: values)
        tensor = gs.Constant(self.unique(name), np.zeros(0, np.uint8))
        proto = DerivedValues(tensor.name, onnx_type, tuple(values.shape), lambda: values).tensor
        proto.ClearField("data_location")
        proto.raw_data = np.ascontiguousarray(values).tobytes()
        tensor._values = _Inline(proto)
        return tensor

    def derived(
        self,
        name: str,
        onnx_type: int,
        shape: Sequence[int],
        produce: Callable[[], Array],
        origin: gs.Constant | None = None,
    ) -> gs.Constant:
        """A new constant whose values are computed when they are written."""
        name = self.unique(name)
        values = DerivedValues(name, onnx_type, tuple(shape), produce, origin)
        return gs.Constant(name, values)

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor],
        output: str,
        dtype: Any,
        shape: Sequence[Any] | None = None,
        like: gs.Node | None = None,
        **attrs: Any,
    ) -> gs.Tensor:
        """Add a node with one output and give that output back.

        Args:
            like: a node whose metadata (module path, stack trace) the new one shares.
        """
        out = gs.Variable(self.unique(output), dtype=dtype, shape=shape)
        new = gs.Node(op, self.unique(name), attrs, list(inputs), [out])
        self.model.graph.nodes.append(new)
        if like is not None:
            self.model.inherit_metadata(new, like)
        return out

    def replace_input(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Let input `index` of `node` read `tensor`."""
        node.inputs[index] = tensor

    def redirect(self, old: gs.Tensor, new: gs.Tensor, keep: Sequence[gs.Node] = ()) -> None:
        """Let every consumer of `old` read `new`, and graph outputs keep their name.

        A graph output's name is part of the interface: there, `old` and `new` swap names.
        """
        outputs = self.model.graph.outputs
        if any(t is old for t in outputs):
            old_name, new_name = old.name, new.name
            self.model.graph.outputs = [new if t is old else t for t in outputs]
            old.name, new.name = new_name, old_name
        for consumer in list(old.outputs):
            if any(consumer is k for k in keep):
                continue
            for index, tensor in enumerate(consumer.inputs):
                if tensor is old:
                    consumer.inputs[index] = new

    def set_attribute(self, node: gs.Node, name: str, value: Any) -> None:
        """Change an attribute of an imported node (None removes it)."""
        if value is None:
            node.attrs.pop(name, None)
        else:
            node.attrs[name] = value
        self.model.edited.add(id(node))

    def finish(self) -> None:
        """Drop what nothing reads any more, and put the nodes in topological order."""
        remove_dead(self.model)
        sort_nodes(self.model)


class _Inline(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """A ready TensorProto; unlike its base it knows every type that `weights` knows."""

    def __init__(self, proto: Any) -> None:
        self.tensor = proto
        self.shape = tuple(proto.dims)
        self.dtype = DerivedValues("", proto.data_type, self.shape, lambda: np.zeros(0)).dtype
        self.nbytes = payload_bytes(proto.data_type, self.shape)


def remove_dead(model: Model) -> int:
    """Remove nodes that lead to no output; returns how many.

    Nodes without outputs anyone could read but with a body or no output at all stay.
    """
    graph = model.graph
    outputs = {t.name for t in graph.outputs}
    removed = 0
    for node in _reverse_topological(graph):
        used = any(t.outputs or t.name in outputs for t in node.outputs)
        if node.outputs and not used:
            node.inputs.clear()
            node.outputs.clear()
            removed += 1
            node.op = "onnxq::dead"
    if removed:
        graph.nodes = [n for n in graph.nodes if n.op != "onnxq::dead"]
    return removed


def _reverse_topological(graph: gs.Graph) -> list[gs.Node]:
    return list(reversed(_sorted(graph)))


def sort_nodes(model: Model) -> None:
    """Topological order that moves as few nodes as possible.

    Raises:
        OnnxqError: the graph has a cycle.
    """
    model.graph.nodes = _sorted(model.graph)


def _sorted(graph: gs.Graph) -> list[gs.Node]:
    order: list[gs.Node] = []
    state: dict[int, int] = {}
    mine = {id(n) for n in graph.nodes}
    for root in graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if state.get(id(node)) == 2:
                stack.pop()
                continue
            if state.get(id(node)) == 1:
                state[id(node)] = 2
                order.append(node)
                stack.pop()
                continue
            state[id(node)] = 1
            for needed in reversed(list(_needs(node))):
                if id(needed) in mine and state.get(id(needed), 0) < 2:
                    if state.get(id(needed)) == 1:
                        raise OnnxqError(
                            f"the graph has a cycle through node {label(needed)!r}",
                            "an ONNX graph must be acyclic; export again",
                        )
                    stack.append(needed)
    return order


def _needs(node: gs.Node) -> list[gs.Node]:
    """Producers of the inputs, and of what the node's bodies capture."""
    needed = [p for t in node.inputs for p in t.inputs]
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for inner in attribute.nodes:
                needed.extend(_needs(inner))
            needed.extend(p for t in attribute.outputs for p in t.inputs)
    return needed
