"""Raising the opset changes what an operator's new form asks for, and nothing else.

The oracle is ONNX Runtime: it runs the old operator and the new one.
"""

from __future__ import annotations

from pathlib import Path

import graph_hostile as hostile
import graph_models as g
import numpy as np
import onnx
import pytest
from onnx import numpy_helper as nh

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare, raise_opset
from onnxq.graph.save import save


def _w(name: str, values: object, dtype: type = np.float32) -> onnx.TensorProto:
    return nh.from_array(np.array(values, dtype), name)


# Operator of an old form: opset, signature, nodes, weights. ONNX Runtime runs all of them.
FORMS: dict[str, tuple[int, str, str, list[onnx.TensorProto]]] = {
    "Squeeze": (11, "(float[1,3,4] x) => (y)", "y = Squeeze<axes=[0]>(x)", []),
    "Squeeze all": (11, "(float[1,3,4] x) => (y)", "y = Squeeze(x)", []),
    "Unsqueeze": (11, "(float[3,4] x) => (y)", "y = Unsqueeze<axes=[0,-1]>(x)", []),
    "Split": (11, "(float[4,4] x) => (y, z)", "y, z = Split<split=[1,3]>(x)", []),
    "Split 13": (13, "(float[4,4] x) => (y, z)", "y, z = Split(x)", []),
    "Pad": (10, "(float[2,2] x) => (y)", "y = Pad<pads=[1,0,1,1],value=2.0>(x)", []),
    "Clip": (10, "(float[2,2] x) => (y)", "y = Clip<min=-0.5,max=0.5>(x)", []),
    "Clip half": (10, "(float[2,2] x) => (y)", "y = Clip<min=-0.5>(x)", []),
    "Dropout": (9, "(float[2,2] x) => (y)", "y = Dropout<ratio=0.5>(x)", []),
    "TopK": (9, "(float[2,5] x) => (y, i)", "y, i = TopK<axis=1,k=2>(x)", []),
    "Softmax": (11, "(float[2,3,4] x) => (y)", "y = Softmax(x)", []),
    "Softmax middle": (11, "(float[2,3,4] x) => (y)", "y = Softmax<axis=-2>(x)", []),
    "Softmax last": (11, "(float[2,3,4] x) => (y)", "y = Softmax<axis=2>(x)", []),
    "LogSoftmax": (11, "(float[2,3,4] x) => (y)", "y = LogSoftmax<axis=1>(x)", []),
    "Hardmax last": (11, "(float[2,3,4] x) => (y)", "y = Hardmax<axis=2>(x)", []),
    "Hardmax rows": (11, "(float[2,3] x) => (y)", "y = Hardmax(x)", []),
    "Resize nearest": (
        10,
        "(float[1,1,5,7] x) => (y)",
        'y = Resize<mode="nearest">(x, s)',
        [_w("s", [1, 1, 1.5, 1.7])],
    ),
    "Resize linear": (
        10,
        "(float[1,1,5,7] x) => (y)",
        'y = Resize<mode="linear">(x, s)',
        [_w("s", [1, 1, 0.6, 1.7])],
    ),
    "Upsample nearest": (
        9,
        "(float[1,1,5,7] x) => (y)",
        'y = Upsample<mode="nearest">(x, s)',
        [_w("s", [1, 1, 1.5, 1.7])],
    ),
    "Upsample linear": (
        7,
        "(float[1,1,2,2] x) => (y)",
        'y = Upsample<mode="linear",scales=[1.0,1.0,2.0,2.0]>(x)',
        [],
    ),
    "BatchNormalization": (
        7,
        "(float[1,2,2,2] x) => (y)",
        "y = BatchNormalization(x, a, b, b, c)",
        [_w("a", [1, 2]), _w("b", [0, 1]), _w("c", [1, 3])],
    ),
    "GroupNormalization": (
        18,
        "(float[2,6,2,2] x) => (float[2,6,2,2] y)",
        "y = GroupNormalization<num_groups=3, epsilon=0.01>(x, s, b)",
        [_w("s", [1, 2, 3]), _w("b", [0, 1, -5])],
    ),
    "GroupNormalization 20, in FP16": (
        20,
        "(float16[1,4,n] x) => (float16[1,4,n] y)",
        "y = GroupNormalization<num_groups=2>(x, s, s)",
        [_w("s", [1, 2], np.float16)],
    ),
    "Slice": (9, "(float[4,4] x) => (y)", "y = Slice<axes=[0],starts=[1],ends=[3]>(x)", []),
    "Slice all": (9, "(float[4,4] x) => (y)", "y = Slice<starts=[1,0],ends=[3,2]>(x)", []),
    "Scatter": (
        9,
        "(float[3,2] x) => (y)",
        "y = Scatter(x, i, u)",
        [_w("i", [[0, 1]], np.int64), _w("u", [[5, 6]])],
    ),
    "ReduceSum": (11, "(float[2,3] x) => (y)", "y = ReduceSum<axes=[1]>(x)", []),
    "ReduceMax": (17, "(float[2,3] x) => (y)", "y = ReduceMax<axes=[-1],keepdims=0>(x)", []),
    "ReduceMean all": (17, "(float[2,3] x) => (y)", "y = ReduceMean<keepdims=0>(x)", []),
    "Cast": (8, "(float[2] x) => (y)", "y = Cast<to=7>(x)", []),
    "AveragePool": (9, "(float[1,1,4,4] x) => (y)", "y = AveragePool<kernel_shape=[2,2]>(x)", []),
    "GridSample": (
        16,
        "(float[1,1,2,2] x) => (y)",
        'y = GridSample<mode="bilinear">(x, at)',
        [_w("at", [[[[0.1, -0.3]]]])],
    ),
    "DFT": (17, "(float[1,4,3,1] x) => (y)", "y = DFT(x)", []),
    "LSTM without its first output": (
        7,
        "(float[2,1,3] x) => (h)",
        "_, h = LSTM<hidden_size=2>(x, w, r)",
        [_w("w", np.full((1, 8, 3), 0.1)), _w("r", np.full((1, 8, 2), 0.2))],
    ),
    "RoiAlign": (
        10,
        "(float[1,1,8,8] x) => (y)",
        "y = RoiAlign<output_height=2,output_width=3,spatial_scale=0.7>(x, at, of)",
        [_w("at", [[0.3, 0.2, 5.1, 4.7]]), _w("of", [0], np.int64)],
    ),
}


