"""ONNX Runtime sessions: types it cannot hand out itself, options it needs, errors in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from calib_models import chain, model
from onnx import TensorProto, helper

from onnxq.calibrate.session import open_session
from onnxq.errors import OnnxqError

ort = pytest.importorskip("onnxruntime")
BEFORE_1_32 = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 32)


def test_inputs_and_outputs_are_seen_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(), path)
    for source in (path, path.read_bytes()):
        session = open_session(source)
        (spec,) = session.inputs
        assert str(spec) == "x[batch,seq,8] float32"
        assert session.output_names == ("a2",)
        assert session.notes == ()
        x = np.ones((2, 3, 8), np.float32)
        (found,) = session.run(None, {"x": x})
        assert found.shape == (2, 3, 8)


def test_external_weights_are_read_in_place_and_nothing_is_written(tmp_path: Path) -> None:
    proto = chain(width=64)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    content = onnx.load(tmp_path / "m.onnx", load_external_data=False).SerializeToString()
    x = {"x": np.ones((1, 2, 64), np.float32)}
    (found,) = open_session(content, folder=tmp_path).run(None, x)
    (expected,) = open_session(chain(width=64).SerializeToString()).run(None, x)
    assert np.array_equal(found, expected)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()} == before
    with pytest.raises(OnnxqError, match="cannot load"):
        open_session(content, folder=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "kind, dtype",
    [
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        (TensorProto.FLOAT16, np.float16),
    ],
)
def test_small_floats_come_out_as_what_they_are(kind: int, dtype: type) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=kind)
    proto = model([node], {"x": (TensorProto.FLOAT, ["n"])}, {"y": kind})
    session = open_session(proto.SerializeToString())
    values = np.array([1, 2.5, -3, 0.1], np.float32)
    (found,) = session.run(["y"], {"x": values})
    assert found.dtype == dtype
    assert np.array_equal(found, values.astype(dtype))
    (empty,) = session.run(["y"], {"x": values[:0]})
    assert empty.shape == (0,)


def test_bf16_goes_in() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    proto = model([node], {"x": (TensorProto.BFLOAT16, ["n"])}, {"y": TensorProto.FLOAT})
    session = open_session(proto.SerializeToString())
    values = np.array([1, 2.5, -3], ml_dtypes.bfloat16)
    assert session.run(None, {"x": values})[0].tolist() == [1, 2.5, -3]


def fp8_product(scale_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x -> Q/DQ in FP8 -> MatMul with an FP8 weight of ones."""
    numpy_type = helper.tensor_dtype_to_np_dtype(scale_type)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    proto = model(
        nodes, {"x": (scale_type, ["n", 4])}, {"y": scale_type}, {"s": np.array(1, numpy_type)}
    )
    for name, shape in (("z", []), ("w", [4, 4])):
        value = np.full(shape, 0 if name == "z" else 1).astype(ml_dtypes.float8_e4m3fn).tobytes()
        proto.graph.initializer.append(
            helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, shape, value, raw=True)
        )
    return proto


def is_told(notes: tuple[str, ...]) -> bool:
    return any("session.disable_quant_qdq=1" in note for note in notes)


