"""Ranges that lie to one side of 0, in a form that TensorRT takes: it takes no zero points.

    x - c -> Q -> DQ -> product with W'  ->  * r  ->  + (c times the sums of r W' + bias)

It computes what a zero point would: c is a whole number of steps, and the sums are those of the
weights as stored, codes times scales, so that the rounding of x is all that is lost. The compiled
engine gains nothing by it: the subtraction rides in the kernel that quantizes, the addition in the
one that adds the bias (MiniLM for sm80 and sm89: 79 kernels with and without, all INT8).

A convolution that pads is left as it is: what it pads with, 0, would stand for c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.calibrate.ranges import Range
from onnxq.formats import QuantFormat
from onnxq.graph.edit import Editor
from onnxq.graph.emit_weight import CodedWeight
from onnxq.graph.ir import Constant, Tensor
from onnxq.graph.query import label
from onnxq.graph.weights import array
from onnxq.schemes import output_axis
from onnxq.sites import Site

# Products of x - c are larger than those of x by what is given back: in FP16 they keep as much room
# again as a product of 16,384 has.
_MOST = {"float16": 2.0**14}


def can_center(site: Site) -> bool:
    """Whether the layer may read its activation less a constant."""
    if site.kind == "linear":
        return True
    attrs = site.node.attrs
    return (
        site.kind == "conv"
        and attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not any(attrs.get("pads", ()))
    )


def given_back(site: Site, coded: CodedWeight, center: float, dtype: Any) -> NDArray[Any] | None:
    """What the product of x - center lacks, one value a channel; None where `dtype` has no room.

    Args:
        center: in double precision, of the scale that is stored: then 0 comes back as 0.
        dtype: of the activations.
    """
    codes = coded.codes()
    axis = output_axis(site)
    others = tuple(i for i in range(codes.ndim) if i != axis)
    sums: NDArray[Any] = codes.sum(axis=others, dtype=np.int64).astype(np.float64)
    scale = coded.scale() if callable(coded.scale) else coded.scale
    for factor in (scale, coded.behind):
        if factor is not None:
            sums = sums * np.ravel(factor).astype(np.float64)
    sums *= center * float(site.node.attrs.get("alpha", 1.0))
    if sums.size and np.abs(sums).max() > _MOST.get(np.dtype(dtype).name, np.inf):
        return None
    return sums


def centered_layers(
    sites: Sequence[Site],
    coded: Sequence[CodedWeight],
    found: Range | None,
    fmt: QuantFormat | None,
    dtype: Any,
) -> tuple[float, list[NDArray[Any] | None]]:
    """What is subtracted from the tensor that layers share, and what each product gets back.

    0 and None, where its range is around 0 or `dtype` has no room.

    Args:
        found: the tensor's range, if it has one; fmt: the format of its codes.
    """
    if found is None or fmt is None or not found.offset:
        return 0.0, [None] * len(sites)
    center = found.offset * float(numerics.activation_scale(found.reach, fmt, dtype))
    shifts = [given_back(s, c, center, dtype) for s, c in zip(sites, coded, strict=True)]
    return (0.0, [None] * len(sites)) if any(s is None for s in shifts) else (center, shifts)


def joined_bias(
    editor: Editor, site: Site, bias: Tensor | None, shift: NDArray[Any], dtype: Any
) -> Tensor:
    """The bias and what a centered product gets back, as one constant where that can be."""
    if site.kind == "conv":
        assert site.operand is not None  # its weight
        shift = shift.reshape(1, -1, *[1] * (len(site.operand.shape) - 2))
    if isinstance(bias, Constant):
        joined = array(bias).astype(np.float64) + shift
        return editor.constant(f"{bias.name}_centered", joined.astype(dtype))
    constant = editor.constant(f"{label(site.node)}_center", shift.astype(dtype))
    if bias is None:
        return constant
    name, out = f"{label(site.node)}_CenteredBias", f"{bias.name}_centered"
    return editor.node("Add", name, [bias, constant], out, bias.dtype, None, like=site.node)
