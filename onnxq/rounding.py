"""One weight under one scheme -> its codes and scales. Nothing is computed before it is needed.

Rounding to nearest reads a weight when it is written and keeps nothing of it, so that its memory
does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onnxq import numerics
from onnxq.errors import OnnxqError
from onnxq.formats import Granularity, PerBlock, PerChannel, PerTensor, QuantScheme
from onnxq.graph.query import ConstantOperand
from onnxq.graph.scaling import peaks
from onnxq.numerics import scale_shape
from onnxq.recipe import Recipe
from onnxq.schemes import granularity, summed_axis
from onnxq.sites import Site

Array = numerics.FloatArray


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight's codes and scales; the same object for layers that share both.

    Attributes:
        codes: gives them, laid out as the node sees the weight.
        scale: gives the scales that are stored, shaped as the scheme says.
        unit: gives the scale of the tensor, of formats of two levels.
        zero: gives the zero points, shaped like the scales, of asymmetric formats.
    """

    scheme: QuantScheme
    codes: Callable[[], Array]
    scale: Callable[[], Array]
    unit: Callable[[], Array] | None = None
    zero: Callable[[], Array] | None = None


class Rounding(Protocol):
    """A method of rounding. The unit of a two-level scheme is its own to choose."""

    ahead: bool
    """Whether weights can be rounded before those that come before them, by several threads."""

    def __call__(self, jobs: Sequence[tuple[Site, QuantScheme]]) -> list[Rounded]:
        """The weights of layers that read one tensor."""
        ...


class Nearest:
    """Round to nearest: the largest magnitude under each scale becomes the largest code."""

    ahead = True

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Rounded] = {}
        self._peaks: dict[tuple[Any, ...], Array] = {}

    def __call__(self, jobs: Sequence[tuple[Site, QuantScheme]]) -> list[Rounded]:
        return [self.one(*job) for job in jobs]

    def one(self, site: Site, scheme: QuantScheme) -> Rounded:
        """One of them."""
        key = (*_identity(site), scheme)
        if key not in self._known:
            peak = self._peaks.get((*_identity(site), scheme.granularity))
            self._known[key] = _rounded(site, scheme, peak)
        return self._known[key]

    def peaks(self, site: Site, granularity: Granularity) -> Array:
        """Largest magnitude under each scale, kept: for the few scales of 8 bits.

        Raises:
            OnnxqError: the weight is not finite.
        """
        key = (*_identity(site), granularity)
        if key not in self._peaks:
            self._peaks[key] = _read_peaks(site, granularity)
        return self._peaks[key]

    def share(self, sites: Sequence[Site], granularity: Granularity, most: float) -> None:
        """Give several weights one scale: that of the largest magnitude in any of them.

        Args:
            most: how many times its own largest magnitude that may be, for all of them or none.
        """
        found = [self.peaks(site, granularity) for site in sites]
        largest = np.max(found, axis=0)
        if (largest > most * np.min(found, axis=0)).any():
            return
        for site in sites:
            self._peaks[(*_identity(site), granularity)] = largest


def _rounded(site: Site, scheme: QuantScheme, peak: Array | None) -> Rounded:
    if not scheme.format.symmetric:
        uneven = _Uneven(site, scheme)
        return Rounded(scheme, uneven.codes, uneven.scale, zero=uneven.zero)
    weight = _Weight(site, scheme, peak)
    unit = weight.unit if scheme.format.two_level else None
    return Rounded(scheme, weight.codes, weight.scale, unit)


class _Uneven:
    """Codes with zero points: what is between the least and the largest value of a block."""

    def __init__(self, site: Site, scheme: QuantScheme) -> None:
        self.site, self.scheme = site, scheme

    def codes(self) -> Array:
        values, scale, zero = self._found()
        return numerics.quantize(values, scale, self.scheme, zero)

    def scale(self) -> Array:
        return self._found()[1]

    def zero(self) -> Array:
        return self._found()[2]

    def _found(self) -> tuple[Array, Array, Array]:
        values = _operand(self.site).load()
        finite_peaks(self.site, values, PerTensor())
        low, high = numerics.extremes(values, self.scheme.granularity)
        return values, *numerics.scales_and_zeros(low, high, self.scheme)


