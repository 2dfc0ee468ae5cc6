"""What each layer of a diffusion UNet is for, by its name, or else by where it stands.

The roles are those that NVIDIA's recipes for SDXL tell apart. Exporters that keep module paths
give them away; where a weight is called `val_79` and its node `MatMul_12`, its place does:

| role           | by name                            | by position                        |
|----------------|------------------------------------|------------------------------------|
| `conv_in`      | conv_in                            | a convolution that reads the input |
| `conv_out`     | conv_out                           | one that makes the output          |
| `shortcut`     | conv_shortcut                      | 1x1, added to the branch beside it |
| `embedding`    | time_embedding, add_embedding, ... | linear, knows nothing of the image |
| `qkv`          | to_q, to_k, to_v                   | makes an operand of an attention   |
| `feed_forward` | ff.net                             | before or behind GELU              |
| `proj_out`     | proj_out, norm_out                 | its result, as an image, is added  |
| `linear`       | to_out, proj_in                    | all other linear layers            |
| `conv`         |                                    | all other convolutions             |
| `attention`    |                                    | every attention                    |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.query import perm_of, producer
from onnxq.graph.roles import first_convolutions, last_layers
from onnxq.rules import ROLES
from onnxq.sites import Site

_NAMES = {
    "embedding": "time_emb_proj time_embedding add_embedding pos_embed time_text_embed "
    "context_embedder x_embedder",
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "shortcut": "conv_shortcut",
    "proj_out": "proj_out norm_out",
    "qkv": "to_q to_k to_v",
    "feed_forward": "ff.net",
    "linear": "to_out proj_in",
}
_PATTERNS = {
    role: re.compile(rf"(?:^|[./])(?:{'|'.join(map(re.escape, words.split()))})(?:[./]|$)")
    for role, words in _NAMES.items()
}

_LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_ACTIVATIONS = ("Gelu", "Erf", "Tanh", "Sigmoid", "Swish", "HardSwish", "Relu")
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Dropout")
_NORMS = ("ReduceMean", "Softmax", "ReduceSum", "Sqrt")
_TO_OPERAND = (*_LAYOUT, "Mul", "Div", "Add", "Split", "Slice", "Expand", "Concat", "Gather")


@dataclass(frozen=True)
class Role:
    """What a layer is for, and whether its `name` says so or its position."""

    word: str
    by_name: bool


def unet_roles(model: Model, sites: Iterable[Site], *, names: bool = True) -> dict[int, Role]:
    """The role of each site, by id of its node.

    Args:
        names: whether names count; without them every role is told by position.
    """
    found = list(sites)
    position = _Positions(model, found)
    roles = {}
    for site in found:
        word = _named(site) if names else ""
        roles[id(site.node)] = Role(word or position.role(site), bool(word))
    return roles


def recognised(roles: Iterable[Role]) -> list[str]:
    """What was recognised, a line for those by name and one for those by position."""
    lines = []
    for by_name, how in ((True, "by name"), (False, "by position in the graph")):
        counts = Counter(role.word for role in roles if role.by_name is by_name)
        said = ", ".join(f"{counts[word]} {word}" for word in ROLES if counts[word])
        if said:
            lines.append(f"recognised {how}: {said}")
    return lines


def _named(site: Site) -> str:
    """The role that the module's path, the weight's name or the node's gives away, or ''."""
    if site.kind == "attention":
        return "attention"
    for text in (site.module, site.weight_name, site.name):
        for word, pattern in _PATTERNS.items():
            if pattern.search(text):
                return word
    return ""


