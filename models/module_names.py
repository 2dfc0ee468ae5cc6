"""Give the weights of a torch export the names of their modules. No torch needed."""

from __future__ import annotations

import ast
from collections import Counter

import onnx

from models.graph_writer import NAME_SCOPES


def modules(node: onnx.NodeProto) -> list[str]:
    """The modules a node lies in, outermost first: ['down_blocks.1', 'down_blocks.1.resnets.0'].

    Read from the metadata that torch.onnx.export(dynamo=True) writes; empty where there is none
    (the exporter gives none to a Split, for one).
    """
    scopes = next((item.value for item in node.metadata_props if item.key == NAME_SCOPES), "[]")
    return [scope for scope in ast.literal_eval(scopes)[:-1] if scope]


def name_by_module(model: onnx.ModelProto) -> int:
    """Rename `val_N` weights of MatMul to `<module path>.weight_T`; returns how many.

    Raises:
        ValueError: two weights would have the same name.
    """
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    renamed = 0
    for node in graph.node:
        if node.op_type != "MatMul" or not node.input[1].startswith("val_"):
            continue
        tensor, path = initializers.get(node.input[1]), modules(node)
        if tensor is None or uses[tensor.name] != 1 or not path:
            continue
        tensor.name = node.input[1] = f"{path[-1]}.weight_T"
        renamed += 1
    names = Counter(tensor.name for tensor in graph.initializer)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"two weights would have the name {twice[0]!r}")
    return renamed
