"""Cures for names, types, zero points and biases."""

from __future__ import annotations

import numpy as np

from onnxq.graph.edit import Editor
from onnxq.graph.elements import minimum_opset
from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.qdq import Quantizer, constant_values, quantizer, readers
from onnxq.graph.query import label
from onnxq.graph.weights import array, numpy_dtype, onnx_dtype
from onnxq.linting.scales import is_shifted
from onnxq.linting.subject import Subject

_WIDTH = ("bf16", "fp16", "fp32", "fp64")
_NUMPY = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


def rename(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Another name for a node that shares its own."""
    old = str(node.name)
    node.name = editor.unique(old)
    return f"was {old!r}"


def standard_domain(subject: Subject, editor: Editor, node: Node) -> str | None:
    """ONNX's own Q/DQ for ONNX Runtime's, where the opset has them."""
    q = quantizer(node, subject.types)
    if q is None or not node.domain:
        return None
    wide = subject.type(q.scale) == "fp32"
    needed = max(minimum_opset(q.codes) or 99, 13 if wide else 19)
    if subject.model.opset < needed:
        return None
    old = node.outputs[0]
    attrs = {k: v for k, v in node.attrs.items() if k in ("axis", "block_size")}
    new = editor.node(
        node.op, label(node), list(node.inputs), old.name, old.dtype, old.shape, node, **attrs
    )
    editor.redirect(old, new)
    return f"was {node.domain}::{node.op}"


def as_floats(subject: Subject, editor: Editor, node: Node) -> str | None:
    """The floats that codes stand for (an INT32 bias, one number), in the type of their scale."""
    codes = node.inputs[0]
    scale = constant_values(node.inputs[1])
    if not isinstance(codes, Constant) or scale is None:
        return None
    word = subject.type(node.inputs[1])
    axis = int(node.attrs.get("axis", 1)) if scale.size > 1 else 0
    zero = constant_values(node.inputs[2]) if len(node.inputs) > 2 else None
    values = array(codes).astype(np.float64)
    if zero is not None:
        values = values - _along(np.asarray(zero, np.float64), values.ndim, axis)
    values = values * _along(np.asarray(scale).astype(np.float64), values.ndim, axis)
    if word not in _NUMPY or not np.isfinite(values.astype(_NUMPY[word])).all():
        return None
    floats = editor.constant(f"{codes.name}_float", values.astype(_NUMPY[word]))
    editor.redirect(node.outputs[0], floats)
    return f"{values.size} values in {word.upper()}"


def _along(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rank: int, axis: int):  # type: ignore[no-untyped-def]
    """Scales shaped to multiply along an axis."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def signed_codes(subject: Subject, editor: Editor, node: Node) -> str | None:
    """INT8 with zero point 0 for UINT8 with zero point 128: the same values, code by code."""
    q = quantizer(node, subject.types)
    if q is None or not is_shifted(q):
        return None
    codes = node.inputs[0]
    if node.op == "DequantizeLinear" and isinstance(codes, Constant):
        shape = tuple(int(d) for d in codes.shape)
        signed = editor.derived(
            f"{codes.name}_signed",
            onnx_dtype(np.int8),
            shape,
            lambda: (array(codes).view(np.uint8) ^ 0x80).view(np.int8),
        )
        node.inputs[0] = signed
        _set_zero(editor, node, q)
        return "its codes less 128, INT8"
    if node.op != "QuantizeLinear":
        return None
    pair = [quantizer(n, subject.types) for n in readers(node.outputs[0])]
    whole = [p for p in pair if p is not None and p.node.op == "DequantizeLinear" and is_shifted(p)]
    if not whole or len(whole) != len(pair):
        return None
    for part in (q, *whole):
        _set_zero(editor, part.node, part)
    node.outputs[0].dtype = np.dtype(np.int8)
    return "codes less 128, INT8"


def _set_zero(editor: Editor, node: Node, q: Quantizer) -> None:
    assert q.zero is not None
    shape = tuple(int(d) for d in q.zero.shape or ())
    node.inputs[2] = editor.constant(f"{q.zero.name}_signed", np.zeros(shape, np.int8))


def one_type(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Casts of the narrower floating-point operands to the widest type."""
    words = {subject.type(t): t for t in node.inputs if t.name}
    if node.op == "Where":
        words.pop("bool", None)
    if not set(words) <= set(_WIDTH):
        return None
    widest = max(words, key=_WIDTH.index)
    if widest not in _NUMPY:
        return None
    number = onnx_dtype(_NUMPY[widest])
    for index, tensor in enumerate(node.inputs):
        if tensor.name and subject.type(tensor) in _WIDTH and subject.type(tensor) != widest:
            node.inputs[index] = _cast(editor, tensor, number, node)
    for out in node.outputs:
        out.dtype = numpy_dtype(number)
    return f"operands cast to {widest.upper()}"


def _cast(editor: Editor, tensor: Tensor, number: int, like: Node) -> Tensor:
    return editor.node(
        "Cast",
        f"{tensor.name}_Cast",
        [tensor],
        f"{tensor.name}_cast",
        numpy_dtype(number),
        tensor.shape,
        like,
        to=number,
    )
