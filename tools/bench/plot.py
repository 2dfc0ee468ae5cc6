"""The rows as bars: a row a recipe, a column a figure, a picture a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools.bench.bars import usage

Row = dict[str, Any]

_OURS, _FLOOR, _THEIRS = "#1b7837", "#9a9a9a", "#5e81b5"

# Title, the figure of a row (None: nothing to show), whether the axis is logarithmic, its format.
_FIGURES: tuple[tuple[str, Callable[[Row], float | None], bool, str], ...] = (
    ("CPU seconds", lambda r: usage(r, "cpu"), True, "{:.1f}"),
    ("peak MB", lambda r: usage(r, "peak") / 1e6, True, "{:.0f}"),
    ("size, of the original", lambda r: _ratio(r), False, "{:.2f}"),
    ("SNR dB, held out", lambda r: _of(r, "outputs", "snr"), False, "{:.1f}"),
    ("8-bit share of FLOPs, sm89", lambda r: _of(r, "compiled", "eight_bits"), False, "{:.0%}"),
)


def draw(rows: Sequence[Row], path: Path, caption: str = "") -> None:
    """Write one PNG of all the models in the rows."""
    picture(rows, caption).savefig(path, dpi=110)


def picture(rows: Sequence[Row], caption: str = "") -> Figure:
    """The figure that `draw` writes."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = [sum(row["model"] == model for row in rows) for model in models]
    figure = Figure(figsize=(16, 1.5 + 0.28 * sum(counts)), layout="constrained")
    axes = figure.subplots(
        len(models), len(_FIGURES), squeeze=False, gridspec_kw={"height_ratios": counts}
    )
    for line, model in zip(axes, models, strict=True):
        _draw_model(line, model, [row for row in rows if row["model"] == model])
    figure.suptitle(f"onnxq and its peers. {caption}".strip(), fontsize=9)
    return figure


def _draw_model(axes: Sequence[Any], model: str, rows: Sequence[Row]) -> None:
    labels = [f"{row['peer']} {row['recipe']}" for row in rows]
    for index, (title, figure, logarithmic, how) in enumerate(_FIGURES):
        axis = axes[index]
        values = [None if row["failed"] else figure(row) for row in rows]
        bars = axis.barh(labels, [v or 0 for v in values], color=[_color(r) for r in rows])
        if logarithmic:
            axis.set_xscale("log")
        shown = [
            _missing(r, index) if v is None else how.format(v)
            for r, v in zip(rows, values, strict=True)
        ]
        axis.bar_label(bars, shown, padding=3, fontsize=7)
        axis.set_title(title if index else f"{model}: {title}", fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", labelsize=8, labelleft=index == 0)
        axis.invert_yaxis()
        axis.margins(x=0.3, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)


def _color(row: Row) -> str:
    return {"onnxq": _OURS, "floor": _FLOOR}.get(row["peer"], _THEIRS)


def _ratio(row: Row) -> float | None:
    return row["bytes"] / row["original_bytes"] if "bytes" in row else None


def _of(row: Row, part: str, name: str) -> float | None:
    value = row.get(part, {}).get(name)
    return None if value is None else float(value)


def _missing(row: Row, index: int) -> str:
    """Why there is no bar."""
    if row["failed"]:
        return "fails"
    if row["peer"] == "floor":
        return ""
    if index == len(_FIGURES) - 1:
        return "does not compile" if "compiled" in row else "not asked"
    return "NaN" if "snr" in row.get("outputs", {}) else "does not load"
