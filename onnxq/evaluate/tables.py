"""Figures as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxq.evaluate.metrics import jsonable


def decibels(snr: float | None) -> str:
    """An SNR for people: two decimals, "exact" for no error at all."""
    if snr is None:
        return "NaN"
    return f"{snr:.2f}" if math.isfinite(snr) else ("exact" if snr > 0 else str(jsonable(snr)))


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart; a column whose cells all start like numbers is right-aligned."""
    rows = [head, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    numeric = [all(_numeric(row[column]) for row in body) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def _numeric(cell: str) -> bool:
    return cell in ("-", "exact", "NaN", "inf", "-inf") or cell.lstrip("-")[:1].isdigit()
