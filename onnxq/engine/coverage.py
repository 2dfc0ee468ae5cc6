"""Which ONNX nodes really run in low precision: pure, from the compiled layers alone.

What is counted is ONNX nodes, not kernels: the compiler merges the q, k, v projections of one
tensor into one gemm, and gate and up likewise. A merged gemm names all of its nodes, and so does
fused attention; a DequantizeLinear is named by the multiply that absorbed it, a QuantizeLinear by
the elementwise kernel that quantizes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxq.engine.layers import EngineLayer, Tensor
from onnxq.engine.shapes import Profile

Kind = Literal["gemm", "conv", "attention"]

FUSED_ATTENTION_MINIMUM = 32
"""The shortest sequence a profile may start at for FP8 attention to fuse (tensorrt-rtx 1.7.1)."""

_NARROW = ("int8", "fp8", "int4", "fp4")
_FLOATS = ("fp32", "fp16", "bf16")
_MULTIPLIES = ("gemm", "correlation", "convolution", "runtime_fusion", "gemv", "matmul")
_ELEMENTWISE = "kgen"
_RESHAPING = {"Cast", "Move", "Resh", "Tran", "Repl", "Conc", "Slic"}
_QUANTIZING = _RESHAPING | {"Mul", "Div", "Min", "Max", "Roun"}
_OPERATIONS = re.compile(r"^__myl_([A-Za-z]+?)_")


@dataclass(frozen=True)
class WeightedNode:
    """A multiplication of the ONNX file and the format it is meant to run in.

    `wanted` is a dtype word: `fp8`, `int8`, `int4` (weight-only), `fp16`, ... For attention `name`
    is a label, and `parts` are the names of its first MatMul, its Softmax and its second MatMul.
    """

    name: str
    kind: Kind
    wanted: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeCoverage:
    """What one node became in one profile; `reason` is empty where it ran as wanted."""

    node: WeightedNode
    profile: int
    ran: str
    layer: str
    reason: str = ""

    @property
    def as_wanted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Coverage:
    """All nodes in all profiles, and what the engine holds beside them.

    `quantize_alone` and `dequantize_alone` name kernels whose only job is a Q or a DQ that no
    other kernel took up; `weight_bytes` are the constants of the first profile by dtype.
    """

    nodes: tuple[NodeCoverage, ...]
    quantize_alone: tuple[str, ...] = ()
    dequantize_alone: tuple[str, ...] = ()
    weight_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every node ran as it was meant to, in every profile."""
        return all(entry.as_wanted for entry in self.nodes)

    @property
    def missed(self) -> tuple[NodeCoverage, ...]:
        """The nodes that did not run as they were meant to, each with its reason."""
        return tuple(entry for entry in self.nodes if not entry.as_wanted)

    def counts(self, profile: int = 0) -> dict[str, dict[str, int]]:
        """Nodes by kind and by what they ran in: `{"gemm": {"fp8": 210, "fp16": 1}, ...}`."""
        table: dict[str, Counter[str]] = {
            "gemm": Counter(),
            "conv": Counter(),
            "attention": Counter(),
        }
        for entry in self.nodes:
            if entry.profile == profile:
                table[entry.node.kind][entry.ran] += 1
        return {kind: dict(counter.most_common()) for kind, counter in table.items()}

    def to_json(self) -> dict[str, Any]:
        """Counts by profile, then every node that did not run as it was meant to."""
        profiles = sorted({entry.profile for entry in self.nodes})
        return {
            "complete": self.complete,
            "counts": [self.counts(profile) for profile in profiles],
            "missed": [
                {
                    "node": entry.node.name,
                    "profile": entry.profile,
                    "wanted": entry.node.wanted,
                    "ran": entry.ran,
                    "reason": entry.reason,
                }
                for entry in self.missed
            ],
            "quantize_alone": list(self.quantize_alone),
            "dequantize_alone": list(self.dequantize_alone),
        }

    def summary(self) -> list[str]:
        """Lines for people, one a profile, then what was left alone and the weights' bytes."""
        profiles = sorted({entry.profile for entry in self.nodes}) or [0]
        lines = []
        for profile in profiles:
            counts = self.counts(profile)
            line = "; ".join(
                f"{title} {_listed(counts[kind])}"
                for kind, title in (
                    ("gemm", "GEMM"),
                    ("conv", "convolution"),
                    ("attention", "attention"),
                )
            )
            lines.append(f"profile {profile}: {line}" if len(profiles) > 1 else line)
        lines.append(
            f"left alone: {len(self.quantize_alone)} quantize, "
            f"{len(self.dequantize_alone)} dequantize kernels"
        )
        sizes = ", ".join(f"{dtype} {size:,}" for dtype, size in self.weight_bytes.items())
        lines.append(f"weights in bytes: {sizes or '-'}")
        return lines


