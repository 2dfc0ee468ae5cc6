"""The memory a model will need: weights as a recipe stores them, and the key-value cache.

No weight is read: shapes and types say it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnxq.calibrate.steps import INPUTS
from onnxq.formats import Granularity, PerBlock, PerTensor, dtype_named
from onnxq.graph.cache import cache_values, generates
from onnxq.graph.ir import Node
from onnxq.graph.model import Model
from onnxq.graph.query import type_word
from onnxq.graph.weights import Constant, constant_type, payload_bytes
from onnxq.placement import Placement
from onnxq.schemes import granularity
from onnxq.sites import Site, find_sites

_BASE_BYTES = 2
"""Of numbers that are not quantized, and of the cache: FP16 or BF16."""


@dataclass(frozen=True)
class Kind:
    """What a model does, as far as it decides how to quantize it.

    Attributes:
        generates: it makes text token by token.
        convolutional: more convolutions than linear layers multiply in it.
        diffuses: a UNet with attention that is told the denoising step.
    """

    generates: bool = True
    convolutional: bool = False
    diffuses: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    Attributes:
        coded: quantized weights, their scales included.
        plain: all other weights, in 16 bits where they are floating-point numbers.
        full: all weights in 16 bits, before anything is quantized.
        cache: of the key-value cache, a token of one sequence, in 16 bits; 0 for a model that does
            not generate, None if its size is not to be seen in the graph.
    """

    coded: int
    plain: int
    full: int
    cache: int | None

    @property
    def weights(self) -> int:
        """All weights."""
        return self.coded + self.plain


def kind(model: Model) -> Kind:
    """What the model does."""
    kinds = [site.kind for site in find_sites(model)]
    return Kind(
        generates(model), kinds.count("conv") > kinds.count("linear"), diffuses(model, kinds)
    )


def diffuses(model: Model, kinds: Iterable[str]) -> bool:
    """Whether it is a UNet with attention that is told the denoising step.

    Args:
        kinds: of its sites.
    """
    told = any(spec.name in INPUTS for spec in model.inputs())
    return told and {"conv", "attention"} <= set(kinds)


def footprint(model: Model, placement: Placement) -> Footprint:
    """What `model` takes once `placement` is carried out and the rest is in 16 bits."""
    sites = [d.site for d in placement.quantized if d.site.operand is not None]
    coded = {site.weight_name: site for site in sites}
    within = {id(node) for site in sites for node in (site.node, *_layout(site))}
    bound = {t.name for t in model.graph.outputs} | model.captured_names()
    codes = plain = full = 0
    for constant in model.constants():
        size = _plain(constant)
        full += size
        if constant.name in coded:
            codes += _coded(coded[constant.name], placement)
            if constant.name not in bound and all(id(n) in within for n in constant.outputs):
                continue  # nobody reads it as it was
        plain += size
    values = cache_values(model) if generates(model) else 0
    return Footprint(codes, plain, full, None if values is None else values * _BASE_BYTES)


def _layout(site: Site) -> tuple[Node, ...]:
    return site.operand.through if site.operand is not None else ()


def _plain(constant: Constant) -> int:
    if type_word(constant) in ("fp32", "fp64", "fp16", "bf16"):
        return _BASE_BYTES * math.prod(int(d) for d in constant.shape)
    return payload_bytes(constant_type(constant), constant.shape)


def _coded(site: Site, placement: Placement) -> int:
    """Codes of a weight, and its scales."""
    assert site.operand is not None
    fmt, shape = placement.recipe.weight_format, site.operand.shape
    scale = dtype_named(fmt.scale_type).itemsize if fmt.scale_type else _BASE_BYTES
    scales = _scales(shape, granularity(site, placement.recipe))
    return math.ceil(math.prod(shape) * fmt.bits / 8) + scales * scale


def _scales(shape: tuple[int, ...], divided: Granularity | None) -> int:
    if divided is None or isinstance(divided, PerTensor):
        return 1
    if isinstance(divided, PerBlock):
        blocks = math.ceil(shape[divided.axis] / divided.size)
        return math.prod(shape) // shape[divided.axis] * blocks
    return shape[divided.axis]
