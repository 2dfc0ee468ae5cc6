"""Hand-made models that hold what exporters rarely write, and how two models are compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx import parser

Feed = dict[str, np.ndarray]
RNG = np.random.default_rng(7)
ROOT = Path(__file__).parents[2]

# Built here when missing: seconds, no torch. The others are exported by `make models`.
BUILDS = {"smollm2-fp32": "models.smollm2", "ppocr_rec": "models.ppocr"}


def real_model(name: str) -> Path:
    """The path of models/out/NAME/model.onnx; without it the test fails, it is never skipped."""
    path = ROOT / "models/out" / name / "model.onnx"
    if not path.exists() and name in BUILDS:
        command = [sys.executable, "-m", BUILDS[name]]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    assert path.exists(), f"{path} is missing: run `make models`"
    return path


def weight(name: str, *shape: int, dtype: Any = np.float32) -> onnx.TensorProto:
    """A random initializer; from 16 x 16 floats on it is large enough to leave the graph."""
    return nh.from_array(RNG.standard_normal(shape).astype(dtype), name)


def parsed(text: str, *weights: onnx.TensorProto) -> onnx.ModelProto:
    """A model in ONNX's text form, with initializers added."""
    model = parser.parse_model(text)
    model.graph.initializer.extend(weights)
    return model


def mlp() -> onnx.ModelProto:
    """Two layers, one large weight each, and a scalar both read."""
    return parsed(
        """<ir_version: 9, opset_import: ["": 19]>
        mlp (float[n, 32] x) => (float[n, 8] y) {
            a = MatMul(x, w1)   b = Mul(a, s)   c = Relu(b)
            d = MatMul(c, w2)   y = Mul(d, s)
        }""",
        weight("w1", 32, 64),
        weight("w2", 64, 8),
        nh.from_array(np.array(0.5, np.float32), "s"),
    )


def with_if(opset: int = 19) -> onnx.ModelProto:
    """Branches that read a computed tensor, an outer weight, and weights nobody else reads."""
    return parsed(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        branches (bool c, float[2, 32] x) => (float[2, 32] y) {{
            t = Relu(x)
            u = MatMul(t, shared)
            v = If(c) <
                then_branch = then_g () => (float[2, 32] p) {{
                    p0 = MatMul(t, only_then)   p1 = MatMul(p0, shared)   p = Add(p1, u)
                }},
                else_branch = else_g () => (float[2, 32] q)
                    <float[32] own = {{{", ".join(["0.25"] * 32)}}}> {{
                    q0 = Add(t, own)   q = Add(q0, only_else)
                }}
            >
            y = Add(v, x)
        }}""",
        weight("shared", 32, 32),
        weight("only_then", 32, 32),
        weight("only_else", 2, 32),
        weight("nobody", 40, 40),
    )


def with_nested_if() -> onnx.ModelProto:
    """A body in a body that reads the outermost graph's weight."""
    return parsed(
        """<ir_version: 8, opset_import: ["": 17]>
        nested (bool c, bool d, float[2, 32] x) => (float[2, 32] y) {
            y = If(c) <
                then_branch = a () => (float[2, 32] p) {
                    p = If(d) <
                        then_branch = b () => (float[2, 32] q) { q = MatMul(x, deep) },
                        else_branch = e () => (float[2, 32] r) { r = Relu(x) }
                    >
                },
                else_branch = f () => (float[2, 32] s) { s = Neg(x) }
            >
        }""",
        weight("deep", 32, 32),
    )


def with_loop() -> onnx.ModelProto:
    """A Loop whose body reads an outer weight that no node of the main graph reads."""
    return parsed(
        """<ir_version: 8, opset_import: ["": 16]>
        looping (float[2, 32] x) => (float[2, 32] y, float[k, 2, 32] steps) {
            n = Constant <value = int64 {3}> ()
            go = Constant <value = bool {1}> ()
            y, steps = Loop(n, go, x) <
                body = step (int64 i, bool on, float[2, 32] state)
                    => (bool still, float[2, 32] next, float[2, 32] seen) {
                    still = Identity(on)   m = MatMul(state, loop_w)
                    next = Tanh(m)         seen = Identity(next)
                }
            >
        }""",
        weight("loop_w", 32, 32),
    )


def with_scan() -> onnx.ModelProto:
    """A Scan over rows."""
    return parsed(
        """<ir_version: 8, opset_import: ["": 16]>
        scanning (float[5, 32] x) => (float[32] last, float[5, 32] y) {
            last, y = Scan <num_scan_inputs = 1,
                body = step (float[32] state, float[32] row)
                    => (float[32] next, float[32] out) {
                    a = Add(state, row)   b = Mul(a, scan_w)
                    next = Identity(b)    out = Identity(b)
                }
            > (start, x)
        }""",
        weight("start", 32),
        weight("scan_w", 32),
    )


def with_functions() -> onnx.ModelProto:
    """Functions that call functions, take attributes with and without default, and hold weights."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18, "local": 1]>
        calls (float[2, 32] x) => (float[2, 32] y) {
            a = local.Scaled <alpha = 0.25> (x)
            y = local.Twice <alpha = 3.0> (a, w)
        }
        <domain: "local", opset_import: ["": 18]>
        Scaled <alpha: float = 2.0> (v) => (r) {
            k = Constant <value_float: float = @alpha> ()
            r = Mul(v, k)
        }
        <domain: "local", opset_import: ["": 18, "local": 1]>
        Twice <alpha> (v, m) => (r) {
            s = local.Scaled <alpha: float = @alpha> (v)
            t = MatMul(s, m)
            r = local.Scaled (t)
        }"""
    )
    model.graph.initializer.append(weight("w", 32, 32))
    for function in model.functions:
        for node in function.node:
            node.doc_string = f"in {function.name}"
            node.metadata_props.add(key="namespace", value=f"block.{function.name}")
    return model


