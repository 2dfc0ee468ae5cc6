"""Bring a model into the form the passes read: types known, opset high enough, no functions."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
from onnx import inliner, shape_inference, version_converter

from onnxq.errors import OnnxqError
from onnxq.graph.constants import hoist_constants
from onnxq.graph.model import Model
from onnxq.graph.weights import numpy_dtype
from onnxq.report import Edit

LATEST_OPSET = 25
"""The newest standard opset TensorRT's parser takes."""


def prepare(model: Model, opset: int) -> tuple[Model, list[Edit]]:
    """Inline functions, hoist Constant nodes, raise the opset to at least `opset`, infer types."""
    edits: list[Edit] = []
    if model.header.functions:
        model, step = inline_functions(model)
        edits += step
    edits += hoist_constants(model)
    if model.opset < opset:
        model, step = raise_opset(model, opset)
        edits += step
        edits += hoist_constants(model)
    infer_types(model)
    return model, edits


def infer_types(model: Model) -> None:
    """Give every tensor the type and shape that ONNX shape inference finds.

    What stays unknown (custom operators and what follows them) keeps None.
    """
    proto = model.export()
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=False)
    except (shape_inference.InferenceError, ValueError) as error:
        raise OnnxqError(
            f"{model.path}: shape inference fails: {_first_line(error)}",
            "the model is inconsistent; export again",
        ) from None
    known = {
        v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output) if v.type.ByteSize()
    }
    for name, tensor in model.graph.tensors().items():
        value = known.get(name)
        if value is None or not isinstance(tensor, gs.Variable):
            continue
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.elem_type:
            tensor.dtype = _graph_dtype(kind.elem_type)
            if tensor.shape is None and kind.HasField("shape"):
                tensor.shape = [
                    d.dim_param or (d.dim_value if d.HasField("dim_value") else None)
                    for d in kind.shape.dim
                ]


def _graph_dtype(onnx_type: int) -> object:
    """The type as graphsurgeon keeps it: numpy's own, else the ONNX number."""
    dtype = numpy_dtype(onnx_type)
    return dtype if dtype.kind in "fiub?OU" and dtype.isbuiltin == 1 else onnx_type


def inline_functions(model: Model) -> tuple[Model, list[Edit]]:
    """Replace calls of the model's own functions by their bodies, so that passes see inside."""
    names = sorted({f.name for f in model.header.functions})
    proto = inliner.inline_local_functions(_reexport(model))
    inlined = _successor(model, proto)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return inlined, [Edit("load", "inline", shown, f"{len(names)} model-local functions")]


def raise_opset(model: Model, opset: int) -> tuple[Model, list[Edit]]:
    """Raise the standard opset with onnx's version converter.

    The converter drops node metadata and doc strings, resets ir_version, and is told nothing of
    the weights' bytes; all of it is put back.

    Raises:
        OnnxqError: an operator the converter has no way for; the message names it.
    """
    before = _reexport(model)
    old = model.opset
    try:
        after = version_converter.convert_version(before, opset)
    except (RuntimeError, ValueError, version_converter.ConvertError) as error:
        raise OnnxqError(
            f"{model.path}: opset {old} cannot be raised to {opset}: {_first_line(error)}",
            f"export the model at opset {opset} or later",
        ) from None
    _put_back(before, after)
    return _successor(model, after), [Edit("load", "raise opset", f"{old} -> {opset}")]


def _put_back(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    nodes = {(n.op_type, tuple(n.output)): n for n in before.graph.node}
    for node in after.graph.node:
        old = nodes.get((node.op_type, tuple(node.output)))
        if old is not None:
            for name in ("metadata_props", "doc_string", "overload"):
                _copy_field(old, node, name)
            node.name = old.name
    weights = {t.name: t for t in before.graph.initializer}
    for tensor in after.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    for group in ("input", "output", "value_info"):
        values = {v.name: v for v in getattr(before.graph, group)}
        for value in getattr(after.graph, group):
            if value.name in values:
                value.CopyFrom(values[value.name])
    for name in (
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
        "metadata_props",
        "functions",
        "training_info",
    ):
        _copy_field(before, after, name)
    for name in ("doc_string", "metadata_props", "quantization_annotation"):
        _copy_field(before.graph, after.graph, name)
    converted = next(o.version for o in after.opset_import if o.domain in ("", "ai.onnx"))
    after.ClearField("opset_import")
    for entry in before.opset_import:
        version = converted if entry.domain in ("", "ai.onnx") else entry.version
        after.opset_import.add(domain=entry.domain, version=version)
    needed = onnx.helper.find_min_ir_version_for(after.opset_import, ignore_unknown=True)
    after.ir_version = max(before.ir_version, needed)


def _copy_field(source: object, target: object, name: str) -> None:
    target.ClearField(name)  # type: ignore[attr-defined]
    value = getattr(source, name)
    if hasattr(value, "extend"):
        getattr(target, name).extend(value)
    elif value:
        setattr(target, name, value)


def _reexport(model: Model) -> onnx.ModelProto:
    """The model as a proto whose external references lead back to the files they are in."""
    proto = model.export()
    model.restore_references(proto)
    return proto


def _successor(model: Model, proto: onnx.ModelProto) -> Model:
    """The same file's model, as `proto` has it now."""
    new = Model.from_proto(proto, model.path)
    new.external, new.fingerprint = model.external, model.fingerprint
    return new


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
