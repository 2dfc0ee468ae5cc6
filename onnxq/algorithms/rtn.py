"""Round to nearest: the scale maps the largest magnitude to the largest code."""

from __future__ import annotations

import numpy.typing as npt

from onnxq import numerics
from onnxq.formats import QuantFormat


def scales(
    W: numerics.FloatArray, fmt: QuantFormat, axis: int | None, dtype: npt.DTypeLike
) -> numerics.FloatArray:
    """Scales of a weight: a scalar, or one for each index along `axis` (an output channel).

    Args:
        W: the weight, in any layout.
        dtype: what the scales are stored in; they are rounded to it here.
    """
    return numerics.scale_for(numerics.amax(W, axis), fmt, dtype)
