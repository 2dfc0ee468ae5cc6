"""`make models` builds every model the tests name: a clean checkout has no other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools import room

ROOT = Path(__file__).parent.parent

NAMED = re.compile(
    r"[\"'/]((?:minilm|smollm2|sdxl-unet|ppocr)(?:-legacy|-torch|-decode|-tiny|-quarter|-full"
    r"|-fp16|-fp32|-dynamic|_rec)+)\b"
)


def built(dry: str) -> set[str]:
    """The folders under models/out that the commands of `make -n models` write."""
    found = set(re.findall(r"models/out/([\w-]+)/model\.onnx", dry))
    if "-m models.smollm2\n" in dry:
        found.add("smollm2-fp32")
    if "-m models.smollm2 --dtype fp16\n" in dry:
        found.add("smollm2-fp16")
    if "-m models.ppocr\n" in dry:
        found.add("ppocr_rec")
    return found


@pytest.fixture(scope="module")
def dry() -> str:
    """The commands of `make models`, not run."""
    done = subprocess.run(["make", "-n", "models"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_room_asked_for_counts_each_model(dry: str) -> None:
    counted = {Path(name).parent.name for name in room.MODELS if name.endswith("/model.onnx")}
    assert counted == built(dry)


def test_every_model_named_in_a_test_is_built(dry: str) -> None:
    here = Path(__file__)
    named = {
        (name, path.name)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != here
        for name in NAMED.findall(path.read_text())
    }
    assert {name for name, _ in named} >= {"sdxl-unet-full-fp16", "smollm2-torch", "ppocr_rec"}
    missing = {(name, path) for name, path in named if name not in built(dry)}
    assert not missing
