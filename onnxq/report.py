"""What was done and why: edits, notes and figures; as JSON and as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from onnxq.files import write_json, write_text
from onnxq.page import page


@dataclass(frozen=True)
class Edit:
    """One change of the graph.

    Attributes:
        step: the pass that made it (`precision`, `emit`, `opset`, ...).
        verb: what was done (`quantize`, `leave`, `keep fp32`, `clamp`, ...).
        target: the node or tensor.
        reason: why, or from what to what.
    """

    step: str
    verb: str
    target: str
    reason: str = ""


def decibels(share: float) -> str:
    """An error's power as a share of the signal's, for people: 0.01 is -20.0 dB."""
    return f"{10 * math.log10(share):.1f} dB" if share > 0 else "none"


@dataclass
class Report:
    """A run's record. `facts` are the figures, by name; `notes` what a user should read."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)

    def extend(self, edits: Iterable[Edit]) -> None:
        """Record edits."""
        self.edits.extend(edits)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `save` writes it."""
        return {
            "title": self.title,
            **{name: plain(value) for name, value in self.facts.items()},
            "notes": list(self.notes),
            "edits": [asdict(e) for e in self.edits],
        }

    def save(self, path: Path | str) -> None:
        """Write the report as JSON; where the name ends in .html, as a page to read."""
        path = Path(path)
        if path.suffix.lower() in (".html", ".htm"):
            write_text(path, page(self.as_dict()))
        else:
            write_json(path, self.as_dict())


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {k: plain(v) for k, v in asdict(value).items()}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value
