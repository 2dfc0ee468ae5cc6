"""An FP32 graph in FP16 or BF16, as `precision` planned it: one Cast wherever the types meet.

TensorRT takes every type from the file, so the conversion happens here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.precision import FLOAT, PrecisionPlan, fp32_alone, is_fp32
from onnxq.graph.query import label, producer, type_number
from onnxq.graph.weights import array, payload_bytes
from onnxq.graph.wire import STRIP_THRESHOLD
from onnxq.report import Edit

_ANY_TYPE = ("Shape", "Size", "Cast")
"""What reads values of any type: no Cast before it."""


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
        alone = set() if kept else fp32_alone(model, node)[0]
        for index, tensor in enumerate(list(node.inputs)):
            if id(tensor) in fp32 and node.op not in _ANY_TYPE:
                wanted = FLOAT if kept or index in alone else plan.base.onnx_type
                caster.feed(node, index, tensor, wanted)
        if not kept:
            _convert_outputs(editor, node, plan, fp32)
    for name, value in dict.fromkeys((name, v) for (_, name), v in plan.clamped.items()):
        reason = f"to {value:g}, which is inside {plan.base.name}"
        edits.append(Edit("precision", "clamp", name, reason))
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
        number = 0.0 if value is None else float(array(value).reshape(-1)[0])
        number = plan.clamped.get((id(node), label(node)), number)
        content = np.array([number], np.float32).astype(plan.base.dtype)
        editor.set_attribute(node, "value", editor.constant("value", content))
    alone = fp32_alone(editor.model, node)[1]
    for index, tensor in enumerate(node.outputs):
        if id(tensor) in fp32 and index not in alone:
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
        self._constants: dict[tuple[int, float], gs.Constant] = {}

    def feed(self, node: gs.Node, index: int, tensor: gs.Tensor, wanted: int) -> None:
        """Let the node read `tensor` in the wanted type."""
        if isinstance(tensor, gs.Constant):
            if wanted != FLOAT:
                bound = abs(self.plan.clamped.get((id(node), tensor.name), np.inf))
                self.editor.replace_input(node, index, self._narrow(tensor, bound))
        elif is_fp32(tensor) != (wanted == FLOAT):
            self.editor.replace_input(node, index, self._converted(tensor, wanted, node))

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

    def _narrow(self, tensor: gs.Constant, bound: float) -> gs.Constant:
        """The constant in 16 bits, its finite values cut to +-bound; computed when it is written,
        unless it is small."""
        key = (id(tensor), bound)
        if key not in self._constants:
            base, shape = self.plan.base, tuple(tensor.shape)

            def values() -> Any:
                found = array(tensor)
                cut = np.where(np.isfinite(found), np.clip(found, -bound, bound), found)
                return (cut if np.isfinite(bound) else found).astype(base.dtype)

            name, number = f"{tensor.name}_{base.name}", base.onnx_type
            if payload_bytes(number, shape) < STRIP_THRESHOLD:
                self._constants[key] = self.editor.constant(name, values())
            else:
                made = self.editor.derived(name, number, shape, values, origin=tensor)
                self._constants[key] = made
        return self._constants[key]
