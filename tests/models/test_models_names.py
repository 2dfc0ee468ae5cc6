"""Names in torch's exports."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from models.graph_writer import NAME_SCOPES
from models.module_names import name_by_module


def exported(paths: list[str]) -> onnx.ModelProto:
    """A chain of MatMul whose weights are `val_N` and whose modules are `paths`."""
    nodes, weights = [], []
    for index, path in enumerate(paths):
        node = helper.make_node("MatMul", [f"x{index}", f"val_{index}"], [f"x{index + 1}"])
        node.metadata_props.add(
            key=NAME_SCOPES, value=repr(["", *([path] if path else []), "linear"])
        )
        nodes.append(node)
        weights.append(helper.make_tensor(f"val_{index}", TensorProto.FLOAT, [1, 1], [0.0]))
    return helper.make_model(helper.make_graph(nodes, "g", [], [], weights))


def test_weights_get_the_names_of_their_modules() -> None:
    model = exported(["block.0.to_q", "", "block.0.to_k"])
    assert name_by_module(model) == 2
    names = ["block.0.to_q.weight_T", "val_1", "block.0.to_k.weight_T"]
    assert [tensor.name for tensor in model.graph.initializer] == names
    assert [node.input[1] for node in model.graph.node] == names


def test_a_module_that_runs_twice_is_not_renamed_twice() -> None:
    with pytest.raises(ValueError, match=r"'block\.0\.to_q\.weight_T'"):
        name_by_module(exported(["block.0.to_q", "block.0.to_q"]))
