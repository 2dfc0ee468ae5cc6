"""Calibration in segments: the table of the whole model, bit for bit, within the memory given."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from calib_models import model as make_model
from onnx import TensorProto, helper

from onnxq.calibrate.data import Samples, open_samples
from onnxq.calibrate.division import Division, Segment
from onnxq.calibrate.run import calibrate
from onnxq.calibrate.segmented import calibrate_in_segments, disk_bytes
from onnxq.calibrate.within import divide
from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.pieces import Pieces
from onnxq.memory import resident_memory

pytest.importorskip("onnxruntime")

F = TensorProto.FLOAT


def ushape(folder: Path, *, half: bool = False, width: int = 16) -> Path:
    """Three blocks of two layers down and up again, a skip over each, a mask that all read, weights
    behind a Transpose, a body that captures the first block, and a layer on an input itself."""
    rng = np.random.default_rng(0)
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (F, np.float32)
    nodes = [helper.make_node("Sigmoid", ["mask"], ["m"])]
    weights: dict[str, np.ndarray] = {"yes": np.array(True)}
    last, skips = "x", []

    def layer(name: str, read: str, transposed: bool) -> str:
        weights[f"{name}.w"] = (rng.standard_normal((width, width)) / 4).astype(dtype)
        operand = f"{name}.w"
        if transposed:
            nodes.append(helper.make_node("Transpose", [operand], [f"{name}.t"], perm=[1, 0]))
            operand = f"{name}.t"
        nodes.append(helper.make_node("MatMul", [read, operand], [f"{name}.p"]))
        nodes.append(helper.make_node("Relu", [f"{name}.p"], [f"{name}.r"]))
        return f"{name}.r"

    for i in range(6):
        first = layer(f"a{i}", last, transposed=False)
        nodes.append(helper.make_node("Mul", [first, "m"], [f"g{i}"]))
        second = layer(f"b{i}", f"g{i}", transposed=True)
        nodes.append(helper.make_node("Add", [last, second], [f"s{i}"]))
        last = f"s{i}"
        if i < 3:
            skips.append(last)
        else:
            nodes.append(helper.make_node("Add", [last, skips.pop()], [f"u{i}"]))
            last = f"u{i}"
    ends = [helper.make_tensor_value_info("t", kind, None)]
    body = helper.make_graph([helper.make_node("Add", ["s0", last], ["t"])], "then", [], ends)
    nodes.append(helper.make_node("If", ["yes"], ["v"], then_branch=body, else_branch=body))
    nodes.append(helper.make_node("Relu", ["v"], ["out"]))
    inputs = {n: (kind, ["n", "rows", width]) for n in ("x", "mask")}
    path = folder / "net.onnx"
    onnx.save(make_model(nodes, inputs, {"out": kind}, weights), path)
    return path


def samples(folder: Path, model: Model, count: int = 3, width: int = 16) -> Samples:
    x, mask = np.random.default_rng(1).standard_normal((2, count, 5, width)).astype(np.float32)
    np.savez(folder / "d.npz", x=x, mask=mask)
    return open_samples(folder / "d.npz", model.inputs(), batch=1)


NAMES = ["x", *(f"{kind}{i}" for i in range(6) for kind in "gs"), "out"]
WATCHED = dict.fromkeys(NAMES, "histogram+gram")


def in_pieces(
    folder: Path, path: Path, memory: int | None = None, every: bool = False
) -> tuple[list[Segment], str, str]:
    """The segments, and the digests of their table and of the whole model's."""
    from onnxq.graph.prepare import prepare

    model, _ = prepare(Model.load(path), 19)
    data = samples(folder, model)
    whole = calibrate(model.session_model, WATCHED, data)
    pieces, division = divide(model, list(WATCHED), WATCHED, data)
    if every:
        count = len(pieces.steps)
        segments = [division.segment(i, i + 1) for i in range(count)]
    else:
        assert memory is not None
        segments = division.within(memory) or []
    spool = folder / "spool"
    spool.mkdir()
    table, written = calibrate_in_segments(pieces, segments, WATCHED, data, spool)
    assert not list((spool / "frontier").iterdir())
    gives = sum(sum(s.gives.values()) for s in segments)
    assert written == 3 * gives
    return segments, table.digest, whole.digest


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_node_by_node_it_is_the_whole_models_table(tmp_path: Path, half: bool) -> None:
    """Cut everywhere: skips, a mask, a body's captures, constants behind a Transpose."""
    segments, found, whole = in_pieces(tmp_path, ushape(tmp_path, half=half), every=True)
    assert len(segments) > 30
    assert found == whole


