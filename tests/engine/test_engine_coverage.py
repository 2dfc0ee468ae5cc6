"""Coverage from layers made by hand: dtypes of multiplications, and why one falls short."""

from __future__ import annotations

import pytest

from onnxq.engine.coverage import Coverage, WeightedNode
from onnxq.engine.kernels import multiply_dtype, weight_bytes
from onnxq.engine.layers import EngineLayer, Tensor
from onnxq.engine.matching import cover
from onnxq.engine.shapes import parse_shapes


def tensor(text: str) -> Tensor:
    """`x fp8 -1,64` as a Tensor."""
    name, dtype, dims = text.split(" ")
    return Tensor(name, tuple(int(d) for d in dims.split(",")), dtype)


def layer(
    name: str,
    kind: str,
    inputs: str = "",
    constants: str = "",
    outputs: str = "",
    nodes: str = "",
    profile: int = 0,
) -> EngineLayer:
    def tensors(text: str) -> tuple[Tensor, ...]:
        return tuple(tensor(part) for part in text.split("; ") if part)

    return EngineLayer(
        name,
        kind,
        tensors(inputs),
        tensors(constants),
        tensors(outputs),
        tuple(nodes.split()),
        profile,
    )


SCALARS = "alpha fp32 1; beta fp32 1"


def gemm(dtypes: str, nodes: str = "a", out: str = "y fp16 -1,96", profile: int = 0) -> EngineLayer:
    left, right = dtypes.split()
    return layer(
        "a_myl0_1",
        "gemm",
        f"x {left} -1,64",
        f"w {right} 64,96; {SCALARS}",
        out,
        nodes,
        profile,
    )


def only(coverage: Coverage) -> tuple[str, str]:
    (entry,) = coverage.nodes
    return entry.ran, entry.reason


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        (gemm("fp8 fp8"), "fp8"),
        (gemm("int8 int8"), "int8"),
        (gemm("fp16 fp16"), "fp16"),
        (gemm("fp16 int4"), "fp16 x int4"),
        (layer("r", "runtime_fusion", "x fp16 -1,64; r fp16 -1,96", "w fp8 64,96"), "fp16 x fp8"),
        (
            layer("c", "correlation", "x int8 -1,32,-1,-1", "w int8 64,32,3,3; s fp32 1,64,1,1"),
            "int8",
        ),
        (layer("c", "correlation", "x fp16 -1,3,-1,-1; w fp16 8,3,7,7", "s fp32 1,8,1,1"), "fp16"),
        (layer("m", "gemm", "q fp8 -1,8,-1,64; k fp8 -1,8,64,-1", SCALARS), "fp8"),
        (layer("m", "gemm", "q fp16 -1,8,-1,64; k fp16 -1,8,64,-1", SCALARS), "fp16"),
        (layer("m", "gemm", "x fp8 1,64; residual fp16 1,96", "w fp8 64,96"), "fp8"),
    ],
)
def test_the_dtype_of_a_multiplication(found: EngineLayer, dtype: str) -> None:
    assert multiply_dtype(found) == dtype


def test_a_merged_gemm_covers_each_of_its_nodes() -> None:
    nodes = [WeightedNode(name, "gemm", "fp8") for name in "abc"]
    coverage = cover([gemm("fp8 fp8", "c a b dq")], nodes)
    assert coverage.complete
    assert coverage.counts()["gemm"] == {"fp8": 3}


def test_a_node_no_layer_names_is_missed_only_when_quantized() -> None:
    assert only(cover([], [WeightedNode("a", "gemm", "fp8")])) == (
        "none",
        "no compiled layer names it",
    )
    assert only(cover([], [WeightedNode("a", "gemm", "fp16")])) == ("none", "")


def test_float_operands_are_the_reason() -> None:
    node = WeightedNode("a", "gemm", "fp8")
    assert only(cover([gemm("fp16 fp16")], [node])) == (
        "fp16",
        "its layer ran with fp16 operands",
    )
    assert "only its weight is fp8" in only(cover([gemm("fp16 fp8")], [node]))[1]
    assert only(cover([gemm("fp16 fp16")], [WeightedNode("a", "gemm", "fp16")])) == ("fp16", "")


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_codes_that_are_expanded_inside_the_kernel_are_not_multiplied(fmt: str) -> None:
    """What becomes of weight scales along the summed axis: a scale cannot be taken out."""
    made = layer(
        "a_myl0_1",
        "runtime_fusion",
        f"x {fmt} -1,64",
        f"s fp16 64,1; w {fmt} 64,96",
        "y fp16 -1,96",
        "a",
    )
    coverage = cover([made], [WeightedNode("a", "gemm", fmt)])
    assert only(coverage) == (
        "fp16",
        "its codes are expanded inside the kernel, which multiplies in fp16",
    )
    assert not coverage.complete
    wide = layer("a", "runtime_fusion", f"x {fmt} -1,64", f"w {fmt} 64,96", "y fp32 -1,96", "a")
    assert multiply_dtype(wide) == "fp32"  # a Cast to FP32 stands behind DequantizeLinear


