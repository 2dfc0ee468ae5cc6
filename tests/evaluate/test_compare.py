from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from evaluate_models import samples, write
from onnx import TensorProto, helper, numpy_helper
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import RunResults

from onnxq.errors import OnnxqError
from onnxq.evaluate import compare as compare_module
from onnxq.evaluate.compare import compare
from onnxq.evaluate.comparison import Comparison
from onnxq.evaluate.runners import Model, gpu_present

IDENTITY = "agraph (float[N,4] x) => (float[N,4] y) { y = Identity(x) }"
SCALED = """agraph (float[N,4] x) => (float[N,4] y)
    { c = Constant<value = float {1.01}>() y = Mul(x, c) }"""


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write(tmp_path / "reference.onnx", IDENTITY)


def candidate_of(tmp_path: Path, graph: str, **initializers: np.ndarray) -> Path:
    return write(tmp_path / "candidate.onnx", graph, **initializers)


def versus(reference: Path, candidate: Path, count: int = 3, **options: Any) -> Comparison:
    models = {"original": reference, "candidate": candidate}
    return compare(models, samples(count, 5, 4), **options)


def test_a_known_error_gives_its_snr(reference: Path, tmp_path: Path) -> None:
    found = versus(reference, candidate_of(tmp_path, SCALED))
    # The error is 0.01 x everywhere: 10 log10(1 / 0.01**2) = 40 dB. In FP32 each product is off by
    # at most 2**-24 x, 6e-6 of the error, which moves the SNR by less than 1e-4 dB.
    error = found.row("candidate", "y").found.error
    assert error is not None and error.as_dict()["snr_db"] == pytest.approx(40.0, abs=1e-4)
    assert error.elements == 3 * 5 * 4
    assert found.samples == 3 and found.passed and not found.problems


def test_a_model_is_exact_against_itself(reference: Path) -> None:
    found = versus(reference, reference, min_snr=200.0, min_cosine=1.0, max_abs_error=0.0)
    assert found.passed and "exact" in found.lines()[2]


@pytest.mark.parametrize(
    ("tolerance", "passed"),
    [
        ({"min_snr": 39.9}, True),
        ({"min_snr": 40.1}, False),
        ({"min_cosine": 0.9999}, True),
        ({"max_abs_error": 1e-3}, False),
        ({"min_snr": 20.0, "max_abs_error": 1e-3}, False),
    ],
)
def test_tolerances_decide(
    reference: Path, tmp_path: Path, tolerance: dict[str, float], passed: bool
) -> None:
    found = versus(reference, candidate_of(tmp_path, SCALED), **tolerance)
    assert found.passed is passed
    assert ("FAILED" in "\n".join(found.lines())) is not passed


def test_a_reversed_output_fails_the_cosine(reference: Path, tmp_path: Path) -> None:
    reversed_ = candidate_of(tmp_path, IDENTITY.replace("Identity", "Neg"))
    assert not versus(reference, reversed_, min_cosine=-0.5).passed
    assert versus(reference, reversed_, min_cosine=-1.0).passed


def test_integers_are_cast_only_where_they_fit(tmp_path: Path) -> None:
    graph = "agraph ({}[N] x) => (float[N] y) {{ y = Cast<to = 1>(x) }}"
    wide = write(tmp_path / "wide.onnx", graph.format("int64"))
    narrow = write(tmp_path / "narrow.onnx", graph.format("int32"))
    models = {"original": wide, "candidate": narrow}
    found = compare(models, [{"x": np.array([1, 2**31 - 1])}], min_snr=200.0)
    assert found.passed and "cast from int64 to int32" in found.notes["candidate"][0]
    with pytest.raises(OnnxqError, match="takes 'x' in int32"):
        compare(models, [{"x": np.array([1, 2**31])}])


def test_nan_is_counted_and_never_within_tolerance(reference: Path, tmp_path: Path) -> None:
    broken = candidate_of(tmp_path, "agraph (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }")
    negative = sum(int((feed["x"] < 0).sum()) for feed in samples(3, 5, 4))
    found = versus(reference, broken)
    assert found.passed  # no tolerance was given
    assert f"{negative} of 60 elements are NaN" in found.problems[0]
    assert not versus(reference, broken, min_snr=-1000.0).passed
    assert "nan" not in json.dumps(found.as_dict(), allow_nan=False).replace("nan_or_inf", "")


def test_integer_outputs_are_compared_by_equality(tmp_path: Path) -> None:
    graph = """agraph (float[N,4] x) => (int64[N,1] best)
        {{ y = {}(x) best = ArgMax<axis = 1>(y) }}"""
    first = write(tmp_path / "first.onnx", graph.format("Identity"))
    second = write(tmp_path / "second.onnx", graph.format("Neg"))
    found = versus(first, second, min_equal=0.5)
    # The largest of four distinct values is never also the smallest.
    assert found.row("candidate", "best").found.as_dict()["equal_share"] == 0.0
    assert not found.passed and versus(first, first, min_equal=1.0).passed


