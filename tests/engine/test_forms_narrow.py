"""Weights alone, W4A8, NVFP4 and MXFP8: what each form compiles into.

Settled here for tensorrt-rtx 1.7.1, and asserted below (none of it run on a GPU):

* **INT4 weights** in blocks of 16 to 128 along K, with scales of the activation's type, 16 or 32
  bits: one kernel that expands the weight inside; a bias is a kernel of its own. [N, K] in Gemm or
  behind a Transpose does as well. An odd number of columns, one block for all rows, a scale a
  channel, or a Cast between expands the weight in memory at every call.
* **A last block that is shorter** is ONNX, and a trap: TensorRT takes the number of blocks and
  divides. 80 rows in blocks of 64 become two blocks of 40, without a word; 96 rows in two blocks
  of 64 likewise. Only where it does not divide does it refuse.
* **INT8 and FP8 weights** with a scale a channel: one kernel, with the scales inside it as they
  were given (FP16 raw sums are a matter of 8-bit products only). In blocks: expanded.
* **W4A8**: INT4, then Q/DQ to 8 bits under one scale, then the product: the weight stays at half
  a byte and a kernel expands it to 8 bits for an 8-bit gemm; q, k and v are merged if they share
  the scale. Straight from INT4 into the product, INT8 is silently wrong (a vector of all blocks'
  scales behind the gemm) and FP8 fails.
* **NVFP4** (sm120): gemm of FP4 by FP4, with a constant scale of the tensor or with one token's
  maximum divided out first. Weights alone are expanded. `output_dtype` instead of a Cast fails.
* **MXFP8** (sm120) builds, and multiplies in FP16 what it expands first. Tried in vain: MatMul and
  Gemm, [K, N] and [N, K], FP16, BF16 and FP32, static and dynamic shapes, sizes to 4096, weights
  quantized in the graph by the same operator, FP32 outputs, and the compiler's own interface with
  E8M0 constants and two-dimensional blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from engine_compile import Compiled, compile_forms, kernels_of
from narrow_graphs import Narrow, convolution, narrow, saved

from onnxq.engine.backends import BACKENDS
from onnxq.engine.build import read_shapes
from onnxq.engine.child import compile_all
from onnxq.engine.protocol import Outcome, Request
from onnxq.errors import OnnxqError

pytest.importorskip("tensorrt_rtx")

SHAPES = {"fixed": True, "free": False}
ALONE: dict[str, dict[str, Any]] = {
    "": {},
    "bf16": {"base": "bf16"},
    "fp32": {"base": "fp32"},
    "gemm": {"gemm": True},
    "gemm transB": {"gemm": True, "transposed": True},
    "[N, K] behind a Transpose": {"transposed": True},
    "bias": {"bias": True},
    "q, k, v": {"consumers": 3},
}
W4A8: dict[str, dict[str, Any]] = {
    "static": {},
    "static bf16": {"base": "bf16"},
    "static fp32": {"base": "fp32"},
    "static blocks of 16": {"block": 16},
    "static gemm transB": {"gemm": True, "transposed": True},
    "static q, k, v": {"consumers": 3},
    "per token": {"dynamic": True},
    "per token bf16": {"dynamic": True, "base": "bf16"},
    "per token q, k, v, bias": {"dynamic": True, "consumers": 3, "bias": True},
}
NVFP4: dict[str, dict[str, Any]] = {
    **{f"static {name}": keywords for name, keywords in ALONE.items()},
    **{f"per token {name}": {"dynamic": True, **keywords} for name, keywords in ALONE.items()},
}


def forms() -> dict[str, tuple[Narrow, str, tuple[str, ...]]]:
    """Name: form, what its products run in, and the targets."""
    every, later, last = ("sm80", "sm89", "sm120"), ("sm89", "sm120"), ("sm120",)
    found: dict[str, tuple[Narrow, str, tuple[str, ...]]] = {}
    for shapes, still in SHAPES.items():
        for name, keywords in ALONE.items():
            base = keywords.get("base", "fp16")
            for fmt, targets in (("int4", every), ("int8", every), ("fp8", later)):
                form = narrow(fmt, static_shapes=still, **keywords)
                found[f"{fmt} weights {name}, {shapes}"] = (form, f"{base} x {fmt}", targets)
        for block in (16, 32, 128):
            form = narrow("int4", block=block, k=384, static_shapes=still)
            found[f"int4 weights in {block}, {shapes}"] = (form, "fp16 x int4", every)
        for name, keywords in W4A8.items():
            for fmt, targets in (("int8", every), ("fp8", later)):
                form = narrow("int4", fmt, static_shapes=still, **keywords)
                found[f"w4a8 {fmt} {name}, {shapes}"] = (form, fmt, targets)
        for name, keywords in NVFP4.items():
            form = narrow("nvfp4", "nvfp4", static_shapes=still, **keywords)
            found[f"nvfp4 {name}, {shapes}"] = (form, "fp4", last)
    return found


FORMS = forms()
CASES = [(name, target) for name, (_, _, targets) in FORMS.items() for target in targets]
WRONG: dict[str, tuple[Any, str, str]] = {
    # name: form, target, what coverage says of it
    "int4 weights, odd columns": (narrow("int4", n=97), "sm89", "expanded to fp16"),
    "int4 weights, fp32 scales": (narrow("int4", scale_base="fp32"), "sm89", "expanded to fp16"),
    "int8 convolution, weights alone": (convolution("int8"), "sm89", "expanded to fp16"),
    "fp8 convolution, weights alone": (convolution("fp8"), "sm89", "expanded to fp16"),
    "nvfp4 weights alone": (narrow("nvfp4"), "sm120", "expanded to fp16"),
    "int4 weights, one block": (narrow("int4", block=128), "sm89", "expanded to fp16"),
    "w4a8 int8 direct": (narrow("int4", "int8", direct=True, gemm=True), "sm89", "unscaled sums"),
    "w4a8 fp8, a scale each for q, k, v": (
        narrow("int4", "fp8", consumers=3, shared=False),
        "sm89",
        "unscaled sums",
    ),
    "mxfp8": (narrow("mxfp8", "mxfp8"), "sm120", "expanded to fp16"),
    "mxfp8 gemm transB": (
        narrow("mxfp8", "mxfp8", gemm=True, transposed=True, k=1024, n=1024, static_shapes=True),
        "sm120",
        "expanded to fp16",
    ),
    "mxfp8 bf16": (narrow("mxfp8", "mxfp8", base="bf16"), "sm120", "expanded to bf16"),
}
REFUSED = {
    "w4a8 fp8 direct": (narrow("int4", "fp8", direct=True, gemm=True), "sm89", "same type"),
    "w4a8 int8 direct": (narrow("int4", "int8", direct=True), "sm89", "is_constant"),
    "nvfp4, output_dtype": (narrow("nvfp4", "nvfp4", typed=True), "sm120", "matching rules"),
    "a last block that is shorter": (narrow("int4", k=146, block=64), "sm89", "whole blocks"),
    "int4 for sm75": (narrow("int4"), "sm75", "int4"),
    "nvfp4 for sm89": (narrow("nvfp4", "nvfp4"), "sm89", "fp4"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    found: Compiled = {}
    for target in ("sm80", "sm89", "sm120"):
        wanted = {name: form for name, (form, _, targets) in FORMS.items() if target in targets}
        wanted |= {name: form for name, (form, on, _) in WRONG.items() if on == target}
        found |= compile_forms(wanted, (target,), tmp_path_factory.mktemp(target))
    return found


@pytest.mark.parametrize(("name", "target"), CASES)
def test_what_a_form_compiles_into(name: str, target: str, compiled: Compiled) -> None:
    form, expected, _ = FORMS[name]
    found = compiled[name, target]
    assert not isinstance(found, OnnxqError), found
    coverage, _ = found
    assert [entry.ran for entry in coverage.nodes] == [expected] * len(form.nodes)
    assert [entry.reason for entry in coverage.missed] == []
    stored = expected.split()[-1] if "w4a8" not in name else "int4"
    narrow_bytes = coverage.weight_bytes[stored]
    per_weight = {"int4": 0.5, "fp4": 0.5}.get(stored, 1)
    rows = 384 if "weights in" in name else 128
    assert narrow_bytes == per_weight * rows * 96 * len(form.nodes)


@pytest.mark.parametrize(
    ("name", "target", "kernels"),
    [
        ("int4 weights gemm transB, free", "sm89", ["runtime_fusion"]),
        ("int4 weights , free", "sm89", ["kgen", "runtime_fusion"]),  # a copy of the graph's input
        ("int8 weights , free", "sm89", ["runtime_fusion"]),
        ("fp8 weights , free", "sm89", ["runtime_fusion"]),
        # Quantize, expand, multiply, rescale.
        ("w4a8 int8 static, free", "sm89", ["kgen", "kgen", "gemm", "kgen"]),
        ("w4a8 fp8 per token, free", "sm89", ["kgen", "kgen", "gemm", "kgen"]),
        # One kernel expands all three weights, and one gemm multiplies them.
        (
            "w4a8 int8 per token q, k, v, bias, free",
            "sm89",
            ["kgen", "kgen", "gemm", "kgen", "kgen", "kgen"],
        ),
        # Quantize, lay out the scales, multiply; per token a maximum before and a rescale behind.
        ("nvfp4 static , free", "sm120", ["kgen", "kgen", "gemm"]),
        ("nvfp4 per token bias, free", "sm120", ["kgen", "kgen", "kgen", "gemm", "kgen"]),
    ],
)
def test_how_many_kernels_a_form_takes(
    name: str, target: str, kernels: list[str], compiled: Compiled
) -> None:
    found = compiled[name, target]
    assert not isinstance(found, OnnxqError)
    assert kernels_of(found[1]) == kernels


@pytest.mark.parametrize("name", WRONG)
def test_coverage_says_why_a_form_falls_short(name: str, compiled: Compiled) -> None:
    form, target, reason = WRONG[name]
    found = compiled[name, target]
    assert not isinstance(found, OnnxqError), found
    coverage, _ = found
    assert len(coverage.missed) == len(form.nodes)
    assert all(reason in entry.reason for entry in coverage.missed)


def compile_one(form: Any, target: str, folder: Path) -> tuple[Any, bytes]:
    """The outcome, and the plan's bytes."""
    path, plan = folder / "form.onnx", folder / "form.plan"
    onnx.save(form.model, path)
    plan.touch()
    request = Request(str(path), str(plan), (target,), read_shapes(form.shapes))
    (answer,) = compile_all([request], BACKENDS["tensorrt_rtx"])
    return answer, plan.read_bytes() if isinstance(answer, Outcome) else b""


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_do_not_compile(name: str, tmp_path: Path) -> None:
    form, target, reason = REFUSED[name]
    answer, _ = compile_one(form, target, tmp_path)
    assert isinstance(answer, OnnxqError)
    assert reason in str(answer)