def cover(
    layers: Sequence[EngineLayer],
    nodes: Iterable[WeightedNode],
    profiles: Sequence[Profile] = (),
) -> Coverage:
    """Match nodes with the compiled layers, profile by profile.

    Args:
        profiles: the optimization profiles, which tell why FP8 attention did not fuse.
    """
    wanted = list(nodes)
    found = []
    for index in sorted({layer.profile for layer in layers}) or [0]:
        view = _View([layer for layer in layers if layer.profile == index])
        shape = profiles[index] if index < len(profiles) else ()
        for node in wanted:
            if node.kind == "attention":
                found.append(_cover_attention(node, view, index, shape))
            else:
                found.append(_cover_multiply(node, view, index))
    return Coverage(
        nodes=tuple(found),
        quantize_alone=tuple(x.name for x in layers if _is_alone(x, quantize=True)),
        dequantize_alone=tuple(x.name for x in layers if _is_alone(x, quantize=False)),
        weight_bytes=weight_bytes(layers),
    )


def multiply_dtype(layer: EngineLayer) -> str:
    """The dtype a layer multiplies in: `fp8`, or `fp16 x int4` where the two operands differ."""
    left, right = _operands(layer)
    return left if left == right else f"{left} x {right}"


def weight_bytes(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Bytes of the first profile's constants by dtype, largest first."""
    sizes: Counter[str] = Counter()
    for tensor in {t.name: t for x in layers if x.profile == 0 for t in x.constants}.values():
        sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes.most_common())


class _View:
    """One profile's layers, by the node they name and by the tensor they make or read."""

    def __init__(self, layers: Sequence[EngineLayer]) -> None:
        self.naming: dict[str, list[EngineLayer]] = {}
        self.making: dict[str, EngineLayer] = {}
        self.reading: dict[str, list[EngineLayer]] = {}
        for layer in layers:
            for name in layer.onnx_nodes:
                self.naming.setdefault(name, []).append(layer)
            for tensor in layer.outputs:
                self.making[tensor.name] = layer
            for tensor in layer.inputs:
                self.reading.setdefault(tensor.name, []).append(layer)

    def multiplies(self, name: str) -> EngineLayer | None:
        """The layer that does a node's multiplication, None when no such layer names it."""
        named = self.naming.get(name, [])
        return next((x for x in named if x.kind in _MULTIPLIES or _is_attention(x)), None)


def _cover_multiply(node: WeightedNode, view: _View, profile: int) -> NodeCoverage:
    layer = view.multiplies(node.name)
    if layer is None:
        named = view.naming.get(node.name, [])
        if not named:
            return NodeCoverage(node, profile, "none", "", "no compiled layer names it")
        ran = multiply_dtype(named[0])
        reason = "computed inside an elementwise kernel" if ran != node.wanted else ""
        return NodeCoverage(node, profile, ran, named[0].name, reason)
    ran = multiply_dtype(layer)
    reason = "" if _satisfies(ran, node.wanted) else _why_not(layer, node.wanted, ran, view)
    return NodeCoverage(node, profile, ran, layer.name, reason or _raw_sums(layer, view))


def _satisfies(ran: str, wanted: str) -> bool:
    if wanted == "int4":  # weight-only: the activation stays in its own precision
        return ran.endswith(" x int4")
    return ran == wanted


def _why_not(layer: EngineLayer, wanted: str, ran: str, view: _View) -> str:
    if wanted not in _NARROW:
        return f"ran in {ran}"
    for tensor in layer.inputs:
        maker = view.making.get(tensor.name)
        if maker is None or tensor.dtype in _NARROW:
            continue
        narrow = [t for t in maker.constants if t.dtype in _NARROW and t.elements > 1]
        if narrow and not any(t.elements != 1 for t in maker.inputs):
            return f"its weight is expanded to {tensor.dtype} by {maker.name} on every call"
        if any(t.dtype in _NARROW for t in maker.inputs):
            return f"its operand is expanded to {tensor.dtype} by {maker.name} first"
    left, right = _operands(layer)
    if right == wanted:
        return f"only its weight is {wanted}: it multiplies in {left}"
    return f"its layer ran with {ran} operands"


