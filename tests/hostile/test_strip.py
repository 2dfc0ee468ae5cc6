"""--requantize: what a quantized model stood for is found again, or the model is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx import parser
from onnx.reference import ReferenceEvaluator

import onnxq
from onnxq.errors import OnnxqError
from onnxq.graph.dequantizing import dequantize
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.graph.strip import strip_quantization

RNG = np.random.default_rng(5)


def _weight(name: str, *shape: int) -> onnx.TensorProto:
    generator = np.random.default_rng([*name.encode()])
    scale = 10.0 ** generator.uniform(-1, 1, shape[-1])  # channels of different sizes
    return nh.from_array((generator.standard_normal(shape) * scale).astype(np.float32), name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Linear layers that share an input, a Gemm with a bias, and a convolution."""
    made = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        m (float[n, 32, 6, 6] x) => (float[n, 48] y) {
            c0 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k, kb)
            c = Relu(c0) p = GlobalAveragePool(c) f = Flatten(p)
            a = MatMul(f, w1) b = MatMul(f, w2) s = Add(a, b) r = Relu(s)
            y = Gemm <transB = 1> (r, w3, g)
        }"""
    )
    generator = np.random.default_rng(3)
    kernel = generator.standard_normal((32, 32, 3, 3)).astype(np.float32) / 20
    weights = [nh.from_array(kernel, "k"), _weight("kb", 32), _weight("w1", 32, 64)]
    weights += [_weight("w2", 32, 64), _weight("w3", 48, 64), _weight("g", 48)]
    made.graph.initializer.extend(weights)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    x = generator.standard_normal((6, 32, 6, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path / "m.onnx"


def _run(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.load(path.with_name("data.npz"))["x"]
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0], np.float64)


def _snr(reference: np.ndarray, found: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum()))


def _codes(path: Path) -> dict[tuple[int, ...], list[bytes]]:
    """The codes of the weights in a file, by shape."""
    found: dict[tuple[int, ...], list[bytes]] = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in (T.INT8, T.FLOAT8E4M3FN) and tensor.dims:
            found.setdefault(tuple(tensor.dims), []).append(nh.to_array(tensor).tobytes())
    return {shape: sorted(codes) for shape, codes in found.items()}


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "fp8-dynamic", "int8", "fp8"])
def test_the_same_recipe_again_gives_the_same_codes_and_no_operator_more(
    recipe: str, model: Path
) -> None:
    """Every scale of a weight is its largest code's: the codes of the dequantized are the same."""
    first, again = model.with_name("first.onnx"), model.with_name("again.onnx")
    data = model.with_name("data.npz") if "dynamic" not in recipe else None
    onnxq.quantize(model, first, recipe=recipe, calib=data)
    with pytest.raises(OnnxqError, match=r"quantized already .* --requantize"):
        onnxq.quantize(first, again, recipe=recipe, calib=data)
    made = onnxq.quantize(first, again, recipe=recipe, calib=data, requantize=True)
    assert _codes(again) == _codes(first) and len(_codes(first)) == 3
    assert _operators(again) == _operators(first)
    # Static: the activations of the stripped model are calibrated anew, and round otherwise.
    assert _snr(_run(first), _run(again)) > (40 if "dynamic" in recipe else 20)
    note = next(n for n in made.report.notes if n.startswith("stripped first: "))
    assert "4 weights" in note and "Q/DQ of" in note
    assert ("scales computed for 4 layers" in note) == ("dynamic" in recipe)
    records = [e for e in onnx.load(again).metadata_props if e.key == "onnxq"]
    assert len(records) == 1


@pytest.mark.parametrize("first", ["int8-dynamic", "fp8", "int8-weight-only", "int4-rtn"])
def test_what_is_left_computes_what_the_codes_stood_for(first: str, model: Path) -> None:
    quantized, stripped = model.with_name("q.onnx"), model.with_name("s.onnx")
    data = model.with_name("data.npz") if first == "fp8" else None
    onnxq.quantize(model, quantized, recipe=first, calib=data)
    loaded, _ = prepare(Model.load(quantized), 0)
    strip_quantization(loaded)
    save(loaded, stripped)
    left = _operators(stripped)
    assert not [op for op in left if "Quantize" in op] and not {"Div", "Abs"} & left.keys()
    assert left["MatMul"] == 2 and left["Mul"] <= 1  # a Gemm's or Conv's bias leaves it no more
    # The weights' rounding alone, in three or four layers: of 127 steps for three deviations 43 dB
    # each, of FP8's 1/16 30 dB, of 7 steps for 2.5 deviations 20 dB.
    assert _snr(_run(model), _run(stripped)) > {"fp8": 24, "int4-rtn": 11}.get(first, 33)
    if first in ("int8-dynamic", "fp8"):
        assert _snr(_run(model), _run(stripped)) > _snr(_run(model), _run(quantized))


