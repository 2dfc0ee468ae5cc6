"""Results as lines for a terminal; text only, printed by `cli`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onnxq.memory import megabytes

if TYPE_CHECKING:
    from onnxq.engine.coverage import Coverage
    from onnxq.linting.finding import Finding
    from onnxq.results import (
        Built,
        Checked,
        Compared,
        Inspected,
        Linted,
        Quantized,
        Recommended,
        Sampled,
    )

_SHOWN = 8
_FIGURES = re.compile(r"-?\d+\.\d+")
_KINDS = {
    "linear": "linear layers",
    "conv": "convolutions",
    "attention": "attentions",
    "product": "products of two computed operands",
    "other": "other multiplying nodes",
}


def printable(line: str) -> str:
    """The line with control characters, and what the output cannot encode, as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def quantized_lines(result: Quantized) -> list[str]:
    """What `quantize` did, but for the recipe, which was announced before."""
    facts = result.report.facts
    recipe = facts["recipe"]
    done = "pruned" if recipe["weights"] == "none" else "quantized"
    lines = [*_calibrated_lines(facts), *_site_lines(facts["sites"], done)]
    lines += [*_step_lines(facts), *_precision_lines(result)]
    if recipe["sparsity"]:
        lines += _zero_lines(result, recipe["sparsity"])
    before, after = facts["bytes_before"], facts["bytes_after"]
    lines.append(
        f"wrote {facts['output']}: {megabytes(after)}, {after / before:.2f} x of "
        f"{megabytes(before)}, in {facts['seconds']:.1f} s"
    )
    return lines + _notes(result.report.notes)


def _zero_lines(result: Quantized, pattern: str) -> Iterable[str]:
    """What was not pruned as asked, by reason."""
    counts: dict[str, int] = {}
    for edit in result.report.edits:
        if edit.step == "sparsify":
            how = "not pruned" if edit.verb == "leave" else f"pruned by {edit.verb}"
            counts[f"{how}: {edit.reason}"] = counts.get(f"{how}: {edit.reason}", 0) + 1
    for said, count in sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN]:
        yield f"    {pattern}: {count} {said}"


def _calibrated_lines(facts: dict[str, Any]) -> list[str]:
    """How calibration kept within the memory, where that was asked for or needed."""
    lines = []
    for name in ("calibrated", "calibrated_again"):
        ran = facts.get(name)
        if not ran or (ran["segments"] == 1 and ran["memory"] is None):
            continue
        how = "in one piece"
        if ran["segments"] > 1:
            moved = megabytes(ran["spooled_bytes"])
            if ran["weight_bytes"]:
                moved += f" of activations and {megabytes(ran['weight_bytes'])} of rescaled weights"
            how = f"in {ran['segments']} segments, {moved} through the disk"
        if ran["cut_fusions"]:
            how += f" ({ran['cut_fusions']} cuts where ONNX Runtime may fuse: last bits may differ)"
        said = name.replace("_", " ") + (", rescaled," if name.endswith("again") else "")
        lines.append(f"  {said} {how}; at most {megabytes(ran['peak_rss'])} of memory")
    return lines


def recipe_lines() -> list[str]:
    """The presets, whether they need data, and what they do."""
    from onnxq.recipe import presets

    width = max(map(len, presets()))
    return [
        f"{name:{width}}  {'data' if recipe.needs_data else '    '}  {recipe.description}"
        for name, recipe in presets().items()
    ]


def _step_lines(facts: dict[str, Any]) -> list[str]:
    """What the recipe's steps gained; of each weight the report says it."""
    lines = []
    if rescaled := facts.get("rescaling"):
        lines.append(
            f"  rescaled: {rescaled['folded']} inputs folded, {rescaled['multiplied']} by a Mul, "
            f"{rescaled['left']} left"
        )
        if rescaled["left"] and _may_multiply(facts["recipe"]):
            lines.append("    --set explicit=true puts a Mul where nothing can be folded")
    if kept := facts.get("kept"):
        lines.append(
            f"  {len(kept['layers'])} layers left for their error, {kept['share']:.1%} of the "
            f"multiplications: outputs {kept['snr_before']} dB to {kept['snr_after']} dB on "
            "calibration data"
        )
    found = facts.get("rounding")
    if found and found["layers"]:
        steps = ", ".join(found["steps"])
        lines.append(
            f"  {steps}: {found['improved']} of {found['layers']} weights with less output error, "
            f"{found['gain_db']:.1f} dB on average"
        )
    return lines


