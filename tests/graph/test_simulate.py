"""What ONNX Runtime has no kernel for, against ml_dtypes' own rounding and onnx's evaluator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx.reference import ReferenceEvaluator

from onnxq.errors import OnnxqError
from onnxq.graph.references import set_reference
from onnxq.graph.simulate import runnable

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
Array = np.ndarray[Any, Any]


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Any],
    output: int,
    constants: list[onnx.TensorProto],
    opset: int = 23,
) -> Path:
    """A model whose output is y; inputs by name -> (type, shape)."""
    given = [h.make_tensor_value_info(name, *what) for name, what in inputs.items()]
    made = [h.make_tensor_value_info("y", output, None)]
    graph = h.make_graph(nodes, "g", given, made, constants)
    opsets = [h.make_opsetid("", opset), h.make_opsetid("trt", 1)]
    onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def run(path: Path, x: Array) -> Array:
    with runnable(path) as (usable, notes):
        assert usable != path and len(notes) == 1
        session = onnxruntime.InferenceSession(usable, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
    assert not usable.parent.exists()
    return np.asarray(found)


def packed(values: Array, name: str) -> onnx.TensorProto:
    """FP4 values, two to a byte, the first in the low half; a half byte may be left over."""
    codes = values.astype(E2M1).view(np.uint8).reshape(-1)
    codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    raw = (codes[0::2] | codes[1::2] << 4).astype(np.uint8).tobytes()
    return h.make_tensor(name, T.FLOAT4E2M1, values.shape, raw, raw=True)


def floats(values: Array, number: int, name: str) -> onnx.TensorProto:
    return h.make_tensor(name, number, values.shape, values.tobytes(), raw=True)


def difficult(dtype: Any) -> Array:
    """Rows of four blocks of 16: ties and their neighbours, zeros, outliers, the tiny, the huge."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 64))
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[0, 0, :16] = np.concatenate([ties, -ties])
    x[0, 1, :16] = np.concatenate([ties * (1 + 2**-10), [6], ties[:7] * -(1 - 2**-10)])
    x[0, 2, 16:32] = 0
    x[0, 3] *= 1e-4
    x[0, 4] *= 3000
    x[1, 0, 5] = 500
    x[1, 1, :16] = 2.0**-24
    return x.astype(dtype)


def fp4_by_hand(x: Array, unit: float) -> Array:
    """Block scales in E4M3, codes in E2M1, and back, by ml_dtypes."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
    wanted = np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / np.float32(unit)
    step = np.minimum(wanted, 448).astype(E4M3).astype(np.float32) * np.float32(unit)
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.clip(blocks / step, -6, 6).astype(E2M1).astype(np.float32)
    return np.where(step > 0, codes * step, np.float32(0)).reshape(x.shape)


def nvfp4(path: Path, kind: int, unit: float) -> Path:
    nodes = [
        h.make_node(
            "TRT_FP4DynamicQuantize",
            ["x", "unit"],
            ["codes", "scales"],
            domain="trt",
            axis=-1,
            block_size=16,
            scale_type=T.FLOAT8E4M3FN,
        ),
        h.make_node("DequantizeLinear", ["scales", "unit"], ["step"]),
        h.make_node("DequantizeLinear", ["codes", "step"], ["wide"], axis=-1, block_size=16),
        h.make_node("Cast", ["wide"], ["y"], to=T.FLOAT),
    ]
    constants = [nh.from_array(np.float32(unit), "unit")]
    return saved(path, nodes, {"x": (kind, ["b", "s", 64])}, T.FLOAT, constants)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("unit", [1 / 448, 0.01, 1e-5])
def test_fp4_activations(tmp_path: Path, dtype: Any, unit: float) -> None:
    x = difficult(dtype)
    kind = h.np_dtype_to_tensor_dtype(np.dtype(dtype))
    found = run(nvfp4(tmp_path / "m.onnx", kind, unit), x)
    np.testing.assert_array_equal(found, fp4_by_hand(x, unit))


def test_fp4_rounds_every_half_to_the_nearest_even_code(tmp_path: Path) -> None:
    """Each FP16 number of magnitude up to 6, in blocks whose scale is 1."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    bits = bits[np.abs(bits) <= 6]
    x = np.full((len(bits), 64), 6, np.float16)
    x[:, 1::16] = bits[:, np.newaxis]
    grid = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(grid[:, np.newaxis] - bits.astype(np.float64))
    odd = np.isin(np.abs(grid), [0.5, 1.5, 3, 6])[:, np.newaxis]
    expected = grid[(distance + odd * 1e-9).argmin(axis=0)]
    found = run(nvfp4(tmp_path / "m.onnx", T.FLOAT16, 1.0), x[np.newaxis])
    np.testing.assert_array_equal(found[0, :, 1::16], np.repeat(expected[:, np.newaxis], 4, 1))


