"""Every source of data, and every way it can fail to fit a model: one clear line."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxq.calibrate import data as data_module
from onnxq.calibrate.data import Samples, open_samples
from onnxq.calibrate.random_data import random_samples
from onnxq.calibrate.session import InputSpec
from onnxq.errors import OnnxqError

F32, F16, I64 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.int64)
X = InputSpec("x", F32, ("batch", 3))
IDS = InputSpec("ids", I64, ("batch", "seq"))


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "calib.npz"
    np.savez(path, **arrays)
    return path


def sizes(samples: Samples, name: str = "x") -> list[int]:
    return [feed[name].shape[0] for feed in samples]


def numbers(rows: int) -> np.ndarray:
    return np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)


# --- batches -------------------------------------------------------------------------------------


def test_seven_samples_at_batch_four_are_four_and_three(tmp_path: Path) -> None:
    samples = open_samples(npz(tmp_path, x=numbers(7)), [X], batch=4)
    assert sizes(samples) == [4, 3]
    assert (len(samples), samples.count) == (2, 7)
    assert np.array_equal(np.concatenate([feed["x"] for feed in samples]), numbers(7))
    assert samples.label(1) == "sample 4 to 6"


def test_the_batch_is_one_unless_said_or_fixed(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbers(6))
    assert sizes(open_samples(path, [X])) == [1] * 6
    fixed = InputSpec("x", F32, (2, 3))
    assert sizes(open_samples(path, [fixed])) == [2] * 3
    with pytest.raises(OnnxqError, match=r"takes 2 rows at a time"):
        open_samples(path, [fixed], batch=3)
    with pytest.raises(OnnxqError, match="batch is 0"):
        open_samples(path, [X], batch=0)


def test_a_fixed_batch_leaves_out_what_does_not_fill_it_and_says_so(tmp_path: Path) -> None:
    samples = open_samples(npz(tmp_path, x=numbers(7)), [InputSpec("x", F32, (4, 3))])
    assert sizes(samples) == [4]
    assert "last 3 of 7 samples" in samples.notes[0]
    with pytest.raises(OnnxqError, match=r"has 7 rows, but the input .* takes 8 at a time"):
        open_samples(npz(tmp_path, x=numbers(7)), [InputSpec("x", F32, (8, 3))])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 20), st.integers(1, 9))
def test_any_batch_gives_all_rows_once_and_one_digest(
    tmp_path_factory: pytest.TempPathFactory, rows: int, batch: int
) -> None:
    path = npz(tmp_path_factory.mktemp("d"), x=numbers(rows), ids=np.ones((rows, 5), np.int64))
    samples = open_samples(path, [X, IDS], batch=batch)
    assert np.array_equal(np.concatenate([feed["x"] for feed in samples]), numbers(rows))
    assert samples.digest == open_samples(path, [X, IDS]).digest
    assert samples.count == rows


def test_what_has_no_sample_dimension_is_given_at_every_step(tmp_path: Path) -> None:
    """SDXL's inputs: a latent pair, a 0-dim timestep, an embedding that never changes."""
    inputs = [
        InputSpec("latent", F32, (2, 4)),
        InputSpec("timestep", F32, ()),
        InputSpec("text", F32, (1, 3)),
    ]
    latent = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    text = np.ones((1, 3), np.float32)
    path = npz(tmp_path, latent=latent, timestep=np.float32(5), text=text)
    feeds = list(open_samples(path, inputs))
    assert [feed["timestep"].shape for feed in feeds] == [()] * 3
    assert all(np.array_equal(feed["text"], text) for feed in feeds)
    # One timestep for each step is possible too.
    path = npz(tmp_path, latent=latent, timestep=np.arange(3, dtype=np.float32), text=text)
    assert [float(feed["timestep"]) for feed in open_samples(path, inputs)] == [0, 1, 2]
    path = npz(tmp_path, latent=latent, timestep=np.arange(4, dtype=np.float32), text=text)
    with pytest.raises(OnnxqError, match=r"different numbers of samples.*timestep 4"):
        open_samples(path, inputs)


def test_column_major_and_compressed_arrays_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "calib.npz"
    np.savez_compressed(path, x=np.asfortranarray(numbers(5)))
    found = np.concatenate([feed["x"] for feed in open_samples(path, [X], batch=2)])
    assert np.array_equal(found, numbers(5))


