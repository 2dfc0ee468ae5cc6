"""Whatever interrupts a save, the output is the old model or the new one, whole."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graph_models as g
import numpy as np
import onnx
import pytest

from onnxq import threads
from onnxq.errors import OnnxqError
from onnxq.files import alone_in
from onnxq.graph import save as save_module
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.save import save
from onnxq.graph.weights import array

FORMS = [pytest.param(False, id="inline"), pytest.param(True, id="external")]


def _model(value: float) -> onnx.ModelProto:
    """Two large weights, every element `value`."""
    model = g.mlp()
    for tensor in model.graph.initializer[:2]:
        array = np.full(tuple(tensor.dims), value, np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def _source(folder: Path, value: float) -> Path:
    return g.saved(_model(value), folder / f"source-{value:g}.onnx")


def _value(path: Path) -> float:
    """Which `_model` lies here; fails unless it is whole."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    found = {
        float(x) for t in model.graph.initializer[:2] for x in onnx.numpy_helper.to_array(t).flat
    }
    (value,) = found
    return value


def _strays(out: Path) -> list[str]:
    """Files in the folder that belong to no whole model."""
    model = onnx.load(out, load_external_data=False)
    used = {
        e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
    }
    return sorted(p.name for p in out.parent.iterdir() if p.name not in {out.name, *used})


@pytest.fixture(params=FORMS)
def out(request: Any, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """An output in place, of value 1, and whether it is external."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "out/model.onnx"
    save(Model.load(_source(tmp_path, 1)), path, external=request.param)
    yield path, request.param


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("step", [0, 1])
def test_an_exception_while_writing(
    error: type[BaseException], step: int, out: tuple[Path, bool], tmp_path: Path
) -> None:
    path, external = out
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    calls = iter(range(10))

    def progress(*_: object) -> None:
        if next(calls) == step:
            raise error

    with pytest.raises(error):
        save(Model.load(_source(tmp_path, 2)), path, external=external, progress=progress)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("rename", [1, 2])
def test_ctrl_c_between_the_renames(
    rename: int, done: bool, out: tuple[Path, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is put in place first; without the model that refers to it, it is taken away."""
    path, external = out
    replace, count = Path.replace, iter(range(1, 9))

    def interrupted(self: Path, target: Path) -> Path:
        here = next(count) == rename
        if not here or done:
            replace(self, target)
        if here:
            raise KeyboardInterrupt
        return target

    model = Model.load(_source(tmp_path, 2))
    if rename == 2 and not external:
        return
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        save(model, path, external=external)
    last = rename == (2 if external else 1)
    assert _value(path) == (2 if last and done else 1)
    if not (last and done):
        assert _strays(path) == []
    save(model, path, external=external)
    assert _value(path) == 2


def test_ctrl_c_spares_data_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result was renamed by its owner, and the same run is made again."""
    path, best = tmp_path / "model.onnx", tmp_path / "best.onnx"
    model = Model.load(_source(tmp_path, 1))
    save(model, path, external=True)
    path.rename(best)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        replace(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupted)
        save(model, path, external=True)
    assert not path.exists() and _value(best) == 1


CHILD = """
import os, signal, sys
from pathlib import Path
from onnxq.graph.model import Model
from onnxq.graph.save import save

source, out, external, point, number = sys.argv[1:]
left = int(number)

def strike(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

replace = Path.replace
def replacing(self, target):
    if point == "before":
        strike()
    replace(self, target)
    if point == "after":
        strike()
Path.replace = replacing
save(Model.load(source), Path(out), external=external == "True",
     progress=strike if point == "writing" else lambda *_: None)
"""


@pytest.mark.parametrize(
    ("point", "number"),
    [("writing", 1), ("writing", 2), ("before", 1), ("after", 1), ("before", 2), ("after", 2)],
)
def test_kill(point: str, number: int, out: tuple[Path, bool], tmp_path: Path) -> None:
    path, external = out
    if number == 2 and point != "writing" and not external:
        return  # there is one rename only
    source = _source(tmp_path, 2)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, path, str(external), point, str(number)], timeout=60
    )
    assert child.returncode == -signal.SIGKILL
    finished = point == "after" and number == (2 if external else 1)
    assert _value(path) == (2 if finished else 1)
    save(Model.load(source), path, external=external)
    assert _value(path) == 2
    assert _strays(path) == []


def test_ctrl_c_of_a_running_process(tmp_path: Path) -> None:
    path, source = tmp_path / "model.onnx", _source(tmp_path, 2)
    save(Model.load(_source(tmp_path, 1)), path, external=True)
    program = """
    import sys, time
    from pathlib import Path
    from onnxq.graph.model import Model
    from onnxq.graph.save import save
    def progress(*_):
        print("writing", flush=True)
        time.sleep(30)
    save(Model.load(sys.argv[1]), Path(sys.argv[2]), external=True, progress=progress)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), source, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) != 0
    assert _value(path) == 1
    assert _strays(path) == ["source-1.onnx", "source-2.onnx"]


