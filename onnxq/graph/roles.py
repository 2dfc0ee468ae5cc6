"""Which layers come first and last; by id of the node."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.query import producer

_LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_TO_OUTPUT = frozenset(
    (
        *("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"),
        *("Gather", "GatherND", "ArgMax", "TopK", "Softmax", "LogSoftmax", "Sigmoid", "Tanh"),
        *("Clip", "Add", "Sub", "Mul", "Div", "Concat", "Split", "Exp"),
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
        if node.op in _LAYERS:
            found.add(id(node))
        elif node.op in _TO_OUTPUT:
            computed = [t for t in node.inputs if not isinstance(t, gs.Constant)]
            joins = node.op in ("Add", "Sub", "Mul", "Div") and len(computed) == 2
            if not (joins and joined):
                followed = computed if joins or node.op == "Concat" else computed[:1]
                stack.extend((t, joined or joins) for t in followed)
    return frozenset(found)


def first_convolutions(model: Model) -> frozenset[int]:
    """Convolutions before which nothing is learned: they read a graph input, scaled or resized."""
    found, learned = set(), set()
    for node in model.graph.nodes:
        sources = [p for t in node.inputs if (p := producer(t)) is not None]
        behind = any(id(p) in learned or p.op in _LAYERS for p in sources)
        if behind:
            learned.add(id(node))
        elif node.op == "Conv":
            found.add(id(node))
    return frozenset(found)
