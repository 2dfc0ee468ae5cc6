"""The rescale steps of a recipe: a factor per channel moves from what layers read to their weights.

Layers that read one tensor share its factors. They are folded into what makes the tensor, so that
no operator is added; where that cannot be done, or would gain nothing, the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq.algorithms import STEPS
from onnxq.algorithms.awq import search_channel_scales
from onnxq.calibrate.statistics import Gram
from onnxq.calibrate.table import CalibrationTable
from onnxq.formats import PerTensor, QuantScheme
from onnxq.graph.edit import Editor
from onnxq.graph.fold import Fold, find_fold
from onnxq.graph.ir import Tensor
from onnxq.graph.model import Model
from onnxq.numerics import FloatArray
from onnxq.placement import Placement
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Edit
from onnxq.rounding import finite_peaks
from onnxq.schemes import granularity, summed_axis
from onnxq.sites import Site, current


def rescale(
    model: Model,
    placement: Placement,
    table: CalibrationTable,
    progress: Progress = silent,
) -> tuple[Placement, CalibrationTable, list[Edit]]:
    """Apply the rescale step of the placement's recipe, on the graph as it was calibrated.

    Returns:
        The placement of the weights as they are now; the table, whose Gram matrices have followed
        and which has lost the ranges that have not; and an Edit for each input.
    """
    names = [name for name in placement.recipe.steps if STEPS[name][0] == "rescale"]
    if not names:
        return placement, table, []
    (name,) = names
    editor, edits = Editor(model), []
    groups = _groups(placement)
    for done, (tensor, sites) in enumerate(groups, 1):
        fold = find_fold(model, tensor, [site.node for site in sites])
        if isinstance(fold, str):
            edits.append(Edit(name, "leave", tensor.name, fold))
        else:
            edit, s = _rescaled(name, editor, fold, sites, placement.recipe, table)
            edits.append(edit)
            if s is not None:
                table = _followed(table, fold, s)
        progress("rescaling", done, len(groups))
    editor.finish()
    return placement.current(), table, edits


def _groups(placement: Placement) -> list[tuple[Tensor, list[Site]]]:
    """Linear layers by the tensor they read, in graph order."""
    groups: dict[str, tuple[Tensor, list[Site]]] = {}
    for decision in placement.quantized:
        if decision.site.kind == "linear":
            tensor = decision.site.node.inputs[0]
            groups.setdefault(tensor.name, (tensor, []))[1].append(decision.site)
    return list(groups.values())


def _rescaled(
    name: str,
    editor: Editor,
    fold: Fold,
    sites: Sequence[Site],
    recipe: Recipe,
    table: CalibrationTable,
) -> tuple[Edit, FloatArray | None]:
    """Search the factors of one input, and fold them; None where none are worth it."""
    weights = [_weight(current(site), recipe) for site in sites]
    gram = table.gram(fold.tensor.name)
    found, alpha = search_channel_scales(weights, gram, _ties(fold))
    if alpha == 0:
        return Edit(name, "leave", fold.tensor.name, "no factor lowers the output error"), None
    low, high = fold.bounds(base="fp16")
    s = fold.shared(np.clip(found, low, high), how="max")
    edit = fold.apply(editor, s)
    return Edit(name, edit.verb, edit.target, f"alpha {alpha:.2f}; {edit.reason}"), s


def _weight(site: Site, recipe: Recipe) -> tuple[FloatArray, QuantScheme]:
    """W [K, N] and how it will be stored; its scales in FP32, which all others come near to."""
    assert site.operand is not None
    divided = granularity(site, recipe)
    assert divided is not None  # placement leaves what no block fits
    values = site.operand.load().astype(np.float32)
    finite_peaks(site, values, PerTensor())
    scheme = QuantScheme(recipe.weight_format, divided, "float32")
    return (values.T, scheme.transposed()) if summed_axis(site) == 1 else (values, scheme)


def _ties(fold: Fold) -> list[Any]:
    if fold.tie is None:
        return []
    return [np.flatnonzero(fold.tie == label) for label in np.unique(fold.tie)]


def _followed(table: CalibrationTable, fold: Fold, s: FloatArray) -> CalibrationTable:
    """The table of the rescaled model: exact for Gram matrices; ranges must be measured again."""
    statistics = dict(table.statistics)
    for tensor, index in fold.scaled:
        factors = np.where(index < 0, 1.0, s[index]).reshape(-1)
        statistics[tensor.name] = {
            name: statistic.divided(factors)
            for name, statistic in table.statistics.get(tensor.name, {}).items()
            if isinstance(statistic, Gram)
        }
    return replace(table, statistics=statistics)
