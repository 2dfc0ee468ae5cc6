"""What layers read: the second moments that methods on their weights need."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import numpy_dtype
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand
from onnxq.graph.weights import constant_type
from onnxq.layouts import Layout, layout_of
from onnxq.memory import available_memory
from onnxq.numerics import FloatArray
from onnxq.placement import Placement
from onnxq.sites import Site

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import Device
    from onnxq.calibrate.staged import Staged
    from onnxq.calibrate.table import CalibrationTable


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a layer's input, each [K, K], divided by the rows seen.

    Of a convolution in groups, those of one group.

    Attributes:
        full: X^T X of the input in full precision.
        rounded: Y^T Y of the input behind rounded layers; `full` itself where none are before it.
        cross: Y^T X; likewise.
        patches: whether they are those of a convolution, which sees hundreds of rows a sample.
        rows: how many they are of; 0: nobody counted, more than enough.
    """

    full: FloatArray
    rounded: FloatArray
    cross: FloatArray
    patches: bool = False
    rows: int = 0


Parts = tuple[Moments, ...]
"""Of a layer: one for each group of its inputs that makes outputs of its own."""

Reads = Mapping[int, tuple[str, Layout]]
"""By id of each layer's node: the tensor it reads, and how; in graph order."""


class Inputs(Protocol):
    """Gives the moments of layers, in graph order, and hears what became of each."""

    independent: bool
    """Whether they do not depend on what became of other layers: asked for in any order."""

    def of(self, site: Site) -> Parts:
        """Of one layer, a group each; the same objects for layers that read one tensor alike, where
        these are asked for in turn."""
        ...

    def rounded(self, site: Site, values: FloatArray) -> None:
        """What the layer's weight has become, laid out as the node sees it."""
        ...


class _LastOfThread(threading.local):
    """What a thread asked for last."""

    known: tuple[tuple[str, str], Parts] | None = None


class CalibratedInputs:
    """From a calibration table: every layer reads what it reads in full precision."""

    independent = True

    def __init__(self, reads: Reads, table: CalibrationTable) -> None:
        self._reads, self._table = reads, table
        self._last = _LastOfThread()

    def of(self, site: Site) -> Parts:
        tensor, layout = self._reads[id(site.node)]
        key = tensor, layout.statistic
        if self._last.known is None or self._last.known[0] != key:
            found = self._table.moments(tensor, layout.statistic)
            if found.shape != (layout.groups, layout.length, layout.length):
                raise OnnxqError(
                    f"the calibration table's Gram matrix of {tensor!r} is that of "
                    f"{found.shape[-1]} inputs, but {site.name!r} has {layout.length}",
                    "calibrate this model again",
                )
            patches, rows = layout.unfolding is not None, self._table.rows_seen(tensor)
            self._last.known = key, tuple(Moments(H, H, H, patches, rows) for H in found)
        return self._last.known[1]

    def rounded(self, site: Site, values: FloatArray) -> None:
        """Nothing follows from it."""


class SequentialInputs:
    """From the model run behind the layers that are rounded already."""

    independent = False

    def __init__(self, placement: Placement, reads: Reads, staged: Staged) -> None:
        self._lock = threading.Lock()
        self._reads, self._staged = reads, staged
        self._weights: dict[int, tuple[ConstantOperand, Any]] = {
            id(d.site.node): (d.site.operand, numpy_dtype(constant_type(d.site.operand.constant)))
            for d in placement.quantized
            if d.site.operand is not None
        }
        self._known: dict[str, dict[str, Parts]] = {}
        self._waiting = Counter(tensor for tensor, _ in reads.values())

    def of(self, site: Site) -> Parts:
        tensor, layout = self._reads[id(site.node)]
        with self._lock:
            if tensor not in self._known:
                self._known[tensor] = self._staged.moments(tensor)
            parts = self._known[tensor][layout.statistic]
            self._waiting[tensor] -= 1
            if self._waiting[tensor] <= 0:
                del self._known[tensor]
            return parts

    def rounded(self, site: Site, values: FloatArray) -> None:
        operand, dtype = self._weights[id(site.node)]
        if operand.permutation is not None:
            values = values.transpose(np.argsort(operand.permutation))
        with self._lock:
            self._staged.replace(operand.constant.name, values.astype(dtype))


@contextmanager
def layer_inputs(
    model: Model,
    placement: Placement,
    table: CalibrationTable | None,
    samples: Samples | None,
    device: Device,
    unsolved: Mapping[int, str],
) -> Iterator[Inputs | None]:
    """What the steps of the placement's recipe look at; None where it rounds to nearest.

    Args:
        unsolved: layers that no second-order method works on (see `unsolvable`).

    To be opened before the base precision is converted, which renames tensors.

    Raises:
        OnnxqError: the recipe goes layer by layer, and there is only a table, no data.
    """
    steps, reads = placement.recipe.steps, _reads(placement, unsolved)
    if "sequential" in steps:
        from onnxq.calibrate.staged import Staged
        from onnxq.graph.segments import Segments

        if samples is None:
            raise OnnxqError(
                f"recipe {placement.recipe.name} runs the model layer by layer: a calibration "
                "table is not enough",
                "give the data too, with --calib or --text",
            )
        forms: dict[str, dict[str, None]] = {}
        for tensor, layout in reads.values():
            forms.setdefault(tensor, {})[layout.statistic] = None
        segments, known = Segments(model, list(forms)), partial(_summed, table)
        with Staged(segments, samples, forms, device=device, known=known) as staged:
            yield SequentialInputs(placement, reads, staged)
    elif placement.recipe.needs_grams:
        assert table is not None  # the steps are what it was made for
        yield CalibratedInputs(reads, table)
    else:
        yield None


def unsolvable(placement: Placement, memory: int | None) -> dict[int, str]:
    """By id of its node: each layer that no second-order method works on, and why.

    Args:
        memory: bytes the process may take; None: what the machine has left.
    """
    room = available_memory() if memory is None else memory
    found = {}
    for decision in placement.quantized:
        site = decision.site
        if site.kind != "conv" or room is None:
            continue
        layout = layout_of(site)
        if 2 * layout.bytes_to_solve > room:
            found[id(site.node)] = (
                f"the second moments of its {layout.length} inputs take "
                f"{layout.bytes_to_solve / 1e9:.1f} GB to work with, more than half of the memory"
            )
    return found


def _summed(table: CalibrationTable | None, tensor: str, statistic: str) -> FloatArray | None:
    """The Gram matrices of a tensor, if a calibration has summed them up."""
    if table is None or statistic not in table.statistics.get(tensor, {}):
        return None
    return table.moments(tensor, statistic)


def _reads(placement: Placement, unsolved: Mapping[int, str]) -> dict[int, tuple[str, Layout]]:
    return {
        id(d.site.node): (d.site.node.inputs[0].name, layout_of(d.site))
        for d in placement.quantized
        if d.site.operand is not None and id(d.site.node) not in unsolved
    }
