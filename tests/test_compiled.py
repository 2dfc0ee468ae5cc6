"""Real models, quantized and compiled without a GPU: the format of every product is asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from core_graphs import Net

import onnxq
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.recipe import load
from onnxq.samples import Data
from onnxq.terminal import built_lines
from tools.bench.flops import model_flops

SMOLLM2_SHAPES = ["input_ids:1x{0},1x256,4x512", "attention_mask:1x{0},1x256,4x512"]
MINILM = [f"{n}:1x8,4x128,8x256" for n in ("input_ids", "attention_mask", "token_type_ids")]
SDXL = [
    "sample:2x4x16x16",
    "timestep:2",
    "encoder_hidden_states:2x77x128",
    "text_embeds:2x64",
    "time_ids:2x6",
]
PPOCR = ["x:1x3x48x480,4x3x48x480,8x3x48x480"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.iterdir():  # engines and weights are large
        path.unlink()


def _compile(
    model: Path,
    folder: Path,
    recipe: str,
    shapes: list[str],
    calib: Data | Path | None,
    target: str = "sm89",
) -> onnxq.api.Built:
    output = folder / "model.onnx"
    calib = None if "dynamic" in recipe else calib
    onnxq.quantize(model, output, recipe=recipe, calib=calib, target=target)
    return onnxq.build(output, folder / "model.plan", shapes=shapes, strict=True, target=target)


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8-dynamic", "int8-dynamic"])
def test_minilm(recipe: str, models: Path, folder: Path) -> None:
    built = _compile(
        models / "minilm/model.onnx", folder, recipe, MINILM, models / "minilm/calib.npz"
    )
    assert built.passed
    assert built.report.facts["products"] == {
        "gemm": {recipe.partition("-")[0]: 36},
        "conv": {},
        "attention": {"fused fp16": 6},
    }


NARROW = {
    # target, what its linear layers run in, bytes a weight takes in the plan
    "int4-rtn": ("sm89", "fp16 x int4", "int4", 0.5),
    "int8-weight-only": ("sm89", "fp16 x int8", "int8", 1),
    "fp8-weight-only": ("sm89", "fp16 x fp8", "fp8", 1),
    "w4a8-rtn": ("sm89", "int8", "int4", 0.5),
    "w4a8-rtn-dynamic": ("sm89", "int8", "int4", 0.5),
    "nvfp4": ("sm120", "fp4", "fp4", 0.5),
}


@pytest.mark.parametrize("recipe", NARROW)
def test_minilm_in_fewer_bits(recipe: str, models: Path, folder: Path) -> None:
    target, ran, stored, each = NARROW[recipe]
    source = models / "minilm/model.onnx"
    calib = models / "minilm/calib.npz" if recipe == "w4a8-rtn" else None
    built = _compile(source, folder, recipe, MINILM, calib, target)
    assert built.passed
    assert built.report.facts["products"]["gemm"] == {ran: 36}
    # 6 layers of 4 x 384^2 + 2 x 384 x 1536
    assert built.report.facts["weight_bytes"][stored] == each * 6 * 12 * 384**2


@pytest.mark.parametrize("recipe", ["int4-rtn", "w4a8-rtn-dynamic", "nvfp4"])
def test_smollm2_in_fewer_bits(recipe: str, models: Path, folder: Path) -> None:
    """All 210 linear layers; 576 rows in blocks of 64."""
    target, ran, stored, each = NARROW[recipe]
    source = models / "smollm2-fp32/model.onnx"
    shapes = [s.format(1) for s in SMOLLM2_SHAPES]
    built = _compile(source, folder, recipe, shapes, None, target)
    products = built.report.facts["products"]
    assert built.passed
    assert products["gemm"][ran] == 210 and products["attention"] == {"fused fp16": 30}
    weights = 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert built.report.facts["weight_bytes"][stored] == each * weights


def test_mxfp8_builds_and_says_what_it_runs_in(models: Path, folder: Path) -> None:
    """No form of it fuses (tests/engine/test_forms_narrow.py): the day it does, this fails."""
    source = models / "minilm/model.onnx"
    built = _compile(source, folder, "mxfp8", MINILM, None, "sm120")
    assert not built.passed and built.coverage is not None
    assert built.report.facts["products"]["gemm"] == {"fp16": 36}
    assert all("expanded to fp16" in entry.reason for entry in built.coverage.missed)


def test_minilm_from_the_legacy_exporter(models: Path, folder: Path) -> None:
    """Weights in Constant nodes and opset 17, and layers outside the compiled groups."""
    source = models / "minilm-legacy/model.onnx"
    built = _compile(source, folder, "int8-dynamic", MINILM, None)
    assert built.passed
    assert built.report.facts["products"]["gemm"] == {"int8": 36}


@pytest.mark.parametrize(
    ("recipe", "start", "attention"),
    [
        ("fp8", 1, "fused fp16"),
        ("fp8-attention", 32, "fused fp8"),
        ("fp8-dynamic", 1, "fused fp16"),
        ("int8-dynamic", 1, "fused fp16"),
    ],
)
def test_smollm2(recipe: str, start: int, attention: str, models: Path, folder: Path) -> None:
    """All 210 linear layers in 8 bits and all 30 attentions fused, for dynamic shapes."""
    source = models / "smollm2-fp32"
    calib = Data(
        text=models / "wiki/wiki_calib.txt", tokenizer=source / "tokenizer.json", samples=1
    )
    shapes = [s.format(start) for s in SMOLLM2_SHAPES]
    built = _compile(source / "model.onnx", folder, recipe, shapes, calib)
    products = built.report.facts["products"]
    assert built.passed
    assert products["gemm"][recipe.partition("-")[0]] == 210
    assert products["attention"] == {attention: 30}
    if start > 1:
        # It does not fuse where the sequence may be shorter: strict fails, with the reason.
        shapes = [s.format(1) for s in SMOLLM2_SHAPES]
        built = onnxq.build(
            folder / "model.onnx", folder / "model.plan", shapes=shapes, strict=True
        )
        assert not built.passed and built.coverage is not None
        assert len(built.coverage.missed) == 30
        assert "32" in built.coverage.missed[0].reason


def test_smollm2_decoding_with_a_cache(models: Path, folder: Path) -> None:
    """One token at a time: the rows of an activation never decide what is quantized."""
    shapes = [
        "input_ids:1x1,1x1,4x1",
        "attention_mask:1x2,1x257,4x513",
        "position_ids:1x1,1x1,4x1",
    ] + [
        f"past_key_values.{layer}.{kind}:1x3x1x64,1x3x256x64,4x3x512x64"
        for layer in range(30)
        for kind in ("key", "value")
    ]
    source = models / "smollm2-torch-decode/model.onnx"
    built = _compile(source, folder, "fp8-dynamic", shapes, None)
    products = built.report.facts["products"]
    assert built.passed
    assert products["gemm"]["fp8"] == 210 and products["attention"] == {"fused fp16": 30}


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8-dynamic", "int8-dynamic"])
def test_sdxl_tiny(recipe: str, models: Path, folder: Path) -> None:
    source = models / "sdxl-unet-tiny-fp16"
    calib = Data(path=source / "calib.npz", batch=2)
    built = _compile(source / "model.onnx", folder, recipe, SDXL, calib)
    form = recipe.partition("-")[0]
    assert built.passed
    assert built.report.facts["products"] == {
        "gemm": {form: 213},
        "conv": {form: 49, "fp16": 2},
        "attention": {"fused fp16": 34},
    }
    assert built.coverage is not None
    left = Counter(entry.node.left.partition(",")[0] for entry in built.coverage.left)
    assert left == {
        "attention is left by the recipe": 34,
        "thin: 4 -> 32 channels": 1,
        "thin: 32 -> 4 channels": 1,
    }
    assert built.predicted is not None  # from the kernels' shapes; the other from the nodes' own
    predicted = sum(share.flops for share in built.predicted.times[0].shares)
    assert predicted == _flops(source)


@cache
def _flops(folder: Path) -> int:
    """FLOPs of one call of two rows."""
    model, _ = prepare(Model.load(folder / "model.onnx"), 0)
    with np.load(folder / "heldout.npz") as data:
        feed = {name: data[name][:2] for name in data.files}
    return sum(model_flops(model, feed).values())


def test_sdxl_tiny_attention(models: Path, folder: Path) -> None:
    """22 of 34 fuse in FP8; the other 12 have a sequence of 16, which the reason says."""
    source = models / "sdxl-unet-tiny-fp16"
    calib = Data(path=source / "calib.npz", batch=2)
    built = _compile(source / "model.onnx", folder, "fp8-attention", SDXL, calib)
    assert built.report.facts["products"]["attention"]["fused fp8"] == 22
    assert built.coverage is not None and len(built.coverage.missed) == 12
    for missed in built.coverage.missed:
        assert "from a sequence of 32, and this one is 16" in missed.reason


@pytest.mark.parametrize(("recipe", "convolutions"), [("int8-dynamic", 23), ("fp8-dynamic", 22)])
def test_a_trained_cnn_without_data(
    recipe: str, convolutions: int, models: Path, folder: Path
) -> None:
    built = _compile(models / "ppocr_rec/model.onnx", folder, recipe, PPOCR, None)
    form = recipe.partition("-")[0]
    assert built.passed
    assert built.report.facts["products"]["conv"][form] == convolutions
    assert built.report.facts["products"]["gemm"][form] == 8  # the recognizer's head is left


def test_a_layer_left_in_16_bits_is_named_with_its_reason(folder: Path) -> None:
    """One by a rule, one with too few rows for a fast kernel; nothing of a file without codes."""
    net = Net(dtype=np.float16)
    x = net.input("x", ["batch", 64, 128])
    kept = net.op("Relu", net.op("MatMul", x, net.weight("up", 128, 256), name="/up"))
    ruled = net.op("Relu", net.op("MatMul", kept, net.weight("down", 256, 128), name="/down"))
    net.output(net.op("MatMul", ruled, net.weight("few", 128, 8), name="/few"))
    source, made = net.save(folder / "net.onnx"), folder / "model.onnx"
    onnxq.quantize(source, made, recipe="fp8-dynamic", rules=["leave node=/down"])
    shapes = ["x:1x64x128,4x64x128,8x64x128"]
    built = onnxq.build(made, folder / "model.plan", shapes=shapes, strict=True)
    assert built.passed and built.coverage is not None
    said = {
        "/down": "left by the rule 'leave node=/down'",
        "/few": "thin: 128 x 8, no fast 8-bit kernel below 16",
    }
    listed = built.report.facts["coverage"]["left"]
    assert {entry["node"]: entry["reason"] for entry in listed} == said
    for name, reason in said.items():
        assert f"  left 1 GEMM in fp16: {reason} ({name})" in built_lines(built)
    plain = onnxq.build(source, folder / "plain.plan", shapes=shapes)
    assert plain.report.facts["coverage"]["left"] == []


STEPPED = {
    # the same forms behind steps that choose other codes and scales, and fold factors into norms
    "int4-gptq": ("fp16 x int4", ()),
    "int4-awq": ("fp16 x int4", ()),
    "int4-best": ("fp16 x int4", ()),
    "w4a8-gptq": ("int8", ()),
    "w4a8-awq-dynamic": ("int8", ()),
    "w4a8-rtn-dynamic": ("fp8", ("activations=fp8",)),
    "w4a8-awq": ("fp8", ("activations=fp8",)),
}


@pytest.mark.parametrize("recipe", STEPPED)
def test_steps_keep_the_form_that_compiles(recipe: str, folder: Path) -> None:
    """A norm, two layers that read it, a gate, one layer behind: every product as it should be."""
    ran, changes = STEPPED[recipe]
    net = Net()
    x = net.input("x", ["batch", 64, 128])
    gain = net.const("gain", np.where(np.arange(128) % 9, 1.0, 8.0))
    normal = net.op("LayerNormalization", x, gain, net.const("zero", np.zeros(128)), name="/norm")
    up = net.op("MatMul", normal, net.weight("up", 128, 256), name="/up")
    gate = net.op("MatMul", normal, net.weight("gate", 128, 256), name="/gate")
    product = net.op("Mul", net.op("Sigmoid", gate, name="/act"), up, name="/mul")
    net.output(net.op("MatMul", product, net.weight("down", 256, 128), name="/down"))
    source = net.save(folder / "net.onnx")
    rows = np.random.default_rng(0).standard_normal((8, 64, 128)).astype(np.float32)
    np.savez(folder / "d.npz", x=rows)
    made = folder / "model.onnx"
    calib = folder / "d.npz" if load(recipe).needs_data else None
    onnxq.quantize(source, made, recipe=recipe, changes=changes, calib=calib)
    shapes = ["x:1x64x128,4x64x128,8x64x128"]
    built = onnxq.build(made, folder / "model.plan", shapes=shapes, strict=True)
    assert built.passed
    assert built.report.facts["products"]["gemm"] == {ran: 3}
    assert built.report.facts["weight_bytes"]["int4"] == 3 * 128 * 256 / 2
