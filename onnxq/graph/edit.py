"""The verbs that change a graph. Nothing else may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import Array, onnx_dtype, payload_bytes, to_bytes
from onnxq.graph.model import Model
from onnxq.graph.query import label, live_nodes, makers, needed_nodes
from onnxq.graph.weights import DerivedValues, InlineValues
from onnxq.graph.wire import STRIP_THRESHOLD


class Editor:
    """Edits one model; keeps new names unique and the node order topological.

    New nodes are collected and placed by `finish`, which must be called once at the end.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._names = model.names()
        self._counts: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """`name`, or `name_2`, `name_3`, ...: the first that nothing has."""
        candidate, count = name, self._counts.get(name, 1)
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._counts[name] = count
        self._names.add(candidate)
        return candidate

    def constant(self, name: str, values: Array, onnx_type: int | None = None) -> gs.Constant:
        """A new small constant, held in memory."""
        onnx_type = onnx_dtype(values.dtype) if onnx_type is None else onnx_type
        if payload_bytes(onnx_type, values.shape) >= STRIP_THRESHOLD:
            return self.derived(name, onnx_type, values.shape, lambda: values)
        tensor = onnx.TensorProto(name=self.unique(name), data_type=onnx_type, dims=values.shape)
        tensor.raw_data = bytes(to_bytes(values, onnx_type))
        return gs.Constant(tensor.name, InlineValues(tensor))

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
        domain: str = "",
        **attrs: Any,
    ) -> gs.Tensor:
        """Add a node with one output and give that output back.

        Args:
            like: a node whose metadata (module path, stack trace) the new one shares.
        """
        out = self.variable(output, dtype, shape)
        self.add(gs.Node(op, name, attrs, list(inputs), [out], domain=domain or None), like)
        return out

    def variable(self, name: str, dtype: Any, shape: Sequence[Any] | None) -> gs.Variable:
        """A new tensor under a name that nothing has."""
        return gs.Variable(self.unique(name), dtype=dtype, shape=shape)

    def add(self, node: gs.Node, like: gs.Node | None = None) -> None:
        """Add a node, renamed if its name is taken, and import its domain."""
        node.name = self.unique(node.name)
        imports = self.model.header.opset_import
        if node.domain and all(entry.domain != node.domain for entry in imports):
            imports.add(domain=node.domain, version=1)
        self.model.graph.nodes.append(node)
        if like is not None:
            self.model.inherit_metadata(node, like)

    def replace_input(self, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Let input `index` of `node` read `tensor`."""
        node.inputs[index] = tensor

    def redirect(self, old: gs.Tensor, new: gs.Tensor, keep: Sequence[gs.Node] = ()) -> None:
        """Let every consumer of `old` read `new`; a graph output keeps its name and gets `new`.

        Bodies of If, Loop and Scan go on reading `old`: they are not touched.
        """
        if any(t is old for t in self.model.graph.outputs):
            self._put_out(old, new)
        for consumer in list(old.outputs):
            if any(consumer is k for k in keep):
                continue
            for index, tensor in enumerate(consumer.inputs):
                if tensor is old:
                    consumer.inputs[index] = new

    def _put_out(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let the graph output that `old` is be `new`, under its name."""
        graph, captured = self.model.graph, self.model.captured_names()
        bound = any(t is new for t in graph.outputs) or not new.inputs or new.name in captured
        if bound or old.name in captured:  # its own name must stay: a node gives it the other
            out = gs.Variable(old.name, dtype=old.dtype, shape=old.shape)
            old.name = self.unique(old.name)
            node = gs.Node("Identity", self.unique(f"{out.name}_Identity"), {}, [new], [out])
            graph.nodes.append(node)
            new = out
        else:
            old.name, new.name = new.name, old.name
        graph.outputs = [new if t is old else t for t in graph.outputs]

    def set_attribute(self, node: gs.Node, name: str, value: Any) -> None:
        """Change an attribute of a node (None removes it)."""
        if value is None:
            node.attrs.pop(name, None)
        else:
            node.attrs[name] = value
        if id(node) in self.model.origins:
            self.model.edited.setdefault(id(node), set()).add(name)

    def finish(self) -> None:
        """Drop what nothing reads any more, and put the nodes in topological order."""
        remove_dead(self.model)
        sort_nodes(self.model)


def remove_dead(model: Model) -> int:
    """Remove nodes that lead to no output, and weights nothing reads; returns how many nodes."""
    graph = model.graph
    alive = live_nodes(model)
    dead = [n for n in graph.nodes if id(n) not in alive]
    for node in dead:
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes = [n for n in graph.nodes if id(n) in alive]
    model.unread.clear()
    return len(dead)


def is_sorted(model: Model) -> bool:
    """Whether every node stands behind the nodes it needs."""
    made_by, seen = makers(model), set()
    for node in model.graph.nodes:
        if any(id(needed) not in seen for needed in needed_nodes(model, node, made_by)):
            return False
        seen.add(id(node))
    return True


def sort_nodes(model: Model) -> None:
    """Topological order that moves as few nodes as possible: each before its first reader.

    Raises:
        OnnxqError: the graph has a cycle.
    """
    made_by = makers(model)
    order: list[gs.Node] = []
    waiting: dict[int, bool] = {}  # id(node) -> whether it waits for what it needs, or is placed
    for root in model.graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if id(node) in waiting:
                stack.pop()
                if waiting[id(node)]:
                    waiting[id(node)] = False
                    order.append(node)
                continue
            waiting[id(node)] = True
            for needed in reversed(needed_nodes(model, node, made_by)):
                if waiting.get(id(needed)):
                    raise OnnxqError(
                        f"the graph has a cycle through node {label(needed)!r}",
                        "an ONNX graph must be acyclic; export again",
                    )
                if id(needed) not in waiting:
                    stack.append(needed)
    model.graph.nodes = order
