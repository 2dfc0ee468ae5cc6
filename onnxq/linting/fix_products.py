"""Cures for quantized products and attention: take useless Q/DQ off, put scales behind."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.formats import PerChannel, PerTensor, QuantScheme, quant_format
from onnxq.graph.edit import Editor
from onnxq.graph.elements import Elements
from onnxq.graph.emit import Emitter
from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.qdq import (
    Operand,
    Quantizer,
    constant_values,
    operand,
    quantizer,
    readers,
)
from onnxq.graph.query import label, producer, type_number
from onnxq.graph.weights import Array, array
from onnxq.linting.attention import behind_scores
from onnxq.linting.fusing import both_fuse, in_fp16, multiplies_codes, origin
from onnxq.linting.subject import Product, Subject


def take_off(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Let a node read what its quantized inputs were before; weights stay as they are."""
    done = [
        tensor.name
        for index, tensor in enumerate(list(node.inputs))
        if _is_computed(subject, tensor) and _bypass(subject, editor, node, index)
    ]
    return f"the Q/DQ of {', '.join(done)} taken off" if done else None


def take_off_attention(subject: Subject, editor: Editor, node: Node) -> str | None:
    """The same for q, k, the softmax and v of an attention."""
    attention = next((a for a in subject.attentions if a.scores is node), None)
    if attention is None:
        return None
    done = [take_off(subject, editor, n) for n in (attention.scores, attention.values)]
    return "; ".join(text for text in done if text) or None


