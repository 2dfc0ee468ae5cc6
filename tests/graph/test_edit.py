"""The verbs that change a graph: names stay unique, order stays stable, bodies stay whole."""

from __future__ import annotations

from pathlib import Path

import graph_models as g
import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto as T
from onnx import numpy_helper as nh

from onnxq.graph.dtypes import from_bytes, payload_bytes, to_bytes
from onnxq.graph.edit import Editor, is_sorted, remove_dead, sort_nodes
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.graph.weights import array, original


def _load(model: onnx.ModelProto, folder: Path) -> Model:
    return Model.load(g.saved(model, folder / "in.onnx"))


def _node(model: Model, output: str) -> gs.Node:
    return next(n for n in model.graph.nodes if n.outputs[0].name == output)


def _runs(model: Model, folder: Path, feed: g.Feed) -> list[np.ndarray]:
    return g.outputs_of(save(model, folder / "out.onnx")[0], feed)


def test_new_names_avoid_those_of_bodies_and_of_unread_weights(tmp_path: Path) -> None:
    """A new outer tensor of the name of an inner one would shadow it."""
    model = _load(g.with_if(), tmp_path)
    editor = Editor(model)
    for name in ("p0", "own", "nobody", "shared", "t", "x", "y", "v"):
        assert editor.unique(name) == f"{name}_2"
    assert [editor.unique("new") for _ in range(3)] == ["new", "new_2", "new_3"]


def test_a_node_between_is_placed_before_its_first_reader(tmp_path: Path) -> None:
    model = _load(g.mlp(), tmp_path)
    editor = Editor(model)
    c, d = _node(model, "c"), _node(model, "d")
    doubled = editor.node(
        "Add", "twice", [c.outputs[0], c.outputs[0]], "twice", np.dtype(np.float32)
    )
    editor.replace_input(d, 0, doubled)
    editor.finish()
    assert [n.outputs[0].name for n in model.graph.nodes] == ["a", "b", "c", "twice", "d", "y"]
    feed = g.feed_of(tmp_path / "in.onnx")
    want = 2 * g.outputs_of(tmp_path / "in.onnx", feed)[0]
    np.testing.assert_array_equal(_runs(model, tmp_path, feed)[0], want)  # doubling is exact


def test_sorting_a_sorted_graph_moves_nothing(tmp_path: Path) -> None:
    for name in ("minilm", "sdxl-unet-tiny-fp16"):
        model = Model.load(g.real_model(name))
        before = list(model.graph.nodes)
        sort_nodes(model)
        assert all(a is b for a, b in zip(before, model.graph.nodes, strict=True))


def test_an_unsorted_file_is_sorted_by_prepare_and_kept_by_load(tmp_path: Path) -> None:
    model = g.with_if()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    source = g.saved(model, tmp_path / "in.onnx")
    loaded = Model.load(source)
    assert not is_sorted(loaded)
    kept = onnx.load(save(loaded, tmp_path / "kept.onnx")[0])
    assert [n.output[0] for n in kept.graph.node] == ["y", "v", "u", "t"]
    prepared, edits = prepare(loaded, 19)
    assert [n.outputs[0].name for n in prepared.graph.nodes] == ["t", "u", "v", "y"]
    assert "sort" in [e.verb for e in edits]
    feed = g.feed_of(source)
    want = g.outputs_of(source, feed)[0]  # ONNX Runtime sorts by itself
    np.testing.assert_array_equal(_runs(prepared, tmp_path, feed)[0], want)


def test_what_bodies_need_is_alive_and_comes_first(tmp_path: Path) -> None:
    """`t` is read by the bodies alone once `u` reads something else."""
    model = _load(g.with_if(), tmp_path)
    editor = Editor(model)
    editor.replace_input(_node(model, "u"), 0, model.graph.inputs[1])
    model.graph.nodes.reverse()
    editor.finish()
    names = [n.outputs[0].name for n in model.graph.nodes]
    assert names.index("t") < names.index("v") and names.index("u") < names.index("v")
    assert g.session(save(model, tmp_path / "out.onnx")[0])


def test_a_dead_body_lets_go_of_what_it_read(tmp_path: Path) -> None:
    model = _load(g.with_if(), tmp_path)
    editor = Editor(model)
    last = _node(model, "y")
    editor.replace_input(last, 0, last.inputs[1])  # x + x: nothing reads the If any more
    editor.finish()
    assert [n.op for n in model.graph.nodes] == ["Add"]
    assert list(model.constants()) == []