def _may_multiply(recipe: dict[str, Any]) -> bool:
    return "smoothquant" in recipe["steps"] and not recipe["explicit"]


def inspected_lines(result: Inspected) -> list[str]:
    """What a recipe would do, site by site; or the record in a model onnxq wrote."""
    if result.placement is None:
        facts = dict(result.report.facts)
        edits = facts.pop("edits", [])
        return [result.report.title, *_flat(facts), *_edit_lines(edits)]
    facts = result.report.facts
    return [
        result.report.title,
        *result.placement.lines(),
        *_site_lines(facts["sites"]),
        *_notes(result.report.notes),
    ]


def _edit_lines(edits: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Recorded edits: those alike on one line, with the first of their targets."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for e in edits:
        reason = _FIGURES.sub("N", e["reason"]) if e["step"] == "round" else e["reason"]
        groups.setdefault((e["step"], e["verb"], reason), []).extend(e["targets"])
    for (step, verb, reason), targets in groups.items():
        more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        why = f": {reason}" if reason else ""
        yield f"  {step} {verb} {targets[0]}{more}{why}"


def recommended_lines(result: Recommended) -> list[str]:
    """The recipe, the answers to the questions that chose it, and the command to run."""
    assert result.advice is not None
    reasons = result.advice.reasons
    width = max(len(question) for question, _ in reasons)
    return [
        f"recipe {result.advice.recipe} ({result.advice.scheme.name})",
        *(f"  {question:{width}}  {answer}" for question, answer in reasons),
        *_notes(result.report.notes),
        result.report.facts["command"],
    ]


def compared_lines(result: Compared) -> list[str]:
    """The comparison's table, and where the error enters if that was asked for."""
    assert result.comparison is not None
    return result.comparison.lines()


def sampled_lines(result: Sampled) -> list[str]:
    """How far the samples are from the original's."""
    assert result.found is not None
    return result.found.lines()


def linted_lines(result: Linted) -> list[str]:
    """The findings rule by rule, worst first, with their cures; and what was fixed."""
    facts, edits = result.report.facts, result.report.edits
    lines = [f"fixed {e.target}: {e.verb}: {e.reason}" for e in edits[:_SHOWN]]
    if len(edits) > _SHOWN:
        lines.append(f"fixed {len(edits) - _SHOWN} more (in the report)")
    if result.files:
        lines.append(f"wrote {result.files[0]}; what is left there:")
    count, quantized = len(result.findings), facts["quantized"]
    what = f"{quantized or 'none'} of {facts['products']} products quantized"
    lines.append(
        f"{result.report.title}: {what}; {count or 'no'} finding{'' if count == 1 else 's'}"
    )
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in result.findings:
        groups.setdefault((finding.severity.value, finding.rule), []).append(finding)
    for (severity, rule), found in groups.items():
        first = found[0]
        kind = f" ({first.operator})" if first.operator else ""
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        fixable = " (or try --fix)" if any(f.fixable for f in found) and not result.files else ""
        lines += [
            f"  {severity}: {rule}: {first.node}{kind}{more}: {first.reason}",
            f"    cure: {first.cure}{fixable}",
        ]
    lines += _notes(result.report.notes)
    if facts["target"] != "onnxruntime":
        lines.append(
            "told from the file alone; the compiler's own word: "
            f"onnxq build {facts.get('output', facts['model'])} --target {facts['target']} --strict"
        )
    return lines


def built_lines(result: Built) -> list[str]:
    """What was compiled, the coverage, and what did not end in the format it was meant to."""
    facts, coverage = result.report.facts, result.coverage
    assert coverage is not None
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{result.report.title} in {facts['seconds']:.1f} s ({versions})",
        *(f"  {line}" for line in coverage.summary()),
    ]
    if facts["sparse"]:
        said = facts["sparsity"] or ["allowed; what is chosen, the compiler says where the GPU is"]
        lines += [f"  sparse weights: {line}" for line in said]
    lines += [*_missed_lines(coverage), *_left_lines(coverage)]
    if result.predicted is not None:
        lines += [f"  {line}" for line in result.predicted.lines()]
    lines += ["on the GPU machine:", *(f"  {command}" for command in facts["commands"])]
    lines.append(
        f"wrote {facts['engine']}: {megabytes(facts['engine_bytes'])}, and {facts['engine']}.json"
    )
    return lines + _notes(dict.fromkeys(result.report.notes))