def take_off_scores(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Let what follows an attention's scores read them as they are."""
    quantize = behind_scores(node)
    pair = list(readers(quantize.outputs[0])) if quantize is not None else []
    if len(pair) != 1 or pair[0].op != "DequantizeLinear":
        return None
    return take_off_mask(subject, editor, pair[0])


def take_off_mask(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Let the readers of a dequantized mask read the mask."""
    before = _before(subject, node)
    if before is None:
        return None
    editor.redirect(node.outputs[0], before)
    return f"{before.name!r} is read as it is"


def _is_computed(subject: Subject, tensor: Tensor) -> bool:
    found = operand(tensor, subject.types)
    return found.source is not None and not found.constant


def _bypass(subject: Subject, editor: Editor, node: Node, index: int) -> bool:
    """Take the Q/DQ out of the way that leads to an input; False where others go it too."""
    found = operand(node.inputs[index], subject.types)
    if found.source is None:
        return False
    before = _before(subject, found.source.node)
    shared = any(len(n.outputs[0].outputs) > 1 or len(n.outputs) > 1 for n in found.path)
    if before is None or shared:
        return False
    reader = found.path[-1] if found.path else node
    place = next(i for i, t in enumerate(reader.inputs) if t is found.source.node.outputs[0])
    editor.replace_input(reader, place, before)
    return True


def _before(subject: Subject, dequantize: Node) -> Tensor | None:
    """The tensor that a Q/DQ pair quantizes, of the type the pair gives; None for no such pair."""
    quantize = producer(dequantize.inputs[0])
    if quantize is None or quantize.op != "QuantizeLinear":
        return None
    before = quantize.inputs[0]
    same = subject.type(before) == subject.type(dequantize.outputs[0]) != "?"
    return before if same else None


def plain_scale(subject: Subject, editor: Editor, node: Node) -> str | None:
    """Scales and zero points of shape [1] as numbers, on a convolution's two operands."""
    done = []
    for tensor in node.inputs[:2]:
        found = operand(tensor, subject.types)
        pair = [found.source.node] if found.source else []
        made = producer(pair[0].inputs[0]) if pair else None
        if made is not None and made.op == "QuantizeLinear":
            pair.append(made)
        for part in pair:
            for index in (1, 2):
                if index < len(part.inputs) and _flatten(editor, part, index):
                    done.append(part.inputs[index].name)
    return f"{', '.join(done)} as numbers" if done else None


def _flatten(editor: Editor, node: Node, index: int) -> bool:
    tensor = node.inputs[index]
    if not isinstance(tensor, Constant) or tuple(tensor.shape) != (1,):
        return False
    values = array(tensor).reshape(())
    node.inputs[index] = editor.constant(tensor.name, values, type_number(tensor))
    return True


def rescale_behind(subject: Subject, editor: Editor, node: Node) -> str | None:
    """One scale in DequantizeLinear for all that read one tensor, the channels' ratios behind.

    The codes stay; what a code stands for changes by the rounding of a ratio to FP16, 2^-11.
    """
    products = [p for p in subject.quantized if p.node is node]
    if not products or not _is_plain(products[0]):
        return None
    activation = products[0].activation
    assert activation is not None
    group = [p for p in subject.quantized if _shares(p, origin(activation))]
    if not all(_is_plain(p) and in_fp16(subject, p) for p in group):
        return None
    scales = [_weight_scales(p) for p in group]
    try:
        common = numerics.common_scale([s for s in scales if s is not None], np.float16)
    except numerics.ScaleRangeError:
        return None
    for product, scale in zip(group, scales, strict=True):
        assert scale is not None
        _move_behind(editor, product, scale, np.float16(common))
    more = f", with {len(group) - 1} more" if len(group) > 1 else ""
    return f"one scale of {common:.4g}, and the ratios behind the product{more}"


def _shares(product: Product, name: str) -> bool:
    activation = product.activation
    return multiplies_codes(product) and activation is not None and origin(activation) == name


def _is_plain(product: Product) -> bool:
    """Whether it is a product of an activation under one scale and a weight as `_move_behind` has.

    A product that was cured before stands there still, with a weight that is cured.
    """
    weight, activation = product.weight, product.activation
    if weight is None or activation is None or weight is not product.right:
        return False
    if not both_fuse(product) or activation.source is None or weight.source is None:
        return False
    beta = product.node.attrs.get("beta", 1.0)
    current = weight.path[0].outputs[0] if weight.path else weight.source.node.outputs[0]
    return (
        activation.source.per_tensor
        and not weight.source.blocked
        and all(n.op in ("Transpose", "Identity") for n in weight.path)
        and (len(product.node.inputs) < 3 or beta == 1.0)
        and product.node.inputs[1] is current
        and _weight_scales(product) is not None
        and _codes_of(weight.source) is not None
    )


def _weight_scales(product: Product) -> Any:
    """The weight's scales in FP32, one or a vector; None where they are not constant and sound."""
    assert product.weight is not None and product.weight.source is not None
    values = constant_values(product.weight.source.scale)
    if values is None:
        return None
    scales = np.asarray(values).astype(np.float32)
    scales = scales.reshape(()) if scales.size == 1 else scales
    return scales if np.isfinite(scales).all() and (scales > 0).all() else None


def _codes_of(source: Quantizer) -> Tensor | None:
    """The constant that holds a weight's codes, or the constant float they are made of."""
    tensor = source.node.inputs[0]
    if isinstance(tensor, Constant):
        return tensor
    made = producer(tensor)
    if made is None or made.op != "QuantizeLinear" or not isinstance(made.inputs[0], Constant):
        return None
    return made.inputs[0]


def _move_behind(editor: Editor, product: Product, scale: Any, common: Any) -> None:
    """A DequantizeLinear of its own under `common`, and a Mul by scale / common behind."""
    node, weight = product.node, product.weight
    assert weight is not None and weight.source is not None
    source = weight.source
    codes = _stored_codes(editor, weight, scale)
    stem = label(source.node)
    zero = [] if source.zero is None else [_zero(editor, source)]
    new = editor.node(
        "DequantizeLinear",
        stem,
        [codes, editor.constant(f"{stem}_scale", np.asarray(common)), *zero],
        f"{stem}_codes",
        np.dtype(np.float16),
        codes.shape,
        node,
    )
    for step in reversed(weight.path):
        attrs = dict(step.attrs)
        out = step.outputs[0]
        new = editor.node(
            step.op, label(step), [new], out.name, np.dtype(np.float16), out.shape, node, **attrs
        )
    node.inputs[1] = new
    ratios = (scale.astype(np.float64) / float(common)).astype(np.float16)
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if bias is not None:
        del node.inputs[2]
    factor = editor.constant(f"{stem}_ratios", ratios)
    Emitter(editor).finish_product(node, [factor], bias)


def _zero(editor: Editor, source: Quantizer) -> Tensor:
    assert source.zero is not None
    values: Array = np.zeros((), np.int8)
    return editor.constant(f"{source.zero.name}_one", values, type_number(source.zero))


def _stored_codes(editor: Editor, weight: Operand, scale: Any) -> Tensor:
    """The codes as a constant; where a float stands behind QuantizeLinear, its codes."""
    assert weight.source is not None
    source = weight.source
    tensor = source.node.inputs[0]
    if isinstance(tensor, Constant):
        return tensor
    floats = _codes_of(source)
    made = producer(tensor)
    assert isinstance(floats, Constant) and made is not None
    quantize = quantizer(made, Elements())
    axis = quantize.axis if quantize is not None else 0
    granularity = PerChannel(axis) if scale.ndim else PerTensor()
    scheme = QuantScheme(quant_format(source.codes), granularity, "float32")
    number = type_number(source.zero if source.zero is not None else tensor)
    shape = tuple(int(d) for d in floats.shape)
    return editor.derived(
        f"{floats.name}_codes",
        number,
        shape,
        lambda: numerics.quantize(array(floats), scale, scheme),
    )
