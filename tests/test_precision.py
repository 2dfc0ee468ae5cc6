"""FP32 into FP16 and BF16: numbers close, nothing infinite, and no Cast too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from core_graphs import Net, inlined, onnx_type, run, snr
from core_oracle import evaluate
from onnx import TensorProto
from onnx import helper as h

from onnxq import quantize
from onnxq.graph.casting import apply_precision
from onnxq.graph.model import Model
from onnxq.graph.precision import BASES, _types, plan_precision
from onnxq.graph.prepare import infer_types, prepare
from onnxq.graph.query import label, type_word
from onnxq.graph.save import save
from onnxq.report import Edit
from onnxq.samples import Data

FLOATS = {"fp32", "fp16", "bf16", "fp64"}
# One rounding to FP16 is noise of relative power (2^-11)^2 / 12 = -77 dB, or less. The reference
# evaluator rounds every partial sum of a product of 32 to 64 terms too: some 15 dB more. What is
# computed wrongly is below 30.
FEW_ROUNDINGS = 60


def converted(
    net: Net | Model,
    base: str = "fp16",
    ranges: Mapping[str, float] | None = None,
    convert_io: bool = False,
) -> tuple[onnx.ModelProto, dict[str, str], list[Edit]]:
    """The model as it would be written, {node that stays FP32: why}, and the edits."""
    model = net.loaded(BASES[base].min_opset) if isinstance(net, Net) else net
    plan = plan_precision(model, BASES[base], ranges)
    kept = {label(n): plan.kept[id(n)] for n in model.graph.nodes if id(n) in plan.kept}
    edits = apply_precision(model, plan, convert_io=convert_io)
    proto = inlined(model)
    no_cast_too_many(proto)
    return proto, kept, edits


def no_cast_too_many(proto: onnx.ModelProto) -> None:
    """No Cast to the type its input has, none that undoes another, none that nobody reads."""
    types = types_of(proto)
    producer = {o: n for n in proto.graph.node for o in n.output}
    outputs = {o.name for o in proto.graph.output}
    read = {i for n in proto.graph.node for i in n.input} | outputs
    seen = set()
    for node in proto.graph.node:
        if node.op_type != "Cast" or types[node.output[0]] not in FLOATS:
            continue
        source = producer.get(node.input[0])
        assert types[node.input[0]] != types[node.output[0]], f"{node.name} changes nothing"
        assert source is None or source.op_type != "Cast", f"{node.name} casts a Cast"
        assert node.output[0] in read
        if node.output[0] not in outputs:  # two outputs may be the same under two names
            assert (node.input[0], types[node.output[0]]) not in seen, f"{node.name} is twice there"
            seen.add((node.input[0], types[node.output[0]]))
        readers = {n.op_type for n in proto.graph.node if node.output[0] in n.input}
        assert readers != {"Shape"}, f"{node.name} is read for its shape only"


def types_of(proto: onnx.ModelProto) -> dict[str, str]:
    """{value: type in short} of everything onnx can infer."""
    model = Model.from_proto(proto, Path("m.onnx"))
    infer_types(model)
    return {name: type_word(t) for name, t in model.graph.tensors().items()}


def node_types(proto: onnx.ModelProto) -> dict[str, str]:
    """{node: type of its first output}."""
    types = types_of(proto)
    return {n.name: types[n.output[0]] for n in proto.graph.node if n.output[0] in types}


def both(net: Net, feeds: Mapping[str, Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """Outputs of the FP32 net and of its FP16 conversion."""
    proto, _, _ = converted(net, **options)
    return run(net.model(), feeds), evaluate(proto, feeds)


def normal(*shape: int, scale: float = 1.0, seed: int = 5) -> Any:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


# --- what is converted ----------------------------------------------------------------------------


def mlp(seed: int = 0) -> Net:
    net = Net(seed=seed)
    x = net.input("x", ["m", 32])
    y = net.op("MatMul", x, net.weight("a", 32, 64), name="/up")
    y = net.op("Relu", net.op("Add", y, net.const("bias", np.ones(64)), name="/bias"), name="/act")
    net.output(net.op("Softmax", net.op("MatMul", y, net.weight("b", 64, 32), name="/down")))
    return net


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_everything_is_converted_where_nothing_speaks_against(base: str) -> None:
    proto, kept, _ = converted(mlp(), base)
    assert not kept
    kinds = node_types(proto)
    casts = [n.name for n in proto.graph.node if n.op_type == "Cast"]
    assert len(casts) == 2, "one behind the input, one before the output"
    assert {kinds[n.name] for n in proto.graph.node if n.op_type != "Cast"} == {base}
    assert proto.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert {t.data_type for t in proto.graph.initializer} == {BASES[base].onnx_type}


def test_the_numbers_of_fp16() -> None:
    feeds = {"x": normal(7, 32)}
    reference, found = both(mlp(), feeds)
    assert found[0].dtype == np.float32
    assert snr(reference[0], found[0]) > FEW_ROUNDINGS


def test_weights_are_rounded_once_to_nearest() -> None:
    for base in BASES.values():
        proto, _, _ = converted(mlp(), base.name)
        stored = next(t for t in proto.graph.initializer if t.name.startswith("a_"))
        original = onnx.numpy_helper.to_array(mlp().initializers[0])
        dtype = ml_dtypes.bfloat16 if base.name == "bf16" else np.float16
        assert stored.raw_data == original.astype(dtype).tobytes()


# --- range-hungry patterns ------------------------------------------------------------------------


def rms_norm(net: Net, x: str, how: str) -> str:
    """x / sqrt(mean(x^2) + 1e-6), as exporters spell it."""
    last, eps = net.const("last", np.array([-1], np.int64)), net.const("eps", 1e-6)
    if how == "l2":
        length = net.op("ReduceL2", x, last, name="/norm/l2")
        return net.op("Div", x, net.op("Max", length, eps, name="/norm/eps"), name="/norm/out")
    if how == "mul":
        square = net.op("Mul", x, x, name="/norm/square")
    else:
        square = net.op("Pow", x, net.const("two", 2.0), name="/norm/square")
    mean = net.op("ReduceMean", square, last, name="/norm/mean")
    if how == "variance":
        average = net.op("ReduceMean", x, last, name="/norm/average")
        mean = net.op("Sub", mean, net.op("Mul", average, average), name="/norm/variance")
    root = net.op("Sqrt", net.op("Add", mean, eps, name="/norm/eps"), name="/norm/root")
    if how in ("mul", "variance"):
        return net.op("Div", x, root, name="/norm/out")
    inverse = net.op("Reciprocal", root, name="/norm/inverse")
    return net.op("Mul", x, inverse, name="/norm/out")


@pytest.mark.parametrize("how", ["pow", "mul", "l2", "variance"])
def test_norms_stay_fp32(how: str) -> None:
    """Activations of 2000: their squares are beyond FP16."""
    net = Net()
    y = rms_norm(net, net.input("x", ["m", 64]), how)
    net.output(net.op("MatMul", y, net.weight("w", 64, 32), name="/fc"))
    proto, kept, _ = converted(net)
    kinds = node_types(proto)
    norm = {n.name for n in net.nodes if n.name.startswith("/norm/") and "average" not in n.name}
    assert {kinds[n] for n in norm} == {"fp32"} and kinds["/fc"] == "fp16"
    assert kept.keys() >= norm
    feeds = {"x": normal(4, 64, scale=2000)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


def test_layer_norm_spelled_out() -> None:
    net = Net()
    x = net.input("x", ["m", 64])
    last, two, eps = (
        net.const("last", np.array([-1], np.int64)),
        net.const("two", 2.0),
        net.const("eps", 1e-12),
    )
    centred = net.op("Sub", x, net.op("ReduceMean", x, last), name="/centred")
    variance = net.op("ReduceMean", net.op("Pow", centred, two, name="/pow"), last, name="/var")
    root = net.op("Sqrt", net.op("Add", variance, eps, name="/eps"), name="/root")
    y = net.op("Div", centred, root, name="/out")
    net.output(net.op("Mul", y, net.const("gamma", np.full(64, 1.5)), name="/gamma"))
    feeds = {"x": normal(4, 64, scale=2000)}
    feeds["x"][1] = 0  # variance 0: only epsilon is left
    reference, found = both(net, feeds)
    assert snr(reference[0], found[0]) > FEW_ROUNDINGS


def test_softmax_and_softplus_spelled_out() -> None:
    """exp(20) is infinite in FP16, but log(1 + exp(x)) and exp(x) / sum are not."""
    net = Net()
    x = net.input("x", ["m", 32])
    grown = net.op("Exp", x, name="/exp")
    one = net.const("one", 1.0)
    net.output(net.op("Log", net.op("Add", grown, one, name="/plus"), name="/softplus"))
    total = net.op("ReduceSum", grown, net.const("last", np.array([-1], np.int64)), name="/sum")
    net.output(net.op("Div", grown, total, name="/softmax"))
    net.output(net.op("Div", x, net.op("Add", one, net.op("Exp", net.op("Neg", x))), name="/silu"))
    reference, found = both(net, {"x": normal(5, 32, scale=20)})
    for a, b in zip(reference, found, strict=True):
        assert snr(a, b) > FEW_ROUNDINGS
    kinds = node_types(converted(net)[0])
    assert kinds["/plus"] == "fp32"


def test_gelu_of_large_values() -> None:
    """x^3 of 50 is beyond FP16; tanh brings it back."""
    net = Net()
    x = net.input("x", ["m", 32])
    cube = net.op("Pow", x, net.const("three", 3.0), name="/cube")
    inner = net.op("Add", x, net.op("Mul", cube, net.const("a", 0.044715), name="/part"))
    bent = net.op("Tanh", net.op("Mul", inner, net.const("b", 0.7978845)), name="/tanh")
    y = net.op("Mul", x, net.op("Add", bent, net.const("one", 1.0)))
    net.output(net.op("Mul", y, net.const("half", 0.5)))
    reference, found = both(net, {"x": normal(9, 32, scale=30)})
    assert snr(reference[0], found[0]) > FEW_ROUNDINGS


# --- positions and angles -------------------------------------------------------------------------


def rotary(product: str) -> Net:
    """cos(position x frequency) of int64 positions, added to a linear layer's output."""
    net = Net()
    positions = net.input("positions", ["b", "s"], np.int64)
    frequencies = 10000.0 ** (-np.arange(16) / 16)
    wide = net.op("Cast", positions, to=1, name="/float")
    if product == "MatMul":
        column = net.op("Unsqueeze", wide, net.const("one", np.array([2], np.int64)))
        angle = net.op("MatMul", column, net.const("f", frequencies[None]), name="/angle")
    else:
        row = net.op("Unsqueeze", wide, net.const("one", np.array([-1], np.int64)))
        angle = net.op("Mul", row, net.const("f", frequencies), name="/angle")
    x = net.op("MatMul", net.input("x", ["b", "s", 32]), net.weight("w", 32, 16), name="/fc")
    cosine = net.op("Cos", angle, name="/cos")
    net.output(net.op("Mul", net.op("Add", x, net.op("Sin", angle, name="/sin")), cosine))
    return net


