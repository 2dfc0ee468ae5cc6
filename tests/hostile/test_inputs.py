"""Every hostile input a user can meet, through the command line: one line, exit 2, nothing lost.

What could be waited for without end, or take all memory, runs in a process of its own.
"""

from __future__ import annotations

import io
import os
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import Cli
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from onnxq.cli import main

RNG = np.random.default_rng(1)


def _weight(name: str, *shape: int, scale: float = 1.0) -> onnx.TensorProto:
    return nh.from_array((RNG.standard_normal(shape) * scale).astype(np.float32), name)


def _mlp(
    first: onnx.TensorProto | None = None, batch: int | str = "n", x: str = "x"
) -> onnx.ModelProto:
    first = _weight("w1", 32, 64) if first is None else first
    nodes = [
        h.make_node("MatMul", [x, first.name], ["a"], "mm1"),
        h.make_node("Relu", ["a"], ["b"], "relu"),
        h.make_node("MatMul", ["b", "w2"], ["y"], "mm2"),
    ]
    ends = [h.make_tensor_value_info(n, T.FLOAT, [batch, 32]) for n in (x, "y")]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], [first, _weight("w2", 64, 32)])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


def _saved(model: onnx.ModelProto, folder: Path) -> str:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return "m.onnx"


def _outside(folder: Path, location: str, size: int = 8192, **entries: str) -> str:
    model = _mlp()
    tensor = model.graph.initializer[0]
    if size:
        (folder / "w.bin").write_bytes(tensor.raw_data[:size])
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return _saved(model, folder)


def _written(content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "m.onnx").write_bytes(content)
        return "m.onnx"

    return make


def _changed(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        model = _mlp()
        change(model)
        return _saved(model, folder)

    return make


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "m.onnx")
    return "m.onnx"


def _folder(folder: Path) -> str:
    (folder / "m.onnx").mkdir()
    return "m.onnx"


def _outside_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return _outside(folder, "pipe", 0)


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "b"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "a"


