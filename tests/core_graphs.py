"""Small ONNX models, written node by node, and how they are placed, run and quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from core_oracle import evaluate
from numpy.typing import NDArray
from onnx import TensorProto
from onnx import helper as h

from onnxq.calibrate.ranges import Range
from onnxq.gpus import target
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.placement import Placement, place
from onnxq.ranging import settle
from onnxq.recipe import Recipe, load, parse_rule
from onnxq.transform import apply_placement

Array = NDArray[Any]
ROOT = Path(__file__).parents[1]
REAL = ROOT / "models" / "out"


class Net:
    """A graph in the making; names of values are what its methods give back."""

    def __init__(self, opset: int = 21, dtype: Any = np.float32, seed: int = 0) -> None:
        self.opset, self.dtype = opset, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: list[onnx.ValueInfoProto] = []
        self.domains: dict[str, int] = {}

    def input(self, name: str, shape: Sequence[Any], dtype: Any = None) -> str:
        number = onnx_type(self.dtype if dtype is None else dtype)
        self.inputs.append(h.make_tensor_value_info(name, number, shape))
        return name

    def const(self, name: str, values: Any, dtype: Any = None) -> str:
        array = np.asarray(values)
        if dtype is not None or array.dtype.kind == "f":
            array = array.astype(self.dtype if dtype is None else dtype)
        tensor = h.make_tensor(name, onnx_type(array.dtype), array.shape, array.tobytes(), raw=True)
        self.initializers.append(tensor)
        return name

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """Normal numbers; by default of variance 1 / (elements that are summed)."""
        summed = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        spread = scale if scale is not None else 1 / np.sqrt(summed)
        return self.const(name, self.rng.standard_normal(shape) * spread)

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attrs: Any) -> str:
        """A node with one output, called `name` and with the output `<name>:0`."""
        name = name or f"/{kind}_{len(self.nodes)}"
        return self.ops(kind, *inputs, outputs=[f"{name}:0"], name=name, domain=domain, **attrs)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: list[str], name: str, domain: str = "", **attrs: Any
    ) -> list[str]:
        node = h.make_node(kind, inputs, outputs, name=name, domain=domain, **attrs)
        self.nodes.append(node)
        if domain:
            self.domains[domain] = 1
        return outputs

    def module(self, path: str) -> None:
        """The last node's module path, as torch's exporter writes it."""
        entry = self.nodes[-1].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", repr(["", path, "node"])

    def output(self, name: str, shape: Sequence[Any] | None = None, dtype: Any = None) -> None:
        number = onnx_type(self.dtype if dtype is None else dtype)
        self.outputs.append(h.make_tensor_value_info(name, number, shape))

    def model(self) -> onnx.ModelProto:
        graph = h.make_graph(
            self.nodes, "net", self.inputs, self.outputs, self.initializers, value_info=self.values
        )
        imports = [h.make_opsetid("", self.opset)]
        imports += [h.make_opsetid(d, v) for d, v in self.domains.items()]
        model = h.make_model(graph, opset_imports=imports, ir_version=10)
        for value in onnx.shape_inference.infer_shapes(model).graph.output:
            for output in graph.output:
                known = value.type.tensor_type.HasField("shape")
                if output.name == value.name and known:
                    output.type.tensor_type.shape.CopyFrom(value.type.tensor_type.shape)
        model.graph.CopyFrom(graph)
        return model

    def loaded(self, opset: int = 0) -> Model:
        """As the passes get it."""
        return prepare(Model.from_proto(self.model(), Path("net.onnx")), opset)[0]

    def save(self, path: Path) -> Path:
        onnx.save(self.model(), path)
        return path


def onnx_type(dtype: Any) -> int:
    """TensorProto number of a numpy or ml_dtypes type."""
    if np.dtype(dtype) == ml_dtypes.bfloat16:
        return int(TensorProto.BFLOAT16)
    return int(h.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def recipe(name: str, *rules: str, **changes: Any) -> Recipe:
    """A preset with rules and other values."""
    preset = load(name)
    content = {**{f: getattr(preset, f) for f in preset.__dataclass_fields__}, **changes}
    return Recipe(**content).with_rules(tuple(parse_rule(r) for r in rules))


def placed(
    net: Net | Model, name: str = "fp8", *rules: str, gpu: str = "sm89", **changes: Any
) -> Placement:
    """The placement of a net (or a prepared model) under a preset."""
    model = net.loaded(19) if isinstance(net, Net) else net
    return place(model, recipe(name, *rules, **changes), target(gpu))


def reasons(placement: Placement) -> dict[str, str]:
    """{site's name: reason}, with '' for what is quantized."""
    return {d.site.name: "" if d.quantized else d.reason for d in placement.decisions}


def quantized(
    net: Net | Model,
    name: str = "fp8",
    *rules: str,
    peaks: Mapping[str, float] | float | Range | None = None,
    **changes: Any,
) -> onnx.ModelProto:
    """The model with its Q/DQ, weights inline; `peaks` are ranges by tensor, or one for all."""
    model = net.loaded(21) if isinstance(net, Net) else net
    placement = placed(model, name, *rules, **changes)
    ranges = ranges_of(placement, peaks)
    apply_placement(model, settle(placement, ranges), ranges)
    return inlined(model)


def ranges_of(
    placement: Placement, peaks: Mapping[str, float] | float | Range | None
) -> dict[tuple[int, int], Range] | None:
    if peaks is None:
        return None
    found = {}
    for decision in placement.quantized:
        pairs = [(decision.site.node, 0)]
        if decision.site.attention is not None:
            pairs += [(decision.site.node, 1), (decision.site.attention.values, 1)]
        for node, index in pairs:
            name = node.inputs[index].name
            peak = peaks[name] if isinstance(peaks, Mapping) else peaks
            found[id(node), index] = peak if isinstance(peak, Range) else Range(peak)
    return found


def inlined(model: Model) -> onnx.ModelProto:
    """What would be written, with all weights in it, checked by onnx."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        save(model, path, external=False)
        proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs by ONNX Runtime without optimizations; BF16 and FP8 Q/DQ it has on the CPU too.

    Before 1.30 it cuts FP16 off where QuantizeLinear must round: onnx's own evaluator runs that.
    """
    import onnxruntime as ort

    version = tuple(map(int, ort.__version__.split(".")[:2]))
    types = {t.name: t.data_type for t in model.graph.initializer}
    read = [n.input for n in model.graph.node if n.op_type == "QuantizeLinear"]
    cut = (TensorProto.FLOAT16, TensorProto.INT8)
    if version < (1, 30) and any((types[s], types[z]) == cut for _, s, z in read):
        return evaluate(model, feeds)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    # Copies: an output that is an input lies in the input's memory.
    return [np.array(v) for v in session.run(None, dict(feeds))]


def snr(reference: Array, found: Array) -> float:
    """Signal to noise in dB; infinite where both are equal."""
    a, b = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(b).all()
    noise = float(np.square(a - b).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(a).sum() / noise))


def operators(model: onnx.ModelProto, kinds: Iterable[str] = ()) -> list[str]:
    """Operators of the main graph, in order; of some kinds only, if any are given."""
    wanted = set(kinds)
    return [n.op_type for n in model.graph.node if not wanted or n.op_type in wanted]


def initializer(model: onnx.ModelProto, name: str) -> Array:
    """The values of an initializer."""
    return np.asarray(
        onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
    )
