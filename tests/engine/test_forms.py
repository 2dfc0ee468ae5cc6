"""Forms x targets: what each quantized form compiles into, read from the compiled layers.

Settled here for tensorrt-rtx 1.7.1, and asserted below (none of it run on a GPU):

* **Weight scales per output channel, 16-bit base.** A DequantizeLinear with a scale per channel in
  front of MatMul or Gemm compiles into an 8-bit gemm whose FP16 output holds the bare sum of codes,
  and a kernel that multiplies by the FP16 vector s_x * s_w: both can leave FP16's range. The same
  happens with one scale a weight where FP8 products of one tensor have different scales, since
  they are merged. What is right: one power of two for all weights of one tensor, and the rest of
  the scale, a vector near 1, in a Mul after the product. Convolutions put the scale right in any
  form, but write FP32 unless theirs is a single scale.
* **Dynamic activations.** m = Max(ReduceMax(Abs(x)), eps), Div, Q/DQ with 1/127 or 1/448, product,
  Mul m, Mul rest, Add bias: one kernel before the gemm, one after. A convolution's maximum spans
  the sample and takes one kernel more. No guard, Max, Clip, Where and Add of eps all compile alike;
  so do Div and Mul by Reciprocal, but 1/m overflows FP16 for m below 1.5e-5.
* **Both scales of a product have one dtype**; otherwise the compiler refuses.
* **FP8 convolutions** with more than 32 values in the kernel run in FP16 on expanded operands.
* **Attention** fuses in FP16 and BF16 always, in FP8 from a shortest sequence of 32, in INT8 only
  if its result is INT8 too, with 512 keys at most and heads of 16, 32 or 64; in FP32 never. Where
  Q/DQ, scale, mask and FP32 softmax stand makes no difference.
* **FP8 for sm80** is refused by the compiler; the layer list is the same for all targets.
* **Node names** must differ: the parser refuses a second node of one name.
"""

from __future__ import annotations

import pytest
from engine_compile import Compiled, compile_forms, kernels_of
from engine_graphs import Form, attention, conv, linear, tied, weight_only

from onnxq.errors import OnnxqError

pytest.importorskip("tensorrt_rtx")

TARGETS = ("sm80", "sm89", "sm120")

# Name: (builder's keywords, what its multiplications run in). `{}` stands for int8 and fp8.
LINEAR = {
    "linear static scales": {},
    "linear static scales fp32": {"base": "fp32"},
    "linear static scales bf16": {"base": "bf16"},
    "linear static scales per channel fp32": {"base": "fp32", "weight": "channel"},
    "linear dynamic": {"dynamic": True},
    "linear dynamic fp32": {"dynamic": True, "base": "fp32"},
    "linear dynamic bf16": {"dynamic": True, "base": "bf16"},
    "linear dynamic no bias": {"dynamic": True, "bias": False},
    "gemm dynamic, bias after the rescale": {"dynamic": True, "gemm": True},
    "one m for q, k, v": {"dynamic": True, "consumers": 3},
    "one scale for q, k, v": {"consumers": 3},
}
CONV = {
    "conv static scales": {},
    "conv static scales per channel": {"weight": "channel"},
    "conv static scales fp32": {"base": "fp32"},
    "conv dynamic": {"dynamic": True},
    "conv dynamic bf16": {"dynamic": True, "base": "bf16"},
    "conv dynamic, 3 channels": {"dynamic": True, "channels": (3, 32)},
    "conv dynamic, depthwise": {"dynamic": True, "channels": (32, 32), "group": 32},
    "conv dynamic, groups": {"dynamic": True, "channels": (64, 64), "group": 4},
    "conv dynamic, 1x1": {"dynamic": True, "kernel": 1},
}


def eight_bit_forms() -> dict[str, tuple[Form, str]]:
    """Forms that must run in 8 bits on every target that has the format."""
    forms = {}
    for fmt in ("int8", "fp8"):
        for still in (True, False):
            shapes = "fixed" if still else "free"
            for builder, table in ((linear, LINEAR), (conv, CONV)):
                for name, keywords in table.items():
                    form = builder(fmt, static_shapes=still, **keywords)  # type: ignore[operator]
                    forms[f"{fmt} {name}, {shapes} shapes"] = (form, fmt)
            forms[f"{fmt} tied head, {shapes} shapes"] = (tied(fmt, static_shapes=still), fmt)
    for still in (True, False):
        shapes = "fixed" if still else "free"
        forms[f"int4 blocks, {shapes} shapes"] = (weight_only(static_shapes=still), "fp16 x int4")
    return forms