@pytest.mark.parametrize(
    "name",
    [
        "int4 weights gemm transB, free",
        "int8 weights , free",
        "fp8 weights , free",
        "w4a8 int8 static, free",
        "w4a8 fp8 per token, free",
    ],
)
def test_the_plan_holds_the_scales_as_they_were_given(name: str, tmp_path: Path) -> None:
    """Raw sums would have the activation's scale in them; none is here."""
    form = FORMS[name][0]
    answer, plan = compile_one(form, "sm89", tmp_path)
    assert isinstance(answer, Outcome)
    assert form.kept and all(scales in plan for scales in form.kept)


def test_a_shorter_last_block_is_another_block_to_tensorrt(tmp_path: Path) -> None:
    """80 rows in blocks of 64 are a legal model, and compile into blocks of 40."""
    form = narrow("int4", k=80, block=64)
    saved(form)
    answer, _ = compile_one(form, "sm89", tmp_path)
    assert isinstance(answer, Outcome), "it refuses by now: placement may say so"
    (layer,) = [
        x
        for x in BACKENDS["tensorrt_rtx"].layers(list(answer.log), [])
        if x.kind == "runtime_fusion"
    ]
    assert (2, 96) in [t.dims for t in layer.constants]


def test_every_form_is_sound_onnx() -> None:
    for form, *_ in FORMS.values():
        saved(form)
