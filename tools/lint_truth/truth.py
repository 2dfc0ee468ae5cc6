"""What the compiler makes of a graph: refused, or which quantized products fall short.

The oracle of lint. It finds products and attentions by a walk of its own over the ONNX file, and
reads what became of them from the compiled layers; it shares no code with `onnxq.linting`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from onnxq.engine.backends import BACKENDS
from onnxq.engine.build import read_shapes
from onnxq.engine.child import compile_all
from onnxq.engine.coverage import WEIGHTS_ALONE, NodeCoverage, WeightedNode
from onnxq.engine.layers import EngineLayer
from onnxq.engine.matching import cover
from onnxq.engine.protocol import Answer, Outcome, Request
from onnxq.errors import OnnxqError

_WORDS = {
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT4E2M1: "fp4",
}
_MOVING = {
    *("Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Slice", "Gather"),
    *("Flatten", "Expand", "Tile", "Split", "Dropout", "Neg", "DepthToSpace", "SpaceToDepth"),
}
_FUNCTIONS = frozenset(
    (
        *("Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSwish", "MaxPool", "AveragePool", "Resize"),
        *("GlobalAveragePool", "Add", "Sub", "Mul", "Div", "Pad", "Concat", "Where", "Tanh"),
    )
)
_MULTIPLYING = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention"}
_AT_ONCE = 30


@dataclass(frozen=True)
class Truth:
    """What became of one graph.

    Attributes:
        refused: the parser's or builder's words; '' where it compiled.
        slow: quantized products that do not run as they are meant to: their nodes' names -> why.
        raw: names of nodes whose bare sums are stored in FP16.
        products: how many quantized products there are.
        readable: whether the compiled layers could be read.
    """

    refused: str = ""
    slow: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    raw: frozenset[str] = frozenset()
    products: int = 0
    readable: bool = True


def judge(models: Sequence[tuple[Path, str, Sequence[str]]]) -> list[Truth]:
    """Compile (file, target, shapes) one after another in child processes."""
    backend = BACKENDS["tensorrt_rtx"]
    requests = [
        Request(str(path.resolve()), None, (target,), read_shapes(shapes))
        for path, target, shapes in models
    ]
    answers: list[Answer] = []
    for start in range(0, len(requests), _AT_ONCE):
        answers += _compile(requests[start : start + _AT_ONCE])
    found = []
    for (path, _, _), answer in zip(models, answers, strict=True):
        if not isinstance(answer, Outcome):
            found.append(Truth(refused=str(answer)))
            continue
        nodes = wanted(onnx.load(path, load_external_data=False))
        try:
            layers = backend.layers(list(answer.log), [])
        except OnnxqError:  # control flow: the reader does not know its layers
            found.append(Truth(readable=False))
            continue
        entries = cover(layers, nodes, answer.profiles).nodes
        found.append(_truth(entries, layers))
    return found


def _compile(requests: list[Request]) -> list[Answer]:
    """A crash of the compiler takes its process with it: then each graph has one of its own."""
    backend = BACKENDS["tensorrt_rtx"]
    try:
        return compile_all(requests, backend)
    except OnnxqError as error:
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in _compile([request])]


def _truth(entries: Sequence[NodeCoverage], layers: Sequence[EngineLayer]) -> Truth:
    by_name = {layer.name: layer for layer in layers}
    slow: dict[tuple[str, ...], str] = {}
    raw: set[str] = set()
    for entry in entries:
        names = (*entry.node.parts, entry.node.name)
        layer = by_name.get(entry.layer)
        reason = "" if "unscaled sums" in entry.reason else entry.reason
        if layer is not None and _stores_raw_sums(layer, layers):
            raw.add(entry.node.name)
        if entry.node.wanted == "int4" and entry.ran == "int4":
            reason = "multiplies in int4"
        if reason:
            slow[names] = reason
    return Truth("", slow, frozenset(raw), len(entries))


def _stores_raw_sums(layer: EngineLayer, layers: Sequence[EngineLayer]) -> bool:
    """Whether an 8-bit gemm writes FP16 and the kernel behind it begins with its scales.

    That kernel then names the gemm's node too; so does one that adds a Gemm's bias.
    """
    made = {t.name for t in layer.outputs if t.dtype == "fp16"}
    codes = any(t.dtype in ("int8", "fp8") for t in layer.inputs)
    if layer.kind != "gemm" or not made or not codes:
        return False
    behind = [x for x in layers if made & {t.name for t in x.inputs}]
    return any(
        "Mul" in x.name.partition("Add")[0]
        and any(t.elements > 1 and t.dtype == "fp16" for t in x.constants)
        and set(x.onnx_nodes) & set(layer.onnx_nodes)
        for x in behind
    )


def wanted(model: onnx.ModelProto) -> list[WeightedNode]:
    """The quantized products of the main graph, and the format each is meant to run in."""
    view = _View(model)
    taken: set[str] = set()
    found = []
    for scores, softmax, values in view.attentions():
        taken |= {scores.output[0], values.output[0]}
        formats = [view.format(t) for t in (*scores.input[:2], *values.input[:2])]
        named = [f for f in formats if f]
        if named:
            parts = tuple(_name(n) for n in (scores, softmax, values))
            found.append(WeightedNode(parts[0], "attention", max(named), parts))
    for node in model.graph.node:
        if node.op_type not in _MULTIPLYING or node.output[0] in taken:
            continue
        left, right = (view.format(t) for t in node.input[:2])
        if not left and not right:
            continue
        if view.is_constant(node.input[0]) and view.is_constant(node.input[1]):
            continue
        kind = "conv" if node.op_type.startswith("Conv") else "gemm"
        word = right or left
        constant = [view.is_constant(t) for t in node.input[:2]]
        if True in constant and bool(right) != bool(left) and constant[1 if right else 0]:
            other = node.input[0 if right else 1]
            # An activation function may stand between, by mistake.
            if word == "int4" or not view.format(other, through=_FUNCTIONS):
                word += WEIGHTS_ALONE
        found.append(WeightedNode(_name(node), kind, word))  # type: ignore[arg-type]
    return found


def _name(node: onnx.NodeProto) -> str:
    return str(node.name) or f"node_of_{node.output[0]}"


class _View:
    """Who makes and who reads each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.types = {t.name: t.data_type for t in graph.initializer}
        self.types |= {
            v.name: v.type.tensor_type.elem_type for v in graph.input if v.name not in self.types
        }
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute:
                self.types[node.output[0]] = node.attribute[0].t.data_type
        self.constants = {t.name for t in graph.initializer}
        self.sizes = {t.name: list(t.dims) for t in graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def is_constant(self, name: str, depth: int = 20) -> bool:
        node = self.makers.get(name)
        if node is None:
            return name in self.constants
        return depth > 0 and all(self.is_constant(t, depth - 1) for t in node.input if t)

    def format(self, name: str, depth: int = 20, through: frozenset[str] = frozenset()) -> str:
        """The codes a tensor is the dequantized form of, moved, cast or scaled; '' for none.

        Args:
            through: more operators to look through, whatever they compute.
        """
        node = self.makers.get(name)
        if node is None or not depth:
            return ""
        if node.op_type == "DequantizeLinear":
            return self._codes(node)
        if node.op_type == "TRT_MXFP8DequantizeLinear":
            return "fp8"
        if node.op_type in _MOVING:
            return self.format(node.input[0], depth - 1, through)
        if node.op_type in through:
            formats = [self.format(t, depth - 1, through) for t in node.input]
            return next((f for f in formats if f), "")
        if node.op_type in ("Mul", "Div"):
            computed = [t for t in node.input if not self.is_constant(t)]
            if len(computed) == 1:
                return self.format(computed[0], depth - 1)
            dequantized = [f for t in node.input if (f := self.format(t, depth - 1))]
            return dequantized[0] if not computed and dequantized else ""
        if node.op_type == "Concat":
            formats = {self.format(t, depth - 1) for t in node.input}
            return formats.pop() if len(formats) == 1 else ""
        return ""

    def _codes(self, dequantize: onnx.NodeProto) -> str:
        zero = dequantize.input[2] if len(dequantize.input) > 2 else ""
        source = dequantize.input[0]
        for _ in range(20):
            node = self.makers.get(source)
            if node is None or node.op_type not in _MOVING:
                break
            source = node.input[0]
        node = self.makers.get(source)
        number = self.types.get(zero) or self.types.get(source)
        if node is not None and node.op_type == "TRT_FP4DynamicQuantize":
            return "fp4"
        if number is None and node is not None and node.op_type == "QuantizeLinear":
            return "int8"  # as TensorRT reads the default, UINT8
        word = _WORDS.get(number or 0, "")
        return "int8" if number == TensorProto.UINT8 else word

    def attentions(
        self,
    ) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]]:
        """(scores, softmax, values) of every softmax between two products of computed tensors."""
        for softmax in [n for n in self.makers.values() if n.op_type == "Softmax"]:
            values = self._forward(softmax.output[0])
            scores = self._backward(softmax.input[0])
            if scores is not None and values is not None:
                yield scores, softmax, values

    def _forward(self, name: str) -> onnx.NodeProto | None:
        for _ in range(8):
            readers = [n for n in self.readers.get(name, ()) if n.op_type not in ("Shape", "IsNaN")]
            if len(readers) != 1:
                return None
            node = readers[0]
            if node.op_type == "MatMul":
                computed = node.input[0] == name and not self.is_constant(node.input[1])
                return node if computed else None
            if node.op_type not in (
                "Cast",
                "Where",
                "QuantizeLinear",
                "DequantizeLinear",
                "Reshape",
                "Identity",
                "Dropout",
            ):
                return None
            name = node.output[0]
        return None

    def _backward(self, name: str, depth: int = 10) -> onnx.NodeProto | None:
        node = self.makers.get(name)
        if node is None or not depth:
            return None
        if node.op_type == "MatMul":
            return None if any(self.is_constant(t) for t in node.input) else node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast", "Reshape", "Identity"):
            return self._backward(node.input[0], depth - 1)
        if node.op_type in ("Add", "Sub", "Mul", "Div", "Where", "Clip"):
            for source in node.input:
                found = self._backward(source, depth - 1)
                if found is not None:
                    return found
        return None