def test_a_node_without_outputs_stays_with_what_it_needs(tmp_path: Path) -> None:
    model = g.mlp()
    model.opset_import.add(domain="own", version=1)
    model.graph.node.add(op_type="Log", domain="own", input=["side"])
    model.graph.node.add(op_type="Exp", input=["x"], output=["dead"])
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["side"]))
    loaded = _load(model, tmp_path)
    assert remove_dead(loaded) == 1
    assert [n.op for n in loaded.graph.nodes if n.op in ("Neg", "Log", "Exp")] == ["Neg", "Log"]


def test_redirect_swaps_the_names_of_a_computed_output(tmp_path: Path) -> None:
    model = _load(g.mlp(), tmp_path)
    editor = Editor(model)
    old = _node(model, "y").outputs[0]
    editor.redirect(old, _node(model, "d").outputs[0])
    editor.finish()
    assert [t.name for t in model.graph.outputs] == ["y"]
    assert [n.op for n in model.graph.nodes] == ["MatMul", "Mul", "Relu", "MatMul"]
    feed = g.feed_of(tmp_path / "in.onnx")
    want = g.outputs_of(tmp_path / "in.onnx", feed)[0]
    np.testing.assert_array_equal(_runs(model, tmp_path, feed)[0] / 2, want)  # the last Mul: 0.5


def test_redirect_to_what_must_keep_its_name_adds_a_node(tmp_path: Path) -> None:
    """An input's name is part of the interface too, and a body reads by name."""
    model = _load(g.with_if(), tmp_path)
    editor = Editor(model)
    editor.redirect(_node(model, "y").outputs[0], model.graph.inputs[1])
    editor.finish()
    assert [t.name for t in (*model.graph.inputs, *model.graph.outputs)] == ["c", "x", "y"]
    feed = g.feed_of(tmp_path / "in.onnx")
    np.testing.assert_array_equal(_runs(model, tmp_path, feed)[0], feed["x"])

    again = _load(g.with_if(), tmp_path)
    editor = Editor(again)
    editor.redirect(_node(again, "y").outputs[0], _node(again, "u").outputs[0])
    out = again.graph.outputs[0]
    assert out.name == "y" and out.inputs[0].op == "Identity"
    assert _node(again, "u").outputs[0].name == "u"