def attention_forms() -> dict[str, tuple[Form, str]]:
    """Attention and what it becomes: fused in a format, or gemms."""
    forms = {
        f"{fmt} attention, fixed shapes": (attention(fmt, static_shapes=True), ran)
        for fmt, ran in (("fp16", "fused fp16"), ("fp8", "fused fp8"), ("int8", "int8 gemms"))
    }
    for minimum in (1, 31, 32):
        forms[f"fp16 attention from {minimum}"] = (
            attention("fp16", minimum=minimum),
            "fused fp16",
        )
        ran = "fused fp8" if minimum >= 32 else "fp8 gemms"
        forms[f"fp8 attention from {minimum}"] = (attention("fp8", minimum=minimum), ran)
    forms["int8 attention from 32"] = (attention("int8"), "int8 gemms")
    variants = {
        "Q/DQ before the heads are repeated": {"where": "before"},
        "softmax in fp32": {"softmax32": True},
        "softmax in fp32, boolean mask": {"softmax32": True, "mask": "where"},
        "boolean mask": {"mask": "where"},
        "no mask": {"mask": "none"},
        "scale on q and k": {"scale": "both"},
        "scale on the scores": {"scale": "scores"},
        "one head a head": {"heads": (4, 4)},
        "heads of 32": {"size": 32},
        "heads of 128": {"size": 128},
        "bf16 base": {"base": "bf16"},
    }
    for name, keywords in variants.items():
        forms[f"fp8 attention, {name}"] = (attention("fp8", **keywords), "fused fp8")  # type: ignore[arg-type]
        if "Q/DQ" not in name:
            base = "bf16" if "bf16" in name else "fp16"
            forms[f"{base} attention, {name}"] = (attention(base, **keywords), f"fused {base}")  # type: ignore[arg-type]
    for fmt, ran in (("fp32", "fp32 gemms"), ("fp8", "fp8 gemms")):
        forms[f"{fmt} attention, fp32 base"] = (attention(fmt, base="fp32"), ran)
    return forms


EIGHT_BIT = eight_bit_forms()
ATTENTION = attention_forms()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    forms = {name: form for name, (form, _) in (EIGHT_BIT | ATTENTION).items()}
    return compile_forms(forms, TARGETS, tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", EIGHT_BIT | ATTENTION)
def test_what_a_form_compiles_into(name: str, target: str, compiled: Compiled) -> None:
    form, expected = (EIGHT_BIT | ATTENTION)[name]
    found = compiled[name, target]
    if target == "sm80" and name.startswith("fp8"):
        assert isinstance(found, OnnxqError)
        assert "fp8" in str(found)
        return
    assert not isinstance(found, OnnxqError), found
    coverage, _ = found
    assert [entry.ran for entry in coverage.nodes] == [expected] * len(form.nodes)
    fused = expected.startswith("fused") or not expected.endswith("gemms")
    assert [entry.reason for entry in coverage.missed] == [] or not fused


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        # Quantize in one kernel, multiply, and everything after the product in one kernel.
        ("int8 linear dynamic, free shapes", ["kgen", "gemm", "kgen"]),
        ("fp8 linear dynamic, free shapes", ["kgen", "gemm", "kgen"]),
        ("fp8 linear dynamic fp32, free shapes", ["kgen", "gemm", "kgen"]),
        ("fp8 linear static scales, free shapes", ["kgen", "gemm", "kgen"]),
        ("int8 gemm dynamic, bias after the rescale, free shapes", ["kgen", "gemm", "kgen"]),
        ("fp8 tied head, free shapes", ["kgen", "gemm"]),
        # One gemm for q, k and v, and one kernel after it for each of them.
        ("int8 one m for q, k, v, free shapes", ["kgen", "gemm", "kgen", "kgen", "kgen"]),
        ("fp8 one m for q, k, v, free shapes", ["kgen", "gemm", "kgen", "kgen", "kgen"]),
        # The maximum of a whole sample is a kernel of its own.
        ("int8 conv dynamic, free shapes", ["kgen", "kgen", "correlation", "kgen"]),
        ("fp8 conv static scales, free shapes", ["kgen", "correlation", "kgen"]),
        ("int4 blocks, free shapes", ["runtime_fusion"]),
    ],
)
def test_how_many_kernels_a_form_takes(name: str, kernels: list[str], compiled: Compiled) -> None:
    found = compiled[name, "sm89"]
    assert not isinstance(found, OnnxqError)
    assert kernels_of(found[1]) == kernels


