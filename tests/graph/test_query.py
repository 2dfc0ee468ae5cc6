"""Questions about graphs that exporters rarely write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from core_graphs import Net, placed, reasons
from onnx import TensorProto as T
from onnx import helper as h

from onnxq.graph.check import TOOL_ERRORS
from onnxq.graph.dims import Dims
from onnxq.graph.model import Model
from onnxq.graph.precision import BASES, plan_precision
from onnxq.graph.prepare import prepare
from onnxq.graph.qdq import factor
from onnxq.graph.query import has_subgraph, known_shapes, label, live_nodes, scalar


def loaded(model: onnx.ModelProto) -> Model:
    return prepare(Model.from_proto(model, Path("m.onnx")), 0)[0]


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        (h.make_tensor("c", T.FLOAT, [1, 1], [2.5]), 2.5),
        (h.make_tensor("c", T.INT64, [], [7]), 7.0),
        (h.make_tensor("c", T.BFLOAT16, [1], [0.5]), 0.5),
        (h.make_tensor("c", T.BOOL, [], [True]), 1.0),
        (h.make_tensor("c", T.FLOAT, [2], [1.0, 2.0]), None),
        (h.make_tensor("c", T.FLOAT, [0], []), None),
        (h.make_tensor("c", T.STRING, [1], [b"1.5"]), None),
        (h.make_tensor("c", T.STRING, [1], [b"\xff"]), None),
        (h.make_tensor("c", T.COMPLEX64, [1], [1 + 2j]), None),
    ],
)
def test_the_number_a_constant_holds(tensor: onnx.TensorProto, value: float | None) -> None:
    nodes = [h.make_node("Identity", ["c"], ["y"])]
    outputs = [h.make_tensor_value_info("y", tensor.data_type, None)]
    graph = h.make_graph(nodes, "g", [], outputs, [tensor])
    model = loaded(h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10))
    assert scalar(model.graph.nodes[0].inputs[0]) == value


def bodies_in_a_list() -> Net:
    """A custom operator with a list of bodies: two read `/relu`, one gives `/captured` back."""
    net = Net()
    x = net.input("x", ["m", 32])
    relu = net.op("Relu", x, name="/relu")
    captured = net.op("MatMul", x, net.weight("w", 32, 32), name="/captured")
    value = h.make_tensor_value_info("result", T.FLOAT, None)
    reading = h.make_graph(
        [h.make_node("Neg", [relu], ["hidden"]), h.make_node("Abs", ["hidden"], ["result"])],
        "reading",
        [],
        [value],
    )
    multiplying = h.make_node("MatMul", [relu, "w"], ["product"], name="/inner")
    product = h.make_tensor_value_info("product", T.FLOAT, None)
    second = h.make_graph([multiplying], "second", [], [product])
    giving = h.make_graph([], "giving", [], [h.make_tensor_value_info(captured, T.FLOAT, None)])
    bodies = [reading, second, giving]
    chosen = net.op("Choose", x, name="/choose", domain="my.domain", bodies=bodies)
    net.output(chosen, ["m", 32])
    net.op("Neg", relu, name="/dead")
    return net


def test_lists_of_bodies_are_bodies_too() -> None:
    model = bodies_in_a_list().loaded()
    nodes = {label(n): n for n in model.graph.nodes}
    assert [name for name, node in nodes.items() if has_subgraph(model, node)] == ["/choose"]
    live = live_nodes(model)
    assert [name for name, node in nodes.items() if id(node) not in live] == ["/dead"]
    plan = plan_precision(model, BASES["fp16"])
    kept = {name: plan.kept[id(n)] for name, n in nodes.items() if id(n) in plan.kept}
    assert kept == {
        "/relu": "a subgraph reads its output",
        "/captured": "a subgraph reads its output",
        "/choose": "holds a subgraph, which passes through untouched",
    }
    where = "inside a subgraph of Choose '/choose', which stays as it is"
    assert reasons(placed(model)) == {"/captured": "", "/inner": where}


def test_a_name_that_a_body_makes_itself_is_not_read_from_outside() -> None:
    """Two branches that use the main graph's name for a value of their own; ONNX Runtime
    loads that."""
    net = Net()
    x, condition = net.input("x", ["m", 8]), net.input("condition", [], bool)
    value = h.make_tensor_value_info("result", T.FLOAT, None)
    nodes = [h.make_node("Neg", [x], ["/own:0"]), h.make_node("Abs", ["/own:0"], ["result"])]
    body = h.make_graph(nodes, "body", [], [value])
    net.output(net.op("If", condition, name="/if", then_branch=body, else_branch=body))
    net.output(net.op("Neg", net.op("Relu", x, name="/own"), name="/after"))
    model = net.loaded()
    plan = plan_precision(model, BASES["fp16"])
    assert {label(n) for n in model.graph.nodes if id(n) in plan.kept} == {"/if"}


@pytest.mark.parametrize("error", TOOL_ERRORS)
def test_shapes_stay_as_they_are_where_onnx_finds_none(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("of some kind")

    net = Net()
    net.output(net.op("Relu", net.input("x", ["m", "n"]), name="/relu"))
    model = net.loaded()
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    (relu,) = model.graph.nodes
    assert known_shapes(model, relu.outputs) == {"/relu:0": ["m", "n"]}


def test_dimensions_joined_many_times_keep_short_names() -> None:
    """Each Add joins two unknown names; a name of names would double in length from Add to Add."""
    net = Net()
    x = net.input("x", ["n", 4])
    for index in range(20):
        own = net.input(f"r{index}", [f"length{index}", 4])
        x = net.op("Mul", net.op("Add", x, own), net.op("Sub", x, own))
    net.output(net.op("Add", x, x), ["m", 4])
    model, dims = net.loaded(), Dims()
    for node in model.graph.nodes:
        for made in node.outputs:
            made.shape = None
    found = [dims.of(made) for node in model.graph.nodes for made in node.outputs]
    assert all(shape is not None and shape[1] == 4 for shape in found)
    names = [shape[0] for shape in found if shape is not None]
    assert all(isinstance(name, str) and len(name) < 20 for name in names)
    # x + r is as long as x - r; in the next round all is of another length.
    assert names[0] == names[1] == names[2] != names[3]


def test_a_product_of_constants_scales_nothing() -> None:
    """Found by fuzzing: lint looked for the operand that is no constant."""
    two, three = (gs.Constant(n, np.array(v, np.float32)) for n, v in (("a", 2), ("b", 3)))
    x = gs.Variable("x", np.float32, [4])
    made = gs.Variable("y", np.float32, [4])
    assert factor(gs.Node("Mul", inputs=[two, three], outputs=[made])) is None
    assert factor(gs.Node("Mul", inputs=[x, three], outputs=[made])) == 3
    assert factor(gs.Node("Div", inputs=[two, three], outputs=[made])) is None
