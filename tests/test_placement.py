"""Where Q/DQ goes and where not, each rule tripped and not tripped; real models as golden text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_golden import check_golden
from core_graphs import Net, onnx_type, placed, reasons
from onnx import helper as h

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare

# --- real models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "recipe"),
    [
        ("minilm", "fp8-attention"),
        ("smollm2-torch", "fp8"),
        ("sdxl-unet-tiny-fp16", "int8"),
        ("ppocr_rec", "fp8-attention"),
    ],
)
def test_real_models(folder: str, recipe: str, models: Path) -> None:
    model, _ = prepare(Model.load(models / folder / "model.onnx"), 19)
    check_golden(f"{folder}.{recipe}", placed(model, recipe).lines())


def test_the_prefill_and_the_decode_graph_are_placed_alike(models: Path) -> None:
    """M, the rows of an activation, never counts: a decode step multiplies one row."""
    found = {}
    for folder in ("smollm2-torch", "smollm2-torch-decode"):
        model, _ = prepare(Model.load(models / folder / "model.onnx"), 19)
        sites = placed(model, "fp8-attention").decisions
        found[folder] = [(d.site.module, d.site.kind, d.quantized, d.reason) for d in sites]
    prefill, decode = found.values()
    assert len(prefill) == 30 * 8 + 1
    assert prefill == decode


# --- layers by shape ----------------------------------------------------------------------------


def linear(k: int, n: int, **net: Any) -> Net:
    graph = Net(**net)
    x = graph.input("x", ["batch", "seq", k])
    graph.output(graph.op("MatMul", x, graph.weight("w", k, n), name="/fc"))
    return graph


@pytest.mark.parametrize(
    ("k", "n", "reason"),
    [
        (16, 16, ""),
        (64, 17, ""),
        (15, 64, "thin: 15 x 64, no fast 8-bit kernel below 16"),
        (64, 15, "thin: 64 x 15, no fast 8-bit kernel below 16"),
        (64, 1, "thin: 64 x 1, no fast 8-bit kernel below 16"),
        (1, 64, "thin: 1 x 64, no fast 8-bit kernel below 16"),
    ],
)
@pytest.mark.parametrize("recipe", ["int8", "fp8-dynamic"])
def test_thin_linear_layers(k: int, n: int, reason: str, recipe: str) -> None:
    assert reasons(placed(linear(k, n), recipe)) == {"/fc": reason}
    graph = Net()
    weight = graph.weight("w", n, k)
    graph.output(graph.op("Gemm", graph.input("x", ["m", k]), weight, name="/fc", transB=1))
    assert reasons(placed(graph, recipe)) == {"/fc": reason}


@pytest.mark.parametrize("batch", [1, 7, 512, "batch"])
@pytest.mark.parametrize("rows", [1, 128, "seq"])
def test_batch_and_rows_change_nothing(batch: int | str, rows: int | str) -> None:
    graph = Net()
    x = graph.input("x", [batch, rows, 32])
    y = graph.op("MatMul", x, graph.weight("a", 32, 64), name="/wide")
    graph.output(graph.op("MatMul", y, graph.weight("b", 64, 8), name="/thin"))
    thin = "thin: 64 x 8, no fast 8-bit kernel below 16"
    assert reasons(placed(graph)) == {"/wide": "", "/thin": thin}


CONVS = [
    # in, out, group, kernel -> reason in INT8, in FP8
    ((16, 16, 1, (3, 3)), "", "thin: 16 -> 16 channels, no fast fp8 kernel below 17"),
    ((17, 32, 1, (3, 3)), "", ""),
    (
        (3, 64, 1, (7, 7)),
        *(f"thin: 3 -> 64 channels, no fast {f} kernel below" for f in ("int8", "fp8")),
    ),
    ((64, 64, 64, (3, 3)), *(["thin: 64 -> 64 channels in 64 groups"] * 2)),
    ((64, 64, 4, (3, 3)), "", "thin: 64 -> 64 channels in 4 groups"),
    ((64, 64, 2, (3, 3)), "", ""),
    ((32, 32, 1, (5, 5)), "", ""),
    ((32, 32, 1, (7, 7)), "", "kernel of 49 taps, no fp8 kernel above 32"),
    ((32, 32, 1, (1,)), "", ""),
    ((32, 32, 1, (33,)), "", "kernel of 33 taps, no fp8 kernel above 32"),
    ((32, 32, 1, (32,)), "", ""),
    ((32, 32, 1, (3, 3, 3)), "", ""),
]


@pytest.mark.parametrize(("shape", "int8", "fp8"), CONVS, ids=str)
def test_convolutions_by_shape(shape: Any, int8: str, fp8: str) -> None:
    channels, out, group, kernel = shape
    graph = Net()
    x = graph.input("x", ["n", channels, *["s"] * len(kernel)])
    weight = graph.weight("w", out, channels // group, *kernel)
    graph.output(graph.op("Conv", x, weight, name="/conv", group=group))
    for recipe, expected in (("int8", int8), ("fp8-dynamic", fp8)):
        found = reasons(placed(graph, recipe))["/conv"]
        assert found.startswith(expected) and bool(found) == bool(expected)


# --- operands -----------------------------------------------------------------------------------


def test_operands_that_are_no_weight() -> None:
    graph = Net()
    x = graph.input("x", ["b", 32, 32])
    graph.op("MatMul", graph.weight("first", 32, 32), x, name="/first_operand")
    graph.op("MatMul", x, x, name="/product")
    graph.op("MatMul", x, graph.weight("batched", 4, 32, 32), name="/three_dimensions")
    graph.op("MatMul", graph.weight("c", 32, 32), graph.weight("d", 32, 32), name="/constants")
    kernel = graph.op("Abs", graph.input("k", [32, 32, 1]), name="/abs")
    graph.op("Conv", x, kernel, name="/computed_kernel")
    graph.op("ConvTranspose", x, graph.weight("t", 32, 32, 2), name="/up")
    for node in list(graph.nodes):
        if node.op_type != "Abs":
            graph.output(node.output[0])
    assert reasons(placed(graph, "int8")) == {
        "/first_operand": "its weight is the first operand",
        "/product": "both operands are computed, and it is no attention",
        "/three_dimensions": "its weight has 3 dimensions, not 2",
        "/constants": "both of its operands are constant",
        "/computed_kernel": "its weight is computed",
        "/up": "ConvTranspose is left: no fast 8-bit kernel",
    }


def test_gemm_forms() -> None:
    graph = Net()
    x, square = graph.input("x", [32, 32]), graph.weight("w", 32, 32)
    bias = graph.const("b", np.ones(32))
    graph.op("Gemm", x, square, bias, name="/plain")
    graph.op("Gemm", x, square, bias, name="/trans_b", transB=1)
    graph.op("Gemm", x, square, bias, name="/alpha", alpha=0.5)
    graph.op("Gemm", x, square, bias, name="/trans_a", transA=1)
    graph.op("Gemm", x, square, bias, name="/beta", beta=0.5)
    graph.op("Gemm", x, square, name="/beta_without_bias", beta=0.5)
    for node in graph.nodes:
        graph.output(node.output[0])
    left = {name: why for name, why in reasons(placed(graph)).items() if why}
    assert left == {
        "/trans_a": "Gemm with transA",
        "/beta": "Gemm with beta: its bias cannot be added behind a rescale",
    }


@pytest.mark.parametrize("through", [(), ("Transpose",), ("Identity", "Transpose"), ("Cast",)])
def test_weights_seen_through_layout_nodes(through: tuple[str, ...]) -> None:
    graph = Net()
    dtype = np.float16 if "Cast" in through else np.float32
    rng = np.random.default_rng(0)
    w = graph.const("w", rng.standard_normal((64, 32)), dtype)
    for kind in through:
        w = graph.op(kind, w, **({"to": 1} if kind == "Cast" else {}))
    k = 32 if "Transpose" in through else 64
    graph.output(graph.op("MatMul", graph.input("x", ["m", k]), w, name="/fc"))
    site = placed(graph).quantized[0].site
    assert site.weight_name == "w"
    assert site.operand is not None and site.operand.shape == (k, 96 - k)


def test_types_that_have_no_8_bit_form() -> None:
    graph = Net()
    double = graph.input("double", ["m", 32], np.float64)
    graph.op("MatMul", double, graph.const("w64", np.ones((32, 32)), np.float64), name="/fp64")
    integers = graph.input("integers", ["m", 32], np.int32)
    ones = graph.const("w32", np.ones((32, 32)), np.int32)
    graph.op("MatMul", integers, ones, name="/integers")
    graph.output("/fp64:0", None, np.float64)
    graph.output("/integers:0", None, np.int32)
    assert reasons(placed(graph)) == {"/fp64": "its operands are FP64"}


def test_what_stands_behind_a_custom_operator_is_said() -> None:
    graph = Net()
    x = graph.input("x", ["m", 32])
    hidden = graph.op("Secret", x, name="/secret", domain="acme")
    graph.op("MatMul", hidden, graph.weight("w", 32, 32), name="/fc")
    y = graph.op("FusedMatMul", x, graph.weight("v", 32, 32), name="/fused", domain="com.microsoft")
    graph.output("/fc:0")
    graph.output(y)
    assert reasons(placed(graph)) == {
        "/fc": "the type of its input is unknown: a custom operator stands before it",
        "/fused": "custom operator com.microsoft::FusedMatMul",
    }


def test_operators_that_multiply_and_are_left() -> None:
    graph = Net(opset=23)
    q = graph.input("q", ["b", 4, "s", 64])
    graph.output(graph.op("Attention", q, q, q, name="/attention"))
    x = graph.input("x", ["b", "s", 32])
    graph.output(graph.op("Einsum", x, x, name="/einsum", equation="bsk,btk->bst"))
    gates = (graph.weight("w", 1, 128, 32), graph.weight("r", 1, 128, 32))
    graph.output(graph.op("LSTM", x, *gates, name="/lstm", hidden_size=32))
    assert reasons(placed(graph)) == {
        "/attention": "Attention is left: ONNX's Attention is fused in 16 bits as it is",
        "/einsum": "Einsum is left: write it as MatMul to have it quantized",
        "/lstm": "LSTM is left: no 8-bit kernel",
    }


@pytest.mark.parametrize("opset", [18, 21])
def test_layers_behind_a_group_normalization_are_seen(opset: int) -> None:
    """onnx infers no type behind it."""
    graph = Net(opset=opset)
    x = graph.input("x", ["n", 32, 8, 8])
    for i in range(2):
        x = graph.op("Conv", x, graph.weight(f"w{i}", 32, 32, 3, 3), name=f"/conv{i}")
        size = 4 if opset == 18 else 32
        one, zero = (graph.const(f"{n}{i}", np.full(size, n)) for n in (1.0, 0.0))
        x = graph.op("GroupNormalization", x, one, zero, name=f"/norm{i}", num_groups=4)
    graph.output(graph.op("Conv", x, graph.weight("last", 32, 32, 1, 1), name="/last"))
    assert reasons(placed(graph.loaded(21), "fp8")) == {"/conv0": "", "/conv1": "", "/last": ""}


def subgraph_net() -> Net:
    """A MatMul outside, and one in each branch of an If, one of them nested in another If."""
    graph = Net()
    x = graph.input("x", ["m", 32])
    outer = graph.op("MatMul", x, graph.weight("outer", 32, 32), name="/outer")
    graph.weight("inner", 32, 32)
    condition = graph.input("condition", [], bool)

    def branch(name: str, nodes: list[onnx.NodeProto], result: str) -> onnx.GraphProto:
        value = h.make_tensor_value_info(result, onnx_type(np.float32), None)
        return h.make_graph(nodes, name, [], [value])

    deep = h.make_node("MatMul", [outer, "inner"], ["deep"], name="/if/deep")
    deep_if = h.make_node(
        "If",
        [condition],
        ["nested"],
        name="/if/if",
        then_branch=branch("a", [deep], "deep"),
        else_branch=branch("b", [h.make_node("Abs", [outer], ["abs"])], "abs"),
    )
    inner = h.make_node("MatMul", [outer, "inner"], ["then"], name="/if/then")
    choice = graph.op(
        "If",
        condition,
        name="/if",
        then_branch=branch("then", [inner], "then"),
        else_branch=branch("else", [deep_if], "nested"),
    )
    graph.output(choice)
    return graph


def test_subgraphs_stay_as_they_are_and_are_mentioned() -> None:
    where = "inside a subgraph of If '/if', which stays as it is"
    assert reasons(placed(subgraph_net())) == {"/outer": "", "/if/then": where, "/if/deep": where}
    with pytest.raises(OnnxqError, match=r"'/if/deep', which cannot be quantized: inside a subgr"):
        placed(subgraph_net(), "fp8", "quantize node=/if/deep")


def test_what_no_output_depends_on_is_no_site() -> None:
    graph = linear(32, 32)
    dead = graph.op("MatMul", "x", graph.weight("dead", 32, 32), name="/dead")
    graph.op("Relu", dead, name="/end")
    found = reasons(placed(graph))
    assert found == {"/fc": "", "/dead": "no output depends on it: it is dropped"}
    net = subgraph_net()
    assert reasons(placed(net))["/outer"] == "", "what only a subgraph reads is alive"


def test_masks_and_shape_arithmetic_are_no_sites() -> None:
    graph = Net()
    x = graph.input("x", ["b", "s", 32])
    mask = graph.input("mask", ["b", "s"], np.int64)
    y = graph.op("MatMul", x, graph.weight("w", 32, 32), name="/fc")
    shape = graph.op("Shape", x)
    one = graph.const("one", np.array([1], np.int64))
    graph.op("MatMul", shape, graph.const("i", np.eye(3), np.int64), name="/shape_product")
    wide = graph.op("Cast", graph.op("Unsqueeze", mask, one), to=1)
    graph.output(graph.op("Mul", y, wide))
    graph.output("/shape_product:0", None, np.int64)
    assert reasons(placed(graph)) == {"/fc": ""}


def test_residual_additions_are_left_alone() -> None:
    graph = Net()
    x = graph.input("x", ["n", 32, "h", "w"])
    y = graph.op("Conv", x, graph.weight("a", 32, 32, 3, 3), name="/conv", pads=[1] * 4)
    graph.output(graph.op("Relu", graph.op("Add", y, x, name="/add")))
    assert [d.site.name for d in placed(graph, "int8").decisions] == ["/conv"]


# --- roles --------------------------------------------------------------------------------------


def language_model(tied: bool, transposed: bool = True, name: str = "/head") -> Net:
    graph = Net()
    ids = graph.input("ids", ["b", "s"], np.int64)
    table = graph.weight("embedding", 512, 32)
    x = graph.op("MatMul", graph.op("Gather", table, ids), graph.weight("w", 32, 32), name="/fc")
    if tied:
        head = graph.op("Transpose", table, perm=[1, 0])
    elif transposed:
        head = graph.op("Transpose", graph.weight("head", 512, 32), perm=[1, 0])
    else:
        head = graph.weight("head", 32, 512)
    graph.output(graph.op("MatMul", graph.op("Relu", x), head, name=name))
    return graph


@pytest.mark.parametrize(("tied", "transposed"), [(True, True), (False, True), (False, False)])
def test_lm_head_by_the_recipe(tied: bool, transposed: bool) -> None:
    graph = language_model(tied, transposed)
    assert reasons(placed(graph)) == {"/fc": "", "/head": "lm_head, left by the recipe"}
    assert reasons(placed(graph, lm_head="quantize")) == {"/fc": "", "/head": ""}
    assert reasons(placed(graph, "fp8", "quantize node=/head")) == {"/fc": "", "/head": ""}


@pytest.mark.parametrize(
    ("name", "wide", "left"),
    [("/classes", 256, True), ("/classes", 255, False), ("/lm_head/MatMul", 64, True)],
)
def test_what_counts_as_lm_head(name: str, wide: int, left: bool) -> None:
    """Also without an embedding: a character recognizer ends in thousands of classes."""
    graph = Net()
    x = graph.op("Relu", graph.input("x", ["m", 32]))
    graph.output(graph.op("MatMul", x, graph.weight("w", 32, wide), name=name))
    assert reasons(placed(graph)) == {name: "lm_head, left by the recipe" if left else ""}


def cnn(last: str = "/conv3", residual_first: bool = False) -> Net:
    """Scaled input, three convolutions with a residual addition before each of the last two."""
    graph = Net()
    x = graph.op("Sub", graph.input("x", ["n", 32, "h", "w"]), graph.const("mean", 0.5))
    x = graph.op("Div", x, graph.const("std", 2.0))
    for i in (1, 2, 3):
        weight = graph.weight(f"w{i}", 32, 32, 3, 3)
        name = f"/conv{i}" if i < 3 else last
        y = graph.op("Conv", x, weight, name=name, pads=[1] * 4)
        x = graph.op("Add", x, y) if residual_first else graph.op("Add", y, x)
    graph.output(graph.op("Clip", x, graph.const("low", 0.0), graph.const("high", 1.0)))
    return graph


@pytest.mark.parametrize("residual_first", [True, False])
def test_first_and_last_by_the_recipe(residual_first: bool) -> None:
    graph = cnn(residual_first=residual_first)
    assert not any(reasons(placed(graph)).values())
    left = reasons(placed(graph, first="leave", last="leave"))
    assert left == {
        "/conv1": "first convolution, left by the recipe",
        "/conv2": "",
        "/conv3": "makes an output, left by the recipe",
    }


@pytest.mark.parametrize("after", [("Softmax",), ("Add", "Reshape"), ("ArgMax",), ("Cast",)])
def test_the_last_layer_is_seen_through(after: tuple[str, ...]) -> None:
    graph = Net()
    x = graph.op("MatMul", graph.input("x", ["m", 32]), graph.weight("a", 32, 32), name="/first")
    y = graph.op("MatMul", graph.op("Relu", x), graph.weight("b", 32, 32), name="/last")
    for kind in after:
        extra = {
            "Add": [graph.const("bias", np.ones(32))],
            "Reshape": [graph.const("shape", np.array([-1, 4, 8], np.int64))],
        }.get(kind, [])
        y = graph.op(kind, y, *extra, **({"to": 1} if kind == "Cast" else {}))
    graph.output(y, None, np.int64 if "ArgMax" in after else np.float32)
    left = reasons(placed(graph, last="leave"))
    assert left == {"/first": "", "/last": "makes an output, left by the recipe"}


def test_detection_heads_are_all_last() -> None:
    """Boxes and scores of two scales, joined in one output."""
    graph = Net()
    x = graph.input("x", ["n", 32, 8, 8])
    trunk = graph.op("Conv", x, graph.weight("w", 32, 32, 1, 1), name="/trunk")
    heads = []
    for name in ("boxes", "scores"):
        weight = graph.weight(name, 32, 32, 1, 1)
        y = graph.op("Conv", graph.op("Relu", trunk), weight, name=f"/{name}")
        heads.append(graph.op("Sigmoid" if name == "scores" else "Exp", y))
    graph.output(graph.op("Concat", *heads, axis=1))
    last = "makes an output, left by the recipe"
    assert reasons(placed(graph, last="leave")) == {"/trunk": "", "/boxes": last, "/scores": last}


def test_operators_the_recipe_leaves() -> None:
    assert reasons(placed(cnn(), ops=("MatMul",)))["/conv1"] == "the recipe leaves Conv"


# --- rules by name ------------------------------------------------------------------------------


def two_layers() -> Net:
    graph = Net()
    x = graph.input("x", ["m", 32])
    for name in ("/fc1", "/fc10", "/a[0].fc"):
        x = graph.op("MatMul", x, graph.weight(f"{name}.weight", 32, 32), name=name)
        graph.module(f"model.layers.{len(graph.nodes)}.proj")
    graph.output(x)
    return graph


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("leave node=/fc1", ["/fc1"]),
        ("leave node=/fc1*", ["/fc1", "/fc10"]),
        ("leave node=/fc1?", ["/fc10"]),
        ("leave node=/a[0].fc", ["/a[0].fc"]),
        ("leave weight=/fc1.weight", ["/fc1"]),
        ("leave module=model.layers.1.proj", ["/fc1"]),
        ("leave node=*0 module=model.layers.*", ["/fc10"]),
        ("leave op=MatMul", ["/fc1", "/fc10", "/a[0].fc"]),
    ],
)
def test_patterns_match_exactly_or_as_globs(rule: str, left: list[str]) -> None:
    found = reasons(placed(two_layers(), "fp8", rule))
    assert [name for name, why in found.items() if why] == left
    assert all(why == f"left by the rule '{rule}'" for why in found.values() if why)


@pytest.mark.parametrize(
    "rule",
    ["leave node=/fc", "leave node=fc1", "leave node=/a0.fc", "leave module=model", "leave op=Add"],
)
def test_a_rule_that_matches_nothing_is_an_error(rule: str) -> None:
    with pytest.raises(OnnxqError, match="matches no node") as error:
        placed(two_layers(), "fp8", rule)
    assert "/fc1" in error.value.hint


def test_the_last_rule_wins() -> None:
    rules = ("leave op=MatMul", "quantize node=/fc1", "leave weight=/fc1.*")
    assert all(reasons(placed(two_layers(), "fp8", *rules)).values())
    found = reasons(placed(two_layers(), "fp8", *rules[:2]))
    assert [name for name, why in found.items() if not why] == ["/fc1"]


def test_a_rule_may_force_what_only_speed_speaks_against() -> None:
    assert reasons(placed(linear(32, 8), "int8", "quantize node=/fc")) == {"/fc": ""}


def test_a_rule_cannot_force_what_has_no_form() -> None:
    graph = Net()
    x = graph.input("x", ["b", 32, 32])
    y = graph.op("MatMul", x, graph.weight("w", 4, 32, 32), name="/batched")
    graph.output(graph.op("MatMul", y, graph.weight("v", 32, 32), name="/fc"))
    with pytest.raises(OnnxqError, match="'/batched', which cannot be quantized: its weight has 3"):
        placed(graph, "int8", "quantize node=/batched")
    # Among others it stays, and says why.
    found = reasons(placed(graph, "int8", "leave op=MatMul", "quantize op=MatMul"))
    assert found == {"/batched": "its weight has 3 dimensions, not 2", "/fc": ""}


# --- models and targets that cannot -------------------------------------------------------------


def test_a_target_without_the_format() -> None:
    for gpu in ("sm75", "sm80", "sm86"):
        with pytest.raises(OnnxqError, match=f"{gpu} .* has no fp8; use an int8 recipe"):
            placed(linear(32, 32), "fp8", gpu=gpu)
        assert placed(linear(32, 32), "int8", gpu=gpu).quantized
    assert placed(linear(32, 32), "fp8", gpu="sm120").quantized


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"])
def test_a_quantized_model_is_refused(kind: str) -> None:
    graph = linear(32, 32)
    scale, zero = graph.const("s", 0.1), graph.const("z", np.zeros((), np.int8), np.int8)
    if kind == "QuantizeLinear":
        graph.output(graph.op(kind, "x", scale, zero, name="/q"), None, np.int8)
    elif kind == "DynamicQuantizeLinear":
        graph.ops(kind, "x", outputs=["a", "b", "c"], name="/q")
        graph.output("a", None, np.uint8)
    else:
        codes = graph.input("codes", ["m", 32], np.int8)
        weight = graph.const("c", np.ones((32, 32)), np.int8)
        graph.output(graph.op(kind, codes, weight, name="/q"), None, np.int32)
    with pytest.raises(OnnxqError, match=f"is quantized already \\({kind} '/q'\\)"):
        placed(graph)


def test_hand_made_zoo() -> None:
    """One of each, as text: what `onnxq inspect` prints."""
    graph = subgraph_net()
    image = graph.input("image", ["n", 3, 224, 224])
    c = graph.op("Conv", image, graph.weight("stem", 64, 3, 7, 7), name="/stem")
    c = graph.op("Conv", c, graph.weight("deep", 64, 1, 3, 3), name="/depthwise", group=64)
    c = graph.op("Conv", c, graph.weight("point", 96, 64, 1, 1), name="/pointwise")
    graph.output(graph.op("ConvTranspose", c, graph.weight("up", 96, 32, 2, 2), name="/up"))
    bias = graph.const("bias", np.ones(48))
    y = graph.op("Gemm", "/outer:0", graph.weight("g", 48, 32), bias, name="/gemm", transB=1)
    graph.module("model.head")
    graph.output(y)
    check_golden("zoo.int8-dynamic", placed(graph, "int8-dynamic", "leave module=*.head").lines())