@pytest.mark.parametrize("product", ["MatMul", "Mul"])
@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_angles_of_large_positions(product: str, base: str) -> None:
    proto, kept, _ = converted(rotary(product), base)
    kinds = node_types(proto)
    assert {kinds[n] for n in ("/float", "/angle", "/cos", "/sin")} == {"fp32"}
    assert kinds["/fc"] == base
    assert all("large integers" in kept[n] for n in ("/angle", "/cos", "/sin"))
    if base == "fp16":
        feeds = {
            "positions": np.arange(4090, 4100)[None].astype(np.int64),
            "x": normal(1, 10, 32),
        }
        reference, found = run(rotary(product).model(), feeds), evaluate(proto, feeds)
        assert snr(reference[0], found[0]) > FEW_ROUNDINGS


@pytest.mark.parametrize("layer", ["Conv", "MatMul", "Gemm"])
def test_a_sine_as_activation_function_is_converted(layer: str) -> None:
    net = Net()
    shape, weight = {
        "Conv": (["n", 8, "s"], (8, 8, 3)),
        "MatMul": (["n", "s", 8], (8, 8)),
        "Gemm": (["n", 8], (8, 8)),
    }[layer]
    x = net.op(layer, net.input("x", shape), net.weight("w", *weight), name="/layer")
    wave = net.op("Sin", net.op("Mul", x, net.const("a", 2.0), name="/alpha"), name="/sin")
    net.output(net.op("Add", x, wave, name="/snake"))
    proto, kept, _ = converted(net)
    assert not kept and node_types(proto)["/sin"] == "fp16"


