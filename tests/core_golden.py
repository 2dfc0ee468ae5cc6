"""Golden files: text that must not change unnoticed. ONNXQ_UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, lines: Iterable[str]) -> None:
    """Compare with tests/golden/<name>.txt."""
    path, text = GOLDEN / f"{name}.txt", "".join(f"{line.rstrip()}\n" for line in lines)
    if os.environ.get("ONNXQ_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no {path.name}: write it with ONNXQ_UPDATE_GOLDEN=1, and read it"
    assert text == path.read_text()
