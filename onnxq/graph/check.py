"""What a model file must satisfy before anything walks it: names, sizes, no cycle, no endless call.

protobuf parses many files that are no models; onnx.checker is slower, needs the weights, and lets
half of these through. What ONNX Runtime loads passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.shape_inference
import onnx.version_converter
from google.protobuf.message import EncodeError

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import is_known, is_packed, payload_bytes
from onnxq.graph.names import bodies, captured, made, nested_nodes, tensors_of
from onnxq.graph.operators import check_operators

MAX_NODES = 200_000
"""Also after functions are unfolded: those that call functions can make a small file endless."""

MAX_ATTRIBUTES = 1000
MAX_CALL_DEPTH = 100
MAX_RANK = 32
"""Of an array in numpy 1; ONNX Runtime and TensorRT take fewer dimensions."""

LONGEST_MESSAGE = 600

TOOL_ERRORS = (
    RuntimeError,
    ValueError,
    IndexError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
)
"""What onnx's own tools raise."""

_PER_ELEMENT = {
    "float_data": ("FLOAT", "COMPLEX64"),
    "double_data": ("DOUBLE", "COMPLEX128"),
    "int64_data": ("INT64",),
    "uint64_data": ("UINT32", "UINT64"),
    "string_data": ("STRING",),
}
_FIELDS = {
    getattr(onnx.TensorProto, name): field
    for field, names in _PER_ELEMENT.items()
    for name in names
}


def tool_reason(error: Exception) -> str:
    """What a tool of onnx says is wrong, on one line and without its source's place."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rpartition("` failed: ")[2]


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Put the model's path before the message of an OnnxqError, which stays one line to read.

    A damaged name can be as long as the file.
    """
    try:
        yield
    except (MemoryError, EncodeError):
        raise OnnxqError(f"{path}: it does not fit into memory", "free some, or split it") from None
    except OnnxqError as error:
        text = " ".join(error.message.split())
        text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
        raise OnnxqError(f"{path}: {text}", error.hint) from error.__cause__


def check_proto(proto: onnx.ModelProto) -> None:
    """Refuse a model whose parts do not fit together.

    Raises:
        OnnxqError: what is wrong and where; without the path, which the caller knows.
    """
    for part in ("node", "initializer", "sparse_initializer", "input", "output"):
        if len(getattr(proto.graph, part)) > MAX_NODES:
            raise OnnxqError(
                f"it has more than {MAX_NODES:,} {part}s", "split it into smaller ones"
            )
    for index, node in enumerate(proto.graph.node):
        if len(node.attribute) > MAX_ATTRIBUTES:
            raise OnnxqError(
                f"{_label(node, index)} has {len(node.attribute):,} attributes", "export it again"
            )
    check_text(proto)
    for sparse in proto.graph.sparse_initializer:
        check_sparse(sparse)
    for tensor in _tensors(proto):
        check_tensor(tensor)
    _check_calls(proto)
    _check_graph(proto.graph, [])
    check_operators(proto)