class _Weight:
    """Reads the weight once for both: the scales found with the codes wait until they are asked."""

    def __init__(self, site: Site, scheme: QuantScheme, peak: Array | None) -> None:
        self.site, self.scheme, self.peak = site, scheme, peak
        self._found: QuantScheme | None = None
        self._scale: Array | None = None

    def codes(self) -> Array:
        values = _operand(self.site).load()
        self._scale, self._found = self._scales(values)
        return numerics.quantize(values, self._scale, self._found)

    def scale(self) -> Array:
        scale, self._scale = self._scale, None
        return self._scales()[0] if scale is None else scale

    def unit(self) -> Array:
        scheme = self._found or self._scales()[1]
        return np.array(scheme.unit, np.float32)

    def _scales(self, values: Array | None = None) -> tuple[Array, QuantScheme]:
        """Read from the values, if they are not at hand, where no peak is known."""
        scheme, peak = self.scheme, self.peak
        if peak is None:
            values = _operand(self.site).load() if values is None else values
            peak = finite_peaks(self.site, values, scheme.granularity)
        if scheme.format.two_level:
            unit = numerics.tensor_unit(float(peak.max(initial=0)), scheme.format)
            scheme = scheme.with_unit(unit)
        try:
            return numerics.scales_for(peak, scheme), scheme
        except numerics.ScaleRangeError as error:
            raise without_scales(self.site, error) from None


def without_scales(site: Site, error: Exception) -> OnnxqError:
    """What to say of a weight whose scales do not fit their type."""
    return OnnxqError(
        f"weight {site.weight_name!r} of {site.name!r}: {error}",
        f"leave the layer: --rule 'leave weight={site.weight_name}'",
    )


def weight_matrix(site: Site, recipe: Recipe) -> tuple[Array, QuantScheme]:
    """W [K, N] and how it will be stored; its scales in FP32, which all others come near to."""
    assert site.operand is not None
    divided = granularity(site, recipe)
    assert divided is not None  # placement leaves what no block fits
    values = site.operand.load().astype(np.float32)
    finite_peaks(site, values, PerTensor())
    scheme = QuantScheme(recipe.weight_format, divided, "float32")
    return (values.T, scheme.transposed()) if summed_axis(site) == 1 else (values, scheme)


def finite_peaks(site: Site, values: Array, granularity: Granularity) -> Array:
    """Largest magnitude under each scale of the weight of `site`.

    Raises:
        OnnxqError: there are NaN or infinite values.
    """
    peak = numerics.peaks(values, granularity)
    refuse_infinite(site, peak)
    return peak


def refuse_infinite(site: Site, peak: Array) -> None:
    """Refuse a weight with NaN or infinite values.

    Args:
        peak: its largest magnitudes.

    Raises:
        OnnxqError: one of them is not finite.
    """
    if not np.isfinite(peak).all():
        raise OnnxqError(
            f"weight {site.weight_name!r} of {site.name!r} holds NaN or infinite values",
            f"export a sound model, or leave the layer: --rule 'leave weight={site.weight_name}'",
        )


def _read_peaks(site: Site, granularity: Granularity) -> Array:
    """As `finite_peaks`, of the weight as it is stored; what is known of it is not read again."""
    operand = _operand(site)
    if isinstance(granularity, PerBlock):
        return finite_peaks(site, operand.load(), granularity)
    rank = len(operand.shape)
    axis = granularity.axis % rank if isinstance(granularity, PerChannel) else -1
    with np.errstate(over="ignore"):
        found = peaks(operand, tuple(i == axis for i in range(rank))).astype(np.float32)
    refuse_infinite(site, found)
    return found.reshape(scale_shape(operand.shape, granularity))


def _identity(site: Site) -> tuple[Any, ...]:
    operand = _operand(site)
    return id(operand.constant), operand.permutation


def _operand(site: Site) -> ConstantOperand:
    assert site.operand is not None  # placement quantizes nothing else but attentions
    return site.operand
