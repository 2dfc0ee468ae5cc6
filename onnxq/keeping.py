"""Layers left as they are, for the error of the model's outputs that rounding them causes.

Errors of layers add up, nearly: one layer rounded alone tells its share, and a group rounded
together errs at least as much as its worst. So the worst are found by halving the worst group
again and again, in a few runs for each instead of one for every layer of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq import numerics
from onnxq.calibrate.ranges import Ranges
from onnxq.formats import QuantScheme
from onnxq.placement import Decision, Placement
from onnxq.progress import Progress, silent
from onnxq.ranging import settle
from onnxq.recipe import Recipe
from onnxq.report import Edit, decibels
from onnxq.rounding import finite_peaks
from onnxq.schemes import granularity, output_axis
from onnxq.sites import Site

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import Device
    from onnxq.graph.model import Model
    from onnxq.graph.switches import Switched

_REASON = "left for the error it causes"
Error = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Kept:
    """What was left, by index among the layers, and what that gained.

    Attributes:
        layers: {index: error with it alone rounded}, the worst first.
        share: of all layers' multiplications.
        before, after: error with all layers rounded, and without those.
        reached: whether the decibels asked for were.
    """

    layers: dict[int, float]
    share: float
    before: float
    after: float
    reached: bool = True


def keep(
    model: Model,
    placement: Placement,
    ranges: Ranges | None,
    samples: Samples,
    device: Device = "auto",
    progress: Progress = silent,
) -> tuple[Placement, list[Edit], dict[str, Any]]:
    """Leave the layers that the placement's recipe asks for, on the graph as it was calibrated.

    Returns:
        The placement without them; an Edit for each; figures for the report.
    """
    from onnxq.calibrate.trials import Trials
    from onnxq.graph.switches import SIZES, SWITCHES, with_switches

    recipe, placement = placement.recipe, settle(placement, ranges)
    sites = [d.site for d in placement.quantized if d.site.operand is not None]
    layers = [_switched(site, recipe, ranges) for site in sites]
    switched = with_switches(model, layers)
    trials = Trials(model.session_model(), switched, samples, (SWITCHES, SIZES), device)

    def error(chosen: Sequence[int]) -> float:
        progress("ranking layers", trials.runs, 0)
        return trials.error(chosen)

    costs = [float(n) * _summed(site) for n, site in zip(trials.sizes, sites, strict=True)]
    found = select(error, costs, recipe)
    return _without(placement, sites, costs, found, trials.runs)


def select(error: Error, costs: Sequence[float], recipe: Recipe) -> Kept:
    """The layers to leave.

    Args:
        error: of the outputs over their power, with the layers of these indices rounded.
        costs: multiplications of each.
        recipe: its `keep_worst`, `keep_flops` and `snr`.
    """
    everything = list(range(len(costs)))
    before = after = error(everything)
    target = 0.0 if recipe.snr is None else 10 ** (-recipe.snr / 10)
    most = recipe.keep_worst or len(costs)
    room = (recipe.keep_flops or 1.0) * sum(costs)
    kept: dict[int, float] = {}
    for index, own in worst(len(costs), error):
        if len(kept) == most or min(costs) > room or (recipe.snr is not None and after <= target):
            break
        if costs[index] > room:
            continue
        kept[index] = own
        room -= costs[index]
        if recipe.snr is not None:
            after = error([i for i in everything if i not in kept])
    if recipe.snr is None and kept:
        after = error([i for i in everything if i not in kept])
    share = sum(costs[i] for i in kept) / sum(costs) if kept else 0.0
    return Kept(kept, share, before, after, recipe.snr is None or after <= target)


def worst(count: int, error: Error) -> Iterator[tuple[int, float]]:
    """Indices and their errors alone, the largest first, each found when it is asked for."""
    waiting: list[tuple[float, list[int]]] = []

    def measure(group: list[int]) -> None:
        if group:
            heappush(waiting, (-error(group), group))

    measure(list(range(count)))
    while waiting:
        own, group = heappop(waiting)
        if len(group) == 1:
            yield group[0], -own
        else:
            measure(group[: len(group) // 2])
            measure(group[len(group) // 2 :])


def _switched(site: Site, recipe: Recipe, ranges: Ranges | None) -> Switched:
    from onnxq.graph.switches import Switched

    weights, inputs = recipe.weight_format, recipe.activation_format
    divided = granularity(site, recipe)
    assert site.operand is not None and inputs is not None and divided is not None
    peak = finite_peaks(site, site.operand.load(), divided)
    scheme = QuantScheme(weights, divided, "float32")
    step = numerics.steps(numerics.scales_for(peak, scheme), scheme, site.operand.shape)
    axes = (-1,) if site.kind == "linear" else tuple(range(1, len(site.operand.shape)))
    if ranges is None:
        return Switched(site.node, weights, step, inputs, None, axes=axes)
    found = ranges[id(site.node), 0]
    peak_of = found.reach if found.offset else found.peak
    fixed = float(numerics.activation_scale(peak_of, inputs, np.float32))
    return Switched(site.node, weights, step, inputs, fixed, found.offset * fixed)


def _summed(site: Site) -> int:
    """Multiplications behind each element of a layer's output."""
    assert site.operand is not None
    shape = site.operand.shape
    return int(np.prod(shape)) // shape[output_axis(site) if len(shape) > 1 else 0]


def _without(
    placement: Placement, sites: Sequence[Site], costs: Sequence[float], found: Kept, runs: int
) -> tuple[Placement, list[Edit], dict[str, Any]]:
    total, chosen = sum(costs), {id(sites[i].node) for i in found.layers}
    decisions = tuple(
        Decision(d.site, False, _REASON) if id(d.site.node) in chosen else d
        for d in placement.decisions
    )
    edits = [
        Edit(
            "keep",
            "leave",
            sites[i].name,
            f"rounded alone it costs the outputs {decibels(own)}; {costs[i] / total:.1%} of the "
            "multiplications",
        )
        for i, own in found.layers.items()
    ]
    facts = {
        "layers": [sites[i].name for i in found.layers],
        "share": round(found.share, 4),
        "snr_before": _snr(found.before),
        "snr_after": _snr(found.after),
        "reached": found.reached,
        "runs": runs,
    }
    return replace(placement, decisions=decisions), edits, facts


def _snr(share: float) -> float | None:
    """Decibels, as the calibration data has them."""
    return round(-10 * float(np.log10(share)), 2) if 0 < share < np.inf else None
