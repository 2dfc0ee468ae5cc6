"""Rules on single QuantizeLinear and DequantizeLinear: codes, zero points, scales, target."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onnxq.graph.ir import Constant
from onnxq.graph.qdq import Quantizer, constant_values, quantize_node
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.subject import Subject

_SMALLEST_NORMAL = 2.0**-14
"""FP16's: what is smaller has fewer than its 11 digits."""
_CAPABILITY = {"fp8": (8, 9), "fp4": (10, 0), "int4": (8, 0), "int8": (7, 5)}
"""Format -> the first compute capability tensorrt-rtx 1.7.1 compiles it for."""


def zero_point(subject: Subject) -> Iterator[Found]:
    """Zero points other than zero."""
    for q in subject.quantizers:
        if q.zero is None:
            continue
        values = constant_values(q.zero)
        if values is None:
            if not subject.is_fixed(q.zero):
                reason = f"its zero point {q.zero.name!r} is computed at run time"
                yield Found(q.node, reason, curable=False)
        elif np.asarray(values, np.float32).any():
            shown = _shown(np.asarray(values, np.float32))
            yield Found(q.node, f"its zero point is {shown}", curable=is_shifted(q))


def uint8(subject: Subject) -> Iterator[Found]:
    """UINT8 codes: refused in weights, taken for INT8 behind a QuantizeLinear."""
    for q in subject.quantizers:
        if q.codes != "uint8" or _is_offset(q):
            continue
        if q.node.op == "QuantizeLinear":
            implicit = "" if q.zero is not None else " (UINT8 by default: it has no zero point)"
            yield Found(
                q.node,
                f"its codes are UINT8{implicit}, which TensorRT takes for INT8: everything above "
                "127 x scale saturates, and below 0 nothing does",
                Severity.NUMBERS,
            )
        elif quantize_node(q) is None:
            yield Found(q.node, "its codes are UINT8")


def int32(subject: Subject) -> Iterator[Found]:
    """INT32 codes: the bias as ONNX Runtime's quantizer writes it."""
    for q in subject.quantizers:
        if q.node.op == "DequantizeLinear" and q.codes == "int32":
            yield Found(q.node, "its codes are INT32, as of a quantized bias")


def scalar_codes(subject: Subject) -> Iterator[Found]:
    """A single number stored as codes, without a dimension."""
    for q in subject.quantizers:
        data = q.node.inputs[0]
        if q.node.op == "DequantizeLinear" and isinstance(data, Constant) and not data.shape:
            yield Found(q.node, f"its codes {data.name!r} are a number of rank 0")


def scale_value(subject: Subject) -> Iterator[Found]:
    """Scales that are no positive finite number in the type they are stored in."""
    for q in subject.quantizers:
        values = _scales(q)
        if values is None:
            continue
        bad = ~(values > 0)
        if q.codes == "int4":  # its scales may be 0 or negative
            bad = np.isnan(values)
        if bad.any():
            severity = Severity.NUMBERS if q.codes == "int4" else None
            worst = values[bad][0]
            what = "0 (an FP16 scale below 6e-8 is)" if worst == 0 else f"{worst:g}"
            yield Found(q.node, f"its scale is {what}{_among(bad)}", severity)
        elif np.isinf(values).any():
            yield Found(
                q.node,
                f"its scale is infinite{_among(np.isinf(values))}: every output is NaN",
                Severity.NUMBERS,
            )


def small_scale(subject: Subject) -> Iterator[Found]:
    """16-bit scales so small that digits are lost."""
    for q in subject.quantizers:
        if subject.type(q.scale) != "fp16":
            continue
        values = _scales(q)
        if values is not None and ((values > 0) & (values < _SMALLEST_NORMAL)).any():
            least = float(values[values > 0].min())
            error = 2.0**-25 / least
            yield Found(
                q.node,
                f"its smallest scale, {least:.3g}, is below FP16's normal numbers: it may be off "
                f"by {error:.0%}" + ("" if error < 1 else ", or more"),
            )


def scale_shape(subject: Subject) -> Iterator[Found]:
    """Scales that do not fit the tensor they belong to."""
    for q in subject.quantizers:
        shape, data = q.scale_shape, q.node.inputs[0].shape
        if shape is None or data is None or (math.prod(shape) == 1 and len(shape) < 2):
            continue
        reason = _blocks_misfit(q, shape, data) if len(shape) > 1 else _axis_misfit(q, shape, data)
        if reason:
            yield Found(q.node, reason)


def _axis_misfit(q: Quantizer, shape: tuple[int, ...], data: list[object]) -> str:
    if q.axis >= len(data):
        return f"its axis is {q.axis}, and the tensor has {len(data)} dimensions"
    size = data[q.axis]
    if isinstance(size, int) and size != shape[0]:
        return f"it has {shape[0]} scales for {size} channels along axis {q.axis}"
    return ""


