"""Weights to codes: what the layers that read one tensor store, each in the form that compiles.

8 bits      one unit in DequantizeLinear for all of them, each channel's share behind the product
            (in 16 bits; an FP32 graph has a scale a channel in DequantizeLinear)
alone       a scale a channel or a block in DequantizeLinear; the activations stay as they are
W4A8        blocks of 4 bits, expanded to 8 bits under one unit; of each channel a power of two
            goes behind the product, so that every channel fills the 8 bits
NVFP4, MX   a scale a block, and the tensor's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.formats import PerBlock, PerTensor, QuantFormat, QuantScheme
from onnxq.graph.emit_weight import CodedWeight
from onnxq.recipe import Recipe
from onnxq.rounding import Array, Nearest, Rounded, Rounding
from onnxq.schemes import granularity
from onnxq.sites import Site

_MOST_SHARED = 32.0
"""A float is as exact under a larger scale, while enough exponents are left: 10 of FP8's 15."""


class Coder:
    """Codes weights under one recipe; the same object for layers that use a weight alike."""

    def __init__(self, recipe: Recipe, rounding: Rounding | None = None) -> None:
        self.recipe, self.nearest = recipe, Nearest()
        self.rounding = rounding or self.nearest
        self._known: dict[tuple[Rounded, Any], CodedWeight] = {}

    def code(self, sites: Sequence[Site], dtype: Any) -> list[CodedWeight]:
        """The weights of layers that read one tensor.

        Args:
            dtype: the type of that tensor.

        Raises:
            OnnxqError: a weight is not finite.
        """
        fmt, activations = self.recipe.weight_format, self.recipe.activation_format
        if fmt.block or activations is None:
            return self._alone(sites, fmt.scale_type or dtype.name)
        if fmt is activations:
            return self._eight_bits(sites, dtype)
        return self._expanded(sites, activations, dtype)

    def _alone(self, sites: Sequence[Site], scale_type: str) -> list[CodedWeight]:
        rounded = self.rounding([(site, self._scheme(site, scale_type)) for site in sites])
        return [self._once(r, None, _stored(r)) for r in rounded]

    def _eight_bits(self, sites: Sequence[Site], dtype: Any) -> list[CodedWeight]:
        """The compiler makes one product of them, with one scale."""
        schemes = [self._scheme(site, "float32") for site in sites]
        behind = False
        if self.recipe.weight_format.is_float and all(
            scheme.granularity == PerTensor() for scheme in schemes
        ):
            self.nearest.share(sites, PerTensor(), _MOST_SHARED)
        if dtype.itemsize == 2:
            scales = [
                numerics.scales_for(self.nearest.peaks(site, scheme.granularity), scheme)
                for site, scheme in zip(sites, schemes, strict=True)
            ]
            schemes = [replace(scheme, scale_type=dtype.name) for scheme in schemes]
            behind = not _have_one(scales, dtype)
            if behind:
                unit = numerics.common_scale(scales, dtype)
                schemes = [scheme.with_unit(unit) for scheme in schemes]
        found = []
        jobs = list(zip(sites, schemes, strict=True))
        for site, scheme in jobs:
            self.nearest.peaks(site, scheme.granularity)
        for (_, scheme), rounded in zip(jobs, self.rounding(jobs), strict=True):
            coded = replace(_stored(rounded), scale=rounded.scale())
            if behind:
                unit_scale = np.array(scheme.unit).astype(dtype)
                coded = replace(
                    coded, granularity=PerTensor(), scale=unit_scale, behind=coded.scale
                )
            found.append(self._once(rounded, behind, coded))
        return found

    def _expanded(
        self, sites: Sequence[Site], activations: QuantFormat, dtype: Any
    ) -> list[CodedWeight]:
        """4 bits, and the 8 bits that are multiplied.

        The unit and each channel's share are powers of two: the scales of the blocks are the same
        but for their exponents, and the compiler's product with 1 / unit is a division.
        """
        rounded = self.rounding([(site, self._scheme(site, dtype.name)) for site in sites])
        wanted = [_channel_scales(r, activations) for r in rounded]
        unit = numerics.common_scale(wanted, dtype)
        found = []
        for r, scale in zip(rounded, wanted, strict=True):
            share = np.exp2(np.ceil(np.log2(scale / unit)))
            coded = replace(
                _stored(r),
                scale=_divided(r, share),
                behind=None if (share == 1).all() else np.ravel(share).astype(dtype),
                expanded=(activations, np.array(unit).astype(dtype)),
            )
            found.append(self._once(r, unit, coded))
        return found

    def _scheme(self, site: Site, scale_type: str) -> QuantScheme:
        divided = granularity(site, self.recipe)
        assert divided is not None  # placement leaves what no block fits
        return QuantScheme(self.recipe.weight_format, divided, scale_type)

    def _once(self, rounded: Rounded, form: Any, coded: CodedWeight) -> CodedWeight:
        return self._known.setdefault((rounded, form), coded)


def _stored(rounded: Rounded) -> CodedWeight:
    scheme = rounded.scheme
    return CodedWeight(
        scheme.format,
        scheme.granularity,
        scheme.scale_type,
        rounded.codes,
        rounded.scale,
        rounded.unit,
        rounded.zero,
    )


def _have_one(scales: Sequence[Array], dtype: Any) -> bool:
    """Whether the weights have one scale between them, which DequantizeLinear can then have."""
    one = all(s.ndim == 0 and s == scales[0] for s in scales)
    return one and bool(scales[0] >= numerics.smallest_normal(dtype))


def _channel_scales(rounded: Rounded, activations: QuantFormat) -> Array:
    """The scale under which all codes of a channel fit 8 bits: [1, N] or [N, 1], in double."""
    fmt, divided = rounded.scheme.format, rounded.scheme.granularity
    assert isinstance(divided, PerBlock)
    largest = rounded.scale().astype(np.float64).max(axis=divided.axis, keepdims=True)
    return np.asarray(largest * max(fmt.qmax, -fmt.qmin) / activations.qmax)


def _divided(rounded: Rounded, share: Array) -> Any:
    def scale() -> Array:
        found = rounded.scale()
        return np.asarray((found.astype(np.float32) / share).astype(found.dtype))

    return scale
