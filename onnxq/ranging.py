"""Which tensors a calibration watches, the ranges that come of it, and the sites they rule out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from onnxq import numerics
from onnxq.calibrate.ranges import Ranges
from onnxq.calibrate.table import CalibrationTable
from onnxq.centers import can_center
from onnxq.clipping import output_range
from onnxq.formats import QuantFormat
from onnxq.graph.dtypes import value_dtype
from onnxq.graph.ir import Node
from onnxq.layouts import layout_of
from onnxq.placement import Decision, Placement, Site
from onnxq.recipe import Recipe

_WITHOUT_ROWS = "mse:2"  # in the place of "output" for what is not linear
_MOST_LOST = 0.95  # of a tensor's channels


def measured_inputs(site: Site) -> Iterator[tuple[Node, int]]:
    """The inputs whose ranges a static recipe needs."""
    yield site.node, 0
    if site.attention is not None:
        yield site.node, 1
        yield site.attention.values, 1


def watched_tensors(placement: Placement, unsolved: Mapping[int, str] = {}) -> dict[str, str]:
    """The tensors a recipe needs statistics of, in graph order, and which (see `statistics`).

    Args:
        unsolved: layers that no second-order method works on (see `inputs.unsolvable`).
    """
    recipe = placement.recipe
    wanted: dict[str, list[str]] = {}
    for decision in placement.quantized:
        site = decision.site
        if recipe.needs_ranges:
            kind = _range_statistic(recipe, site)
            for node, i in measured_inputs(site):
                wanted.setdefault(node.inputs[i].name, []).append(kind)
            if site.attention is None:
                axis = -1 if site.kind == "linear" else 1
                wanted[site.node.inputs[0].name].append(f"channel_amax:{axis}")
            if recipe.calibrator == "output" and site.kind == "linear":
                wanted[site.node.inputs[0].name].append("rows")
        if site.kind == "linear":
            wanted.setdefault(site.node.inputs[0].name, []).extend(recipe.statistics)
        elif site.kind == "conv" and recipe.needs_grams and id(site.node) not in unsolved:
            wanted.setdefault(site.node.inputs[0].name, []).append(layout_of(site).statistic)
    return {name: "+".join(dict.fromkeys(kinds)) for name, kinds in wanted.items() if kinds}


def _range_statistic(recipe: Recipe, site: Site) -> str:
    """What a range is chosen from; recipes for diffusion models keep it by denoising step too."""
    method = recipe.calibrator_of(site.kind).partition(":")[0]
    if method == "steps" or (recipe.level and method == "max"):
        return "steps"
    if method == "max":
        return "amax"
    return "histogram+steps" if recipe.level else "histogram"


def _by_values(method: str) -> str:
    """The method where no rows of the tensor were kept to look at the error of layers."""
    return _WITHOUT_ROWS if method == "output" else method


def activation_ranges(placement: Placement, table: CalibrationTable) -> Ranges | None:
    """Ranges by input; taken before the base precision is converted, which renames tensors."""
    if not placement.recipe.needs_ranges:
        return None
    recipe, fmt = placement.recipe, placement.recipe.activation_format
    # The scales of blocks follow the values: the tensor's has to hold the largest.
    blocks = fmt is not None and bool(fmt.block)
    center = recipe.center and fmt is not None and not fmt.is_float
    kept = {id(d.site.node.inputs[0]) for d in placement.quantized if not can_center(d.site)}
    by_output: Ranges = {}
    if recipe.calibrator == "output" and not blocks:
        for group in placement.groups():
            if group[0].kind == "linear":
                free = center and id(group[0].node.inputs[0]) not in kept
                found = output_range(group, recipe, table, free)
                by_output |= {(id(site.node), 0): found for site in group}
    return {
        (id(node), i): by_output.get((id(node), i))
        or table.covered(
            node.inputs[i].name,
            "max" if blocks else _by_values(recipe.calibrator_of(decision.site.kind)),
            recipe.activations,
            center and id(node.inputs[i]) not in kept,
        )
        for decision in placement.quantized
        for node, i in measured_inputs(decision.site)
    }


def settle(placement: Placement, ranges: Ranges | None) -> Placement:
    """The placement after calibration and base precision: sites they rule out left, with reasons.

    That is a layer whose measured range no scale serves, or only by making zeros of nearly all
    channels, and attention that stayed in FP32.

    Args:
        ranges: of `activation_ranges`; None for dynamic recipes, which have none to fit.
    """
    fmt = placement.recipe.activation_format
    if ranges is None or fmt is None:
        return placement
    return replace(
        placement, decisions=tuple(_settled(d, fmt, ranges) for d in placement.decisions)
    )


def _settled(decision: Decision, fmt: QuantFormat, ranges: Ranges) -> Decision:
    if not decision.quantized:
        return decision
    if (
        decision.site.attention is not None
        and value_dtype(decision.site.node.inputs[0].dtype).itemsize > 2
    ):
        return Decision(
            decision.site, False, "attention in FP32: TensorRT fuses it in 16 bits only"
        )
    try:
        for node, index in measured_inputs(decision.site):
            dtype = np.float32 if fmt.two_level else value_dtype(node.inputs[index].dtype)
            found = ranges[id(node), index]
            numerics.activation_scale(found.peak, fmt, dtype)
            if found.lost > _MOST_LOST:
                return Decision(
                    decision.site,
                    False,
                    f"a range of {found.peak:.3g} makes zeros of {found.lost:.1%} of its channels",
                )
    except numerics.ScaleRangeError as error:
        return Decision(decision.site, False, str(error))
    return decision
