"""Rules on element types: TensorRT takes them from the file and converts nothing by itself."""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.graph.elements import attribute_word, is_importable
from onnxq.graph.ir import Constant, Node
from onnxq.graph.query import type_word
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.operators import IMPORTED
from onnxq.linting.subject import Subject

_SAME: dict[str, slice] = dict.fromkeys(
    (
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Equal", "Less", "Greater"),
        *(
            "LessOrEqual",
            "GreaterOrEqual",
            "And",
            "Or",
            "Xor",
            "Concat",
            "MatMul",
            "Gemm",
            "Einsum",
        ),
        *("Conv", "ConvTranspose", "PRelu", "LayerNormalization", "InstanceNormalization"),
        *("GroupNormalization", "RMSNormalization"),
    ),
    slice(0, None),
) | {"Where": slice(1, None)}
"""Operator -> the inputs that must have one type. Pow, Clip, Pad and BatchNormalization convert."""

_UINT8 = frozenset(("Cast", "Identity", "Shape", "Size", "Equal", "QuantizeLinear"))
_SHUFFLES = frozenset(("Reshape", "Transpose", "Flatten", "Concat", "Identity", "Shape"))
_NARROW = ("fp8", "fp4", "int4")
_CODES = ("int8", *_NARROW)
_FLOATS = ("fp32", "fp16", "bf16", "fp64")
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def missing_type(subject: Subject) -> Iterator[Found]:
    """Element types that TensorRT has not."""
    graph = subject.model.graph
    named = [(t, "the input") for t in graph.inputs if not isinstance(t, Constant)]
    named += [(t, "the output") for t in graph.outputs]
    for tensor, what in named:
        if not is_importable(subject.type(tensor)):
            yield Found(tensor.name, f"{what} is {subject.type(tensor).upper()}")
    for name, constant in subject.model.initializers.items():
        word = type_word(constant)
        if not is_importable(word):
            yield Found(name, f"the initializer is {word.upper()}")
    for node in subject.nodes:
        word = attribute_word(node, "to") if node.op == "Cast" else ""
        word = word or (attribute_word(node, "output_dtype") if node.op in _QDQ else "")
        if word and not is_importable(word):
            yield Found(node, f"it makes {word.upper()}")


def mixed_types(subject: Subject) -> Iterator[Found]:
    """Operands of different types in one operator."""
    for node in subject.nodes:
        inputs = _SAME.get(node.op)
        if inputs is None or node.domain:
            continue
        words = {subject.type(t): t for t in node.inputs[inputs] if t.name}
        words.pop("?", None)
        if "fp64" in words:
            words.setdefault("fp32", words.pop("fp64"))
        if len(words) > 1:
            listed = ", ".join(f"{w.upper()} ({t.name!r})" for w, t in words.items())
            yield Found(node, f"it mixes {listed}")


def type_of_operator(subject: Subject) -> Iterator[Found]:
    """Types an importer refuses: UINT8 nearly everywhere, integers in matrix products."""
    for node in subject.nodes:
        words = [subject.type(t) for t in node.inputs if t.name]
        first = words[0] if words else "?"
        if node.op not in IMPORTED or node.op.startswith("TRT_"):
            continue
        if "uint8" in words and node.op not in _UINT8 and node.op not in _QDQ:
            yield Found(node, f"TensorRT's {node.op} takes no UINT8")
        elif node.op == "MatMul" and first in ("int32", "int64"):
            yield Found(node, f"TensorRT multiplies no matrices of {first.upper()}")
        elif node.op == "Resize" and first in ("int32", "int64", "bool"):
            yield Found(node, f"TensorRT's Resize takes no {first.upper()}")
        elif node.op == "Relu" and first == "int32":
            yield Found(node, "TensorRT's Relu takes no INT32")
        elif node.op == "ConvTranspose" and first == "bf16":
            yield Found(node, "TensorRT's ConvTranspose takes no BF16")
        elif node.op == "Celu" and first in ("fp16", "bf16"):
            yield Found(node, f"TensorRT's Celu takes FP32 alone, and this is {first.upper()}")
        elif node.op in ("ReduceMax", "ReduceMin") and first == "bool":
            yield Found(node, f"TensorRT's {node.op} takes no BOOL")
        elif node.op == "Mod" and first == "int8":
            yield Found(node, "TensorRT's Mod takes no INT8")
        elif node.op == "Mod" and first in _FLOATS and not node.attrs.get("fmod", 0):
            yield Found(node, f"Mod of {first.upper()} without fmod")


def moved_codes(subject: Subject) -> Iterator[Found]:
    """Codes that something else than a DequantizeLinear reads."""
    for node in subject.nodes:
        if node.op in _QDQ or node.op not in IMPORTED or node.op.startswith("TRT_"):
            continue
        for tensor in node.inputs:
            word = subject.type(tensor)
            if isinstance(tensor, Constant) and word in _CODES:
                yield Found(node, f"it reads the {word.upper()} constant {tensor.name!r}")
            elif word in _NARROW and node.op not in _SHUFFLES:
                yield Found(node, f"it reads {word.upper()} codes, {tensor.name!r}")
        if node.op == "Cast" and attribute_word(node, "to") in _NARROW:
            word = attribute_word(node, "to")
            yield Found(node, f"it makes {word.upper()} by a Cast")


def fp64(subject: Subject) -> Iterator[Found]:
    """FP64, which TensorRT narrows to FP32 and says so in a warning only."""
    for node in subject.nodes:
        if any(subject.type(t) == "fp64" for t in node.outputs) and _makes(subject, node):
            yield Found(node, "TensorRT computes it in FP32")


def _makes(subject: Subject, node: Node) -> bool:
    """Whether FP64 begins here, so that a chain is told once."""
    computed = [t for t in node.inputs if t.inputs]
    return not any(subject.type(t) == "fp64" for t in computed)


RULES = (
    Rule(
        "element-type",
        Severity.REFUSED,
        missing_type,
        "use FP32, FP16, BF16, INT8, FP8 E4M3, INT4, INT32, INT64 or BOOL",
    ),
    Rule(
        "mixed-types",
        Severity.REFUSED,
        mixed_types,
        "Cast its operands to one type",
        fixable=True,
    ),
    Rule(
        "type-of-operator",
        Severity.REFUSED,
        type_of_operator,
        "Cast to a type that the operator takes, and back",
    ),
    Rule(
        "moved-codes",
        Severity.REFUSED,
        moved_codes,
        "let DequantizeLinear read the codes first, and move or Cast what it gives",
    ),
    Rule("fp64", Severity.PORTABILITY, fp64, "export the model in FP32"),
)