@pytest.mark.parametrize("limit", [100, 5000, 9000])
def test_no_space_left(limit: int, out: tuple[Path, bool], tmp_path: Path) -> None:
    """A limit on the size of files ends a write as a full disk does."""
    path, external = out
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    model = Model.load(_source(tmp_path, 2))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(OnnxqError, match=r"cannot write .*model.onnx: File too large"):
            save(model, path, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = Model.load(_source(tmp_path, 2))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for place, words in {
        tmp_path / "folder": "not a file",
        tmp_path / "pipe": "not a file",
        Path("/dev/null"): "not a file",
        tmp_path / "missing/model.onnx": "No such file or directory",
        tmp_path / ("n" * 300): "too long",
        tmp_path / "source-2.onnx/model.onnx": "Not a directory",
    }.items():
        with pytest.raises(OnnxqError, match=words) as caught:
            save(model, place)
        assert str(place) in str(caught.value) and caught.value.hint
    assert Path("/dev/null").is_char_device() and (tmp_path / "pipe").is_fifo()


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    model = Model.load(_source(tmp_path, 2))
    out = tmp_path / "out"
    out.mkdir()
    save(model, out / "model.onnx", external=True)
    before = sorted(out.iterdir())
    out.chmod(0o555)
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(OnnxqError, match=r"cannot write .*Permission denied"):
            save(model, out / "model.onnx")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        out.chmod(0o755)
    assert sorted(out.iterdir()) == before


def test_a_long_name_that_the_folder_takes(tmp_path: Path) -> None:
    """The temporary's name must not be longer than the output's own."""
    save(Model.load(_source(tmp_path, 2)), tmp_path / ("n" * 250 + ".onnx"))


@pytest.mark.parametrize("external", FORMS)
def test_the_same_model_gives_the_same_bytes(external: bool, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b", "b"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        source = g.saved(g.with_if(), folder / "in.onnx")
        if name == "a":
            first = source.read_bytes()
        source.write_bytes(first)
        paths = save(Model.load(source), folder / "out.onnx", external=external)
        contents.append({p.name: p.read_bytes() for p in paths})
        assert sorted(p.name for p in folder.iterdir()) == sorted(["in.onnx", *contents[-1]])
    assert contents[0] == contents[1] == contents[2]


def test_old_data_goes_when_its_model_is_replaced_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    first = save(Model.load(_source(tmp_path, 1)), path, external=True)[1]
    foreign = tmp_path / "model.onnx_data"
    foreign.write_bytes(b"somebody else's")
    lookalike = tmp_path / "model.onnx.00000000.data"
    lookalike.write_bytes(b"of no model here")
    second = save(Model.load(_source(tmp_path, 2)), path, external=True)[1]
    assert first != second and not first.exists() and second.exists()
    save(Model.load(_source(tmp_path, 3)), path, external=False)
    assert not second.exists()
    assert foreign.exists() and lookalike.exists()


def test_data_that_the_input_reads_stays(tmp_path: Path) -> None:
    """The input was moved away from an earlier output's name and still reads that one's data."""
    earlier = save(Model.load(_source(tmp_path, 1)), tmp_path / "model.onnx", external=True)
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(earlier[0].read_bytes())
    save(Model.load(moved), tmp_path / "model.onnx", external=False)
    assert _value(moved) == 1


WRITER = """
import sys, time
from pathlib import Path
from onnxq.graph.model import Model
from onnxq.graph.save import save
model = Model.load(sys.argv[1])
while time.time() < float(sys.argv[3]):
    time.sleep(0.001)
for _ in range(20):
    save(model, Path(sys.argv[2]), external=True)
"""


def test_concurrent_runs_leave_one_consistent_pair(tmp_path: Path) -> None:
    """Two of the three write the same content: neither may take the other's data for old."""
    path = tmp_path / "out/model.onnx"
    path.parent.mkdir()
    start = str(time.time() + 2)
    values = [1.0, 2.0, 2.0]
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, _source(tmp_path, v), path, start])
        for v in values
    ]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert _value(path) in values
    assert _strays(path) == []


def test_a_run_waits_while_another_puts_its_files_in_place(tmp_path: Path) -> None:
    """Or it would take the data of the model that just came for that of the old one."""
    path = tmp_path / "out.onnx"
    save(Model.load(_source(tmp_path, 1)), path, external=True)
    model = Model.load(_source(tmp_path, 2))
    other = threading.Thread(target=save, args=(model, path), kwargs={"external": True})
    with alone_in(tmp_path):
        other.start()
        other.join(0.5)
        assert other.is_alive() and _value(path) == 1
    other.join(20)
    assert not other.is_alive() and _value(path) == 2