def test_outputs_that_one_side_lacks_are_said(tmp_path: Path) -> None:
    both = """agraph (float[N,4] x) => (float[N,4] y, float[N,4] z)
        { y = Identity(x) z = Neg(x) }"""
    only_y = write(tmp_path / "y.onnx", IDENTITY)
    two = write(tmp_path / "two.onnx", both)
    lacking = versus(two, only_y)
    assert lacking.passed and "lacks the output 'z'" in lacking.problems[0]
    assert not versus(two, only_y, min_snr=1.0).passed
    more = versus(only_y, two, min_snr=1.0)
    assert more.passed and "'z'" in more.notes["candidate"][0]
    assert versus(two, only_y, outputs=["y"], min_snr=1.0).passed
    only_z = write(tmp_path / "z.onnx", both.replace("float[N,4] y, ", ""))
    with pytest.raises(OnnxqError, match="no output"):
        versus(only_y, only_z)
    with pytest.raises(OnnxqError, match="nothing"):
        versus(two, only_y, outputs=["y", "nothing"])


def test_outputs_of_other_shapes_are_refused(reference: Path, tmp_path: Path) -> None:
    other = candidate_of(
        tmp_path,
        "agraph (float[N,4] x) => (float[N,1] y) { y = ReduceSum<noop_with_empty_axes = 0>(x, a) }",
        a=np.array([1]),
    )
    with pytest.raises(OnnxqError, match=r"\[5, 4\].*\[5, 1\]"):
        versus(reference, other)


def test_floating_inputs_are_cast_and_that_is_noted(reference: Path, tmp_path: Path) -> None:
    half = candidate_of(
        tmp_path,
        "agraph (float16[N,4] x) => (float[N,4] y) { y = Cast<to = 1>(x) }",
    )
    found = versus(reference, half)
    assert found.notes["candidate"] == ("input 'x' cast from float32 to float16",)
    error = found.row("candidate", "y").found.error
    expected = np.concatenate([feed["x"] for feed in samples(3, 5, 4)])
    assert error.max_error == np.abs(expected - expected.astype(np.float16)).max()  # type: ignore[union-attr]


def test_bfloat16_outputs_are_read(reference: Path, tmp_path: Path) -> None:
    brain = candidate_of(
        tmp_path, "agraph (float[N,4] x) => (bfloat16[N,4] y) { y = Cast<to = 16>(x) }"
    )
    for sequential in (False, True):
        error = versus(reference, brain, sequential=sequential).row("candidate", "y").found.error
        expected = np.concatenate([feed["x"] for feed in samples(3, 5, 4)])
        rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert error.max_error == np.abs(expected - rounded).max()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"z": np.ones((5, 4), np.float32)}, "'x', which the data lacks"),
        ({"x": np.ones((5, 3), np.float32)}, r"\[N, 4\], the data has \[5, 3\]"),
        ({"x": np.ones(4, np.float32)}, r"the data has \[4\]"),
        ({"x": np.ones((5, 4), np.int64)}, "in float32, the data has int64"),
    ],
)
def test_data_that_does_not_fit(reference: Path, feed: dict[str, Any], message: str) -> None:
    with pytest.raises(OnnxqError, match=message):
        compare({"original": reference, "candidate": reference}, [feed])


def test_nothing_to_compare(reference: Path) -> None:
    with pytest.raises(OnnxqError, match="no sample"):
        compare({"a": reference, "b": reference}, [])
    with pytest.raises(OnnxqError, match="at least one other"):
        compare({"a": reference}, samples(1, 5, 4))


def test_a_model_that_needs_a_session_option_says_so(tmp_path: Path) -> None:
    """INT8 before a Reshape; ONNX Runtime moves DequantizeLinear behind it."""
    plain = write(
        tmp_path / "plain.onnx",
        "agraph (float[N,32] x) => (float[M,8] y) { y = Reshape(x, to) }",
        to=np.array([-1, 8]),
    )
    quantized = write(
        tmp_path / "int8.onnx",
        """agraph (float[N,32] x) => (float[M,8] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            y = Reshape(d, to)
        }""",
        s=np.array(0.03, np.float32),
        z=np.array(0, np.int8),
        to=np.array([-1, 8]),
    )
    found = compare({"original": plain, "candidate": quantized}, samples(1, 8, 32), min_snr=20.0)
    assert found.passed, found.lines()
    assert any("disable_quant_qdq" in note for note in found.notes["candidate"])
    assert any("disable_quant_qdq" in line for line in found.lines())


def test_an_fp8_model_that_onnx_runtime_1_31_fuses_wrongly_is_compared(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)
    plain = write(
        tmp_path / "plain.onnx",
        "agraph (float[N,32] x) => (float[N,32] y) { y = MatMul(x, w) }",
        w=weight,
    )
    quantized = _fp8_linear(tmp_path / "fp8.onnx", weight)
    found = compare({"original": plain, "candidate": quantized}, samples(1, 8, 32), min_snr=20.0)
    assert found.passed, found.lines()


