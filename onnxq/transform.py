"""The one loop over sites: weights to codes, activations behind Q/DQ. The caller of algorithms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.calibrate.ranges import Ranges
from onnxq.calibrate.table import CalibrationTable
from onnxq.centers import can_center, centered_layers, joined_bias
from onnxq.clipping import output_range
from onnxq.coding import Coder
from onnxq.formats import QuantFormat
from onnxq.graph.dtypes import value_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.emit import Emitter
from onnxq.graph.emit_weight import CodedWeight
from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand
from onnxq.graph.weights import array
from onnxq.layouts import layout_of
from onnxq.placement import Decision, Placement, Site
from onnxq.progress import Progress, silent
from onnxq.pruning import prune, thinned
from onnxq.recipe import Recipe
from onnxq.report import Edit
from onnxq.rounding import Rounding
from onnxq.sharing import separate_products, shared_ranges
from onnxq.sites import is_current
from onnxq.solving import Solver
from onnxq.threads import in_order

SOFTMAX_PEAK = 1.0
"""Probabilities need no calibration: the scale is 1/448."""


_WITHOUT_ROWS = "mse:2"  # in the place of "output" for what is not linear
_MOST_LOST = 0.95  # of a tensor's channels


def _measured_inputs(site: Site) -> Iterator[tuple[Node, int]]:
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
            for node, i in _measured_inputs(site):
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
        for group in _groups(placement):
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
        for node, i in _measured_inputs(decision.site)
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
    if decision.site.attention is not None and _dtype(decision.site.node.inputs[0]).itemsize > 2:
        return Decision(
            decision.site, False, "attention in FP32: TensorRT fuses it in 16 bits only"
        )
    try:
        for node, index in _measured_inputs(decision.site):
            dtype = np.float32 if fmt.two_level else _dtype(node.inputs[index])
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


def apply_placement(
    model: Model,
    placement: Placement,
    ranges: Ranges | None,
    progress: Progress = silent,
    rounding: Rounding | None = None,
) -> list[Edit]:
    """Emit the Q/DQ of every quantized site, or prune it; returns one Edit a site at least.

    Args:
        placement: of `settle`.
        ranges: of `activation_ranges`; None for dynamic recipes.
        rounding: how weights are rounded; None: to nearest.

    Raises:
        OnnxqError: a weight or a range is not finite.
    """
    stale = [d.site.name for d in placement.quantized if not is_current(d.site)]
    if stale:
        raise AssertionError(f"{stale[0]!r} was rescaled: take Placement.current() first")
    if ranges is not None and placement.recipe.qkv_granularity == "tensor":
        ranges = separate_products(placement, shared_ranges(placement, ranges))
    editor = Editor(model)
    solver = rounding if isinstance(rounding, Solver) else None
    if placement.recipe.quantizes:
        placement, edits = thinned(placement, solver)
        _quantize(editor, placement, ranges, progress, rounding)
    else:
        edits = prune(editor, placement, solver, progress)
    done = "quantize" if placement.recipe.quantizes else "prune"
    for decision in placement.decisions:
        verb = done if decision.quantized else "leave"
        edits.append(Edit("emit", verb, decision.site.name, decision.reason))
    editor.finish()
    return edits


def _quantize(
    editor: Editor,
    placement: Placement,
    ranges: Ranges | None,
    progress: Progress,
    rounding: Rounding | None,
) -> None:
    emitter, coder = Emitter(editor), Coder(placement.recipe, rounding)
    done, total = 0, len(placement.quantized)
    gains = _moved_factors(emitter, placement)  # before layers get factors of their own
    groups = _groups(placement)
    for group, coded in zip(groups, _coded(coder, groups), strict=True):
        if group[0].attention is not None:
            assert ranges is not None  # recipes quantize attention with static scales only
            for site in group:
                _quantize_attention(emitter, site, placement.recipe, ranges, gains)
        else:
            _quantize_layers(emitter, coder, group, coded, ranges)
        done += len(group)
        progress("quantizing", done, total)


def _moved_factors(emitter: Emitter, placement: Placement) -> dict[int, tuple[float, float]]:
    """Move constant factors onto q; by id of the scores, what q and k are multiplied by since.

    Where attention is left in 16 bits and roles are known too: k, rescaled behind its product,
    would take three kernels to the attention instead of one.
    """
    exact = placement.recipe.qkv_granularity == "tensor"
    return {
        id(decision.site.node): emitter.scale_before_product(decision.site.node, exact=exact)
        for decision in placement.decisions
        if decision.site.attention is not None
        and (decision.quantized or decision.site.role == "attention")
    }


def _groups(placement: Placement) -> list[list[Site]]:
    """Quantized sites, those that read one tensor together (q, k, v), in graph order."""
    groups: dict[tuple[int, str], list[Site]] = {}
    for decision in placement.quantized:
        site = decision.site
        groups.setdefault((id(site.node.inputs[0]), site.kind), []).append(site)
    return list(groups.values())


def _coded(
    coder: Coder, groups: Sequence[Sequence[Site]]
) -> Iterator[Callable[[], list[CodedWeight]]]:
    """What gives the weights of each group of sites, in order; some by then are computed.

    Layers that share a weight with others wait for their turn: who comes first decides on it.
    """
    readers = Counter(id(site.operand.constant) for g in groups for site in g if site.operand)

    def code(sites: Sequence[Site]) -> list[CodedWeight]:
        return coder.code(sites, _dtype(sites[0].node.inputs[0]))

    def ahead(sites: Sequence[Site]) -> Callable[[], list[CodedWeight]]:
        constants = [site.operand.constant for site in sites if site.operand]
        alone = all(readers[id(constant)] == 1 for constant in constants)
        if not (coder.rounding.ahead and constants and alone):
            return lambda: code(sites)
        made = code(sites)
        return lambda: made

    return in_order(ahead, groups, None if coder.rounding.ahead else 1)


def _quantize_layers(
    emitter: Emitter,
    coder: Coder,
    sites: Sequence[Site],
    weights: Callable[[], list[CodedWeight]],
    ranges: Ranges | None,
) -> None:
    """Layers that read one tensor."""
    recipe, dtype = coder.recipe, _dtype(sites[0].node.inputs[0])
    coded_weights = weights()
    found = None if ranges is None else ranges.get((id(sites[0].node), 0))
    center, shifts = centered_layers(sites, coded_weights, found, recipe.activation_format, dtype)
    for site, coded, shift in zip(sites, coded_weights, shifts, strict=True):
        node, rank = site.node, len(_operand(site).shape)
        kept = recipe.activation_format is None or dtype.itemsize > 2
        gain = 1.0 if kept else _take_alpha(emitter.editor, node)
        weight, behind = emitter.weight(_operand(site), coded, dtype, node, gain)
        node.inputs[0], factors = _activation(emitter, site, recipe, ranges, center)
        node.inputs[1] = weight
        factors = ([] if behind is None else [behind]) + factors
        bias = _take_bias(emitter.editor, site, rank) if factors or shift is not None else None
        if shift is not None:
            bias = joined_bias(emitter.editor, site, bias, shift, dtype)
        emitter.finish_product(node, factors, bias)


def _activation(
    emitter: Emitter, site: Site, recipe: Recipe, ranges: Ranges | None, center: float
) -> tuple[Tensor, list[Tensor]]:
    """What the product reads, and what it is to be multiplied by."""
    node, fmt = site.node, recipe.activation_format
    tensor = node.inputs[0]
    if fmt is None:
        return tensor, []
    if fmt.block and not fmt.two_level:
        return emitter.blocks(tensor, fmt, None, node), []
    if recipe.mode == "static":
        assert ranges is not None  # they are what such a recipe needs data for
        found = ranges[id(node), 0]
        if center:
            around = emitter.centered(tensor, center, node)
            return _scaled(emitter, around, fmt, found.reach, node), []
        return _scaled(emitter, tensor, fmt, found.peak, node), []
    axes = [-1] if site.kind == "linear" else list(range(1, len(_operand(site).shape)))
    normal, peak = emitter.normalized(tensor, axes, node)
    return _scaled(emitter, normal, fmt, 1.0, node), [peak]


def _static(emitter: Emitter, node: Node, index: int, fmt: QuantFormat, peak: float) -> Tensor:
    return _scaled(emitter, node.inputs[index], fmt, peak, node)


def _scaled(emitter: Emitter, tensor: Tensor, fmt: QuantFormat, peak: float, node: Node) -> Tensor:
    """`tensor` quantized under the scale that its largest magnitude, `peak`, asks for."""
    if fmt.two_level:
        return emitter.blocks(tensor, fmt, numerics.tensor_unit(peak, fmt), node)
    scale = numerics.activation_scale(peak, fmt, _dtype(tensor))
    return emitter.static(tensor, scale, fmt, node)


def _operand(site: Site) -> ConstantOperand:
    assert site.operand is not None  # placement quantizes nothing else but attentions
    return site.operand


def _take_alpha(editor: Editor, node: Node) -> float:
    """Remove the factor of a Gemm: in 16 bits the compiler would apply it beside the scales."""
    alpha = float(node.attrs.get("alpha", 1.0))
    if alpha != 1.0:
        editor.set_attribute(node, "alpha", None)
    return alpha


def _take_bias(editor: Editor, site: Site, rank: int) -> Tensor | None:
    """Remove the bias of a Gemm or Conv, shaped to be added behind the rescale."""
    node = site.node
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    bias = node.inputs[2]
    del node.inputs[2]
    if site.kind == "linear":
        return bias
    shape = np.array([1, -1] + [1] * (rank - 2), np.int64)
    if isinstance(bias, Constant):
        return editor.constant(f"{bias.name}_column", array(bias).reshape(shape))
    target = editor.constant(f"{bias.name}_shape", shape)
    return editor.node(
        "Reshape",
        f"{bias.name}_Reshape",
        [bias, target],
        f"{bias.name}_column",
        bias.dtype,
        None,
        like=node,
    )


def _quantize_attention(
    emitter: Emitter,
    site: Site,
    recipe: Recipe,
    ranges: Ranges,
    gains: Mapping[int, tuple[float, float]],
) -> None:
    """Q/DQ right at q, k, v and the probabilities: all four, or TensorRT fuses none."""
    attention, fmt = site.attention, recipe.activation_format
    assert attention is not None and fmt is not None
    scores, values = attention.scores, attention.values
    for node, index in _measured_inputs(site):
        peak = ranges[id(node), index].peak * (gains[id(node)][index] if node is scores else 1.0)
        node.inputs[index] = _static(emitter, node, index, fmt, peak)
    values.inputs[0] = _static(emitter, values, 0, fmt, SOFTMAX_PEAK)


def _dtype(tensor: Tensor) -> Any:
    """The numpy (or ml_dtypes) type of an activation: its scales have the same."""
    return value_dtype(tensor.dtype)