class _Steps:
    """The steps of a made-up model: (operator, reads, makes, weights)."""

    def __init__(self, *steps: tuple[str, str, str, str]) -> None:
        from onnxq.graph.pieces import Step

        self.inputs = ("x",)
        self.steps = [
            Step(op, tuple(r.split()), tuple(m.split()), tuple(w.split()), frozenset())
            for op, r, m, w in steps
        ]

    def weight_bytes(self, name: str) -> int:
        return 10_000_000

    def is_half(self, name: str) -> bool:
        return False


def divided(steps: _Steps, sizes: dict[str, int], **more: int) -> Division:
    """Sizes in KB."""
    shapes = {n: ((kb * 250,), np.dtype(np.float32)) for n, kb in sizes.items()}
    return Division(steps, shapes, more)  # type: ignore[arg-type]


HOURGLASS = _Steps(
    ("Conv", "x", "a", "w0"),
    ("Add", "a x", "b", ""),
    ("Conv", "b", "c", "w1"),
    ("Add", "c b", "d", ""),  # narrow, read twice
    ("Conv", "d", "e", "w2"),
    ("Add", "e d", "f", ""),
    ("Conv", "f", "g", "w3"),
)
WIDTHS = {"a": 9000, "b": 9000, "c": 9000, "d": 1, "e": 9000, "f": 9000, "g": 1}
FIXED = 40 << 20


def test_it_is_cut_at_the_narrowest_place() -> None:
    division = divided(HOURGLASS, WIDTHS)
    segments = division.within(FIXED + 62_000_000)
    assert segments is not None
    assert [s.steps for s in segments] == [range(4), range(4, 7)]
    assert segments[0].gives == {"d": 1000} and segments[1].reads == ("d",)


def test_no_cut_lies_where_onnx_runtime_fuses_unless_it_must() -> None:
    """c is read by the Add alone, which may go into the Conv."""
    widths = WIDTHS | {"b": 0, "c": 1, "d": 9000}
    division = divided(HOURGLASS, widths)
    roomy = division.within(FIXED + 62_000_000)
    assert roomy is not None and division.cuts_fusions(roomy) == 0
    assert all("c" not in s.gives for s in roomy)
    tight = division.within(division.least())
    assert tight is not None and division.cuts_fusions(tight) > 0
    assert division.within(division.least() - 1) is None
    # Watched, it is an output of the whole model too: nothing fuses it away there.
    at_c = [division.segment(0, 3), division.segment(3, 7)]
    assert division.cuts_fusions(at_c) == 1
    assert divided(HOURGLASS, widths, c=0).cuts_fusions(at_c) == 0


def test_every_segment_fits_and_weights_count_once() -> None:
    steps = _Steps(*(("Add", f"t{i} x", f"t{i + 1}", f"w w{i // 4}") for i in range(16)))
    division = divided(steps, {f"t{i}": 1 for i in range(17)})
    for megabytes in (30, 40, 60):
        memory = FIXED + megabytes * 1_000_000
        segments = division.within(memory)
        assert segments is not None and all(s.memory <= memory for s in segments)
        assert [i for s in segments for i in s.steps] == list(range(16))
        # w and one of w0 .. w3 are 23 MB, a further one 11.5 MB.
        assert len(segments) == {30: 4, 40: 2, 60: 1}[megabytes]


def test_what_skips_segments_waits_until_it_is_read() -> None:
    steps = _Steps(
        ("Conv", "x", "skip", "w0"),
        ("Conv", "skip", "a", "w1"),
        ("Conv", "a", "b", "w2"),
        ("Add", "b skip", "c", "w3"),
    )
    division = divided(steps, {"skip": 7, "a": 2, "b": 3, "c": 1})
    segments = [division.segment(i, i + 1) for i in range(4)]
    assert [s.reads for s in segments] == [(), ("skip",), ("a",), ("b", "skip")]
    assert [dict(s.gives) for s in segments] == [{"skip": 7000}, {"a": 2000}, {"b": 3000}, {}]
    assert disk_bytes(segments, 5) == 5 * (7000 + 2000 + 3000)


