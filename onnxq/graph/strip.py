"""Take the quantization out of a graph again: what is left computes the same but for rounding.

    codes -> DQ                       the weight, dequantized: its rounding stays
    x -> Q -> DQ                      x; Clip where the codes end at 0, for a Relu left out
    x / m -> product -> * r -> * m    x -> product, for m = max |x|; r goes into the weight

The graph stays in the precision it is in: what was FP32 before it was quantized is not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.dequantizing import dequantize, fits, limits, same_scale
from onnxq.graph.dtypes import Array, numpy_dtype, onnx_number, payload_bytes
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import label, producer, scalar, type_number, type_word
from onnxq.graph.weights import array
from onnxq.graph.wire import STRIP_THRESHOLD
from onnxq.report import Edit

QUANTIZED = re.compile(
    r"(TRT_\w*)?(De|Dynamic)?[Qq]uantize(Linear|LSTM|MatMul)?|TRT_\w*Quantize|QLinear\w+|QAttention"
    r"|QGemm|QMoE|MatMulInteger\w*|ConvInteger|MatMulNBits|MatMulBnb4|GatherBlockQuantized"
)
"""Operators that only a quantized graph has."""

_BOUNDED = ("Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Abs")
_MOVING = (
    *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
)
_SUFFIX = re.compile(r"_(int8|uint8|fp8|int4|uint4|nvfp4|quantized|q)$")


def strip_quantization(model: Model) -> list[Edit]:
    """Replace every Q/DQ by the floats it stands for, in place.

    Raises:
        OnnxqError: an operator that computes with codes, for which there are no floats to put in.
    """
    stripper = _Stripper(model, Editor(model), set(model.captured_names()))
    for node in list(model.graph.nodes):
        stripper.weight(node)
    for node in list(model.graph.nodes):
        stripper.activation(node)
    _refuse_rest(model)
    for node in list(model.graph.nodes):
        stripper.scales(node)
    stripper.editor.finish()
    return stripper.edits


def is_quantized(node: gs.Node) -> bool:
    """Whether the operator is one that only a quantized graph has, in whatever domain."""
    return QUANTIZED.fullmatch(node.op) is not None


def _refuse_rest(model: Model) -> None:
    """What is still read, and still quantized."""
    outputs = {id(t) for t in model.graph.outputs}
    for node in model.graph.nodes:
        read = any(t.outputs or id(t) in outputs for t in node.outputs)
        if is_quantized(node) and read:
            raise OnnxqError(
                f"{model.path}: {node.op} {label(node)!r} computes with codes; there are no floats "
                "to put in its place",
                "start from the full-precision model",
            )


@dataclass(frozen=True)
class _Weight:
    """A weight that was codes.

    Attributes:
        wide: gives its values in FP32, before they are rounded to its type.
    """

    name: str
    wide: Callable[[], Array]


class _Stripper:
    """The edits, and which constants were codes."""

    def __init__(self, model: Model, editor: Editor, captured: set[str]) -> None:
        self.model, self.editor, self.captured = model, editor, captured
        self.edits: list[Edit] = []
        self._weights: dict[int, _Weight] = {}
        self._alive: list[gs.Constant] = []

    def weight(self, node: gs.Node) -> None:
        """DequantizeLinear of constants becomes a constant."""
        if node.op != "DequantizeLinear" or not _all_constant(node.inputs):
            return
        codes, scale, *zero = (t for t in node.inputs if t.name)
        axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
        if not fits(codes, [scale, *zero], axis, block):
            return

        def wide() -> Array:
            return dequantize(
                array(codes), array(scale), array(zero[0]) if zero else None, axis, block
            )

        name, kind = _SUFFIX.sub("", codes.name), type_number(node.outputs[0])
        constant = self._constant(name, kind or type_number(scale), tuple(codes.shape), wide)
        self.editor.redirect(node.outputs[0], constant)
        what = f"{type_word(codes)} codes as {type_word(constant)}; their rounding stays"
        self.edits.append(Edit("strip", "dequantize", constant.name, what))

    def activation(self, node: gs.Node) -> None:
        """QuantizeLinear and the DequantizeLinear behind it go, where they undo each other."""
        if node.op != "QuantizeLinear" or not node.outputs:
            return
        codes, source = node.outputs[0], node.inputs[0]
        readers = list(codes.outputs)
        is_output = any(t is codes for t in self.model.graph.outputs)
        if is_output or codes.name in self.captured:
            return
        if not all(r.op == "DequantizeLinear" and same_scale(node, r) for r in readers):
            return
        clipped = self._clipped(node, source)
        for reader in readers:
            self.editor.redirect(reader.outputs[0], self._typed(clipped, reader.outputs[0]))
            reader.inputs.clear()
        node.inputs.clear()
        self.edits.append(Edit("strip", "remove Q/DQ", source.name, f"{type_word(codes)} codes"))

    def scales(self, node: gs.Node) -> None:
        """The scales around a product whose operands are floats again."""
        if node.op not in ("MatMul", "Gemm", "Conv") or len(node.outputs) != 1:
            return
        ratio = self._behind(node, lambda t: isinstance(t, gs.Constant))
        if ratio is not None and self._take_in(node, ratio[1]):
            self._bypass(*ratio)
        division = producer(node.inputs[0])
        if division is None or division.op != "Div" or not _is_peak(node, *division.inputs):
            return
        peak = division.inputs[1]
        found = self._behind(node, lambda t: t is peak)
        if found is None:
            return
        node.inputs[0] = division.inputs[0]
        self._bypass(*found)
        what = "its scale was computed in the graph"
        self.edits.append(Edit("strip", "remove scales", label(node), what))

    def _constant(
        self, name: str, kind: int, shape: tuple[int, ...], wide: Callable[[], Array]
    ) -> gs.Constant:
        dtype = numpy_dtype(kind)
        if payload_bytes(kind, shape) < STRIP_THRESHOLD:  # small ones are looked at by inference
            constant = self.editor.constant(name, wide().astype(dtype), kind)
        else:
            constant = self.editor.derived(name, kind, shape, lambda: wide().astype(dtype))
        self._weights[id(constant)] = _Weight(name, wide)
        self._alive.append(constant)
        return constant

    def _clipped(self, quantize: gs.Node, source: gs.Tensor) -> gs.Tensor:
        """`source`, clipped where the codes end at 0: others leave a Relu to that.

        Where they end elsewhere, it was the calibration that chose to, and is chosen again.
        """
        scale, *zero = (t for t in quantize.inputs[1:] if t.name)
        if isinstance(source, gs.Constant) or _is_bounded(source):
            return source
        ends = limits(scale, zero[0] if zero else None)
        if ends is None or 0 not in ends:
            return source
        bounds = []
        for name, value in zip(("low", "high"), ends, strict=True):
            constant = np.array(value).astype(
                numpy_dtype(type_number(source) or type_number(scale))
            )
            bounds.append(self.editor.constant(f"{source.name}_{name}", constant))
        name = f"{source.name}_Clip"
        return self.editor.node(
            "Clip", name, [source, *bounds], f"{source.name}_clipped", source.dtype, source.shape
        )

    def _typed(self, source: gs.Tensor, wanted: gs.Tensor) -> gs.Tensor:
        """`source` in the type that `wanted` has."""
        number = onnx_number(wanted.dtype)
        if not number or type_number(source) == number:
            return source
        return self.editor.node(
            "Cast", f"{source.name}_Cast", [source], f"{source.name}_cast", wanted.dtype, to=number
        )

    def _behind(
        self, node: gs.Node, wanted: Callable[[gs.Tensor], bool]
    ) -> tuple[gs.Node, gs.Tensor] | None:
        """The Mul by a wanted tensor among those right behind a product, and that tensor."""
        out = node.outputs[0]
        while len(out.outputs) == 1 and self._is_inner(out):
            (mul,) = out.outputs
            if mul.op != "Mul" or len(mul.inputs) != 2:
                return None
            other = mul.inputs[1] if mul.inputs[0] is out else mul.inputs[0]
            if other is out:
                return None
            if wanted(other):
                return (mul, other) if mul.outputs[0].name not in self.captured else None
            out = mul.outputs[0]
        return None

    def _is_inner(self, tensor: gs.Tensor) -> bool:
        return tensor.name not in self.captured and all(
            t is not tensor for t in self.model.graph.outputs
        )

    def _bypass(self, mul: gs.Node, factor: gs.Tensor) -> None:
        """Take a Mul out of the way of its other operand."""
        data = mul.inputs[1] if mul.inputs[0] is factor else mul.inputs[0]
        self.editor.redirect(mul.outputs[0], data)
        mul.inputs.clear()

    def _take_in(self, node: gs.Node, factors: gs.Tensor) -> bool:
        """Multiply a weight that was codes by factors of its output channels; whether they fit."""
        weight = self._weights.get(id(node.inputs[1]))
        if weight is None or len(node.inputs) > 2:
            return False
        shape = tuple(node.inputs[1].shape)
        axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else len(shape) - 1
        trailing = len(shape) - 2 if node.op == "Conv" else 0
        values = np.asarray(array(factors), np.float32)
        if values.shape not in ((), (1,), (shape[axis], *[1] * trailing)):
            return False
        along = values.reshape([-1 if a == axis else 1 for a in range(len(shape))])

        def scaled() -> Array:
            return np.asarray(np.asarray(weight.wide(), np.float32) * along)

        kind = type_number(node.inputs[1])
        node.inputs[1] = self._constant(f"{weight.name}_scaled", kind, shape, scaled)
        return True


def _is_bounded(tensor: gs.Tensor) -> bool:
    """Whether what makes it ends its values at 0, seen through operators that move them."""
    maker = producer(tensor)
    while maker is not None and maker.op in _MOVING:
        maker = producer(maker.inputs[0])
    return maker is not None and maker.op in _BOUNDED


def _all_constant(tensors: Sequence[gs.Tensor]) -> bool:
    given = [t for t in tensors if t.name]
    return len(given) >= 2 and all(isinstance(t, gs.Constant) for t in given)


def _is_peak(node: gs.Node, x: gs.Tensor, peak: gs.Tensor) -> bool:
    """Whether peak is max(max |x|, floor) over all that the product sums over, or more."""
    top = producer(peak)
    if top is None or top.op != "Max" or len(top.inputs) != 2 or scalar(top.inputs[1]) is None:
        return False
    reduce = producer(top.inputs[0])
    if reduce is None or reduce.op != "ReduceMax" or not reduce.attrs.get("keepdims", 1):
        return False
    magnitude = producer(reduce.inputs[0])
    if magnitude is None or magnitude.op != "Abs" or magnitude.inputs[0] is not x:
        return False
    if len(reduce.inputs) < 2 or not isinstance(reduce.inputs[1], gs.Constant):
        return False
    axes = sorted(int(a) for a in array(reduce.inputs[1]).reshape(-1))
    rank = len(node.inputs[1].shape or ())
    return axes == ([-1] if node.op != "Conv" else list(range(1, rank)))
