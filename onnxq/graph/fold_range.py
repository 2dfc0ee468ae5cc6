"""By how much a channel can be rescaled in 16 bits."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.absorb import Part
from onnxq.graph.query import type_number
from onnxq.products import Factors

Half = Literal["fp16", "bf16"]

_RANGES = {"fp16": (2.0**-14, 65504.0), "bf16": (2.0**-126, 2.0**128 - 2.0**120)}
_HALVES: dict[int, Half] = {
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
TYPES: dict[Half, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_MARGIN = 0.9


def is_offset(part: Part) -> bool:
    """Whether a constant is added: what vanishes of it, its sum does not miss."""
    if part.node.op in ("Add", "Sub", "Sum", "Where"):
        return True
    bias = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2, "SkipLayerNormalization": 3}
    norms = ("LayerNormalization", "BatchNormalization", "InstanceNormalization")
    last = bias.get(part.node.op, 2 if part.node.op in (*norms, "GroupNormalization") else -1)
    return part.input == last


def half_type(tensor: gs.Tensor, base: Half | None) -> Half | None:
    """The 16-bit type that a tensor has, or gets."""
    return _HALVES.get(type_number(tensor), base)


def narrow(
    low: Factors, high: Factors, peak: Factors, half: Half, multiply: bool, additive: bool
) -> None:
    """Bound s so that `peak`, divided or multiplied by it, stays within what 16 bits hold."""
    smallest, limit = _RANGES[half][0], _RANGES[half][1] * _MARGIN
    with np.errstate(divide="ignore"):
        overflow = np.where(peak > 0, limit / peak, np.inf)  # the factor that would reach it
        vanish = np.where((peak > 0) & (not additive), smallest / peak, 0.0)
    overflow, vanish = np.maximum(overflow, 1.0), np.minimum(vanish, 1.0)
    with np.errstate(divide="ignore"):
        least, most = (vanish, overflow) if multiply else (1 / overflow, 1 / vanish)
    np.maximum(low, least, out=low)
    np.minimum(high, most, out=high)
