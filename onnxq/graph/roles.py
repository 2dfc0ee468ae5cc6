"""Which layers come first and last; by id of the node."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.query import producer

_TO_OUTPUT = frozenset(
    (
        *("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"),
        *("Gather", "GatherND", "ArgMax", "TopK", "Softmax", "LogSoftmax", "Sigmoid", "Tanh"),
        *("Clip", "Add", "Sub", "Mul", "Div"),
    )
)


def last_layers(model: Model) -> frozenset[int]:
    """Multiplying nodes that reach a graph output through elementwise and layout nodes only.

    At most one of those may join two computed tensors: behind a final residual addition lies the
    last layer of its branch, behind the next one another block.
    """
    found: set[int] = set()
    seen: set[int] = set()
    stack = [(t, False) for t in model.graph.outputs]
    while stack:
        tensor, joined = stack.pop()
        node = producer(tensor)
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in ("MatMul", "Gemm", "Conv"):
            found.add(id(node))
        elif node.op in _TO_OUTPUT:
            computed = [t for t in node.inputs if not isinstance(t, gs.Constant)]
            joins = node.op in ("Add", "Sub", "Mul", "Div") and len(computed) == 2
            if not (joins and joined):
                followed = computed if joins else computed[:1]
                stack.extend((t, joined or joins) for t in followed)
    return frozenset(found)


def first_convolutions(model: Model) -> frozenset[int]:
    inputs = {id(t) for t in model.graph.inputs}
    found = set()
    for node in model.graph.nodes:
        if node.op == "Conv":
            tensor = node.inputs[0]
            source = producer(tensor)
            while source is not None and source.op in (
                "Cast",
                "Sub",
                "Div",
                "Mul",
                "Add",
                "Transpose",
            ):
                tensor = source.inputs[0]
                source = producer(tensor)
            if id(tensor) in inputs:
                found.add(id(node))
    return frozenset(found)
