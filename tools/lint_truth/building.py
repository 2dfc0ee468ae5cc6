"""Small ONNX graphs, quantized in every right and wrong way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = {"fp16": np.float16, "fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp64": np.float64}
CODES = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "fp8": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
ONNX = {
    "fp16": TensorProto.FLOAT16,
    "fp32": TensorProto.FLOAT,
    "fp64": TensorProto.DOUBLE,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "e5m2": TensorProto.FLOAT8E5M2,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}


class Graph:
    """A graph under construction in one base type; every method gives a tensor's name back."""

    def __init__(self, base: str = "fp16", opset: int = 21, seed: int = 0) -> None:
        self.base, self.opset = base, opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.domains: set[str] = set()
        self._count = 0

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        name: str | None = None,
        domain: str = "",
        outputs: Sequence[str] = (),
        **attrs: Any,
    ) -> str:
        name = name or self.name(kind)
        made = list(outputs) or [f"{name}_out{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, made, name=name, domain=domain, **attrs))
        self.domains |= {domain} - {""}
        return made[0]

    def constant(self, value: Any, kind: str | None = None) -> str:
        kind, name = kind or self.base, self.name("constant")
        if kind in FLOATS:
            tensor = numpy_helper.from_array(np.asarray(value).astype(FLOATS[kind]), name)
        else:
            values = np.asarray(value)
            tensor = helper.make_tensor(name, ONNX[kind], values.shape, values.reshape(-1).tolist())
        self.constants.append(tensor)
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "int64")

    def codes(self, shape: Sequence[int], kind: str, zero: bool = False) -> str:
        """Random codes (or zeros), raw."""
        name, count = self.name("codes"), int(np.prod(shape, dtype=np.int64))
        if kind in ("int4", "uint4"):
            raw = self.random.integers(0, 256, (count + 1) // 2).astype(np.uint8)
        elif kind in ("fp8", "e5m2"):
            raw = (self.random.normal(size=count) * 40).astype(CODES[kind])
        else:
            low = 0 if kind.startswith("u") else -100
            raw = self.random.integers(low, 100, count).astype(CODES[kind])
        data = bytes(len(raw.tobytes())) if zero else raw.tobytes()
        self.constants.append(helper.make_tensor(name, ONNX[kind], shape, data, raw=True))
        return name

    def input(self, name: str, shape: Sequence[int | str], kind: str | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, ONNX[kind or self.base], shape))
        return name

    def output(self, name: str, kind: str | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, ONNX[kind or self.base], None))
        return name

    def quantized(
        self,
        x: str,
        kind: str = "int8",
        scale: Any = 0.03,
        scale_type: str | None = None,
        name: str | None = None,
        domain: str = "",
        **attrs: Any,
    ) -> str:
        """QuantizeLinear and DequantizeLinear; `scale` is a value or a tensor's name."""
        s = scale if isinstance(scale, str) else self.constant(scale, scale_type)
        shape = () if isinstance(scale, str) else np.shape(scale)
        zero = self.codes(shape, kind, zero=True)
        q = self.op("QuantizeLinear", [x, s, zero], name and f"{name}_Q", domain, **attrs)
        return self.op("DequantizeLinear", [q, s, zero], name and f"{name}_DQ", domain, **attrs)

    def weight(
        self,
        shape: Sequence[int],
        kind: str = "int8",
        scale: Any = 0.01,
        scale_type: str | None = None,
        zero: str | None = None,
        domain: str = "",
        **attrs: Any,
    ) -> str:
        """DequantizeLinear of random codes."""
        s = scale if isinstance(scale, str) else self.constant(scale, scale_type)
        inputs = [self.codes(shape, kind), s, *([zero] if zero else [])]
        return self.op("DequantizeLinear", inputs, None, domain, **attrs)

    def floats(self, *shape: int, kind: str | None = None) -> str:
        """A constant of random floats."""
        return self.constant(self.random.normal(size=shape) * 0.1, kind)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "form", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self.domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def product(
    g: Graph,
    left: str,
    right: str,
    op: str = "MatMul",
    name: str = "product",
    kind: str | None = None,
    **attrs: Any,
) -> onnx.ModelProto:
    """The model whose output is one product."""
    g.output(g.op(op, [left, right], name, **attrs), kind)
    return g.model()