class _Positions:
    """Where layers stand to each other."""

    def __init__(self, model: Model, sites: Sequence[Site]) -> None:
        self.first, self.last = first_convolutions(model), last_layers(model)
        self.image = _behind(model, self.first)
        self.operands: set[int] = set()
        for site in sites:
            if site.attention is not None:
                values = site.attention.values.inputs[1]
                for tensor in (*site.node.inputs[:2], values):
                    self.operands |= makers(tensor)

    def role(self, site: Site) -> str:
        node = site.node
        if site.kind == "attention":
            return "attention"
        if site.kind == "conv":
            return self._convolution(site)
        if id(node) in self.operands:
            return "qkv"
        if self.first and id(node) not in self.image:
            return "embedding"
        if _meets(node.outputs[0], _readers) or _meets(node.inputs[0], _sources):
            return "feed_forward"
        return "proj_out" if _becomes_image(node.outputs[0]) else "linear"

    def _convolution(self, site: Site) -> str:
        node = site.node
        if id(node) in self.first:
            return "conv_in"
        if id(node) in self.last:
            return "conv_out"
        if site.operand is None or any(size != 1 for size in site.operand.shape[2:]):
            return "conv"
        if _was_sequence(node.inputs[0]):
            return "proj_out"
        beside = len(node.inputs[0].outputs) > 1
        return "shortcut" if beside and _is_added(node.outputs[0]) else "conv"


def _behind(model: Model, start: frozenset[int]) -> set[int]:
    """Nodes that depend on those of `start`, and these themselves."""
    found = set(start)
    for node in model.graph.nodes:
        if any(id(p) in found for t in node.inputs if (p := producer(t)) is not None):
            found.add(id(node))
    return found


def makers(tensor: Tensor) -> set[int]:
    """The linear layers that a tensor comes from, through layout, scaling and biases."""
    found, stack = set(), [tensor]
    while stack:
        node = producer(stack.pop())
        if node is None:
            continue
        if node.op in ("MatMul", "Gemm"):
            found.add(id(node))
        elif node.op in _TO_OPERAND and not _joins(node):
            stack += _computed(node)
    return found


def _meets(tensor: Tensor, step: Callable[[Tensor], Iterable[tuple[Node, list[Tensor]]]]) -> bool:
    """Whether an activation stands between here and the next layer, norm or residual addition."""
    stack, seen = [tensor], set()
    while stack:
        for node, further in step(stack.pop()):
            if node.op in _ACTIVATIONS:
                return True
            ends = node.op in _LAYERS or node.op in _NORMS or "Normalization" in node.op
            if not ends and not _joins(node) and id(node) not in seen:
                seen.add(id(node))
                stack += further
    return False


def _readers(tensor: Tensor) -> Iterable[tuple[Node, list[Tensor]]]:
    return [(node, list(node.outputs)) for node in tensor.outputs]


def _sources(tensor: Tensor) -> Iterable[tuple[Node, list[Tensor]]]:
    node = producer(tensor)
    return [] if node is None else [(node, _computed(node))]


def _becomes_image(tensor: Tensor) -> bool:
    """Whether channels are moved before the positions, and the result is added to another."""
    turned = False
    for _ in range(8):
        following = [n for n in tensor.outputs if n.op in (*_LAYOUT, "Add")]
        if len(following) != 1:
            return False
        (node,) = following
        if _joins(node):
            return turned
        turned = turned or (node.op == "Transpose" and len(perm_of(node) or ()) == 4)
        tensor = node.outputs[0]
    return False


def _was_sequence(tensor: Tensor) -> bool:
    """Whether the positions of a sequence were turned into an image right before."""
    node, turned = producer(tensor), False
    while node is not None and node.op in _LAYOUT:
        turned = turned or node.op == "Transpose"
        node = producer(node.inputs[0])
    return turned


def _is_added(tensor: Tensor) -> bool:
    return any(_joins(node) for node in tensor.outputs)


def _joins(node: Node) -> bool:
    """Whether it adds two computed tensors: a residual, not a bias."""
    return node.op == "Add" and len(_computed(node)) == 2


def _computed(node: Node) -> list[Tensor]:
    return [t for t in node.inputs if t.name and not isinstance(t, Constant)]
