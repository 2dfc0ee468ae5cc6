"""What was promised against ModelOpt, and where any peer does better; pure, from the table's rows.

For each figure onnxq is held against the best of the peers' recipes of that format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log
from statistics import median
from typing import Any

Row = dict[str, Any]

_RIVAL = "modelopt"
_PAIRS = (("smollm2", "fp8"), ("smollm2", "int8"), ("minilm", "int8"))
CPU, PEAK = 5.0, 1 / 3


@dataclass(frozen=True)
class Bar:
    """One promise: `reached` is None where it could not be measured."""

    what: str
    measured: str
    wanted: str
    reached: bool | None


def bars(rows: Iterable[Row]) -> list[Bar]:
    """The bars of every promised model and format that the rows hold both sides of."""
    found = list(rows)
    made: list[Bar] = []
    for model, fmt in _PAIRS:
        of_model = [r for r in found if r["model"] == model]
        ours = [r for r in of_model if r["peer"] == "onnxq" and r["recipe"] == fmt]
        theirs = [r for r in of_model if r["peer"] == _RIVAL and r["recipe"].split("-")[0] == fmt]
        theirs = [r for r in theirs if not r["failed"]]
        if ours and theirs and not ours[0]["failed"]:
            made += _pair(f"{model} {fmt}", ours[0], theirs)
    return made


def bars_at_four_bits(rows: Iterable[Row]) -> list[Bar]:
    """What was promised of INT4 weights, of every model that the rows hold."""
    found = list(rows)
    made: list[Bar] = []
    for model in dict.fromkeys(row["model"] for row in found):
        of_model = [r for r in found if r["model"] == model and "outputs" in r]
        ours = {r["recipe"]: r for r in of_model if r["peer"] == "onnxq"}
        theirs = [r for r in of_model if r["peer"] != "onnxq"]
        if not {"int4-rtn", "int4-awq", "int4-gptq", "int4-best"} <= ours.keys():
            continue
        if "reference" in ours["int4-rtn"]["outputs"]:
            made.append(_share_lost(model, ours))
        else:
            made += [_gained(model, ours, "int4-gptq", 3.5), _gained(model, ours, "int4-best", 5.0)]
        if theirs:
            made.append(_error(f"{model} int4-best", ours["int4-best"], theirs))
        lite = [r for r in theirs if r["recipe"].startswith("int4-awq-lite")]
        if lite:
            cpu = min(usage(r, "cpu") for r in lite) / usage(ours["int4-awq"], "cpu")
            what = f"{model}: CPU time of AWQ, against ModelOpt's awq_lite"
            made.append(Bar(what, f"{cpu:.1f} x less", ">= 10 x less", cpu >= 10))
    return made


def _share_lost(model: str, ours: Mapping[str, Row]) -> Bar:
    """The best recipe's loss of log perplexity as a share of that of rounding to nearest."""
    lost = [
        log(_or_worst(ours[name], "perplexity", inf) / ours[name]["outputs"]["reference"])
        for name in ("int4-best", "int4-rtn")
    ]
    share = lost[0] / lost[1]
    what = f"{model} int4-best: log perplexity lost, of int4-rtn's"
    return Bar(what, f"{share:.2f}", "<= 0.50", share <= 0.5)


def _gained(model: str, ours: Mapping[str, Row], recipe: str, wanted: float) -> Bar:
    gain = _or_worst(ours[recipe], "snr", -inf) - _or_worst(ours["int4-rtn"], "snr", inf)
    what = f"{model} {recipe}: SNR over int4-rtn's"
    return Bar(what, f"{gain:+.2f} dB", f">= {wanted:.1f} dB", gain >= wanted)


def _pair(title: str, ours: Row, theirs: Sequence[Row]) -> list[Bar]:
    cpu = min(usage(r, "cpu") for r in theirs) / usage(ours, "cpu")
    peak = usage(ours, "peak") / min(usage(r, "peak") for r in theirs)
    return [
        Bar(f"{title}: CPU time", f"{cpu:.1f} x less", f">= {CPU:.0f} x less", cpu >= CPU),
        Bar(f"{title}: peak memory", f"{peak:.2f} x", "<= 0.33 x", peak <= PEAK),
        _works(title, ours, theirs),
        _error(title, ours, theirs),
    ]