def test_data_files_of_one_name_have_one_content(tmp_path: Path) -> None:
    """The same bytes in tensors of other sizes are other data: they begin at other places."""
    found = set()
    for columns in (300, 700):
        ones = [np.ones(columns, np.float32), np.ones(1000 - columns, np.float32)]
        model = g.parsed(
            '<ir_version: 8, opset_import: ["": 17]> g () => (y) { y = Concat <axis = 0> (a, b) }',
            *(onnx.numpy_helper.from_array(v, n) for v, n in zip(ones, "ab", strict=True)),
        )
        source = g.saved(model, tmp_path / "in.onnx")
        found.add(save(Model.load(source), tmp_path / "out.onnx", external=True)[1].name)
    assert len(found) == 2


def test_large_results_go_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(_source(tmp_path, 2))
    monkeypatch.setattr(save_module, "INLINE_LIMIT", 5000)
    written = save(model, tmp_path / "out.onnx")
    assert len(written) == 2 and _value(written[0]) == 2
    small = save(Model.load(written[0]), tmp_path / "inline.onnx", external=False)
    assert len(small) == 2  # too large is too large, whatever was asked


def test_data_is_aligned_for_mapping(tmp_path: Path) -> None:
    model = g.mlp()
    model.graph.initializer[0].CopyFrom(g.weight("w1", 32, 64))
    big = g.parsed(
        """<ir_version: 9, opset_import: ["": 19]>
        big (float[n, 640] x) => (float[n, 640] y) { a = MatMul(x, w)  b = Add(a, c)
                                                     y = MatMul(b, v) }""",
        g.weight("c", 640),
        g.weight("w", 640, 640),
        g.weight("v", 640, 640),
    )
    written = save(
        Model.load(g.saved(big, tmp_path / "in.onnx")), tmp_path / "out.onnx", external=True
    )
    offsets = {}
    for tensor in onnx.load(written[0], load_external_data=False).graph.initializer:
        offsets[tensor.name] = {e.key: e.value for e in tensor.external_data}
    assert int(offsets["w"]["offset"]) % 4096 == int(offsets["v"]["offset"]) % 4096 == 0
    assert all(int(entry["offset"]) % 64 == 0 for entry in offsets.values())
    assert {entry["location"] for entry in offsets.values()} == {written[1].name}


def _computed(folder: Path, count: int = 6, broken: int = -1) -> tuple[Model, list[int]]:
    """A model whose weights are computed, some of them large; and which are being computed."""
    names = [f"w{i}" for i in range(count)]
    body = " ".join(f"t{i + 1} = Add(t{i}, {name})" for i, name in enumerate(names))
    proto = g.parsed(
        f"""<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 64] t0) => (float[n, 64] t{count}) {{ {body} }}""",
    )
    for i, name in enumerate(names):
        values = np.random.default_rng(i).standard_normal((8 + 400 * (i % 2), 64))
        weight = onnx.numpy_helper.from_array(values.astype(np.float32), name)
        proto.graph.initializer.append(weight)
    model = Model.load(g.saved(proto, folder / "computed-in.onnx"))
    editor, made = Editor(model), []
    for i, node in enumerate(list(model.graph.nodes)):
        stored = node.inputs[1]

        def produce(i: int = i, stored: Any = stored) -> Any:
            if i == broken:
                raise OnnxqError("cannot be computed", "")
            made.append(i)
            time.sleep(0.002 * (count - i))  # the later, the sooner it would be there
            return array(stored) * np.float32(2)

        weight = editor.derived(f"d{i}", onnx.TensorProto.FLOAT, stored.shape, produce)
        editor.replace_input(node, 1, weight)
    editor.finish()
    return model, made


@pytest.mark.parametrize("external", FORMS)
def test_what_is_computed_ahead_is_written_in_its_place(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = None
    for cores in (1, 2, 4):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        model, made = _computed(tmp_path)
        out = save(model, tmp_path / "out.onnx", external=external)
        assert sorted(made) == list(range(6))  # once each
        old = onnx.load(tmp_path / "computed-in.onnx").graph.initializer
        new = onnx.load(out[0]).graph.initializer
        for before, after in zip(old, new, strict=True):
            doubled = 2 * onnx.numpy_helper.to_array(before)
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(after), doubled)
        written = [path.read_bytes() for path in out]
        assert wanted in (None, written)
        wanted = written


@pytest.mark.parametrize("external", FORMS)
def test_a_weight_that_cannot_be_computed_ahead_leaves_nothing(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)
    model, _ = _computed(tmp_path, broken=3)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OnnxqError, match="cannot be computed"):
        save(model, tmp_path / "out.onnx", external=external)
    assert sorted(tmp_path.iterdir()) == before


def test_few_weights_are_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a core, four at most, is computed ahead; of those too large for that, none."""
    for cores, most, ahead in ((2, 1 << 25, 3), (64, 1 << 25, 5), (2, 1 << 16, 1)):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(save_module, "_MOST_AHEAD", most)
        model, made = _computed(tmp_path, 24)
        lead = []

        def told(_: str, done: int, total: int, made: Any = made, lead: Any = lead) -> None:
            lead.append(sum(i % 2 and i >= done - 1 for i in made))

        save(model, tmp_path / "out.onnx", external=True, progress=told)
        assert 1 <= max(lead) <= ahead
