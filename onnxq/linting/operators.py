"""Operators, and limits on their attributes and inputs, that the parser enforces.

`IMPORTED` is what `OnnxParser.supports_operator` of tensorrt-rtx 1.7.1 answers for the operators of
onnx 1.23 and of com.microsoft, without those it then finds no plugin for. The parser looks at the
operator's name alone, whatever its domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from onnxq.graph.ir import Constant, Node
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.subject import Subject

_IMPORTED = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
BatchNormalization BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape
Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf
Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow
HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul
Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow
QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RotaryEmbedding Round
STFT Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter
ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor GroupQueryAttention
MultiHeadAttention QMoE SkipSimplifiedLayerNormalization SimplifiedLayerNormalization
TRT_FP4DynamicQuantize TRT_MXFP8DynamicQuantize TRT_MXFP8DequantizeLinear TRT_DynamicQuantize
TRT_FP8QuantizeLinear TRT_FP8DequantizeLinear TRT_INT4QuantizeLinear TRT_INT4DequantizeLinear
"""
IMPORTED = frozenset(_IMPORTED.split())

WITHOUT_PLUGIN = frozenset(
    (
        *("CausalConvWithState", "LinearAttention", "MatMulNBits"),
        *("NonMaxSuppression", "NonZero", "RoiAlign"),
    )
)
"""The parser says it knows these, and then misses the plugin or a kernel for them."""

_INTEGER_KERNELS = (
    "QLinear",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantize",
    "QGemm",
    "QAttent",
)

_AXES = {"Squeeze": 1, "Unsqueeze": 1, "Dropout": 2} | dict.fromkeys(
    (
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    ),
    1,
)
"""Operator -> the input that must be known when the engine is built."""


def _used_outputs(node: Node) -> int:
    return sum(1 for t in node.outputs if t.name)


def _dilated(node: Node) -> bool:
    return any(int(d) != 1 for d in node.attrs.get("dilations", ()))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")


_LIMITS: dict[str, tuple[Callable[[Node], bool], str]] = {
    "AveragePool": (_dilated, "dilations other than 1"),
    "MaxPool": (
        lambda n: _dilated(n) or _used_outputs(n) > 1,
        "dilations other than 1, or the indices as a second output",
    ),
    "LayerNormalization": (lambda n: _used_outputs(n) > 1, "more than one output"),
    "BatchNormalization": (
        lambda n: bool(n.attrs.get("training_mode", 0)) or _used_outputs(n) > 1,
        "training mode",
    ),
    "LpPool": (lambda n: n.attrs.get("p", 2) not in (1, 2), "a p other than 1 and 2"),
    "ScatterND": (
        lambda n: _text(n.attrs.get("reduction")) not in ("", "none"),
        "a reduction",
    ),
    "ScatterElements": (
        lambda n: _text(n.attrs.get("reduction")) not in ("", "none"),
        "a reduction",
    ),
    "Attention": (
        lambda n: bool(n.attrs.get("softcap", 0.0)) or _used_outputs(n) > 1,
        "a softcap, or more than one output",
    ),
    "GroupQueryAttention": (lambda n: not n.attrs.get("scale", 0.0), "default scale"),
    "TensorScatter": (
        lambda n: _text(n.attrs.get("mode")) not in ("", "linear"),
        "a mode other than linear",
    ),
}


def unknown_operator(subject: Subject) -> Iterator[Found]:
    """Operators that no importer or plugin takes."""
    functions = {(f.domain, f.name) for f in subject.model.header.functions}
    for node in subject.nodes:
        name = f"{node.domain}::{node.op}" if node.domain else node.op
        if name == "com.microsoft::Attention":
            yield Found(node, f"the parser takes {name} for ONNX's Attention")
            continue
        if node.op in IMPORTED or (node.domain, node.op) in functions:
            continue
        if node.op in WITHOUT_PLUGIN:
            yield Found(node, f"TensorRT for RTX has no plugin or kernel for {name}")
        elif node.op.startswith(_INTEGER_KERNELS):
            yield Found(node, f"{name} is ONNX Runtime's own way to quantize; TensorRT reads Q/DQ")
        else:
            yield Found(node, f"the parser does not know {name}")


def unsupported_attribute(subject: Subject) -> Iterator[Found]:
    """Attributes and outputs that the importer of an operator refuses."""
    for node in subject.nodes:
        limit = _LIMITS.get(node.op)
        if limit is not None and limit[0](node):
            yield Found(node, f"TensorRT's {node.op} has no {limit[1]}")


def runtime_parameter(subject: Subject) -> Iterator[Found]:
    """Axes and the like that are computed while the engine runs."""
    for node in subject.nodes:
        index = _AXES.get(node.op)
        if index is None or index >= len(node.inputs) or not node.inputs[index].name:
            continue
        tensor = node.inputs[index]
        known = isinstance(tensor, Constant) if node.op == "Dropout" else subject.is_fixed(tensor)
        if not known:
            yield Found(node, f"its input {tensor.name!r} is computed at run time")


RULES = (
    Rule(
        "operator",
        Severity.REFUSED,
        unknown_operator,
        "replace it by operators that TensorRT imports, quantize in Q/DQ form instead of integer "
        "operators, or give TensorRT a plugin of that name",
    ),
    Rule(
        "operator-attribute",
        Severity.REFUSED,
        unsupported_attribute,
        "export the model without it",
    ),
    Rule(
        "runtime-parameter",
        Severity.REFUSED,
        runtime_parameter,
        "make it a constant: export with fixed axes",
    ),
)
