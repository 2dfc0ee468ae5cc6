"""Rules on attention: it is one kernel, or it is two products with the scores written to memory.

Seen with tensorrt-rtx 1.7.1. FP16 and BF16 attention fuses, FP32 does not. Quantized, it fuses
where q, k, v and the probabilities have one format, and the scores none: in FP8 from 32 keys on,
with heads of 256 at most, in an FP32 graph only if what it gives is quantized to FP8 too; in INT8
only if what it gives is quantized to INT8 too, up to 512 keys, with heads of 16, 32 or 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnxq.graph.attention import Attention
from onnxq.graph.ir import Node, Tensor
from onnxq.graph.qdq import MOVING, Operand, factor, quantizer, readers
from onnxq.graph.query import label
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.subject import Subject, is_meant

FEWEST_KEYS = 32
LARGEST_HEAD = 256
MOST_INT8_KEYS = 512
INT8_HEADS = (16, 32, 64)
_NAMES = ("q", "k", "softmax", "v")


@dataclass(frozen=True)
class _Quantized:
    """One attention and the four tensors it multiplies: q, k, the probabilities, v."""

    attention: Attention
    operands: tuple[Operand, Operand, Operand, Operand]

    @property
    def formats(self) -> set[str]:
        """Formats of the four; the parser reads UINT8 as INT8."""
        words = {o.codes for o in self.operands if is_meant(o)}
        return {"int8" if word == "uint8" else word for word in words}

    @property
    def bare(self) -> list[str]:
        """Which of the four are not quantized, or under no single constant scale."""
        return [n for n, o in zip(_NAMES, self.operands, strict=True) if not _is_fixed(o)]

    @property
    def whole(self) -> str:
        """The format of all four; '' where they have none or several."""
        return "" if self.bare or len(self.formats) > 1 else next(iter(self.formats), "")


def _is_fixed(operand: Operand) -> bool:
    source = operand.source
    return (
        source is not None
        and is_meant(operand)
        and operand.reaches
        and source.per_tensor
        and source.fixed
    )


def _quantized(subject: Subject) -> Iterator[_Quantized]:
    for attention in subject.attentions:
        tensors = (*attention.scores.inputs[:2], *attention.values.inputs[:2])
        q, k, p, v = (subject.operand(t) for t in tensors)
        found = _Quantized(attention, (q, k, p, v))
        if found.formats:
            yield found


def partly(subject: Subject) -> Iterator[Found]:
    """Attention of which some tensors are quantized and some are not, or in another format."""
    for found in _quantized(subject):
        if found.bare:
            yield Found(
                found.attention.scores,
                f"its {' and '.join(found.bare)} are not quantized under one constant scale",
            )
        elif len(found.formats) > 1:
            listed = " and ".join(sorted(word.upper() for word in found.formats))
            yield Found(found.attention.scores, f"it mixes {listed}")


def int8(subject: Subject) -> Iterator[Found]:
    """INT8 attention in a form that no fused kernel has."""
    open_length = []
    for found in _quantized(subject):
        if found.whole != "int8":
            continue
        scores, values = found.attention.scores, found.attention.values
        queries, keys, head = _last(scores.inputs[0], -2), _keys(scores, values), _head(scores)
        reason = ""
        if _given(subject, values) != "int8":
            reason = "what it gives is not quantized to INT8"
        elif isinstance(head, int) and head not in INT8_HEADS:
            reason = f"its heads are {head} long, not 16, 32 or 64"
        elif isinstance(keys, int) and keys > MOST_INT8_KEYS:
            reason = f"it has {keys} keys, more than {MOST_INT8_KEYS}"
        elif queries == 1:
            reason = "it has a single query"
        elif not isinstance(keys, int):
            open_length.append(label(scores))
        if reason:
            yield Found(scores, f"INT8 attention that does not fuse: {reason}")
    _note_open_length(
        subject, open_length, f"INT8 attention {{}} fuses only up to {MOST_INT8_KEYS} keys"
    )


def wide(subject: Subject) -> Iterator[Found]:
    """FP8 attention around FP32."""
    for found in _quantized(subject):
        source = found.operands[0].source
        if found.whole != "fp8" or source is None or subject.type(source.scale) != "fp32":
            continue
        if _given(subject, found.attention.values) != "fp8":
            yield Found(
                found.attention.scores,
                "its base type is FP32, and what it gives is not quantized to FP8",
            )


def size(subject: Subject) -> Iterator[Found]:
    """FP8 attention with fewer keys, or larger heads, than the fused kernel takes."""
    open_length = []
    for found in _quantized(subject):
        if found.whole != "fp8":
            continue
        scores, values = found.attention.scores, found.attention.values
        head, keys = _head(scores), _keys(scores, values)
        if isinstance(head, int) and head > LARGEST_HEAD:
            yield Found(scores, f"its heads are {head} long, and {LARGEST_HEAD} is the limit")
        if isinstance(keys, int) and keys < FEWEST_KEYS:
            yield Found(
                scores, f"it has {keys} keys, and FP8 attention fuses from {FEWEST_KEYS} on"
            )
        elif not isinstance(keys, int):
            open_length.append(label(scores))
    _note_open_length(
        subject,
        open_length,
        f"FP8 attention {{}} fuses only in profiles whose sequence starts at {FEWEST_KEYS} or more",
    )


def _note_open_length(subject: Subject, names: list[str], text: str) -> None:
    """Say what only a profile decides."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        subject.notes.append(f"{text.format(names[0] + more)}: `onnxq build --shapes ...` tells")


