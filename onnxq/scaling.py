"""Scales of one weight [K, N], and zero points where its format has them: plain, and searched."""

from __future__ import annotations

from onnxq import numerics
from onnxq.algorithms.search import search_ranges, search_scales, within
from onnxq.formats import QuantScheme
from onnxq.rounding import Array, without_scales
from onnxq.sites import Site


def scales_of(site: Site, values: Array, scheme: QuantScheme) -> tuple[Array, Array | None]:
    """The scales that the largest values ask for, and the zero points of asymmetric formats."""
    try:
        if scheme.format.symmetric:
            peak = numerics.peaks(values, scheme.granularity)
            if scheme.format.two_level:  # whose unit was chosen before a step moved the weights
                peak = within(peak, scheme)
            return numerics.scales_for(peak, scheme), None
        return numerics.scales_and_zeros(*numerics.extremes(values, scheme.granularity), scheme)
    except numerics.ScaleRangeError as error:
        raise without_scales(site, error) from None


def searched(values: Array, h: Array, scheme: QuantScheme) -> tuple[Array, Array | None]:
    """The same, searched."""
    if scheme.format.symmetric:
        return search_scales(values, h, numerics.peaks(values, scheme.granularity), scheme), None
    return search_ranges(values, h, *numerics.extremes(values, scheme.granularity), scheme)


def spread(
    scale: Array, zero: Array | None, scheme: QuantScheme, shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """What a code of each element is worth, and its zero point."""
    step = numerics.steps(scale, scheme, shape)
    return step, None if zero is None else numerics.zeros(zero, scheme, shape)