def _blocks_misfit(q: Quantizer, shape: tuple[int, ...], data: list[object]) -> str:
    if len(shape) != len(data):
        return f"its scale has {len(shape)} dimensions and the tensor {len(data)}"
    for axis, (scales, size) in enumerate(zip(shape, data, strict=True)):
        if isinstance(size, int) and axis != q.axis and scales != size:
            return (
                f"its scale has {scales} values along axis {axis}, where only {q.axis} has blocks"
            )
    return ""


def ragged_blocks(subject: Subject) -> Iterator[Found]:
    """Blocks that do not divide their axis: TensorRT divides by their number instead."""
    for q in subject.quantizers:
        shape, data = q.scale_shape, q.node.inputs[0].shape
        if not q.block or shape is None or data is None or q.axis >= min(len(shape), len(data)):
            continue
        size, count = data[q.axis], shape[q.axis]
        if not isinstance(size, int) or count < 2 or size % q.block == 0:
            continue
        if size % count:
            yield Found(q.node, f"its {size} elements do not make {count} whole blocks")
        else:
            yield Found(
                q.node,
                f"its {size} elements are in blocks of {q.block}, the last one shorter: TensorRT "
                f"takes blocks of {size // count}",
                Severity.NUMBERS,
            )


def odd_sub_byte(subject: Subject) -> Iterator[Found]:
    """4-bit tensors with an odd number of elements."""
    for q in subject.quantizers:
        data = q.node.inputs[0]
        if q.codes in ("int4", "fp4") and isinstance(data, Constant):
            count = math.prod(int(d) for d in data.shape)
            if count % 2:
                yield Found(q.node, f"its {count} codes of 4 bits do not fill whole bytes")


def format_for_target(subject: Subject) -> Iterator[Found]:
    """Formats the target's tensor cores do not have."""
    target = subject.target
    for q in subject.quantizers:
        needed = _CAPABILITY.get(q.codes)
        if needed is not None and target.capability < needed:
            first = f"sm{needed[0]}{needed[1]}"
            yield Found(q.node, f"{target.name} has no {q.codes.upper()}, which begins at {first}")


def is_shifted(q: Quantizer) -> bool:
    """Whether its codes are INT8's with 128 added to each."""
    values = constant_values(q.zero)
    return q.codes == "uint8" and values is not None and bool((np.asarray(values) == 128).all())


def _is_offset(q: Quantizer) -> bool:
    """Whether its zero point is not zero: another rule tells that."""
    values = constant_values(q.zero)
    return values is not None and bool(np.asarray(values, np.float32).any())


def _scales(q: Quantizer) -> NDArray[np.float32] | None:
    """The scale's values as they are stored, in FP32; None where they are computed."""
    values = constant_values(q.scale)
    return None if values is None else np.asarray(values).astype(np.float32).reshape(-1)


def _among(which: NDArray[np.bool_]) -> str:
    count = int(which.sum())
    return "" if which.size == 1 else f" (the first of {count} such among {which.size})"


def _shown(values: NDArray[np.float32]) -> str:
    flat = np.unique(values)
    return f"{flat[0]:g}" if flat.size == 1 else f"{flat[0]:g} to {flat[-1]:g}"


RULES = (
    Rule(
        "zero-point",
        Severity.REFUSED,
        zero_point,
        "quantize symmetrically: zero point 0, signed codes",
        fixable=True,
    ),
    Rule(
        "uint8",
        Severity.REFUSED,
        uint8,
        "quantize to INT8, symmetrically",
    ),
    Rule(
        "int32-codes",
        Severity.REFUSED,
        int32,
        "leave the bias in floating point",
        fixable=True,
    ),
    Rule(
        "scalar-codes",
        Severity.REFUSED,
        scalar_codes,
        "leave the number in floating point, or give it a dimension",
        fixable=True,
    ),
    Rule(
        "scale-value",
        Severity.REFUSED,
        scale_value,
        "give every scale a positive finite value; a channel of zeros may have any",
    ),
    Rule(
        "scale-shape",
        Severity.REFUSED,
        scale_shape,
        "one scale, one along `axis`, or blocks along one axis",
    ),
    Rule(
        "ragged-blocks",
        Severity.REFUSED,
        ragged_blocks,
        "use blocks that divide the axis",
    ),
    Rule(
        "odd-4-bit",
        Severity.REFUSED,
        odd_sub_byte,
        "pad the weight to an even number of elements",
    ),
    Rule(
        "format-for-target",
        Severity.REFUSED,
        format_for_target,
        "quantize to INT8, or build for a newer GPU",
    ),
    Rule(
        "small-scale",
        Severity.NUMBERS,
        small_scale,
        "keep the scales in FP32, or put the small part into a factor behind the product",
    ),
)