def test_fp16_that_is_asked_for_waits_beside_what_it_was_cast_from() -> None:
    """ONNX Runtime computes a Mul of FP16 in FP32, and casts it for its reader when all else is
    done; a LayerNormalization gives FP16. In each case 3 MB run in FP32 and 1.5 MB are fetched."""
    for op, copies in (("Mul", 1), ("LayerNormalization", 0)):
        steps = _Steps((op, "x", "a", ""), ("Add", "a", "b", ""))
        shapes = {n: ((750_000,), np.dtype(np.float16)) for n in "ab"}
        plain = Division(steps, shapes, {}).whole().memory  # type: ignore[arg-type]
        asked = Division(steps, shapes, {"a": 0}).whole().memory  # type: ignore[arg-type]
        assert asked - plain == 1_500_000 + copies * 3_000_000
        # A probe frees what it reads, unless that was cast: then it is cast back for the probe too.
        probed = Division(steps, shapes, {}, probed=("a",)).whole().memory  # type: ignore[arg-type]
        assert probed - plain == copies * (1_500_000 + 2 * 3_000_000)


MODELS = {
    "minilm": ("fp8-gptq", "minilm", 110_000_000),
    "smollm2-fp32": ("int8", "smollm2-fp32", 260_000_000),
    "sdxl-unet-tiny-fp16": ("fp8-attention", None, 55_000_000),
    # Fewer tensors are asked for: sums of convolutions that may go into one of these.
    "sdxl-unet-tiny-fp16 int8": ("sdxl-int8", None, 55_000_000),
}


@pytest.mark.parametrize("case", MODELS)
def test_real_models_have_the_same_table(case: str, models: Path, tmp_path: Path) -> None:
    """Maxima, histograms and Gram matrices, bit for bit; FP16 ones as ONNX Runtime computes them
    in one piece, without a rounding at the cuts."""
    from onnxq.choosing import choose_recipe, placed
    from onnxq.ranging import watched_tensors
    from onnxq.report import Report
    from onnxq.samples import Data

    (recipe, tokenizer, memory), name = MODELS[case], case.split()[0]
    chosen, _ = choose_recipe(recipe, "sm89")
    model, placement = placed(models / name / "model.onnx", chosen, "sm89", Report(""))
    watched = watched_tensors(placement)
    data = Data(models / name / "calib.npz", batch=2)
    if tokenizer is not None:
        words = models / tokenizer / "tokenizer.json"
        text = models / "wiki/wiki_calib.txt"
        data = Data(text=text, tokenizer=words, seq_len=48, samples=2)
    found = data.open(model.inputs())
    whole = calibrate(model.session_model, watched, found)
    pieces, division = divide(model, list(watched), watched, found)
    segments = division.within(memory)
    assert segments is not None and len(segments) > 1
    assert division.cuts_fusions(segments) == 0
    table, _ = calibrate_in_segments(pieces, segments, watched, found, tmp_path)
    assert table.digest == whole.digest


CHILD = """
import json, sys
import onnxq
from onnxq.samples import Data

text, words = sys.argv[3:5]
data = Data(text=text, tokenizer=words, seq_len=32, samples=2)
options = dict(recipe="fp8", calib=data, memory=int(sys.argv[5]) or None, precision="keep")
made = onnxq.quantize(sys.argv[1], sys.argv[2], **options)
print(json.dumps(made.report.facts["calibrated"]))
"""


def test_the_memory_is_kept_and_the_file_is_the_same(models: Path, tmp_path: Path) -> None:
    """SmolLM2 has 540 MB of weights; the peak is the whole process's, asked of the system."""
    words = models / "smollm2-fp32/tokenizer.json"
    text = models / "wiki/wiki_calib.txt"
    ran, files = [], []
    for memory in (0, 450_000_000):
        out = tmp_path / "out.onnx"
        given = [models / "smollm2-fp32/model.onnx", out, text, words, memory]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *map(str, given)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        ran.append(json.loads(done.stdout))
        files.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert ran[0]["segments"] == 1 and ran[0]["peak_rss"] > 450_000_000
    assert ran[1]["segments"] > 1 and ran[1]["peak_rss"] <= 450_000_000
    assert ran[1]["memory"] == 450_000_000 and ran[1]["spooled_bytes"] > 0
    assert files[0] == files[1]