def with_everything() -> onnx.ModelProto:
    """What onnx.proto allows and exporters rarely write. Not runnable: it has custom operators."""
    sequence = h.make_tensor_sequence_value_info("seq", T.FLOAT, [None, "n"])
    optional = h.make_value_info(
        "opt", h.make_optional_type_proto(h.make_tensor_type_proto(T.FLOAT, [2]))
    )
    body = h.make_graph(
        [h.make_node("Relu", ["x"], ["inner"])], "g", [], [h.make_empty_tensor_value_info("inner")]
    )
    odd = h.make_node("Odd", ["x", "", "w16"], ["o1", "", "o2"], domain="my.domain", overload="v2")
    odd.attribute.extend(
        [
            h.make_attribute("binary", b"\xff\x00\xfe"),
            h.make_attribute("words", ["one", "zwei"]),
            h.make_attribute("tensors", [nh.from_array(np.arange(3)), weight("", 20, 20)]),
            h.make_attribute("graphs", [body, body]),
            h.make_attribute("kind", h.make_tensor_type_proto(T.BFLOAT16, ["n", None])),
            h.make_attribute("kinds", [h.make_tensor_type_proto(T.INT4, [1])]),
            h.make_attribute("strings", nh.from_array(np.array([b"a", b"\xff"], object))),
            h.make_attribute("nan", float("nan")),
        ]
    )
    nodes = [
        odd,
        h.make_node("Plugin_TRT", ["o1"], ["p"], name="twin"),
        h.make_node("Identity", ["p"], ["y"], name="twin", doc_string="the second of that name"),
        h.make_node("SequenceConstruct", ["x", "x"], ["seq"]),
        h.make_node("Optional", ["x"], ["opt"]),
        h.make_node("DequantizeLinear", ["i4", "s"], ["dq"]),
        h.make_node("Sink", ["dq", "seq", "opt", "sparse", "bf16", "f8"], [], domain="my.domain"),
    ]
    x = h.make_tensor_value_info("x", T.FLOAT, ["batch", None, 3], doc_string="pixels")
    x.type.denotation = "IMAGE"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    weights = [
        weight("w16", 40, 40, dtype=np.float16),
        nh.from_array(np.ones((32, 32), ml_dtypes.bfloat16), "bf16"),
        nh.from_array(np.ones((40, 40), ml_dtypes.float8_e4m3fn), "f8"),
        nh.from_array(np.full((5, 511), -3, ml_dtypes.int4), "i4"),
        nh.from_array(np.array(0.5, np.float32), "s"),
        nh.from_array(np.array([b"never", b"read"], object), "texts"),
        h.make_tensor("typed", T.INT32, [2], [1, 2]),
    ]
    graph = h.make_graph(
        nodes,
        "everything",
        [x],
        [h.make_empty_tensor_value_info("y")],
        weights,
        doc_string="a graph",
        value_info=[sequence, optional, h.make_tensor_value_info("ghost", T.FLOAT, [1])],
        sparse_initializer=[
            h.make_sparse_tensor(
                h.make_tensor("sparse", T.FLOAT, [2], [1.5, -2]),
                h.make_tensor("at", T.INT64, [2, 2], [0, 1, 3, 2]),
                [4, 3],
            )
        ],
    )
    model = h.make_model(
        graph,
        ir_version=11,
        opset_imports=[h.make_opsetid("", 21), h.make_opsetid("my.domain", 3)],
        producer_name="a hand",
        doc_string="a model",
    )
    model.producer_version, model.domain, model.model_version = "1.2", "org.example", 5
    for part in (model, graph_of(model), *model.graph.node[:2], model.graph.initializer[0]):
        part.metadata_props.add(key="k", value="v")
    model.graph.value_info[0].metadata_props.add(key="k", value="of a value")
    annotation = model.graph.quantization_annotation.add(tensor_name="p")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    model.training_info.add().algorithm.CopyFrom(h.make_graph([], "train", [], []))
    return model


def graph_of(model: onnx.ModelProto) -> onnx.GraphProto:
    """The main graph."""
    return model.graph


