"""Break a model at random, in the ways exporters and people do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tools.lint_truth.mutant import Mutant

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_CODES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def mutated(model: onnx.ModelProto, seed: int, times: int) -> Mutant:
    """A copy with some of the mutations; those that find no place are drawn again."""
    mutant = Mutant(model, seed)
    for _ in range(20 * times):
        if len(mutant.done) >= times:
            break
        mutation = MUTATIONS[int(mutant.random.integers(len(MUTATIONS)))]
        place = mutation(mutant)
        if place:
            mutant.done.append(f"{mutation.__name__} {place}")
    return mutant


def zero_point(m: Mutant) -> str:
    nodes = [n for n in m.nodes("QuantizeLinear", "DequantizeLinear") if len(n.input) > 2]
    nodes = [n for n in nodes if m.types.get(n.input[2]) == TensorProto.INT8]
    if not nodes:
        return ""
    node = m.pick(nodes)
    node.input[2] = m.add(np.full(m.shape(node.input[2]), m.random.integers(1, 90), np.int8))
    return node.name


def scale(m: Mutant) -> str:
    nodes = m.nodes("QuantizeLinear", "DequantizeLinear")
    if not nodes:
        return ""
    node = m.pick(nodes)
    kind = m.types.get(node.input[1], TensorProto.FLOAT)
    value = m.pick([0.0, -0.02, np.nan, 1e-9, 0.5])
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    node.input[1] = m.add(np.full(m.shape(node.input[1]), value).astype(dtype))
    return f"{node.name} {value}"


def insert(m: Mutant) -> str:
    edges = m.edges(*_FLOATS)
    if not edges:
        return ""
    node, index = m.pick(edges)
    label, tensor = node.name, node.input[index]
    kind, rank = m.types[tensor], m.ranks.get(tensor, 0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    choice = int(m.random.integers(9))
    if choice == 0:
        m.before(node, index, "Relu", [])
    elif choice == 1:
        m.before(node, index, "Identity", [])
    elif choice == 2:
        m.before(node, index, "Mul", [m.add(np.array(0.5, dtype))])
    elif choice == 3:
        m.before(node, index, "Add", [m.add(np.array(0.1, dtype))])
    elif choice == 4:
        m.before(node, index, "Clip", [m.add(np.array(v, dtype)) for v in (-3, 3)])
    elif choice == 5 and rank > 1:
        order = [*range(rank - 2), rank - 1, rank - 2]
        first = m.before(node, index, "Transpose", [], perm=order)
        m.before(*m.reader(first), "Transpose", [], perm=order)
    elif choice == 6:
        first = m.before(node, index, "Unsqueeze", [m.add(np.array([0]))])
        m.before(*m.reader(first), "Squeeze", [m.add(np.array([0]))])
    elif choice == 7:
        m.before(node, index, "Neg", [])
    else:
        m.before(node, index, "Sigmoid", [])
    return f"{choice} before {label}"


def cast(m: Mutant) -> str:
    edges = m.edges(*_FLOATS)
    if not edges:
        return ""
    node, index = m.pick(edges)
    label = node.name
    kind = m.types[node.input[index]]
    other = _FLOATS[1 - _FLOATS.index(kind)]
    first = m.before(node, index, "Cast", [], to=other)
    m.types[f"{first}_out"] = other
    if m.random.integers(2):
        m.before(*m.reader(first), "Cast", [], to=kind)
        return f"there and back before {label}"
    return f"before {label}"


def quantize(m: Mutant) -> str:
    edges = [(n, i) for n, i in m.edges(*_FLOATS) if n.op_type not in ("QuantizeLinear",)]
    if not edges:
        return ""
    node, index = m.pick(edges)
    label = node.name
    word = m.pick(list(_CODES))
    kind = m.types[node.input[index]]
    scales = m.add(np.array(0.02, helper.tensor_dtype_to_np_dtype(kind)))
    zero = m.add(np.zeros((), np.float32), _CODES[word])
    first = m.before(node, index, "QuantizeLinear", [scales, zero])
    m.types[f"{first}_out"] = _CODES[word]
    second = m.before(*m.reader(first), "DequantizeLinear", [scales, zero])
    m.types[f"{second}_out"] = kind
    return f"{word} before {label}"


def bypass(m: Mutant) -> str:
    makers = {n.output[0]: n for n in m.graph.node}
    found = []
    for node in m.graph.node:
        for index, name in enumerate(node.input):
            source = makers.get(name)
            if source is not None and source.op_type == "DequantizeLinear":
                before = makers.get(source.input[0])
                if before is not None and before.op_type == "QuantizeLinear":
                    found.append((node, index, before.input[0]))
    if not found:
        return ""
    node, index, tensor = m.pick(found)
    node.input[index] = tensor
    return f"{node.name} {index}"


def float_weight(m: Mutant) -> str:
    sizes = {t.name: tuple(t.dims) for t in m.graph.initializer}
    nodes = [n for n in m.nodes("DequantizeLinear") if len(sizes.get(n.input[0], ())) > 1]
    if not nodes:
        return ""
    node = m.pick(nodes)
    kind = m.types.get(node.input[1], TensorProto.FLOAT)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = m.add((m.random.normal(size=sizes[node.input[0]]) * 0.1).astype(dtype))
    for reader in m.graph.node:
        for index, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[index] = values
    return node.name


def channels(m: Mutant) -> str:
    sizes = {t.name: tuple(t.dims) for t in m.graph.initializer}
    nodes = [n for n in m.nodes("DequantizeLinear") if len(sizes.get(n.input[0], ())) > 1]
    nodes = [n for n in nodes if not any(a.name == "block_size" for a in n.attribute)]
    if not nodes:
        return ""
    node = m.pick(nodes)
    shape = sizes[node.input[0]]
    axis = int(m.random.integers(len(shape)))
    dtype = helper.tensor_dtype_to_np_dtype(m.types.get(node.input[1], TensorProto.FLOAT))
    node.input[1] = m.add(m.random.uniform(0.01, 0.02, shape[axis]).astype(dtype))
    if len(node.input) > 2:
        node.input[2] = m.add(np.zeros(shape[axis], np.float32), m.types[node.input[2]])
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("axis", axis)])
    return f"{node.name} axis {axis}"


def rename(m: Mutant) -> str:
    one, other = (m.pick([n for n in m.graph.node if n.name]) for _ in range(2))
    if one == other:
        return ""
    one.name = other.name
    return other.name


def operator(m: Mutant) -> str:
    nodes = m.nodes("Relu", "Erf", "Sigmoid", "Tanh", "Softmax", "Gelu", "Sqrt")
    if not nodes:
        return ""
    node = m.pick(nodes)
    del node.attribute[:]
    node.op_type = m.pick(["Foo", "QuickGelu", "Det", "HardSwish", "Softplus", "Mish", "Celu"])
    return f"{node.name} is {node.op_type}"


def format_of(m: Mutant) -> str:
    """The other 8-bit format on one Q/DQ pair of an activation."""
    makers = {n.output[0]: n for n in m.graph.node}
    pairs = []
    for node in m.nodes("DequantizeLinear"):
        before = makers.get(node.input[0])
        both = before is not None and before.op_type == "QuantizeLinear" and len(node.input) > 2
        if both and len(before.input) > 2 and m.types.get(node.input[2]) in _CODES.values():
            pairs.append((before, node))
    if not pairs:
        return ""
    quantizer, node = m.pick(pairs)
    kind = next(k for k in _CODES.values() if k != m.types[node.input[2]])
    zero = m.add(np.zeros(m.shape(node.input[2]), np.float32), kind)
    quantizer.input[2] = node.input[2] = zero
    for value in list(m.graph.value_info):
        if value.name == node.input[0]:
            m.graph.value_info.remove(value)
    return node.name


def computed_scale(m: Mutant) -> str:
    makers = {n.output[0]: n for n in m.graph.node}
    pairs = []
    for node in m.nodes("DequantizeLinear"):
        before = makers.get(node.input[0])
        if before is not None and before.op_type == "QuantizeLinear":
            pairs.append((before, node))
    if not pairs:
        return ""
    quantizer, node = m.pick(pairs)
    if before_is_constant(m, quantizer.input[0]) or m.shape(quantizer.input[1]) != ():
        return ""
    stem = m.name()
    chain = [
        helper.make_node("Abs", [quantizer.input[0]], [f"{stem}_abs"], name=f"{stem}_abs"),
        helper.make_node(
            "ReduceMax", [f"{stem}_abs"], [f"{stem}_max"], name=f"{stem}_max", keepdims=0
        ),
    ]
    position = next(i for i, n in enumerate(m.graph.node) if n == quantizer)
    for step in reversed(chain):
        m.graph.node.insert(position, step)
    for reader in m.graph.node:
        if reader.name in (quantizer.name, node.name):
            reader.input[1] = f"{stem}_max"
    return node.name


def before_is_constant(m: Mutant, name: str) -> bool:
    return name in {t.name for t in m.graph.initializer}


def moved_codes(m: Mutant) -> str:
    """A Transpose there and back between QuantizeLinear and DequantizeLinear."""
    edges = m.edges(*_CODES.values())
    edges = [(n, i) for n, i in edges if n.op_type == "DequantizeLinear"]
    edges = [(n, i) for n, i in edges if m.ranks.get(n.input[i], 0) > 1]
    if not edges:
        return ""
    node, index = m.pick(edges)
    rank = m.ranks[node.input[index]]
    order = [*range(rank - 2), rank - 1, rank - 2]
    label = node.name
    op = m.pick(["Transpose", "Unsqueeze"])
    if op == "Transpose":
        first = m.before(node, index, "Transpose", [], perm=order)
        m.before(*m.reader(first), "Transpose", [], perm=order)
    else:
        first = m.before(node, index, "Unsqueeze", [m.add(np.array([0]))])
        m.before(*m.reader(first), "Squeeze", [m.add(np.array([0]))])
    return f"{op} before {label}"


def integer_bias(m: Mutant) -> str:
    sizes = {t.name: tuple(t.dims) for t in m.graph.initializer}
    found = []
    for node in m.nodes("Add", "Conv", "Gemm"):
        for index, name in enumerate(node.input):
            is_vector = len(sizes.get(name, ())) == 1 and m.types.get(name) in _FLOATS
            if is_vector and (node.op_type == "Add" or index == 2):
                found.append((node, index))
    if not found:
        return ""
    node, index = m.pick(found)
    kind, size = m.types[node.input[index]], sizes[node.input[index]]
    codes = m.add(m.random.integers(-1000, 1000, size).astype(np.int32))
    scales = m.add(np.array(1e-3, helper.tensor_dtype_to_np_dtype(kind)))
    stem, label = m.name(), node.name
    made = helper.make_node("DequantizeLinear", [codes, scales], [f"{stem}_out"], name=stem)
    m.types[f"{stem}_out"] = kind
    position = next(i for i, n in enumerate(m.graph.node) if n == node)
    node.input[index] = f"{stem}_out"
    m.graph.node.insert(position, made)
    return label


MUTATIONS: tuple[Callable[[Mutant], str], ...] = (
    zero_point,
    scale,
    *(insert,) * 3,
    *(cast,) * 2,
    *(quantize,) * 2,
    *(bypass,) * 2,
    float_weight,
    *(channels,) * 2,
    rename,
    operator,
    format_of,
    computed_scale,
    moved_codes,
    integer_bias,
)
