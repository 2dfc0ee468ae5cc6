"""What other rooms ask of a loaded model."""

from __future__ import annotations

from pathlib import Path

import graph_models as g
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from onnxq.errors import OnnxqError
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.prepare import infer_types, prepare
from onnxq.graph.save import save


def test_any_tensor_can_be_an_output_of_the_session(tmp_path: Path) -> None:
    source = g.saved(g.mlp(), tmp_path / "in.onnx")
    model, _ = prepare(Model.load(source), 19)
    feed = g.feed_of(source)
    content, folder = model.session_model(["c", "a", "x", "w2"])
    c, a, x, w2 = g.outputs_of(content, feed, folder)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    np.testing.assert_array_equal(x, feed["x"])
    np.testing.assert_array_equal(w2, weights["w2"])
    np.testing.assert_array_equal(c, np.maximum(a * np.float32(0.5), 0))
    cut = onnx.ModelProto.FromString(model.session_model(["a"])[0])
    assert [n.op_type for n in cut.graph.node] == ["MatMul"]
    assert [t.name for t in cut.graph.initializer] == ["w1"]


def test_types_of_tensors_the_file_says_nothing_of(tmp_path: Path) -> None:
    model = Model.load(g.saved(g.mlp(), tmp_path / "in.onnx"))
    infer_types(model)
    tensors = model.graph.tensors()
    assert {n: (tensors[n].dtype, tensors[n].shape) for n in "acd"} == {
        "a": (np.float32, ["n", 64]),
        "c": (np.float32, ["n", 64]),
        "d": (np.float32, ["n", 8]),
    }
    assert not model.export().graph.value_info  # inferred is not said


def test_shapes_that_lie_in_a_data_file_are_read_for_inference(tmp_path: Path) -> None:
    """onnx refuses to infer through a Reshape whose shape is external; so does ONNX Runtime."""
    model = g.parsed(
        """<ir_version: 8, opset_import: ["": 11]> g (float[2, 6] x) => (y) {
            a = Reshape(x, to)  y = Squeeze <axes = [0]> (a) }""",
        onnx.numpy_helper.from_array(np.array([1, 3, 4], np.int64), "to"),
    )
    source = g.saved(model, tmp_path / "in.onnx", external=True)
    prepared, _ = prepare(Model.load(source), 21)
    assert prepared.graph.tensors()["y"].shape == [3, 4]
    content, folder = prepared.session_model()
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(g.outputs_of(content, {"x": x}, folder)[0], x.reshape(3, 4))
    written = onnx.load(save(prepared, tmp_path / "out.onnx")[0], load_external_data=False)
    assert written.graph.initializer[0].raw_data


def test_inputs(tmp_path: Path) -> None:
    model = g.mlp()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    model.graph.input.append(h.make_tensor_value_info("half", T.BFLOAT16, ["b", None]))
    found = Model.load(g.saved(model, tmp_path / "a.onnx")).inputs()
    assert [str(spec) for spec in found] == ["x[?,32] float32", "half[b,?] bfloat16"]
    model.graph.input.append(h.make_tensor_sequence_value_info("many", T.FLOAT, [1]))
    with pytest.raises(OnnxqError, match="'many' is no tensor"):
        Model.load(g.saved(model, tmp_path / "b.onnx")).inputs()


def test_what_is_computed_on_writing_has_no_file_to_refer_to(tmp_path: Path) -> None:
    model = Model.load(g.saved(g.mlp(), tmp_path / "in.onnx"))
    editor = Editor(model)
    node = model.graph.nodes[0]
    old = node.inputs[1]
    new = editor.derived("cast", T.FLOAT, tuple(old.shape), lambda: np.zeros((32, 64), np.float32))
    editor.replace_input(node, 1, new)
    with pytest.raises(AssertionError, match="'cast' is computed when the model is saved"):
        model.referring()


def test_a_session_gets_what_is_computed_on_writing(tmp_path: Path) -> None:
    """So that a model whose weights were changed can be measured before it is saved."""
    model = Model.load(g.saved(g.mlp(), tmp_path / "in.onnx"))
    editor = Editor(model)
    node = model.graph.nodes[0]
    old = node.inputs[1]
    changed = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)
    new = editor.derived("cast", T.FLOAT, tuple(old.shape), lambda: changed)
    editor.replace_input(node, 1, new)
    content, folder = model.session_model(["a"])
    feed = {"x": np.eye(3, 32, dtype=np.float32)}
    np.testing.assert_array_equal(g.outputs_of(content, feed, folder)[0], changed[:3])


def test_bytes_outside_are_counted_once(tmp_path: Path) -> None:
    external = g.saved(g.mlp(), tmp_path / "in.onnx", external=True)
    outside = Model.load(external).stored_outside()
    assert sum(v.nbytes for v in outside) == 4 * (32 * 64 + 64 * 8)  # the scalar is read
    inline = save(Model.load(external), tmp_path / "inline.onnx", external=False)[0]
    assert list(Model.load(inline).stored_outside()) == []


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    path = Path(bytes(tmp_path).decode() + "/caf\udce9.onnx")
    g.saved(g.mlp(), path)
    with pytest.raises(OnnxqError, match="not UTF-8"):
        Model.load(path)
