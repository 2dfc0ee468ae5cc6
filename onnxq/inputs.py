"""What layers read: the second moments that methods on their weights need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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

    Attributes:
        full: X^T X of the input in full precision.
        rounded: Y^T Y of the input behind rounded layers; `full` itself where none are before it.
        cross: Y^T X; likewise.
    """

    full: FloatArray
    rounded: FloatArray
    cross: FloatArray


class Inputs(Protocol):
    """Gives the moments of layers, in graph order, and hears what became of each."""

    independent: bool
    """Whether they do not depend on what became of other layers: asked for in any order."""

    def of(self, site: Site) -> Moments:
        """Of one linear layer; one object for those asked for in turn that read one tensor."""
        ...

    def rounded(self, site: Site, values: FloatArray) -> None:
        """What the layer's weight has become, laid out as the node sees it."""
        ...


class _LastOfThread(threading.local):
    """What a thread asked for last."""

    known: tuple[str, Moments] | None = None


class CalibratedInputs:
    """From a calibration table: every layer reads what it reads in full precision."""

    independent = True

    def __init__(self, placement: Placement, table: CalibrationTable) -> None:
        self._names, self._table = _input_names(placement), table
        self._last = _LastOfThread()

    def of(self, site: Site) -> Moments:
        name = self._names[id(site.node)]
        if self._last.known is None or self._last.known[0] != name:
            gram = self._table.gram(name)
            self._last.known = name, Moments(gram, gram, gram)
        return self._last.known[1]

    def rounded(self, site: Site, values: FloatArray) -> None:
        """Nothing follows from it."""


class SequentialInputs:
    """From the model run behind the layers that are rounded already."""

    independent = False

    def __init__(self, placement: Placement, staged: Staged) -> None:
        self._lock = threading.Lock()
        self._names, self._staged = _input_names(placement), staged
        self._weights: dict[int, tuple[ConstantOperand, Any]] = {
            id(d.site.node): (d.site.operand, numpy_dtype(constant_type(d.site.operand.constant)))
            for d in placement.quantized
            if d.site.operand is not None
        }
        self._last: tuple[str, Moments] | None = None

    def of(self, site: Site) -> Moments:
        name = self._names[id(site.node)]
        with self._lock:
            if self._last is None or self._last[0] != name:
                self._last = name, self._staged.moments(name)
            return self._last[1]

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
) -> Iterator[Inputs | None]:
    """What the steps of the placement's recipe look at; None where it rounds to nearest.

    To be opened before the base precision is converted, which renames tensors.

    Raises:
        OnnxqError: the recipe goes layer by layer, and there is only a table, no data.
    """
    steps = placement.recipe.steps
    if "sequential" in steps:
        from onnxq.calibrate.staged import Staged
        from onnxq.graph.segments import Segments

        if samples is None:
            raise OnnxqError(
                f"recipe {placement.recipe.name} runs the model layer by layer: a calibration "
                "table is not enough",
                "give the data too, with --calib or --text",
            )
        stops = list(dict.fromkeys(_input_names(placement).values()))
        known = partial(_summed, table)
        with Staged(Segments(model, stops), samples, device=device, known=known) as staged:
            yield SequentialInputs(placement, staged)
    elif placement.recipe.needs_grams:
        assert table is not None  # the steps are what it was made for
        yield CalibratedInputs(placement, table)
    else:
        yield None


def _summed(table: CalibrationTable | None, tensor: str) -> FloatArray | None:
    """The Gram matrix of a tensor, if a calibration has summed it up."""
    found = table.statistics.get(tensor, {}) if table is not None else {}
    return table.gram(tensor) if table is not None and "gram" in found else None


def _input_names(placement: Placement) -> dict[int, str]:
    """By id of each linear layer's node: the tensor it reads, in graph order."""
    return {
        id(d.site.node): d.site.node.inputs[0].name
        for d in placement.quantized
        if d.site.kind == "linear"
    }
