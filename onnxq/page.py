"""A report as a page to read: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 320, 44  # of a layer's drawing, in pixels
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.layer { font-family: ui-monospace, monospace; font-size: 12px; overflow-wrap: anywhere }
pre { overflow-x: auto; background: #f6f6f6; padding: .6em } svg { display: block }
polyline { fill: none; stroke: #1f5fa8; stroke-width: 1.6 }
polyline.mean { stroke: #8db4dd; stroke-dasharray: 3 2 } line { stroke: #c0392b }
rect { fill: #f6f8fa }
"""


def page(report: Mapping[str, Any]) -> str:
    """HTML of what `Report.as_dict` gives."""
    rest = {k: v for k, v in report.items() if k not in ("title", "notes", "edits", "amax_by_step")}
    single = {k: v for k, v in rest.items() if not isinstance(v, (dict, list))}
    parts = [
        f"<h1>{_text(report['title'])}</h1>",
        "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in report["notes"]) + "</ul>",
        _table([], ([_cell(_words(k)), _cell(v)] for k, v in single.items())),
    ]
    if "amax_by_step" in report:
        parts.append(_by_step(report["amax_by_step"]))
    for name in (name for name in rest if name not in single):
        content = json.dumps(rest[name], indent=1, ensure_ascii=False)
        parts.append(_folded(_words(name), f"<pre>{_text(content)}</pre>"))
    columns = ("step", "verb", "target", "reason")
    edits = ([_cell(edit[column]) for column in columns] for edit in report["edits"])
    parts.append(_folded(f"{len(report['edits'])} edits", _table(columns, edits)))
    head = f"<meta charset=utf-8><title>{_text(report['title'])}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _by_step(found: Mapping[str, Any]) -> str:
    """A drawing of each layer, those first that change most."""
    steps, layers = found["steps"], found["layers"]
    order = sorted(layers, key=lambda name: -change(layers[name]["peaks"]))
    rows = (
        [
            f'<td class="layer">{_text(layers[name].get("module") or name)}</td>',
            f"<td>{_drawing(steps, layers[name])}</td>",
            f'<td class="number">{_figures(layers[name])}</td>',
        ]
        for name in order
    )
    return (
        "<h2>Inputs of the layers by denoising step</h2>"
        f"<p>{len(steps)} steps from {steps[0]:g}, the noisiest, on the left, to {steps[-1]:g}. "
        "Line: the largest magnitude of all samples; dashed: the mean over samples; red: what the "
        "codes cover. What lies above is clipped; what lies far below is coarse.</p>"
        + _table(("layer", "largest magnitude by step", "least to largest, covered"), rows)
    )


def change(peaks: Sequence[float]) -> float:
    """The loudest step over the quietest that is not silent; 1 for a layer that is."""
    heard = [peak for peak in peaks if peak > 0]
    return max(heard) / min(heard) if heard else 1.0


def _figures(layer: Mapping[str, Any]) -> str:
    peaks, covered = layer["peaks"], layer.get("covered")
    said = f"{min(peaks):.3g} to {max(peaks):.3g}"
    return said if covered is None else f"{said}, {covered:.3g}"


def _drawing(steps: Sequence[float], layer: Mapping[str, Any]) -> str:
    """Peaks and means over the steps, and the range, from 0 at the bottom."""
    covered = layer.get("covered") or 0.0
    top = max(*layer["peaks"], covered) or 1.0
    across = _WIDTH / max(1, len(steps) - 1)

    def height(value: float) -> float:
        return 2 + (_HEIGHT - 4) * (1 - value / top)

    def points(values: Sequence[float]) -> str:
        return " ".join(f"{i * across:.1f},{height(v):.1f}" for i, v in enumerate(values))

    shapes = f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>'
    if covered:
        y = f"{height(covered):.1f}"
        shapes += f'<line x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}"/>'
    shapes += f'<polyline class="mean" points="{points(layer["means"])}"/>'
    shapes += f'<polyline points="{points(layer["peaks"])}"/>'
    said = ", ".join(f"{s:g}: {p:.3g}" for s, p in zip(steps, layer["peaks"], strict=True))
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}"><title>{said}</title>{shapes}</svg>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _cell(value: Any) -> str:
    return f"<td>{_text(value)}</td>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    return escape(str(value))
