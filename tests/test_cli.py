"""The command line as its user meets it: exit codes, one-line errors, files left alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from onnxq.cli import main
from onnxq.recipe import presets

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """MiniLM with good and bad data beside it."""
    found = tmp_path_factory.mktemp("cli")
    (found / "model.onnx").write_bytes((models / "minilm/model.onnx").read_bytes())
    ids = np.arange(1000, 1064, dtype=np.int64).reshape(4, 16)
    good = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    for name, change in {
        "good": {},
        "unknown": {"extra": ids},
        "rank": {"input_ids": ids[0]},
        "dtype": {"input_ids": ids + 0.5},
        "counts": {"input_ids": ids[:3]},
        "none": {key: value[:0] for key, value in good.items()},
        "text": {"input_ids": ids.astype(str)},
    }.items():
        np.savez(found / f"{name}.npz", **{**good, **change})
    whole = (found / "model.onnx").read_bytes()
    (found / "short.onnx").write_bytes(whole[: len(whole) // 2])
    (found / "random.onnx").write_bytes(np.random.default_rng(0).bytes(5000))
    (found / "empty.onnx").touch()
    return found


def _is_one_line(text: str) -> bool:
    return text.startswith("onnxq: error: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("quantize nothere.onnx", "no such file"),
        ("quantize short.onnx", "truncated"),
        ("quantize random.onnx", "not an ONNX model"),
        ("quantize empty.onnx", "is empty"),
        ("quantize .", "not a file"),
        ("quantize model.onnx -o model.onnx", "the output is the input"),
        ("quantize model.onnx -o .", "is a folder"),
        ("quantize model.onnx -o no/where.onnx", "no such folder"),
        ("quantize model.onnx --recipe fp8", "fp8-dynamic"),
        ("quantize model.onnx --recipe fp9", "unknown recipe"),
        ("quantize model.onnx --target sm42", "unknown target"),
        ("quantize model.onnx --recipe fp8 --target sm80 --calib good.npz", "int8"),
        ("quantize model.onnx --recipe int8 --calib nothere.npz", "does not exist"),
        ("quantize model.onnx --recipe int8 --calib unknown.npz", "extra"),
        ("quantize model.onnx --recipe int8 --calib rank.npz", "dimensions"),
        ("quantize model.onnx --recipe int8 --calib dtype.npz", "int64"),
        ("quantize model.onnx --recipe int8 --calib counts.npz", "different numbers of samples"),
        ("quantize model.onnx --recipe int8 --calib none.npz", "no sample"),
        ("quantize model.onnx --recipe int8 --calib text.npz", "not numbers"),
        ("quantize model.onnx --recipe int8-dynamic --calibrator mse", "no ranges"),
        ("quantize model.onnx --rule leave:x", "rule"),
        ("quantize model.onnx --text a.txt", "tokenizer"),
        ("quantize model.onnx --memory lots", "size"),
        ("inspect random.onnx", "not an ONNX model"),
        ("build random.onnx", "not an ONNX model"),
        ("build model.onnx", "input_ids"),
        ("build model.onnx --shapes wrong:1x1", "wrong"),
        ("build model.onnx --shapes input_ids:8x1,4x1,2x1", "input_ids"),
        ("build model.onnx --target sm90", "sm90"),
        ("compare model.onnx model.onnx", "needs data"),
        ("compare model.onnx random.onnx --data good.npz", "random.onnx"),
        ("compare model.onnx nothere.onnx --data good.npz", "nothere.onnx"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    words: str, said: str, folder: Path, cli: Cli
) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    done = cli(*words.split(), cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert _is_one_line(done.stderr), done.stderr
    assert said in done.stderr
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "LONG.onnx"),
        ("quantize", "LONG/model.onnx"),
        ("quantize", "model.onnx", "-o", "LONG.onnx"),
        ("quantize", "model.onnx", "-o", "LONG/out.onnx"),
        ("quantize", "model.onnx", "--recipe", "LONG"),
        ("quantize", "model.onnx", "--calib", "LONG.npz"),
        ("quantize", "model.onnx", "--text", "LONG", "--tokenizer", "LONG"),
        ("quantize", "model.onnx", "--load-calib", "LONG.json"),
        ("compare", "model.onnx", "LONG.onnx", "--data", "good.npz"),
        ("build", "model.onnx", "-o", "LONG.plan", "--shapes", "input_ids:1x8"),
    ],
)
def test_names_that_no_file_can_have_are_one_line(
    words: tuple[str, ...], folder: Path, cli: Cli
) -> None:
    before = set(folder.iterdir())
    done = cli(*(w.replace("LONG", "long" * 75) for w in words), cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert _is_one_line(done.stderr), done.stderr
    assert "longlong" in done.stderr
    assert set(folder.iterdir()) == before


def test_the_outputs_name_leaves_room_for_its_data_files(folder: Path, cli: Cli) -> None:
    """255 bytes on the file systems of this day; the data file's name is 14 longer."""
    words = ("quantize", "model.onnx", "--recipe", "int8-dynamic", "-o")
    refused = cli(*words, "m" * 237 + ".onnx", cwd=folder)
    assert refused.returncode == 2 and "longer than 241 bytes" in refused.stderr
    fits = "m" * 236 + ".onnx"
    assert cli(*words, fits, cwd=folder).returncode == 0
    (folder / fits).unlink()


def test_usage_errors_exit_with_2(folder: Path, cli: Cli) -> None:
    assert cli("quantize", "model.onnx", "--frobnicate", cwd=folder).returncode == 2
    assert cli("quantize", cwd=folder).returncode == 2