def _named_badly(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "g\nh\x1b[2Jost"


MODELS: dict[str, tuple[Callable[[Path], str], str]] = {
    "truncated": (_written(_mlp().SerializeToString()[:6000]), "truncated"),
    "random": (_written(random.Random(0).randbytes(5000)), "not an ONNX model"),
    "empty": (_written(b""), "is empty"),
    "a bomb": (_written(_mlp().SerializeToString() + b"\x72\x00" * 4_000_000), "more than"),
    "a folder": (_folder, "file"),
    "a pipe": (_pipe, "file"),
    "missing": (lambda folder: "m.onnx", "m.onnx"),
    "cyclic": (_changed(_cycle), "cycle"),
    "a name twice": (_changed(_twice), "'a' is made twice"),
    "a name that moves the cursor": (_changed(_named_badly), "reads"),
    "data missing": (lambda f: _outside(f, "w.bin", 0), "w.bin: No such file"),
    "data short": (lambda f: _outside(f, "w.bin", 100), "which holds 100"),
    "data past the end": (lambda f: _outside(f, "w.bin", offset="99999"), "at 99999 of"),
    "data elsewhere": (lambda f: _outside(f, "../w.bin"), "outside the model's folder"),
    "an absolute path": (lambda f: _outside(f, "/etc/passwd"), "outside the model's folder"),
    "data in a pipe": (_outside_pipe, "not a regular file"),
}
VERBS = {
    "quantize": "quantize {model} -o out.onnx",
    "inspect": "inspect {model} --recipe fp8-dynamic",
    "build": "build {model} -o out.plan",
    "compare": "compare good.onnx {model} --random-data",
    "lint": "lint {model}",
    "prune": "prune {model} -o out.onnx --method magnitude",
    "recommend": "recommend {model} --gpu h100 --workload online",
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `cli`, in this process."""

    def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        done = CliRunner().invoke(main, words)
        if not isinstance(done.exception, SystemExit | None):
            raise done.exception
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run


def _refused(run: Cli, folder: Path, words: str, said: str) -> str:
    """Run a command that must be refused; the line it is refused with."""
    kept = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    done = run("-q", *words.split(), cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("onnxq: error: ") and said in line and len(line) < 1200
    assert line.isprintable() and "; " in line  # what and where; how to cure it
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == kept
    return line


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model(name: str, verb: str, tmp_path: Path, cli: Cli, here: Cli) -> None:
    make, said = MODELS[name]
    run = cli if "pipe" in name or (name, verb) == ("a bomb", "quantize") else here
    (tmp_path / "good.onnx").write_bytes(_mlp().SerializeToString())
    for old in ("out.onnx", "out.plan", "out.plan.json"):
        (tmp_path / old).write_text("old")
    _refused(run, tmp_path, VERBS[verb].format(model=make(tmp_path)), said)


def _npz(**arrays: np.ndarray) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        np.savez(folder / "d.npz", **arrays)
        return "d.npz"

    return make


def _archive(header: str, values: bytes, packed: bool = False) -> Callable[[Path], str]:
    """An archive of one array, whose header says anything."""

    def make(folder: Path) -> str:
        stream = io.BytesIO(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little"))
        stream.seek(0, io.SEEK_END)
        stream.write(header.encode() + values)
        how = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / "d.npz", "w", how) as made:
            made.writestr("x.npy", stream.getvalue())
        return "d.npz"

    return make


class _Opened:
    def __reduce__(self) -> object:
        return Path.touch, (Path("opened"),)


def _special(name: str, make: Callable[[Path], object]) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        make(folder / name)
        return name.split("/")[0]

    return made


X = RNG.standard_normal((4, 32)).astype(np.float32)
ZEROS = _archive(
    "{'descr': '<f4', 'fortran_order': True, 'shape': (16777216, 32), }", bytes(1 << 20), True
)
DATA: dict[str, tuple[Callable[[Path], str], str]] = {
    "pickles": (_npz(x=np.array([_Opened()], object)), "never loaded"),
    "nothing": (_npz(), "does not have the input 'x'"),
    "no samples": (_npz(x=X[:0]), "holds no sample"),
    "strings": (_npz(x=np.array([["a"] * 32])), "not numbers"),
    "complex": (_npz(x=X.astype(np.complex64)), "not real numbers"),
    "integers": (_npz(x=X.astype(np.int64)), "is int64, but the input"),
    "too large for FP32": (_npz(x=X.astype(np.float64) * 1e300), "too large for float32"),
    "NaN": (_npz(x=np.where(X > 2, np.nan, X)), "holds NaN in sample"),
    "another size": (_npz(x=X[:, :31]), "fixes dimension 1 at 32"),
    "another rank": (_npz(x=X[0]), "has 1 dimensions"),
    "another name": (_npz(z=X), "'z', which is no input"),
    "terabytes": (
        _archive("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 32), }", b""),
        "too early",
    ),
    "less than nothing": (
        _archive("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 32), }", b""),
        "its shape is (-4, 32)",
    ),
    "samples without end": (
        _archive("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 0), }", b""),
        "of nothing",
    ),
    "a bomb": (ZEROS, "2.1 GB at a time"),
    "a header of brackets": (_archive("(" * 9000, b""), "no readable numpy array"),
    "no archive": (
        _special("d.npz", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99))),
        "not a zip",
    ),
    "a pipe": (_special("d.npz", os.mkfifo), "it is not a file"),
    "a device without end": (
        _special("d.npz", lambda p: p.symlink_to("/dev/zero")),
        "it is not a file",
    ),
    "a pipe in a folder": (_special("d/x.npy", os.mkfifo), "it is not a file"),
    "a pipe of samples": (_special("d/0.npz", os.mkfifo), "it is not a file"),
    "a pipe as JSON": (_special("d.json", os.mkfifo), "it is not a file"),
    "missing": (lambda folder: "d.npz", "does not exist"),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_data(name: str, tmp_path: Path, cli: Cli, here: Cli) -> None:
    make, said = DATA[name]
    run = cli if any(word in name for word in ("pipe", "bomb", "end", "terabytes")) else here
    model = _saved(_mlp(), tmp_path)
    words = f"quantize {model} -o out.onnx --recipe int8 --calib {make(tmp_path)}"
    _refused(run, tmp_path, words, said)
    assert not (tmp_path / "opened").exists() and not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--recipe int8 --text pipe --tokenizer pipe",
        "--recipe int8 --text m.onnx --tokenizer pipe",
        "--recipe int8 --load-calib pipe",
        "--recipe pipe.yaml",
    ],
)
def test_other_files_that_are_pipes(words: str, tmp_path: Path, cli: Cli) -> None:
    ids = h.make_tensor_value_info("input_ids", T.INT64, ["b", "s"])
    y = h.make_tensor_value_info("y", T.FLOAT, ["b", "s", 32])
    nodes = [
        h.make_node("Gather", ["e", "input_ids"], ["a"]),
        h.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    graph = h.make_graph(nodes, "g", [ids], [y], [_weight("e", 9, 32), _weight("w", 32, 32)])
    _saved(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), tmp_path)
    for name in ("pipe", "pipe.yaml"):
        os.mkfifo(tmp_path / name)
    _refused(cli, tmp_path, f"quantize m.onnx -o out.onnx {words}", "pipe")


def test_a_batch_that_does_not_fit_a_fixed_dimension(tmp_path: Path, here: Cli) -> None:
    _saved(_mlp(batch=8), tmp_path)
    data = _npz(x=X)(tmp_path)
    words = f"quantize m.onnx -o out.onnx --recipe int8 --calib {data}"
    _refused(here, tmp_path, words, "has 4 rows, but the input x[8,32] float32 takes 8 at a time")
    np.savez(tmp_path / "d.npz", x=np.tile(X, (4, 1)))
    _refused(here, tmp_path, f"{words} --batch 3", "the batch is to be 3")
    assert here(*words.split(), cwd=tmp_path).returncode == 0


def test_doubles_are_converted_and_that_is_said(tmp_path: Path, here: Cli) -> None:
    _saved(_mlp(), tmp_path)
    data = _npz(x=X.astype(np.float64))(tmp_path)
    done = here(*f"quantize m.onnx -o out.onnx --recipe int8 --calib {data}".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: x: float64 converted to float32" in done.stdout


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # or FP8 does not load
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0], np.float64)


NUMBERS: dict[str, tuple[onnx.TensorProto | None, float]] = {
    "a range of 1e7": (None, 2.5e6),
    "scales that underflow": (None, 1e-12),
    "weights whose scales underflow": (_weight("w1", 32, 64, scale=1e-30), 1.0),
    "a weight of zeros": (nh.from_array(np.zeros((32, 64), np.float32), "w1"), 1.0),
    "a channel of zeros": (nh.from_array(np.tril(np.ones((32, 64), np.float32), -1), "w1"), 1.0),
    "data of zeros": (None, 0.0),
}


@pytest.mark.parametrize("recipe", ["int8", "fp8-dynamic", "int8-dynamic"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_at_the_edge_are_finite_and_near(
    name: str, recipe: str, tmp_path: Path, here: Cli
) -> None:
    """Right, or left in full precision with the reason: never NaN, infinity or silence."""
    first, scale = NUMBERS[name]
    model = tmp_path / _saved(_mlp(first), tmp_path)
    np.savez(tmp_path / "d.npz", x=X * np.float32(scale))
    data = "--calib d.npz" if recipe == "int8" else ""
    done = here(*f"quantize m.onnx -o out.onnx --recipe {recipe} {data}".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    x = X * np.float32(scale)
    want, got = _run(model, x), _run(tmp_path / "out.onnx", x)
    assert np.isfinite(got).all()
    error = np.sqrt(np.mean((want - got) ** 2))
    # Below FP16's numbers (6e-8) an FP16 graph has nothing; above, 8 bits' noise at two layers.
    assert error <= 0.1 * np.sqrt(np.mean(want**2)) + 6e-8


def test_an_infinite_weight_is_named_and_may_be_left(tmp_path: Path, here: Cli) -> None:
    weight = RNG.standard_normal((32, 64)).astype(np.float32)
    weight[3, 4] = np.inf
    _saved(_mlp(nh.from_array(weight, "w1")), tmp_path)
    words = "quantize m.onnx -o out.onnx --recipe int8-dynamic"
    line = _refused(here, tmp_path, words, "weight 'w1' of 'mm1' holds NaN or infinite values")
    rule = line.split("--rule '")[1].split("'")[0]
    assert here(*words.split(), "--rule", rule, cwd=tmp_path).returncode == 0


def test_names_in_any_script_come_through(tmp_path: Path, here: Cli) -> None:
    folder = tmp_path / "Ordner ü 目录"
    folder.mkdir()
    model = _mlp(_weight("gewicht-ä/重み", 32, 64), x="入力 🎉")
    for index, node in enumerate(model.graph.node):
        node.name = f"knöten/{index}/节点🙂"
    (folder / "modell ä 模型.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "daten.npz", **{"入力 🎉": X})
    words = ["modell ä 模型.onnx", "--recipe", "int8", "--calib", "daten.npz"]
    done = here("quantize", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    written = onnx.load(folder / "modell ä 模型.int8.onnx")
    assert {"knöten/0/节点🙂", "knöten/2/节点🙂"} <= {n.name for n in written.graph.node}
    assert _run(folder / "modell ä 模型.int8.onnx", X).shape == (4, 32)
    # A terminal that knows no such letters still shows the line.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "onnxq.cli", "inspect", "modell ä 模型.onnx"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kn\\xf6ten/0" in done.stdout, done.stderr


def test_names_cannot_move_the_cursor(tmp_path: Path, here: Cli) -> None:
    model = _mlp()
    model.graph.node[0].name = "first\nquantize  linear\x1b[2J\r"
    _saved(model, tmp_path)
    done = here("inspect", "m.onnx", "--recipe", "fp8-dynamic", cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "first" in line]
    assert "first\\nquantize  linear\\x1b[2J\\r" in line


def _chain(count: int, operator: str, folder: Path) -> None:
    nodes = [h.make_node("MatMul", ["x", "w1"], ["t0"])]
    nodes += [h.make_node(operator, [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    nodes += [h.make_node("MatMul", [f"t{count}", "w2"], ["y"])]
    ends = [h.make_tensor_value_info(n, T.FLOAT, ["n", 32]) for n in "xy"]
    weights = [_weight("w1", 32, 32), _weight("w2", 32, 32)]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    _saved(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8), folder)


def test_a_chain_of_10000_nodes(tmp_path: Path, here: Cli) -> None:
    _chain(10_000, "Relu", tmp_path)
    done = here("quantize", "m.onnx", "-o", "out.onnx", cwd=tmp_path)
    assert done.returncode == 0 and "2 of 2 linear layers quantized" in done.stdout, done.stderr
    assert len(onnx.load(tmp_path / "out.onnx").graph.node) > 10_000
    assert here("inspect", "m.onnx", cwd=tmp_path).returncode == 0


def test_a_chain_deeper_than_the_compilers_usual_stack(tmp_path: Path) -> None:
    """5,500 nodes overflow 8 MiB (tensorrt-rtx 1.7.1), 800 one: so much is quicker to compile."""

    def shallow() -> None:
        most = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, most))

    _chain(800, "Neg", tmp_path)
    words = ["build", "m.onnx", "-o", "out.plan", "--shapes", "x:1x32"]
    command = [sys.executable, "-m", "onnxq.cli", *words]
    done = subprocess.run(
        command, cwd=tmp_path, preexec_fn=shallow, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.plan").stat().st_size > 100_000


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int8"])
def test_a_model_with_nothing_to_quantize_is_copied(
    recipe: str, external: bool, tmp_path: Path, here: Cli
) -> None:
    ends = [h.make_tensor_value_info(n, T.FLOAT, ["n", 400]) for n in "xy"]
    nodes = [h.make_node("Add", ["x", "w"], ["y"], doc_string="as it was")]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], [_weight("w", 400)])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=7)
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=external,
        location="w.bin",
        size_threshold=0,
    )
    np.savez(tmp_path / "d.npz", x=np.ones((2, 400), np.float32))
    data = "--calib d.npz" if recipe == "int8" else ""
    done = here(*f"quantize m.onnx -o out.onnx --recipe {recipe} {data}".split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: there is no node to quantize: the model is copied as it is" in done.stdout
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(tmp_path / "m.onnx")
    done = here("inspect", "m.onnx", "--recipe", "fp8-dynamic", cwd=tmp_path)
    assert "note: there is no node to quantize" in done.stdout


def test_a_quantized_model_is_refused_unless_told_to_begin_anew(tmp_path: Path, here: Cli) -> None:
    _saved(_mlp(), tmp_path)
    assert here("quantize", "m.onnx", "-o", "q.onnx", cwd=tmp_path).returncode == 0
    words = "quantize q.onnx -o out.onnx --recipe int8-dynamic"
    assert "--requantize" in _refused(here, tmp_path, words, "q.onnx is quantized already")
    done = here(*words.split(), "--requantize", "--report", "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: stripped first: 2 weights are the floats their codes stood for" in done.stdout
    assert '"step": "strip"' in (tmp_path / "r.json").read_text()
    x = X[:1]
    want, got = _run(tmp_path / "m.onnx", x), _run(tmp_path / "out.onnx", x)
    assert np.sqrt(np.mean((want - got) ** 2)) < 0.1 * np.sqrt(np.mean(want**2))