def _form(name: str, opset: int | None = None) -> onnx.ModelProto:
    start, signature, nodes, weights = FORMS[name]
    text = f'<ir_version: 7, opset_import: ["": {opset or start}]> g {signature} {{ {nodes} }}'
    return g.parsed(text, *weights)


@pytest.mark.parametrize("name", FORMS)
def test_the_new_form_computes_what_the_old_one_did(name: str, tmp_path: Path) -> None:
    source = g.saved(_form(name), tmp_path / "old.onnx")
    feed = g.feed_of(source)
    want = g.outputs_of(source, feed)
    raised, edits = prepare(Model.load(source), 21)
    assert raised.opset == 21 and any(e.verb == "raise opset" for e in edits)
    path = save(raised, tmp_path / "new.onnx")[0]
    typed = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    onnx.checker.check_model(typed, full_check=True)
    # The new kernels may add up in another order: a few units in the last place of sums near 1.
    for a, b in zip(want, g.outputs_of(path, feed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["Softmax last", "Hardmax rows", "Cast", "DFT", "Squeeze", "GroupNormalization"]
)
def test_a_form_inside_a_body_is_raised_too(name: str, tmp_path: Path) -> None:
    start, signature, nodes, weights = FORMS[name]
    inputs, outputs = signature.split(" => ")
    text = f"""<ir_version: 8, opset_import: ["": {start}]>
    g {inputs[:-1]}, bool c) => {outputs} {{
        y = If(c) <then_branch = a () => (p) {{ {nodes.replace("y =", "p =")} }},
                   else_branch = b () => (q) {{ {nodes.replace("y =", "q =")} }}>
    }}"""
    source = g.saved(g.parsed(text, *weights), tmp_path / "old.onnx")
    feed = g.feed_of(source)
    raised, _ = prepare(Model.load(source), 21)
    content, folder = raised.session_model()
    for a, b in zip(g.outputs_of(source, feed), g.outputs_of(content, feed, folder), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    names = [n.name for n in raised.graph.nodes if n.name]
    assert len(names) == len(set(names))


REFUSED = {
    "Hardmax": ("(float[2,3,4] x) => (y)", "y = Hardmax(x)", 11, "over all axes"),
    "Hardmax of unknown rank": ("(x) => (y)", "y = Hardmax<axis=1>(x)", 11, "over all axes"),
    "GroupNormalization": (
        "(float[1,4,2,2] x, float[2] s) => (y)",
        "y = GroupNormalization<num_groups=2>(x, s, s)",
        18,
        "'s', which is to be repeated for each channel, is computed",
    ),
    "GroupNormalization of unknown channels": (
        "(float[1,c,2,2] x) => (y)",
        "y = GroupNormalization<num_groups=2>(x, two, two)",
        18,
        "unknown number of channels make no 2 groups",
    ),
    "GroupNormalization with a scale per channel": (
        "(float[1,4,2,2] x) => (y)",
        "y = GroupNormalization<num_groups=4>(x, two, two)",
        18,
        "'two' has 2 values for 4 groups",
    ),
    "GroupNormalization without a bias": (
        "(float[1,4,2,2] x) => (y)",
        "y = GroupNormalization<num_groups=2>(x, two)",
        18,
        "2 inputs",
    ),
    "BatchNormalization": (
        "(float[1,2,2,2] x, float[2] s) => (y)",
        "y = BatchNormalization<spatial=0>(x, s, s, s, s)",
        7,
        "spatial",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_raised_is_named(name: str, tmp_path: Path) -> None:
    signature, nodes, opset, words = REFUSED[name]
    text = f"""<ir_version: 7, opset_import: ["": {opset}]> g {signature} {{
        before = Squeeze(x)  [culprit] {nodes}  after = Cast<to=1>(before) }}"""
    path = g.saved(g.parsed(text, _w("two", [1, 2])), tmp_path / "old.onnx")
    with pytest.raises(OnnxqError) as caught:
        prepare(Model.load(path), 21)
    text = str(caught.value)
    assert text.startswith(f"{path}: opset {opset} cannot be raised to 21 for node 'culprit'")
    assert f"({name.split()[0]})" in text and words in text and "opset 21 or later" in text


def test_where_nothing_is_rewritten_the_model_is_not_made_anew(tmp_path: Path) -> None:
    """Two of them in memory were the peak of quantizing a large model."""
    text = """<ir_version: 9, opset_import: ["": 19, "my.domain": 1]>
    g (float[2,3] x) => (y) { a = Relu(x)  b = my.domain.Own(a)  y = MatMul(b, a) }"""
    model = Model.load(g.saved(g.parsed(text), tmp_path / "old.onnx"))
    before = [n.SerializeToString() for n in model.export().graph.node]
    raised, edits = raise_opset(model, 21)
    assert raised is model and raised.opset == 21 and edits[0].reason == "0 nodes rewritten"
    proto = raised.export()
    assert [n.SerializeToString() for n in proto.graph.node] == before
    assert {o.domain: o.version for o in proto.opset_import} == {"": 21, "my.domain": 1}


def test_only_the_rewritten_nodes_change(tmp_path: Path) -> None:
    """Custom operators, plugins in the standard domain and all metadata: byte for byte."""
    model = hostile.old_operators()
    model.graph.node.add(op_type="BatchedNMS_TRT", input=["l"], output=["nms"], name="plugin")
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"n{index}"
        node.doc_string = "written by hand"
        node.metadata_props.add(key="namespace", value=f"layer.{index}")
    model.metadata_props.add(key="k", value="v")
    model.producer_name, model.doc_string = "a hand", "a model"
    source = Model.load(g.saved(model, tmp_path / "old.onnx"))
    raised, edits = raise_opset(source, 21)
    before, after = source.export(), raised.export()
    changed = {"Squeeze", "Unsqueeze", "Dropout", "Pad", "Resize", "Clip", "ReduceSum", "Split"}
    changed.add("Softmax")
    new = {n.name: n for n in after.graph.node}
    for node in before.graph.node:
        assert new[node.name].metadata_props == node.metadata_props
        assert new[node.name].doc_string == node.doc_string
        if node.op_type not in changed | {"If"}:  # the bodies of the If changed
            assert new[node.name] == node
    for node in after.graph.node:  # what was added belongs to the node it helps
        assert node.metadata_props[0].value.startswith("layer.")
    rewritten = [n for n in before.graph.node if n.op_type in changed]
    in_bodies = 1  # an Unsqueeze
    assert edits[0].reason == f"{len(rewritten) + in_bodies} nodes rewritten"
    count = len(before.graph.initializer)  # new ones (Clip's bounds) come behind
    assert list(after.graph.initializer)[:count] == list(before.graph.initializer)
    for proto in (before, after):
        proto.graph.ClearField("initializer")
        proto.ClearField("opset_import")
        proto.graph.ClearField("node")
    before.ir_version = after.ir_version
    assert before == after


@pytest.mark.parametrize("opset", [19, 21, 23, 25])
@pytest.mark.parametrize("name", ["ppocr_rec", "minilm-legacy"])
def test_real_models_at_every_opset(name: str, opset: int, tmp_path: Path) -> None:
    source = g.real_model(name)
    feed = g.feed_of(source)
    raised, _ = prepare(Model.load(source), opset)
    proto = raised.export()
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert proto.ir_version >= onnx.helper.find_min_ir_version_for(proto.opset_import)
    if opset > 23:
        return  # the last ONNX Runtime for Python 3.10 does not know it
    content, folder = raised.session_model()
    for a, b in zip(g.outputs_of(source, feed), g.outputs_of(content, feed, folder), strict=True):
        # PP-OCR: AveragePool of opset 19 adds in another order (see test_fidelity).
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if name == "ppocr_rec" else 0)


def test_the_softmax_of_an_attention_stays_one_node() -> None:
    """Its rank is known only through a Transpose behind a Reshape to a computed shape."""
    raised, _ = prepare(Model.load(g.real_model("ppocr_rec")), 19)
    softmax = [n for n in raised.graph.nodes if n.op == "Softmax"]
    assert [n.attrs["axis"] for n in softmax] == [-1, -1, -1]
    assert all(n.inputs[0].inputs[0].op in ("MatMul", "Mul", "Add") for n in softmax)
    assert not any(n.op == "Flatten" for n in raised.graph.nodes)


def test_a_model_of_custom_operators_alone_gets_the_standard_opset(tmp_path: Path) -> None:
    model = g.parsed('<ir_version: 8, opset_import: ["own": 2]> g (x) => (y) { y = own.Op(x) }')
    raised, _ = prepare(Model.load(g.saved(model, tmp_path / "m.onnx")), 21)
    found = {o.domain: o.version for o in raised.export().opset_import}
    assert found == {"own": 2, "": 21}


def test_functions_of_another_opset(tmp_path: Path) -> None:
    model = g.parsed(
        """<ir_version: 10, opset_import: ["": 18, "f": 1]>
        g (float[2, 3] x) => (float[2, 1] y) { a = Relu(x)  y = f.Largest(a) }
        <domain: "f", opset_import: ["": 17]> Largest (v) => (r) { r = ReduceMax<axes=[1]>(v) }"""
    )
    raised, _ = prepare(Model.load(g.saved(model, tmp_path / "m.onnx")), 21)
    x = np.array([[1, 5, 2], [7, 3, 4]], np.float32)
    content, folder = raised.session_model()
    np.testing.assert_array_equal(g.outputs_of(content, {"x": x}, folder)[0], [[5], [7]])

    nested = g.with_functions()  # what is called inside a function has no type to convert by
    for function in nested.functions:
        function.opset_import[0].version = 17
    with pytest.raises(OnnxqError, match="functions cannot be inlined: Type unknown"):
        prepare(Model.load(g.saved(nested, tmp_path / "n.onnx")), 21)


def test_a_function_that_gives_back_its_input(tmp_path: Path) -> None:
    """onnx's inliner alone would leave the output without a maker."""
    model = g.parsed(
        """<ir_version: 10, opset_import: ["": 18, "f": 1]>
        g (float[2] x) => (float[2] y) { a = f.Same(x)  y = Neg(a) }
        <domain: "f", opset_import: ["": 18]> Same (v) => (v) { unused = Relu(v) }"""
    )
    source = g.saved(model, tmp_path / "m.onnx")
    raised, _ = prepare(Model.load(source), 21)
    x = np.array([1, -2], np.float32)
    content, folder = raised.session_model()
    np.testing.assert_array_equal(g.outputs_of(content, {"x": x}, folder)[0], -x)


def test_a_domain_that_only_functions_import(tmp_path: Path) -> None:
    model = g.parsed(
        """<ir_version: 10, opset_import: ["": 18, "f": 1]>
        g (float[2] x) => (float[2] y) { y = f.F(x) }
        <domain: "f", opset_import: ["": 18, "com.other": 3]>
        F (v) => (r) { r = com.other.Op(v) }"""
    )
    raised, _ = prepare(Model.load(g.saved(model, tmp_path / "m.onnx")), 21)
    assert ("com.other", 3) in {(o.domain, o.version) for o in raised.export().opset_import}