def test_fp4_block_scales_round_to_the_nearest_even(tmp_path: Path) -> None:
    """Blocks whose scale lies between two numbers of E4M3, and beside that."""
    grid = np.arange(1, 127, dtype=np.uint8).view(E4M3).astype(np.float32)
    middle = (grid[:-1] + grid[1:]) / 2
    wanted = np.concatenate([np.nextafter(middle, 0), middle, np.nextafter(middle, 999)])
    x = np.ones((1, -(-len(wanted) // 4), 64), np.float32)
    x.reshape(-1, 16)[: len(wanted), 3] = wanted.astype(np.float32) * 6
    found = run(nvfp4(tmp_path / "m.onnx", T.FLOAT, 1.0), x)
    np.testing.assert_array_equal(found, fp4_by_hand(x, 1.0))


def test_fp4_weights_keep_their_values(tmp_path: Path) -> None:
    """Every code under scales of two levels, against onnx's reference evaluator."""
    rng = np.random.default_rng(1)
    codes = np.array(list(range(16)) * 16, np.uint8).view(E2M1).reshape(32, 8)
    scales = rng.uniform(0.01, 448, (2, 8)).astype(E4M3)
    nodes = [
        h.make_node("DequantizeLinear", ["scales", "unit"], ["step"]),
        h.make_node("DequantizeLinear", ["codes", "step"], ["w"], axis=0, block_size=16),
        h.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [
        packed(codes, "codes"),
        floats(scales, T.FLOAT8E4M3FN, "scales"),
        nh.from_array(np.float32(0.003), "unit"),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"x": (T.FLOAT, ["m", 32])}, T.FLOAT, constants)
    identity = np.eye(32, dtype=np.float32)
    (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": identity})
    np.testing.assert_array_equal(run(path, identity), expected)


def test_fp4_codes_pass_through_a_transpose(tmp_path: Path) -> None:
    """The type that the file states for what lies between is made to fit."""
    codes = np.array(list(range(16)), np.uint8).view(E2M1).reshape(2, 8)
    nodes = [
        h.make_node("Transpose", ["codes"], ["turned"]),
        h.make_node("DequantizeLinear", ["turned", "scale"], ["w"]),
        h.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [packed(codes, "codes"), nh.from_array(np.float32(0.5), "scale")]
    path = saved(tmp_path / "m.onnx", nodes, {"x": (T.FLOAT, ["m", 8])}, T.FLOAT, constants)
    model = onnx.load(path)
    model.graph.value_info.append(h.make_tensor_value_info("turned", T.FLOAT4E2M1, [8, 2]))
    onnx.save(model, path)
    found = run(path, np.eye(8, dtype=np.float32))
    np.testing.assert_array_equal(found, codes.astype(np.float32).T / 2)


def test_fp4_codes_in_a_constant_node(tmp_path: Path) -> None:
    codes = np.array(list(range(15)), np.uint8).view(E2M1)
    nodes = [
        h.make_node("Constant", [], ["codes"], value=packed(codes, "codes")),
        h.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        h.make_node("Add", ["x", "w"], ["y"]),
    ]
    constants = [nh.from_array(np.float32(0.5), "scale")]
    path = saved(tmp_path / "m.onnx", nodes, {"x": (T.FLOAT, [15])}, T.FLOAT, constants)
    found = run(path, np.zeros(15, np.float32))
    np.testing.assert_array_equal(found, codes.astype(np.float32) / 2)


def test_e8m0_scales(tmp_path: Path) -> None:
    codes = np.arange(-64, 64).astype(E4M3).reshape(64, 2)
    scales = np.array([[120, 127], [130, 1]], np.uint8)
    nodes = [
        h.make_node(
            "DequantizeLinear",
            ["codes", "scales"],
            ["w"],
            axis=0,
            block_size=32,
            output_dtype=T.FLOAT,
        ),
        h.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [
        floats(codes, T.FLOAT8E4M3FN, "codes"),
        floats(scales, T.FLOAT8E8M0, "scales"),
    ]
    path = saved(tmp_path / "m.onnx", nodes, {"x": (T.FLOAT, ["m", 64])}, T.FLOAT, constants)
    powers = np.repeat(np.ldexp(np.float32(1), scales.astype(int) - 127), 32, axis=0)
    found = run(path, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(found, codes.astype(np.float32) * powers)


def mx(path: Path, kind: int, width: int) -> Path:
    shared = {"axis": -1, "block_size": 32, "domain": "trt"}
    nodes = [
        h.make_node(
            "TRT_MXFP8DynamicQuantize",
            ["x"],
            ["codes", "scales"],
            output_dtype=T.FLOAT8E4M3FN,
            **shared,
        ),
        h.make_node(
            "TRT_MXFP8DequantizeLinear", ["codes", "scales"], ["d"], output_dtype=kind, **shared
        ),
        h.make_node("Cast", ["d"], ["y"], to=T.FLOAT),
    ]
    return saved(path, nodes, {"x": (kind, ["b", "s", width])}, T.FLOAT, [])


def mx_by_hand(x: Array) -> Array:
    """The least power of two that keeps a block within 448; frexp, not a logarithm."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    mantissa, exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True) / np.float32(448))
    power = np.clip(exponent - (mantissa == 0.5), -126, 127)
    scale = np.where(mantissa == 0, 1, np.ldexp(np.float32(1), power)).astype(np.float32)
    codes = np.clip(blocks / scale, -448, 448).astype(E4M3).astype(np.float32)
    return (codes * scale).reshape(x.shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_mxfp8_activations(tmp_path: Path, dtype: Any) -> None:
    x = difficult(dtype)
    kind = h.np_dtype_to_tensor_dtype(np.dtype(dtype))
    np.testing.assert_array_equal(run(mx(tmp_path / "m.onnx", kind, 64), x), mx_by_hand(x))


def test_mxfp8_scales_at_every_power_of_two(tmp_path: Path) -> None:
    """448 x 2^e, and its neighbours on both sides, for each e that FP32 has."""
    peaks = np.ldexp(np.float32(448), np.arange(-126, 119)).astype(np.float32)
    peaks = np.concatenate([np.nextafter(peaks, 0), peaks, np.nextafter(peaks, np.float32(np.inf))])
    x = np.zeros((1, len(peaks), 32), np.float32)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = peaks, peaks * np.float32(0.3), peaks * np.float32(-0.011)
    np.testing.assert_array_equal(run(mx(tmp_path / "m.onnx", T.FLOAT, 32), x), mx_by_hand(x))


def test_mxfp8_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    codes = rng.standard_normal((64, 48)).astype(E4M3)
    scales = rng.integers(118, 130, (2, 48)).astype(np.uint8)
    nodes = [
        h.make_node(
            "TRT_MXFP8DequantizeLinear",
            ["codes", "scales"],
            ["w"],
            domain="trt",
            axis=0,
            block_size=32,
            output_dtype=T.FLOAT16,
        ),
        h.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = [floats(codes, T.FLOAT8E4M3FN, "codes"), nh.from_array(scales, "scales")]
    path = saved(tmp_path / "m.onnx", nodes, {"x": (T.FLOAT16, ["m", 64])}, T.FLOAT16, constants)
    powers = np.repeat(np.ldexp(np.float32(1), scales.astype(int) - 127), 32, axis=0)
    found = run(path, np.eye(64, dtype=np.float16))
    np.testing.assert_array_equal(found, (codes.astype(np.float32) * powers).astype(np.float16))


def test_mxfp8_under_given_scales(tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    scales = np.random.default_rng(4).integers(117, 122, (5, 2)).astype(np.uint8)
    shared = {"axis": -1, "block_size": 32, "domain": "trt"}
    nodes = [
        h.make_node("TRT_MXFP8QuantizeLinear", ["x", "scales"], ["codes"], **shared),
        h.make_node("TRT_MXFP8DequantizeLinear", ["codes", "scales"], ["y"], **shared),
    ]
    path = saved(
        tmp_path / "m.onnx",
        nodes,
        {"x": (T.FLOAT, [5, 64])},
        T.FLOAT,
        [nh.from_array(scales, "scales")],
    )
    powers = np.ldexp(np.float32(1), scales.astype(int) - 127)[..., np.newaxis]
    codes = np.clip(x.reshape(5, 2, 32) / powers, -448, 448).astype(E4M3).astype(np.float32)
    np.testing.assert_array_equal(run(path, x), (codes * powers).reshape(5, 64))


def test_fp8_operators_of_tensorrt(tmp_path: Path) -> None:
    nodes = [
        h.make_node("TRT_FP8QuantizeLinear", ["x", "scale"], ["codes"], domain="trt"),
        h.make_node("TRT_FP8DequantizeLinear", ["codes", "scale"], ["y"], domain="trt"),
    ]
    constants = [nh.from_array(np.float32(0.02), "scale")]
    given = {"x": (T.FLOAT16, [4, 64])}
    path = saved(tmp_path / "m.onnx", nodes, given, T.FLOAT, constants, opset=21)
    x = difficult(np.float16)[0, :4]
    wide = np.clip(x.astype(np.float32) / np.float32(0.02), -448, 448)
    expected = wide.astype(E4M3).astype(np.float32) * np.float32(0.02)
    np.testing.assert_array_equal(run(path, x), expected)


def test_a_model_that_runs_as_it_is_stays(tmp_path: Path) -> None:
    codes = h.make_tensor("codes", T.INT4, [32, 2], bytes(range(32)), raw=True)
    scales = nh.from_array(np.ones((2, 2), np.float16), "scales")
    nodes = [
        h.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=0, block_size=16),
        h.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    path = saved(
        tmp_path / "m.onnx", nodes, {"x": (T.FLOAT16, ["m", 32])}, T.FLOAT16, [codes, scales]
    )
    with runnable(path) as (usable, notes):
        assert usable == path and notes == ()


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_what_cannot_be_read_is_left_to_who_opens_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with runnable(path) as (usable, _):
        assert usable == path


def test_blocks_along_another_axis_are_refused(tmp_path: Path) -> None:
    path = nvfp4(tmp_path / "m.onnx", T.FLOAT, 0.01)
    model = onnx.load(path)
    model.graph.node[0].attribute[0].i = 1
    onnx.save(model, path)
    with pytest.raises(OnnxqError, match="along axis 1 are not simulated"), runnable(path):
        pass


def test_the_note_counts_what_was_replaced(tmp_path: Path) -> None:
    with runnable(nvfp4(tmp_path / "m.onnx", T.FLOAT, 0.01)) as (_, (note,)):
        assert "simulated" in note and "1 TRT_FP4DynamicQuantize" in note


MEMORY = """
import sys
from pathlib import Path
from onnxq.graph.simulate import runnable

with runnable(Path(sys.argv[1])) as (path, _):
    print(sum(file.stat().st_size for file in path.parent.iterdir()))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def test_weights_are_widened_in_pieces(tmp_path: Path) -> None:
    """Eight weights of 2^26 codes: 0.27 GB of FP4, 0.54 GB as FP8, in the memory of none."""
    count, columns = 8, 1 << 26
    model = onnx.load(saved(tmp_path / "m.onnx", [], {"x": (T.FLOAT, [1])}, T.FLOAT, []))
    scale = nh.from_array(np.float32(1), "scale")
    model.graph.initializer.append(scale)
    for index in range(count):
        tensor = T(name=f"w{index}", data_type=T.FLOAT4E2M1, dims=[columns])
        set_reference(tensor, "sparse.bin", index * columns // 2, columns // 2)
        model.graph.initializer.append(tensor)
        names = [f"w{index}", "scale"], [f"d{index}"]
        model.graph.node.append(h.make_node("DequantizeLinear", *names))
    model.graph.node.append(h.make_node("Sum", ["x", *(f"d{i}" for i in range(count))], ["y"]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "sparse.bin").open("wb") as stream:
        stream.truncate(count * columns // 2)
    command = [sys.executable, "-c", MEMORY, tmp_path / "m.onnx"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    written, peak = map(int, done.stdout.split())
    assert written > count * columns
    assert peak < 130e6, f"{peak / 1e6:.0f} MB"  # about 80 before it reads anything