def inside(subject: Subject) -> Iterator[Found]:
    """Q/DQ right behind the scores: the first product then takes it in, and is no part of a kernel.

    Behind the mask it does no such harm.
    """
    for found in _quantized(subject):
        if found.whole:
            node = behind_scores(found.attention.scores)
            if node is not None:
                yield Found(found.attention.scores, f"its scores are quantized ({label(node)!r})")


def behind_scores(scores: Node) -> Node | None:
    """The QuantizeLinear that follows a product, constant factors and activations between."""
    tensor = scores.outputs[0]
    for _ in range(8):
        following = list(readers(tensor))
        quantize = next((n for n in following if n.op == "QuantizeLinear"), None)
        if quantize is not None or len(following) != 1:
            return quantize
        node = following[0]
        scaled = node.op in ("Mul", "Div") and factor(node) is not None
        if not (scaled or node.op in MOVING or node.op in ("Relu", "Clip", "Cast")):
            return None
        tensor = node.outputs[0]
    return None


def operator(subject: Subject) -> Iterator[Found]:
    """Q/DQ in front of ONNX's Attention operator."""
    for node in subject.nodes:
        if node.op in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
            found = [subject.operand(t) for t in node.inputs[:3]]
            if any(is_meant(o) for o in found):
                yield Found(node, f"{node.op} runs in 16 bits, whatever stands in front of it")


def _last(tensor: Tensor, index: int = -1) -> object:
    """A dimension from the end; None where it is not known."""
    return tensor.shape[index] if tensor.shape and len(tensor.shape) >= -index else None


def _head(scores: Node) -> object:
    """How long q and k are."""
    found = [_last(scores.inputs[0]), _last(scores.inputs[1], -2)]
    return next((n for n in found if isinstance(n, int)), None)


def _given(subject: Subject, values: Node) -> str:
    """The format that all readers of an attention's result quantize it to; '' for none."""
    formats: set[str] = set()
    stack = [values.outputs[0]]
    while stack:
        tensor = stack.pop()
        if any(tensor is t for t in subject.model.graph.outputs) or not tensor.outputs:
            return ""
        for node in readers(tensor):
            if node.op == "QuantizeLinear":
                found = quantizer(node, subject.types)
                formats.add(found.codes if found else "")
            elif node.op in MOVING or (node.op in ("Mul", "Div") and factor(node) is not None):
                stack.append(node.outputs[0])
            else:
                return ""
    word = formats.pop() if len(formats) == 1 else ""
    return "int8" if word == "uint8" else word


def _keys(scores: Node, values: Node) -> object:
    """How many keys there are, from whichever shape is known."""
    found = [_last(scores.inputs[1]), _last(values.inputs[0])]
    shape = values.inputs[1].shape
    if shape is not None and len(shape) > 1:
        found.append(shape[-2])
    return next((n for n in found if isinstance(n, int)), None)


RULES = (
    Rule(
        "attention-partly",
        Severity.SLOW,
        partly,
        "quantize q, k, v and the softmax to one format, or none of them",
        fixable=True,
    ),
    Rule(
        "attention-int8",
        Severity.SLOW,
        int8,
        "leave attention in 16 bits, which fuses; or quantize to FP8",
        fixable=True,
    ),
    Rule(
        "attention-fp32",
        Severity.SLOW,
        wide,
        "convert the model to FP16 or BF16 first, or quantize what attention gives to FP8",
    ),
    Rule(
        "attention-size",
        Severity.SLOW,
        size,
        "leave this attention in 16 bits",
        fixable=True,
    ),
    Rule(
        "attention-scores",
        Severity.SLOW,
        inside,
        "quantize nothing between the first product and the mask",
        fixable=True,
    ),
    Rule(
        "attention-operator",
        Severity.SLOW,
        operator,
        "spell attention out as MatMul, Softmax, MatMul to run it in FP8, or take the Q/DQ out",
        fixable=True,
    ),
)
