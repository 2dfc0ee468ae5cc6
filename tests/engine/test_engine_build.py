"""The compile in its own process: what it writes, how it fails, and that failing leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from engine_graphs import Graph, linear
from onnx import helper

from onnxq.engine import child
from onnxq.engine.build import build
from onnxq.engine.coverage import WeightedNode
from onnxq.engine.shapes import parse_shapes
from onnxq.errors import OnnxqError

pytest.importorskip("tensorrt_rtx")

SHAPES = ["x:1x1x64,2x32x64,4x64x64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized projection with external data, in a folder with spaces."""
    folder = tmp_path_factory.mktemp("a folder")
    path = folder / "my model.onnx"
    onnx.save(
        linear("fp8", dynamic=True).model,
        path,
        save_as_external_data=True,
        location="my weights.data",
        size_threshold=0,
    )
    assert (folder / "my weights.data").stat().st_size > 64 * 96
    return path


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some seconds of compiling: time enough to be interrupted."""
    g = Graph()
    x = "x"
    for _ in range(600):
        w = g.constant(g.random.normal(size=(64, 64)))
        x = g.op("Softmax", [g.op("MatMul", [x, w])], axis=-1)
    g.op("Identity", [x], "y")
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    onnx.save(g.model({"x": ("fp16", ["M", 64])}, {"y": ["M", 64]}), path)
    return path


SLOW_SHAPES = ["x:1x64,32x64,64x64"]


def test_an_engine_and_its_sidecar(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out dir" / "m.plan"
    output.parent.mkdir()
    stages: list[str] = []
    result = build(
        model,
        output,
        target="sm89",
        shapes=SHAPES,
        nodes=linear("fp8", dynamic=True).nodes,
        progress=lambda step, done, total: stages.append(step),
    )
    assert sorted(p.name for p in output.parent.iterdir()) == ["m.plan", "m.plan.json"]
    assert output.stat().st_size == result.engine_bytes > 64 * 96
    assert result.coverage.counts()["gemm"] == {"fp8": 1}
    assert list(dict.fromkeys(stages)) == ["start the compiler", "parse", "compile"]
    written = json.loads((output.parent / "m.plan.json").read_text())
    assert written["targets"] == ["sm89"]
    assert written["profiles"] == [SHAPES]
    assert written["versions"]["tensorrt_rtx"].startswith("1.7.1")
    assert written["model_sha256"] == result.model_sha256
    assert written["engine_bytes"] == result.engine_bytes
    assert written["weight_bytes"]["fp8"] == 64 * 96
    assert written["coverage"]["complete"] is True
    assert written["inputs"] == [{"name": "x", "dims": [-1, -1, 64], "dtype": "fp16"}]


def test_a_model_with_an_if_between_its_products(tmp_path: Path) -> None:
    g = Graph()
    x, c = "x", "c"

    def branch(op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info(f"{op}_out", onnx.TensorProto.FLOAT16, [8, 64])
        node = helper.make_node(op, [x], [made.name], name=f"in {op}")
        return helper.make_graph([node], op, [], [made])

    y = g.op("If", [c], then_branch=branch("Relu"), else_branch=branch("Sigmoid"))
    w = g.constant(g.random.normal(size=(64, 64)))
    g.nodes.append(helper.make_node("MatMul", [y, w], ["y"], name="product"))
    path = tmp_path / "if.onnx"
    onnx.save(g.model({"x": ("fp16", [8, 64]), "c": ("bool", [])}, {"y": [8, 64]}), path)
    result = build(path, None, target="sm89", nodes=[WeightedNode("product", "gemm", "fp16")])
    assert result.coverage.counts()["gemm"] == {"fp16": 1}


def test_two_targets_and_two_profiles_in_one_engine(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.plan"
    shapes = [parse_shapes(SHAPES), parse_shapes(["x:1x1x64"])]
    result = build(model, output, target="sm89, sm120", shapes=shapes)
    assert result.targets == ("sm89", "sm120")
    assert {layer.profile for layer in result.layers} == {0, 1}
    assert json.loads((tmp_path / "m.plan.json").read_text())["targets"] == ["sm89", "sm120"]


def test_without_an_output_nothing_is_written(model: Path) -> None:
    before = sorted(p.name for p in model.parent.iterdir())
    assert build(model, shapes=SHAPES).engine is None
    assert sorted(p.name for p in model.parent.iterdir()) == before


def unsupported_node() -> onnx.ModelProto:
    g = Graph()
    g.nodes.append(helper.make_node("Abs", ["x"], ["a"], name="/fine/Abs"))
    g.nodes.append(
        helper.make_node("StringNormalizer", ["a"], ["y"], name="/block.3/odd [node], 1")
    )
    return g.model({"x": ("fp16", [2, 4])}, {"y": [2, 4]})


@pytest.fixture
def standing(tmp_path: Path) -> Path:
    """An engine from before, which a failure must leave as it was."""
    output = tmp_path / "m.plan"
    output.write_bytes(b"from before")
    return output


def untouched(output: Path) -> bool:
    return output.read_bytes() == b"from before" and [p.name for p in output.parent.iterdir()] == [
        output.name
    ]


def test_a_node_that_cannot_be_imported_is_named(standing: Path, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("odd") / "odd.onnx"
    onnx.save(unsupported_node(), path)
    with pytest.raises(
        OnnxqError, match=r"cannot import node '/block.3/odd \[node\], 1'"
    ) as caught:
        build(path, standing)
    assert "(StringNormalizer): it does not support this operator" in caught.value.message
    assert untouched(standing)


def test_missing_external_data_is_named(standing: Path, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("lost") / "m.onnx"
    form = linear("int8")
    onnx.save(form.model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    (path.parent / "w.data").unlink()
    with pytest.raises(OnnxqError, match=r"external data of .*Failed to open file: .*w\.data"):
        build(path, standing, shapes=SHAPES)
    assert untouched(standing)


def test_nodes_of_one_name_are_said(standing: Path, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("twins") / "m.onnx"
    form = linear("int8")
    for node in form.model.graph.node:
        node.name = "twin"
    onnx.save(form.model, path)
    with pytest.raises(OnnxqError, match=r"'twin'.*already in use") as caught:
        build(path, standing, shapes=SHAPES)
    assert "CUDA" not in caught.value.message
    assert "a name of its own" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"random bytes, not a model at all"])
def test_a_file_that_is_no_model_is_said(
    content: bytes, standing: Path, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("bad") / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(OnnxqError, match=r"bad\.onnx"):
        build(path, standing)
    assert untouched(standing)


def test_a_compile_that_fails_says_what_the_compiler_said(model: Path, standing: Path) -> None:
    with pytest.raises(OnnxqError, match="fp8") as caught:
        build(model, standing, target="sm80", shapes=SHAPES)
    assert "sm89 or later" in caught.value.hint
    assert "/_src/" not in caught.value.message
    assert untouched(standing)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "'x' has dynamic dimensions"),
        (["nope:1x1"], "'nope', which is no input"),
        (["x:1x1x32"], "the model fixes"),
    ],
)
def test_shapes_that_do_not_fit_are_said(
    shapes: list[str], message: str, model: Path, standing: Path
) -> None:
    with pytest.raises(OnnxqError, match=message):
        build(model, standing, shapes=shapes)
    assert untouched(standing)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"target": "sm90"}, "cannot compile for sm90"),
        ({"target": "sm999"}, "unknown target"),
        ({"backend": "cudnn"}, "unknown backend"),
        ({"backend": "tensorrt"}, "needs the package 'tensorrt'"),
    ],
)
def test_wrong_usage_is_said(keywords: dict[str, str], message: str, model: Path) -> None:
    if keywords.get("backend") == "tensorrt" and _installed("tensorrt"):
        pytest.skip("tensorrt is installed here")
    with pytest.raises(OnnxqError, match=message):
        build(model, shapes=SHAPES, **keywords)  # type: ignore[arg-type]


def test_the_engine_may_not_replace_its_model(model: Path) -> None:
    with pytest.raises(OnnxqError, match="overwrite its model"):
        build(model, model.parent / "." / model.name, shapes=SHAPES)
    with pytest.raises(OnnxqError, match="no such model"):
        build(model.parent / "none.onnx", shapes=SHAPES)


def at_compile(action: Any) -> Any:
    """A progress callback that acts once, when the compile has begun."""
    done: list[bool] = []

    def progress(step: str, done_: int, total: int) -> None:
        if step == "compile" and not done:
            done.append(True)
            action()

    return progress


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The child processes a build starts."""
    children: list[subprocess.Popen[str]] = []
    start = child._start

    def remember(*arguments: Any) -> subprocess.Popen[str]:
        children.append(start(*arguments))
        return children[-1]

    monkeypatch.setattr(child, "_start", remember)
    return children


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, "was killed, most likely for want of memory"), (signal.SIGSEGV, "SIGSEGV")],
)
def test_a_child_that_dies_is_said(
    number: signal.Signals,
    message: str,
    slow_model: Path,
    standing: Path,
    started: list[subprocess.Popen[str]],
) -> None:
    def kill() -> None:
        started[-1].send_signal(number)

    with pytest.raises(OnnxqError, match=message):
        build(slow_model, standing, shapes=SLOW_SHAPES, progress=at_compile(kill))
    assert untouched(standing)


