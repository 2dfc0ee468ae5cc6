"""The rows as text: one grid of cells, shown on the terminal and written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from tools.bench.bars import Bar, losses, usage

Row = dict[str, Any]

HEADINGS = (
    "model", "tool", "recipe", "s", "CPU s", "peak MB", "size", "SNR dB", "cosine", "perplexity",
    "loads in ORT", "lint", "compiles", "8-bit FLOPs", "attention",
)  # fmt: skip
_TEXTS = ("model", "tool", "recipe")


def cells(row: Row) -> list[str]:
    """The row's text, one for each heading; what was not measured is empty."""
    text = {
        "model": row["model"],
        "tool": row["peer"],
        "recipe": row["recipe"],
        "s": f"{usage(row, 'wall'):.1f}",
        "CPU s": f"{usage(row, 'cpu'):.1f}",
        "peak MB": f"{usage(row, 'peak') / 1e6:.0f}",
    }
    if row["failed"]:
        text["loads in ORT"] = "fails"
    elif "outputs" in row:
        text |= _judged(row)
    return [text.get(heading, "") for heading in HEADINGS]


def _judged(row: Row) -> dict[str, str]:
    outputs = row["outputs"]
    measured = "snr" in outputs
    text = {
        "size": f"{row['bytes'] / row['original_bytes']:.2f}",
        "SNR dB": _number(outputs.get("snr"), "{:.1f}", measured),
        "cosine": _number(outputs.get("cosine"), "{:.4f}", measured),
        "perplexity": _number(outputs.get("perplexity"), "{:.6g}", "reference" in outputs),
        "loads in ORT": outputs["loads"],
    }
    if "linted" in row:
        text["lint"] = _findings(row["linted"])
    if "compiled" in row:
        compiled, compiles = row["compiled"], row["compiled"]["compiles"]
        text["compiles"] = "yes" if compiles else "no"
        text["8-bit FLOPs"] = f"{100 * compiled['eight_bits']:.1f} %" if compiles else "0"
        text["attention"] = _attention(compiled)
    return text


def notes(rows: Iterable[Row]) -> list[str]:
    """A line for each failure, refusal and surprise behind the cells."""
    lines = []
    for row in rows:
        title = f"{row['model']} {row['peer']} {row['recipe']}"
        if row["failed"]:
            lines.append(f"{title} fails: {row['failed']}")
        if row["input_changed"]:
            lines.append(f"{title} changed its input file")
        for part, what in (("outputs", "ONNX Runtime"), ("compiled", "sm89")):
            if reason := row.get(part, {}).get("reason"):
                lines.append(f"{title}, {what}: {reason}")
        if missed := row.get("compiled", {}).get("missed"):
            lines.append(f"{title}, sm89: {missed} products do not run as the file means them to")
        if counts := row.get("linted", {}).get("severities"):
            lines.append(f"{title}, lint: " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    return lines


def grid(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, without the columns in which nothing stands."""
    lines = [cells(row) for row in rows]
    kept = [i for i in range(len(HEADINGS)) if i < len(_TEXTS) or any(line[i] for line in lines)]
    return [HEADINGS[i] for i in kept], [[line[i] for i in kept] for line in lines]


def terminal(rows: Sequence[Row]) -> Table:
    """The table for the terminal; onnxq's lines stand out."""
    headings, lines = grid(rows)
    table = Table(title="side by side: the same model, the same calibration data")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _TEXTS else "right")
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="bold" if row["peer"] == "onnxq" else None)
    return table


def bars_table(found: Sequence[Bar]) -> Table:
    """What was promised and what was measured."""
    table = Table(title="what was promised")
    for heading in ("what", "measured", "wanted", "reached"):
        table.add_column(heading)
    for bar in found:
        table.add_row(bar.what, bar.measured, bar.wanted, _reached(bar))
    return table


def markdown(
    command: str, machine: str, versions: Sequence[str], rows: Sequence[Row], found: Sequence[Bar]
) -> str:
    """All of it as one Markdown page."""
    parts = ["# onnxq and its peers", f"    {command}", machine, *versions, _table(*grid(rows))]
    if found:
        lines = [[b.what, b.measured, b.wanted, _reached(b)] for b in found]
        parts.append(_table(["what was promised", "measured", "wanted", "reached"], lines))
    if worse := losses(rows):
        parts.append("## Where a peer does better\n\n" + "\n".join(f"- {line}" for line in worse))
    if said := notes(rows):
        parts.append("## Behind the table\n\n" + "\n".join(f"- {line}" for line in said))
    return "\n\n".join(parts) + "\n"


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    ruler = ["---" if h in _TEXTS else "---:" for h in headings]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ruler, *escaped))


def _number(value: float | str | None, how: str, measured: bool) -> str:
    if not measured:
        return ""
    return "NaN" if value is None else how.format(float(value))


def _findings(linted: Row) -> str:
    return "?" if linted["findings"] is None else str(linted["findings"])


def _attention(compiled: Row) -> str:
    """How many attentions became one kernel, of how many."""
    counts = compiled.get("products", {}).get("attention", {})
    fused = sum(count for what, count in counts.items() if what.startswith("fused"))
    return f"{fused} of {sum(counts.values())} fused" if counts else ""


def _reached(bar: Bar) -> str:
    return {True: "yes", False: "**no**", None: "?"}[bar.reached]