def with_external_bodies(folder: Path) -> Path:
    """`with_if`, all of whose tensors lie in a data file, those of the bodies too."""
    model = with_if()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="all.bin", size_threshold=0)
    branch = model.graph.node[2].attribute[1].g
    data = (folder / "all.bin").stat().st_size
    with (folder / "all.bin").open("ab") as stream:
        stream.write(nh.to_array(branch.initializer[0]).tobytes())
    model = onnx.load(path, load_external_data=False)
    own = model.graph.node[2].attribute[1].g.initializer[0]
    own.ClearField("raw_data")
    own.ClearField("float_data")
    own.data_location = T.EXTERNAL
    own.ClearField("external_data")
    for key, value in (("location", "all.bin"), ("offset", data), ("length", 128)):
        own.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def saved(model: onnx.ModelProto, path: Path, external: bool = False) -> Path:
    """Write the model as onnx itself does."""
    if external:
        model = onnx.ModelProto.FromString(model.SerializeToString())
        name = f"{path.name}.data"
        onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=0)
    else:
        path.write_bytes(model.SerializeToString())
    return path


def feed_of(model: Path | bytes, folder: Path | None = None, seed: int = 0) -> Feed:
    """Small random inputs: ids below 100, masks of ones, open dimensions of 2 to 8."""
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in session(model, folder).get_inputs():
        shape = [d if isinstance(d, int) else _open_dim(str(d)) for d in spec.shape]
        if spec.type == "tensor(bool)":
            feed[spec.name] = np.ones(shape, bool)
        elif "int" in spec.type:
            ids = rng.integers(0, 100, shape)
            words = {"mask": np.ones_like(ids), "type": np.zeros_like(ids)}
            feed[spec.name] = next((v for k, v in words.items() if k in spec.name), ids)
        else:
            dtype = np.float16 if spec.type == "tensor(float16)" else np.float32
            feed[spec.name] = rng.standard_normal(shape).astype(dtype)
    return feed


def _open_dim(name: str) -> int:
    return {"batch": 1, "seq": 8, "p2o.DynamicDimension.0": 1, "n": 3}.get(name, 64)


def session(model: Path | bytes, folder: Path | None = None) -> Any:
    """An ONNX Runtime session without optimizations: equal graphs then compute equal bits."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def outputs_of(model: Path | bytes, feed: Feed, folder: Path | None = None) -> list[np.ndarray]:
    """What the model computes."""
    return list(session(model, folder).run(None, feed))


def tensor_bytes(tensor: onnx.TensorProto, folder: Path) -> bytes:
    """A tensor's values, wherever and in whatever field they are."""
    if tensor.data_type == T.STRING:
        return b"\0".join(tensor.string_data)
    return nh.to_array(tensor, str(folder)).tobytes()


def differences(old: onnx.ModelProto, new: onnx.ModelProto, was: Path, now: Path) -> list[str]:
    """Fields in which two models differ, but for where weights are stored and hoisted Constants.

    Args:
        was, now: the folders of the models' external data.
    """
    old, new = (onnx.ModelProto.FromString(m.SerializeToString()) for m in (old, new))
    found = []
    before, after = _take_weights(old, was), _take_weights(new, now)
    found += [f"initializer {n}" for n in before if after.get(n) != before[n]]
    hoisted = {n.output[0] for n in old.graph.node if n.op_type == "Constant"} & after.keys()
    kept = [n for n in old.graph.node if not hoisted & set(n.output)]
    if len(kept) != len(new.graph.node):
        found.append(f"{len(kept)} nodes -> {len(new.graph.node)}")
    found += [
        f"node {a.name or list(a.output)}"
        for a, b in zip(kept, new.graph.node, strict=False)
        if a.SerializeToString() != b.SerializeToString()
    ]
    if not set(after) <= set(before) | hoisted:
        found.append(f"added initializers {set(after) - set(before) - hoisted}")
    for graph in (old.graph, new.graph):
        graph.ClearField("node")
    if old.SerializeToString(deterministic=True) != new.SerializeToString(deterministic=True):
        found += [
            f"model {d.name}"
            for d in old.DESCRIPTOR.fields
            if getattr(old, d.name) != getattr(new, d.name)
        ]
        found += [
            f"graph {d.name}"
            for d in old.graph.DESCRIPTOR.fields
            if getattr(old.graph, d.name) != getattr(new.graph, d.name)
        ]
    return found


def _take_weights(model: onnx.ModelProto, folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Remove the initializers; name -> their header, serialized, and their values."""
    found = {}
    for tensor in model.graph.initializer:
        values = tensor_bytes(tensor, folder)
        data = [f.name for f in tensor.DESCRIPTOR.fields if f.name.endswith("_data")]
        for field in (*data, "data_location"):
            tensor.ClearField(field)
        found[tensor.name] = (tensor.SerializeToString(), values)
    model.graph.ClearField("initializer")
    return found