def test_int8_layers_that_onnx_runtime_moves_wrongly_still_load_and_it_is_said() -> None:
    """ONNX Runtime moves DequantizeLinear behind Unsqueeze, to where it has no INT8 kernel."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Unsqueeze", ["d", "axis"], ["y"]),
    ]
    constants = {"s": np.float32(0.5), "z": np.int8(0), "axis": np.array([2])}
    proto = model(nodes, {"x": (TensorProto.FLOAT, ["n", 4])}, {"y": TensorProto.FLOAT}, constants)
    session = open_session(proto.SerializeToString())
    assert is_told(session.notes)
    (found,) = session.run(None, {"x": np.full((1, 4), 3.2, np.float32)})
    assert found.tolist() == [[[3.0]] * 4]


def test_fp8_layers_that_onnx_runtime_fused_wrongly_load_in_any_and_it_is_said() -> None:
    session = open_session(fp8_product().SerializeToString())
    assert is_told(session.notes) == BEFORE_1_32
    (found,) = session.run(None, {"x": np.ones((1, 4), np.float32)})
    assert found.tolist() == [[4.0] * 4]


def test_an_fp8_layer_that_is_only_moved_loads_too() -> None:
    """1.31 moves DequantizeLinear behind Unsqueeze, which has no kernel for FP8."""
    proto = fp8_product()
    proto.graph.node[-1].CopyFrom(helper.make_node("Unsqueeze", ["d", "axis"], ["e"]))
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    proto.graph.initializer.append(axis)
    proto.graph.node.append(helper.make_node("QuantizeLinear", ["e", "s", "z"], ["p"]))
    proto.graph.node.append(helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]))
    del proto.graph.node[2]
    session = open_session(proto.SerializeToString())
    assert is_told(session.notes) == BEFORE_1_32
    (found,) = session.run(None, {"x": np.full((1, 4), 3, np.float32)})
    assert found.tolist() == [[[3.0]] * 4]


def test_fp8_layers_that_load_by_themselves_get_no_option() -> None:
    assert open_session(fp8_product(TensorProto.FLOAT16).SerializeToString()).notes == ()


def test_what_cannot_be_loaded_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = model(
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n"])},
        {"y": TensorProto.FLOAT},
    )
    for source in (b"", b"junk" * 10, bad.SerializeToString(), tmp_path / "none.onnx", tmp_path):
        with pytest.raises(OnnxqError, match=r"cannot load|cannot read the model") as error:
            open_session(source)
        assert "\n" not in str(error.value)
    words = model(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.STRING, ["n"])},
        {"y": TensorProto.STRING},
    )
    with pytest.raises(OnnxqError, match="string"):
        open_session(words.SerializeToString())
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_run_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    session = open_session(chain().SerializeToString())
    for feed in ({}, {"x": np.ones((1, 2, 9), np.float32)}, {"x": np.ones((1, 8), np.float32)}):
        with pytest.raises(OnnxqError, match="could not run") as error:
            session.run(None, feed)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_cuda_that_is_not_there_is_refused_and_auto_is_content() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    content = chain().SerializeToString()
    assert open_session(content, device="auto").provider == "CPUExecutionProvider"
    with pytest.raises(OnnxqError, match="'cuda' was asked for"):
        open_session(content, device="cuda")


def test_no_kernel_for_a_type_says_so() -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    proto = model([node], {"x": (TensorProto.BFLOAT16, [4, 4])}, {"y": TensorProto.BFLOAT16})
    with pytest.raises(OnnxqError, match=r"cannot load the model.*no kernel for that type"):
        open_session(proto.SerializeToString(), device="cpu")


def test_four_bit_weights_leave_the_activations_as_they_are() -> None:
    """ONNX Runtime's own fusion would quantize x to INT8 here."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (128, 32)).astype(ml_dtypes.int4)
    x = rng.standard_normal((16, 128)).astype(np.float32)
    x[:, 3] *= 50
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    weights = {"w": codes, "s": np.full((4, 32), 0.01, np.float32)}
    proto = model(nodes, {"x": (TensorProto.FLOAT, [16, 128])}, {"y": TensorProto.FLOAT}, weights)
    (found,) = open_session(proto.SerializeToString(), device="cpu").run(None, {"x": x})
    wanted = x.astype(np.float64) @ (codes.astype(np.float64) * np.float64(np.float32(0.01)))
    # A sum of 128 float32 products, whatever its order.
    size = np.abs(x).astype(np.float64) @ (np.abs(codes.astype(np.float64)) * 0.01)
    assert (np.abs(found - wanted) <= 130 * 2.0**-24 * size).all()


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from onnxq.calibrate.session import InputSpec
    from onnxq.calibrate.text import text_samples

    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "t.txt").write_text("a b c")
    ids = InputSpec("input_ids", np.dtype(np.int64), ("batch", "seq"))
    with pytest.raises(OnnxqError, match=rf"{package}.*onnxq\[cpu\]"):
        if package == "onnxruntime":
            open_session(chain().SerializeToString())
        else:
            text_samples(tmp_path / "t.txt", tmp_path / "tokenizer.json", [ids])


def test_importing_the_room_imports_nothing_heavy() -> None:
    rooms = ("data", "passes", "probe", "random_data", "ranges", "run", "table", "text")
    imports = "; ".join(f"import onnxq.calibrate.{name}" for name in rooms)
    heavy = "{'onnx', 'onnxruntime', 'polygraphy', 'tokenizers', 'scipy'}"
    code = f"import sys; {imports}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
