"""A model under mutation: what can be picked in it, and put into it."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

_FIRST_ONLY = (
    *("QuantizeLinear", "DequantizeLinear", "Reshape", "Slice", "Gather", "Unsqueeze", "Squeeze"),
    *("Expand", "Resize", "Clip", "Pad", "ReduceMax", "ReduceMean", "ReduceSum", "Split", "Tile"),
)


class Mutant:
    """A model, and what was done to it."""

    def __init__(self, model: onnx.ModelProto, seed: int) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.random = np.random.default_rng(seed)
        self.done: list[str] = []
        inferred = shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        self.ranks = {
            v.name: len(v.type.tensor_type.shape.dim)
            for v in values
            if v.type.tensor_type.HasField("shape")
        }
        self.types |= {t.name: t.data_type for t in self.graph.initializer}
        self.ranks |= {t.name: len(t.dims) for t in self.graph.initializer}
        self._count = 0

    def pick(self, items: list) -> object:
        return items[int(self.random.integers(len(items)))]

    def name(self) -> str:
        self._count += 1
        return f"mutant_{len(self.done)}_{self._count}"

    def add(self, array: np.ndarray, kind: int | None = None) -> str:
        name = self.name()
        if kind is None or kind == helper.np_dtype_to_tensor_dtype(array.dtype):
            self.graph.initializer.append(numpy_helper.from_array(array, name))
        else:
            raw = array.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
            self.graph.initializer.append(
                helper.make_tensor(name, kind, array.shape, raw, raw=True)
            )
        self.types[name] = kind or helper.np_dtype_to_tensor_dtype(array.dtype)
        return name

    def nodes(self, *ops: str) -> list[onnx.NodeProto]:
        return [n for n in self.graph.node if n.op_type in ops]

    def edges(self, *kinds: int) -> list[tuple[onnx.NodeProto, int]]:
        """(reader, input index) of computed tensors of these types, shapes and axes left out."""
        made = {name for n in self.graph.node for name in n.output}
        found = []
        for node in self.graph.node:
            data = node.input[:1] if node.op_type in _FIRST_ONLY else node.input
            for index, name in enumerate(data):
                if name in made and self.types.get(name) in kinds:
                    found.append((node, index))
        return found

    def before(
        self, reader: onnx.NodeProto, index: int, op: str, more: list[str], **attrs: object
    ) -> str:
        """Insert a node into an edge; its output has the edge's type and rank."""
        source = reader.input[index]
        name = self.name()
        node = helper.make_node(op, [source, *more], [f"{name}_out"], name=name, **attrs)
        position = next(i for i, n in enumerate(self.graph.node) if n is reader or n == reader)
        self.graph.node.insert(position, node)
        reader_now = self.graph.node[position + 1]
        reader_now.input[index] = f"{name}_out"
        self.types[f"{name}_out"] = self.types.get(source, 0)
        if source in self.ranks:
            self.ranks[f"{name}_out"] = self.ranks[source]
        return name

    def reader(self, name: str) -> tuple[onnx.NodeProto, int]:
        """The first reader of a node's output."""
        for node in self.graph.node:
            for index, tensor in enumerate(node.input):
                if tensor == f"{name}_out":
                    return node, index
        raise AssertionError(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a constant; () where there is none of that name."""
        found = [tuple(t.dims) for t in self.graph.initializer if t.name == name]
        if found:
            return found[0]
        for node in self.graph.node:
            if node.op_type == "Constant" and name in node.output:
                return tuple(node.attribute[0].t.dims)
        return ()
