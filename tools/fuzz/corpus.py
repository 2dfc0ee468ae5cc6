"""What is damaged: small models of many kinds, pieces of the real ones, and calibration data.

Made at run time; nothing of it is kept in the repository.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx import parser

_LARGE = 1024  # bytes: weights of this size lie outside the file
_NODES = 24  # of a piece of a real model
_PIECES = 12  # of each real model


@dataclass(frozen=True)
class Seed:
    """A good file, and what it is called in reports."""

    name: str
    content: bytes


def weight(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    """Reproducible values, by the name."""
    generator = np.random.default_rng(sum(name.encode()))
    return nh.from_array(generator.standard_normal(shape).astype(dtype), name)


def small_models() -> Iterator[Seed]:
    """Hand-made: layers, bodies, functions, old operators, Q/DQ, rare tensor types."""
    for name, text, tensors in _TEXTS:
        model = parser.parse_model(text)
        model.graph.initializer.extend(tensors)
        yield Seed(name, model.SerializeToString())
    yield Seed("rare", _rare().SerializeToString())
    yield Seed("functions", _functions().SerializeToString())


def quantized_models(folder: Path) -> Iterator[Seed]:
    """What onnxq itself writes of some: for lint, and for what begins anew."""
    import onnxq

    made = {"mlp": ("int4-rtn", "int8-dynamic", "w4a8-rtn-dynamic"), "cnn": ("fp8-dynamic",)}
    for seed in small_models():
        for recipe in made.get(seed.name, ()):
            (folder / "seed.onnx").write_bytes(seed.content)
            onnxq.quantize(folder / "seed.onnx", folder / "made.onnx", recipe=recipe)
            yield Seed(f"{seed.name} {recipe}", (folder / "made.onnx").read_bytes())


_TEXTS: list[tuple[str, str, list[onnx.TensorProto]]] = [
    (
        "mlp",
        """<ir_version: 8, opset_import: ["": 17]>
        mlp (float[n, 32] x) => (float[n, 32] y) {
            a = MatMul(x, w1) b = Add(a, c) d = Relu(b) e = MatMul(d, w2)
            f = LayerNormalization(e, g, g) y = Gemm <transB = 1, alpha = 0.5> (f, w3, g)
        }""",
        [
            *(weight("w1", 32, 64), weight("c", 64), weight("w2", 64, 32), weight("w3", 32, 32)),
            weight("g", 32),
        ],
    ),
    (
        "cnn",
        """<ir_version: 8, opset_import: ["": 17]>
        cnn (float[n, 3, 16, 16] x) => (float[n, 10] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1, b1)
            b = BatchNormalization(a, b1, b1, b1, s1) d = Relu(b)
            e = Conv <group = 2> (d, k2) f = Add(e, e) g = GlobalAveragePool(f)
            i = Flatten(g) j = MatMul(i, w) y = Softmax <axis = -1> (j)
            t = ConvTranspose(d, k3)
        }""",
        [
            *(weight("k1", 32, 3, 3, 3), weight("b1", 32), weight("s1", 32)),
            *(weight("k2", 32, 16, 1, 1), weight("k3", 32, 8, 2, 2), weight("w", 32, 10)),
        ],
    ),
    (
        "attention",
        """<ir_version: 8, opset_import: ["": 18]>
        att (float[b, s, 32] x, float[b, 1, s, s] mask) => (float[b, s, 32] y) {
            q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
            shape = Constant <value_ints = [0, 0, 2, 16]> ()
            q1 = Reshape(q0, shape) k1 = Reshape(k0, shape) v1 = Reshape(v0, shape)
            q = Transpose <perm = [0, 2, 1, 3]> (q1) k = Transpose <perm = [0, 2, 3, 1]> (k1)
            v = Transpose <perm = [0, 2, 1, 3]> (v1)
            s0 = MatMul(q, k) scale = Constant <value_float = 0.25> () s1 = Mul(s0, scale)
            s2 = Add(s1, mask) p = Softmax <axis = -1> (s2) o = MatMul(p, v)
            o1 = Transpose <perm = [0, 2, 1, 3]> (o)
            back = Constant <value_ints = [0, 0, 32]> () o2 = Reshape(o1, back)
            y = MatMul(o2, wo)
        }""",
        [weight(n, 32, 32) for n in ("wq", "wk", "wv", "wo")],
    ),
    (
        "bodies",
        """<ir_version: 8, opset_import: ["": 19]>
        bodies (bool c, float[2, 32] x, int64 m) => (float[2, 32] y, float[2, 32] z) {
            t = MatMul(x, w) yes = Constant <value_int = 1> () go = Cast <to = 9> (yes)
            y = If(c) < then_branch = a () => (float[2, 32] p) { p = MatMul(t, w) },
                        else_branch = b () => (float[2, 32] q) { q = Add(t, x) } >
            z = Loop(m, go, x) < body = l (int64 i, bool k, float[2, 32] u)
                => (bool k2, float[2, 32] u2) { k2 = Identity(k) u2 = MatMul(u, w) } >
        }""",
        [weight("w", 32, 32)],
    ),
    (
        "old",
        """<ir_version: 6, opset_import: ["": 10, "my.domain": 1]>
        old (float[1, 3, 8, 8] x) => (float[n] y) {
            u = Unsqueeze <axes = [0]> (x) s = Squeeze <axes = [0]> (u)
            d, mask = Dropout <ratio = 0.25> (s)
            p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1], mode = "constant"> (d)
            r = Resize <mode = "nearest"> (p, scales) q = Clip <min = -1.0, max = 1.0> (r)
            e = Softmax <axis = 3> (q) f = ReduceSum <axes = [2, 3], keepdims = 0> (e)
            t, i = TopK <axis = 1> (f, two) a, o = Split <axis = 1, split = [1, 1]> (t)
            m = my.domain.Own <k = 1> (a) y = Flatten(m)
        }""",
        [
            nh.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
            nh.from_array(np.array([2], np.int64), "two"),
        ],
    ),
    (
        "quantized",
        """<ir_version: 9, opset_import: ["": 19]>
        qdq (float[n, 32] x) => (float[n, 32] y) {
            q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)
            b = DequantizeLinear <axis = 1> (w, sw) d = MatMul(a, b)
            e = QuantizeLinear <axis = 1> (d, sw, zw) f = DequantizeLinear <axis = 1> (e, sw, zw)
            y = Relu(f)
        }""",
        [
            nh.from_array(np.float32(0.1), "s"),
            nh.from_array(np.int8(0), "z"),
            nh.from_array(np.ones((32, 32), np.int8), "w"),
            nh.from_array(np.full(32, 0.02, np.float32), "sw"),
            nh.from_array(np.zeros(32, np.int8), "zw"),
        ],
    ),
    (
        "half",
        """<ir_version: 8, opset_import: ["": 17]>
        half (float16[n, 32] x) => (float16[n, 100] y) {
            a = MatMul(x, w1) b = Sigmoid(a) c = Mul(a, b) y = MatMul(c, w2)
        }""",
        [weight("w1", 32, 32, dtype=np.float16), weight("w2", 32, 100, dtype=np.float16)],
    ),
]


def _rare() -> onnx.ModelProto:
    """Sparse weights, packed types, strings, typed fields, optionals, metadata, annotations."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        rare (float[n, 32] x, optional(float[2]) o, seq(float[2]) l) => (float[n, 32] y) {
            a = MatMul(x, f16) b = Add(a, dense) y = Relu(b)
        }"""
    )
    graph = model.graph
    typed = h.make_tensor("f16", T.FLOAT, [32, 32], np.ones(1024, np.float32))
    graph.initializer.append(typed)
    graph.initializer.append(h.make_tensor("i4", T.INT4, [3], [1, -2, 3]))
    graph.initializer.append(h.make_tensor("f8", T.FLOAT8E4M3FN, [4], [0.5, 1, 2, 448]))
    graph.initializer.append(h.make_tensor("b16", T.BFLOAT16, [2], [0.5, 1]))
    graph.initializer.append(h.make_tensor("words", T.STRING, [2], [b"a", b"\xff"]))
    sparse = graph.sparse_initializer.add(dims=[4, 8])
    sparse.values.CopyFrom(nh.from_array(np.array([1.0, 2.0], np.float32), "sparse"))
    sparse.indices.CopyFrom(nh.from_array(np.array([3, 9], np.int64), "at"))
    graph.initializer.append(nh.from_array(np.ones(32, np.float32), "dense"))
    note = graph.quantization_annotation.add(tensor_name="a")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="dense")
    for part in (model, graph, graph.node[0]):
        part.metadata_props.add(key="namespace", value=": m.A/fc: m.B/matmul: aten.matmul")
        part.doc_string = "made by hand"
    return model


def _functions() -> onnx.ModelProto:
    imports = [h.make_opsetid("", 18), h.make_opsetid("f", 1)]
    inner = h.make_function(
        "f", "inner", ["x"], ["y"], [h.make_node("Relu", ["x"], ["y"])], imports
    )
    nodes = [
        h.make_node("inner", ["x"], ["r"], domain="f"),
        h.make_node("MatMul", ["r", "w"], ["m"]),
        h.make_node("Elu", ["m"], ["y"]),
    ]
    nodes[2].attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    outer = h.make_function("f", "outer", ["x", "w"], ["y"], nodes, imports, ["slope"])
    x, y = (h.make_tensor_value_info(n, T.FLOAT, ["n", 32]) for n in "xy")
    call = h.make_node("outer", ["x", "w"], ["y"], domain="f", slope=0.5)
    graph = h.make_graph([call], "g", [x], [y], [weight("w", 32, 32)])
    return h.make_model(graph, functions=[inner, outer], opset_imports=imports, ir_version=9)


def real_pieces(folder: Path, data: Path) -> Iterator[Seed]:
    """Runs of nodes from the models in `folder`, and each model as a whole.

    Their weights are references into `data`, a file of holes: zeros that take no room.
    """
    most = 0
    for path in sorted(folder.glob("*/model.onnx")):
        model = onnx.load(path, load_external_data=False)
        most = max(most, _put_out(model, data.name))
        if len(model.SerializeToString()) < 1_000_000:
            yield Seed(path.parent.name, model.SerializeToString())
        rng = random.Random(path.parent.name)
        for number in range(_PIECES):
            start = rng.randrange(max(1, len(model.graph.node) - _NODES))
            piece = _piece(model, start, start + _NODES)
            yield Seed(f"{path.parent.name}[{start}] #{number}", piece.SerializeToString())
    with data.open("wb") as stream:
        stream.truncate(most)


def _put_out(model: onnx.ModelProto, location: str) -> int:
    """Let large weights be references, all from the start of one file; how long it must be."""
    most = 0
    for tensor in model.graph.initializer:
        size = int(np.prod(tensor.dims)) * h.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if size < _LARGE and tensor.data_location != T.EXTERNAL:
            continue
        bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        bare.data_location = T.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
            bare.external_data.add(key=key, value=value)
        tensor.CopyFrom(bare)
        most = max(most, size)
    return most


def _piece(model: onnx.ModelProto, start: int, stop: int) -> onnx.ModelProto:
    """Nodes `start` to `stop` as a model: what they read from before is an input."""
    graph, nodes = model.graph, model.graph.node[start:stop]
    made = {name: None for node in nodes for name in node.output if name}
    read = {name: None for node in nodes for name in node.input if name and name not in made}
    last = [name for name in nodes[-1].output if name]
    types = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
    piece = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    piece.graph.name = "piece"
    piece.graph.node.extend(nodes)
    piece.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    weights = {t.name for t in piece.graph.initializer}
    unknown = h.make_tensor_value_info("", T.FLOAT, None)
    for names, field in (([n for n in read if n not in weights], "input"), (last, "output")):
        for name in names:
            value = getattr(piece.graph, field).add()
            value.CopyFrom(types.get(name, unknown))
            value.name = name
    piece.graph.value_info.extend(types[n] for n in made if n in types and n not in last)
    piece.functions.extend(model.functions)
    return piece


def archives() -> Iterator[Seed]:
    """Calibration data as numpy saves it, and single .npy files."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((5, 32)).astype(np.float32)
    ids = generator.integers(0, 99, (5, 7))
    sets: dict[str, dict[str, np.ndarray]] = {
        "plain": {"x": x},
        "two": {"x": x, "ids": ids},
        "double": {"x": x.astype(np.float64), "ids": ids.astype(np.int32)},
        "columns": {"x": np.asfortranarray(x), "ids": ids},
        "big endian": {"x": x.astype(">f4")},
        "words": {"x": np.array([["a"] * 32])},
        "objects": {"x": np.array([{}], object)},
        "empty": {"x": x[:0]},
        "scalar": {"x": x, "t": np.float32(3)},
    }
    for name, arrays in sets.items():
        for save in (np.savez, np.savez_compressed):
            stream = io.BytesIO()
            save(stream, **arrays)
            yield Seed(f"{name} ({save.__name__})", stream.getvalue())
    stream = io.BytesIO()
    np.save(stream, x)
    yield Seed("npy", stream.getvalue())


def tables(folder: Path) -> Iterator[Seed]:
    """Calibration tables as `--save-calib` writes them."""
    from onnxq.calibrate.statistics import make
    from onnxq.calibrate.table import CalibrationTable, DataOrigin

    values = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    for names in ("amax", "histogram", "amax+gram"):
        found = make(names)
        for statistic in found.values():
            statistic.update(values)
        origin = DataOrigin("64 samples", "0" * 64, 64)
        CalibrationTable("print", {"x": found}, (origin,)).save(folder / "table.npz")
        yield Seed(f"table of {names}", (folder / "table.npz").read_bytes())
