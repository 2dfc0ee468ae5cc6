"""The one loop over sites: weights to codes, activations behind Q/DQ. The caller of algorithms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.calibrate.ranges import Ranges
from onnxq.centers import centered_layers, joined_bias
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
from onnxq.placement import Placement, Site
from onnxq.progress import Progress, silent
from onnxq.pruning import prune, thinned
from onnxq.ranging import measured_inputs
from onnxq.recipe import Recipe
from onnxq.report import Edit
from onnxq.rounding import Rounding
from onnxq.sharing import separate_products, shared_ranges
from onnxq.sites import is_current
from onnxq.solving import Solver
from onnxq.threads import few, in_order

SOFTMAX_PEAK = 1.0
"""Probabilities need no calibration: the scale is 1/448."""


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
    groups = placement.groups()
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

    workers = few() if coder.rounding is coder.nearest else None
    return in_order(ahead, groups, workers if coder.rounding.ahead else 1)


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
    for node, index in measured_inputs(site):
        peak = ranges[id(node), index].peak * (gains[id(node)][index] if node is scores else 1.0)
        node.inputs[index] = _static(emitter, node, index, fmt, peak)
    values.inputs[0] = _static(emitter, values, 0, fmt, SOFTMAX_PEAK)


def _dtype(tensor: Tensor) -> Any:
    """The numpy (or ml_dtypes) type of an activation: its scales have the same."""
    return value_dtype(tensor.dtype)