def test_rows_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 MB of data, 1 MB a step: opening and reading it must not take 200 MB."""
    import tracemalloc

    spec = InputSpec("x", F32, ("batch", 1 << 18))
    path = tmp_path / "calib.npz"
    np.savez(path, x=np.ones((200, 1 << 18), np.float32))
    monkeypatch.setattr(data_module, "_KEEP_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        total = sum(float(feed["x"][0, 0]) for feed in open_samples(path, [spec]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 200
    assert peak < 20 << 20  # a few steps of 1 MiB: the row, its check, its digest


# --- the other sources ---------------------------------------------------------------------------


def test_a_folder_of_npy_is_a_batch_of_each_input(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(4))
    np.save(tmp_path / "ids.npy", np.ones((4, 2), np.int64))
    assert sizes(open_samples(tmp_path, [X, IDS], batch=3)) == [3, 1]


def test_a_folder_of_npz_is_a_list_of_samples_fed_as_they_are(tmp_path: Path) -> None:
    for index, seq in enumerate((5, 2, 9)):
        np.savez(tmp_path / f"{index:02}.npz", ids=np.ones((1, seq), np.int64))
    samples = open_samples(tmp_path, [IDS])
    assert [feed["ids"].shape for feed in samples] == [(1, 5), (1, 2), (1, 9)]
    shapes = samples.shapes()["ids"]
    assert (shapes.minimum, shapes.median, shapes.maximum) == ((1, 2), (1, 5), (1, 9))
    assert samples.largest()["ids"].shape == (1, 9)
    assert "02.npz" in samples.label(2)
    assert samples.notes == []
    assert "changes nothing" in open_samples(tmp_path, [IDS], batch=2).notes[0]


def test_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=r"no .npy and no .npz"):
        open_samples(tmp_path, [X])
    np.save(tmp_path / "x.npy", numbers(1))
    np.savez(tmp_path / "a.npz", x=numbers(1))
    with pytest.raises(OnnxqError, match="both"):
        open_samples(tmp_path, [X])


def test_polygraphy_inputs(tmp_path: Path) -> None:
    from polygraphy.json import save_json

    path = tmp_path / "inputs.json"
    save_json([OrderedDict(x=numbers(2)), OrderedDict(x=numbers(1))], str(path))
    assert sizes(open_samples(path, [X])) == [2, 1]


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"x"', '[{"x": "text"}]', "[]"])
def test_other_json_is_refused(
    tmp_path: Path, content: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "inputs.json"
    path.write_text(content)
    with pytest.raises(OnnxqError) as error:
        open_samples(path, [X])
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_loader_scripts(tmp_path: Path) -> None:
    (tmp_path / "helper_of_loader.py").write_text("ROWS = 2\n")
    script = tmp_path / "data.py"  # the name of a module of ours: no clash
    script.write_text(
        "import numpy as np\nfrom helper_of_loader import ROWS\n"
        "def load_data():\n    for i in range(3):\n"
        "        yield {'x': np.full((ROWS, 3), i, np.float32)}\n"
        "def few():\n    return [{'x': np.ones((1, 3), np.float32)}]\n"
    )
    assert sizes(open_samples(script, [X])) == [2, 2, 2]
    assert sizes(open_samples(f"{script}:few", [X])) == [1]
    with pytest.raises(OnnxqError, match="does not define other"):
        open_samples(f"{script}:other", [X])


@pytest.mark.parametrize(
    "body, message",
    [
        ("def load_data():\n    return 3", "failed: TypeError"),
        ("def load_data():\n    yield [1]", "gave a list"),
        ("def load_data():\n    yield {'x': 'abc'}", "not as numbers"),
        ("def load_data():\n    raise RuntimeError('no disk')", "no disk"),
        ("import nothing_like_this", "could not be loaded"),
        ("x = 1", "does not define load_data"),
        ("def load_data():\n    return []", "holds no sample"),
    ],
)
def test_bad_loader_scripts_are_refused(tmp_path: Path, body: str, message: str) -> None:
    script = tmp_path / "loader.py"
    script.write_text(body)
    with pytest.raises(OnnxqError, match=message):
        open_samples(script, [X])


def test_a_source_that_changes_between_readings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "loader.py"
    script.write_text(
        "import numpy as np\n"
        "def load_data():\n    yield {'x': np.random.rand(1, 3).astype(np.float32)}\n"
    )
    kept = open_samples(script, [X])  # little data is kept, so nothing can change
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(list(kept), list(kept), strict=True))
    monkeypatch.setattr(data_module, "_KEEP_BYTES", 0)
    with pytest.raises(OnnxqError, match="other data when it was read again"):
        list(open_samples(script, [X]))


def test_random_feeds_are_seeded_and_safe() -> None:
    inputs = [
        IDS,
        InputSpec("attention_mask", I64, ("batch", "seq")),
        InputSpec("image", F16, (None, 3, "height", "width")),
        InputSpec("past_key_values.0.key", F32, ("batch", 3, "past", 64)),
        InputSpec("timestep", F32, ()),
    ]
    one, again, other = (random_samples(inputs, seed=s, samples=3) for s in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    feed = next(iter(one))
    assert feed["ids"].shape == (1, 32) and feed["ids"].min() >= 0 and feed["ids"].max() < 100
    assert feed["attention_mask"].min() == 1
    assert feed["image"].shape == (1, 3, 64, 64) and feed["image"].dtype == F16
    assert feed["past_key_values.0.key"].shape == (1, 3, 0, 64)
    assert feed["timestep"].shape == ()


# --- what does not fit ---------------------------------------------------------------------------

BAD = {
    "missing name": ({"y": numbers(2)}, "does not have the input 'x'.*'y', which is no input"),
    "unknown name": ({"x": numbers(2), "z": numbers(2)}, "'z', which is no input.*x\\[batch,3\\]"),
    "wrong rank": ({"x": np.ones((2, 3, 1), np.float32)}, "3 dimensions, but the input x"),
    "wrong fixed dim": ({"x": np.ones((2, 4), np.float32)}, "fixes dimension 1 at 3"),
    "strings": ({"x": np.array([["a", "b", "c"]])}, "U1, not numbers"),
    "complex": ({"x": np.ones((1, 3), np.complex64)}, "complex64, not real numbers"),
    "objects": ({"x": np.array([[1, 2, None]], object)}, "Python objects.*never loaded"),
    "whole numbers": ({"x": np.ones((1, 3), np.int64)}, "is int64, but the input x"),
    "no samples": ({"x": np.ones((0, 3), np.float32)}, "no sample"),
    "NaN": ({"x": np.array([[1, 2, 3], [1, np.nan, 3]], np.float32)}, "'x' holds NaN in sample 1 "),
    "infinity": ({"x": np.array([[1, -np.inf, 3]], np.float32)}, "'x' holds infinity in sample 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_clear_line(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    with pytest.raises(OnnxqError, match=message) as error:
        open_samples(npz(tmp_path, **arrays), [X])
    assert "\n" not in str(error.value)


def test_different_counts_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=numbers(7), ids=np.ones((8, 2), np.int64))
    for batch in (None, 4, 8):
        with pytest.raises(OnnxqError, match="different numbers of samples: x 7, ids 8"):
            open_samples(path, [X, IDS], batch=batch)


@pytest.mark.parametrize(
    "spec, given, converted",
    [
        (X, np.float64, "float64 converted to float32"),
        (X, np.float16, "float16 converted to float32"),
        (X, ">f4", "converted to float32"),
        (InputSpec("x", F16, ("b", 3)), np.float32, "float32 converted to float16"),
        (InputSpec("x", I64, ("b", 3)), np.int32, "int32 converted to int64"),
        (InputSpec("x", np.dtype(np.int32), ("b", 3)), np.int64, "int64 converted to int32"),
    ],
)
def test_close_types_are_converted_and_said(
    tmp_path: Path, spec: InputSpec, given: type, converted: str
) -> None:
    samples = open_samples(npz(tmp_path, x=numbers(2).astype(given)), [spec])
    feed = next(iter(samples))
    assert feed["x"].dtype == spec.dtype
    assert np.array_equal(feed["x"], numbers(2)[:1])
    assert len(samples.notes) == 1 and converted in samples.notes[0]


def test_conversions_that_lose_values_are_refused(tmp_path: Path) -> None:
    big = np.full((1, 3), 1e30)
    with pytest.raises(OnnxqError, match=r"1e\+30, too large for float16,"):
        open_samples(npz(tmp_path, x=big), [InputSpec("x", F16, ("b", 3))])
    with pytest.raises(OnnxqError, match="int64, but the input"):
        open_samples(
            npz(tmp_path, x=np.full((1, 3), 1 << 40)),
            [InputSpec("x", np.dtype(np.int32), ("b", 3))],
        )


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, x=np.random.default_rng(0).random((400, 3), np.float32))
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"junk",
        whole[:100],
        whole[:-30],
        whole[:300] + b"\0" * 200 + whole[500:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(OnnxqError) as error:
            open_samples(path, [X])
        assert "\n" not in str(error.value)
    for name, content in (("x.npy", b"junk"), ("x.txt", b"")):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(OnnxqError):
            open_samples(folder, [X])
    for missing in ("nothing.npz", "nothing.json", "nothing.py", "nothing"):
        with pytest.raises(OnnxqError):
            open_samples(tmp_path / missing, [X])


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "opened",))

    np.save(tmp_path / "x.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(OnnxqError, match="never loaded"):
        open_samples(tmp_path, [X])
    assert not (tmp_path / "opened").exists()


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 45, 3)}
    )
    (tmp_path / "x.npy").write_bytes(header.getvalue() + b"\0" * 64)
    with pytest.raises(OnnxqError, match=r"422212.5 GB at a time"):
        open_samples(tmp_path, [X], batch=1 << 45)
