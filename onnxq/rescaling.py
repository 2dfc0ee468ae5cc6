"""The rescale steps of a recipe: a factor per channel moves from what layers read to their weights.

Layers that read one tensor share its factors. They are folded into what makes the tensor, so that
no operator is added; where that cannot be done, or would gain nothing, the layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxq.algorithms import STEPS
from onnxq.algorithms.awq import search_channel_scales
from onnxq.base import in_16_bits
from onnxq.calibrate.rows import Rows
from onnxq.calibrate.statistics import ChannelAmax, Gram
from onnxq.calibrate.table import CalibrationTable
from onnxq.formats import QuantScheme
from onnxq.graph.edit import Editor
from onnxq.graph.fold import Fold, find_fold
from onnxq.graph.fold_readers import weights_of
from onnxq.graph.ir import Tensor
from onnxq.graph.model import Model
from onnxq.numerics import FloatArray
from onnxq.placement import Placement
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Edit
from onnxq.rounding import refuse_infinite, weight_matrix
from onnxq.sites import Site, current
from onnxq.smoothing import Fit, Weights, search_factors
from onnxq.threads import few, in_order
from onnxq.unfinished import Unfinished

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import Device

Found = tuple[FloatArray | None, str]
"""The factors of one input [channels], None where none are worth it; and why."""


def rescale(
    model: Model,
    placement: Placement,
    table: CalibrationTable,
    progress: Progress = silent,
    samples: Samples | None = None,
    device: Device = "auto",
    *,
    beside: Path | None = None,
    memory: int | None = None,
    unfinished: Unfinished | None = None,
) -> tuple[Placement, CalibrationTable, list[Edit]]:
    """Apply the rescale step of the placement's recipe, on the graph as it was calibrated.

    Args:
        samples: what a model in 16 bits computes on the way to its layers is measured on the
            largest, so that no factor makes it overflow. (What is in FP32 is measured when it is
            converted.)
        beside, memory: as `within.ranges_within` takes them.
        unfinished: where the factors found wait for a run that goes on after this one.

    Returns:
        The placement of the weights as they are now; the table, whose Gram matrices have followed
        and which has lost the ranges that have not; and an Edit for each input.
    """
    names = [name for name in placement.recipe.steps if STEPS[name][0] == "rescale"]
    if not names:
        return placement, table, []
    (name,) = names
    editor, edits = Editor(model), []
    groups, unfinished = _groups(placement), unfinished or Unfinished()
    run = partial(
        _peaks, beside=beside or model.path, memory=memory, device=device, progress=progress
    )
    peaks = run(model, groups, samples) if samples is not None else {}
    looked_at = _looked_at(groups)
    for done, (tensor, sites) in enumerate(groups, 1):
        next(looked_at)
        readers, explicit = [site.node for site in sites], placement.recipe.explicit
        fold = find_fold(model, tensor, readers, explicit=explicit and name == "smoothquant")
        if isinstance(fold, str):
            edits.append(Edit(name, "leave", tensor.name, fold))
        else:
            matrices = partial(_matrices, sites, placement.recipe)
            weights = Weights(_loudest(fold, sites), matrices)
            fit = _fitting(fold, table, peaks)
            search = partial(_SEARCHES[name], fold, weights, placement.recipe, table, fit)
            s, said = _kept(unfinished, f"{name} {tensor.name}", fold.size, search)
            edits.append(_applied(name, editor, fold, s, said))
            if s is not None:
                table = _followed(table, fold, s)
        progress("rescaling", done, len(groups))
    editor.finish()
    return placement.current(), table, edits


def summary(edits: Sequence[Edit]) -> dict[str, int]:
    """How many inputs were folded, how many got a Mul of their own, how many were left."""
    verbs = {"folded": "fold", "multiplied": "scale", "left": "leave"}
    return {word: sum(e.verb == verb for e in edits) for word, verb in verbs.items()}


def _groups(placement: Placement) -> list[tuple[Tensor, list[Site]]]:
    """Linear layers by the tensor they read, in graph order."""
    groups: dict[str, tuple[Tensor, list[Site]]] = {}
    for decision in placement.quantized:
        if decision.site.kind == "linear":
            tensor = decision.site.node.inputs[0]
            groups.setdefault(tensor.name, (tensor, []))[1].append(decision.site)
    return list(groups.values())


def _peaks(
    model: Model,
    groups: Sequence[tuple[Tensor, list[Site]]],
    samples: Samples,
    *,
    beside: Path,
    memory: int | None,
    device: Device,
    progress: Progress,
) -> dict[str, float]:
    """max |x| of the tensors that folds would divide, where the model computes in 16 bits."""
    from onnxq.calibrate.within import ranges_within

    if not in_16_bits(model):
        return {}
    folds = [find_fold(model, tensor, [s.node for s in sites]) for tensor, sites in groups]
    divided = {t.name for fold in folds if isinstance(fold, Fold) for t, _ in fold.scaled}
    if not divided:
        return {}
    return ranges_within(
        model,
        samples,
        only=divided,
        beside=beside,
        memory=memory,
        device=device,
        progress=progress,
    )


def _kept(unfinished: Unfinished, name: str, size: int, search: Callable[[], Found]) -> Found:
    """What the search finds, or found before it was stopped.

    Args:
        size: of the factors.
    """

    def arrays(found: Found) -> dict[str, FloatArray]:
        s, words = found[0], np.frombuffer(found[1].encode(), np.uint8)
        return {"said": words} if s is None else {"said": words, "s": s}

    def read(known: Mapping[str, FloatArray]) -> Found:
        s, said = known.get("s"), known["said"].tobytes().decode()
        if s is not None and not (s.shape == (size,) and (s > 0).all() and np.isfinite(s).all()):
            raise ValueError("no factors")
        return s, said

    return unfinished.part(f"factors {name}", search, arrays, read)


def _applied(name: str, editor: Editor, fold: Fold, s: FloatArray | None, said: str) -> Edit:
    """Fold the factors found for one input, if any is worth it."""
    if s is None:
        return Edit(name, "leave", fold.tensor.name, said)
    edit = fold.apply(editor, s)
    return Edit(name, edit.verb, edit.target, f"{said}; {edit.reason}")


def _looked_at(groups: Sequence[tuple[Tensor, list[Site]]]) -> Iterator[list[FloatArray]]:
    """The largest values of the weights of each group, ahead of it and by several threads.

    They are kept with the weights, where `Fold` finds them.
    """
    weights = [weights_of(tensor, [site.node for site in sites]) for tensor, sites in groups]
    return in_order(lambda each: [look() for look in each], weights, few())


def _loudest(fold: Fold, sites: Sequence[Site]) -> FloatArray:
    """max |w| that each channel meets in the weights of its layers [K].

    Raises:
        OnnxqError: a weight is not finite.
    """
    found = fold.loudest()
    for site, peaks in zip(sites, found, strict=True):
        refuse_infinite(current(site), peaks)
    return np.asarray(np.maximum.reduce(found))


def _matrices(sites: Sequence[Site], recipe: Recipe) -> list[tuple[FloatArray, QuantScheme]]:
    """W [K, N] of the layers that read one input, and how they will be stored."""
    return [weight_matrix(current(site), recipe) for site in sites]


def _fitting(fold: Fold, table: CalibrationTable, peaks: Mapping[str, float]) -> Fit:
    """What brings factors to within what 16 bits hold."""
    known: dict[str, FloatArray | float] = dict(peaks)
    for statistic in table.of(fold.tensor.name).values():
        if isinstance(statistic, ChannelAmax) and statistic.values is not None:
            known[fold.tensor.name] = statistic.values
    low, high = fold.bounds(base="fp16", peaks=known)

    def fit(s: FloatArray) -> FloatArray:
        s = fold.rounded(fold.shared(np.clip(s, low, high), how="max"), base="fp16")
        return np.clip(s, low, high)  # rounded it may be beyond by its last bit

    return fit


def _awq(fold: Fold, weights: Weights, recipe: Recipe, table: CalibrationTable, fit: Fit) -> Found:
    """The factors for one input, or none; and why."""
    gram = table.gram(fold.tensor.name)
    found, alpha = search_channel_scales(weights.matrices(), gram, fold.ties())
    if alpha == 0:
        return None, "no factor lowers the output error"
    return fit(found), f"alpha {alpha:.2f}"


_SEARCHES = {"awq": _awq, "smoothquant": search_factors}


def _followed(table: CalibrationTable, fold: Fold, s: FloatArray) -> CalibrationTable:
    """The table of the rescaled model: exact for Gram matrices; ranges must be measured again."""
    statistics = dict(table.statistics)
    changed = [(tensor.name, tensor.name, index) for tensor, index in fold.scaled]
    if fold.explicit:  # what the layers read is another tensor now
        new = fold.readers[0].inputs[0].name
        changed = [(fold.tensor.name, new, np.arange(fold.size))]
    for old, new, index in changed:
        factors = np.where(index < 0, 1.0, s[index]).reshape(-1)
        statistics[new] = {
            name: statistic.divided(factors)
            for name, statistic in table.statistics.get(old, {}).items()
            if isinstance(statistic, (Gram, Rows))
            or (isinstance(statistic, ChannelAmax) and _size(statistic) == factors.size)
        }
    return replace(table, statistics=statistics)


def _size(statistic: ChannelAmax) -> int:
    return 0 if statistic.values is None else statistic.values.size
