"""How large a language model's key-value cache is, from its graph alone."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnxq.graph.attention import Attention, attentions
from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, type_word

_PAST, _PRESENT = "past", "present"
_LEAST_WIDTH = 16


def generates(model: Model) -> bool:
    """Whether this is a language model that makes text token by token.

    It takes or gives a cache; or it makes logits of tokens without a second sequence beside them.
    """
    inputs = {spec.name for spec in model.inputs()}
    outputs = {t.name for t in model.graph.outputs}
    if any(n.startswith(_PAST) for n in inputs) or any(n.startswith(_PRESENT) for n in outputs):
        return True
    return "input_ids" in inputs and "logits" in outputs and "token_type_ids" not in inputs


def cache_values(model: Model) -> int | None:
    """Numbers the cache holds for each token of a sequence, all layers together; None: not found.

    Where the model takes a cache, [batch, heads, past, size] of each input; else the width of what
    makes the keys and the values of each attention, before heads are repeated.
    """
    shapes = [s.shape for s in model.inputs() if s.name.startswith(_PAST) and len(s.shape) == 4]
    if shapes:
        fixed = [[d for i, d in enumerate(s) if i != 2 and i != 0] for s in shapes]
        sizes = [math.prod(d for d in dims if isinstance(d, int)) for dims in fixed]
        return sum(sizes) if all(isinstance(d, int) for dims in fixed for d in dims) else None
    found = [_width(attention) for attention in attentions(model)]
    return sum(w for w in found if w) if found and all(found) else None


def _width(attention: Attention) -> int | None:
    """Keys and values of one token."""
    keys, values = (_projected(n.inputs[1]) for n in (attention.scores, attention.values))
    return keys + values if keys and values else None


def _projected(tensor: gs.Tensor) -> int | None:
    """Output channels of the one layer that `tensor` comes from; of a Split, its own part."""
    widths: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if id(current) in seen or not current.inputs:
            continue
        seen.add(id(current))
        node = current.inputs[0]
        operand = constant_operand(node, 1) if node.op in ("MatMul", "Gemm") else None
        if operand is not None:
            # Angles of a rotary embedding are a product with a constant too: a vector.
            if len(operand.shape) == 2 and min(operand.shape) >= _LEAST_WIDTH:
                widths[id(node)] = operand.shape[0 if node.attrs.get("transB", 0) else 1]
        elif node.op == "Split":
            last = current.shape[-1] if current.shape else None
            if not isinstance(last, int):
                return None
            if len(current.shape) == 3:
                widths[id(current)] = last
            else:  # halves of heads, for a rotary embedding
                waiting.append(node.inputs[0])
        else:
            # Only what holds numbers: a Reshape's shape comes from elsewhere.
            waiting += [t for t in node.inputs if type_word(t) in ("fp32", "fp16", "bf16")]
    return next(iter(widths.values())) if len(widths) == 1 else None
