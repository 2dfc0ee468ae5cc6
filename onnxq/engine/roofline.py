"""Predicted time of compiled layers on a GPU: a roofline for each kernel, added up.

A kernel takes as long as its products at the card's rate for their format, or as long as its
operands at the memory's bandwidth, whichever is longer, and what it costs to start it. The rates
are the makers' (`onnxq.gpus`), each times one share that holds for all cards, kernels and formats
alike: nothing is fitted to a card. So the ratio of two plans is worth more than the times.

What it leaves out: the cards' caches, that tiles do not fill the last wave, that a card's clock
sinks under load. Model: Williams, Waterman, Patterson, "Roofline" (CACM 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxq.engine import kernels
from onnxq.engine.layers import EngineLayer, Tensor
from onnxq.gpus import Gpu

_PEAKS = {"fp8": "fp8", "int8": "int8", "fp4": "nvfp4"}


@dataclass(frozen=True)
class Assumptions:
    """What a kernel reaches of the maker's figures.

    Attributes:
        compute: of the dense peak of products.
        bandwidth: of the memory's.
        start: seconds between one kernel and the next.
        narrow: whether FP16 products accumulate in FP16 where the card is faster so (GeForce: by
            2). TensorRT takes the fastest kernel unless casts around a product ask for FP32. FP8
            accumulates in FP32, INT8 in INT32.
    """

    compute: float = 0.6
    bandwidth: float = 0.8
    start: float = 2e-6
    narrow: bool = True

    def __str__(self) -> str:
        sums = "FP16, where that is faster" if self.narrow else "FP32"
        return (
            f"{self.compute:.0%} of the dense peak, {self.bandwidth:.0%} of the bandwidth, "
            f"{self.start * 1e6:g} us a kernel; FP16 products accumulate in {sums}, FP8 in FP32"
        )


@dataclass(frozen=True)
class Work:
    """What one kernel has to do.

    Attributes:
        kind: `attention`, `conv`, `gemm` or `elementwise`.
        dtype: what it multiplies in (`fp8`, `fp16 x int4`, ...); of elementwise kernels ''.
        flops: of its products, a multiplication and an addition counting two.
        nbytes: of all it reads and writes, once each.
        count: how many kernels do the same.
    """

    kind: str
    dtype: str
    flops: int
    nbytes: int
    count: int = 1

    def seconds(self, gpu: Gpu, assumed: Assumptions) -> float:
        """Time of all `count`; infinite where the card has no such product."""
        rate = _rate(self.dtype, gpu, assumed) if self.flops else 1.0
        products = self.flops / (rate * 1e12 * assumed.compute) if rate else math.inf
        memory = self.nbytes / (gpu.bandwidth * 1e9 * assumed.bandwidth)
        return self.count * (max(products, memory) + assumed.start)


@dataclass(frozen=True)
class Share:
    """Kernels of one kind and format together."""

    kind: str
    dtype: str
    kernels: int
    flops: int
    nbytes: int
    seconds: float


def work(layers: Iterable[EngineLayer], profile: int = 0) -> list[Work] | None:
    """What each compiled kernel of a profile has to do; None where shapes are dynamic."""
    found = []
    for layer in layers:
        if layer.profile != profile or _is_nothing(layer):
            continue
        operands = (*layer.inputs, *layer.constants, *layer.outputs)
        if any(dim < 0 for tensor in operands for dim in tensor.dims):
            return None
        flops = product_flops(layer)
        nbytes = sum(tensor.nbytes for tensor in operands)
        found.append(Work(_kind(layer, flops), _dtype(layer) if flops else "", flops, nbytes))
    return found


def seconds(plan: Iterable[Work], gpu: Gpu, assumed: Assumptions) -> float:
    """Predicted time of one run."""
    return sum(one.seconds(gpu, assumed) for one in plan)


def shares(plan: Iterable[Work], gpu: Gpu, assumed: Assumptions) -> list[Share]:
    """The plan by kind and format, what takes longest first."""
    groups: dict[tuple[str, str], list[Work]] = {}
    for one in plan:
        groups.setdefault((one.kind, one.dtype), []).append(one)
    found = [
        Share(
            *key,
            sum(one.count for one in group),
            sum(one.count * one.flops for one in group),
            sum(one.count * one.nbytes for one in group),
            seconds(group, gpu, assumed),
        )
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda share: -share.seconds)


def product_flops(layer: EngineLayer) -> int:
    """FLOPs of the products in a kernel, from its operands' shapes; 0 where it has none."""
    if kernels.is_attention(layer):
        return _attention_flops(layer)
    if not kernels.multiplies(layer) or not layer.inputs or not layer.outputs:
        return 0
    weights = [t for t in layer.constants if sum(d > 1 for d in t.dims) > 1]
    weight = max(weights, key=lambda t: t.elements, default=None)
    result = max(layer.outputs, key=lambda t: t.elements)
    if layer.kind in ("correlation", "convolution"):
        weight = weight or layer.inputs[1]
        return 2 * result.elements * math.prod(weight.dims[1:])
    left = layer.inputs[0]
    if weight is None:
        return 2 * result.elements * left.dims[-1]
    if len(weight.dims) > 3:  # a convolution inside a fused kernel
        return 2 * result.elements * math.prod(weight.dims[1:])
    return _linear_flops(left, weight, weights)


def _linear_flops(left: Tensor, weight: Tensor, weights: Sequence[Tensor]) -> int:
    """Of left @ weight, and of what multiplies that result in the same kernel."""
    length = left.dims[-1]
    if length not in weight.dims:
        length = weight.dims[-2]
    rows = left.elements // length
    wide = [t for t in weights if t.dtype == weight.dtype and t.elements >= weight.elements // 8]
    total = 0
    for one in wide:  # a matrix that is chained takes as many rows
        total += rows * one.elements if _is_matrix(one) else 0
    return 2 * total


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.dims) > 1 and min(tensor.dims[-2:]) > 1


def _attention_flops(layer: EngineLayer) -> int:
    """q [.., rows, d] times k [.., d, keys], and the probabilities times v."""
    operands = [t for t in layer.inputs if t.elements > 1]
    if len(operands) < 2 or not layer.outputs:
        return 0
    q, k = operands[:2]
    keys = math.prod(k.dims[-2:]) // q.dims[-1]
    return 2 * math.prod(q.dims[:-1]) * keys * (q.dims[-1] + layer.outputs[0].dims[-1])


def _is_nothing(layer: EngineLayer) -> bool:
    """What runs while the engine is built or on the CPU: shapes, and buffers of a few numbers."""
    return not layer.inputs and sum(t.elements for t in layer.outputs) <= 1024


def _kind(layer: EngineLayer, flops: int) -> str:
    if kernels.is_attention(layer):
        return "attention"
    if not flops:
        return "elementwise"
    return "conv" if layer.kind in ("correlation", "convolution") else "gemm"


def _dtype(layer: EngineLayer) -> str:
    attention = kernels.is_attention(layer)
    return kernels.attention_dtype(layer) if attention else kernels.multiply_dtype(layer)


def _rate(dtype: str, gpu: Gpu, assumed: Assumptions) -> float:
    """10^12 operations a second at best; FP32 runs as TF32, at half of FP16's rate."""
    if dtype in _PEAKS:
        return gpu.peak(_PEAKS[dtype])
    if "fp32" in dtype:
        return gpu.fp16 / 2
    return gpu.fp16 * (gpu.narrow_gain if assumed.narrow and "bf16" not in dtype else 1.0)
