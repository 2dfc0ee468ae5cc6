"""Second-order methods on convolutions: what they read, as rows, and what becomes of them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net, run, snr
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxq
from onnxq import unfolding
from onnxq.algorithms import gptq
from onnxq.calibrate.statistics import make
from onnxq.graph.model import Model
from onnxq.layouts import layout_of
from onnxq.recipe import Recipe, from_dict
from onnxq.sites import find_sites
from onnxq.unfolding import Unfolding

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

Array = NDArray[Any]

GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 4, 7, 9), (6, 4, 3, 3), {}),
    "padded": ((2, 4, 7, 9), (6, 4, 3, 2), {"pads": [1, 0, 2, 1]}),
    "strided": ((1, 4, 8, 9), (6, 4, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "dilated": ((1, 4, 9, 9), (6, 4, 3, 2), {"dilations": [2, 3], "pads": [2, 1, 2, 1]}),
    "grouped": ((2, 6, 5, 5), (9, 2, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
    "depthwise": ((1, 5, 6, 6), (5, 1, 3, 3), {"group": 5, "strides": [2, 2]}),
    "same upper": ((1, 4, 7, 8), (6, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((1, 4, 7, 8), (6, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((1, 4, 7, 8), (6, 4, 4, 3), {"auto_pad": "VALID"}),
    "one axis": ((2, 4, 11), (6, 4, 5), {"strides": [2], "pads": [2, 1]}),
    "three axes": ((1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {"pads": [1, 0, 0, 0, 1, 1]}),
    "one tap": ((2, 4, 5, 5), (6, 4, 1, 1), {}),
}


def _conv(folder: Path, shape: tuple[int, ...], weight: tuple[int, ...], **attrs: Any) -> Path:
    net = Net()
    x = net.input("x", [*shape[:2], *shape[2:]])
    net.output(net.op("Conv", x, net.weight("w", *weight), name="/conv", **attrs))
    return net.save(folder / "net.onnx")


def _weight(path: Path, name: str = "w") -> Array:
    stored = {t.name: t for t in onnx.load(path).graph.initializer}
    return numpy_helper.to_array(stored[name])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_rows_times_the_matrix_are_the_convolution(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime computes it; the rows in pieces."""
    monkeypatch.setattr(unfolding, "_CHUNK", 700)
    shape, weight, attrs = GEOMETRIES[name]
    path = _conv(tmp_path, shape, weight, **attrs)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = run(onnx.load(path), {"x": x})[0]
    (site,) = find_sites(Model.load(path))
    layout = layout_of(site)
    assert layout.unfolding is not None
    assert Unfolding.parse(str(layout.unfolding)) == layout.unfolding
    values = _weight(path)
    columns = np.hsplit(layout.matrix(values), layout.groups)
    rows: list[list[Array]] = [[] for _ in columns]
    for group, found in layout.unfolding.rows(x):
        rows[group].append(found)
    made = np.hstack([np.vstack(r) @ W for r, W in zip(rows, columns, strict=True)])
    batch, channels, *spatial = expected.shape
    there = made.reshape(batch, *spatial, channels)
    # float32 sums of at most 48 products of numbers near 1, in another order.
    np.testing.assert_allclose(np.moveaxis(there, -1, 1), expected, atol=48 * 2**-22)
    np.testing.assert_array_equal(layout.weight(layout.matrix(values)), values)

    statistic: Any = make(layout.statistic)[layout.statistic]
    for sample in x[:, None]:
        statistic.update(sample)
        statistic.park()
    for gram, parts in zip(statistic.matrices, rows, strict=True):
        whole = np.vstack(parts).astype(np.float64)
        np.testing.assert_allclose(gram, whole.T @ whole / len(whole), atol=1e-5)
    assert statistic.bytes_for(0) == statistic.matrices.nbytes


def _images(folder: Path, channels: int, count: int = 24, seed: int = 1) -> tuple[Path, Array]:
    """Smooth in space, channels alike, of unlike sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, channels, 10, 10)).astype(np.float32)
    for axis in (1, 2, 3):
        for k in range(1, x.shape[axis]):
            at: list[Any] = [slice(None)] * 4
            before = list(at)
            at[axis], before[axis] = k, k - 1
            x[tuple(at)] = 0.8 * x[tuple(before)] + 0.6 * x[tuple(at)]
    sizes = np.exp(np.random.default_rng(0).standard_normal(channels)).astype(np.float32)
    x *= sizes[:, None, None]
    np.savez(folder / f"images{seed}.npz", x=x)
    return folder / f"images{seed}.npz", x


def _net(folder: Path) -> Path:
    """Two convolutions, the second in groups; the first's input is read again, in another way."""
    net = Net()
    x = net.input("x", ["batch", 16, 10, 10])
    pads = [1, 1, 1, 1]
    h = net.op("Conv", x, net.weight("a", 32, 16, 3, 3), name="/a", pads=pads, strides=[2, 2])
    h = net.op("Relu", h, name="/relu")
    h = net.op("Conv", h, net.weight("b", 36, 8, 3, 3), name="/b", pads=pads, group=4)
    short = net.op("Conv", x, net.weight("c", 36, 16, 1, 1), name="/c", strides=[2, 2])
    net.output(net.op("Add", h, short, name="/add"))
    return net.save(folder / "net.onnx")