def _fp8_linear(path: Path, weight: np.ndarray) -> Path:
    scale = np.float32(np.abs(weight).max() / 448)
    codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    x_scale, x_zero = np.float32(4 / 448), np.zeros((), ml_dtypes.float8_e4m3fn)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    fp8 = TensorProto.FLOAT8E4M3FN
    constants = [
        numpy_helper.from_array(np.array(x_scale), "xs"),
        numpy_helper.from_array(np.array(scale), "ws"),
        helper.make_tensor("z", fp8, [], x_zero.tobytes(), raw=True),
        helper.make_tensor("wq", fp8, weight.shape, codes.tobytes(), raw=True),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 32]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


class Scaled(BaseRunner):
    """y = factor * x, in one buffer that every call overwrites, as TensorRT's runner does."""

    alive = 0
    most_alive = 0

    def __init__(self, label: str, factor: float) -> None:
        super().__init__(name=label)
        self.factor, self.buffer = factor, np.empty((5, 4), np.float32)

    def activate_impl(self) -> None:
        Scaled.alive += 1
        Scaled.most_alive = max(Scaled.most_alive, Scaled.alive)

    def deactivate_impl(self) -> None:
        Scaled.alive -= 1

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("x", np.float32, (5, 4))

    def infer_impl(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        np.multiply(feed["x"], self.factor, out=self.buffer)
        return {"y": self.buffer}


def scaled(**factors: float) -> dict[str, Path | Model]:
    Scaled.most_alive = 0
    return {label: Model(label, Scaled(label, factor)) for label, factor in factors.items()}


def test_one_after_the_other_finds_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = []
    for sequential, most in ((False, 3), (True, 1)):
        models = scaled(original=1.0, half=0.5, near=1.01)
        found.append(compare(models, samples(4, 5, 4), sequential=sequential).as_dict())
        assert (Scaled.alive, Scaled.most_alive) == (0, most)
        assert not list(tmp_path.iterdir())  # the spool is gone
    assert found[0] == found[1]
    assert [row["snr_db"] for row in found[0]["rows"]] == pytest.approx(
        [10 * np.log10(4), 40], abs=1e-4
    )


def test_models_that_do_not_fit_run_one_after_the_other(monkeypatch: Any) -> None:
    resident = iter([0, 1000])
    monkeypatch.setattr(compare_module, "resident_memory", lambda: next(resident))
    monkeypatch.setattr(compare_module, "available_memory", lambda: 1999)
    found = compare(scaled(original=1.0, half=0.5, near=1.01), samples(4, 5, 4))
    assert Scaled.most_alive == 1
    assert "one after the other" in found.remarks[0]


def test_models_that_fit_run_side_by_side(monkeypatch: Any) -> None:
    resident = iter([0, 1000])
    monkeypatch.setattr(compare_module, "resident_memory", lambda: next(resident))
    monkeypatch.setattr(compare_module, "available_memory", lambda: 2001)
    found = compare(scaled(original=1.0, half=0.5, near=1.01), samples(4, 5, 4))
    assert Scaled.most_alive == 3 and not found.remarks


@pytest.mark.parametrize("sequential", [False, True])
def test_saved_outputs_are_polygraphys(tmp_path: Path, sequential: bool) -> None:
    data = samples(3, 5, 4)
    for name in ("outputs.json", "outputs"):
        target = tmp_path / f"{sequential}-{name}"
        compare(scaled(original=1.0, half=0.5), data, sequential=sequential, save_outputs=target)
        files = sorted(target.iterdir()) if target.is_dir() else [target]
        runs = [RunResults.load(str(path)) for path in files]
        for label, factor in (("original", 1.0), ("half", 0.5)):
            kept = [one["y"] for run in runs for one in run[label]]
            assert len(kept) == 3
            for array, feed in zip(kept, data, strict=True):
                np.testing.assert_array_equal(array, factor * feed["x"])
        assert len(files) == (3 if target.is_dir() else 1)
    with pytest.raises(OnnxqError, match="not empty"):
        compare(scaled(original=1.0, half=0.5), data, save_outputs=target)


@pytest.mark.skipif(gpu_present(), reason="without a GPU only")
def test_an_engine_needs_a_gpu(reference: Path, tmp_path: Path) -> None:
    engine = tmp_path / "model.plan"
    engine.write_bytes(b"engine")
    with pytest.raises(OnnxqError, match="needs an NVIDIA GPU"):
        versus(reference, engine)


def test_a_model_that_fails_is_named(reference: Path, tmp_path: Path) -> None:
    failing = candidate_of(
        tmp_path,
        "agraph (float[N,4] x) => (float[N,4] y) { y = Reshape(x, s) }",
        s=np.array([7, 4]),
    )
    with pytest.raises(OnnxqError, match="'candidate'"):
        versus(reference, failing)
    assert not Scaled.alive


def test_the_library_prints_nothing_and_reports_progress(reference: Path, capfd: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    versus(reference, reference, progress=lambda *step: seen.append(step))
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {total for _, _, total in seen} == {6}
