"""What the tensors of a graph weigh on a sample, without running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import shape_inference

from onnxq.errors import OnnxqError
from onnxq.graph.check import TOOL_ERRORS, located, tool_reason
from onnxq.graph.dtypes import is_known, numpy_dtype
from onnxq.graph.excerpt import is_standard
from onnxq.graph.exporting import export
from onnxq.graph.model import Model
from onnxq.graph.names import nested_nodes

Measure = Callable[[Sequence[str]], Mapping[str, tuple[int, ...]]]
_ROUNDS = 12
"""Of inference; what is lost behind that many is taken to be long throughout."""

Sized = tuple[tuple[int, ...], np.dtype[np.generic]]


def tensor_sizes(
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    measure: Measure = lambda names: {},
) -> dict[str, Sized]:
    """(shape, dtype) of every tensor the main graph computes, for inputs of these shapes.

    What is no tensor is left out.

    Args:
        measure: gives the shapes of tensors whose makers inference does not see through (a Range,
            say), of those that are cheap to run. Where it does not either, an unknown dimension is
            taken to be the longest of the inputs'.

    Raises:
        OnnxqError: the graph contradicts these shapes.
    """
    proto = export(model, bare=True)
    for value in proto.graph.input:
        if value.name in shapes:
            del value.type.tensor_type.shape.dim[:]
            for size in shapes[value.name]:
                value.type.tensor_type.shape.dim.add(dim_value=size)
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    for node in nested_nodes(proto.graph.node):
        # Inference knows nothing of it; its output is as its first input.
        if node.op_type == "GroupNormalization" and is_standard(node):
            node.op_type = "InstanceNormalization"
    longest = max((size for shape in shapes.values() for size in shape), default=1)
    try:
        with located(model.path):
            known = _inferred(proto, longest, measure)
    except TOOL_ERRORS as error:
        raise OnnxqError(
            f"shape inference fails: {tool_reason(error)}", "does the data fit the model?"
        ) from None
    found: dict[str, Sized] = {}
    for node in proto.graph.node:
        for name in filter(None, node.output):
            kind = known.get(name)
            if kind is None:
                found[name] = (longest,), np.dtype(np.float32)
            elif kind.HasField("tensor_type") and is_known(kind.tensor_type.elem_type):
                found[name] = _shape(kind, longest), numpy_dtype(kind.tensor_type.elem_type)
    return found


def _inferred(proto: onnx.ModelProto, longest: int, measure: Measure) -> dict[str, onnx.TypeProto]:
    """Types by name. A shape that inference loses is measured or guessed, and what comes behind
    inferred from that."""
    known: dict[str, onnx.TypeProto] = {}
    for _ in range(_ROUNDS):
        inferred = shape_inference.infer_shapes(proto, data_prop=True).graph
        known = {v.name: v.type for v in (*inferred.value_info, *inferred.output)}
        lost: set[str] = set()
        first: list[str] = []
        for node in proto.graph.node:
            unsure = [n for n in node.output if n in known and not _is_sure(known[n])]
            if not lost & {*node.input}:
                first += unsure
            lost.update(unsure)
        if not lost:
            break
        measured = measure(first)
        for name in first:
            value = proto.graph.value_info.add(name=name, type=known[name])
            _fix(value.type.tensor_type, measured.get(name), longest)
    return known


def _fix(kind: onnx.TypeProto.Tensor, shape: tuple[int, ...] | None, longest: int) -> None:
    if shape is not None or not kind.HasField("shape"):
        del kind.shape.dim[:]
        for size in shape if shape is not None else (longest,):
            kind.shape.dim.add(dim_value=size)
    for dim in kind.shape.dim:
        if not dim.HasField("dim_value"):
            dim.dim_value = longest


def _is_sure(kind: onnx.TypeProto) -> bool:
    tensor = kind.tensor_type
    sized = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
    return sized or not kind.HasField("tensor_type")


def _shape(kind: onnx.TypeProto, longest: int) -> tuple[int, ...]:
    if not kind.tensor_type.HasField("shape"):
        return (longest,)
    dims = kind.tensor_type.shape.dim
    return tuple(int(d.dim_value) if d.HasField("dim_value") else longest for d in dims)


def weight(sized: Sized) -> int:
    """Bytes."""
    return math.prod(sized[0]) * sized[1].itemsize
