"""What onnxq does not touch comes out as it went in: every field, every byte of every weight.

The oracle is onnx's own parser and ONNX Runtime, not the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graph_models as g
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.graph.weights import array

HAND_MADE: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": g.mlp,
    "if": g.with_if,
    "nested if": g.with_nested_if,
    "loop": g.with_loop,
    "scan": g.with_scan,
    "functions": g.with_functions,
    "everything": g.with_everything,
}
REAL = ["minilm", "minilm-legacy", "ppocr_rec", "sdxl-unet-tiny-fp16", "smollm2-fp32"]


def _unchanged(source: Path, written: Path) -> None:
    old, new = (onnx.load(p, load_external_data=False) for p in (source, written))
    assert g.differences(old, new, source.parent, written.parent) == []


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("name", HAND_MADE)
def test_loading_and_saving_changes_nothing(name: str, external: bool, tmp_path: Path) -> None:
    model = HAND_MADE[name]()
    if name == "everything" and external:
        del model.graph.initializer[5]  # onnx cannot save a tensor of strings externally
    source = g.saved(model, tmp_path / "in.onnx", external)
    written, *data = save(Model.load(source), tmp_path / "out.onnx")
    _unchanged(source, written)
    large = any(len(t.raw_data) >= 1024 for t in model.graph.initializer)
    assert bool(data) == (external and large)  # what would be empty is not written
    again = save(Model.load(written), tmp_path / "again.onnx")[0]
    _unchanged(source, again)


@pytest.mark.parametrize("name", [n for n in HAND_MADE if n != "everything"])
def test_outputs_stay_equal_bit_by_bit(name: str, tmp_path: Path) -> None:
    source = g.saved(HAND_MADE[name](), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    want = g.outputs_of(source, feed)
    loaded = Model.load(source)
    for model in (loaded, prepare(loaded, 21)[0]):
        written = save(model, tmp_path / "out.onnx", external=True)[0]
        for path in (written, save(model, tmp_path / "inline.onnx", external=False)[0]):
            _same(want, g.outputs_of(path, feed))
        content, folder = model.session_model()
        _same(want, g.outputs_of(content, feed, folder))


def _same(want: list[np.ndarray], have: list[np.ndarray]) -> None:
    assert len(want) == len(have)
    for a, b in zip(want, have, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", REAL)
def test_real_models_pass_through(name: str, tmp_path: Path) -> None:
    source = g.real_model(name)
    model = Model.load(source)
    written = save(model, tmp_path / "model.onnx")[0]
    _unchanged(source, written)
    feed = g.feed_of(source)
    want = g.outputs_of(source, feed)
    _same(want, g.outputs_of(written, feed))
    for path in tmp_path.iterdir():  # half a gigabyte: before the next is written
        path.unlink()

    raised, _ = prepare(model, 21)
    content, folder = raised.session_model()
    # The same operators in the same order: ONNX Runtime computes the same bits, but for its
    # AveragePool of opset 19, which adds in another order than that of opset 11 (PP-OCR has two,
    # and gives probabilities).
    for a, b in zip(want, g.outputs_of(content, feed, folder), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if name == "ppocr_rec" else 0)
    again = Model.load(save(raised, tmp_path / "raised.onnx")[0])
    assert again.opset == max(21, model.opset)
    assert again.export().graph.node == raised.export().graph.node


@pytest.mark.parametrize("name", REAL)
def test_a_raised_real_model_keeps_nodes_metadata_and_weights(name: str, tmp_path: Path) -> None:
    source = onnx.load(g.real_model(name), load_external_data=False)
    raised, _ = prepare(Model.load(g.real_model(name)), 23)
    path = save(raised, tmp_path / "raised.onnx")[0]
    new = onnx.load(path, load_external_data=False)
    hoisted = {n.output[0] for n in source.graph.node if n.op_type == "Constant"}
    after = {tuple(n.output): n for n in new.graph.node}
    for node in source.graph.node:
        if node.output[0] in hoisted:
            continue
        kept = after[tuple(node.output)]
        assert (kept.name, kept.doc_string) == (node.name, node.doc_string)
        assert kept.metadata_props == node.metadata_props
        before, then = (onnx.defs.get_schema(node.op_type, v) for v in (_opset(source), 23))
        if before.since_version == then.since_version:
            assert kept.SerializeToString() == node.SerializeToString()
    weights = {t.name: t for t in new.graph.initializer}
    folders = (g.real_model(name).parent, path.parent)
    for tensor in source.graph.initializer:
        a, b = (
            g.tensor_bytes(t, f)
            for t, f in zip((tensor, weights[tensor.name]), folders, strict=True)
        )
        assert a == b
    for field in ("producer_name", "producer_version", "doc_string", "metadata_props"):
        assert getattr(new, field) == getattr(source, field)
    for field in ("input", "output", "name", "doc_string", "metadata_props"):
        assert getattr(new.graph, field) == getattr(source.graph, field)


def _opset(model: onnx.ModelProto) -> int:
    return max(o.version for o in model.opset_import if o.domain == "")


def test_what_only_bodies_read_is_kept_by_every_export(tmp_path: Path) -> None:
    source = g.saved(g.with_if(), tmp_path / "in.onnx")
    model = Model.load(source)
    assert {"only_then", "only_else", "shared"} <= {c.name for c in model.constants()}
    assert model.captured_names() == {"t", "u", "shared", "only_then", "only_else"}
    Editor(model).finish()  # drops what nothing reads: not what bodies read
    names = [t.name for t in model.export().graph.initializer]
    assert names == ["shared", "only_then", "only_else"]
    content, folder = model.session_model(["v"])
    feed = g.feed_of(source)
    (value,) = g.outputs_of(content, feed, folder)
    np.testing.assert_array_equal(value + feed["x"], g.outputs_of(source, feed)[0])


def test_external_data_of_bodies_is_read(tmp_path: Path) -> None:
    source = g.with_external_bodies(tmp_path)
    want = g.outputs_of(source, g.feed_of(source))
    (tmp_path / "out").mkdir()
    written, _ = save(Model.load(source), tmp_path / "out/model.onnx")
    _same(want, g.outputs_of(written, g.feed_of(source)))
    inline = save(Model.load(source), tmp_path / "out/inline.onnx", external=False)
    assert len(inline) == 1
    _same(want, g.outputs_of(inline[0], g.feed_of(source)))


def test_initializers_that_are_inputs_too(tmp_path: Path) -> None:
    model = g.mlp()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            h.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    source = g.saved(model, tmp_path / "in.onnx")
    loaded = Model.load(source)
    assert [spec.name for spec in loaded.inputs()] == ["x"]
    _unchanged(source, save(loaded, tmp_path / "out.onnx")[0])
    prepared, edits = prepare(loaded, 19)
    new = onnx.load(save(prepared, tmp_path / "p.onnx")[0])
    assert [v.name for v in new.graph.input] == ["x"] and new.ir_version >= 9
    assert any("constants from here on" in e.reason for e in edits)
    feed = {"x": g.feed_of(tmp_path / "p.onnx")["x"]}
    _same(g.outputs_of(source, feed), g.outputs_of(tmp_path / "p.onnx", feed))


@pytest.mark.parametrize("size", [4, 40], ids=["small", "large"])
def test_outputs_that_no_operator_computes(size: int, tmp_path: Path) -> None:
    """An output that is an input, one that is an initializer, one that a Constant node makes."""
    model = g.parsed(
        """<ir_version: 8, opset_import: ["": 17]>
        plain (float[2, 3] x) => (float[2, 3] x, w, k, float[2, 3] y) { y = Relu(x) }""",
        g.weight("w", size, size),
    )
    constant = h.make_node("Constant", [], ["k"], value=g.weight("", size, size))
    model.graph.node.insert(0, constant)
    for value in model.graph.output[1:3]:
        value.CopyFrom(h.make_tensor_value_info(value.name, T.FLOAT, [size, size]))
    source = g.saved(model, tmp_path / "in.onnx")
    want = g.outputs_of(source, g.feed_of(source))
    loaded = Model.load(source)
    _unchanged(source, save(loaded, tmp_path / "same.onnx")[0])
    prepared, _ = prepare(loaded, 21)
    Editor(prepared).finish()
    assert [n.op for n in prepared.graph.nodes] == ["Constant", "Relu"]  # an output needs a maker
    for external in (False, True):
        path = save(prepared, tmp_path / "out.onnx", external=external)[0]
        _same(want, g.outputs_of(path, g.feed_of(source)))
    content, folder = prepared.session_model()
    _same(want, g.outputs_of(content, g.feed_of(source), folder))


def test_large_constant_nodes_become_initializers_and_small_ones_follow(tmp_path: Path) -> None:
    model = g.parsed(
        """<ir_version: 8, opset_import: ["": 17]>
        consts (float[2, 32] x) => (float[2, 32] y) {
            f = Constant <value_float = 2.5> ()       fs = Constant <value_floats = [1.0, 2.0]> ()
            i = Constant <value_int = 1> ()           is = Constant <value_ints = [2, 32]> ()
            s = Constant <value_string = "text"> ()
            a = MatMul(x, big)   b = Mul(a, f)   c = Reshape(b, is)   d = ReduceSum(fs)
            e = Cast <to = 1> (i)   p = Add(c, d)   y = Add(p, e)
        }"""
    )
    model.graph.node.insert(0, h.make_node("Constant", [], ["big"], value=g.weight("", 32, 32)))
    source = g.saved(model, tmp_path / "in.onnx")
    loaded = Model.load(source)
    assert [c.name for c in loaded.constants()] == ["big"]
    prepared, edits = prepare(loaded, 17)
    assert [n.op_type for n in prepared.export().graph.node if n.op_type == "Constant"] == [
        "Constant"
    ]  # the string's
    assert [e.target for e in edits] == ["1 Constant node", "4 Constant nodes"]
    content, folder = prepared.session_model()
    feed = g.feed_of(source)
    _same(g.outputs_of(source, feed), g.outputs_of(content, feed, folder))


def test_functions_are_inlined_with_the_metadata_of_their_nodes(tmp_path: Path) -> None:
    source = g.saved(g.with_functions(), tmp_path / "in.onnx")
    prepared, edits = prepare(Model.load(source), 21)
    proto = prepared.export()
    assert not proto.functions and edits[0].verb == "inline"
    assert {"Mul", "MatMul"} == {n.op_type for n in proto.graph.node}
    for node in prepared.graph.nodes:
        assert prepared.metadata(node)["namespace"].startswith("block.")
    assert all(n.doc_string.startswith("in ") for n in proto.graph.node)


def test_every_stored_type_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    model = g.with_everything()
    source = g.saved(model, tmp_path / "in.onnx")
    constants = {c.name: c for c in Model.load(source).constants()}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(array(constants[tensor.name]), nh.to_array(tensor))
    dense = np.zeros((4, 3), np.float32)
    dense[0, 1], dense[3, 2] = 1.5, -2
    np.testing.assert_array_equal(array(constants["sparse"]), dense)


def test_float_data_is_taken_for_what_it_is(tmp_path: Path) -> None:
    """Large float_data leaves the graph too; the values stay, the field becomes raw_data."""
    model = g.mlp()
    values = nh.to_array(model.graph.initializer[0])
    typed = h.make_tensor("w1", T.FLOAT, values.shape, values.ravel())
    assert typed.float_data
    model.graph.initializer[0].CopyFrom(typed)
    source = g.saved(model, tmp_path / "in.onnx")
    _unchanged(source, save(Model.load(source), tmp_path / "out.onnx")[0])


def test_preparing_without_raising_leaves_the_model_alone(tmp_path: Path) -> None:
    for name in ("mlp", "everything", "if"):
        source = g.saved(HAND_MADE[name](), tmp_path / "in.onnx")
        model = Model.load(source)
        prepared, _ = prepare(model, model.opset)
        written = save(prepared, tmp_path / "out.onnx")[0]
        old, new = onnx.load(source), onnx.load(written)
        old.ir_version = new.ir_version  # raised where it did not go with the opset
        assert g.differences(old, new, tmp_path, tmp_path) == []


def test_raising_leaves_alone_what_no_operator_of_it_is(tmp_path: Path) -> None:
    source = g.saved(g.with_everything(), tmp_path / "in.onnx")
    raised, edits = prepare(Model.load(source), 25)
    assert edits[0].reason == "0 nodes rewritten"
    written = save(raised, tmp_path / "out.onnx", external=True)[0]
    old, new = onnx.load(source), onnx.load(written, load_external_data=False)
    assert (new.opset_import[0].version, new.opset_import[1].version) == (25, 3)
    for model in (old, new):
        model.ClearField("opset_import")
        model.ClearField("ir_version")
    assert g.differences(old, new, tmp_path, tmp_path) == []


def test_the_fingerprint_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    inline = g.saved(g.mlp(), tmp_path / "a.onnx")
    model = Model.load(inline)
    external = save(model, tmp_path / "other/b.onnx", external=True)[0]
    assert Model.load(external).fingerprint == model.fingerprint
    changed = onnx.load(inline)
    changed.graph.initializer[1].raw_data = bytes(len(changed.graph.initializer[1].raw_data))
    assert Model.load(g.saved(changed, tmp_path / "c.onnx")).fingerprint != model.fingerprint
