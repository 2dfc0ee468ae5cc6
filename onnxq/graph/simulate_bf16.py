"""BF16 as FP32 that is rounded to BF16 behind every operator, for where BF16 has no kernels.

Each operator reads and sums in FP32, as tensor cores do, and its result is rounded as the file's
types say. What only moves or selects values needs no rounding. Inputs and outputs keep their type.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import Array, from_bytes, graph_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.prepare import infer_types
from onnxq.graph.query import type_number
from onnxq.graph.weights import Values, constant_type, original

_T = onnx.TensorProto
_BF16, _FP32 = int(_T.BFLOAT16), int(_T.FLOAT)
_NUMPY_FP32 = np.dtype(np.float32)

_EXACT = frozenset(
    (
        *("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
        *("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Expand", "Tile"),
        *("Pad", "Where", "DepthToSpace", "SpaceToDepth", "ConstantOfShape", "Compress"),
        *("Relu", "Abs", "Neg", "Max", "Min", "Clip", "Sign", "MaxPool", "GlobalMaxPool"),
        *("ReduceMax", "ReduceMin", "TopK", "ScatterND", "ScatterElements", "Trilu"),
    )
)
"""Operators whose results are numbers they read, 0, or such with another sign."""


def uses_bf16(graph: onnx.GraphProto) -> bool:
    """Whether anything in the main graph is BF16."""
    tensors = [*graph.input, *graph.output, *graph.value_info]
    return (
        any(t.data_type == _BF16 for t in graph.initializer)
        or any(v.type.tensor_type.elem_type == _BF16 for v in tensors)
        or any(n.op_type == "Cast" and n.attribute[0].i == _BF16 for n in graph.node)
    )


def widen(model: Model) -> int:
    """Let everything that is BF16 be computed in FP32, in place; returns how many nodes were.

    Raises:
        OnnxqError: a body of If, Loop or Scan reads BF16.
    """
    infer_types(model)
    _refuse_bodies(model)
    editor, count = Editor(model), 0
    _widen_inputs(editor)
    _widen_constants(editor)
    for node in list(model.graph.nodes):
        made = [t for t in node.outputs if type_number(t) == _BF16]
        if made and node.op != "Cast":
            count += 1
            _retype_attributes(editor, node)
        for tensor in made:
            _widen_output(editor, node, tensor)
    editor.finish()
    return count


def _refuse_bodies(model: Model) -> None:
    names = model.captured_names()
    for tensor in model.graph.tensors().values():
        if tensor.name in names and type_number(tensor) == _BF16:
            raise OnnxqError(
                f"{model.path}: a subgraph reads the BF16 tensor {tensor.name!r}",
                "ONNX Runtime has no BF16 on the CPU; measure it with --device cuda",
            )


def _retype_attributes(editor: Editor, node: gs.Node) -> None:
    if node.attrs.get("output_dtype") == _BF16:
        editor.set_attribute(node, "output_dtype", _FP32)
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant) and constant_type(value) == _BF16:
        wide = original(value).astype(np.float32)
        editor.set_attribute(node, "value", editor.constant(value.name, wide))


def _widen_inputs(editor: Editor) -> None:
    for tensor in editor.model.graph.inputs:
        if type_number(tensor) == _BF16:
            _read_instead(tensor, _cast(editor, tensor, _FP32))


def _widen_constants(editor: Editor) -> None:
    read = {id(t): t for node in editor.model.graph.nodes for t in node.inputs}
    for tensor in read.values():
        if isinstance(tensor, gs.Constant) and constant_type(tensor) == _BF16:
            values = _Wide(editor.unique(tensor.name), tensor._values)
            _read_instead(tensor, gs.Constant(values.tensor.name, values))


def _widen_output(editor: Editor, node: gs.Node, tensor: gs.Tensor) -> None:
    """Consumers read FP32; `tensor` stays BF16 under its name, for the graph's output."""
    if node.op == "Cast":  # to BF16: it rounds by itself
        _read_instead(tensor, _cast(editor, tensor, _FP32, like=node))
        return
    raw = editor.variable(f"{tensor.name}_fp32", _NUMPY_FP32, tensor.shape)
    consumers = list(tensor.outputs)
    index = next(i for i, t in enumerate(node.outputs) if t is tensor)
    node.outputs[index] = raw
    name = editor.unique(f"{tensor.name}_Cast")
    editor.add(gs.Node("Cast", name, {"to": _BF16}, [raw], [tensor]), node)
    if node.op in _EXACT:
        _read_instead(tensor, raw, consumers)
    else:
        _read_instead(tensor, _cast(editor, tensor, _FP32, like=node), consumers)


def _cast(editor: Editor, tensor: gs.Tensor, to: int, like: gs.Node | None = None) -> gs.Tensor:
    name, kind = f"{tensor.name}_Cast", graph_dtype(to)
    return editor.node("Cast", name, [tensor], f"{name}_out", kind, tensor.shape, like, to=to)


def _read_instead(old: gs.Tensor, new: gs.Tensor, consumers: list[gs.Node] | None = None) -> None:
    """Let nodes that read `old`, but for the one that makes `new`, read `new`."""
    maker = new.inputs[0] if new.inputs else None
    for consumer in list(old.outputs) if consumers is None else consumers:
        if consumer is maker:
            continue
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new


class _Wide(Values):
    """BF16 as FP32: its bits in the upper half, a piece of the file at a time."""

    def __init__(self, name: str, narrow: Values) -> None:
        super().__init__(
            _T(name=name, data_type=_FP32, dims=narrow.shape, data_location=_T.EXTERNAL)
        )
        self.narrow = narrow

    def load(self) -> Array:
        raw = np.frombuffer(b"".join(self.pieces()), np.uint8)
        return from_bytes(raw, _FP32, self.shape)

    def pieces(self) -> Iterator[memoryview]:
        for piece in self.narrow.pieces():
            wide = np.frombuffer(piece, "<u2").astype("<u4") << 16
            yield memoryview(wide.view(np.uint8).data)
