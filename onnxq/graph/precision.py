"""Which nodes of an FP32 graph stay FP32 in FP16 or BF16: what would overflow or lose itself.

Decided from known patterns, from the constants, and from measured ranges where there are any;
`casting` does the conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph import patterns
from onnxq.graph.model import Model
from onnxq.graph.query import has_subgraph, label
from onnxq.graph.weights import array, constant_type

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Base:
    """A 16-bit type.

    Attributes:
        largest, smallest: its largest finite value and its smallest normal one.
        fill: what a mask's huge negative constant becomes. exp() of it is 0, and neither a score
            nor a second mask added to it makes -inf, which would turn a row that is masked
            throughout into NaN.
        min_opset: the first opset in which convolutions and poolings have the type.
    """

    name: str
    onnx_type: int
    dtype: Any
    largest: float
    smallest: float
    fill: float
    min_opset: int

    @property
    def graph_dtype(self) -> Any:
        """The type as graphsurgeon keeps it on a tensor."""
        return np.dtype(np.float16) if self.name == "fp16" else self.onnx_type


BASES = {
    b.name: b
    for b in (
        Base("fp16", onnx.TensorProto.FLOAT16, np.float16, 65504.0, 2.0**-14, -(2.0**14), 13),
        Base(
            "bf16",
            onnx.TensorProto.BFLOAT16,
            ml_dtypes.bfloat16,
            2.0**128 - 2.0**120,
            2.0**-126,
            -(2.0**100),
            22,
        ),
    )
}

_CARRIES_MASK = patterns.LAYOUT | {"Where", "Add", "Sub", "Mul", "Cast", "Min", "Max", "Clip"}
_ENDS_MASK = ("Softmax", "LogSoftmax", "Exp", "Attention")
_MASKING = patterns.LAYOUT | {"Where", "Mul", "Add"}
_MOVING = patterns.LAYOUT | {"Where", "ConstantOfShape"}
"""What gives a constant's values on as they are."""
_TYPED_BY_ATTRIBUTE = frozenset(
    (
        *("Constant", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike"),
        *("RandomUniformLike", "Bernoulli", "Multinomial"),
    )
)
_FP32_ALONE = {"tensor(float)"}
_RANGE_MARGIN = 0.9


@dataclass
class PrecisionPlan:
    """Which FP32 nodes stay FP32, and why.

    Attributes:
        base: the 16-bit type of all others.
        kept: id(node) -> reason.
        wide: names of tensors that stay FP32 even as inputs or outputs of the graph -> reason.
        clamped: (id(node), name of a constant it reads, or its own) whose values are cut to the
            range -> what the largest becomes.
    """

    base: Base
    kept: dict[int, str] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)
    clamped: dict[tuple[int, str], float] = field(default_factory=dict)

    def keep(self, node: gs.Node, reason: str) -> None:
        """Let a node stay FP32; the first reason stands."""
        self.kept.setdefault(id(node), reason)


def is_fp32(tensor: gs.Tensor) -> bool:
    """Whether a tensor is FP32 (unknown types are not)."""
    if isinstance(tensor, gs.Constant):
        return constant_type(tensor) == FLOAT
    return (
        tensor.dtype is not None
        and not isinstance(tensor.dtype, int)
        and bool(np.dtype(tensor.dtype) == np.float32)
    )


def plan_precision(
    model: Model, base: Base, ranges: Mapping[str, float] | None = None
) -> PrecisionPlan:
    """Decide for every node of an FP32 graph.

    Args:
        ranges: max |x| of activations by tensor name, as far as they were measured.
    """
    captured = model.captured_names()
    plan = PrecisionPlan(base, wide=dict.fromkeys(captured, "a subgraph reads it"))
    for node in model.graph.nodes:
        reason = _structural(model, node, base, captured)
        if reason is None and node.op in patterns.HUNGRY:
            reason = f"{node.op} {patterns.HUNGRY[node.op]}"
        if reason is not None:
            plan.kept[id(node)] = reason
    for node in patterns.angles(model):
        plan.keep(node, "positions and angles: large integers are not exact in 16 bits")
    for node in patterns.norms(model):
        plan.keep(node, "squares in a norm leave the range")
    for node, reason in patterns.unbounded(model):
        plan.keep(node, reason)
    for node in model.graph.nodes:
        _judge_constants(node, plan)
    _judge_ranges(model, plan, ranges or {})
    for node, reason in patterns.guarded(model, plan.kept, is_fp32):
        plan.keep(node, reason)
    while found := list(patterns.between(model, plan.kept, is_fp32)):
        for node, reason in found:
            plan.keep(node, reason)
    return plan


def _structural(model: Model, node: gs.Node, base: Base, captured: set[str]) -> str | None:
    """Reasons that lie in the operator itself, for either 16-bit type."""
    tensors = [t for t in (*node.inputs, *node.outputs) if is_fp32(t)]
    if not tensors:
        return None
    if has_subgraph(model, node):
        return "holds a subgraph, which passes through untouched"
    if any(t.name in captured for t in node.outputs):
        return "a subgraph reads its output"
    if any(t.dtype is None and t.name for t in (*node.inputs, *node.outputs)):
        return "types beyond it are unknown"
    try:
        schema = _schema(model, node)
    except onnx.defs.SchemaError:
        return f"custom operator {node.domain or ''}::{node.op}"
    wanted = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[base.name]
    for formals, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, tensor in enumerate(actual):
            types = _types(schema, formals, index)
            if is_fp32(tensor) and types != _FP32_ALONE and wanted not in types:
                return f"ONNX has no {base.name} {node.op} at opset {model.opset}"
    return "its type is an attribute" if node.op in _TYPED_BY_ATTRIBUTE else None