def _pruning(*steps: str) -> Recipe:
    content = {"weights": "none", "activations": "none", "sparsity": "2:4"}
    return from_dict({"name": "-".join(steps), "steps": list(steps), **content}, "test")


def _is_two_of_four(weight: Array) -> bool:
    """Written out: of every four neighbouring input channels of a tap, two are zero at least."""
    lines = np.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1]).tolist()
    return all(line[i : i + 4].count(0) >= 2 for line in lines for i in range(0, len(line), 4))


def test_each_method_loses_less_than_the_one_before(tmp_path: Path) -> None:
    source = _net(tmp_path)
    (calib, _), (_, x) = _images(tmp_path, 16), _images(tmp_path, 16, 8, seed=2)
    wanted, found = run(onnx.load(source), {"x": x})[0], []
    for steps in (
        ("magnitude",),
        ("wanda",),
        ("sparsegpt",),
        ("sparsegpt", "refit"),
    ):
        made = tmp_path / "m.onnx"
        given = {} if steps == ("magnitude",) else {"calib": calib}
        onnxq.quantize(source, made, recipe=_pruning(*steps), precision="keep", **given)
        assert all(_is_two_of_four(_weight(made, name)) for name in "abc")
        assert onnxq.check_zeros(made).passed
        found.append(snr(wanted, run(onnx.load(made), {"x": x})[0]))
    assert np.diff(found).min() > 0.1, found


@pytest.mark.parametrize("steps", [("wanda",), ("sparsegpt", "refit"), ("alps",)])
def test_the_error_reported_is_that_of_the_file(steps: tuple[str, ...], tmp_path: Path) -> None:
    """Of one convolution in groups, its outputs computed by onnx's own evaluator."""
    shape, attrs = (4, 16, 9, 9), {"group": 2, "strides": [2, 2], "pads": [0, 1, 2, 1]}
    path = _conv(tmp_path, shape, (12, 8, 3, 3), **attrs)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    made = tmp_path / "m.onnx"
    done = onnxq.quantize(
        path, made, recipe=_pruning(*steps), calib=tmp_path / "d.npz", precision="keep"
    )
    wanted, found = (
        ReferenceEvaluator(onnx.load(p)).run(None, {"x": x})[0].astype(np.float64)
        for p in (path, made)
    )
    share = 10 * np.log10(np.sum((found - wanted) ** 2) / np.sum(wanted**2))
    (edit,) = [e for e in done.report.edits if e.step == "round"]
    assert float(re.findall(r"(-?[\d.]+) dB", edit.reason)[-1]) == pytest.approx(share, abs=0.06)