def _missed_lines(coverage: Coverage) -> Iterable[str]:
    """What did not run as its codes ask, by reason."""
    said = [
        (f"wanted {entry.node.wanted}, ran in {entry.ran}: {entry.reason}", entry.node.name)
        for entry in coverage.missed
    ]
    for reason, names in _most_first(said):
        yield f"  {_some(names, 1)}: {reason}" if names else f"  {reason}"


def _left_lines(coverage: Coverage) -> Iterable[str]:
    """What a quantized file has no codes for, by reason."""
    from onnxq.engine.coverage import TITLES

    said = [
        (f"{TITLES[entry.node.kind]} in {entry.ran}: {entry.node.left}", entry.node.name)
        for entry in coverage.left
        if entry.profile == 0
    ]
    for reason, names in _most_first(said):
        yield f"  left {len(names)} {reason} ({_some(names, 2)})" if names else f"  {reason}"


def _most_first(said: Iterable[tuple[str, str]]) -> Iterable[tuple[str, list[str]]]:
    """Names by what is said of them, that of most names first; at last how much is not shown."""
    groups: dict[str, list[str]] = {}
    for reason, name in said:
        groups.setdefault(reason, []).append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    yield from ordered[:_SHOWN]
    if len(ordered) > _SHOWN:
        yield f"{len(ordered) - _SHOWN} more reasons (in the report)", []


def _some(names: list[str], shown: int) -> str:
    """`a, b and 3 more`."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def checked_lines(result: Checked) -> list[str]:
    """How many weights have the pattern, by form; and those that have not, with the reason."""
    facts = result.report.facts
    rows, forms = facts["weights"], dict[str, list[bool]]()
    for row in rows:
        forms.setdefault(row["stored"], []).append(row["holds"])
    lines = [result.report.title]
    lines += [f"  {sum(held)} of {len(held)} in {form}" for form, held in forms.items()]
    rest = [row for row in rows if not row["holds"]]
    for row in sorted(rest, key=lambda row: not row["must"])[:_SHOWN]:
        word = "MISSING" if row["must"] else "left"
        lines.append(f"    {word} {row['node']}: {row['reason']} ({row['zeros']:.1%} zeros)")
    if len(rest) > _SHOWN:
        lines.append(f"    {len(rest) - _SHOWN} more (in the report)")
    if not any(row["holds"] for row in rows):
        lines.append("  no weight has it")
    return lines + _notes(result.report.notes)


def _site_lines(sites: dict[str, Any], done: str = "quantized") -> Iterable[str]:
    for kind, name in _KINDS.items():
        if kind in sites and (done == "quantized" or sites[kind]["quantized"]):
            entry = sites[kind]
            yield f"  {entry['quantized']} of {entry['sites']} {name} {done}"
    reasons = sorted(sites["left"].items(), key=lambda item: -item[1])
    for reason, count in reasons[:_SHOWN]:
        yield f"    left {count}: {reason}"
    if len(reasons) > _SHOWN:
        rest = sum(count for _, count in reasons[_SHOWN:])
        yield f"    left {rest}: {len(reasons) - _SHOWN} more reasons (in the report)"


def _precision_lines(result: Quantized) -> Iterable[str]:
    edits = [e for e in result.report.edits if e.step == "precision"]
    kept: dict[str, int] = {}
    for edit in edits:
        if edit.verb == "keep fp32":
            kept[edit.reason] = kept.get(edit.reason, 0) + 1
        else:
            yield f"  {edit.verb} {edit.target}: {edit.reason}"
    reasons = sorted(kept.items(), key=lambda item: -item[1])
    if reasons:
        yield f"  {sum(kept.values())} nodes stay FP32"
    for reason, count in reasons[:_SHOWN]:
        yield f"    {count}: {reason}"
    if len(reasons) > _SHOWN:
        rest = sum(count for _, count in reasons[_SHOWN:])
        yield f"    {rest}: {len(reasons) - _SHOWN} more reasons (in the report)"


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"  {prefix}{name}: {value}"


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"note: {note}" for note in notes]