@pytest.mark.parametrize("fmt", ["int4", "int8", "fp8"])
def test_weight_only_is_as_wanted_and_nothing_else_is(fmt: str) -> None:
    node = WeightedNode("a", "gemm", f"{fmt} weights")
    assert node.narrow
    assert only(cover([gemm(f"fp16 {fmt}")], [node])) == (f"fp16 x {fmt}", "")
    assert only(cover([gemm("fp16 fp16")], [node]))[1]
    assert only(cover([gemm(f"{fmt} {fmt}")], [node]))[1]
    alone = only(cover([gemm(f"fp16 {fmt}")], [WeightedNode("a", "gemm", fmt)]))[1]
    assert alone == ("" if fmt == "int4" else f"only its weight is {fmt}: it multiplies in fp16")


@pytest.mark.parametrize(
    ("inputs", "constants"),
    [
        ("x fp4 -1,64; s fp8 -1,4,32,1,4", "w fp4 64,96; t fp8 1,4,1,4,32"),
        ("s fp8 -1,4,32,1,4; x fp4 -1,64", "t fp8 1,4,1,4,32; w fp4 64,96"),
        ("x fp4 -1,64; w fp4 64,18; s fp8 -1,4,32,1,4", "t fp8 1,4,1,4,32"),
    ],
)
def test_block_scales_are_no_operands(inputs: str, constants: str) -> None:
    node = WeightedNode("a", "gemm", "fp4")
    made = layer("a_myl0_1", "gemm", inputs, f"{constants}; {SCALARS}", "y fp16 -1,96", "a")
    assert only(cover([made], [node])) == ("fp4", "")


def test_an_expanded_weight_is_named_with_its_kernel() -> None:
    expand = layer(
        "__myl_CastMul_myl0_0", "kgen", "", "w fp8 64,96; s fp16 1", "e fp16 64,96", "dq"
    )
    multiply = layer("a_myl0_1", "gemm", "x fp16 -1,64; e fp16 64,96", SCALARS, "y fp16 -1,96", "a")
    coverage = cover([expand, multiply], [WeightedNode("a", "gemm", "fp8")])
    assert "expanded to fp16 by __myl_CastMul_myl0_0 on every call" in only(coverage)[1]
    assert list(coverage.dequantize_alone) == ["__myl_CastMul_myl0_0"]


def test_a_multiplication_inside_an_elementwise_kernel_is_said() -> None:
    kernel = layer("__myl_MulSum_myl0_0", "kgen", "x fp16 -1,64", "w fp16 64,2", "y fp16 -1,2", "a")
    for wanted, reason in (("int8", "computed inside an elementwise kernel"), ("fp32", "")):
        node = WeightedNode("a", "gemm", wanted)
        assert only(cover([kernel], [node])) == ("elementwise", reason)
    # Angles, positions times frequencies, in FP32 beside what else the kernel does in FP16.
    rotary = layer(
        "__myl_MulAddMulSin_myl0_5",
        "kgen",
        "q fp16 -1,576; positions fp32 1,-1,1",
        "frequencies fp32 1,1,32; r fp16 1,576",
        "o fp16 1,1,-1,64",
        "rope rescale",
    )
    assert only(cover([rotary], [WeightedNode("rope", "gemm", "fp32")])) == ("elementwise", "")


@pytest.mark.parametrize(
    ("out", "nodes", "constants", "flagged"),
    [
        ("fp16", "a dq", "v fp16 1,96", True),
        ("fp32", "a dq", "v fp32 1,96", False),  # sums in FP32 hold
        ("bf16", "a dq", "v bf16 1,96", False),  # BF16 has FP32's range
        ("fp16", "rescale bias", "v fp16 1,96", False),  # a Mul of the graph itself
        ("fp16", "a dq", "c fp16 1", False),  # padding, say: no vector of scales
    ],
)
def test_bare_sums_in_fp16_are_found(out: str, nodes: str, constants: str, flagged: bool) -> None:
    after = layer("__myl_Mul_myl0_2", "kgen", f"y {out} -1,96", constants, f"z {out} -1,96", nodes)
    layers = [gemm("fp8 fp8", "a dq", f"y {out} -1,96"), after]
    coverage = cover(layers, [WeightedNode("a", "gemm", "fp8")])
    assert ("unscaled sums" in only(coverage)[1]) == flagged
    assert coverage.complete != flagged


