"""Calibration of models: exact, in any number of passes, and precise about what stopped it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from calib_models import chain, maker, model
from onnx import TensorProto, helper

from onnxq.calibrate.data import Samples, open_samples
from onnxq.calibrate.probe import measure_ranges
from onnxq.calibrate.run import calibrate
from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.statistics import Histogram
from onnxq.errors import OnnxqError

pytest.importorskip("onnxruntime")

X = InputSpec("x", np.dtype(np.float32), ("batch", "seq", 8))
NAMES = [f"{kind}{i}" for i in range(3) for kind in "ha"]
WATCHED = dict.fromkeys(NAMES, "histogram+channel_amax:-1")


def samples(folder: Path, rows: int = 6, batch: int = 1, **changes: float) -> Samples:
    values = np.random.default_rng(5).standard_normal((rows, 4, 8)).astype(np.float32)
    for row, value in changes.items():
        values[int(row.removeprefix("row")), 2, 3] = value
    path = folder / f"calib{len(list(folder.iterdir()))}.npz"
    np.savez(path, x=values)
    return open_samples(path, [X], batch=batch)


def reference(proto: onnx.ModelProto, data: Samples) -> dict[str, np.ndarray]:
    """All watched values at once, from onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in NAMES)
    runs = [ReferenceEvaluator(copy).run(NAMES, feed) for feed in data]
    return {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(NAMES)}


def test_statistics_are_those_of_the_models_own_values(tmp_path: Path) -> None:
    proto, data = chain(), samples(tmp_path)
    make, _ = maker(proto, tmp_path)
    table = calibrate(make, WATCHED, data, fingerprint="f")
    for name, values in reference(proto, data).items():
        # Products of 8 terms added in another order: 8 roundings of 2^-24 each, at most.
        close = {"rtol": 8 * 2.0**-23, "atol": 1e-6}
        np.testing.assert_allclose(table.extremes(name), (values.min(), values.max()), **close)
        channels = np.abs(values).max(axis=(0, 1))
        np.testing.assert_allclose(table.channels(name), channels, **close)
        histogram = table.of(name)["histogram"]
        assert isinstance(histogram, Histogram) and histogram.bins.counts.sum() == values.size
        exact = float(np.percentile(np.abs(values), 90, method="inverted_cdf"))
        # Within a bin, which is 1/128 of its values at most.
        assert table.range(name, "percentile:90") == pytest.approx(exact, rel=1 / 127)
    assert table.samples == 6 and table.fingerprint == "f"
    assert table.data[0].digest == data.digest


@pytest.mark.parametrize("memory", [1, 300, 700])
def test_several_passes_find_exactly_what_one_does(tmp_path: Path, memory: int) -> None:
    """One step's values are 6 tensors of 1 x 4 x 8 floats: 768 bytes."""
    make, asked = maker(chain(), tmp_path)
    data = samples(tmp_path)
    whole = calibrate(make, WATCHED, data, memory=768)
    assert asked == [NAMES]
    asked.clear()
    split = calibrate(make, WATCHED, data, memory=memory)
    groups = [group for group in asked if group != NAMES]
    assert [name for group in groups for name in group] == NAMES
    assert all(len(group) == max(1, memory // 128) for group in groups[:-1])
    assert split.digest == whole.digest


def test_sizes_onnx_runtime_cannot_infer_are_measured(tmp_path: Path) -> None:
    """The output of NonZero has as many columns as x has non-zeros: nobody infers that."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"]),
        helper.make_node("Cast", ["n"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["c", "c"], ["d"]),
        helper.make_node("Add", ["d", "d"], ["e"]),
    ]
    proto = model(nodes, {"x": (TensorProto.FLOAT, ["batch", "seq", 8])}, {"e": TensorProto.FLOAT})
    make, asked = maker(proto, tmp_path)
    watched = dict.fromkeys("cde", "histogram")
    data = samples(tmp_path)
    whole = calibrate(make, watched, data, memory=1 << 20)
    asked.clear()
    split = calibrate(make, watched, data, memory=400)  # one tensor is 3 x 32 floats: 384 bytes
    assert asked[-3:] == [["c"], ["d"], ["e"]]
    assert split.digest == whole.digest


@pytest.mark.parametrize("batch", [2, 4, 6])
def test_the_batch_does_not_change_the_table(tmp_path: Path, batch: int) -> None:
    """All values are whole numbers: no sum is rounded, so ORT's order of adding is no matter."""
    proto = chain()
    for weight in proto.graph.initializer:
        signs = np.sign(onnx.numpy_helper.to_array(weight))
        weight.CopyFrom(onnx.numpy_helper.from_array(signs.astype(np.float32), weight.name))
    values = np.random.default_rng(0).integers(-8, 9, (6, 4, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=values)
    make, _ = maker(proto, tmp_path)
    one, many = (
        calibrate(make, WATCHED, open_samples(tmp_path / "d.npz", [X], batch=b)) for b in (1, batch)
    )
    assert one.digest == many.digest
    assert one.data == many.data


def test_threads_do_not_change_the_table(tmp_path: Path) -> None:
    make, _ = maker(chain(), tmp_path)
    data = samples(tmp_path)
    assert len({calibrate(make, WATCHED, data, threads=n).digest for n in (1, 2)}) == 1


@pytest.mark.parametrize(
    "dtype, numpy_type",
    [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, ml_dtypes.bfloat16)],
)
def test_half_precision_tensors(tmp_path: Path, dtype: int, numpy_type: type) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=dtype)]
    proto = model(nodes, {"x": (TensorProto.FLOAT, ["batch", "seq", 8])}, {"y": dtype})
    make, _ = maker(proto, tmp_path, {"y": dtype})
    data = samples(tmp_path)
    table = calibrate(make, {"y": "histogram"}, data)
    values = np.concatenate([f["x"] for f in data]).astype(numpy_type)
    assert table.extremes("y") == (float(values.min()), float(values.max()))


