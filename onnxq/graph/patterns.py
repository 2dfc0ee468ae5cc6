"""Which FP32 nodes must not be computed in 16 bits, told by what they are part of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, label, producer, scalar

HUNGRY = {
    "Exp": "grows without bound",
    "Log": "loses itself near 0 and 1",
    "Pow": "powers leave the range",
    "Softplus": "is an exponential",
    "CumSum": "sums run out of the range",
    "ReduceSum": "sums run out of the range",
    "ReduceProd": "products run out of the range",
    "ReduceSumSquare": "squares leave the range",
    "ReduceL2": "squares leave the range",
    "ReduceLogSum": "sums run out of the range",
    "ReduceLogSumExp": "is an exponential",
}
"""Operators that need FP32's range (FP16) or digits (BF16) whatever the data. Softmax is not here:
TensorRT's fused attention and ONNX Runtime both compute it in FP32 inside."""

LAYOUT = frozenset(
    (
        *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"),
        *("Slice", "Gather", "GatherND", "GatherElements", "Split", "Concat", "Pad", "Trilu"),
    )
)
"""Operators that move values and change none."""

_LIGHT = LAYOUT | {"Add", "Sub", "Neg", "Mul", "Max", "Abs"}
_BOUNDING = frozenset(
    ("Div", "Reciprocal", "Sqrt", "Log", "Tanh", "Sigmoid", "Erf", "Clip", "Min", "Softmax")
)
_AFTER_SQUARE = frozenset(
    ("ReduceMean", "Add", "Sub", "Sqrt", "Reciprocal", "Max", "Clip", "Pow", "Cast", "Expand")
)
_ANGLE = frozenset(
    (
        *("Mul", "Add", "Sub", "Div", "Neg", "Exp", "Pow", "MatMul", "Einsum", "Range", "Cast"),
        *("Unsqueeze", "Squeeze", "Reshape", "Expand", "Concat", "Transpose", "Identity"),
        *("Slice", "Gather"),
    )
)


def norms(model: Model) -> Iterator[gs.Node]:
    """Square, mean, epsilon, root, reciprocal and the product with x, of a norm spelled out."""
    for node in model.graph.nodes:
        if not _is_square(node):
            continue
        chain = [c for c in node.outputs[0].outputs if c.op in ("ReduceMean", "ReduceSum")]
        if not chain:
            continue
        yield node
        seen: set[int] = set()
        while chain:
            current = chain.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            yield current
            if current.op == "Sub":  # mean(x^2) - mean(x)^2
                sources = [producer(t) for t in current.inputs]
                yield from (s for s in sources if s is not None and _is_square(s))
            for consumer in current.outputs[0].outputs:
                if consumer.op in _AFTER_SQUARE:
                    chain.append(consumer)
                elif consumer.op in ("Mul", "Div") and id(consumer) not in seen:
                    seen.add(id(consumer))
                    yield consumer


def _is_square(node: gs.Node) -> bool:
    if node.op == "Pow":
        return scalar(node.inputs[1]) == 2.0
    return node.op == "Mul" and node.inputs[0] is node.inputs[1]


def angles(model: Model) -> Iterator[gs.Node]:
    """Sin, Cos and the elementwise arithmetic that leads to them from positions or timesteps.

    A sine of what layers computed is an activation function like any other, and no angle.
    """
    learned = _learned(model)
    stack = [n for n in model.graph.nodes if n.op in ("Sin", "Cos") and id(n) not in learned]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        for tensor in node.inputs:
            source = producer(tensor)
            if source is not None and source.op in _ANGLE:
                stack.append(source)


def _learned(model: Model) -> set[int]:
    """Nodes that depend on what a layer or an embedding computed."""
    stack = [n for n in model.graph.nodes if _is_layer(n)]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) not in seen:
            seen.add(id(node))
            stack.extend(c for t in node.outputs for c in t.outputs)
    return seen


def _is_layer(node: gs.Node) -> bool:
    if node.op in ("Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN"):
        return True
    if node.op == "MatMul":
        # frequencies x positions is a product too, over an axis of length 1
        operand = constant_operand(node, 1)
        return operand is not None and len(operand.shape) > 1 and operand.shape[-2] > 1
    return node.op == "Gather" and constant_operand(node, 0) is not None and _is_embedding(node)


def _is_embedding(gather: gs.Node) -> bool:
    operand = constant_operand(gather, 0)
    return operand is not None and len(operand.shape) == 2 and min(operand.shape) > 1


def unbounded(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """What stands between an operator that leaves the range and one that brings it back.

    Such as Add in log(1 + exp(x)): exp(x) fits FP32, and infinity is what 16 bits make of it.
    """
    for node in model.graph.nodes:
        if node.op not in ("Exp", "Pow", "ReduceSum", "ReduceProd", "ReduceSumSquare", "CumSum"):
            continue
        for path in _paths_to_bound(node, 4):
            for inner in path:
                yield inner, f"{label(node)!r}, on which it depends, may leave the range"


def _paths_to_bound(node: gs.Node, depth: int) -> Iterator[tuple[gs.Node, ...]]:
    for tensor in node.outputs[:1]:
        for consumer in tensor.outputs:
            if consumer.op in _BOUNDING:
                yield (consumer,)
            elif consumer.op in _LIGHT and depth and not _is_product(consumer):
                for path in _paths_to_bound(consumer, depth - 1):
                    yield (consumer, *path)


def _is_product(node: gs.Node) -> bool:
    return node.op == "Mul" and not any(isinstance(t, gs.Constant) for t in node.inputs)


def guarded(
    model: Model, kept: Collection[int], is_wide: Callable[[gs.Tensor], bool]
) -> Iterator[tuple[gs.Node, str]]:
    """Roots, logarithms, reciprocals and quotients of what a kept node guards against 0.

    In graph order: the caller keeps each before it asks for the next, so that the quotient by a
    root of a guarded sum is found.
    """
    for node in model.graph.nodes:
        if node.op in ("Div", "Reciprocal", "Sqrt", "Log") and any(map(is_wide, node.outputs)):
            guard = producer(node.inputs[-1])
            while guard is not None and guard.op in LAYOUT:
                guard = producer(guard.inputs[0])
            if guard is not None and id(guard) in kept:
                what = "divides by" if node.op in ("Div", "Reciprocal") else "reads"
                yield node, f"{what} {label(guard)!r}, which stays FP32"


def between(
    model: Model, kept: Collection[int], is_wide: Callable[[gs.Tensor], bool]
) -> Iterator[tuple[gs.Node, str]]:
    """Layout nodes and Casts whose way to 16 bits and back would cost two Casts and digits.

    The caller asks again until nothing is found: what one keeps, the next stands beside.
    """
    outputs = {id(t) for t in model.graph.outputs}
    for node in model.graph.nodes:
        if id(node) in kept or not node.outputs or not is_wide(node.outputs[0]):
            continue
        readers = [c for t in node.outputs for c in t.outputs if c.op not in ("Shape", "Size")]
        if not all(id(c) in kept for c in readers):
            continue
        if node.op == "Cast" and not is_wide(node.inputs[0]):
            if readers or any(id(t) in outputs for t in node.outputs):
                yield node, "all that read it stay FP32"
        elif node.op in LAYOUT and readers and not any(id(t) in outputs for t in node.outputs):
            sources = [producer(t) for t in node.inputs if is_wide(t)]
            if all(s is not None and id(s) in kept for s in sources):
                yield node, "between nodes that stay FP32"
