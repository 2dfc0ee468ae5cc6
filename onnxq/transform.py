"""The one loop over sites: weights to codes, activations behind Q/DQ. The caller of algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import numerics
from onnxq.algorithms import rtn
from onnxq.calibrate.table import CalibrationTable
from onnxq.errors import OnnxqError
from onnxq.formats import quant_format
from onnxq.graph.edit import Editor
from onnxq.graph.emit import Emitter
from onnxq.graph.model import Model
from onnxq.graph.query import Attention, ConstantOperand
from onnxq.graph.weights import array, numpy_dtype
from onnxq.placement import Decision, Placement, Site
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Edit

SOFTMAX_PEAK = 1.0
"""Probabilities need no calibration: the scale is 1/448."""


Ranges = dict[tuple[int, int], float]
"""(id(node), input index) -> magnitude the largest code stands for."""


def _static_inputs(placement: Placement) -> Iterator[tuple[gs.Node, int]]:
    """The inputs whose ranges a static recipe needs, in graph order."""
    for decision in placement.quantized:
        site = decision.site
        yield site.node, 0
        if site.attention is not None:
            yield site.node, 1
            yield site.attention.values, 1


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


def apply_placement(
    model: Model,
    placement: Placement,
    ranges: Ranges | None,
    progress: Progress = silent,
) -> list[Edit]:
    """Emit the Q/DQ of every quantized site; returns one Edit a site.

    Args:
        ranges: of `activation_ranges`; None for dynamic recipes.
    """
    editor = Editor(model)
    emitter = Emitter(editor, quant_format(placement.recipe.weights))
    edits = []
    done, total = 0, len(placement.quantized)
    for group in _groups(placement):
        try:
            _quantize_group(emitter, group, placement.recipe, ranges)
        except ValueError as error:
            names = ", ".join(repr(d.site.name) for d in group)
            raise OnnxqError(
                f"{names} cannot be quantized: {error}",
                "leave it with a rule: --rule 'leave node=...'",
            ) from error
        edits += [Edit("emit", "quantize", d.site.name, d.reason) for d in group]
        done += len(group)
        progress("quantizing", done, total)
    edits += [Edit("emit", "leave", d.site.name, d.reason) for d in placement.left]
    editor.finish()
    return edits


def _groups(placement: Placement) -> list[list[Decision]]:
    """Quantized sites, those that read one tensor together (q, k, v), in graph order."""
    groups: dict[tuple[int, str], list[Decision]] = {}
    for decision in placement.quantized:
        site = decision.site
        groups.setdefault((id(site.node.inputs[0]), site.kind), []).append(decision)
    return list(groups.values())


def _quantize_group(
    emitter: Emitter, group: list[Decision], recipe: Recipe, ranges: Ranges | None
) -> None:
    sites = [d.site for d in group]
    if sites[0].attention is not None:
        assert ranges is not None
        for site in sites:
            assert site.attention is not None
            _quantize_attention(emitter, site.attention, ranges)
        return
    dtype = _site_dtype(sites[0].node)
    axes = [None if recipe.weight_granularity == "tensor" else output_axis(s) for s in sites]
    # A common scale and its ratios are two 16-bit numbers; a scale that stands alone must fit one.
    shared = dtype.itemsize == 2
    scales = [
        rtn.scales(_operand(s).load(), emitter.fmt, axis, np.float32 if shared else dtype)
        for s, axis in zip(sites, axes, strict=True)
    ]
    common = numerics.common_scale(scales, dtype) if shared else None
    for site, axis, scale in zip(sites, axes, scales, strict=True):
        weight, ratio = emitter.weight(_operand(site), axis, scale, common, site.node)
        _quantize_product(emitter, site, weight, ratio, ranges)


def _quantize_product(
    emitter: Emitter, site: Site, weight: gs.Tensor, ratio: gs.Tensor | None, ranges: Ranges | None
) -> None:
    node, rank = site.node, len(_operand(site).shape)
    factors = [] if ratio is None else [ratio]
    if ranges is not None:
        node.inputs[0] = emitter.static(node.inputs[0], ranges[id(node), 0], node)
    else:
        axes = [-1] if site.kind == "linear" else list(range(1, rank))
        node.inputs[0], peak = emitter.dynamic(node.inputs[0], axes, node)
        factors.append(peak)
    node.inputs[1] = weight
    bias = _take_bias(emitter.editor, site, rank) if factors else None
    emitter.finish_product(node, factors, bias)


def _operand(site: Site) -> ConstantOperand:
    assert site.operand is not None  # placement quantizes nothing else but attentions
    return site.operand


def output_axis(site: Site) -> int:
    """Axis of the weight that runs over output channels."""
    if site.kind == "conv" or site.node.attrs.get("transB", 0):
        return 0
    return 1


def _take_bias(editor: Editor, site: Site, rank: int) -> gs.Tensor | None:
    """Remove the bias of a Gemm or Conv, shaped to be added behind the rescale."""
    node = site.node
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return None
    bias = node.inputs[2]
    del node.inputs[2]
    if site.kind == "linear":
        return bias
    shape = np.array([1, -1] + [1] * (rank - 2), np.int64)
    if isinstance(bias, gs.Constant):
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


def _quantize_attention(emitter: Emitter, attention: Attention, ranges: Ranges) -> None:
    """Q/DQ right at q, k, v and the probabilities: all four, or TensorRT fuses none."""
    scores, values = attention.scores, attention.values
    for node, index in ((scores, 0), (scores, 1), (values, 1)):
        peak = ranges[id(node), index]
        node.inputs[index] = emitter.static(node.inputs[index], peak, node)
    values.inputs[0] = emitter.static(values.inputs[0], SOFTMAX_PEAK, values)


def _site_dtype(node: gs.Node) -> Any:
    """The type of the node's activation: its scales have the same."""
    dtype = node.inputs[0].dtype
    return numpy_dtype(dtype) if isinstance(dtype, int) else np.dtype(dtype)
