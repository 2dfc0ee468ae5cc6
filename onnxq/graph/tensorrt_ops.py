"""TensorRT's own operators as the same arithmetic in operators ONNX Runtime has.

TRT_FP4DynamicQuantize    block scale s = E4M3(amax / 6 / unit), codes E2M1(x / (s unit))
TRT_MXFP8DynamicQuantize  block scale s = the least power of two >= amax / 448, codes E4M3(x / s)
TRT_MXFP8QuantizeLinear   codes E4M3(x / s)
TRT_MXFP8DequantizeLinear codes times s
TRT_FP8QuantizeLinear     QuantizeLinear; TRT_FP8DequantizeLinear likewise

Rounding is to nearest, ties to even, saturating, and computed in FP32 from the values the operator
reads. Codes of FP4 come out in the type of FP8, which has all its values.

Source: TensorRT documentation, "Quantized types" (schemes) and DynamicQuantize; cuDNN, block scale
quantize (E8M0 is rounded up); OCP Microscaling Formats v1.0 (E2M1, E8M0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import graph_dtype, numpy_dtype, onnx_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.query import label, type_number

_FP4_MAX, _FP8_MAX = 6.0, 448.0
_LEAST_EXPONENT, _LARGEST_EXPONENT = -127, 127  # of E8M0; its byte is the exponent + 127


class _Steps:
    """Adds operators that stand for one node; FP32 unless said otherwise."""

    def __init__(self, editor: Editor, node: gs.Node) -> None:
        self.editor, self.node, self.stem = editor, node, label(node)

    def __call__(self, op: str, *inputs: Any, kind: Any = np.float32, **attrs: Any) -> gs.Tensor:
        """An operator whose output has the dtype `kind`; numbers and arrays become constants."""
        read = [t if isinstance(t, gs.Tensor) else self._constant(t) for t in inputs]
        name, dtype = f"{self.stem}_{op}", graph_dtype(onnx_dtype(kind))
        return self.editor.node(op, name, read, f"{name}_out", dtype, None, self.node, **attrs)

    def cast(self, tensor: gs.Tensor, kind: Any) -> gs.Tensor:
        """Cast; to FP8 it rounds to nearest, ties to even, and saturates."""
        return self("Cast", tensor, kind=kind, to=onnx_dtype(kind))

    def rows(self, tensor: gs.Tensor, size: int) -> gs.Tensor:
        """[blocks, size] in FP32, of a tensor in blocks along its last axis."""
        return self("Reshape", self.cast(tensor, np.float32), np.array([-1, size]))

    def scales(self, each: gs.Tensor, tensor: gs.Tensor) -> gs.Tensor:
        """One value a block, [blocks, 1], shaped as `tensor` but for its last axis."""
        leading = self("Shape", tensor, kind=np.int64, end=-1)
        shape = self("Concat", leading, np.array([-1]), kind=np.int64, axis=0)
        return self("Reshape", each, shape)

    def like(self, rows: gs.Tensor, tensor: gs.Tensor) -> gs.Tensor:
        """Rows back in the shape of `tensor`."""
        return self("Reshape", rows, self("Shape", tensor, kind=np.int64))

    def _constant(self, value: Any) -> gs.Constant:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        return self.editor.constant(f"{self.stem}_constant", array)


def _fp4_dynamic(editor: Editor, node: gs.Node) -> None:
    add, (x, unit) = _Steps(editor, node), node.inputs
    rows, unit = add.rows(x, _block(node)), add.cast(unit, np.float32)
    wanted = add("Div", add("Div", _amax(add, rows), _FP4_MAX), unit)
    scale = add.cast(add.cast(wanted, _E4M3), np.float32)
    step = add("Mul", scale, unit)
    # A block whose scale is 0 stands for zeros whatever its codes are; 0 / 0 would be none.
    divisor = add("Where", add("Greater", step, 0.0, kind=np.bool_), step, 1.0)
    codes = _nearest_e2m1(add, add("Div", rows, divisor))
    _replace(editor, node, [add.like(codes, x), add.scales(scale, x)], (_E4M3, _E4M3), add)


def _nearest_e2m1(add: _Steps, x: gs.Tensor) -> gs.Tensor:
    """Values of E2M1: steps of 0.5 below 2, of 1 below 4, of 2 to 6; even codes at ties."""
    x = add("Clip", x, -_FP4_MAX, _FP4_MAX)
    size = add("Abs", x)
    upper = add("Where", add("Less", size, 4.0, kind=np.bool_), 1.0, 2.0)
    step = add("Where", add("Less", size, 2.0, kind=np.bool_), 0.5, upper)
    return add("Mul", add("Round", add("Div", x, step)), step)


def _mxfp8_dynamic(editor: Editor, node: gs.Node) -> None:
    add, (x,) = _Steps(editor, node), node.inputs
    rows = add.rows(x, _block(node))
    exponent = _exponent_above(add, add("Div", _amax(add, rows), _FP8_MAX))
    codes = add("Div", rows, _power(add, exponent))
    byte = add.scales(add("Sub", exponent, float(_LEAST_EXPONENT)), x)
    _replace(editor, node, [add.like(codes, x), byte], (_E4M3, np.uint8), add)


def _exponent_above(add: _Steps, x: gs.Tensor) -> gs.Tensor:
    """The least e of E8M0 with 2^e >= x, as a float.

    The logarithm is off by less than 1, so that the answer is among three; powers are exact.
    """
    x = add("Max", x, 2.0**-126)  # the logarithm of 0 and of subnormal numbers
    guess = add("Ceil", add("Div", add("Log", x), float(np.log(2.0))))
    low = add("Sub", guess, 1.0)
    found = low
    for candidate in (low, guess):
        short = add("Less", _power(add, candidate), x, kind=np.bool_)
        found = add("Where", short, add("Add", candidate, 1.0), found)
    return add("Clip", found, float(_LEAST_EXPONENT), float(_LARGEST_EXPONENT))


def _power(add: _Steps, exponent: gs.Tensor) -> gs.Tensor:
    """2^e of a float e, from a table: exact, whatever the library's pow does."""
    index = add("Sub", exponent, float(_LEAST_EXPONENT))
    index = add("Clip", index, 0.0, float(len(_POWERS) - 1))
    return add("Gather", _POWERS, add.cast(index, np.int64))


