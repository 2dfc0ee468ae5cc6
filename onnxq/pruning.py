"""Weights with zeros, put into a model: those a solver made, and the rest by magnitude alone.

By magnitude a weight is pruned when it is written, and nothing of it is kept before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np

from onnxq.algorithms.wanda import magnitude_scores
from onnxq.formats import PerTensor
from onnxq.graph.edit import Editor
from onnxq.graph.put import put_weight
from onnxq.graph.query import ConstantOperand
from onnxq.graph.weights import Constant, DerivedValues, constant_type
from onnxq.layouts import layout_of
from onnxq.numerics import FloatArray
from onnxq.placement import Placement
from onnxq.progress import Progress, silent
from onnxq.report import Edit
from onnxq.rounding import finite_peaks
from onnxq.sites import Site
from onnxq.solving import Solver
from onnxq.sparsity import Pattern
from onnxq.threads import in_order

Values = Callable[[], FloatArray]


def prune(
    editor: Editor, placement: Placement, solver: Solver | None, progress: Progress = silent
) -> list[Edit]:
    """Give every site of the placement a weight with zeros, in its own type.

    Args:
        solver: None where the recipe looks at nothing but the weights.

    Raises:
        OnnxqError: a weight is not finite.
    """
    pattern = placement.recipe.pattern
    assert pattern is not None
    edits: list[Edit] = []
    known: dict[tuple[Any, ...], Values] = {}
    sites = [decision.site for decision in placement.quantized]
    made = in_order(solver.pruned, sites, None if solver.ahead else 1) if solver else repeat(None)
    for done, (site, values) in enumerate(zip(sites, made, strict=False), 1):
        key = _identity(site)
        if solver is not None and values is None:
            edits.append(_instead(site, solver))
        known.setdefault(key, values or by_magnitude(site, pattern))
        put_weight(editor, site.node, 1, known[key])
        progress("pruning", done, len(sites))
    return edits


def thinned(placement: Placement, solver: Solver | None) -> tuple[Placement, list[Edit]]:
    """The placement with weights pruned by magnitude where the solver will not do it.

    The graph is not touched: the sites' operands are others, from which codes are made.
    """
    pattern = placement.recipe.pattern
    if pattern is None:
        return placement, []
    decisions, edits = [], []
    derived: dict[tuple[Any, ...], ConstantOperand] = {}
    for decision in placement.decisions:
        site = decision.site
        theirs = solver is not None and id(site.node) not in solver.unsolved
        if decision.quantized and site.operand is not None and not theirs:
            obstacle = pattern.obstacle(layout_of(site).channels)
            if obstacle:
                edits.append(Edit("sparsify", "leave", site.name, obstacle))
            else:
                if solver is not None:
                    edits.append(_instead(site, solver))
                key = _identity(site)
                derived[key] = derived.get(key) or _derived(site, pattern)
                decision = replace(decision, site=replace(site, operand=derived[key]))
        decisions.append(decision)
    return replace(placement, decisions=tuple(decisions)), edits


def by_magnitude(site: Site, pattern: Pattern) -> Values:
    """Gives the weight, as the node sees it, without its smallest values."""

    def values() -> FloatArray:
        assert site.operand is not None
        found = site.operand.load()
        finite_peaks(site, found, PerTensor())
        layout = layout_of(site)
        matrix = layout.matrix(found)
        kept = np.where(pattern.mask(magnitude_scores(matrix)), matrix, found.dtype.type(0))
        return np.asarray(layout.weight(kept))

    return values


def _identity(site: Site) -> tuple[Any, ...]:
    assert site.operand is not None
    return id(site.operand.constant), site.operand.permutation


def _derived(site: Site, pattern: Pattern) -> ConstantOperand:
    operand = site.operand
    assert operand is not None
    name, kind = operand.constant.name, constant_type(operand.constant)
    values = DerivedValues(name, kind, operand.shape, by_magnitude(site, pattern))
    return ConstantOperand(Constant(name, values), None, ())


def _instead(site: Site, solver: Solver) -> Edit:
    return Edit("sparsify", "magnitude", site.name, solver.unsolved[id(site.node)])
