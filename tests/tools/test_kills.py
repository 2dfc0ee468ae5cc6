"""A few kills, as `python -m tools.kills` makes hundreds; and its judgement of what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import kills


@pytest.mark.parametrize("verb", ["quantize-external", "build"])
def test_kills_leave_a_whole_file(verb: str, tmp_path: Path) -> None:
    outcome = kills.kill(kills.prepare(tmp_path / verb, verb), 2, seed=1)
    assert outcome.wrong == []
    assert sum(outcome.found.values()) == 2


def cut(scene: kills.Scene) -> None:
    scene.output.write_bytes(scene.output.read_bytes()[:-1])


def swap(scene: kills.Scene) -> None:
    """The sidecar of another engine."""
    sidecar = scene.output.with_name(f"{scene.output.name}.json")
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**content, "model": "new.onnx"}))


def halve(scene: kills.Scene) -> None:
    sidecar = scene.output.with_name(f"{scene.output.name}.json")
    sidecar.write_text(sidecar.read_text()[:9])


@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut, "is neither"), (swap, "is that of new.onnx"), (halve, "not whole")],
)
def test_what_is_not_whole_is_said(
    damage: Callable[[kills.Scene], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = kills.prepare(tmp_path / "build", "build")
    scene.output.write_text("an engine")
    sidecar = scene.output.with_name(f"{scene.output.name}.json")
    sidecar.write_text('{"model": "old.onnx"}')
    known = {scene.state(): "old"}
    damage(scene)
    monkeypatch.setattr(kills.Scene, "command", lambda *_: ["sleep", "9"])
    (wrong,) = kills._strike(scene, 0.01, kills.Outcome(), known)
    assert said in wrong
