"""Weights that are computed reach ONNX Runtime through files: no copies, no limit, none left."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import pytest
from calib_models import model as make_model
from onnx import TensorProto, helper

from onnxq.calibrate import segmented, within
from onnxq.calibrate.data import Samples, open_samples
from onnxq.calibrate.probe import measure_ranges
from onnxq.calibrate.run import calibrate
from onnxq.errors import OnnxqError
from onnxq.graph import references
from onnxq.graph.model import Model
from onnxq.graph.pieces import Pieces
from onnxq.graph.prepare import infer_types
from onnxq.graph.probe import range_probes
from onnxq.graph.spool import Spool
from onnxq.graph.weights import DerivedValues, array

pytest.importorskip("onnxruntime")

LAYERS, WIDTH = 6, 512
WEIGHT = 4 * WIDTH * WIDTH
WATCHED = {f"s{i}": "amax+histogram" for i in range(LAYERS)}


def chain(folder: Path, layers: int = LAYERS, width: int = WIDTH) -> Path:
    """Residual layers: narrow places between them to cut at."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], {}, "x"
    for i in range(layers):
        weights[f"w{i}"] = rng.standard_normal((width, width), np.float32) / 64
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"p{i}"]))
        nodes.append(helper.make_node("Add", [f"p{i}", last], [f"s{i}"]))
        last = f"s{i}"
    path = folder / "in/chain.onnx"
    path.parent.mkdir()
    kind = TensorProto.FLOAT
    onnx.save(make_model(nodes, {"x": (kind, ["n", width])}, {last: kind}, weights), path)
    np.savez(folder / "in/data.npz", x=rng.standard_normal((4, width), np.float32))
    (folder / "out").mkdir()
    return path


def computed(path: Path) -> Model:
    """Every second weight is twice what lies in the file, and lies in none."""
    model = Model.load(path)
    infer_types(model)
    for constant in list(model.constants())[::2]:
        values, name = array(constant), constant.name
        constant._values = DerivedValues(
            name, TensorProto.FLOAT, values.shape, lambda v=values: v * 2
        )
    return model


def data(folder: Path, model: Model) -> Samples:
    return open_samples(folder / "in/data.npz", model.inputs(), batch=2)


def tight() -> int:
    """Memory for a session of two weights beside what the process has."""
    room = (40 << 20) + 2.5 * 1.15 * WEIGHT
    return int(within.resident_memory() + within._RUNTIME + room / (1 - within._RESERVE))


def test_the_model_of_a_piece_holds_references_alone(tmp_path: Path) -> None:
    model, spool = computed(chain(tmp_path)), Spool(tmp_path / "out/w")
    pieces = Pieces(model, list(WATCHED), spool)
    content = pieces.model(range(4), ["s0", "s1"], {})
    assert len(content) < 5_000
    assert pieces.computed_bytes(range(4)) == WEIGHT and spool.written == WEIGHT
    (file,) = spool.folder.iterdir()
    original = {t.name: t for t in onnx.load(tmp_path / "in/chain.onnx").graph.initializer}
    expected = 2 * onnx.numpy_helper.to_array(original["w0"])
    np.testing.assert_array_equal(np.fromfile(file, np.float32), expected.reshape(-1))
    pieces.model(range(4), ["s0", "s1"], {})  # asked for again before it was let go
    assert spool.written == WEIGHT
    spool.clear()
    assert list(spool.folder.iterdir()) == []


def test_the_table_is_the_same_and_no_weight_stays_on_disk_while_a_segment_runs(
    tmp_path: Path,
) -> None:
    model = computed(chain(tmp_path))
    found = data(tmp_path, model)
    expected = calibrate(model.session_model, WATCHED, found).digest  # all in the model itself
    beside, files = tmp_path / "out/q", []

    def look(step: str, done: int, total: int) -> None:
        files.extend(p for p in (tmp_path / "out").rglob("weights/*"))

    for memory in (tight(), None):
        table, ran = within.calibrate_within(
            model, WATCHED, found, beside=beside, memory=memory, progress=look
        )
        assert table.digest == expected
        assert ran.weight_bytes == LAYERS // 2 * WEIGHT
        assert (ran.segments > 1) == (memory is not None) == (files == [])
        assert list((tmp_path / "out").iterdir()) == []


def test_ranges_are_those_of_the_computed_weights(tmp_path: Path) -> None:
    model = computed(chain(tmp_path))
    found, beside = data(tmp_path, model), tmp_path / "out/q"
    expected = measure_ranges(range_probes(model), found.largest())
    for memory in (tight(), None):
        assert within.ranges_within(model, found, beside=beside, memory=memory) == expected
    assert list((tmp_path / "out").iterdir()) == []


def test_more_weights_than_a_message_holds_can_be_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LARGEST_MESSAGE", WEIGHT)
    model = computed(chain(tmp_path))
    with pytest.raises(OnnxqError, match="too many to run the model unsaved"):
        model.session_model()
    found, beside = data(tmp_path, model), tmp_path / "out/q"
    _, ran = within.calibrate_within(model, WATCHED, found, beside=beside)
    assert ran.segments == 1
    assert len(within.ranges_within(model, found, beside=beside)) == 2 * LAYERS


def test_a_full_disk_is_said_beforehand_and_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = computed(chain(tmp_path))
    found, beside = data(tmp_path, model), tmp_path / "out/q"
    free = namedtuple("free", "free")
    with monkeypatch.context() as patch:
        # What crosses the cuts is a few kilobytes, the weights of a segment a megabyte or two.
        patch.setattr(segmented.shutil, "disk_usage", lambda path: free(WEIGHT - 1))
        for measure in (
            lambda memory: within.calibrate_within(
                model, WATCHED, found, beside=beside, memory=memory
            ),
            lambda memory: within.ranges_within(model, found, beside=beside, memory=memory),
        ):
            with pytest.raises(
                OnnxqError, match=r"MB of activations and rescaled weights in .* has 1.0 MB left"
            ):
                measure(tight())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WEIGHT - 1, old[1]))
    try:
        for memory in (tight(), None):
            with pytest.raises(OnnxqError, match=r"cannot keep rescaled weights in .*too large"):
                within.calibrate_within(model, WATCHED, found, beside=beside, memory=memory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list((tmp_path / "out").iterdir()) == []


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_calib_spool import computed, data
from onnxq.calibrate.segmented import _open
from onnxq.calibrate.session import open_session
from onnxq.calibrate.within import divide
from onnxq.graph.spool import Spool
from onnxq.memory import peak_memory, resident_memory, trim_memory

folder = Path(sys.argv[1])
model = computed(folder / "in/chain.onnx")
model.graph.nodes[0].inputs[1]._values.load()
found = data(folder, model)
watched = {"s0": "amax"}
pieces, division = divide(model, ["s39"], {"s39": "amax"}, found, Spool(folder / "out/w"))
content, where = model.session_model(["s0"])
open_session(content, folder=where, arena=False)  # brings ONNX Runtime itself
trim_memory()
Path("/proc/self/clear_refs").write_text("5")
before, segment = resident_memory(), division.whole()
session = _open(pieces, segment, None, "cpu", 1)
print(peak_memory() - before, segment.memory)
"""


def test_loading_takes_what_is_expected_of_it(tmp_path: Path) -> None:
    """160 MB of weights, half of them computed; in the model itself they took 175 MB more."""
    chain(tmp_path, layers=40, width=1024)
    paths = [tmp_path, *(str(Path(__file__).parent / p) for p in (".", ".."))]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    took, expected = map(int, done.stdout.split())
    assert 80 << 20 < took <= expected
