"""Loading, preparing and saving take the memory of the graph, not of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from onnxq.graph.references import set_reference
from onnxq.graph.wire import field, header

PEAK = 200e6
"""Bytes. Python with onnx, numpy and graphsurgeon takes 75 MB before it reads anything."""

COUNT, COLUMNS = 4, 1 << 26
TENSOR = 4 * COLUMNS
"""Bytes of one weight: 268 MB; the four are 1.07 GB, holes of sparse files."""

CHILD = """
import json, sys
from pathlib import Path
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save

def peak():  # of this program alone: ru_maxrss would begin with its parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))

model, _ = prepare(Model.load(sys.argv[1]), 21)
model.session_model()
loaded = peak()
written = save(model, Path(sys.argv[2]), external={"True": True, "False": False}[sys.argv[3]])
print(json.dumps([loaded, peak(), [str(p) for p in written]]))
"""


def _graph() -> onnx.GraphProto:
    x, y = (h.make_tensor_value_info(n, T.FLOAT, [1, COLUMNS]) for n in "xy")
    names = ["x", *(f"a{i}" for i in range(1, COUNT)), "y"]
    nodes = [h.make_node("Mul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(COUNT)]
    return h.make_graph(nodes, "large", [x], [y])


def _weight(index: int) -> onnx.TensorProto:
    return onnx.TensorProto(name=f"w{index}", data_type=T.FLOAT, dims=[1, COLUMNS])


def _inline(path: Path) -> Path:
    model = onnx.ModelProto(ir_version=8)
    model.opset_import.add(version=17)
    heads = [_weight(i).SerializeToString() + header(9, TENSOR) for i in range(COUNT)]
    tags = [header(5, len(head) + TENSOR) + head for head in heads]
    graph = _graph().SerializeToString()
    size = len(graph) + sum(len(tag) + TENSOR for tag in tags)
    with path.open("wb") as stream:
        stream.write(model.SerializeToString() + header(7, size) + graph)
        for tag in tags:
            stream.write(tag)
            stream.seek(TENSOR, 1)
        stream.truncate()
    return path


def _external(path: Path) -> Path:
    model = onnx.ModelProto(ir_version=8, graph=_graph())
    model.opset_import.add(version=17)
    for index in range(COUNT):
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(_weight(index))
        set_reference(tensor, "sparse.bin", index * TENSOR, TENSOR)
    path.write_bytes(model.SerializeToString())
    with path.with_name("sparse.bin").open("wb") as stream:
        stream.truncate(COUNT * TENSOR)
    return path


@pytest.mark.parametrize("target", [False, True], ids=["to inline", "to external"])
@pytest.mark.parametrize("source", [_inline, _external], ids=["from inline", "from external"])
def test_a_gigabyte_passes_through(source: object, target: bool, tmp_path: Path) -> None:
    path = source(tmp_path / "in.onnx")  # type: ignore[operator]
    out = tmp_path / "out.onnx"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path, out, str(target)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    loaded, peak, written = json.loads(child.stdout)
    sizes = [Path(p).stat().st_size for p in written]
    for file in written:
        Path(file).unlink()  # pytest keeps folders of past runs
    assert sum(sizes) >= COUNT * TENSOR and len(sizes) == 1 + target
    assert loaded < PEAK and peak < PEAK, f"{loaded / 1e6:.0f} and {peak / 1e6:.0f} MB"


def test_the_sparse_model_is_a_model(tmp_path: Path) -> None:
    """The head of the file written above is what onnx itself would have written."""
    model = onnx.ModelProto(ir_version=8, graph=_graph())
    model.graph.initializer.add().CopyFrom(onnx.TensorProto(name="w", raw_data=b"1234"))
    tensor = onnx.TensorProto(name="w").SerializeToString() + header(9, 4) + b"1234"
    by_hand = field(7, _graph().SerializeToString() + field(5, tensor))
    assert onnx.ModelProto.FromString(b"\x08\x08" + by_hand) == model
