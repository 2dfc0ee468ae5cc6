"""Folds change constants of their own only: shared ones are copied, quantized ones refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import graph_models as g
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper as nh
from test_fold import found, layers, loaded, tensor

from onnxq import products
from onnxq.calibrate.probe import measure_ranges
from onnxq.errors import OnnxqError
from onnxq.gpus import target
from onnxq.graph.casting import apply_precision
from onnxq.graph.edit import Editor
from onnxq.graph.fold import find_fold
from onnxq.graph.model import Model
from onnxq.graph.precision import BASES, plan_precision
from onnxq.graph.prepare import prepare
from onnxq.graph.probe import range_probes
from onnxq.graph.query import constant_operand
from onnxq.graph.save import save
from onnxq.graph.weights import StoredValues, array
from onnxq.placement import place
from onnxq.recipe import load, parse_rule
from onnxq.sites import current, find_sites, is_current
from onnxq.transform import apply_placement

S32 = np.exp2(np.arange(32) % 7 - 3)
"""Powers of two: products are exact, so results are equal to the bit."""


def node(model: Model, output: str) -> gs.Node:
    return next(n for n in model.graph.nodes if n.outputs[0].name == output)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(path)
    return {t.name: nh.to_array(t) for t in proto.graph.initializer}


def three_norms() -> onnx.ModelProto:
    """One gain of ones for three norms, as exporters merge equal initializers."""
    return g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 32] x) => (float[n, 32] y) {
            a = LayerNormalization <axis = -1> (x, ones)   b = MatMul(a, w1)
            c = LayerNormalization <axis = -1> (b, ones)   d = MatMul(c, w2)
            e = LayerNormalization <axis = -1> (d, ones)   y = Add(e, ones)
        }""",
        nh.from_array(np.ones(32, np.float32), "ones"),
        g.weight("w1", 32, 32),
        g.weight("w2", 32, 32),
    )


def test_a_shared_gain_is_copied(tmp_path: Path) -> None:
    source = g.saved(three_norms(), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    editor = Editor(model)
    edits = [found(model, name).apply(editor, s) for name, s in (("a", S32), ("c", S32[::-1]))]
    editor.finish()
    assert [e.reason.split("copied")[-1] for e in edits] == [
        ", since others read them: ones_folded",
        ", since others read them: ones_folded_2",
    ]
    out = save(model, tmp_path / "out.onnx")[0]
    np.testing.assert_array_equal(g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0])
    old, new = weights_of(source), weights_of(out)
    np.testing.assert_array_equal(new["ones"], old["ones"])
    np.testing.assert_array_equal(new["ones_folded"], np.float32(1) / S32)
    np.testing.assert_array_equal(new["ones_folded_2"], np.float32(1) / S32[::-1])
    np.testing.assert_array_equal(new["w1"], old["w1"] * S32[:, None])  # its own: keeps its name
    assert list(new) == ["ones", "w1", "w2", "ones_folded", "ones_folded_2"]