# --- masks ----------------------------------------------------------------------------------------

LOWEST = float(np.finfo(np.float32).min)


def masked_softmax(how: str) -> Net:
    """Softmax over scores [b, s, s] with `visible` bool; hidden ones get a huge negative value."""
    net = Net()
    scores = net.input("scores", ["b", "s", "s"])
    visible = net.input("visible", ["b", "s", "s"], bool)
    zero, low = net.const("zero", 0.0), net.const("low", LOWEST)
    if how == "where":
        masked = net.op("Where", visible, scores, low)
    elif how == "add":
        masked = net.op("Add", scores, net.op("Where", visible, zero, low))
    elif how == "mul":
        hidden = net.op("Cast", net.op("Not", visible), to=1)
        masked = net.op("Add", scores, net.op("Mul", hidden, low))
    elif how == "two":
        bias = net.op("Where", visible, zero, low)
        masked = net.op("Add", net.op("Add", scores, bias), net.op("Identity", bias))
    elif how == "filled":
        shape = net.op("Shape", scores)
        value = h.make_tensor("v", TensorProto.FLOAT, [1], [LOWEST])
        full = net.op("ConstantOfShape", shape, value=value)
        masked = net.op("Add", scores, net.op("Where", visible, zero, full))
    else:  # a causal mask of the largest size, stored, and cut to the sequence
        causal = np.where(np.tril(np.ones((1, 16, 16), bool)), 0, LOWEST)
        table = net.const("table", causal)
        start, axes = net.const("start", np.int64([0, 0])), net.const("axes", np.int64([1, 2]))
        end = net.op("Shape", scores, start=1)
        cut = net.op("Slice", table, start, end, axes)
        masked = net.op("Add", net.op("Where", visible, scores, low), cut)
    net.output(net.op("Softmax", masked, axis=-1))
    return net


@pytest.mark.parametrize("how", ["where", "add", "mul", "filled", "table"])
def test_masks_with_left_padding_and_hidden_rows(how: str) -> None:
    """FP32 min is -inf in FP16; a row of which nothing is visible would be NaN."""
    visible = np.tril(np.ones((2, 9, 9), bool))
    visible[1, :, :4] = False
    feeds = {"scores": normal(2, 9, 9, scale=20), "visible": visible}
    proto, kept, edits = converted(masked_softmax(how))
    assert not any("constant" in why for why in kept.values())
    assert next(e.reason for e in edits if e.verb == "clamp").startswith("to -16384")
    reference, found = run(masked_softmax(how).model(), feeds)[0], evaluate(proto, feeds)[0]
    assert np.isfinite(found).all()
    seen = visible.any(-1)
    # Scores of 60 are rounded by 2^-6: probabilities change by 1.6 %, 36 dB at the worst.
    assert snr(reference[seen], found[seen]) > 36
    # What a row holds that sees nothing is arbitrary, but a number.
    np.testing.assert_allclose(found[~seen].sum(-1), 1, atol=1e-2)


def test_two_masks_in_one_row_do_not_make_infinity() -> None:
    visible = np.ones((1, 4, 4), bool)
    visible[0, 1] = False
    feeds = {"scores": normal(1, 4, 4), "visible": visible}
    net = masked_softmax("two")
    net.initializers = [t for t in net.initializers if t.name != "low"]
    net.const("low", -1e30)  # twice FP32's lowest would be -inf in FP32 too
    reference, found = both(net, feeds)
    rows = visible[0].any(-1)
    np.testing.assert_allclose(found[0][0, rows], reference[0][0, rows], atol=2e-3)
    assert np.isfinite(found[0]).all()


def test_bf16_masks_do_not_round_to_infinity() -> None:
    """FP32's lowest number is beyond BF16's, and rounds to -inf."""
    for how in ("where", "add", "mul", "table", "filled"):
        proto, _, _ = converted(masked_softmax(how), "bf16")
        for tensor in proto.graph.initializer:
            if tensor.data_type == TensorProto.BFLOAT16:
                bits = np.frombuffer(tensor.raw_data, ml_dtypes.bfloat16).astype(np.float32)
                assert np.isfinite(bits).all(), tensor.name
        for node in proto.graph.node:
            if node.op_type == "ConstantOfShape":
                value = onnx.numpy_helper.to_array(node.attribute[0].t)
                assert np.isfinite(value.astype(np.float32)).all()


