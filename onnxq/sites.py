"""Where a model multiplies: the places that could be quantized, and those that never are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from onnxq.graph.attention import Attention, attentions
from onnxq.graph.ir import Node
from onnxq.graph.model import Model
from onnxq.graph.query import (
    ConstantOperand,
    constant_operand,
    inner_nodes,
    label,
    live_nodes,
    module_path,
    type_word,
)
from onnxq.graph.rescale import is_rescaled, source


@dataclass(frozen=True)
class Site:
    """A place that could be quantized.

    Attributes:
        node: the multiplying node (for an attention: the product of q and k).
        kind: `linear`, `conv`, `attention`, `product` (two computed operands) or `other` (what
            multiplies in a way that is never quantized, listed so that it is said).
        operand: the weight, as the node sees it.
        module: module path from the metadata, or ''.
        attention: the pattern, for an attention.
        role: what it is for in a diffusion UNet, where a recipe asks (see `onnxq.unet`); else ''.
    """

    node: Node
    kind: str
    operand: ConstantOperand | None = None
    module: str = ""
    attention: Attention | None = None
    role: str = ""

    @property
    def name(self) -> str:
        """The node's name."""
        return label(self.node)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes whose names and operators rules match: of an attention three."""
        found = self.attention
        return (self.node,) if found is None else (found.scores, found.softmax, found.values)

    @property
    def weight_name(self) -> str:
        """The initializer's name, or ''."""
        return self.operand.constant.name if self.operand else ""


def find_sites(model: Model) -> list[Site]:
    """Every node that multiplies matrices or convolves in 16 or 32 bits, in graph order."""
    patterns = {id(a.scores): a for a in attentions(model)}
    live = live_nodes(model) - {id(a.values) for a in patterns.values()}
    sites = []
    for node in model.graph.nodes:
        if node.op not in _MULTIPLYING or node.domain or id(node) not in live:
            continue
        if not all(type_word(t) in ("fp32", "fp16", "bf16") for t in node.inputs[:2]):
            continue
        module = module_path(model, node)
        if id(node) in patterns:
            sites.append(Site(node, "attention", None, module, patterns[id(node)]))
            continue
        operand = constant_operand(node, 1)
        linear = "linear" if operand or constant_operand(node, 0) else "product"
        kind = "conv" if node.op.startswith("Conv") else linear
        sites.append(Site(node, kind, operand, module))
    return sites


def current(site: Site) -> Site:
    """The site with the weight its node reads now: rescaling gives it another."""
    if site.operand is None:
        return site
    return replace(site, operand=constant_operand(site.node, 1))


def is_current(site: Site) -> bool:
    """Whether the weight has not been rescaled since the site was found."""
    now = constant_operand(site.node, 1)
    if site.operand is None or now is None or now.constant is site.operand.constant:
        return True
    read = source(now.constant)
    return read is site.operand.constant or not is_rescaled(read)


_MULTIPLYING = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_NEVER = {
    "Attention": "ONNX's Attention is fused in 16 bits as it is",
    "Einsum": "write it as MatMul to have it quantized",
    "LSTM": "no 8-bit kernel",
    "GRU": "no 8-bit kernel",
    "RNN": "no 8-bit kernel",
    "DeformConv": "no 8-bit kernel",
}
_CUSTOM = ("MatMul", "Gemm", "Conv", "Attention", "Linear")


def bystanders(model: Model, sites: Sequence[Site]) -> Iterator[tuple[Site, str]]:
    """What multiplies but is no site, and why: other operators and types, bodies of subgraphs."""
    known = {id(node) for site in sites for node in site.nodes}
    live = live_nodes(model)
    for node in model.graph.nodes:
        reason = "" if id(node) in known else _bystander(node, id(node) in live)
        if reason:
            yield Site(node, "other", None, module_path(model, node)), reason
        for inner in inner_nodes(model, node):
            if inner.op in _MULTIPLYING or _bystander(inner, True):
                where = f"inside a subgraph of {node.op} {label(node)!r}, which stays as it is"
                yield Site(inner, "other"), where


def _bystander(node: Node, live: bool) -> str:
    if not live:
        return "no output depends on it: it is dropped" if node.op in _MULTIPLYING else ""
    if node.domain:
        custom = any(word in node.op for word in _CUSTOM)
        return f"custom operator {node.domain}::{node.op}" if custom else ""
    if node.op in _NEVER:
        return f"{node.op} is left: {_NEVER[node.op]}"
    if node.op in _MULTIPLYING:
        words = [type_word(t) for t in node.inputs[:2]]
        if "fp64" in words:
            return "its operands are FP64"
        if "?" in words:
            return "the type of its input is unknown: a custom operator stands before it"
    return ""
