"""The one loop over sites: weights to codes, activations behind Q/DQ. The caller of algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.calibrate.table import CalibrationTable
from onnxq.errors import OnnxqError
from onnxq.formats import PerChannel, PerTensor, QuantFormat, QuantScheme, quant_format
from onnxq.graph.edit import Editor
from onnxq.graph.emit import CodedWeight, Emitter
from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand
from onnxq.graph.weights import array, numpy_dtype
from onnxq.placement import Decision, Placement, Site
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Edit

SOFTMAX_PEAK = 1.0
"""Probabilities need no calibration: the scale is 1/448."""


Ranges = dict[tuple[int, int], float]
"""(id(node), input index) -> magnitude the largest code stands for."""

Coded = dict[tuple[Any, ...], CodedWeight]
"""What weights were rounded to, by the constant, its layout and the scheme."""


def _measured_inputs(site: Site) -> Iterator[tuple[Node, int]]:
    """The inputs whose ranges a static recipe needs."""
    yield site.node, 0
    if site.attention is not None:
        yield site.node, 1
        yield site.attention.values, 1


def _static_inputs(placement: Placement) -> Iterator[tuple[Node, int]]:
    for decision in placement.quantized:
        yield from _measured_inputs(decision.site)


def watched_tensors(placement: Placement) -> list[str]:
    """Names of the tensors a static recipe needs ranges of, each once."""
    if not placement.recipe.needs_data:
        return []
    return list(dict.fromkeys(node.inputs[i].name for node, i in _static_inputs(placement)))


def activation_ranges(placement: Placement, table: CalibrationTable) -> Ranges:
    """Ranges by input; taken before the base precision is converted, which renames tensors."""
    recipe = placement.recipe
    return {
        (id(node), i): table.range(node.inputs[i].name, recipe.calibrator, recipe.activations)
        for node, i in _static_inputs(placement)
    }


def settle(placement: Placement, ranges: Ranges | None) -> Placement:
    """The placement after calibration and base precision: sites they rule out left, with reasons.

    That is a layer whose measured range no scale serves, and attention that stayed in FP32.

    Args:
        ranges: of `activation_ranges`; None for dynamic recipes, which have none to fit.
    """
    if ranges is None:
        return placement
    fmt = quant_format(placement.recipe.activations)
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
            numerics.activation_scale(ranges[id(node), index], fmt, _dtype(node.inputs[index]))
    except numerics.ScaleRangeError as error:
        return Decision(decision.site, False, str(error))
    return decision


def apply_placement(
    model: Model,
    placement: Placement,
    ranges: Ranges | None,
    progress: Progress = silent,
) -> list[Edit]:
    """Emit the Q/DQ of every quantized site; returns one Edit a site.

    Args:
        placement: of `settle`.
        ranges: of `activation_ranges`; None for dynamic recipes.

    Raises:
        OnnxqError: a weight or a range is not finite.
    """
    editor = Editor(model)
    emitter = Emitter(editor, quant_format(placement.recipe.weights))
    edits: list[Edit] = []
    known: Coded = {}
    done, total = 0, len(placement.quantized)
    for group in _groups(placement):
        if group[0].attention is not None:
            assert ranges is not None  # recipes quantize attention with static scales only
            for site in group:
                _quantize_attention(emitter, site, ranges)
        else:
            _quantize_layers(emitter, group, placement.recipe, ranges, known)
        done += len(group)
        progress("quantizing", done, total)
    for decision in placement.decisions:
        verb = "quantize" if decision.quantized else "leave"
        edits.append(Edit("emit", verb, decision.site.name, decision.reason))
    editor.finish()
    return edits


def _groups(placement: Placement) -> list[list[Site]]:
    """Quantized sites, those that read one tensor together (q, k, v), in graph order."""
    groups: dict[tuple[int, str], list[Site]] = {}
    for decision in placement.quantized:
        site = decision.site
        groups.setdefault((id(site.node.inputs[0]), site.kind), []).append(site)
    return list(groups.values())


def _quantize_layers(
    emitter: Emitter, sites: list[Site], recipe: Recipe, ranges: Ranges | None, known: Coded
) -> None:
    """Layers that read one tensor: the compiler makes one product of them, with one scale."""
    dtype = _dtype(sites[0].node.inputs[0])
    weights = [_weight_peaks(s, emitter.fmt, recipe) for s in sites]
    schemes, behind = _schemes(weights, dtype)
    for site, scheme, (_, peak) in zip(sites, schemes, weights, strict=True):
        gain = _take_alpha(emitter.editor, site.node) if dtype.itemsize == 2 else 1.0
        coded = _rounded(_operand(site), scheme, peak, behind, known)
        weight, ratio = emitter.weight(_operand(site), coded, site.node, gain)
        _quantize_product(emitter, site, weight, ratio, ranges)


def _weight_peaks(site: Site, fmt: QuantFormat, recipe: Recipe) -> tuple[QuantScheme, Any]:
    """How a weight is divided into scales, and the largest magnitude under each."""
    axis = output_axis(site)
    each = PerTensor() if recipe.weight_granularity == "tensor" else PerChannel(axis)
    peak = numerics.peaks(_operand(site).load(), each)
    if not np.isfinite(peak).all():
        raise OnnxqError(
            f"weight {site.weight_name!r} of {site.name!r} holds NaN or infinite values",
            f"export a sound model, or leave the layer: --rule 'leave weight={site.weight_name}'",
        )
    return QuantScheme(fmt, each, "float32"), peak


def _schemes(weights: list[tuple[QuantScheme, Any]], dtype: Any) -> tuple[list[QuantScheme], bool]:
    """The weights' schemes in the type of the activations, and whether scales go behind products.

    In 16 bits DequantizeLinear gets one scale, a unit of all of them; weights that have one scale
    between them need nothing behind.
    """
    if dtype.itemsize > 2:
        return [scheme for scheme, _ in weights], False
    scales = [numerics.scales_for(peak, scheme) for scheme, peak in weights]
    schemes = [replace(scheme, scale_type=dtype.name) for scheme, _ in weights]
    one = all(s.ndim == 0 and s == scales[0] for s in scales)
    if one and scales[0] >= numerics.smallest_normal(dtype):
        return schemes, False
    unit = numerics.common_scale(scales, dtype)
    return [scheme.with_unit(unit) for scheme in schemes], True


def _rounded(
    operand: ConstantOperand, scheme: QuantScheme, peak: Any, behind: bool, known: Coded
) -> CodedWeight:
    """The weight rounded to nearest; the same object for all layers that use it alike."""
    key = (id(operand.constant), operand.permutation, scheme, behind)
    if key not in known:
        scale = numerics.scales_for(peak, scheme)
        known[key] = CodedWeight(
            scheme, scale, lambda: numerics.quantize(operand.load(), scale, scheme), behind
        )
    return known[key]


def _quantize_product(
    emitter: Emitter, site: Site, weight: Tensor, ratio: Tensor | None, ranges: Ranges | None
) -> None:
    node, rank = site.node, len(_operand(site).shape)
    factors = [] if ratio is None else [ratio]
    if ranges is not None:
        node.inputs[0] = _static(emitter, node, 0, ranges[id(node), 0])
    else:
        axes = [-1] if site.kind == "linear" else list(range(1, rank))
        node.inputs[0], peak = emitter.dynamic(node.inputs[0], axes, node)
        factors.append(peak)
    node.inputs[1] = weight
    bias = _take_bias(emitter.editor, site, rank) if factors else None
    emitter.finish_product(node, factors, bias)


def _static(emitter: Emitter, node: Node, index: int, peak: float) -> Tensor:
    tensor = node.inputs[index]
    scale = numerics.activation_scale(peak, emitter.fmt, _dtype(tensor))
    return emitter.static(tensor, scale, node)


def _operand(site: Site) -> ConstantOperand:
    assert site.operand is not None  # placement quantizes nothing else but attentions
    return site.operand


def output_axis(site: Site) -> int:
    """Axis of the weight that runs over output channels."""
    if site.kind == "conv" or site.node.attrs.get("transB", 0):
        return 0
    return 1


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


def _quantize_attention(emitter: Emitter, site: Site, ranges: Ranges) -> None:
    """Q/DQ right at q, k, v and the probabilities: all four, or TensorRT fuses none."""
    attention = site.attention
    assert attention is not None
    scores, values = attention.scores, attention.values
    factor = emitter.scale_before_product(scores)
    for node, index in _measured_inputs(site):
        peak = ranges[id(node), index] * (factor if node is scores and index == 0 else 1.0)
        node.inputs[index] = _static(emitter, node, index, peak)
    values.inputs[0] = _static(emitter, values, 0, SOFTMAX_PEAK)


def _dtype(tensor: Tensor) -> Any:
    """The numpy (or ml_dtypes) type of an activation: its scales have the same."""
    dtype = tensor.dtype
    return numpy_dtype(dtype) if isinstance(dtype, int) else np.dtype(dtype)
