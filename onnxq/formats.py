"""The quantized formats, one row each. What they do lives in `numerics`, not in branches on names.

Source: ONNX operators QuantizeLinear / DequantizeLinear (opset 19: FP8 and 16-bit scales,
21: INT4 and blocks, 23: FP4); OFP8 E4M3 (arXiv:2209.05433) with 448 as its largest value; OCP
Microscaling Formats v1.0 (E2M1, MXFP8 and its E8M0 scales); NVFP4 as TensorRT documents it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from onnxq.errors import OnnxqError

_BLOCKS_FROM = 21  # the opset whose Q/DQ take a scale a block


@dataclass(frozen=True)
class QuantFormat:
    """A row.

    Attributes:
        name: what recipes call it.
        onnx_type: name of the TensorProto.DataType it is stored in.
        numpy_dtype: name of the numpy or ml_dtypes dtype with the same values.
        bits: bits an element takes.
        qmin: the least code used.
        qmax: the largest, and the magnitude amax maps to.
        min_opset: first opset whose Q/DQ have the type with 16-bit scales.
        block: elements under one scale where the format fixes that; 0: the recipe says.
        scale_type: dtype of the scales where the format fixes that; '': that of the activations.
    """

    name: str
    onnx_type: str
    numpy_dtype: str
    bits: int
    qmin: float
    qmax: float
    min_opset: int
    block: int = 0
    scale_type: str = ""

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers (rounding is then relative)."""
        return self.numpy_dtype.startswith("float")

    @property
    def symmetric(self) -> bool:
        """Whether zero is code 0; else every scale has a zero point."""
        return self.qmin < 0

    @property
    def two_level(self) -> bool:
        """Whether its narrow scales are themselves multiples of one scale of the tensor."""
        return self.scale_type == "float8_e4m3fn"

    def dtype(self) -> Any:
        """The numpy dtype of the codes; those of 4 bits take a byte each until they are written."""
        return dtype_named(self.numpy_dtype)


@dataclass(frozen=True)
class PerTensor:
    """One scale."""


@dataclass(frozen=True)
class PerChannel:
    """A scale for each index along `axis`."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """A scale for each run of `size` elements along `axis`; the last run may be shorter."""

    axis: int
    size: int


Granularity = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True)
class QuantScheme:
    """How a tensor is stored: codes of a format, each worth `unit` times its scale.

    Attributes:
        scale_type: dtype of the scales that are stored.
        unit: a factor all scales share, fixed before they are chosen: the scale of the tensor in
            NVFP4, the power of two that layers of one input share in 8 bits; else 1.
    """

    format: QuantFormat
    granularity: Granularity
    scale_type: str
    unit: float = 1.0

    @property
    def min_opset(self) -> int:
        """First opset that can say it."""
        blocks = isinstance(self.granularity, PerBlock)
        return max(self.format.min_opset, _BLOCKS_FROM if blocks else 0)

    def with_unit(self, unit: float) -> QuantScheme:
        """The same with another common factor."""
        return replace(self, unit=unit)

    def transposed(self) -> QuantScheme:
        """The same for the transpose of a matrix."""
        granularity = self.granularity
        if isinstance(granularity, PerTensor):
            return self
        return replace(self, granularity=replace(granularity, axis=1 - granularity.axis % 2))


def dtype_named(name: str) -> Any:
    """A dtype of numpy or ml_dtypes by its name."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name, name))


_E4M3, _E8M0 = "float8_e4m3fn", "float8_e8m0fnu"

FORMATS = {
    f.name: f
    for f in (
        QuantFormat("int8", "INT8", "int8", 8, -127.0, 127.0, 19),
        QuantFormat("fp8", "FLOAT8E4M3FN", _E4M3, 8, -448.0, 448.0, 19),
        QuantFormat("int4", "INT4", "int4", 4, -8.0, 7.0, 21),
        QuantFormat("uint4", "UINT4", "uint4", 4, 0.0, 15.0, 21),
        QuantFormat("nvfp4", "FLOAT4E2M1", "float4_e2m1fn", 4, -6.0, 6.0, 23, 16, _E4M3),
        QuantFormat("mxfp8", "FLOAT8E4M3FN", _E4M3, 8, -448.0, 448.0, 21, 32, _E8M0),
    )
}


def quant_format(name: str) -> QuantFormat:
    """Look up a format by name."""
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise OnnxqError(f"unknown format {name!r}", f"choose one of: {known}") from None