def test_layer_by_layer_the_error_reported_is_that_of_the_whole_file(tmp_path: Path) -> None:
    """Of a chain: what its last convolution, in groups, makes of what those before it made."""
    net, pads = Net(), [1, 1, 1, 1]
    x = net.input("x", [8, 16, 10, 10])
    h = net.op("Conv", x, net.weight("a", 32, 16, 3, 3), name="/a", pads=pads, strides=[2, 2])
    h = net.op("Relu", h, name="/relu")
    net.output(net.op("Conv", h, net.weight("b", 36, 8, 3, 3), name="/b", pads=pads, group=4))
    source, (calib, images) = net.save(tmp_path / "net.onnx"), _images(tmp_path, 16)
    found = {}
    for steps in (("sparsegpt",), ("sequential", "sparsegpt")):
        made = tmp_path / "m.onnx"
        done = onnxq.quantize(source, made, recipe=_pruning(*steps), calib=calib, precision="keep")
        wanted, got = (
            np.concatenate([run(onnx.load(p), {"x": x})[0] for x in np.split(images, 3)])
            for p in (source, made)
        )
        found[steps] = snr(wanted, got)
    (edit,) = [e for e in done.report.edits if e.step == "round" and e.target == "/b"]
    assert edit.verb == "sequential+sparsegpt"
    assert float(re.findall(r"(-?[\d.]+) dB", edit.reason)[-1]) == pytest.approx(
        -found["sequential", "sparsegpt"], abs=0.06
    )
    assert found["sequential", "sparsegpt"] > found[("sparsegpt",)] + 0.1


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gptq_lowers_the_error_of_every_convolution(
    weights: str, granularity: str, tmp_path: Path
) -> None:
    net = Net()
    x = net.input("x", ["batch", 48, 10, 10])
    h = net.op("Conv", x, net.weight("a", 36, 48, 3, 3), name="/a", pads=[1, 1, 1, 1])
    net.output(net.op("Conv", h, net.weight("b", 36, 18, 3, 1), name="/b", group=2))
    source = net.save(tmp_path / "net.onnx")
    calib, _ = _images(tmp_path, 48)
    recipe = from_dict(
        {
            "weights": weights,
            "activations": weights,
            "weight_granularity": granularity,
            "steps": ["search", "gptq", "descent"],
        },
        "test",
    )
    table = tmp_path / "t.npz"
    made = tmp_path / "m.onnx"
    done = onnxq.quantize(source, made, recipe=recipe, calib=calib, save_calib=table)
    edits = [e for e in done.report.edits if e.step == "round"]
    assert [e.target for e in edits] == ["/a", "/b"]
    for edit in edits:
        said = {name: float(db) for name, db in re.findall(r"(\S+) (-?[\d.]+) dB", edit.reason)}
        assert list(said) == ["nearest", "search", "search+gptq", "search+gptq+descent"]
        assert said["search+gptq"] < said["nearest"] - 1
        assert said[edit.verb] == min(said.values())
    again = tmp_path / "again.onnx"
    onnxq.quantize(source, again, recipe=recipe, load_calib=[table])
    codes = [
        [t.raw_data for t in onnx.load(p).graph.initializer if t.name.startswith(("a", "b"))]
        for p in (made, again)
    ]
    assert codes[0] == codes[1]


def test_what_the_memory_does_not_hold_is_pruned_by_magnitude(tmp_path: Path, cli: Cli) -> None:
    """4608 inputs: 85 MB of second moments, ten times that to work with."""
    path = _conv(tmp_path, (1, 512, 4, 4), (8, 512, 3, 3), pads=[1, 1, 1, 1])
    np.savez(tmp_path / "d.npz", x=np.ones((1, 512, 4, 4), np.float32))
    plain, within = tmp_path / "plain.onnx", tmp_path / "within.onnx"
    onnxq.prune(path, plain)
    said = tmp_path / "report.json"
    given = ("-o", within, "--calib", tmp_path / "d.npz", "--memory", "1500MB", "--report", said)
    done = cli("prune", path, *given)  # in a process of its own, whose memory it is
    assert done.returncode == 0, done.stderr
    report = json.loads(said.read_text())
    (edit,) = [e for e in report["edits"] if e["step"] == "sparsify"]
    assert (edit["verb"], edit["target"]) == ("magnitude", "/conv")
    reason = "the second moments of its 4608 inputs take 0.8 GB to work with"
    assert edit["reason"].startswith(reason)
    np.testing.assert_array_equal(_weight(within), _weight(plain))
    assert report["calibrated"]["peak_rss"] < 1_500_000_000


@pytest.mark.parametrize("steps", [("gptq",), ("sequential", "gptq")])
def test_a_convolution_has_rows_enough_to_be_damped_less(
    steps: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of what a linear layer gets, which is worth 1.1 dB to PP-OCR in FP8 and in INT8."""
    damps: list[float] = []
    plain = gptq.Sweep.__init__

    def noted(self: Any, matrix: Array, damp: float, *rest: Any, **options: Any) -> None:
        damps.append(damp)
        plain(self, matrix, damp, *rest, **options)

    monkeypatch.setattr(gptq.Sweep, "__init__", noted)
    net = Net()
    x = net.input("x", ["batch", 32, 10, 10])
    h = net.op("Conv", x, net.weight("a", 36, 32, 3, 3), name="/a", pads=[1, 1, 1, 1])
    flat = net.op("Reshape", h, net.const("shape", [-1, 100], np.int64), name="/flat")
    net.output(net.op("MatMul", flat, net.weight("b", 100, 32), name="/b"))
    source, (calib, _) = net.save(tmp_path / "net.onnx"), _images(tmp_path, 32)
    recipe = from_dict({"steps": list(steps)}, "test")
    onnxq.quantize(source, tmp_path / "m.onnx", recipe=recipe, calib=calib)
    assert sorted(damps) == [0.01, 0.1]