def _works(title: str, ours: Row, theirs: Sequence[Row]) -> Bar:
    def says(row: Row) -> str:
        compiles = "compiles" if row["compiled"]["compiles"] else "does not compile"
        return f"{compiles}, loads: {row['outputs']['loads']}"

    measured = f"{says(ours)}; theirs: {' | '.join(dict.fromkeys(map(says, theirs)))}"
    reached = ours["compiled"]["compiles"] and ours["outputs"]["loads"] == "yes"
    return Bar(f"{title}: works", measured, "compiles, and loads by default", reached)


def _error(title: str, ours: Row, theirs: Sequence[Row]) -> Bar:
    """By perplexity where there is one, else by SNR; NaN is the worst."""
    if "reference" in ours["outputs"]:
        full = ours["outputs"]["reference"]
        mine = _or_worst(ours, "perplexity", inf)
        best = min(_or_worst(r, "perplexity", inf) for r in theirs)
        measured = f"perplexity {_named(mine)}; theirs {_named(best)}; full {full:.3f}"
        return Bar(f"{title}: error", measured, "lower", mine < best)
    mine = _or_worst(ours, "snr", -inf)
    best = max(_or_worst(r, "snr", -inf) for r in theirs)
    return Bar(
        f"{title}: error",
        f"SNR {_named(mine, 1)} dB; theirs {_named(best, 1)}",
        "higher",
        mine > best,
    )


def _or_worst(row: Row, name: str, worst: float) -> float:
    value = row["outputs"].get(name)
    return worst if value is None else float(value)


def _named(value: float, decimals: int = 3) -> str:
    return f"{value:.{decimals}f}" if isfinite(value) else "NaN or not run"


def usage(row: Row, name: str) -> float:
    """The median over the row's runs of `wall`, `cpu` (seconds) or `peak` (bytes)."""
    return float(median(run[name] for run in row["runs"]))


# Figures by which a peer may do better: title, the figure of a row, whether more is better, format.
_FIGURES: tuple[tuple[str, Callable[[Row], float | None], bool, str], ...] = (
    ("CPU seconds", lambda r: usage(r, "cpu"), False, "{:.1f}"),
    ("peak MB", lambda r: usage(r, "peak") / 1e6, False, "{:.0f}"),
    ("file, of the original's size", lambda r: r["bytes"] / r["original_bytes"], False, "{:.2f}"),
    ("SNR dB", lambda r: r["outputs"].get("snr"), True, "{:.1f}"),
    ("perplexity", lambda r: r["outputs"].get("perplexity"), False, "{:.3f}"),
    ("8-bit share of FLOPs", lambda r: r.get("compiled", {}).get("eight_bits"), True, "{:.3f}"),
)


def losses(rows: Iterable[Row]) -> list[str]:
    """A line for every figure of a recipe of ours by which peers of its format do better.

    A dynamic recipe is held against dynamic ones, a static one against static ones.
    """
    found = [row for row in rows if "outputs" in row]
    lines = []
    for ours in (row for row in found if row["peer"] == "onnxq"):
        rivals = [row for row in found if row["peer"] != "onnxq" and _kind(row) == _kind(ours)]
        for title, figure, more, how in _FIGURES:
            mine = figure(ours)
            if mine is None:
                continue
            better = [
                f"{row['peer']} {row['recipe']} {how.format(value)}{_flaw(row)}"
                for row in rivals
                if (value := figure(row)) is not None
                and how.format(value) != how.format(mine)
                and (value > mine) == more
            ]
            if better:
                title = f"{ours['model']} {ours['recipe']}, {title}"
                lines.append(f"{title}: {how.format(mine)}; {', '.join(better)}")
    return lines


def _kind(row: Row) -> tuple[str, str, bool]:
    recipe = row["recipe"]
    return row["model"], recipe.split("-")[0], "dynamic" in recipe


def _flaw(row: Row) -> str:
    return "" if row.get("compiled", {}).get("compiles", True) else " (does not compile)"
