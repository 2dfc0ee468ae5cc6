"""Attention found in every spelling, its factor moved onto q, all four operands quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_attention import SPELLINGS, Spelling, attention_net
from core_graphs import Net, initializer, placed, quantized, reasons, run, snr
from core_oracle import dequantize_linear, quantize_linear

import onnxq
from onnxq.graph.attention import attentions, factors_behind
from onnxq.graph.edit import Editor
from onnxq.graph.emit import Emitter
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.query import label

each_spelling = pytest.mark.parametrize("how", SPELLINGS, ids=str)
FIRST = SPELLINGS[0]


def feeds(net: Net, length: int = 9) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    found = {"x": rng.standard_normal((2, length, 64)).astype(net.dtype)}
    if len(net.inputs) > 1:
        mask = np.tril(np.ones((2, 1, length, length), bool))
        mask[1, :, :, :2] = False  # two tokens of padding on the left
        mask[1, :, 0:2, 0] = True  # but no row without any
        found["mask"] = mask
    return found


# --- finding it -----------------------------------------------------------------------------------


@each_spelling
def test_every_spelling_is_found(how: Spelling) -> None:
    (found,) = attentions(attention_net(how).loaded(21))
    assert (label(found.scores), label(found.values)) == ("/scores", "/values")
    assert label(found.softmax) == "/softmax"


@pytest.mark.parametrize(
    ("folder", "count"),
    [
        ("minilm", 6),
        ("minilm-legacy", 6),
        ("smollm2-fp32", 30),
        ("smollm2-fp16", 30),
        ("smollm2-torch", 30),
        ("smollm2-torch-decode", 30),
        ("sdxl-unet-tiny-fp16", 34),
        ("ppocr_rec", 2),
    ],
)
def test_real_models(folder: str, count: int, models: Path) -> None:
    model, _ = prepare(Model.load(models / folder / "model.onnx"), 19)
    found = attentions(model)
    assert len(found) == count
    assert len({id(a.scores) for a in found} | {id(a.values) for a in found}) == 2 * count
    products = [s for s in placed(model, "fp8").decisions if s.site.kind == "product"]
    assert not products, "a product of two activations that is no part of an attention"


def test_what_is_no_attention() -> None:
    """A softmax over another axis, one between weights, one that others read, one that is cut."""

    def variant(change: Any) -> int:
        net = attention_net(FIRST)
        change(net, {n.name: n for n in net.nodes})
        return len(attentions(net.loaded(21)))

    def other_axis(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        nodes["/softmax"].attribute[0].i = 2

    def weighted(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.const("values", np.ones((9, 16)))
        nodes["/values"].input[1] = "values"

    def weighted_scores(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.const("keys", np.ones((16, 9)))
        nodes["/scores"].input[1] = "keys"

    def second_operand(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        nodes["/values"].input[0], nodes["/values"].input[1] = nodes["/values"].input[::-1]

    def probabilities_out(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.output("/softmax:0")

    def scores_out(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.output("/scores:0")

    def probabilities_read(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.output(net.op("ReduceMax", "/softmax:0", name="/reader"))

    def capped(net: Net, nodes: dict[str, onnx.NodeProto]) -> None:
        net.nodes.insert(-4, onnx.helper.make_node("Tanh", ["/mask:0"], ["capped"]))
        nodes["/softmax"].input[0] = "capped"

    assert variant(lambda net, nodes: None) == 1
    for change in (
        other_axis,
        weighted,
        weighted_scores,
        second_operand,
        probabilities_out,
        scores_out,
        probabilities_read,
        capped,
    ):
        assert variant(change) == 0, change.__name__


def test_a_softmax_over_joined_axes_is_no_attention() -> None:
    net = attention_net(Spelling("q", "none", wrapped=True))
    flat = next(n for n in net.nodes if n.op_type == "Flatten")
    flat.attribute[0].i = 2
    assert not attentions(net.loaded(21))


# --- the factor -----------------------------------------------------------------------------------


@each_spelling
def test_the_factor_moves_onto_q_without_changing_the_numbers(how: Spelling) -> None:
    net = attention_net(how)
    model = net.loaded(21)
    (found,) = attentions(model)
    editor = Editor(model)
    moved = Emitter(editor).scale_before_product(found.scores)
    editor.finish()
    behind = how.scale in ("mul", "mul-first", "div")
    # Of q and k, against before: with a root of 1/4 each, k loses its own and q takes it.
    assert moved == ((0.25, 1.0) if behind else (0.5, 2.0) if how.scale == "qk" else (1.0, 1.0))
    if behind:
        product = next(n for n in model.graph.nodes if n.name == "/scores")
        assert product.inputs[0].inputs[0].op == "Mul"
        assert not any(n.name == "/scale" for n in model.graph.nodes)
    before, after = run(net.model(), feeds(net))[0], run(model.export(), feeds(net))[0]
    # The factor is a power of two, exact wherever it stands.
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("exact", "onto_q"), [(False, 48**-0.5), (True, 0.125)])
def test_a_factor_that_is_no_power_of_two(exact: bool, onto_q: float) -> None:
    """Under one scale for q, k and v, q takes a power of two; the rest stands behind."""
    net = attention_net(FIRST, head=48)
    model = net.loaded(21)
    editor = Editor(model)
    moved = Emitter(editor).scale_before_product(attentions(model)[0].scores, exact=exact)
    editor.finish()
    assert moved == (pytest.approx(onto_q, rel=1e-7), 1.0)
    before, after = run(net.model(), feeds(net))[0], run(model.export(), feeds(net))[0]
    # FP32 rounds 2^-24 of each product, of sums of 48: 120 dB would be none of it in 20 bits.
    assert snr(before, after) > 120


def test_factors_that_cannot_move() -> None:
    net = attention_net(Spelling("after-mask", "add"))
    model = net.loaded(21)
    assert factors_behind(model, attentions(model)[0].scores) == []  # it scales the mask too
    for constant in (np.ones((4, 1, 1)), -0.25, 0.0, np.full((1, 1, 1, 1, 1), 0.25)):
        net = attention_net(FIRST)
        net.initializers = [t for t in net.initializers if t.name != "c"]
        net.const("c", constant)
        model = net.loaded(21)
        assert factors_behind(model, attentions(model)[0].scores) == []
    # 1 / scores is no factor, and another reader of the scores wants them as they were.
    net = attention_net(Spelling("div", "add"))
    scale = next(n for n in net.nodes if n.name == "/scale")
    scale.input[0], scale.input[1] = scale.input[::-1]
    model = net.loaded(21)
    assert factors_behind(model, attentions(model)[0].scores) == []
    net = attention_net(FIRST)
    net.output("/scores:0")
    model = net.loaded(21)
    scores = next(n for n in model.graph.nodes if n.name == "/scores")
    assert factors_behind(model, scores) == []


# --- quantized ------------------------------------------------------------------------------------

PEAKS = {"q": 3.0, "k": 3.5, "v": 4.0}


def half_net(how: Spelling, head: int = 16) -> Net:
    """In FP16: attention in FP32 is left."""
    net = attention_net(how, head=head)
    if net.dtype == np.float16:
        return net
    spelled = Net(21, np.float16)
    for tensor in net.initializers:
        values = onnx.numpy_helper.to_array(tensor)
        spelled.const(
            tensor.name, np.clip(values, -3e4, 3e4) if values.dtype == np.float32 else values
        )
    spelled.nodes = net.nodes
    for value in net.inputs:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        spelled.input(value.name, dims, bool if value.name == "mask" else None)
    spelled.output("/out:0")
    return spelled


def peaks_of(net: Net) -> dict[str, float]:
    nodes = {n.name: n for n in net.nodes}
    return {
        nodes["/q"].input[0]: 4.0,
        nodes["/scores"].input[0]: PEAKS["q"],
        nodes["/scores"].input[1]: PEAKS["k"],
        nodes["/values"].input[1]: PEAKS["v"],
    }


@pytest.mark.parametrize("how", [s for s in SPELLINGS if not s.cleared], ids=str)
def test_all_four_operands_are_quantized(how: Spelling) -> None:
    net = half_net(how)
    peaks = peaks_of(net)
    model = quantized(net, "fp8-attention", "leave op=MatMul", "quantize node=/scores", peaks=peaks)
    producer = {o: n for n in model.graph.node for o in n.output}
    nodes = {n.name: n for n in model.graph.node}
    factor = 0.25 if how.scale in ("mul", "mul-first", "div") else 1.0
    root = 0.5 if how.scale == "qk" else 1.0  # k's moves to q
    expected = {
        ("/scores", 0): PEAKS["q"] * factor * root / 448,
        ("/scores", 1): PEAKS["k"] / root / 448,
        ("/values", 0): 1 / 448,
        ("/values", 1): PEAKS["v"] / 448,
    }
    for (name, index), scale in expected.items():
        dequantize = producer[nodes[name].input[index]]
        quantize = producer[dequantize.input[0]]
        assert (dequantize.op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
        stored = initializer(model, quantize.input[1])
        assert stored.dtype == np.float16 and stored == np.float16(scale)
        assert quantize.input[1:] == dequantize.input[1:]
        zero = next(t for t in model.graph.initializer if t.name == quantize.input[2])
        assert zero.data_type == onnx.TensorProto.FLOAT8E4M3FN
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) == 4
    # Half of FP8's digits each: 4 operands of 2^-4 / sqrt(12) relative noise are 23 dB in the
    # worst case that all of it adds up; nothing else changed.
    assert snr(run(net.model(), feeds(net))[0], run(model, feeds(net))[0]) > 20


def test_the_numbers_are_those_of_the_formula() -> None:
    """softmax(Q(q c) Q(k)^T + mask) Q(v) with Q of onnx's reference evaluator, in double."""
    net = half_net(FIRST)
    model = quantized(
        net, "fp8-attention", "leave op=MatMul", "quantize node=/scores", peaks=peaks_of(net)
    )
    feed = feeds(net)
    nodes = {n.name: n for n in net.nodes}
    names = [nodes["/scores"].input[0], nodes["/scores"].input[1], nodes["/values"].input[1]]
    probe = net.model()
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    q, k, v = (a.astype(np.float32) for a in run(probe, feed)[1:])

    def rounded(x: Any, peak: float) -> Any:
        scale = np.float32(np.float16(peak / 448))
        codes = quantize_linear(x.astype(np.float32), scale, "fp8")
        return dequantize_linear(codes, scale).astype(np.float64)

    scores = rounded(q * 0.25, PEAKS["q"] * 0.25) @ rounded(k, PEAKS["k"])
    scores = np.where(feed["mask"], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = rounded(weights / weights.sum(-1, keepdims=True), 1.0)
    values = (probabilities @ rounded(v, PEAKS["v"])).transpose(0, 2, 1, 3).reshape(2, 9, -1)
    # FP16 rounding (2^-11) tips 2^-11 / 2^-4 of the codes of 3 operands over to a neighbour 2^-3
    # away: noise of 3 x 2^-7 x 2^-6 in power, 34 dB, if it all added up; half of it is typical.
    assert snr(values, run(model, feed)[0]) > 34


def test_attention_in_fp32_is_left() -> None:
    net = attention_net(FIRST)
    found = quantized(net, "fp8-attention", peaks=4.0)
    quantize = [n for n in found.graph.node if n.op_type == "QuantizeLinear"]
    assert [n.name for n in quantize] == ["x_QuantizeLinear"]  # one for q, k and v projections


def test_head_sizes_that_no_kernel_takes() -> None:
    for head, reason in ((16, ""), (24, "head size 24"), (256, ""), (272, "head size 272")):
        for transpose in ("heads", "key"):
            how = Spelling("mul", "add", transpose=transpose)
            left = reasons(placed(attention_net(how, head=head), "fp8-attention"))["/scores"]
            assert left.startswith(reason) and bool(left) == bool(reason)
    net = attention_net(FIRST)
    shape = next(n for n in net.nodes if n.name == "/q/split").input[1]
    net.initializers = [t for t in net.initializers if t.name != shape]
    net.input(shape, [4], np.int64)
    assert reasons(placed(net, "fp8-attention"))["/scores"].startswith("head size unknown")


def test_a_where_behind_the_softmax_keeps_16_bits() -> None:
    net = attention_net(Spelling("mul", "add", cleared=True))
    left = reasons(placed(net, "fp8-attention"))["/scores"]
    assert left == "a Where behind its softmax: TensorRT fuses that in 16 bits only"


@pytest.mark.parametrize("name", ["/scores", "/softmax", "/values"])
def test_a_rule_may_name_any_of_its_nodes(name: str) -> None:
    net = attention_net(FIRST)
    left = reasons(placed(net, "fp8-attention", f"leave node={name}"))
    assert left["/scores"] == f"left by the rule 'leave node={name}'"


@pytest.mark.parametrize("recipe", ["int8", "fp8-dynamic", "int8-dynamic"])
def test_no_rule_makes_attention_int8_or_dynamic(recipe: str) -> None:
    found = reasons(placed(attention_net(FIRST), recipe, "quantize op=MatMul"))
    assert found["/scores"] == "attention is quantized in static fp8 only"
    assert not found["/q"]


def test_all_or_none_where_one_range_fits_no_scale() -> None:
    net = half_net(FIRST)
    peaks = peaks_of(net)
    peaks[next(n for n in net.nodes if n.name == "/values").input[1]] = 0.0
    model = quantized(net, "fp8-attention", peaks=peaks)
    names = [n.name for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert names == ["x_QuantizeLinear"]
    assert any(n.name == "/scale" for n in model.graph.node), "its factor stays where it was"


# --- compiled -------------------------------------------------------------------------------------


@each_spelling
def test_the_compiler_fuses_every_spelling_in_fp8(how: Spelling, tmp_path: Path) -> None:
    """From FP32 (or FP16) through base precision and Q/DQ into one kernel, sequence 32 to 256."""
    pytest.importorskip("tensorrt_rtx")
    net = attention_net(how, head=64)
    source = net.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **feeds(net, 32))
    done = onnxq.quantize(
        source, tmp_path / "q.onnx", recipe="fp8-attention", calib=tmp_path / "calib.npz"
    )
    shapes = ["x:1x32x64,2x128x64,2x256x64"]
    if how.mask != "none":
        shapes.append("mask:1x1x32x32,2x1x128x128,2x1x256x256")
    built = onnxq.build(done.files[0], tmp_path / "m.plan", shapes=shapes)
    became = "fused fp16" if how.cleared else "fused fp8"
    assert built.report.facts["products"]["attention"] == {became: 1}
    assert built.coverage is not None and built.coverage.complete
