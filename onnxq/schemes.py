"""How a weight is divided into scales: pure, from the layer's form and the recipe alone."""

from __future__ import annotations

from onnxq.formats import Granularity, PerBlock, PerChannel, PerTensor
from onnxq.recipe import Recipe
from onnxq.sites import Site

LEAST_BLOCK = 16
"""The smallest block that a recipe's may shrink to."""


def output_axis(site: Site) -> int:
    """Axis of the weight that runs over output channels."""
    if site.kind == "conv" or site.node.attrs.get("transB", 0):
        return 0
    return 1


def summed_axis(site: Site) -> int:
    """Axis of a linear layer's weight that the product sums over."""
    return 1 - output_axis(site)


def granularity(site: Site, recipe: Recipe) -> Granularity | None:
    """What has a scale of its own in the weight of `site`; None where no block fits it."""
    if recipe.block:
        assert site.operand is not None
        axis = summed_axis(site)
        size = block_for(site.operand.shape[axis], recipe)
        return PerBlock(axis, size) if size else None
    whole = recipe.weight_granularity == "tensor"
    if whole or (recipe.qkv_granularity == "tensor" and site.role == "qkv"):
        return PerTensor()
    return PerChannel(output_axis(site))


def block_for(length: int, recipe: Recipe) -> int:
    """The recipe's block, or the largest half, quarter, ... of it that fits `length`; else 0.

    A last block that is shorter is ONNX, but no TensorRT: it refuses the file, or, where the number
    of blocks happens to divide the length, silently takes blocks of another size. And INT4 in one
    block is a scale a channel to it, for which it has no kernel.
    """
    fixed = recipe.weight_format.block
    least, blocks = (fixed, 1) if fixed else (LEAST_BLOCK, 2)
    size = recipe.block
    while size >= least and (length % size or length < blocks * size):
        size //= 2
    return size if size >= least else 0