# --- constants ------------------------------------------------------------------------------------


def test_divisors_guarded_by_a_tiny_constant() -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    last = net.const("last", np.array([-1], np.int64))
    length = net.op("ReduceMax", net.op("Abs", x), last, name="/length")
    guarded = net.op("Max", length, net.const("tiny", 1e-12), name="/guard")
    shaped = net.op("Expand", guarded, net.op("Shape", x), name="/expand")
    net.output(net.op("Div", x, shaped, name="/divide"))
    proto, kept, _ = converted(net)
    assert "1e-12, 0 or nearly so" in kept["/guard"]
    assert kept["/divide"] == "divides by '/guard', which stays FP32"
    assert kept["/expand"] == "between nodes that stay FP32"
    feeds = {"x": normal(3, 32)}
    feeds["x"][1] = 0
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


@pytest.mark.parametrize(
    ("value", "kept_back"), [(1e5, True), (6e4, False), (3e-5, True), (1e-4, False)]
)
def test_weights_outside_the_range(value: float, kept_back: bool) -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    weight = np.eye(32) * value
    net.output(net.op("MatMul", x, net.const("w", weight), name="/fc"))
    proto, kept, _ = converted(net)
    assert ("/fc" in kept) == kept_back
    feeds = {"x": normal(4, 32, scale=0.2 if value > 1 else 2)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS
    assert converted(net, "bf16")[1] == {}


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_large_negative_constant_is_a_mask_only_on_the_way_to_a_softmax(op: str) -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    y = net.op(op, x, net.const("c", -1e5), name="/large")
    net.output(net.op("Mul", y, net.const("small", 1e-2), name="/small"))
    proto, kept, edits = converted(net)
    assert kept["/large"] == "constant 'c' reaches 1e+05"
    assert not [e for e in edits if e.verb == "clamp"]
    feeds = {"x": normal(4, 32, scale=0.1)}
    if op == "Mul":
        assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS
    net.outputs.clear()
    net.output(net.op("Softmax", y))
    assert [e.target for e in converted(net)[2] if e.verb == "clamp"] == ["c"]


def test_layer_scales_and_epsilons_that_underflow() -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    small = net.op("Mul", x, net.const("gamma", np.full(32, 1e-6)), name="/gamma")
    root = net.op("Sqrt", net.op("Add", net.op("Abs", x), net.const("eps", 1e-9), name="/eps"))
    net.output(net.op("Div", small, root, name="/out"))
    bias = net.op("Add", x, net.const("bias", np.full(32, 1e-7)), name="/bias")
    net.output(net.op("Relu", bias, name="/relu"))
    proto, kept, _ = converted(net)
    assert {"/gamma", "/eps"} <= kept.keys()
    assert "/bias" not in kept, "an offset of 1e-7 beside numbers of 1 may vanish"
    feeds = {"x": normal(4, 32)}
    feeds["x"][1] = 0
    reference, found = run(net.model(), feeds), evaluate(proto, feeds)
    assert np.isfinite(found[0]).all()
    # 1e-6 x 1 / 1 is subnormal in FP16 (steps of 6e-8): the last Cast decides, not the sum.
    np.testing.assert_allclose(found[0], reference[0], atol=6e-8)


def test_limits_of_clip_are_cut_to_the_range() -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    net.output(net.op("Clip", x, net.const("low", LOWEST), net.const("high", -LOWEST)))
    proto, kept, _ = converted(net)
    assert not kept
    feeds = {"x": normal(4, 32, scale=1000)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


@pytest.mark.parametrize("mask_first", [False, True])
def test_a_constant_that_is_a_mask_and_a_limit_becomes_each_as_its_reader_needs(
    mask_first: bool,
) -> None:
    net = Net()
    x, visible = net.input("x", ["m", 8]), net.input("visible", ["m", 8], bool)
    low = net.const("low", LOWEST)
    for is_mask in (mask_first, not mask_first):
        if is_mask:
            net.output(net.op("Softmax", net.op("Where", visible, x, low, name="/mask")))
        else:
            net.output(net.op("Max", x, low, name="/limit"))
    proto, kept, edits = converted(net)
    assert not kept and [e.target for e in edits] == ["low", "low"]
    rows = -3e4 - 10 * np.arange(8, dtype=np.float32).reshape(1, 8)
    feeds = {"x": rows, "visible": np.zeros((1, 8), bool)}
    reference, found = run(net.model(), feeds), evaluate(proto, feeds)
    np.testing.assert_allclose(found[mask_first], reference[mask_first], rtol=1e-3)
    assert np.isfinite(found[not mask_first]).all()


@pytest.mark.parametrize(("number", "factor"), [(1e5, 1e-2), (-1e5, 1e-2), (1e-9, 1.0)])
def test_a_shape_filled_with_what_fp16_has_not_stays_fp32(number: float, factor: float) -> None:
    """Neither is a mask's: one scales, the other guards a quotient against 0."""
    net = Net()
    x = net.input("x", ["m", 8])
    value = h.make_tensor("v", TensorProto.FLOAT, [1], [number])
    full = net.op("ConstantOfShape", net.op("Shape", x), value=value, name="/full")
    scale = net.op("Mul", net.op("Abs", x), net.const("factor", factor))
    net.output(net.op("Div", x, net.op("Add", scale, full, name="/guard"), name="/divide"))
    proto, kept, _ = converted(net)
    assert {"/full", "/guard", "/divide"} <= kept.keys() and "1e" in kept["/guard"]
    feeds = {"x": normal(3, 8, scale=1e4)}
    feeds["x"][1] = 0
    reference, found = run(net.model(), feeds)[0], evaluate(proto, feeds)[0]
    assert np.isfinite(found).all() and snr(reference, found) > FEW_ROUNDINGS


# --- measured ranges ------------------------------------------------------------------------------


def test_what_was_measured_beyond_the_range_stays_fp32() -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    grown = net.op("Mul", x, net.const("c", 3000.0), name="/grow")
    net.output(net.op("MatMul", grown, net.weight("w", 32, 32, scale=1e-3), name="/fc"))
    feeds = {"x": normal(4, 32, scale=20)}
    peak = float(np.abs(feeds["x"]).max() * 3000)
    assert peak > 65504
    plain = evaluate(converted(net)[0], feeds)[0]
    assert not np.isfinite(plain).all(), "without ranges nothing can know"
    proto, kept, _ = converted(net, ranges={"/grow:0": peak})
    assert "measured at" in kept["/grow"] and "/fc" in kept
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


def test_behind_a_limit_beyond_the_range_measured_ranges_count() -> None:
    """A limit is cut to the range as a mask is, but it hides nothing."""
    net = Net()
    x = net.input("x", ["m", 32])
    limited = net.op("Clip", x, net.const("zero", 0.0), net.const("high", -LOWEST), name="/limit")
    grown = net.op("Mul", limited, net.const("c", 3000.0), name="/grow")
    net.output(net.op("MatMul", grown, net.weight("w", 32, 32, scale=1e-3), name="/fc"))
    proto, kept, _ = converted(net, ranges={"/limit:0": 80.0, "/grow:0": 2.4e5})
    assert "measured at" in kept["/grow"] and "/limit" not in kept
    feeds = {"x": normal(4, 32, scale=20)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


def beyond(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model that brings an input of 1e5 into the range, and data of which only the second, the
    smaller sample goes beyond it."""
    net = Net()
    x, pixels = net.input("x", ["m", 32]), net.input("pixels", ["m", 32])
    scaled = net.op("Mul", x, net.const("c", 1e-3), name="/shrink")
    y = net.op("MatMul", scaled, net.weight("w", 32, 32), name="/fc")
    net.output(net.op("Add", y, pixels, name="/add"))
    rows = {"x": normal(5, 32), "pixels": normal(5, 32, seed=7)}
    rows["x"][4] *= 1e5
    (folder / "data").mkdir()
    np.savez(folder / "data/0.npz", **{name: array[:4] for name, array in rows.items()})
    np.savez(folder / "data/1.npz", **{name: array[4:] for name, array in rows.items()})
    return net.save(folder / "m.onnx"), rows


@pytest.mark.parametrize("io", ["keep", "fp16"])
def test_an_input_beyond_the_range_stays_fp32(io: Any, tmp_path: Path) -> None:
    model, rows = beyond(tmp_path)
    data = Data(tmp_path / "data")
    made = quantize(model, tmp_path / "q.onnx", recipe="int8-dynamic", calib=data, io=io)
    proto = onnx.load(tmp_path / "q.onnx")
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.input}
    narrow = TensorProto.FLOAT16 if io == "fp16" else TensorProto.FLOAT
    assert types == {"x": TensorProto.FLOAT, "pixels": narrow}
    said = {e.target: e.reason for e in made.report.edits if e.verb == "keep fp32"}
    assert "'x' was measured at" in said["/shrink"]
    assert ("x" in said) == (io == "fp16")
    feeds = dict(rows)
    if io == "fp16":
        feeds["pixels"] = rows["pixels"].astype(np.float16)
    # 8 bits of 32 values: 35 dB and more; infinity is no number at all
    assert snr(run(onnx.load(model), rows)[0], run(proto, feeds)[0]) > 30


def test_an_output_beyond_the_range_stays_fp32() -> None:
    net = Net()
    x = net.input("x", ["m", 32])
    net.output(net.op("Mul", x, net.const("c", 3000.0), name="/grow"))
    net.output(net.op("Relu", x, name="/relu"))
    proto, _, edits = converted(net, ranges={"/grow:0": 2e5}, convert_io=True)
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.output}
    assert types == {"/grow:0": TensorProto.FLOAT, "/relu:0": TensorProto.FLOAT16}
    assert any(e.target == "/grow:0" and "measured at 2e+05" in e.reason for e in edits)


def test_a_masks_range_is_no_reason() -> None:
    net = masked_softmax("add")
    where = next(n.output[0] for n in net.nodes if n.op_type == "Where")
    add = next(n.output[0] for n in net.nodes if n.op_type == "Add")
    _, kept, _ = converted(net, ranges={where: 3.4e38, add: 3.4e38})
    assert not kept


# --- subgraphs ------------------------------------------------------------------------------------


def branches(net: Net, condition: str, captured: Sequence[str]) -> str:
    """If condition: captured[0] + captured[1], else captured[0] - captured[1]."""
    graphs = {}
    for name, op in (("then_branch", "Add"), ("else_branch", "Sub")):
        value = h.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, None)
        graphs[name] = h.make_graph(
            [h.make_node(op, list(captured), [f"{op}_out"])], op, [], [value]
        )
    return net.op("If", condition, name="/if", **graphs)


@pytest.mark.parametrize("convert_io", [False, True])
def test_what_a_subgraph_reads_stays_fp32(convert_io: bool) -> None:
    """A computed tensor, a constant and a graph input are captured."""
    net = Net()
    x, z = net.input("x", ["m", 32]), net.input("z", ["m", 32])
    condition = net.input("condition", [], bool)
    y = net.op("MatMul", x, net.weight("w", 32, 32), name="/before")
    chosen = branches(net, condition, [y, z])
    shifted = net.op("Add", chosen, net.const("offset", np.ones(32)), name="/after")
    net.output(net.op("Add", shifted, z, name="/last"))
    proto, kept, edits = converted(net, convert_io=convert_io)
    assert kept["/if"] == "holds a subgraph, which passes through untouched"
    assert kept["/before"] == "a subgraph reads its output"
    assert node_types(proto)["/last"] == "fp16"
    if convert_io:
        assert any(e.target == "z" and "subgraph reads" in e.reason for e in edits)
    types = {i.name: i.type.tensor_type.elem_type for i in proto.graph.input}
    assert types["z"] == TensorProto.FLOAT
    assert types["x"] == (TensorProto.FLOAT16 if convert_io else TensorProto.FLOAT)
    for flag in (True, False):
        feeds = {"x": normal(3, 32), "z": normal(3, 32, seed=6), "condition": np.array(flag)}
        reference = run(net.model(), feeds)[0]
        if convert_io:
            feeds["x"] = feeds["x"].astype(np.float16)
        assert snr(reference, evaluate(proto, feeds)[0]) > 60


@pytest.mark.parametrize("convert_io", [False, True])
@pytest.mark.parametrize("kind", ["Relu", "Cast"])
def test_an_output_that_a_subgraph_reads_too_stays_fp32(kind: str, convert_io: bool) -> None:
    """Both read it by one name, so it has one type; the body's is FP32."""
    net = Net()
    x, condition = net.input("x", ["m", 8]), net.input("condition", [], bool)
    if kind == "Cast":
        y = net.op("Cast", net.op("Relu", net.input("i", ["m", 8], np.int32)), to=1, name="/y")
    else:
        y = net.op("Relu", x, name="/y")
    net.output(y)
    net.output(net.op("Neg", branches(net, condition, [y, y]), name="/after"))
    proto, _, edits = converted(net, convert_io=convert_io)
    types = {o.name: o.type.tensor_type.elem_type for o in proto.graph.output}
    other = TensorProto.FLOAT16 if convert_io else TensorProto.FLOAT
    assert types == {"/y:0": TensorProto.FLOAT, "/after:0": other}
    said = [e for e in edits if e.target == "/y:0" and "subgraph reads" in e.reason]
    assert len(said) == convert_io
    feeds = {"x": normal(3, 8), "condition": np.array(True)}
    if kind == "Cast":
        feeds = {"i": np.arange(24, dtype=np.int32).reshape(3, 8), **feeds}
    reference = run(net.model(), feeds)
    if convert_io:
        feeds["x"] = feeds["x"].astype(np.float16)
    for expected, found in zip(reference, run(proto, feeds), strict=True):
        assert snr(expected, found) > FEW_ROUNDINGS


def test_loops_keep_their_types() -> None:
    net = Net()
    x = net.input("x", ["m", 8])
    start = net.op("Relu", x, name="/start")
    body = h.make_graph(
        [
            h.make_node("Add", ["state", x], ["next"]),
            h.make_node("Identity", ["go"], ["again"]),
        ],
        "body",
        [
            h.make_tensor_value_info("i", TensorProto.INT64, []),
            h.make_tensor_value_info("go", TensorProto.BOOL, []),
            h.make_tensor_value_info("state", TensorProto.FLOAT, None),
        ],
        [
            h.make_tensor_value_info("again", TensorProto.BOOL, []),
            h.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    trips, go = net.const("trips", np.array(3, np.int64)), net.const("go_on", np.array(True))
    out = net.op("Loop", trips, go, start, name="/loop", body=body)
    net.output(net.op("Mul", out, net.const("two", 2.0), name="/after"), ["m", 8])
    proto, kept, _ = converted(net)
    assert {"/loop"} <= kept.keys() and node_types(proto)["/after"] == "fp16"
    feeds = {"x": normal(3, 8)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS


# --- operators with types of their own ------------------------------------------------------------


def test_operators_whose_inputs_or_outputs_are_fp32_alone() -> None:
    net = Net()
    image = net.op("Relu", net.input("image", [1, 3, 8, 8]), name="/relu")
    scales = net.const("scales", np.array([1.0, 1.0, 2.0, 2.0]))
    net.output(net.op("Resize", image, "", scales, name="/resize", mode="nearest"))
    boxes, scores = net.input("boxes", [1, 6, 4]), net.input("scores", [1, 1, 6])
    better = net.op("Mul", scores, net.const("two", 2.0), name="/better")
    count = net.const("count", np.array(3, np.int64))
    net.output(net.op("NonMaxSuppression", boxes, better, count, name="/nms"), None, np.int64)
    tokens = net.input("tokens", [4], np.int64)
    counts = net.op(
        "TfIdfVectorizer",
        tokens,
        name="/tfidf",
        mode="TF",
        min_gram_length=1,
        max_gram_length=1,
        max_skip_count=0,
        ngram_counts=[0],
        ngram_indexes=[0, 1],
        pool_int64s=[2, 3],
    )
    net.output(net.op("Mul", counts, net.const("half", 0.5), name="/weighted"))
    proto, _, _ = converted(net)
    kinds = node_types(proto)
    assert kinds["/resize"] == "fp16" and kinds["/tfidf"] == "fp32" and kinds["/weighted"] == "fp16"
    resize = next(n for n in proto.graph.node if n.name == "/resize")
    assert types_of(proto)[resize.input[2]] == "fp32"
    feeds = {
        "image": normal(1, 3, 8, 8),
        "boxes": np.abs(normal(1, 6, 4)),
        "scores": np.abs(normal(1, 1, 6)),
        "tokens": np.int64([2, 3, 3, 1]),
    }
    reference, found = run(net.model(), feeds), run(proto, feeds)
    assert snr(reference[0], found[0]) > FEW_ROUNDINGS
    np.testing.assert_array_equal(reference[1], found[1])
    np.testing.assert_array_equal(reference[2], found[2])


def test_operators_typed_by_an_attribute_or_without_16_bits() -> None:
    net = Net()
    x = net.input("x", [4, 8])
    noise = net.op("RandomNormal", name="/noise", shape=[4, 8], seed=7.0)
    one = net.ops("Constant", outputs=["one"], name="/one", value_float=1.0)[0]
    start, limit = net.const("start", 0.0), net.const("limit", 8.0)
    steps = net.op("Range", start, limit, net.const("step", 1.0), name="/range")
    y = net.op("Add", net.op("Add", x, noise, name="/a"), net.op("Mul", steps, one), name="/b")
    net.output(y)
    proto, kept, _ = converted(net)
    assert kept["/noise"] == "its type is an attribute"
    assert kept["/range"].startswith("ONNX has no fp16 Range")
    feeds = {"x": normal(4, 8)}
    assert snr(run(net.model(), feeds)[0], run(proto, feeds)[0]) > FEW_ROUNDINGS


@pytest.mark.parametrize("opset", [13, 19, 21, 23])
def test_the_types_of_operands_are_onnxs(opset: int) -> None:
    try:
        assert onnx.defs.get_schema("Relu").inputs[0].types
    except TypeError:
        pytest.skip("onnx 1.20 cannot tell")
    names = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    for name in names:
        try:
            schema = onnx.defs.get_schema(name, opset)
        except onnx.defs.SchemaError:
            continue
        for formals in (schema.inputs, schema.outputs):
            for index, formal in enumerate(formals):
                assert _types(schema, formals, index) == set(formal.types), (name, index)


def test_sequences_and_custom_operators_keep_fp32() -> None:
    net = Net()
    x = net.op("Relu", net.input("x", [4, 8]), name="/relu")
    sequence = net.op("SequenceConstruct", x, x, name="/sequence")
    first = net.op("SequenceAt", sequence, net.const("zero", np.array(0, np.int64)), name="/at")
    net.output(net.op("Mul", first, net.const("two", 2.0), name="/after"), [4, 8])
    proto, _, _ = converted(net)
    feeds = {"x": normal(4, 8)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS

    net = Net()
    x = net.op("Relu", net.input("x", [4, 8]), name="/relu")
    hidden = net.op("Secret", x, name="/secret", domain="acme")
    net.output(net.op("Add", hidden, net.const("one", np.ones(8)), name="/after"), [4, 8])
    model = net.loaded(21)
    plan = plan_precision(model, BASES["fp16"])
    kept = {label(n): plan.kept.get(id(n), "") for n in model.graph.nodes}
    assert kept == {
        "/relu": "",
        "/secret": "types beyond it are unknown",
        "/after": "types beyond it are unknown",
    }


# --- inputs, outputs and Casts --------------------------------------------------------------------


def interface() -> Net:
    """Outputs read inside, of a kept node, of an input, of a constant, through Identity, cast."""
    net = Net()
    x, y = net.input("x", ["m", 8]), net.input("y", ["m", 8])
    relu = net.op("Relu", x, name="/relu")
    net.output(relu)
    net.output(net.op("Exp", net.op("Neg", relu), name="/exp"))
    net.output(y, ["m", 8])
    net.output(net.const("table", np.arange(8.0)), [8])
    same = net.op("Identity", net.op("Identity", net.op("Add", y, "table"), name="/i1"), name="/i2")
    net.output(same)
    half = net.op("Cast", relu, to=10, name="/half")
    net.output(net.op("Cast", half, to=1, name="/single"))
    net.output(net.op("Cast", relu, to=6, name="/integer"), None, np.int32)
    return net


@pytest.mark.parametrize("convert_io", [False, True])
def test_inputs_and_outputs_keep_their_names(convert_io: bool) -> None:
    net = interface()
    before = net.model().graph
    proto, _, _ = converted(net, convert_io=convert_io)
    assert [v.name for v in proto.graph.input] == [v.name for v in before.input]
    assert [v.name for v in proto.graph.output] == [v.name for v in before.output]
    wanted = TensorProto.FLOAT16 if convert_io else TensorProto.FLOAT
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)
    }
    assert types.pop("/integer:0") == TensorProto.INT32
    assert types.pop("table") == TensorProto.FLOAT, "a constant stays what it is"
    assert set(types.values()) == {wanted}
    feeds = {"x": normal(3, 8), "y": normal(3, 8, seed=9)}
    reference = run(net.model(), feeds)
    if convert_io:
        feeds = {name: value.astype(np.float16) for name, value in feeds.items()}
    found = evaluate(proto, feeds)
    for index in range(6):
        assert snr(reference[index], found[index]) > FEW_ROUNDINGS


def test_casts_that_are_there_already() -> None:
    """Of integers, of booleans, to FP16 and back, and from FP16 weights."""
    net = Net()
    x, ids = net.input("x", ["m", 8]), net.input("ids", ["m", 8], np.int64)
    number = net.op("Cast", ids, to=1, name="/number")
    y = net.op("Add", x, number, name="/add")
    half = net.op("Cast", net.op("Exp", y, name="/exp"), to=10, name="/half")
    back = net.op("Cast", half, to=1, name="/back")
    again = net.op("Cast", back, to=10, name="/again")
    y = net.op("Mul", net.op("Cast", again, to=1, name="/forth"), x, name="/mul")
    weight = net.const("w", np.eye(8), np.float16)
    y = net.op("MatMul", y, net.op("Cast", weight, to=1, name="/weight"), name="/fc")
    last = net.const("last", np.array([-1], np.int64))
    counted = net.op("ReduceSum", number, last, name="/count")
    net.output(net.op("Div", y, counted, name="/mean"))
    proto, _, _ = converted(net)
    feeds = {"x": normal(3, 8), "ids": np.arange(1, 25).reshape(3, 8) % 7}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > FEW_ROUNDINGS
    kinds = node_types(proto)
    assert kinds["/half"] == "fp16", "behind what stays FP32"
    assert not {"/back", "/again", "/forth"} & kinds.keys(), "everything is FP16 there"


@pytest.mark.parametrize("convert_io", [False, True])
@pytest.mark.parametrize(
    "make",
    [mlp, interface, lambda: rotary("MatMul"), lambda: masked_softmax("table")],
    ids=["mlp", "interface", "rotary", "mask"],
)
def test_converting_twice_changes_nothing(make: Any, convert_io: bool) -> None:
    once, _, _ = converted(make(), convert_io=convert_io)
    model, _ = prepare(Model.from_proto(once, Path("once.onnx")), 0)
    twice, _, _ = converted(model, convert_io=convert_io)
    assert [n.SerializeToString() for n in once.graph.node] == [
        n.SerializeToString() for n in twice.graph.node
    ]


def test_new_nodes_carry_the_module_path_of_those_they_serve() -> None:
    net = Net()
    x = net.input("x", ["m", 8])
    net.output(net.op("MatMul", x, net.weight("w", 8, 8), name="/fc"))
    net.module("model.fc")
    proto, _, _ = converted(net)
    casts = [n for n in proto.graph.node if n.op_type == "Cast"]
    assert len(casts) == 2
    for node in casts:
        assert "model.fc" in node.metadata_props[0].value


# --- real models ----------------------------------------------------------------------------------


def real(models: Path, folder: str, opset: int = 21) -> Model:
    return prepare(Model.load(models / folder / "model.onnx"), opset)[0]


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("folder", "casts", "least"),
    [
        # Casts of floats added: MiniLM's pooling; one before and one behind each of SmolLM2's 61
        # norms and at its angles; PP-OCR's 5 norms. dB against FP32: FP16's own 2^-11, some forty
        # layers deep.
        ("minilm", 5, 50),
        ("minilm-legacy", 5, 50),
        ("ppocr_rec", 12, 45),
    ],
)
def test_real_models_in_fp16(folder: str, casts: int, least: float, models: Path) -> None:
    model = real(models, folder)
    proto, _kept, _ = converted(model)
    types = types_of(proto)
    added = [n for n in proto.graph.node if n.op_type == "Cast" and types[n.output[0]] in FLOATS]
    assert len(added) <= casts
    kinds = node_types(proto)
    layers = [n.name for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert {kinds[n] for n in layers} == {"fp16"}
    data = np.load(models / folder.removesuffix("-legacy") / "heldout.npz")
    feeds = {i.name: data[i.name][:2] for i in proto.graph.input}
    reference = session(models / folder / "model.onnx").run(None, feeds)
    found = run(proto, feeds)
    for a, b in zip(reference, found, strict=True):
        assert snr(a, b) > least


@pytest.mark.parametrize("folder", ["smollm2-fp32", "smollm2-torch"])
def test_smollm2_in_fp16_with_left_padding(folder: str, models: Path, tmp_path: Path) -> None:
    model = real(models, folder)
    feeds = {
        "input_ids": np.random.default_rng(3).integers(5, 40000, (2, 24)),
        "attention_mask": np.ones((2, 24), np.int64),
    }
    feeds["attention_mask"][1, :7] = 0
    (reference,) = session(models / folder / "model.onnx").run(None, feeds)
    plan = plan_precision(model, BASES["fp16"])
    apply_precision(model, plan)
    casts = [n for n in model.graph.nodes if n.op == "Cast" and type_word(n.outputs[0]) in FLOATS]
    assert len(casts) <= 126  # 2 x 61 norms, cos, sin, positions, logits
    layers = [
        n for n in model.graph.nodes if n.op == "MatMul" and len(n.inputs[1].shape or ()) == 2
    ]
    assert len(layers) == 211 and {type_word(n.outputs[0]) for n in layers} == {"fp16"}
    (found,) = session(save(model, tmp_path / "m.onnx")[0]).run(None, feeds)
    assert np.isfinite(found).all(), "the padded rows see nothing"
    seen = feeds["attention_mask"].astype(bool)
    # 30 layers, each a few roundings of 2^-11 on the residual stream.
    assert snr(reference[seen], found[seen]) > 40


@pytest.mark.parametrize("folder", ["minilm", "ppocr_rec"])
def test_real_models_in_bf16_are_sound(folder: str, models: Path) -> None:
    """`inlined` has onnx check and infer the whole file; ONNX Runtime has no BF16 on the CPU."""
    model = real(models, folder, BASES["bf16"].min_opset)
    proto, _kept, _ = converted(model, "bf16")
    kinds = node_types(proto)
    layers = [n.name for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert {kinds[n] for n in layers} == {"bf16"}
    assert onnx_type(ml_dtypes.bfloat16) == TensorProto.BFLOAT16
