"""What the digits table says beside ModelOpt: against means and errors done by hand."""

from __future__ import annotations

from typing import Any

from tools.digits_table import beside, form, line


def row(recipe: str, *ratios: float | str, tool: str = "onnxq") -> dict[str, Any]:
    figures = {"each": list(ratios), "broken": 0, "psnr": 40.0, "psnr_error": 1.0, "worst": 30.0}
    match = {"share": 1.0, "difference": 0.0, "difference_low": -0.1, "difference_high": 0.1}
    return {"tool": tool, "recipe": recipe, "samples": {**figures, "match": match}}


FIVE = (40.0, 50.0, 30.0, 45.0, 35.0)
BEST = row("int8-max", *FIVE, tool="ModelOpt")
PEERS = [
    row("int8", *(v - 9 for v in FIVE), tool="ModelOpt"),
    BEST,
    row("fp8", *(v + 9 for v in FIVE), tool="ModelOpt"),
    {"tool": "ModelOpt", "recipe": "int8-max-no-add", "failed": "KeyError"},
    row("int8-broken", *FIVE[:4], "nan", tool="ModelOpt"),
]


def test_beside_the_best_of_the_same_format() -> None:
    more = (2.0, -1.0, 4.0, 1.0, 4.0)  # mean 2; spread sqrt((0 + 9 + 4 + 1 + 4) / 4), over sqrt(5)
    ours = row("sdxl-int8:conv_calibrator=max", *(a + b for a, b in zip(FIVE, more, strict=True)))
    assert beside(ours, PEERS) == "+2.00 +- 0.95 (-1.0 to +4.0)"


def test_nothing_to_hold_against() -> None:
    assert [form(row(name)) for name in ("fp8-gptq", "int8", "int4-rtn", "fp16")] == [
        "fp8",
        "int8",
        "",
        "",
    ]
    assert beside(row("int4-rtn", *FIVE), PEERS) == beside(row("int8", *FIVE), PEERS[2:]) == ""
    assert beside(row("int8", *FIVE[:4], "inf"), PEERS) == ""


def test_every_row_has_all_cells() -> None:
    assert {len(line(each, PEERS)) for each in (*PEERS, row("int8", *FIVE))} == {8}
    assert line(BEST, PEERS)[4] == ""