def test_a_padded_product_is_sliced_before_or_behind_its_scales() -> None:
    """97 columns become 98: what takes them off names the gemm's node, whatever else it does."""
    product = gemm("fp8 fp8", "a dq", "y fp16 -1,98")
    node = WeightedNode("a", "gemm", "fp8")

    def kernel(words: str, read: str, made: str, nodes: str) -> EngineLayer:
        constants = "" if words == "Slic" else "v fp16 1,97"
        return layer(f"__myl_{words}_myl0_2", "kgen", f"{read} fp16 -1,98", constants, made, nodes)

    for words, flagged in (("SlicReshMulMulAdd", False), ("MulSlicReshMulAdd", True)):
        after = kernel(words, "y", "z fp16 -1,97", "a dq mul add")
        assert ("unscaled sums" in only(cover([product, after], [node]))[1]) == flagged
    sliced = kernel("Slic", "y", "s fp16 -1,97", "a dq")
    for nodes, flagged in (("rescale add", False), ("a dq add", True)):
        layers = [product, sliced, kernel("MulAdd", "s", "z fp16 -1,97", nodes)]
        assert ("unscaled sums" in only(cover(layers, [node]))[1]) == flagged


ATTENTION = ("s", "p", "c")


def mha(dtype: str, mask: str = "fp16", profile: int = 0) -> EngineLayer:
    inputs = f"m {mask} -1,1,-1,-1; q {dtype} -1,-1,64; k {dtype} -1,64,-1; v {dtype} -1,-1,64"
    return layer("_gemm_mha_v2_myl0_4", "kgen", inputs, "", "o fp16 -1,-1,64", "c p s", profile)


@pytest.mark.parametrize("mask", ["fp16", "bool", "fp32"])
def test_fused_attention_and_its_dtype(mask: str) -> None:
    for dtype in ("fp8", "fp16", "bf16"):
        node = WeightedNode("c", "attention", dtype, ATTENTION)
        assert only(cover([mha(dtype, mask)], [node])) == (f"fused {dtype}", "")
    assert only(cover([mha("fp16")], [WeightedNode("c", "attention", "fp8", ATTENTION)])) == (
        "fused fp16",
        "fused, but in fp16",
    )


def test_a_node_called_mha_is_no_attention() -> None:
    node = WeightedNode("/mha/a", "gemm", "fp8")
    kernel = layer("/mha/a_myl0_1", "copy", "x fp16 -1,64", "w fp16 64,2", "y fp16 -1,2", "/mha/a")
    ran, reason = only(cover([kernel], [node]))
    assert (ran, reason) == ("elementwise", "computed inside an elementwise kernel")


def unfused(dtype: str, profile: int = 0) -> list[EngineLayer]:
    operands = f"q {dtype} -1,8,-1,64; k {dtype} -1,8,64,-1"
    return [
        layer("s_myl0_1", "gemm", operands, SCALARS, "o fp16 -1", "s", profile),
        layer("__myl_Exp_myl0_2", "kgen", "o fp16 -1", "", f"p {dtype} -1", "p", profile),
        layer("c_myl0_3", "gemm", operands, SCALARS, "z fp16 -1", "c", profile),
    ]


def test_attention_that_did_not_fuse_says_why() -> None:
    node = WeightedNode("c", "attention", "fp8", ATTENTION)
    short = [parse_shapes(["x:1x1,1x64,4x128"])]
    ran, reason = only(cover(unfused("fp8"), [node], short))
    assert ran == "fp8 gemms"
    assert "starts at 32 or more, and this one starts at 1" in reason
    long = [parse_shapes(["x:1x32,1x64,4x128"])]
    assert "starts at" not in only(cover(unfused("fp8"), [node], long))[1]
    wide = WeightedNode("c", "attention", "fp32", ATTENTION)
    coverage = cover(unfused("fp32"), [wide])
    assert "FP16 and BF16 only" in only(coverage)[1]
    assert coverage.complete  # float attention is no failure of quantization
    assert coverage.missed


