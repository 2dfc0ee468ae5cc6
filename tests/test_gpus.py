"""The table of GPUs against what their makers' figures are made of: multiprocessors and clocks."""

from __future__ import annotations

import pytest

from onnxq.errors import OnnxqError
from onnxq.gpus import GPUS, TARGETS, gpu, target

# Multiprocessors, MHz of the boost clock, dense FP16 operations a clock and multiprocessor (with
# FP32 accumulation): from the architectures' whitepapers, not from the products' datasheets.
MADE_OF = {
    "T4": (40, 1590, 1024),
    "RTX 3090": (82, 1695, 512),
    "A10": (72, 1695, 1024),
    "A30": (56, 1440, 2048),
    "A100 40GB": (108, 1410, 2048),
    "A100 80GB": (108, 1410, 2048),
    "A100 80GB PCIe": (108, 1410, 2048),
    "Jetson AGX Orin": (16, 1300, 2048),
    "L4": (58, 2040, 1024),
    "L40S": (142, 2520, 1024),
    "RTX 4090": (128, 2520, 512),
    "RTX 6000 Ada": (142, 2505, 1024),
    "H100 SXM": (132, 1830, 4096),
    "H100 PCIe": (114, 1620, 4096),
    "H200": (132, 1830, 4096),
    "B200": (148, 1850, 8192),
    "RTX 5090": (170, 2407, 512),
    "RTX PRO 6000 Blackwell": (188, 2617, 1024),
}


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_multiprocessors_times_clock(name: str) -> None:
    """To 1.5 %: datasheets round, and some state a clock of their own."""
    count, megahertz, operations = MADE_OF[name]
    card = GPUS[name]
    assert card.fp16 == pytest.approx(count * megahertz * operations * 1e-6, rel=0.015)
    capability = card.target.capability
    # INT8 runs at twice the rate of FP16 with FP16 accumulation; FP8 at twice that of FP16.
    assert card.int8 == pytest.approx(2 * card.narrow_gain * card.fp16, rel=0.015)
    fp8 = 2 * card.fp16 if capability >= (8, 9) else 0
    assert card.fp8 == pytest.approx(fp8, rel=0.015)
    # FP4 at four times; consumer cards accumulate it in FP32 at full rate.
    fp4 = 4 * card.narrow_gain * card.fp16 if capability >= (10, 0) else 0
    assert card.fp4 == pytest.approx(fp4, rel=0.015)


@pytest.mark.parametrize("name", GPUS)
def test_a_format_has_a_peak_where_the_target_runs_it(name: str) -> None:
    card = GPUS[name]
    for kind in ("int8", "fp8", "nvfp4", "mxfp8"):
        assert (card.peak(kind) > 0) == card.target.runs(kind)
    assert card.peak("int4") == (card.fp16 if card.target.runs("int4") else 0)
    assert card.peak("fp16") == card.fp16


def test_names_as_people_write_them() -> None:
    for text, name in (
        ("h100", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("a100", "A100 80GB"),
        ("a100-40gb", "A100 40GB"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("rtx_5090", "RTX 5090"),
        ("Tesla T4", "T4"),
        ("orin", "Jetson AGX Orin"),
    ):
        assert gpu(text).name == name
    with pytest.raises(OnnxqError, match="unknown GPU 'RTX 9999'") as raised:
        gpu("RTX 9999")
    assert "L40S" in str(raised.value)


def test_a_target_can_be_named_by_a_gpu() -> None:
    assert target("l40s") is TARGETS["sm89"]
    assert target("SM120") is TARGETS["sm120"]
    for card in GPUS.values():
        assert target(card.name) is card.target
    with pytest.raises(OnnxqError, match="unknown target 'sm42'"):
        target("sm42")
