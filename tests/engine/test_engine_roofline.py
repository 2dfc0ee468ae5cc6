"""The roofline against sums done by hand, and its FLOPs against shapes written out."""

from __future__ import annotations

import dataclasses
import math

import pytest
from test_engine_coverage import layer

from onnxq.engine.layers import EngineLayer
from onnxq.engine.roofline import Assumptions, Work, product_flops, seconds, shares, work
from onnxq.gpus import gpu

ONE = "alpha fp32 1; beta fp32 1"
L40S, RTX4090, A100 = gpu("l40s"), gpu("rtx4090"), gpu("a100")
IDEAL = Assumptions(compute=1.0, bandwidth=1.0, start=0.0)

GEMM = layer("a_myl0_1", "gemm", "x fp8 48,64", f"w fp8 64,96; {ONE}", "y fp16 48,96", "a")
CONV = layer(
    "c_myl0_2",
    "correlation",
    "x int8 2,32,8,8",
    "w int8 64,32,3,3; s fp32 1,64,1,1",
    "y fp16 2,64,4,4",
    "c",
)
ATTENTION = layer(
    "_gemm_mha_v2_myl0_3",
    "kgen",
    "q fp16 6,40,64; k fp16 6,64,77; v fp16 6,77,32",
    "",
    "y fp16 6,40,32",
    "s v",
)
ADDING = layer(
    "__myl_MulAdd_myl0_4", "kgen", "y fp16 48,96; r fp16 48,96", "b fp16 1,96", "z fp16 48,96"
)


@pytest.mark.parametrize(
    ("found", "flops"),
    [
        (GEMM, 2 * 48 * 64 * 96),
        (CONV, 2 * (2 * 64 * 4 * 4) * (32 * 3 * 3)),
        (ATTENTION, 6 * (2 * 40 * 64 * 77 + 2 * 40 * 77 * 32)),
        (ADDING, 0),
        # three matrices of one tensor, stacked
        (layer("a", "gemm", "x fp16 8,64", f"w fp16 3,64,96; {ONE}", "y fp16 3,8,96"), 884736 // 3),
        # INT4 in blocks of 64, whose scales are a matrix too
        (
            layer(
                "a", "runtime_fusion", "x fp16 8,256", "s fp16 4,96; w int4 256,96", "y fp16 8,96"
            ),
            2 * 8 * 256 * 96,
        ),
        # a bias and a residual beside the weight, which is stored [N, K]
        (
            layer(
                "a",
                "runtime_fusion",
                "x fp16 8,64; r fp16 8,96",
                "b fp16 1,96; w fp16 96,64",
                "y fp16 8,96",
            ),
            2 * 8 * 64 * 96,
        ),
        # linear, GELU, linear in one kernel
        (
            layer(
                "a", "runtime_fusion", "x fp16 8,64", "u fp16 64,96; d fp16 96,64", "y fp16 8,64"
            ),
            2 * (2 * 8 * 64 * 96),
        ),
        # two computed operands
        (layer("a", "gemm", "q fp8 4,40,64; k fp8 4,64,77", ONE, "s fp16 4,40,77"), 1576960),
    ],
)
def test_flops(found: EngineLayer, flops: int) -> None:
    assert product_flops(found) == flops


def test_work_counts_every_operand_once() -> None:
    (gemm, conv, attention, adding) = work([GEMM, CONV, ATTENTION, ADDING]) or []
    assert gemm == Work("gemm", "fp8", 589824, 48 * 64 + 64 * 96 + 8 + 2 * 48 * 96)
    assert (conv.kind, conv.dtype) == ("conv", "int8")
    assert (attention.kind, attention.dtype) == ("attention", "fp16")
    assert adding == Work("elementwise", "", 0, 2 * (3 * 48 * 96 + 96))


def test_buffers_and_other_profiles_are_no_work() -> None:
    buffer = layer("__myl_Move_myl0_9", "kgen", "", "", "i int32 128")
    other = dataclasses.replace(GEMM, profile=1)
    assert work([buffer, other, ADDING]) == work([ADDING])
    assert work([GEMM, other], profile=1) == work([GEMM])


def test_dynamic_shapes_are_no_sizes() -> None:
    assert work([layer("a", "gemm", "x fp8 -1,64", "w fp8 64,96", "y fp16 -1,96")]) is None


def test_the_longer_of_products_and_memory() -> None:
    busy = Work("gemm", "fp8", 733 * 10**9, 1000)  # 1 ms of L40S's 733 x 10^12 a second
    moving = Work("elementwise", "", 0, 864 * 10**6)  # 1 ms of its 864 GB/s
    assert busy.seconds(L40S, IDEAL) == pytest.approx(1e-3)
    assert moving.seconds(L40S, IDEAL) == pytest.approx(1e-3)
    both = dataclasses.replace(busy, nbytes=2 * moving.nbytes)
    assert both.seconds(L40S, IDEAL) == pytest.approx(2e-3)
    assumed = Assumptions(compute=0.5, bandwidth=0.25, start=1e-4)
    assert busy.seconds(L40S, assumed) == pytest.approx(2.1e-3)
    assert moving.seconds(L40S, assumed) == pytest.approx(4.1e-3)
    assert dataclasses.replace(busy, count=3).seconds(L40S, assumed) == pytest.approx(6.3e-3)
    assert seconds([busy, moving], L40S, assumed) == pytest.approx(6.2e-3)


@pytest.mark.parametrize(
    ("dtype", "narrow", "rate"),
    [
        ("fp16", True, 330.4),  # accumulating in FP16
        ("fp16", False, 165.2),
        ("bf16", True, 165.2),
        ("fp16 x int4", True, 330.4),
        ("fp8", True, 330.3),
        ("int8", True, 660.6),
        ("fp32", True, 82.6),  # TF32
    ],
)
def test_rates_of_a_consumer_card(dtype: str, narrow: bool, rate: float) -> None:
    assumed = dataclasses.replace(IDEAL, narrow=narrow)
    one = Work("gemm", dtype, 10**12, 0)
    assert one.seconds(RTX4090, assumed) == pytest.approx(1 / rate)


def test_a_card_without_the_format_never_ends() -> None:
    assert Work("gemm", "fp8", 1, 0).seconds(A100, IDEAL) == math.inf


def test_shares_add_up_and_begin_with_the_longest() -> None:
    plan = [
        Work("gemm", "fp8", 10**9, 10, count=2),
        Work("elementwise", "", 0, 10**9),
        Work("gemm", "fp8", 10**10, 5),
    ]
    first, second = shares(plan, L40S, IDEAL)
    assert (first.kind, second.kind) == ("elementwise", "gemm")
    assert (second.kernels, second.flops, second.nbytes) == (3, 12 * 10**9, 25)
    assert first.seconds + second.seconds == pytest.approx(seconds(plan, L40S, IDEAL))
