"""The demo's result table, read from the reports that the demo's commands wrote.

python -m tools.demo_table models/out/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def main() -> None:
    folder = Path(sys.argv[1])
    quantize, build, compare, perplexity = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("quantize", "build", "compare", "perplexity")
    )
    table = Table(title="SmolLM2-135M in FP8: measured just now")
    for heading in ("", "original", "plain FP16", "FP8"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = quantize["bytes_before"], quantize["bytes_after"]
    table.add_row(
        "file", f"{before / 1e6:.0f} MB", "", f"{after / 1e6:.0f} MB ({after / before:.2f} x)"
    )
    table.add_row(
        "perplexity, held-out text",
        f"{perplexity['reference']:.3f}",
        "",
        f"{perplexity['value']:.3f} ({perplexity['ratio']:.4f} x)",
    )
    rows = {row["candidate"]: row for row in compare["comparison"]["rows"]}
    table.add_row("logits, signal to noise", "", _snr(rows["fp16"]), _snr(rows["candidate"]))
    table.add_row("linear layers in FP8 when compiled", "", "", _count(build, "gemm", "fp8"))
    table.add_row("attentions fused when compiled", "", "", _count(build, "attention", "fused"))
    table.add_row("engine for sm89", "", "", f"{build['engine_bytes'] / 1e6:.0f} MB")
    Console(width=100).print(table)


def _snr(row: dict[str, Any]) -> str:
    return f"{float(row['snr_db']):.1f} dB"


def _count(build: dict[str, Any], kind: str, word: str) -> str:
    products = build["products"][kind]
    return f"{sum(n for name, n in products.items() if word in name)} of {sum(products.values())}"


if __name__ == "__main__":
    main()