def fp32_alone(model: Model, node: gs.Node) -> tuple[set[int], set[int]]:
    """Which inputs and which outputs take FP32 and nothing else (Resize's scales)."""
    schema = _schema(model, node)
    pairs = ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
    inputs, outputs = (
        {i for i in range(len(actual)) if _types(schema, formals, i) == _FP32_ALONE}
        for formals, actual in pairs
    )
    return inputs, outputs


def _schema(model: Model, node: gs.Node) -> Any:
    return onnx.defs.get_schema(node.op, model.opset, node.domain or "")


def _types(schema: Any, formals: Any, index: int) -> set[str]:
    """The types an operand may have; onnx 1.20 cannot give the operand's own list of them."""
    name = formals[min(index, len(formals) - 1)].type_str
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return set(constraints.get(name, [name]))


def _judge_constants(node: gs.Node, plan: PrecisionPlan) -> None:
    """Constants that do not survive the cast: clamp a mask's, keep the node for any other."""
    if id(node) in plan.kept:
        return
    for name, tensor in _constants(node):
        finite, largest = _finite(array(tensor))
        if largest > plan.base.largest:
            clamp = _clamp_to(node, finite, plan.base)
            if clamp is None:
                _keep_moved(node, plan, f"constant {name!r} reaches {largest:.3g}")
                return
            plan.clamped[id(node), name] = clamp
        elif 0 < largest < plan.base.smallest and not _is_offset(node, tensor):
            _keep_moved(
                node,
                plan,
                f"constant {name!r} is {largest:.3g}, 0 or nearly so in {plan.base.name}",
            )
            return


def _finite(values: Any) -> tuple[Any, float]:
    """The finite values and the largest magnitude of them; without a copy where all are."""
    largest = max(float(values.max()), -float(values.min())) if values.size else 0.0
    if np.isfinite(largest):
        return values, largest
    finite = values[np.isfinite(values)]
    return finite, float(np.abs(finite).max(initial=0.0))


def _constants(node: gs.Node) -> Iterator[tuple[str, gs.Constant]]:
    """FP32 constants the node reads, and what a ConstantOfShape fills with; each with a name."""
    yield from ((t.name, t) for t in node.inputs if isinstance(t, gs.Constant) and is_fp32(t))
    value = node.attrs.get("value")
    if node.op == "ConstantOfShape" and value is not None and is_fp32(value):
        yield label(node), value


def _keep_moved(node: gs.Node, plan: PrecisionPlan, reason: str) -> None:
    """Keep a node, and where it only moves values, what computes with them."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        plan.keep(node, reason)
        readers = [c for t in node.outputs for c in t.outputs if id(c) not in plan.kept]
        waiting += readers if node.op in _MOVING else []


def _is_offset(node: gs.Node, tensor: gs.Constant) -> bool:
    """A bias, which may vanish; not the guard against zero of what divides or takes a root."""
    if node.op in _MOVING:
        return False
    if node.op not in ("Add", "Sub"):
        weight = node.inputs[min(1, len(node.inputs) - 1)]
        return tensor is not weight and len(tensor.shape) > 0
    guarded = ("Sqrt", "Div", "Log", "Reciprocal", "Pow")
    return all(consumer.op not in guarded for consumer in node.outputs[0].outputs)


def _clamp_to(node: gs.Node, finite: Any, base: Base) -> float | None:
    """What an out-of-range constant may become without changing what the node means."""
    if node.op in ("Clip", "Min", "Max"):
        return base.largest if float(finite.max()) > 0 else -base.largest
    fills = bool(((finite <= -base.largest) | (np.abs(finite) <= 1)).all())
    masks = node.op in _MASKING or node.op == "ConstantOfShape"
    return base.fill if fills and masks and _reaches_softmax(node) else None


def _reaches_softmax(node: gs.Node) -> bool:
    waiting, seen = [node], {id(node)}
    while waiting:
        for reader in (c for t in waiting.pop().outputs for c in t.outputs):
            if reader.op in _ENDS_MASK:
                return True
            if reader.op in _CARRIES_MASK and id(reader) not in seen:
                seen.add(id(reader))
                waiting.append(reader)
    return False


def _judge_ranges(model: Model, plan: PrecisionPlan, ranges: Mapping[str, float]) -> None:
    limit = plan.base.largest * _RANGE_MARGIN
    tensors = model.graph.tensors()
    masked = _masked(model, plan)
    for name, amax in ranges.items():
        tensor = tensors.get(name)
        if amax <= limit or tensor is None or not is_fp32(tensor) or name in masked:
            continue
        reason = f"{name!r} was measured at {amax:.3g}"
        plan.wide.setdefault(name, reason)
        for node in (*tensor.inputs, *tensor.outputs):
            plan.keep(node, reason)


def _masked(model: Model, plan: PrecisionPlan) -> set[str]:
    """Tensors whose huge values are a mask's fill, which is clamped; softmax ends its reach."""
    masking = {node for (node, _), value in plan.clamped.items() if value == plan.base.fill}
    reached: set[str] = set()
    for node in model.graph.nodes:
        carried = node.op in _CARRIES_MASK and any(t.name in reached for t in node.inputs)
        if id(node) in masking or carried:
            reached |= {t.name for t in node.outputs}
    return reached
