"""Move a factor per channel from the input of layers into what makes it: x / s there, s * W here.

Smoothing (SmoothQuant, AWQ) divides an activation by s and multiplies the weights that read it by
s. The product is the same, and no operator is added where the division can be done once and for
all in constants before: in a norm's gain, the columns of the weight before, a factor.

find_fold(model, tensor, readers) -> Fold.apply(editor, s)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxq.errors import OnnxqError
from onnxq.graph import absorb_layout as _layout  # noqa: F401  registers its rules
from onnxq.graph.absorb import Absorber, Index, Part, StopError, Trace
from onnxq.graph.dtypes import numpy_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.fold_range import TYPES, Half, half_type, is_offset, narrow
from onnxq.graph.fold_readers import read_by
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand, constant_operand, label, type_number
from onnxq.graph.rescale import largest, rescale
from onnxq.products import Factors
from onnxq.report import Edit


@dataclass(frozen=True, eq=False)
class Fold:
    """How the input of some layers can be divided by s, and their weights multiplied by it.

    Attributes:
        tensor: the input.
        readers: the layers, all that read it.
        size: K, the length of s.
        parts: the constants before that are divided; none if `explicit`.
        weights: the readers' weights, which are multiplied.
        tie: a label per channel, where channels of equal labels must share a value (query heads
            that share a head of v); None where none must.
        scaled: the tensors whose values change, `tensor` first, and their indices: each value is
            divided by s[index], -1 by nothing; aligned with the last axes.
        explicit: a Mul is put before the readers, because nothing before can take the factor.
        reason: what takes the factor; for an explicit fold, why nothing else does.
    """

    tensor: gs.Tensor
    readers: tuple[gs.Node, ...]
    size: int
    parts: tuple[Part, ...]
    weights: tuple[Part, ...]
    tie: NDArray[np.int64] | None = None
    scaled: tuple[tuple[gs.Tensor, Index], ...] = ()
    explicit: bool = False
    reason: str = ""
    _axes: int = field(default=1, repr=False)

    def shared(
        self, s: NDArray[np.floating], how: Literal["geometric", "max"] = "geometric"
    ) -> Factors:
        """s with one value for all channels that must share it: their mean or their largest."""
        values = np.asarray(s, np.float64)
        if self.tie is None:
            return values
        if how == "max":
            best = np.zeros(self.tie.max() + 1)
            np.maximum.at(best, self.tie, values)
            return best[self.tie]
        counts = np.bincount(self.tie)
        means = np.exp(np.bincount(self.tie, np.log(values)) / counts)
        alone = counts[self.tie] == 1  # as it was, to the bit
        return np.where(alone, values, means[self.tie])

    def ties(self) -> list[NDArray[np.int64]]:
        """The channels of each value that several share."""
        if self.tie is None:
            return []
        return [np.flatnonzero(self.tie == label) for label in np.unique(self.tie)]

    def bounds(
        self,
        base: Half | None = None,
        peaks: Mapping[str, NDArray[np.floating] | float] | None = None,
    ) -> tuple[Factors, Factors]:
        """The least and the largest s per channel that 16 bits hold; 1 is always within.

        Too small or too large an s makes a value overflow, or moves all of a channel into the
        subnormal numbers, whose rounding error then exceeds that of the channel's largest value.
        Weights are read for it, one at a time.

        Args:
            base: the 16-bit type the model is going to be converted to; tensors and constants
                that have a 16-bit type keep theirs.
            peaks: max |x| of tensors in `scaled`, by name: one number, or an array like the index
                there. Without them activations set no bounds.

        Returns:
            Two arrays [K]; all 0 and all infinity for FP32.
        """
        low, high = np.zeros(self.size), np.full(self.size, np.inf)
        for part in (*self.parts, *self.weights):
            operand = self._operand(part)
            half = half_type(operand.constant, base)
            if half is None:
                continue
            peak = largest(operand, part.index, self.size)
            narrow(low, high, peak, half, part.multiply, additive=is_offset(part))
        for tensor, index in self.scaled:
            half = half_type(tensor, base)
            if half is not None and peaks is not None and tensor.name in peaks:
                given = np.broadcast_to(np.asarray(peaks[tensor.name], np.float64), index.shape)
                peak = np.zeros(self.size + 1)
                np.maximum.at(peak, index.reshape(-1), given.reshape(-1))
                one = np.ndim(peaks[tensor.name]) == 0
                narrow(low, high, peak[:-1], half, multiply=False, additive=one)
        if self.tie is not None:
            least, most = np.zeros(self.tie.max() + 1), np.full(self.tie.max() + 1, np.inf)
            np.maximum.at(least, self.tie, low)
            np.minimum.at(most, self.tie, high)
            low, high = least[self.tie], most[self.tie]
        return low, high

    def loudest(self) -> list[Factors]:
        """max |w| that each channel meets, of each reader's weight: [K]; NaN where one is NaN."""
        return [largest(self._operand(p), p.index, self.size) for p in self.weights]

    def _operand(self, part: Part) -> ConstantOperand:
        operand = constant_operand(part.node, part.input)
        if operand is None:
            raise _stale(self, "a weight is none any more")
        return operand

    def rounded(self, s: NDArray[np.floating], base: Half | None = None) -> Factors:
        """s, changed by its last bits so that a gain divided by it is a 16-bit number.

        Rounding gain / s errs alike for every token; W * s is rounded value by value anyway, and
        takes the difference. `apply` does it for gains that are in 16 bits already.

        Args:
            base: the 16-bit type the model is going to be converted to.
        """
        values = np.array(s, np.float64)
        gains = [p for p in self.parts if not is_offset(p) and self._is_gain(p)]
        if len(gains) != 1 or self.tie is not None:
            return values
        operand = constant_operand(gains[0].node, gains[0].input)
        half = half_type(operand.constant, base) if operand is not None else None
        if operand is None or half is None:
            return values
        index = gains[0].index
        gain = np.broadcast_to(operand.load().astype(np.float64), index.shape)
        power = 1 if gains[0].multiply else -1
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            near = (gain * values[index] ** power).astype(TYPES[half]).astype(np.float64)
            found = (near / gain) ** power
        good = np.isfinite(found) & (found > 0)
        values[index[good]] = found[good]
        return values

    def _is_gain(self, part: Part) -> bool:
        """Whether a part is a vector of one value per channel."""
        return (
            part.index.size == self.size
            and np.array_equal(np.sort(part.index, axis=None), np.arange(self.size))
            and part.node.op not in ("MatMul", "Gemm", "Conv", "ConvTranspose")
        )

    def apply(self, editor: Editor, s: NDArray[np.floating]) -> Edit:
        """Divide what comes before by s, and multiply the readers' weights by it.

        What takes s is looked up anew: other folds may have come between. Constants that others
        read too are copied; weights are computed when they are read or written.

        Raises:
            OnnxqError: s does not fit, a 16-bit constant cannot hold the result, or nothing can
                take s any more: a weight has been quantized since. Nothing is changed then.
        """
        now = find_fold(editor.model, self.tensor, self.readers, explicit=self.explicit)
        if isinstance(now, str):
            raise _stale(self, now)
        return now._apply(editor, now._checked(s))

    def _apply(self, editor: Editor, s: Factors) -> Edit:
        low, high = self.bounds()
        if ((s < low) | (s > high)).any():
            at = int(np.argmax((s < low) | (s > high)))
            raise OnnxqError(
                f"{self.tensor.name!r}: channel {at} cannot be rescaled by {s[at]:.3g}, only by "
                f"{low[at]:.3g} to {high[at]:.3g} in 16 bits",
                "keep s within Fold.bounds",
            )
        s = self._put_mul(editor, s) if self.explicit else self.rounded(s)
        copies = [rescale(editor, p.node, p.input, _factor(p, s)) for p in self.parts]
        copies += [rescale(editor, p.node, p.input, _factor(p, s)) for p in self.weights]
        made = [c for c in copies if c]
        copied = f"; copied, since others read them: {', '.join(made)}" if made else ""
        verb = "scale" if self.explicit else "fold"
        extent = f"s {s.min():.3g} to {s.max():.3g}, {len(self.readers)} readers"
        return Edit("rescale", verb, self.tensor.name, f"{self.reason}; {extent}{copied}")

    def _checked(self, s: NDArray[np.floating]) -> Factors:
        values = np.asarray(s, np.float64)
        if values.shape != (self.size,):
            raise OnnxqError(
                f"{self.tensor.name!r} has {self.size} channels, s has the shape {values.shape}"
            )
        if not (np.isfinite(values) & (values > 0)).all():
            raise OnnxqError(
                f"the factors of {self.tensor.name!r} are not all finite and positive",
                "do its statistics hold NaN or infinity?",
            )
        if self.tie is not None and not np.array_equal(self.shared(values, "max"), values):
            raise OnnxqError(
                f"channels of {self.tensor.name!r} that share a head have different factors",
                "take Fold.shared(s)",
            )
        return values

    def _put_mul(self, editor: Editor, s: Factors) -> Factors:
        """Put a Mul before the readers; s as its constant, rounded, really divides."""
        dtype = numpy_dtype(type_number(self.tensor))
        inverse = (1 / s).astype(dtype)
        shaped = inverse.reshape(-1, *(1,) * (self._axes - 1))
        constant = editor.constant(f"{self.tensor.name}_smoothing", shaped)
        name = f"{self.tensor.name}_smoothed"
        out = editor.node(
            "Mul",
            name,
            [self.tensor, constant],
            name,
            self.tensor.dtype,
            self.tensor.shape,
            like=self.readers[0],
        )
        for reader in self.readers:
            editor.replace_input(reader, 0, out)
        return 1 / inverse.astype(np.float64)


