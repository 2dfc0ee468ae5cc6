"""The published speed-ups of SDXL, predicted from what the compiler made of the full UNet.

tests/golden/sdxl_speed.json holds plans of tensorrt-rtx 1.7.1 for sm89 of 2026-11-22, level 3,
ranges made up: FP16, sdxl-fp8 and sdxl-int8.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.sdxl_speed import PUBLISHED, load, speed_ups

GOLDEN = Path(__file__).parent.parent / "golden" / "sdxl_speed.json"


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("card", PUBLISHED)
def test_predicted_within_a_fifth(card: str, form: str) -> None:
    found = speed_ups(load(GOLDEN))[card][form]
    assert found == pytest.approx(PUBLISHED[card][form], rel=0.2)


def test_the_plans_multiply_the_same() -> None:
    """13.52 TFLOP a call whatever the format: 140 attentions among them."""
    for plan in load(GOLDEN).values():
        assert sum(one.count * one.flops for one in plan) == 13_522_472_796_160
        assert sum(one.count for one in plan if one.kind == "attention") == 140
        assert sum(one.count for one in plan if one.kind == "conv") == 51
