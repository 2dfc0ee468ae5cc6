"""The quantized formats, one row each. What they do lives in `numerics`, not in branches on names.

Source: ONNX operators QuantizeLinear / DequantizeLinear (opset 19: FP8 and 16-bit scales,
21: INT4 and blocks, 23: FP4); OFP8 E4M3 (arXiv:2209.05433) with 448 as its largest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxq.errors import OnnxqError


@dataclass(frozen=True)
class QuantFormat:
    """A row.

    Attributes:
        name: what recipes call it.
        onnx_type: name of the TensorProto.DataType it is stored in.
        numpy_dtype: name of the numpy or ml_dtypes dtype with the same bits.
        bits: bits an element takes.
        qmax: the magnitude amax maps to; symmetric, so the least code used is -qmax.
        min_opset: first opset whose Q/DQ have the type with 16-bit scales.
    """

    name: str
    onnx_type: str
    numpy_dtype: str
    bits: int
    qmax: float
    min_opset: int

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers (rounding is then relative)."""
        return self.numpy_dtype.startswith("float")

    def dtype(self) -> Any:
        """The numpy dtype of the codes."""
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.numpy_dtype, self.numpy_dtype))


FORMATS = {
    f.name: f
    for f in (
        QuantFormat("int8", "INT8", "int8", 8, 127.0, 19),
        QuantFormat("fp8", "FLOAT8E4M3FN", "float8_e4m3fn", 8, 448.0, 19),
    )
}


def quant_format(name: str) -> QuantFormat:
    """Look up a format by name."""
    try:
        return FORMATS[name]
    except KeyError:
        known = ", ".join(FORMATS)
        raise OnnxqError(f"unknown format {name!r}", f"choose one of: {known}") from None