def overflowing() -> onnx.ModelProto:
    """Exp of x: infinite in FP32 from 88.8 on."""
    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("Sub", ["e", "e"], ["n"])]
    return model(nodes, {"x": (TensorProto.FLOAT, ["batch", "seq", 8])}, {"n": TensorProto.FLOAT})


@pytest.mark.parametrize("statistic", ["amax", "histogram", "channel_amax:-1"])
@pytest.mark.parametrize("tensor, word", [("e", "infinite"), ("n", "NaN")])
def test_nan_and_infinity_name_the_tensor_and_the_sample(
    tmp_path: Path, statistic: str, tensor: str, word: str
) -> None:
    make, _ = maker(overflowing(), tmp_path)
    data = samples(tmp_path, batch=2, row3=100.0)
    with pytest.raises(OnnxqError, match=f"'{tensor}' is not finite in sample 2 to 3: 1 {word}"):
        calibrate(make, {tensor: statistic}, data)


def test_a_run_that_fails_names_the_sample(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["w", "ids"], ["y"])]
    weights = {"w": np.ones((10, 4), np.float32)}
    proto = model(nodes, {"ids": (TensorProto.INT64, ["batch", "seq"])}, {"y": 1}, weights)
    make, _ = maker(proto, tmp_path)
    ids = InputSpec("ids", np.dtype(np.int64), ("batch", "seq"))
    np.savez(tmp_path / "d.npz", ids=np.array([[1, 2], [3, 11]]))
    with pytest.raises(OnnxqError, match=r"sample 1: ONNX Runtime could not run .*out of"):
        calibrate(make, {"y": "amax"}, open_samples(tmp_path / "d.npz", [ids]))


def test_nothing_is_written_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(chain(width=8), folder / "m.onnx", save_as_external_data=True, size_threshold=0)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    assert len(before) == 2
    make, _ = maker(onnx.load(folder / "m.onnx", load_external_data=False), folder)
    calibrate(make, WATCHED, samples(tmp_path), memory=1)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before


def test_progress_counts_every_step_of_every_pass(tmp_path: Path) -> None:
    make, _ = maker(chain(), tmp_path)
    said: list[tuple[str, int, int]] = []
    calibrate(make, WATCHED, samples(tmp_path), memory=384, progress=lambda *a: said.append(a))
    assert said == [("calibrate", n, 12) for n in range(1, 13)]


def test_nothing_watched_is_an_empty_table(tmp_path: Path) -> None:
    make, asked = maker(chain(), tmp_path)
    assert calibrate(make, {}, samples(tmp_path)).statistics == {} and asked == []


def test_probes_measure_ranges_without_giving_the_tensors(tmp_path: Path) -> None:
    """Models with |x|'s maximum as outputs, one that needs only part of the inputs."""
    probes = []
    for tensor, kept in (("a", ["x"]), ("b", ["x", "y"])):
        nodes = [
            helper.make_node("Exp", ["x"], ["a"]),
            helper.make_node("Sub", ["y", "a"], ["b"]),
            helper.make_node("Abs", [tensor], ["m"]),
            helper.make_node("ReduceMax", ["m"], ["p"], keepdims=0),
        ]
        inputs = {name: (TensorProto.FLOAT, ["n"]) for name in kept}
        proto = model(
            [n for n in nodes if set(n.input) != {"y", "a"} or "y" in kept], inputs, {"p": 1}
        )
        probes.append((proto.SerializeToString(), tmp_path, {"p": tensor}))
    feed = {"x": np.array([1, 100], np.float32), "y": np.array([-5, 1], np.float32)}
    said: list[tuple[str, int, int]] = []
    assert measure_ranges(probes, feed, progress=lambda *a: said.append(a)) == {
        "a": np.inf,
        "b": np.inf,
    }
    feed["x"][1] = 0.0
    ranges = measure_ranges(probes, feed)
    assert ranges["a"] == pytest.approx(np.e, rel=1e-6)
    assert ranges["b"] == pytest.approx(np.e + 5, rel=1e-6)
    assert [done for _, done, _ in said] == [1, 2]