@pytest.mark.parametrize(("keys", "said"), [(16, True), (17, True), (31, True), (32, False)])
def test_attention_over_a_fixed_short_sequence_says_so(keys: int, said: bool) -> None:
    """The products are padded to an even number; the softmax between them is not."""
    even = keys + keys % 2
    layers = [
        layer("s_myl0_1", "gemm", f"q fp8 8,16,64; k fp8 8,64,{even}", SCALARS, "o fp16 8", "s"),
        layer("__myl_Exp_myl0_2", "kgen", "o fp16 8", "", f"p fp16 2,4,16,{keys}", "p"),
        layer(
            "c_myl0_3", "gemm", f"p fp8 8,16,{even}; v fp8 8,{even},64", SCALARS, "z fp16 8", "c"
        ),
    ]
    node = WeightedNode("c", "attention", "fp8", ATTENTION)
    # A profile whose only open dimension is no sequence.
    shapes = [parse_shapes(["x:1x4x16,2x4x16,4x4x20"])]
    reason = only(cover(layers, [node], shapes))[1]
    assert (f"fuses from a sequence of 32, and this one is {keys}" in reason) == said
    assert "starts at" not in reason


def test_profiles_are_judged_apart() -> None:
    node = WeightedNode("c", "attention", "fp8", ATTENTION)
    layers = [mha("fp8"), *unfused("fp8", profile=1)]
    profiles = [parse_shapes(["x:1x32,1x64,4x128"]), parse_shapes(["x:1x1,1x1,4x1"])]
    coverage = cover(layers, [node], profiles)
    assert [entry.ran for entry in coverage.nodes] == ["fused fp8", "fp8 gemms"]
    assert not coverage.complete
    assert coverage.summary()[:2] == [
        "profile 0: GEMM -; convolution -; attention 1 fused fp8",
        "profile 1: GEMM -; convolution -; attention 1 fp8 gemms",
    ]


def test_the_summary_counts_nodes_and_bytes() -> None:
    layers = [
        gemm("fp8 fp8", "a b dq"),
        layer("d_myl0_3", "gemm", "x fp16 -1,64", "h fp16 64,10", "z fp16 -1,10", "d"),
        layer("__myl_MulCast_myl0_0", "kgen", "i fp16 -1,64", "c fp16 1", "x fp8 -1,64", "q"),
        layer("__myl_AddMulCast_myl0_5", "kgen", "i fp16 -1,64", "c fp16 1", "x fp8 -1,64", "q"),
    ]
    wanted = {"a": "fp8", "b": "fp8", "d": "fp16"}
    coverage = cover(layers, [WeightedNode(n, "gemm", f) for n, f in wanted.items()])
    assert coverage.summary() == [
        "GEMM 2 fp8, 1 fp16; convolution -; attention -",
        "left alone: 1 quantize, 0 dequantize kernels",
        "  1: reads an input of the engine or a constant",
        "weights in bytes: fp8 6,144, fp16 1,282, fp32 8",
    ]
    assert coverage.to_json()["counts"] == [
        {"gemm": {"fp8": 2, "fp16": 1}, "conv": {}, "attention": {}}
    ]


def test_what_quantizes_alone_has_a_reason() -> None:
    quantize = ("__myl_MulCast_myl0_{}", "kgen", "{} fp16 -1,64", "c fp16 1", "{} fp8 -1,64")
    made = [
        layer("a_myl0_1", "gemm", "x fp8 -1,64", f"w fp8 64,64; {SCALARS}", "a fp16 -1,64", "a"),
        layer("b_myl0_2", "gemm", "x fp8 -1,64", f"w fp8 64,64; {SCALARS}", "b fp16 -1,64", "b"),
        layer("__myl_Gnor_myl0_3", "kgen", "i fp16 -1,64", "", "n fp16 -1,64", "n"),
        layer("__myl_MulAdd_myl0_4", "kgen", "i fp16 -1,64", "g fp16 64", "s fp16 -1,64", "s"),
        layer("__myl_Silu_myl0_5", "kgen", "s fp16 -1,64", "", "u fp16 -1,64", "u"),
    ]
    for number, (source, out) in enumerate(zip("abbnsi", "pqrtvw", strict=True), 6):
        name, kind, read, scale, wrote = quantize
        kernel = layer(name.format(number), kind, read.format(source), scale, wrote.format(out))
        made.append(kernel)
    coverage = cover(made, [])
    assert list(coverage.quantize_alone.values()) == [
        "behind a product in fp8",
        *["behind a product in fp8 that several cut up"] * 2,
        "behind Gnor, which does not take it up",
        "behind Mul, Add, which others read in fp16",
        "reads an input of the engine or a constant",
    ]
    assert "  2: behind a product in fp8 that several cut up" in coverage.summary()


def test_a_constant_two_layers_share_counts_once() -> None:
    twice = [gemm("fp8 fp8"), gemm("fp8 fp8"), gemm("fp8 fp8", profile=1)]
    assert weight_bytes(twice) == {"fp8": 64 * 96, "fp32": 8}
