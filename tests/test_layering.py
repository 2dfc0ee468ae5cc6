"""The rooms keep to their imports, and importing onnxq stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "onnxq"

# Library -> the rooms that may import it; "" is the package itself.
ROOMS = {
    "onnx": {"graph"},
    "google": {"graph"},
    "onnx_graphsurgeon": {"graph"},
    "onnxruntime": {"calibrate", "evaluate"},
    "tokenizers": {"calibrate", "evaluate"},
    "tensorrt": {"engine", "evaluate"},
    "tensorrt_rtx": {"engine", "evaluate"},
    "polygraphy": {"engine", "evaluate", "calibrate"},
    "click": {""},
}
HEAVY = {"onnxruntime", "tokenizers", "tensorrt", "tensorrt_rtx", "polygraphy"}


def _imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_its_libraries(path: Path) -> None:
    inside = path.relative_to(PACKAGE).parts
    room = inside[0] if len(inside) > 1 else ""
    for library in _imports(path, top_level_only=False) & ROOMS.keys():
        assert room in ROOMS[library], f"{path.name} is in {room!r} and imports {library}"


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_load_on_first_use(path: Path) -> None:
    assert not _imports(path, top_level_only=True) & HEAVY


def test_algorithms_see_no_graph() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        source = path.read_text()
        assert "onnxq.graph" not in source and "onnxq.placement" not in source


def test_lint_looks_at_the_file_alone() -> None:
    """Its rules know graphs: nothing that quantizes, calibrates, compiles or measures."""
    rooms = ("algorithms", "calibrate", "engine", "evaluate", "transform", "placement", "api")
    for path in (PACKAGE / "linting").glob("*.py"):
        source = path.read_text()
        assert not [room for room in rooms if f"onnxq.{room}" in source], path


def test_printing_and_exiting_are_the_command_lines() -> None:
    for path in _files():
        if path.name == "cli.py":
            continue
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"print", "exit"}, path


@pytest.mark.parametrize("statement", ["import onnxq", "import onnxq.cli"])
def test_import_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {name.split(".")[0] for name in said} & {*HEAVY, "onnx", "numpy", "scipy", "rich"}
