"""Matrix FLOPs: of every product of a model, and which share of them runs in which format.

A multiplication and an addition count as two. What is counted are MatMul, Gemm, Conv and
ConvTranspose, the two products of an attention each by itself; all of them belong to the whole
that a share is taken of, whether they could be quantized or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxq.calibrate.data import Feed
    from onnxq.graph.model import Model

EIGHT_BITS = ("fp8", "int8")

Shape = Sequence[int]


def product_flops(
    op: str, left: Shape, right: Shape, output: Shape, *, transposed: bool = False
) -> int:
    """FLOPs of one product from the shapes of its operands and its output.

    Args:
        transposed: Gemm's transA.

    Raises:
        ValueError: not an operator that is counted.
    """
    if op == "MatMul":
        return 2 * prod(output) * left[-1]
    if op == "Gemm":
        return 2 * prod(output) * left[0 if transposed else 1]
    if op == "Conv":  # weight [out, in / group, kernel ...]
        return 2 * prod(output) * prod(right[1:])
    if op == "ConvTranspose":  # weight [in, out / group, kernel ...]
        return 2 * prod(left) * prod(right[1:])
    raise ValueError(f"{op} is no product whose FLOPs are counted")


def model_flops(model: Model, feed: Feed) -> dict[str, int]:
    """FLOPs of every product, by the name the compiler knows its node by, on one feed.

    The model is run once, with all operands as outputs: their shapes are then known, whatever
    shape inference makes of the graph.
    """
    from onnxq.calibrate.session import open_session
    from onnxq.engine.expected import engine_name
    from onnxq.graph.ir import Constant
    from onnxq.sites import find_sites

    products = []
    for site in find_sites(model):
        found = site.attention
        products += [site.node] if found is None else [found.scores, found.values]
    tensors = [t for node in products for t in (*node.inputs[:2], node.outputs[0])]
    names = list(dict.fromkeys(t.name for t in tensors if not isinstance(t, Constant)))
    serialized, folder = model.session_model(names)
    arrays = open_session(serialized, folder=folder).run(names, feed)
    shapes = {name: array.shape for name, array in zip(names, arrays, strict=True)}
    shapes |= {t.name: tuple(t.shape) for t in tensors if isinstance(t, Constant)}
    return {
        engine_name(node): product_flops(
            str(node.op),
            shapes[node.inputs[0].name],
            shapes[node.inputs[1].name],
            shapes[node.outputs[0].name],
            transposed=bool(node.attrs.get("transA", 0)),
        )
        for node in products
    }


def shares(flops: Mapping[str, int], ran: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Share of all FLOPs by format, largest first.

    Args:
        flops: by product.
        ran: (product, what it ran in): `fp8`, `fp16 x int4` where the operands differ. Products
            without FLOPs are left out; FLOPs without a product count as "not found".
    """
    total = sum(flops.values())
    if not total:
        return {}
    formats = dict(ran)
    found: dict[str, float] = {}
    for name, count in flops.items():
        word = formats.get(name, "not found")
        found[word] = found.get(word, 0.0) + count / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def in_eight_bits(found: Mapping[str, float]) -> float:
    """The share whose two operands are both 8 bits wide."""
    return sum(share for word, share in found.items() if word in EIGHT_BITS)