def wide(folder: Path) -> Path:
    """48 MB of weights in 12 layers."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], {}, "x"
    for i in range(12):
        weights[f"w{i}"] = (rng.standard_normal((1024, 1024)) / 32).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"p{i}"]))
        nodes.append(helper.make_node("Add", [f"p{i}", last], [f"s{i}"]))
        last = f"s{i}"
    path = folder / "in/wide.onnx"
    path.parent.mkdir()
    onnx.save(make_model(nodes, {"x": (F, ["n", 1024])}, {last: F}, weights), path)
    np.savez(folder / "in/data.npz", x=rng.standard_normal((4, 1024)).astype(np.float32))
    (folder / "out").mkdir()
    return path


# The room that is left is fixed here, so that the test does not hang on what Python itself takes.
RUN = """
import onnxq.calibrate.within as within
within.resident_memory = lambda: 0
within._RUNTIME = 0
{before}
from onnxq.cli import main
main({words!r}, prog_name="onnxq")
"""


def quantize(
    folder: Path, memory: str, before: str = "", **more: object
) -> subprocess.CompletedProcess[str]:
    words = "quantize in/wide.onnx -o out/q.onnx --recipe int8 --calib in/data.npz"
    program = RUN.format(before=before, words=[*words.split(), "--memory", memory])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        **more,  # type: ignore[call-overload]
    )


def test_the_report_says_how_it_ran(tmp_path: Path) -> None:
    wide(tmp_path)
    done = quantize(tmp_path, "60MB")
    assert done.returncode == 0, done.stderr
    # 4 samples of 1,024 floats at each of 3 cuts are 49,152 bytes.
    assert "calibrated in 4 segments, 0.0 MB through the disk; at most" in done.stdout
    first = (tmp_path / "out/q.onnx").read_bytes()
    done = quantize(tmp_path, "1GB")
    assert "calibrated in one piece; at most" in done.stdout
    assert (tmp_path / "out/q.onnx").read_bytes() == first


def test_too_little_memory_is_refused_with_what_would_do(tmp_path: Path) -> None:
    wide(tmp_path)
    done = quantize(tmp_path, "30MB")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "calibration does not fit into 0.03 GB" in done.stderr
    enough = done.stderr.split("give --memory ")[1].split(",")[0]
    assert quantize(tmp_path, enough).returncode == 0


def test_the_step_to_16_bits_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """Calibration needs the small half of this model, the ranges of all tensors the large one."""
    import onnxq

    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((64, 64)), "big": rng.standard_normal((64, 1 << 19))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Gather", ["big", "i"], ["b"], axis=1),
        helper.make_node("MatMul", ["h", "b"], ["y"]),
    ]
    inputs = {"x": (F, ["n", 64]), "i": (TensorProto.INT64, [8])}
    floats = {name: values.astype(np.float32) for name, values in weights.items()}
    onnx.save(make_model(nodes, inputs, {"y": F}, floats), tmp_path / "m.onnx")
    x = rng.standard_normal((4, 64)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, i=np.zeros(8, np.int64))
    said: list[str] = []
    with pytest.raises(OnnxqError, match="calibration does not fit into"):
        onnxq.quantize(
            tmp_path / "m.onnx",
            recipe="fp8",
            calib=tmp_path / "d.npz",
            memory=resident_memory() + (200 << 20),
            progress=lambda step, done, total: said.append(step),
        )
    assert set(said) == {"read the data"}


AT_STEP = """
import os, signal
from onnxq import progress
real = progress.ProgressLine.__call__
def call(self, step, done, total):
    if step == "calibrate" and done == 6:
        os.kill(os.getpid(), signal.{signal})
    real(self, step, done, total)