def _raw_sums(layer: EngineLayer, view: _View) -> str:
    """Whether an 8-bit gemm leaves its scale to the next kernel and stores bare sums in FP16.

    The compiler does so for weight scales per channel, and where the merged gemms of one tensor
    have different scales: the next kernel, which then names the gemm's node too, multiplies by a
    vector. A sum of products of codes passes FP16's 65,504 at once.
    """
    outputs = [t for t in layer.outputs if t.dtype == "fp16"]
    if layer.kind != "gemm" or not outputs or multiply_dtype(layer) not in ("int8", "fp8"):
        return ""
    for tensor in outputs:
        for reader in view.reading.get(tensor.name, []):
            scales = any(c.elements > 1 and c.dtype in _FLOATS for c in reader.constants)
            if scales and reader.kind == _ELEMENTWISE and _share(reader, layer):
                return (
                    "the gemm stores unscaled sums in fp16, which can overflow: give its weight one "
                    "scale, shared by all that multiply the same tensor"
                )
    return ""


def _share(reader: EngineLayer, layer: EngineLayer) -> bool:
    return not set(reader.onnx_nodes).isdisjoint(layer.onnx_nodes)


def _cover_attention(
    node: WeightedNode, view: _View, profile: int, shapes: Profile
) -> NodeCoverage:
    multiplies = [view.multiplies(part) for part in (node.parts[0], node.parts[-1])]
    first, second = multiplies
    if first is None or second is None:
        return NodeCoverage(node, profile, "none", "", "no compiled layer names its two MatMuls")
    if first is second and _is_attention(first):
        dtype = _attention_dtype(first)
        reason = "" if dtype == node.wanted else f"fused, but in {dtype}"
        return NodeCoverage(node, profile, f"fused {dtype}", first.name, reason)
    kinds = " and ".join(f"a {multiply_dtype(x)} {x.kind}" for x in (first, second))
    reason = f"not fused: {kinds}"
    if node.wanted == "fp8" and (short := _shortest(shapes)) is not None:
        reason += (
            f"; FP8 attention fuses in a profile whose sequence starts at "
            f"{FUSED_ATTENTION_MINIMUM} or more, and this one starts at {short}"
        )
    elif "fp32" in multiply_dtype(first):
        reason += "; attention fuses in FP16 and BF16 only"
    ran = f"{multiply_dtype(first)} gemms"
    return NodeCoverage(node, profile, ran, first.name, reason)


def _shortest(shapes: Profile) -> int | None:
    """The smallest dynamic dimension below what fuses, other than a batch dimension's."""
    short = [
        low
        for entry in shapes
        for axis, (low, high) in enumerate(zip(entry.minimum, entry.maximum, strict=True))
        if axis > 0 and low != high and low < FUSED_ATTENTION_MINIMUM
    ]
    return min(short, default=None)


def _is_attention(layer: EngineLayer) -> bool:
    return "mha" in layer.name


def _attention_dtype(layer: EngineLayer) -> str:
    # q, k and v are three of one dtype; a mask may stand among them in another.
    dtypes = Counter(t.dtype for t in layer.inputs if t.dtype in (*_NARROW, *_FLOATS))
    return dtypes.most_common(1)[0][0] if dtypes else "none"


def _operands(layer: EngineLayer) -> tuple[str, str]:
    """Dtypes of the activation and of the weight (or second activation).

    Scalars and vectors beside them (alpha, bias) do not count, nor does a residual: a narrow
    operand is always one of the two that are multiplied.
    """
    inputs = [t for t in layer.inputs if t.elements != 1]
    constants = [t for t in layer.constants if t.elements > 1]
    narrow_inputs = [t for t in inputs if t.dtype in _NARROW]
    narrow_constants = [t for t in constants if t.dtype in _NARROW]
    left = (narrow_inputs or inputs or constants or [Tensor("", (), "none")])[0].dtype
    if narrow_constants:
        return left, narrow_constants[0].dtype
    if len(narrow_inputs) > 1:
        return left, narrow_inputs[1].dtype
    others = [t for t in inputs if t is not inputs[0]]
    weight = max(constants, key=lambda t: t.elements, default=None)
    if weight is not None and (len(weight.dims) > 1 or not others):
        return left, weight.dtype
    return left, (others[0].dtype if others else left)


def _is_alone(layer: EngineLayer, *, quantize: bool) -> bool:
    match = _OPERATIONS.match(layer.name)
    if match is None or layer.kind != _ELEMENTWISE:
        return False
    operations = set(re.findall(r"[A-Z][a-z]*", match[1]))
    if not operations <= _QUANTIZING or operations <= _RESHAPING - {"Cast"}:
        return False
    sources = [t for t in (*layer.inputs, *layer.constants) if t.elements != 1]
    narrow_in = any(t.dtype in _NARROW for t in sources)
    narrow_out = any(t.dtype in _NARROW for t in layer.outputs)
    return (narrow_out and not narrow_in) if quantize else (narrow_in and not narrow_out)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.items()) or "-"
