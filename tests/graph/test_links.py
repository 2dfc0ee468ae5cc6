"""Data files behind links, in folders, read-only: read where they are, never written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import graph_models as g
import numpy as np
import onnx
import pytest

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save


def _external(folder: Path, *locations: str) -> Path:
    """`mlp` whose weights lie in these files, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    model = g.mlp()
    for index, tensor in enumerate(model.graph.initializer):
        location = locations[index % len(locations)]
        file = folder / location
        file.parent.mkdir(parents=True, exist_ok=True)
        offset = file.stat().st_size if file.exists() else 0
        with file.open("ab") as stream:
            stream.write(tensor.raw_data)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return g.saved(model, folder / "model.onnx")


def plain(folder: Path) -> Path:
    return _external(folder, "model.onnx.data")


def sub_folder(folder: Path) -> Path:
    return _external(folder, "weights/model.bin")


def dotted(folder: Path) -> Path:
    return _external(folder, "./model.bin")


def several(folder: Path) -> Path:
    return _external(folder, "a/x/one.bin", "b/x/two.bin", "three.bin")


def hugging_face_cache(folder: Path) -> Path:
    """snapshots/REVISION/model.onnx -> ../../blobs/HASH, and the data the same way."""
    path = _external(folder / "snapshots/abc", "model.onnx.data")
    blobs = folder / "blobs"
    blobs.mkdir()
    for file, blob in ((path, "aa"), (path.with_name("model.onnx.data"), "bb")):
        file.rename(blobs / blob)
        file.symlink_to(f"../../blobs/{blob}")
    return path


def hugging_face_cache_inline(folder: Path) -> Path:
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "blobs").mkdir()
    g.saved(g.mlp(), folder / "blobs/aa")
    path = folder / "snapshots/abc/model.onnx"
    path.symlink_to("../../blobs/aa")
    return path


def links_to_several_disks(folder: Path) -> Path:
    path = _external(folder / "in", "a/one.bin", "two.bin", "three.bin")
    for name in ("a/one.bin", "two.bin"):
        elsewhere = folder / "disk" / Path(name).stem / "data"
        elsewhere.parent.mkdir(parents=True)
        (path.parent / name).rename(elsewhere)
        (path.parent / name).symlink_to(elsewhere)
    return path


def hard_links(folder: Path) -> Path:
    path = _external(folder / "in", "model.onnx.data")
    for name in ("model.onnx", "model.onnx.data"):
        os.link(path.with_name(name), folder / f"other-{name}")
    return path


def linked_folder(folder: Path) -> Path:
    _external(folder / "real", "sub/model.bin")
    (folder / "link").symlink_to("real")
    return folder / "link/model.onnx"


def read_only(folder: Path) -> Path:
    path = _external(folder / "in", "model.onnx.data")
    for file in path.parent.iterdir():
        file.chmod(0o444)
    path.parent.chmod(0o555)
    return path


LAYOUTS = [
    plain,
    sub_folder,
    dotted,
    several,
    hugging_face_cache,
    hugging_face_cache_inline,
    links_to_several_disks,
    hard_links,
    linked_folder,
    read_only,
]


def _contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything below a folder: inode and bytes of files, targets of links."""
    return {
        str(p.relative_to(folder)): (
            p.lstat().st_ino,
            str(p.readlink()) if p.is_symlink() else p.read_bytes(),
        )
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_is_read_in_place(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    source, out = layout(tmp_path / "x"), tmp_path / "out"
    out.mkdir()
    before = _contents(tmp_path / "x")
    feed = {"x": np.random.default_rng(3).standard_normal((4, 32)).astype(np.float32)}
    want = g.outputs_of(_reference(tmp_path, source), feed)

    loaded = Model.load(source)
    for model in (loaded, prepare(loaded, 21)[0]):
        content, folder = model.session_model()
        np.testing.assert_array_equal(g.outputs_of(content, feed, folder)[0], want[0])
        for external in (False, True):
            written = save(model, out / "model.onnx", external=external)
            np.testing.assert_array_equal(g.outputs_of(written[0], feed)[0], want[0])
            assert sorted(out.iterdir()) == sorted(written)  # the old data is gone
    assert _contents(tmp_path / "x") == before


def _reference(tmp_path: Path, source: Path) -> Path:
    """The model with its weights inline, put together by hand: onnx refuses to follow links."""
    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {e.key: e.value for e in tensor.external_data}
            data = (source.parent / where["location"]).read_bytes()
            start = int(where["offset"])
            tensor.raw_data = data[start : start + int(where["length"])]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return g.saved(model, tmp_path / "reference.onnx")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_output_beside_the_input(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    source = layout(tmp_path / "x")
    source.parent.chmod(0o755)
    before = _contents(tmp_path / "x")
    written = save(Model.load(source), source.with_name("model.fp8.onnx"))
    after = _contents(tmp_path / "x")
    new = {str(p.relative_to(tmp_path / "x")) for p in written}
    if source.parent.is_symlink():
        new = {p.replace("link/", "real/") for p in new}
    assert after.keys() - before.keys() == new
    assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_the_input_is_never_the_output(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    """Whatever name it is reached by: the model, its data, what they link to, hard links."""
    source = layout(tmp_path / "x")
    before = _contents(tmp_path / "x")
    files = [p for p in (tmp_path / "x").rglob("*") if p.is_file()]
    for file in files:
        with pytest.raises(OnnxqError, match="a file of the input"):
            save(Model.load(source), file)
    assert _contents(tmp_path / "x") == before


def test_a_linked_output_is_replaced_not_written_through(tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    (tmp_path / "precious.onnx").write_bytes(b"precious")
    (tmp_path / "out.onnx").symlink_to("precious.onnx")
    os.link(tmp_path / "precious.onnx", tmp_path / "hard.onnx")
    for name in ("out.onnx", "hard.onnx"):
        save(Model.load(source), tmp_path / name)
        assert not (tmp_path / name).is_symlink()
        onnx.load(tmp_path / name)
    assert (tmp_path / "precious.onnx").read_bytes() == b"precious"


def test_data_that_changes_after_loading_is_noticed(tmp_path: Path) -> None:
    source = plain(tmp_path / "in")
    model = Model.load(source)
    data = source.with_name("model.onnx.data")
    os.utime(data, (1, 1))
    with pytest.raises(OnnxqError, match="changed since"):
        save(model, tmp_path / "out.onnx")
    model = Model.load(source)
    os.truncate(data, 100)
    with pytest.raises(OnnxqError, match="changed since"):
        save(model, tmp_path / "out.onnx")
    model = Model.load(g.saved(g.mlp(), tmp_path / "inline.onnx"))
    (tmp_path / "inline.onnx").unlink()
    with pytest.raises(OnnxqError, match="cannot read weights"):
        save(model, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