def find_fold(
    model: Model, tensor: gs.Tensor, readers: Sequence[gs.Node], *, explicit: bool = False
) -> Fold | str:
    """How `tensor` can be divided by a factor per channel before the layers that read it.

    Args:
        model: prepared; before its weights are quantized.
        readers: the layers (MatMul, Gemm, Conv) that read it as their first operand, all of them;
            channels are the last axis, of a Conv's input axis 1.
        explicit: where no constant before can take the factor, put a Mul before the readers.

    Returns:
        A Fold, or the reason why there is none.
    """
    try:
        weights, index, size = read_by(tensor, readers)
    except StopError as stop:
        return str(stop)
    try:
        walk = Absorber(model)
        walk.dims.assume(tensor, index.ndim, size)
        trace = walk.tensor(tensor, index, readers)
        tie = _labels(trace, size)
    except StopError as stop:
        if not explicit:
            return str(stop)
        return Fold(
            tensor,
            tuple(readers),
            size,
            (),
            weights,
            explicit=True,
            reason=f"a Mul before the readers: {stop}",
            _axes=index.ndim,
        )
    return Fold(
        tensor,
        tuple(readers),
        size,
        tuple(trace.parts),
        weights,
        tie,
        tuple(trace.scaled),
        reason=_into(trace),
        _axes=index.ndim,
    )