def test_attributes_replace_what_was_imported_and_keep_the_rest(tmp_path: Path) -> None:
    model = g.parsed(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (y) {
            y = Softmax <axis = 0> (x) }"""
    )
    node = model.graph.node[0]
    node.doc_string, node.attribute[0].doc_string = "of the node", "of the attribute"
    node.attribute.append(onnx.helper.make_attribute("own", b"\xff"))
    loaded = _load(model, tmp_path)
    editor = Editor(loaded)
    editor.set_attribute(loaded.graph.nodes[0], "axis", 1)
    new = loaded.export().graph.node[0]
    assert {a.name: onnx.helper.get_attribute_value(a) for a in new.attribute} == {
        "axis": 1,
        "own": b"\xff",
    }
    assert new.doc_string == "of the node"
    editor.set_attribute(loaded.graph.nodes[0], "axis", None)
    assert [a.name for a in loaded.export().graph.node[0].attribute] == ["own"]


@pytest.mark.parametrize("size", [3, 5000], ids=["inline", "streamed"])
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (np.float16, T.FLOAT16),
        (ml_dtypes.bfloat16, T.BFLOAT16),
        (ml_dtypes.float8_e4m3fn, T.FLOAT8E4M3FN),
        (ml_dtypes.int4, T.INT4),
        (ml_dtypes.uint4, T.UINT4),
        (ml_dtypes.float4_e2m1fn, T.FLOAT4E2M1),
        (np.int64, T.INT64),
        (bool, T.BOOL),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_constants_of_every_type_are_written_as_onnx_reads_them(
    dtype: type, kind: int, size: int, tmp_path: Path
) -> None:
    values = (np.arange(size) % 5).astype(dtype)
    model = _load(g.mlp(), tmp_path)
    editor = Editor(model)
    constant = editor.constant("new", values)
    node = gs.Node("Own", "reads", {}, [constant], [gs.Variable("out")], domain="")
    model.graph.nodes.append(node)
    model.graph.outputs.append(node.outputs[0])
    np.testing.assert_array_equal(array(constant), values)
    assert payload_bytes(kind, (size,)) == len(to_bytes(values, kind))
    np.testing.assert_array_equal(
        from_bytes(np.frombuffer(to_bytes(values, kind), np.uint8), kind, (size,)), values
    )
    for external in (False, True):
        path = save(model, tmp_path / "out.onnx", external=external)[0]
        tensor = next(t for t in onnx.load(path).graph.initializer if t.name == "new")
        assert tensor.data_type == kind
        np.testing.assert_array_equal(nh.to_array(tensor), values)
        again = next(c for c in Model.load(path).constants() if c.name == "new")
        np.testing.assert_array_equal(array(again), values)


def test_derived_values_are_computed_once_when_they_are_written(tmp_path: Path) -> None:
    model = _load(g.mlp(), tmp_path)
    editor = Editor(model)
    node = _node(model, "a")
    old, calls = node.inputs[1], []

    def produce() -> np.ndarray:
        calls.append(1)
        return array(old).astype(np.float16).astype(np.float32)

    new = editor.derived("w1_cast", T.FLOAT, tuple(old.shape), produce, origin=old)
    editor.replace_input(node, 1, new)
    editor.finish()
    assert calls == []
    path = save(model, tmp_path / "out.onnx")[0]
    assert calls == [1]
    weights = {t.name: nh.to_array(t) for t in onnx.load(path).graph.initializer}
    assert "w1" not in weights
    np.testing.assert_array_equal(weights["w1_cast"], weights["w1_cast"].astype(np.float16))
    np.testing.assert_array_equal(original(new), array(old))


def test_a_shared_weight_is_copied_not_changed(tmp_path: Path) -> None:
    """Both products read `s`: an edit at one must not reach the other."""
    model = _load(g.mlp(), tmp_path)
    editor = Editor(model)
    node = _node(model, "b")
    editor.replace_input(node, 1, editor.constant("s", np.array(4.0, np.float32)))
    editor.finish()
    weights = {t.name: nh.to_array(t) for t in model.export().graph.initializer if t.raw_data}
    assert float(weights["s"]) == 0.5 and float(weights["s_2"]) == 4.0
    assert _node(model, "y").inputs[1].name == "s"


def test_added_nodes_share_the_module_path_of_the_node_they_work_for(tmp_path: Path) -> None:
    source = g.mlp()
    source.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'a.b']")
    source.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="long")
    model = _load(source, tmp_path)
    editor = Editor(model)
    first = _node(model, "a")
    out = editor.node("Neg", "neg", [first.outputs[0]], "neg", np.dtype(np.float32), like=first)
    editor.replace_input(_node(model, "b"), 0, out)
    editor.finish()
    node = next(n for n in model.export().graph.node if n.op_type == "Neg")
    assert [(e.key, e.value) for e in node.metadata_props] == [
        ("pkg.torch.onnx.name_scopes", "['', 'a.b']")
    ]
    assert model.metadata(_node(model, "neg")) == {"pkg.torch.onnx.name_scopes": "['', 'a.b']"}


def test_a_value_retyped_by_a_pass_keeps_everything_else(tmp_path: Path) -> None:
    source = g.mlp()
    value = onnx.helper.make_tensor_value_info("c", T.FLOAT, ["n", 64], doc_string="hidden")
    value.type.denotation = "FEATURE"
    source.graph.value_info.append(value)
    model = _load(source, tmp_path)
    _node(model, "c").outputs[0].dtype = np.dtype(np.float16)
    (new,) = model.export().graph.value_info
    value.type.tensor_type.elem_type = T.FLOAT16
    assert new == value


def test_a_pass_that_drops_a_tensor_drops_what_the_file_said_of_it(tmp_path: Path) -> None:
    source = g.mlp()
    for name in ("c", "ghost"):
        source.graph.value_info.append(onnx.helper.make_tensor_value_info(name, T.FLOAT, None))
        source.graph.quantization_annotation.add(tensor_name=name)
    model = _load(source, tmp_path)
    editor = Editor(model)
    editor.replace_input(_node(model, "d"), 0, _node(model, "b").outputs[0])
    editor.finish()
    graph = model.export().graph
    # `ghost` was never there: what the file says of it is not ours to judge.
    assert [v.name for v in graph.value_info] == ["ghost"]
    assert [a.tensor_name for a in graph.quantization_annotation] == ["ghost"]