def _mxfp8_quantize(editor: Editor, node: gs.Node) -> None:
    add, (x, byte) = _Steps(editor, node), node.inputs[:2]
    size = _block(node)
    scale = add("Reshape", _scale_of(add, byte), np.array([-1, 1]))
    codes = add("Div", add.rows(x, size), scale)
    _replace(editor, node, [add.like(codes, x)], (_E4M3,), add)


def _mxfp8_dequantize(editor: Editor, node: gs.Node) -> None:
    add, (codes, byte) = _Steps(editor, node), node.inputs[:2]
    where = {name: node.attrs[name] for name in ("axis", "block_size") if name in node.attrs}
    values = add("DequantizeLinear", codes, _scale_of(add, byte), **where)
    kind = numpy_dtype(node.attrs.get("output_dtype", onnx.TensorProto.FLOAT))
    _replace(editor, node, [values], (kind,), add)


def _scale_of(add: _Steps, byte: gs.Tensor) -> gs.Tensor:
    """2^(byte - 127)."""
    return add("Gather", _POWERS, add.cast(byte, np.int64))


def _fp8_quantize(editor: Editor, node: gs.Node) -> None:
    add, (x, scale) = _Steps(editor, node), node.inputs[:2]
    zero = add.editor.constant(f"{label(node)}_zero", np.zeros((), _E4M3))
    wide = [add.cast(t, np.float32) for t in (x, scale)]
    where = {"axis": node.attrs["axis"]} if "axis" in node.attrs else {}
    _replace(editor, node, [add("QuantizeLinear", *wide, zero, kind=_E4M3, **where)], (_E4M3,), add)


def _fp8_dequantize(editor: Editor, node: gs.Node) -> None:
    add, (codes, scale) = _Steps(editor, node), node.inputs[:2]
    where = {"axis": node.attrs["axis"]} if "axis" in node.attrs else {}
    values = add("DequantizeLinear", codes, add.cast(scale, np.float32), **where)
    number = type_number(node.outputs[0]) or type_number(scale)
    _replace(editor, node, [values], (numpy_dtype(number),), add)


def _amax(add: _Steps, rows: gs.Tensor) -> gs.Tensor:
    return add("ReduceMax", add("Abs", rows), np.array([-1]), keepdims=1)


def _block(node: gs.Node) -> int:
    """The size of blocks along the last axis."""
    shape, axis = node.inputs[0].shape, node.attrs.get("axis", -1)
    last = axis == -1 or (shape is not None and axis == len(shape) - 1)
    size = int(node.attrs.get("block_size", _BLOCKS.get(node.op, 0)))
    if not last or size < 1:
        raise OnnxqError(
            f"{node.op} {label(node)!r}: blocks of {size} along axis {axis} are not simulated",
            "ONNX Runtime has no kernel for it; only blocks along the last axis can be measured",
        )
    return size


def _replace(
    editor: Editor, node: gs.Node, values: Sequence[gs.Tensor], kinds: Sequence[Any], add: _Steps
) -> None:
    """Let `values`, computed in FP32, take the place of the node's outputs, in their types."""
    for old, value, kind in zip(node.outputs, values, kinds, strict=True):
        cast = value if type_number(value) == onnx_dtype(kind) else add.cast(value, kind)
        cast.shape = old.shape
        editor.redirect(old, cast)


_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_POWERS = np.ldexp(
    np.float32(1), np.arange(_LEAST_EXPONENT, _LARGEST_EXPONENT + 1), dtype=np.float32
)
_BLOCKS = {
    "TRT_FP4DynamicQuantize": 16,
    "TRT_MXFP8DynamicQuantize": 32,
    "TRT_MXFP8QuantizeLinear": 32,
}
OPERATORS: dict[str, Callable[[Editor, gs.Node], None]] = {
    "TRT_FP4DynamicQuantize": _fp4_dynamic,
    "TRT_MXFP8DynamicQuantize": _mxfp8_dynamic,
    "TRT_MXFP8QuantizeLinear": _mxfp8_quantize,
    "TRT_MXFP8DequantizeLinear": _mxfp8_dequantize,
    "TRT_FP8QuantizeLinear": _fp8_quantize,
    "TRT_FP8DequantizeLinear": _fp8_dequantize,
}
"""Operator of the domain `trt` -> what replaces a node of it, in place."""