def test_a_weight_tied_to_an_embedding_is_copied(tmp_path: Path) -> None:
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (int64[n, seq] ids) => (float[n, seq, 100] y) {
            e = Gather(table, ids)   t = LayerNormalization <axis = -1> (e, gain)
            head = Transpose <perm = [1, 0]> (table)   y = MatMul(t, head)
        }""",
        g.weight("table", 100, 32),
        g.weight("gain", 32),
    )
    source = g.saved(proto, tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    editor = Editor(model)
    found(model).apply(editor, S32)
    editor.finish()
    out = save(model, tmp_path / "out.onnx")[0]
    np.testing.assert_array_equal(g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0])
    old, new = weights_of(source), weights_of(out)
    np.testing.assert_array_equal(new["table"], old["table"])
    np.testing.assert_array_equal(new["table_folded"], old["table"].T * S32[:, None])


def test_a_shared_transpose_is_not_changed(tmp_path: Path) -> None:
    """Two layers read one Transpose of one weight; only one of them is rescaled."""
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 32] x, float[n, 32] z) => (float[n, 40] y, float[n, 40] v) {
            t = Mul(x, c)   k = Transpose(w)   y = MatMul(t, k)   v = MatMul(z, k)
        }""",
        g.weight("w", 40, 32),
        g.weight("c", 32),
    )
    source = g.saved(proto, tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    editor = Editor(model)
    found(model).apply(editor, S32)
    editor.finish()
    out = save(model, tmp_path / "out.onnx")[0]
    for now, before in zip(g.outputs_of(out, feed), g.outputs_of(source, feed), strict=True):
        np.testing.assert_array_equal(now, before)


def test_layers_that_share_a_weight_each_get_theirs(tmp_path: Path) -> None:
    """Both read one weight, but different inputs with different factors (ALBERT's layers)."""
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 32] x) => (float[n, 32] y) {
            a = Mul(x, c1)   b = MatMul(a, w)   r = Relu(b)   d = Tanh(r)
            e = Mul(d, c2)   y = MatMul(e, w)
        }""",
        *(g.weight("w", 32, 32), g.weight("c1", 32), g.weight("c2", 32)),
    )
    source = g.saved(proto, tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    editor = Editor(model)
    for name, s in (("a", S32), ("e", S32[::-1])):
        found(model, name).apply(editor, s)
    editor.finish()
    out = save(model, tmp_path / "out.onnx")[0]
    np.testing.assert_array_equal(g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0])
    old, new = weights_of(source), weights_of(out)
    np.testing.assert_array_equal(new["w_folded"], old["w"] * S32[:, None])
    np.testing.assert_array_equal(new["w"], old["w"] * S32[::-1, None])  # nobody else's by now


def chain(dtype: type = np.float32) -> onnx.ModelProto:
    """Folds at `a` scale the rows of w1, folds at `t` its columns and the rows of w2."""
    rng = np.random.default_rng(3)
    kind = "float16" if dtype == np.float16 else "float"
    shapes = {"c": (32,), "w1": (32, 40), "bias": (40,), "w2": (40, 40), "w3": (40, 48)}
    return g.parsed(
        f"""<ir_version: 10, opset_import: ["": 18]>
        g ({kind}[n, 32] x) => ({kind}[n, 48] y) {{
            a = Mul(x, c)   up = MatMul(a, w1)   b = Add(up, bias)   t = Relu(b)
            m = MatMul(t, w2)   r = Relu(m)   y = MatMul(r, w3)
        }}""",
        *(nh.from_array(rng.standard_normal(s).astype(dtype), n) for n, s in shapes.items()),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_order_of_folds_does_not_matter(tmp_path: Path, dtype: type) -> None:
    """Rows of w1 and w2 by one fold, their columns by another: the same bits in any order."""
    source = g.saved(chain(dtype), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    rng = np.random.default_rng(4)
    s = {"a": rng.lognormal(0, 1, 32), "t": rng.lognormal(0, 1, 40), "r": rng.lognormal(0, 1, 40)}
    results = []
    for order in itertools.permutations(s):
        model = loaded(source)
        editor = Editor(model)
        for name in order:
            found(model, name).apply(editor, s[name])
        editor.finish()
        out = save(model, tmp_path / "out.onnx")[0]
        results.append(weights_of(out))
    for other in results[1:]:
        assert list(other) == list(results[0])
        for name, values in other.items():
            np.testing.assert_array_equal(values, results[0][name], name)
    old, new = weights_of(source), results[0]
    s["a"] = found(loaded(source), "a").rounded(s["a"])  # as its gain in FP16 wants it
    exact = old["w1"].astype(np.float64) * s["a"][:, None] / s["t"]
    np.testing.assert_allclose(new["w1"], exact, rtol=2**-11 if dtype == np.float16 else 2**-23)
    exact = old["w2"].astype(np.float64) * s["t"][:, None] / s["r"]
    np.testing.assert_allclose(new["w2"], exact, rtol=2**-11 if dtype == np.float16 else 2**-23)
    before, after = g.outputs_of(source, feed)[0], g.outputs_of(out, feed)[0]
    close = 2e-3 if dtype == np.float16 else 1e-6
    before, after = before.astype(np.float64), after.astype(np.float64)
    assert np.linalg.norm(after - before) < close * np.linalg.norm(before)


def test_a_fold_and_its_inverse_leave_the_weights_as_they_were(tmp_path: Path) -> None:
    """1 / s is rounded in float64 only: the values come back to the bit."""
    source = g.saved(chain(), tmp_path / "in.onnx")
    model = loaded(source)
    editor = Editor(model)
    s = np.random.default_rng(0).lognormal(0, 1, 40)
    found(model).apply(editor, s)
    found(model).apply(editor, 1 / s)
    editor.finish()
    old, new = weights_of(source), weights_of(save(model, tmp_path / "out.onnx")[0])
    for name, values in old.items():
        np.testing.assert_array_equal(new[name], values, name)


def test_folds_found_before_others_are_applied(tmp_path: Path) -> None:
    source = g.saved(chain(), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    folds = [found(model, name) for name in ("a", "t", "r")]
    editor = Editor(model)
    for fold in folds:
        fold.apply(editor, np.exp2(np.arange(fold.size) % 5 - 2))
    editor.finish()
    out = save(model, tmp_path / "out.onnx")[0]
    np.testing.assert_array_equal(g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_operand_gives_the_folded_values_unrounded(tmp_path: Path, dtype: type) -> None:
    """What makes the tensor may itself be quantized: its codes are made of the folded weight."""
    source = g.saved(chain(dtype), tmp_path / "in.onnx")
    model = loaded(source)
    old = constant_operand(node(model, "up"), 1)
    assert old is not None
    before = old.load()
    s = np.random.default_rng(1).lognormal(0, 1, 40)
    found(model).apply(Editor(model), s)
    now = constant_operand(node(model, "up"), 1)
    assert now is not None and now.constant is not old.constant
    want = (before.astype(np.float64) / s).astype(np.float32)
    assert now.load().dtype == np.float32
    np.testing.assert_allclose(now.load(), want, rtol=2**-23)
    np.testing.assert_array_equal(array(now.constant), now.load().astype(dtype))
    np.testing.assert_array_equal(old.load(), before)  # codes made of the old one stay right
    reader = constant_operand(node(model, "m"), 1)
    assert reader is not None
    original = constant_operand(node(loaded(source), "m"), 1)
    assert original is not None
    want = (original.load().astype(np.float64) * s[:, None]).astype(np.float32)
    np.testing.assert_allclose(reader.load(), want, rtol=2**-23)


def test_nothing_is_loaded_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = g.saved(chain(), tmp_path / "in.onnx")
    model = loaded(source)
    read: list[str] = []
    load = StoredValues.load

    def counting(values: StoredValues) -> np.ndarray:
        read.append(values.tensor.name)
        return load(values)

    monkeypatch.setattr(StoredValues, "load", counting)
    editor = Editor(model)
    for name in ("a", "t"):
        fold = found(model, name)
        fold.apply(editor, np.full(fold.size, 2.0))
    editor.finish()
    assert read == []
    save(model, tmp_path / "out.onnx")
    assert sorted(read) == ["w1", "w2"]  # once each, though w1 was rescaled twice


def quantized_by_hand(model: Model, output: str) -> None:
    """Let a layer read its weight from codes."""
    editor, layer = Editor(model), node(model, output)
    operand = constant_operand(layer, 1)
    assert operand is not None
    codes = editor.derived("codes", onnx.TensorProto.INT8, operand.shape, lambda: np.zeros(1))
    scale = editor.constant("scale", np.float32([1]))
    dtype = layer.inputs[1].dtype
    layer.inputs[1] = editor.node("DequantizeLinear", "dq", [codes, scale], "dq", dtype)


@pytest.mark.parametrize("output", ["up", "m"])
def test_a_weight_that_is_quantized_is_not_rescaled(tmp_path: Path, output: str) -> None:
    """Neither what would be divided (up) nor what would be multiplied (m); nothing is changed."""
    model = loaded(g.saved(chain(), tmp_path / "in.onnx"))
    fold = found(model)
    quantized_by_hand(model, output)
    read = tensor(model)
    reason = find_fold(model, read, layers(read), explicit=output == "m")
    assert isinstance(reason, str)
    before = [[id(t) for t in n.inputs] for n in model.graph.nodes]
    with pytest.raises(OnnxqError, match="before weights are quantized"):
        fold.apply(Editor(model), np.full(40, 2.0))
    assert [[id(t) for t in n.inputs] for n in model.graph.nodes] == before


def test_readers_behind_qdq_are_not_rescaled(tmp_path: Path) -> None:
    """Their activation scale was chosen for the old values."""
    model = loaded(g.saved(chain(), tmp_path / "in.onnx"))
    fold = found(model)
    editor, layer = Editor(model), node(model, "m")
    layer.inputs[0] = editor.node("Identity", "q", [layer.inputs[0]], "q", layer.inputs[0].dtype)
    with pytest.raises(OnnxqError, match="does not read 't' as its first operand"):
        fold.apply(editor, np.full(40, 2.0))


def test_stored_codes_are_no_floats(tmp_path: Path) -> None:
    """INT8 and FP8 initializers behind a Cast are codes, whatever reads them."""
    for kind, values in (("INT8", nh.from_array(np.ones((32, 40), np.int8), "w")),):
        proto = g.parsed(
            """<ir_version: 10, opset_import: ["": 19]>
            g (float[n, 32] x) => (float[n, 40] y) {
                t = Mul(x, c)   f = Cast <to = 1> (w)   y = MatMul(t, f)
            }""",
            values,
            g.weight("c", 32),
        )
        model = loaded(g.saved(proto, tmp_path / "in.onnx"))
        read = tensor(model)
        reason = find_fold(model, read, layers(read))
        assert isinstance(reason, str) and f"'w' holds {kind} values" in reason


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (np.ones(3), "has 40 channels, s has the shape"),
        (np.zeros(40), "not all finite and positive"),
        (np.full(40, np.inf), "not all finite and positive"),
        (np.full(40, np.nan), "not all finite and positive"),
        (-np.ones(40), "not all finite and positive"),
    ],
)
def test_factors_that_are_none(tmp_path: Path, s: np.ndarray, message: str) -> None:
    model = loaded(g.saved(chain(), tmp_path / "in.onnx"))
    with pytest.raises(OnnxqError, match=message):
        found(model).apply(Editor(model), s)


def test_what_makes_it_changed_in_between(tmp_path: Path) -> None:
    """What takes the factor now is asked again: here a constant nearer by, and then nothing."""
    source = g.saved(chain(), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    fold, editor, relu = found(model), Editor(model), node(model, "t")
    b = relu.inputs[0]
    relu.inputs[0] = editor.node(
        "Mul", "late", [b, editor.constant("two", np.float32([2]))], "late", b.dtype, b.shape
    )
    edit = fold.apply(editor, np.exp2(np.arange(40) % 5 - 2))
    assert edit.reason.startswith("into two of Mul")
    editor.finish()
    out = save(model, tmp_path / "out.onnx")[0]
    got, want = g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0]
    np.testing.assert_array_equal(got, 2 * want)  # no bias behind the Relu
    relu.inputs[0] = editor.node("Tanh", "tanh", [b], "tanh", b.dtype, b.shape)
    with pytest.raises(OnnxqError, match="can no longer be rescaled: Tanh"):
        fold.apply(editor, np.full(40, 2.0))


def test_a_fold_behind_the_base_precision_starts_from_fp32(tmp_path: Path) -> None:
    """Quantization reads weights as the file has them, times s; not as FP16 rounded them."""
    model = loaded(g.saved(chain(), tmp_path / "in.onnx"))
    exact = constant_operand(node(model, "m"), 1)
    assert exact is not None
    values = exact.load().astype(np.float64)
    apply_precision(model, plan_precision(model, BASES["fp16"]))
    s = np.random.default_rng(6).lognormal(0, 1, 40)
    found(model).apply(Editor(model), s)
    now = constant_operand(node(model, "m"), 1)
    assert now is not None
    np.testing.assert_allclose(now.load(), values * s[:, None], rtol=2**-23)
    assert array(now.constant).dtype == np.float16


def test_weights_are_multiplied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BLOCK", 100)  # two rows of 40 at a time
    source = g.saved(chain(), tmp_path / "in.onnx")
    model = loaded(source)
    for name in ("a", "t"):
        fold = found(model, name)
        fold.apply(Editor(model), np.exp2(np.arange(fold.size) % 5 - 2))
    old, new = weights_of(source), weights_of(save(model, tmp_path / "out.onnx")[0])
    rows, columns = (np.exp2(np.arange(n) % 5 - 2) for n in (32, 40))
    np.testing.assert_array_equal(new["w1"], old["w1"] * rows[:, None] / columns)
    np.testing.assert_array_equal(new["w2"], old["w2"] * columns[:, None])


def test_an_explicit_mul_divides_by_what_its_constant_holds(tmp_path: Path) -> None:
    """1 / s is rounded to FP16; the weights are multiplied by what it then stands for."""
    source = g.saved(chain(np.float16), tmp_path / "in.onnx")
    model = loaded(source)
    read = tensor(model)
    read.inputs[0].op = "Tanh"
    s = np.random.default_rng(7).lognormal(0, 1, 40)
    fold = found(model, explicit=True)
    assert fold.explicit
    fold.apply(Editor(model), s)
    factor = constant_operand(node(model, "t_smoothed"), 1)
    weight = constant_operand(node(model, "m"), 1)
    assert factor is not None and weight is not None
    inverse = factor.load().astype(np.float64)
    assert factor.load().dtype == np.float16 and 0 < np.abs(inverse * s - 1).max() < 2**-11
    old = weights_of(source)["w2"].astype(np.float64)
    np.testing.assert_allclose(weight.load(), old / inverse[:, None], rtol=2**-23)


def test_a_site_found_before_is_refused_until_it_is_looked_up_anew(tmp_path: Path) -> None:
    """Its operand is the old weight: codes of it would not fit the input that was divided."""
    source = g.saved(chain(), tmp_path / "in.onnx")
    model = prepare(Model.load(source), 23)[0]
    recipe = load("int8-dynamic")
    recipe = replace(recipe, rules=(parse_rule("quantize op=MatMul"),))
    placement = place(model, recipe, target("sm89"))
    assert len(placement.quantized) == 3
    feed = g.feed_of(source)
    s = np.exp2(np.arange(40) % 5 - 2)
    found(model).apply(Editor(model), s)
    with pytest.raises(AssertionError, match="was rescaled"):
        apply_placement(model, placement, None)
    apply_placement(model, placement.current(), None)
    out = save(model, tmp_path / "out.onnx")[0]
    got, want = g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0]
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("base", ["fp16", "keep"])
def test_a_stale_site_is_noticed_behind_the_base_precision_too(tmp_path: Path, base: str) -> None:
    model = prepare(Model.load(g.saved(chain(), tmp_path / "in.onnx")), 19)[0]
    sites = [s for s in find_sites(model) if s.node.outputs[0].name in ("up", "m")]
    found(model).apply(Editor(model), np.full(40, 2.0))
    fresh = [current(s) for s in sites]
    if base == "fp16":
        apply_precision(model, plan_precision(model, BASES["fp16"]))
    assert [is_current(s) for s in sites] == [False, False]
    assert [is_current(s) for s in fresh] == [True, True]


def test_ranges_are_measured_of_the_folded_model(tmp_path: Path) -> None:
    """The base precision asks for them after the fold, before anything is saved."""
    source = g.saved(chain(), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    before = measure_ranges(range_probes(model), feed)
    found(model).apply(Editor(model), np.full(40, 4.0))
    after = measure_ranges(range_probes(model), feed)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"up", "b", "t"}
    assert all(after[name] == before[name] / 4 for name in changed)