@pytest.mark.parametrize(("target", "recipe"), [("sm89", "fp8-dynamic"), ("sm80", "int8-dynamic")])
def test_no_options_choose_the_dynamic_recipe_and_say_why(
    target: str, recipe: str, folder: Path, cli: Cli
) -> None:
    written = folder / f"model.{recipe}.onnx"
    before = (folder / "model.onnx").stat()
    done = cli("quantize", "model.onnx", "--target", target, cwd=folder)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert recipe in first and target in first and "no data" in first
    assert written.exists()
    after = (folder / "model.onnx").stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    written.unlink()


def test_data_without_a_recipe_chooses_the_static_one(folder: Path, cli: Cli) -> None:
    done = cli("quantize", "model.onnx", "--calib", "good.npz", "-o", "chosen.onnx", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipe fp8 for sm89")
    (folder / "chosen.onnx").unlink()


@pytest.mark.parametrize("flags", [(), ("--quiet",)])
def test_the_recipe_is_said_before_the_calibration(
    flags: tuple[str, ...], folder: Path, cli: Cli
) -> None:
    (folder / "fails.py").write_text("def load_data():\n    raise RuntimeError('in the middle')\n")
    words = (*flags, "quantize", "model.onnx", "-o", "said.onnx", "--calib")
    failed = cli(*words, "fails.py", cwd=folder)
    assert failed.returncode == 2 and "in the middle" in failed.stderr
    assert failed.stdout.startswith("recipe fp8 for sm89: ") and failed.stdout.count("\n") == 1
    done = cli(*words, "good.npz", cwd=folder)
    assert done.stdout.startswith(failed.stdout) and done.stdout.count("recipe fp8") == 1
    assert done.stderr == ""
    (folder / "said.onnx").unlink()
    (folder / "fails.py").unlink()


def test_compare_fails_with_1_only_where_a_tolerance_is_missed(folder: Path, cli: Cli) -> None:
    made = cli("quantize", "model.onnx", "-o", "q.onnx", "--recipe", "int8-dynamic", cwd=folder)
    assert made.returncode == 0, made.stderr
    words = ("compare", "model.onnx", "q.onnx", "--data", "good.npz", "--no-fp16")
    assert cli(*words, cwd=folder).returncode == 0
    assert cli(*words, "--min-snr", "5", cwd=folder).returncode == 0
    failed = cli(*words, "--min-snr", "80", "--report", "r.json", cwd=folder)
    assert failed.returncode == 1 and "80" in failed.stdout
    assert json.loads((folder / "r.json").read_text())["comparison"]["passed"] is False
    refused = cli("quantize", "q.onnx", cwd=folder)
    assert refused.returncode == 2 and "already" in refused.stderr


def test_the_same_input_gives_the_same_bytes(folder: Path, cli: Cli) -> None:
    digests = set()
    for name in ("one.onnx", "two.onnx"):
        done = cli("quantize", "model.onnx", "-o", name, "--calib", "good.npz", cwd=folder)
        assert done.returncode == 0, done.stderr
        digests.add(hashlib.sha256((folder / name).read_bytes()).hexdigest())
        (folder / name).unlink()
    assert len(digests) == 1


def test_saved_calibration_gives_the_same_model(folder: Path, cli: Cli) -> None:
    words = ("quantize", "model.onnx", "--recipe", "int8", "-o")
    first = cli(*words, "a.onnx", "--calib", "good.npz", "--save-calib", "t.calib", cwd=folder)
    second = cli(*words, "b.onnx", "--load-calib", "t.calib", cwd=folder)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    scales = [_scales(folder / name) for name in ("a.onnx", "b.onnx")]
    assert scales[0] and scales[0] == scales[1]


def _scales(path: Path) -> dict[str, bytes]:
    import onnx

    return {
        t.name: t.raw_data for t in onnx.load(path).graph.initializer if t.name.endswith("_scale")
    }


def test_ctrl_c_leaves_the_old_file_and_no_temporary(folder: Path, models: Path) -> None:
    target = folder / "kept.onnx"
    target.write_bytes(b"the old file")
    data = models / "minilm/calib.npz"
    before = set(folder.iterdir())
    words = f"quantize model.onnx -o {target.name} --recipe int8 --calib {data}"
    child = subprocess.Popen(
        [sys.executable, "-m", "onnxq.cli", "-q", *words.split()],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(1.0)  # in the middle of the calibration, which takes more than two seconds
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors, errors
    assert target.read_bytes() == b"the old file"
    assert set(folder.iterdir()) == before


def test_recipes_are_listed() -> None:
    done = CliRunner().invoke(main, ["recipes"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == list(presets())


def test_a_field_of_the_recipe_is_set(folder: Path) -> None:
    command = ["inspect", str(folder / "model.onnx"), "--recipe", "int4-rtn"]
    done = CliRunner().invoke(main, [*command, "--set", "block_size=16"])
    assert done.exit_code == 0
    assert "in blocks of 16" in done.output


@pytest.mark.parametrize("flag", ["--report", "--save-calib"])
def test_what_cannot_be_written_is_said_before_the_work(
    flag: str, models: Path, cli: Cli, tmp_path: Path
) -> None:
    """Calibration data that is not there would be the next complaint."""
    done = cli(
        *("quantize", models / "minilm/model.onnx", "-o", tmp_path / "m.onnx", "--recipe", "int8"),
        *("--calib", tmp_path / "none.npz", flag, tmp_path / "nowhere/file"),
    )
    assert done.returncode == 2
    assert "cannot write" in done.stderr and "nowhere/file" in done.stderr
    assert not list(tmp_path.iterdir())