def test_a_convolution_with_one_scale_writes_fp16_and_per_channel_fp32(
    compiled: Compiled,
) -> None:
    for name, dtype in (("static scales", "fp16"), ("static scales per channel", "fp32")):
        found = compiled[f"fp8 conv {name}, free shapes", "sm89"]
        assert not isinstance(found, OnnxqError)
        (layer,) = [x for x in found[1] if x.kind == "correlation"]
        assert [t.dtype for t in layer.outputs] == [dtype]


FAULTY = {
    "int8 per channel": (linear("int8", weight="channel"), "unscaled sums"),
    "fp8 per channel": (linear("fp8", weight="channel"), "unscaled sums"),
    "fp8 per channel, dynamic": (linear("fp8", weight="channel", dynamic=True), "unscaled sums"),
    "fp8, a scale each for q, k, v": (
        linear("fp8", weight="tensor", consumers=3),
        "unscaled sums",
    ),
    "fp8, a power of two each for q, k, v": (
        linear("fp8", weight="own", consumers=3, dynamic=True),
        "unscaled sums",
    ),
    # An odd number of columns is padded: a kernel that slices names the gemm's node too.
    "int8 per channel, 97 columns": (linear("int8", weight="channel", columns=97), "unscaled sums"),
    "int8 per channel, 97 columns, dynamic": (
        linear("int8", weight="channel", columns=97, dynamic=True),
        "unscaled sums",
    ),
    "fp8 per channel, 97 columns each of q, k, v": (
        linear("fp8", weight="channel", columns=97, consumers=3),
        "unscaled sums",
    ),
    "fp8 conv 7x7": (conv("fp8", kernel=7), "expanded to fp16"),
    "int4 per channel": (weight_only(None), "expanded to fp16"),
    "fp8 attention from 31": (attention("fp8", minimum=31), "starts at 32 or more"),
    "fp8 attention of 16": (attention("fp8", static_shapes=True, fixed=16), "and this one is 16"),
    "fp8 attention of 31": (attention("fp8", static_shapes=True, fixed=31), "and this one is 31"),
    "fp8 attention in fp32": (attention("fp8", base="fp32"), "not fused"),
    "int8 attention": (attention("int8"), "not fused"),
}
SOUND = {
    "int8, a scale each for q, k, v": linear("int8", weight="tensor", consumers=3),
    "int8 conv 7x7": conv("int8", kernel=7),
    "fp8 per tensor": linear("fp8", weight="tensor"),
    "fp8 attention of 32": attention("fp8", static_shapes=True, fixed=32),
    "int8 dynamic, 97 columns": linear("int8", columns=97, dynamic=True),
    "fp8 dynamic, 97 columns, fixed shapes": linear(
        "fp8", columns=97, dynamic=True, gemm=True, static_shapes=True
    ),
    "int8 per tensor, 97 columns each of q, k, v": linear(
        "int8", weight="tensor", columns=97, consumers=3, dynamic=True
    ),
    "fp8 per channel, bf16": linear("fp8", weight="channel", base="bf16"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    forms = {name: form for name, (form, _) in FAULTY.items()} | SOUND
    return compile_forms(forms, ("sm89",), tmp_path_factory.mktemp("faulty"))


@pytest.mark.parametrize("name", FAULTY)
def test_coverage_says_why_a_form_falls_short(name: str, faulty: Compiled) -> None:
    found = faulty[name, "sm89"]
    assert not isinstance(found, OnnxqError), found
    coverage, _ = found
    assert not coverage.complete
    assert len(coverage.missed) == len(FAULTY[name][0].nodes)
    for entry in coverage.missed:
        assert FAULTY[name][1] in entry.reason


@pytest.mark.parametrize("name", SOUND)
def test_coverage_passes_the_sound_neighbour(name: str, faulty: Compiled) -> None:
    found = faulty[name, "sm89"]
    assert not isinstance(found, OnnxqError), found
    assert found[0].complete