def test_onnxruntimes_own_quantization_is_taken_back(model: Path) -> None:
    """UINT8 activations with zero points, INT8 weights a channel, INT32 biases."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            x = np.load(model.with_name("data.npz"))["x"]
            self.rows = iter([{"x": row[None]} for row in x])

        def get_next(self) -> object:
            return next(self.rows, None)

    theirs, stripped = model.with_name("theirs.onnx"), model.with_name("s.onnx")
    quantize_static(model, theirs, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    loaded, _ = prepare(Model.load(theirs), 0)
    edits = strip_quantization(loaded)
    save(loaded, stripped)
    # It leaves out a Relu whose zeros the codes' lower end makes: that must not get lost.
    assert "Relu" not in _operators(theirs) and _operators(stripped)["Clip"] == 2
    assert _snr(_run(model), _run(stripped)) > 33
    assert _snr(_run(model), _run(stripped)) > _snr(_run(model), _run(theirs)) + 3
    kept = {nh.to_array(t).shape for t in onnx.load(stripped).graph.initializer}
    assert {(32, 32, 3, 3), (32,), (32, 64), (48, 64), (48,)} <= kept
    assert Counter(e.verb for e in edits)["dequantize"] == 6


def test_operators_on_codes_are_refused(model: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model, model.with_name("q.onnx"), op_types_to_quantize=["MatMul"])
    with pytest.raises(OnnxqError, match=r"computes with codes.*full-precision model"):
        onnxq.quantize(model.with_name("q.onnx"), model.with_name("out.onnx"), requantize=True)
    assert not model.with_name("out.onnx").exists()


def _linear(body: str, folder: Path, *tensors: onnx.TensorProto) -> Path:
    made = parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 19]>
        g (float[n, 32] x) => (float[n, 32] y) {{ {body} }}"""
    )
    made.graph.initializer.extend(tensors)
    (folder / "g.onnx").write_bytes(made.SerializeToString())
    return folder / "g.onnx"


def _scalar(name: str, value: float) -> onnx.TensorProto:
    return nh.from_array(np.float32(value), name)


def test_floats_behind_q_and_dq_are_the_floats_they_were(tmp_path: Path) -> None:
    """Weights stored in floats, quantized by the graph: nothing was lost."""
    weight = _weight("w", 32, 32)
    body = """q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)
              r = QuantizeLinear(w, s, z) b = DequantizeLinear(r, s, z) y = MatMul(a, b)"""
    zero = nh.from_array(np.int8(3), "z")
    loaded, _ = prepare(Model.load(_linear(body, tmp_path, weight, _scalar("s", 0.1), zero)), 0)
    strip_quantization(loaded)
    written = onnx.load(save(loaded, tmp_path / "out.onnx")[0])
    (node,) = written.graph.node
    assert (node.op_type, list(node.input)) == ("MatMul", ["x", "w"])
    assert [t.SerializeToString() for t in written.graph.initializer] == [
        weight.SerializeToString()
    ]


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, t, z) y = MatMul(a, w)",
        "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, o) y = MatMul(a, w)",
        "q = QuantizeLinear(x, s, z) r = Relu(q) a = DequantizeLinear(r, s, z) y = MatMul(a, w)",
        "q, s2, z2 = DynamicQuantizeLinear(x) a = DequantizeLinear(q, s2, z2) y = MatMul(a, w)",
        "c = Cast <to = 3> (x) a = DequantizeLinear(c, s) y = MatMul(a, w)",
    ],
    ids=["another scale", "another zero point", "codes are used", "dynamic", "codes from outside"],
)
def test_what_does_more_than_round_is_refused(body: str, tmp_path: Path) -> None:
    tensors = [_weight("w", 32, 32), _scalar("s", 0.1), _scalar("t", 0.2)]
    tensors += [nh.from_array(np.int8(0), "z"), nh.from_array(np.int8(1), "o")]
    loaded, _ = prepare(Model.load(_linear(body, tmp_path, *tensors)), 0)
    with pytest.raises(OnnxqError, match="there are no floats to put in its place"):
        strip_quantization(loaded)


CASES = [
    ((6, 8), (), 1, 0, np.int8),
    ((6, 8), (8,), 1, 0, np.int8),
    ((6, 8), (6,), 0, 0, np.uint8),
    ((6, 8), (6,), -2, 0, np.int8),
    ((6, 8), (6, 2), 1, 4, np.int8),
    ((6, 8), (2, 8), 0, 3, np.int8),
    ((5, 4, 3), (5, 2, 3), 1, 2, np.uint8),
    ((7,), (7,), 0, 0, np.int32),
]


@pytest.mark.parametrize(("shape", "scales", "axis", "block", "dtype"), CASES)
@pytest.mark.parametrize("zeros", [False, True])
def test_dequantizing_is_onnxs(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    axis: int,
    block: int,
    dtype: type,
    zeros: bool,
) -> None:
    if dtype is np.int32 and zeros:
        return  # ONNX has no zero point there
    limits = np.iinfo(dtype)
    codes = RNG.integers(limits.min, limits.max, shape, dtype=dtype)
    scale = RNG.uniform(0.01, 1, scales).astype(np.float32)
    zero = RNG.integers(-9, 9, scales).astype(dtype) if zeros else None
    values = [("c", codes), ("s", scale)] + ([("z", zero)] if zero is not None else [])
    attributes = {"axis": axis} | ({"block_size": block} if block else {})
    node = h.make_node("DequantizeLinear", [n for n, _ in values], ["y"], **attributes)
    inputs = [
        h.make_tensor_value_info(n, h.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in values
    ]
    output = h.make_tensor_value_info("y", T.FLOAT, shape)
    graph = h.make_graph([node], "g", inputs, [output])
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)
    (want,) = ReferenceEvaluator(made).run(None, dict(values))
    got = dequantize(codes, scale, zero, axis, block)
    np.testing.assert_allclose(got, want, rtol=2e-7)  # one rounding of FP32