def check_text(proto: onnx.ModelProto) -> None:
    """Refuse names that are no UTF-8: protobuf hands those out as bytes, nobody expects them."""
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    names: list[object] = [proto.graph.name, *made(proto.graph)]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        names.append(value.name)
        names += (d.dim_param for d in value.type.tensor_type.shape.dim)
    names += (o.domain for o in proto.opset_import)
    for function in proto.functions:
        names += (function.name, function.domain, function.overload)
        names += (*function.input, *function.output)
    for node in nested_nodes(nodes):
        names += (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        names += (a.name for a in node.attribute)
    for name in names:
        if isinstance(name, bytes):
            raise OnnxqError(f"a name in it is not text: {name!r}", "export the model again")


def check_tensor(tensor: onnx.TensorProto) -> None:
    """Refuse a TensorProto whose data does not fill its dimensions.

    An EXTERNAL one has its file checked by `weights.stored`.
    """
    shape = tuple(tensor.dims)
    if not is_known(tensor.data_type):
        raise _bad(tensor, f"has the element type {tensor.data_type}, which ONNX does not know")
    if any(d < 0 for d in shape):
        raise _bad(tensor, f"has a negative dimension: {_dims(shape)}")
    if len(shape) > MAX_RANK:
        raise _bad(tensor, f"has {len(shape)} dimensions")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if tensor.HasField("raw_data"):
        has, needs, unit = len(tensor.raw_data), payload_bytes(tensor.data_type, shape), "bytes"
    else:
        has, needs, unit = _elements(tensor, shape)
    if has != needs:
        raise _bad(tensor, f"holds {has} {unit}, but its shape {_dims(shape)} needs {needs}")


def check_sparse(sparse: onnx.SparseTensorProto) -> None:
    """Refuse a SparseTensorProto whose parts do not fit together."""
    values, indices = sparse.values, sparse.indices
    for tensor in (values, indices):
        check_tensor(tensor)
    count, rank = tuple(values.dims), len(sparse.dims)
    places = tuple(indices.dims)
    fits = len(count) == 1 and places in (count, (*count, rank)) and rank <= MAX_RANK
    if not fits or indices.data_type != onnx.TensorProto.INT64 or any(d < 0 for d in sparse.dims):
        raise _bad(values, f"is sparse with values {_dims(count)} at indices {_dims(places)}")


def _elements(tensor: onnx.TensorProto, shape: tuple[int, ...]) -> tuple[int, int, str]:
    """Elements in the typed field, and how many there should be."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    has = len(getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data")))
    count = 1
    for dim in shape:
        count *= dim
    if is_packed(tensor.data_type) and not name.startswith("FLOAT6"):
        return has, payload_bytes(tensor.data_type, shape), "packed elements"
    return has, 2 * count if name.startswith("COMPLEX") else count, "elements"


def _bad(tensor: onnx.TensorProto, what: str) -> OnnxqError:
    return OnnxqError(f"tensor {tensor.name!r} {what}", "the file is damaged; export it again")


def _dims(shape: tuple[int, ...]) -> str:
    shown = "x".join(map(str, shape[:8])) + ("x..." if len(shape) > 8 else "")
    return shown or "()"


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model."""
    yield from proto.graph.initializer
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        yield from tensors_of(nodes)


def _check_graph(graph: onnx.GraphProto, outer: list[set[str]]) -> None:
    """One graph's names; `outer` are the names of the graphs around it."""
    makers = _makers(graph)
    scopes = [*outer, set(makers)]

    def known(name: str) -> bool:
        return any(name in scope for scope in scopes)

    for index, node in enumerate(graph.node):
        if not node.op_type:
            raise OnnxqError(f"{_label(node, index)} has no operator", "export the model again")
        for name in node.input:
            if name and not known(name):
                raise OnnxqError(
                    f"{_label(node, index)} reads {name!r}, which nothing in the model makes",
                    "the graph is incomplete; export the model again",
                )
        for body in bodies(node):
            _check_graph(body, scopes)
    for value in graph.output:
        if not known(value.name):
            raise OnnxqError(
                f"the output {value.name!r} is made by nothing in the model",
                "the graph is incomplete; export the model again",
            )
    _check_acyclic(graph, makers)


def _makers(graph: onnx.GraphProto) -> dict[str, int]:
    """Name -> index of the node that makes it; -1 for inputs and initializers."""
    makers: dict[str, int] = {}
    inputs = [v.name for v in graph.input]
    weights = [t.name for t in graph.initializer] + [
        s.values.name for s in graph.sparse_initializer
    ]
    for kind, names in (("inputs", inputs), ("initializers", weights)):
        if len(set(names)) < len(names):
            (twice, _), *_ = Counter(names).most_common(1)
            raise OnnxqError(f"two {kind} are named {twice!r}", "export the model again")
        makers.update(dict.fromkeys(names, -1))
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and name in makers:
                other = makers[name]
                by = "an input or initializer" if other < 0 else _label(graph.node[other], other)
                raise OnnxqError(
                    f"{name!r} is made twice: by {by} and by {_label(node, index)}",
                    "names must be unique; export the model again",
                )
            if name:
                makers[name] = index
    return makers


def _check_acyclic(graph: onnx.GraphProto, makers: dict[str, int]) -> None:
    """Refuse a cycle; nodes in any other order are accepted (passes sort them)."""
    waits: list[int] = []
    feeds: dict[int, list[int]] = {}
    for index, node in enumerate(graph.node):
        names = {*node.input, *captured(node)}
        needed = {makers[name] for name in names if makers.get(name, -1) >= 0}
        waits.append(len(needed))
        for source in needed:
            feeds.setdefault(source, []).append(index)
    ready = [i for i, count in enumerate(waits) if not count]
    done = 0
    while ready:
        done += 1
        for fed in feeds.get(ready.pop(), ()):
            waits[fed] -= 1
            if not waits[fed]:
                ready.append(fed)
    if done < len(waits):
        index = next(i for i, count in enumerate(waits) if count)
        raise OnnxqError(
            f"the graph has a cycle: {_label(graph.node[index], index)} depends on itself",
            "an ONNX graph must be acyclic; export the model again",
        )


def _check_calls(proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, or that unfold into too many nodes."""
    if len({(f.domain, f.name, f.overload) for f in proto.functions}) < len(proto.functions):
        raise OnnxqError("two of its functions have one name", "export the model again")
    functions = {(f.domain, f.name, f.overload): f.node for f in proto.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], path: tuple[tuple[str, str, str], ...]) -> int:
        if len(path) > MAX_CALL_DEPTH:
            raise OnnxqError(
                f"its functions call each other more than {MAX_CALL_DEPTH} deep",
                "export the model without functions",
            )
        total = 0
        for node in nested_nodes(nodes):
            key = (node.domain, node.op_type, node.overload)
            if key not in functions:
                total += 1
                continue
            if key in path:
                raise OnnxqError(
                    f"the function {node.op_type!r} calls itself", "export the model again"
                )
            if key not in sizes:
                sizes[key] = size(functions[key], (*path, key))
            total += sizes[key]
        return total

    if size(proto.graph.node, ()) > MAX_NODES:
        what = "its functions unfold into" if proto.functions else "it has"
        raise OnnxqError(
            f"{what} more than {MAX_NODES:,} nodes",
            "split it, or export it without unrolling",
        )


def _label(node: onnx.NodeProto, index: int) -> str:
    return f"node {node.name!r} ({node.op_type})" if node.name else f"node {index} ({node.op_type})"