def test_a_memory_limit_ends_in_a_clear_error(slow_model: Path, standing: Path) -> None:
    with pytest.raises(OnnxqError, match=r"ran out of memory|limit of 150 MiB"):
        build(slow_model, standing, shapes=SLOW_SHAPES, memory_limit=150 << 20)
    assert untouched(standing)


def test_an_interrupt_ends_the_child(
    slow_model: Path, standing: Path, started: list[subprocess.Popen[str]]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(slow_model, standing, shapes=SLOW_SHAPES, progress=at_compile(interrupt))
    assert started[-1].returncode == -signal.SIGKILL
    assert untouched(standing)


CALLER = """
import sys
from pathlib import Path
from onnxq.engine import child
from onnxq.engine.build import build
from onnxq.engine.coverage import WeightedNode
start = child._start
def remember(*arguments):
    process = start(*arguments)
    print("child", process.pid, flush=True)
    return process
child._start = remember
def progress(step, done, total):
    print(step, flush=True)
build(Path(sys.argv[1]), Path(sys.argv[2]), shapes=["x:1x64,32x64,64x64"], progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_child_goes_with_its_caller(
    number: signal.Signals, slow_model: Path, standing: Path
) -> None:
    """Ctrl-C cleans up; even a caller that is killed outright leaves no compiler running."""
    environment = os.environ | {"PYTHONPATH": str(Path(child.__file__).parents[2])}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(slow_model), str(standing)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert caller.stdout is not None
    pid = int(caller.stdout.readline().split()[1])
    while caller.stdout.readline().strip() != "compile":
        pass
    caller.send_signal(number)
    caller.wait(timeout=20)
    caller.stdout.close()
    assert caller.returncode != 0
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)
    if number == signal.SIGINT:
        assert untouched(standing)
    assert standing.read_bytes() == b"from before"


def test_importing_the_engine_loads_no_compiler() -> None:
    code = (
        "import sys, onnxq.engine.build, onnxq.engine.worker, onnxq.engine.commands\n"
        "heavy = {'tensorrt', 'tensorrt_rtx', 'onnx', 'onnxruntime', 'polygraphy', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(child.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