progress.ProgressLine.__call__ = call
"""


def test_ctrl_c_leaves_nothing_and_what_a_kill_leaves_the_next_run_removes(tmp_path: Path) -> None:
    wide(tmp_path)
    done = quantize(tmp_path, "60MB", AT_STEP.format(signal="SIGINT"))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    done = quantize(tmp_path, "60MB", AT_STEP.format(signal="SIGKILL"))
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "out").iterdir()
    assert any(p.is_file() for p in left.rglob("*"))
    assert quantize(tmp_path, "1GB").returncode == 0  # not even in segments
    assert all(p.name.startswith("q.onnx") for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("known", [True, False], ids=["beforehand", "on the way"])
def test_a_full_disk_is_one_line_and_nothing_stays(tmp_path: Path, known: bool) -> None:
    wide(tmp_path)
    if known:
        before = "import shutil, collections\n"
        before += "shutil.disk_usage = lambda p: collections.namedtuple('D', 'free')(1000)"
        said = "keeps 0.0 MB of activations in out, which has 0.0 MB left"
    else:
        before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
        said = "cannot keep activations in out/"
    done = quantize(tmp_path, "60MB", before)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sample_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = ushape(tmp_path)
    model = Model.load(path)
    data = samples(tmp_path, model)
    pieces, division = divide(model, ["g1"], {"g1": "amax"}, data)
    segments = [division.segment(i, i + 1) for i in range(len(pieces.steps))]
    x = np.full((1, 5, 16), 3e38, np.float32)
    np.savez(tmp_path / "d.npz", x=x, mask=-x)
    with pytest.raises(OnnxqError, match=r"'g1' is not finite in sample 0"):
        calibrate_in_segments(
            pieces,
            segments,
            {"g1": "amax"},
            open_samples(tmp_path / "d.npz", model.inputs(), batch=1),
            tmp_path,
        )


@pytest.mark.parametrize("name", ["minilm-legacy", "smollm2-torch"])
def test_sizes_are_those_of_a_run(name: str, models: Path) -> None:
    """Masks made by Range, Gather and Expand, whose shapes inference does not see through."""
    from onnxq.calibrate.session import open_session
    from onnxq.calibrate.within import _measured
    from onnxq.graph.prepare import prepare
    from onnxq.graph.sizes import tensor_sizes

    model, _ = prepare(Model.load(models / name / "model.onnx"), 19)
    feed = {spec.name: np.ones((2, 13), np.int64) for spec in model.inputs()}
    shapes = {key: array.shape for key, array in feed.items()}
    sizes = tensor_sizes(model, shapes, lambda names: _measured(model, names, feed))
    proto, folder = model.session_model(list(sizes))
    values = open_session(proto, folder=folder).run(list(sizes), feed)
    assert len(sizes) > 300
    for key, array in zip(sizes, values, strict=True):
        assert sizes[key] == (array.shape, array.dtype), key


def test_weights_that_are_computed_go_into_the_segments_that_read_them(tmp_path: Path) -> None:
    """As after a fold: values that lie in no file."""
    from onnxq.graph.weights import DerivedValues, array

    model = Model.load(ushape(tmp_path))
    for constant in list(model.constants()):
        if constant.name.endswith(".w"):
            values = array(constant)
            constant._values = DerivedValues(constant.name, F, values.shape, lambda v=values: v * 2)
    pieces = Pieces(model, ["s1"])
    proto = onnx.ModelProto.FromString(
        pieces.model(range(len(pieces.steps)), ["s1"], {}, spooled=[])
    )
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    original = {t.name: t for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {n for n in held if n.endswith(".w")} == {"a0.w", "b0.w", "a1.w", "b1.w"}
    for name in ("a0.w", "b1.w"):
        np.testing.assert_array_equal(held[name], 2 * onnx.numpy_helper.to_array(original[name]))


def test_ranges_are_measured_within_the_memory_too(tmp_path: Path) -> None:
    from onnxq.calibrate import within
    from onnxq.graph.prepare import infer_types

    model = Model.load(wide(tmp_path))
    infer_types(model)
    data = open_samples(tmp_path / "in/data.npz", model.inputs(), batch=2)
    free = within.ranges_within(model, data, beside=tmp_path / "out/q")
    base = within.resident_memory() + within._RUNTIME
    tight = within.ranges_within(model, data, beside=tmp_path / "out/q", memory=base + 60_000_000)
    assert len(free) == 24 and tight == free
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("free", "segments"), [(10**9, 1), (60_000_000, 2), (1_000_000, 1), (None, 1)]
)
def test_what_the_machine_has_left_decides_where_nothing_is_said(
    free: int | None, segments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little for any division, or nobody knows: the whole model is tried."""
    from onnxq.calibrate import within

    monkeypatch.setattr(within, "available_memory", lambda: free)
    model = Model.load(wide(tmp_path))
    data = open_samples(tmp_path / "in/data.npz", model.inputs(), batch=2)
    watched = {f"s{i}": "amax" for i in range(12)}
    table, ran = within.calibrate_within(model, watched, data, beside=tmp_path / "out/q")
    assert min(ran.segments, 2) == segments and ran.memory is None
    assert len(table.peaks()) == 12