def _labels(trace: Trace, size: int) -> NDArray[np.int64] | None:
    """A label per channel, equal for those that must share a value."""
    pairs = [np.stack(np.broadcast_arrays(a, b)).reshape(2, -1) for a, b in trace.ties]
    pairs = [p[:, (p >= 0).all(0) & (p[0] != p[1])] for p in pairs]
    if not sum(p.shape[1] for p in pairs):
        return None
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _into(trace: Trace) -> str:
    """What takes the factor, in words."""
    by_node: dict[str, list[str]] = {}
    for part in trace.parts:
        operand = constant_operand(part.node, part.input)
        name = operand.constant.name if operand is not None else "?"
        by_node.setdefault(f"{part.node.op} {label(part.node)!r}", []).append(name)
    return "into " + ", ".join(f"{' and '.join(v)} of {k}" for k, v in by_node.items())


def _factor(part: Part, s: Factors) -> Factors:
    extended = np.append(s, 1.0)  # -1 takes the last
    values = extended[part.index]
    return values if part.multiply else 1 / values


def _stale(fold: Fold, reason: str) -> OnnxqError:
    return OnnxqError(
        f"{fold.tensor.name!r} can no longer be rescaled: {reason}",
        "rescale before weights are quantized, and find folds anew after other changes",
    )
