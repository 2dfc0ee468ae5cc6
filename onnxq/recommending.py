"""`recommend`: the decision table applied to a model, with the memory it will need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onnxq.errors import OnnxqError
from onnxq.gpus import Target
from onnxq.gpus import gpu as find_gpu
from onnxq.recipe import Recipe, presets
from onnxq.report import Report
from onnxq.results import Recommended

if TYPE_CHECKING:
    from onnxq.advice import Advice, Use, Workload

PathLike = str | Path


def recommend(
    model: PathLike | None = None,
    *,
    gpu: str,
    workload: str,
    batch: int = 1,
    accuracy_budget: float = 0.02,
    seq_len: int = 2048,
    saturated: bool = False,
) -> Recommended:
    """A recipe for a GPU and a use, why, and the memory the model will need with it.

    Args:
        model: a full-precision model; None: advice for a language model, without its memory.
        gpu: a card of the table in `gpus`, such as `h100`.
        workload: `online` (a user waits) or `offline` (answers are collected).
        batch: requests at a time.
        accuracy_budget: relative loss that is acceptable, 0.005 for half a percent.
        seq_len: tokens of a request, its answer included.
        saturated: the GPU's arithmetic is in full use already.

    Raises:
        OnnxqError: an unknown GPU or workload, a number out of range, or an unreadable model.
    """
    from onnxq.advice import Use, advise

    if workload not in ("online", "offline"):
        raise OnnxqError(f"unknown workload {workload!r}", "choose online or offline")
    if batch < 1 or seq_len < 1 or not 0 < accuracy_budget < 1:
        raise OnnxqError(
            f"batch {batch}, {seq_len} tokens, accuracy budget {accuracy_budget}: out of range",
            "a batch and a length of 1 or more; a budget such as 0.5%",
        )
    card = find_gpu(gpu)
    use = Use(card, cast("Workload", workload), batch, accuracy_budget, saturated, seq_len)
    available = {name for name, recipe in presets().items() if _runs(recipe, card.target)}
    report = Report(f"{card.name}, {workload}")
    if model is None:
        advice = advise(use, available)
        report.notes += [*advice.notes, "name a model to know the memory and the GPUs it needs"]
    else:
        advice = _advise_on(Path(model), use, available, report)
    report.facts.update(
        gpu=card,
        scheme=advice.scheme.name,
        recipe=advice.recipe,
        wanted=advice.wanted,
        reasons=dict(advice.reasons),
        command=_command(model, advice),
    )
    return Recommended(report, True, advice)


def _advise_on(source: Path, use: Use, available: Collection[str], report: Report) -> Advice:
    """The advice for a model, with its memory; what was found goes into the report."""
    from onnxq.advice import advise, cache_bytes, gpus_needed, headroom
    from onnxq.footprint import footprint, kind
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.placement import place

    graph, _ = prepare(Model.load(source), 0)
    found = kind(graph)
    advice = advise(use, available, found)
    size = footprint(graph, place(graph, presets()[advice.recipe], use.gpu.target))
    said, notes = headroom(use, advice, size)
    cache = cache_bytes(use, size)
    report.notes += [*advice.notes, *notes]
    report.facts.update(
        model=source,
        kind=found,
        weight_bytes=size.weights,
        weight_bytes_in_16_bits=size.full,
        cache_bytes=cache,
        gpus=gpus_needed(use, size.weights + (cache or 0)),
    )
    reasons = [*advice.reasons[:3], ("headroom", said), *advice.reasons[3:]]
    return dataclasses.replace(advice, reasons=tuple(reasons))


def _runs(recipe: Recipe, target: Target) -> bool:
    """Whether the target has kernels for what the recipe writes."""
    formats = (recipe.weight_format, recipe.activation_format)
    known = all(target.runs(fmt.name) for fmt in formats if fmt is not None)
    return known and (recipe.activation_format is not None or target.fuses_weight_only)


def _command(model: PathLike | None, advice: Advice) -> str:
    data = ""
    if presets()[advice.recipe].needs_data:
        text = " --text calib.txt --tokenizer tokenizer.json"
        data = text if advice.kind.generates else " --calib data.npz"
    name = model or "model.onnx"
    return f"onnxq quantize {name} --recipe {advice.recipe} --target {advice.use.gpu.sm}{data}"
