"""Base precision: an FP32 graph in FP16 or BF16, except where that would overflow or lose itself.

TensorRT takes every type from the file, so the conversion happens here. Which nodes stay FP32 is
decided from known patterns, from the constants, and from measured ranges where there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph import patterns
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import has_subgraph, label, producer, type_number
from onnxq.graph.weights import array, constant_type
from onnxq.report import Edit

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
_MASKING = patterns.LAYOUT | {"Where", "Mul", "Add"}
_TYPED_BY_ATTRIBUTE = frozenset(
    (
        *("Constant", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike"),
        *("RandomUniformLike", "Bernoulli", "Multinomial"),
    )
)
_ANY_TYPE = ("Shape", "Size", "Cast")
"""What reads values of any type: no Cast before it."""
_RANGE_MARGIN = 0.9


@dataclass
class PrecisionPlan:
    """Which FP32 nodes stay FP32, and why.

    Attributes:
        base: the 16-bit type of all others.
        kept: id(node) -> reason.
        wide: names of tensors that stay FP32 even as inputs or outputs of the graph -> reason.
        clamped: names of constants whose value is cut to the range, with what they become.
    """

    base: Base
    kept: dict[int, str] = field(default_factory=dict)
    wide: dict[str, str] = field(default_factory=dict)
    clamped: dict[str, float] = field(default_factory=dict)

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
        schema = onnx.defs.get_schema(node.op, model.opset, node.domain or "")
    except onnx.defs.SchemaError:
        return f"custom operator {node.domain or ''}::{node.op}"
    wanted = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}[base.name]
    for formal, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, tensor in enumerate(actual):
            types = _types(schema, formal, index)
            if is_fp32(tensor) and not types & {wanted} and not _pinned(schema, formal, index):
                return f"ONNX has no {base.name} {node.op} at opset {model.opset}"
    return "its type is an attribute" if node.op in _TYPED_BY_ATTRIBUTE else None


def _pinned(schema: Any, formal: Any, index: int) -> bool:
    """Whether the operator takes FP32 and nothing else at that place (Resize's scales)."""
    return _types(schema, formal, index) == {"tensor(float)"}


def _types(schema: Any, formal: Any, index: int) -> set[str]:
    """The types an operand may have; onnx 1.20 cannot give the operand's own list of them."""
    name = formal[min(index, len(formal) - 1)].type_str
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return set(constraints.get(name, [name]))


def _judge_constants(node: gs.Node, plan: PrecisionPlan) -> None:
    """Constants that do not survive the cast: clamp a mask's, keep the node for any other."""
    if id(node) in plan.kept:
        return
    for index, tensor in enumerate(node.inputs):
        if not isinstance(tensor, gs.Constant) or not is_fp32(tensor):
            continue
        finite = array(tensor)
        if finite.size == 0:
            continue
        largest = max(float(finite.max()), -float(finite.min()))
        if not np.isfinite(largest):
            finite = finite[np.isfinite(finite)]
            largest = float(np.abs(finite).max(initial=0.0))
        if largest > plan.base.largest:
            clamp = _clamp_to(node, index, finite, plan.base)
            if clamp is None:
                plan.kept[id(node)] = f"constant {tensor.name!r} reaches {largest:.3g}"
                return
            plan.clamped[tensor.name] = clamp
        elif 0 < largest < plan.base.smallest and not _is_offset(node, tensor):
            plan.kept[id(node)] = (
                f"constant {tensor.name!r} is {largest:.3g}, 0 or nearly so in {plan.base.name}"
            )
            return


def _is_offset(node: gs.Node, tensor: gs.Constant) -> bool:
    """A bias, which may vanish; not the guard against zero of what divides or takes a root."""
    if node.op not in ("Add", "Sub"):
        weight = node.inputs[min(1, len(node.inputs) - 1)]
        return tensor is not weight and len(tensor.shape) > 0
    guarded = ("Sqrt", "Div", "Log", "Reciprocal", "Pow")
    return all(consumer.op not in guarded for consumer in node.outputs[0].outputs)


def _clamp_to(node: gs.Node, index: int, finite: Any, base: Base) -> float | None:
    """What an out-of-range constant may become without changing what the node means."""
    if node.op in _MASKING and bool(((finite <= -base.largest) | (np.abs(finite) <= 1)).all()):
        return base.fill
    if node.op in ("Clip", "Min", "Max"):
        return base.largest if float(finite.max()) > 0 else -base.largest
    return None


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
    reached: set[str] = set()
    for node in model.graph.nodes:
        sources = {t.name for t in node.inputs}
        if sources & plan.clamped.keys() or (node.op in _CARRIES_MASK and sources & reached):
            reached |= {t.name for t in node.outputs}
    return reached


def apply_precision(model: Model, plan: PrecisionPlan, *, convert_io: bool = False) -> list[Edit]:
    """Cast weights and attributes, and put one Cast wherever FP32 and 16 bits meet."""
    editor = Editor(model)
    caster = _Caster(editor, plan)
    edits: list[Edit] = []
    before = list(model.graph.tensors().values())  # alive, so that their ids stay theirs
    fp32 = {id(t) for t in before if is_fp32(t)}
    if convert_io:
        edits += _convert_inputs(model, plan)
    for node in list(model.graph.nodes):
        if not any(id(t) in fp32 for t in (*node.inputs, *node.outputs)):
            continue
        kept = id(node) in plan.kept
        if kept:
            edits.append(Edit("precision", "keep fp32", label(node), plan.kept[id(node)]))
        pinned = () if kept else _pinned_inputs(model, node)
        for index, tensor in enumerate(list(node.inputs)):
            if id(tensor) in fp32 and node.op not in _ANY_TYPE:
                wanted = FLOAT if kept or index in pinned else plan.base.onnx_type
                caster.feed(node, index, tensor, wanted)
        if not kept:
            _convert_outputs(editor, node, plan, fp32)
    for name, value in plan.clamped.items():
        edits.append(
            Edit("precision", "clamp", name, f"to {value:g}, which is inside {plan.base.name}")
        )
    edits += _type_outputs(editor, plan, fp32, convert_io)
    _drop_idle_casts(editor, fp32)
    editor.finish()
    return edits


def _convert_inputs(model: Model, plan: PrecisionPlan) -> list[Edit]:
    """FP32 inputs become 16 bits wide, but for those that the plan keeps."""
    edits = []
    for tensor in model.graph.inputs:
        if is_fp32(tensor) and tensor.name in plan.wide:
            edits.append(Edit("precision", "keep fp32", tensor.name, plan.wide[tensor.name]))
        elif is_fp32(tensor) and not isinstance(tensor, gs.Constant):
            tensor.dtype = plan.base.graph_dtype
    return edits


def _convert_outputs(editor: Editor, node: gs.Node, plan: PrecisionPlan, fp32: set[int]) -> None:
    if node.op == "Cast" and any(id(t) in fp32 for t in node.outputs):
        editor.set_attribute(node, "to", plan.base.onnx_type)
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        number = float(array(value).reshape(-1)[0]) if value is not None else 0.0
        if abs(number) > plan.base.largest and np.isfinite(number):
            number = plan.base.fill if number < 0 else plan.base.largest
        content = np.array([number], np.float32).astype(plan.base.dtype)
        editor.set_attribute(node, "value", editor.constant("value", content))
    schema = onnx.defs.get_schema(node.op, editor.model.opset, node.domain or "")
    for index, tensor in enumerate(node.outputs):
        if id(tensor) in fp32 and not _pinned(schema, schema.outputs, index):
            tensor.dtype = plan.base.graph_dtype


def _drop_idle_casts(editor: Editor, fp32: set[int]) -> None:
    """Casts that change nothing any more, now that what they read or make has 16 bits."""
    outputs = {id(t) for t in editor.model.graph.outputs}
    casts = [n for n in editor.model.graph.nodes if n.op == "Cast"]
    for node in [n for n in casts if any(id(t) in fp32 for t in (*n.inputs, *n.outputs))]:
        if type_number(node.inputs[0]) == type_number(node.outputs[0]):
            if id(node.outputs[0]) not in outputs:
                editor.redirect(node.outputs[0], node.inputs[0])
            else:
                node.op = "Identity"
                editor.set_attribute(node, "to", None)


def _pinned_inputs(model: Model, node: gs.Node) -> tuple[int, ...]:
    schema = onnx.defs.get_schema(node.op, model.opset, node.domain or "")
    return tuple(i for i in range(len(node.inputs)) if _pinned(schema, schema.inputs, i))


def _type_outputs(editor: Editor, plan: PrecisionPlan, fp32: set[int], convert: bool) -> list[Edit]:
    """Graph outputs keep their FP32, or become 16 bits wide: one Cast each, under its name."""
    graph, base, edits = editor.model.graph, plan.base, []
    for index, tensor in enumerate(list(graph.outputs)):
        if id(tensor) not in fp32 or is_fp32(tensor) != convert or not tensor.inputs:
            continue
        if convert and tensor.name in plan.wide:
            edits.append(Edit("precision", "keep fp32", tensor.name, plan.wide[tensor.name]))
            continue
        name, source = tensor.name, tensor.inputs[0]
        if convert and source.op == "Cast" and not tensor.outputs:
            _convert_outputs(editor, source, plan, fp32)
            continue
        tensor.name = editor.unique(f"{name}_{'fp32' if convert else base.name}")
        dtype = base.graph_dtype if convert else np.dtype(np.float32)
        out = gs.Variable(name, dtype=dtype, shape=tensor.shape)
        to = base.onnx_type if convert else FLOAT
        node = gs.Node("Cast", editor.unique(f"{name}_Cast"), {"to": to}, [tensor], [out])
        graph.nodes.append(node)
        graph.outputs[index] = out
        editor.model.inherit_metadata(node, source)
    return edits


class _Caster:
    """Casts of tensors and constants, each made once."""

    def __init__(self, editor: Editor, plan: PrecisionPlan) -> None:
        self.editor, self.plan = editor, plan
        self._cast: dict[tuple[int, int], gs.Tensor] = {}

    def feed(self, node: gs.Node, index: int, tensor: gs.Tensor, wanted: int) -> None:
        """Let the node read `tensor` in the wanted type."""
        if isinstance(tensor, gs.Constant):
            if wanted != FLOAT:
                self.editor.replace_input(node, index, self._constant(tensor, wanted))
        elif self._type(tensor) != wanted:
            self.editor.replace_input(node, index, self._converted(tensor, wanted, node))

    def _type(self, tensor: gs.Tensor) -> int:
        return FLOAT if is_fp32(tensor) else self.plan.base.onnx_type

    def _converted(self, tensor: gs.Tensor, wanted: int, like: gs.Node) -> gs.Tensor:
        """`tensor` in another type; what was cast to FP32 is taken from before that Cast."""
        cast = producer(tensor)
        origin = cast.inputs[0] if cast is not None and cast.op == "Cast" else tensor
        if isinstance(origin, gs.Constant) or is_fp32(origin):
            origin = tensor
        if type_number(origin) == wanted:
            return origin
        key = (id(origin), wanted)
        if key not in self._cast:
            base = self.plan.base
            dtype = np.dtype(np.float32) if wanted == FLOAT else base.graph_dtype
            suffix = "fp32" if wanted == FLOAT else base.name
            self._cast[key] = self.editor.node(
                "Cast",
                f"{tensor.name}_Cast_{suffix}",
                [origin],
                f"{tensor.name}_{suffix}",
                dtype,
                tensor.shape,
                like=like,
                to=wanted,
            )
        return self._cast[key]

    def _constant(self, tensor: gs.Constant, wanted: int) -> gs.Constant:
        key = (id(tensor), wanted)
        if key not in self._cast:
            low, dtype = self.plan.clamped.get(tensor.name), self.plan.base.dtype

            def produce() -> Any:
                values = array(tensor)
                if low is not None:
                    finite = np.isfinite(values)
                    bound = abs(low)
                    values = np.where(finite, np.clip(values, -bound, bound), values)
                return values.astype(dtype)

            name = f"{tensor.name}_{self.plan.base.name}"
            if int(np.prod(tensor.shape or (1,))) * 2 < 1024:
                self._cast[key] = self.editor.constant(name, produce())
            else:
                self._cast[key] = self.editor.derived(
                    name, wanted, tuple(tensor.shape), produce, origin=tensor
                )
        return self._cast[key]
