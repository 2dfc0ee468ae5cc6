"""Bring a model into the form the passes read: types known, opset high enough, no functions."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
from onnx import shape_inference

from onnxq.errors import OnnxqError
from onnxq.graph.check import TOOL_ERRORS, check_proto, located, tool_reason
from onnxq.graph.constants import hoist_constants
from onnxq.graph.dtypes import graph_dtype, is_known
from onnxq.graph.edit import is_sorted, sort_nodes
from onnxq.graph.excerpt import is_standard
from onnxq.graph.exporting import export
from onnxq.graph.inlining import inline
from onnxq.graph.model import Model
from onnxq.graph.names import nested_nodes
from onnxq.graph.opset import convert, require_versions
from onnxq.report import Edit


def prepare(model: Model, opset: int) -> tuple[Model, list[Edit]]:
    """Inline functions, hoist Constant nodes, raise the opset to at least `opset`, infer types.

    Raises:
        OnnxqError: an operator that cannot be raised, or a model that is inconsistent.
    """
    edits = list(model.edits)
    if model.header.functions:
        model, step = inline_functions(model)
        edits += step
    edits += hoist_constants(model)
    if model.opset < opset:
        model, step = raise_opset(model, opset)
        edits += step
        edits += hoist_constants(model)
    edits += _modernise(model)
    if not is_sorted(model):
        sort_nodes(model)
        edits.append(Edit("load", "sort", model.path.name, "nodes into topological order"))
    infer_types(model)
    return model, edits


def infer_types(model: Model) -> None:
    """Give every tensor the type and shape that ONNX shape inference finds.

    What stays unknown (custom operators and what follows them) keeps None.
    """
    with located(model.path):
        inferred = _inferred(model)
    known = {
        v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output) if v.type.ByteSize()
    }
    for name, tensor in model.graph.tensors().items():
        value = known.get(name)
        if value is None or not isinstance(tensor, gs.Variable):
            continue
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and is_known(kind.elem_type):
            tensor.dtype = graph_dtype(kind.elem_type)
            if tensor.shape is None and kind.HasField("shape"):
                tensor.shape = [
                    d.dim_param or (d.dim_value if d.HasField("dim_value") else None)
                    for d in kind.shape.dim
                ]


def inline_functions(model: Model) -> tuple[Model, list[Edit]]:
    """Replace calls of the model's own functions by their bodies, so that passes see inside."""
    names = sorted({f.name for f in model.header.functions})
    with located(model.path):
        proto = inline(model.referring())
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    step = Edit("load", "inline", shown, f"{len(names)} model-local functions")
    return _successor(model, proto), [step]


def raise_opset(model: Model, opset: int) -> tuple[Model, list[Edit]]:
    """Raise the standard opset; nodes whose operator did not change stay byte for byte.

    Returns:
        A new model; the same one where no node had to be rewritten, to have one in memory.

    Raises:
        OnnxqError: an operator that cannot be raised; the message names the node.
    """
    old, proto = model.opset, model.referring()
    with located(model.path):
        require_versions(proto, opset)
        changed = convert(proto, _inferred(model), old, opset)
    if changed:
        model = _successor(model, proto)
    else:
        model.header.ClearField("opset_import")
        model.header.opset_import.extend(proto.opset_import)
    what = f"{changed} nodes rewritten" if changed != 1 else "1 node rewritten"
    return model, [Edit("load", "raise opset", f"{old} -> {opset}", what)]


def _modernise(model: Model) -> list[Edit]:
    """An ir_version that has the opset and takes new initializers; initializers only constants.

    Before IR version 4 every initializer had to be an input too; later, one that is can be
    overridden by the caller. TensorRT takes them for constants either way, and so do the passes.
    """
    edits = []
    header, graph = model.header, model.header.graph
    needed = onnx.helper.find_min_ir_version_for(list(header.opset_import), ignore_unknown=True)
    needed = max(needed, 4)
    if header.ir_version < needed:
        edits.append(Edit("load", "raise ir_version", f"{header.ir_version} -> {needed}"))
        header.ir_version = needed
    inputs = [v for v in graph.input if v.name not in model.initializers]
    count = len(graph.input) - len(inputs)
    if count:
        graph.ClearField("input")
        graph.input.extend(inputs)
        what = f"{count} initializers" if count > 1 else "1 initializer"
        edits.append(Edit("load", "fix", what, "inputs with a default: constants from here on"))
    return edits


def _inferred(model: Model) -> onnx.ModelProto:
    """The model with the types that ONNX shape inference finds, in bodies too.

    It has InstanceNormalization where the model has GroupNormalization.
    """
    proto = export(model, bare=True)
    for node in nested_nodes(proto.graph.node):
        # Inference knows nothing of it, nor of what comes behind; its output is as its first input.
        if node.op_type == "GroupNormalization" and is_standard(node):
            node.op_type = "InstanceNormalization"
    try:
        inferred = shape_inference.infer_shapes(proto, data_prop=False)
        if _add_ranks(inferred.graph):
            inferred = shape_inference.infer_shapes(inferred, data_prop=False)
    except TOOL_ERRORS as error:
        raise OnnxqError(
            f"shape inference fails: {tool_reason(error)}",
            "the model is inconsistent; export again",
        ) from None
    return inferred


def _add_ranks(graph: onnx.GraphProto) -> bool:
    """Give the output of each Transpose the rank its permutation tells; whether any had none.

    Inference stops at a Reshape to a computed shape and does not ask what comes behind. Without a
    rank, the Softmax of an attention turns into four operators when the opset is raised past 13.
    """
    perms = {n.output[0]: a.ints for n in graph.node for a in n.attribute if _is_perm(n, a)}
    found = False
    for value in graph.value_info:
        tensor = value.type.tensor_type
        if value.name in perms and tensor.elem_type and not tensor.HasField("shape"):
            tensor.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in perms[value.name])
            found = True
    return found


def _is_perm(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> bool:
    return node.op_type == "Transpose" and attribute.name == "perm" and len(node.output) == 1


def _successor(model: Model, proto: onnx.ModelProto) -> Model:
    """The same file's model, as `proto` has it now."""
    with located(model.path):
        check_proto(proto)  # what onnx's tools make of an odd model is not always whole
    new = Model.from_proto(proto, model.path)
    new.external, new.sources = model.external, model.sources
    new.fingerprint = model.fingerprint
    return new
