"""The record of a run in the metadata of the model it wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxq
from onnxq.errors import OnnxqError
from onnxq.recipe import Recipe, from_dict
from onnxq.report import Edit

if TYPE_CHECKING:
    from onnxq.graph.model import Model

KEY = "onnxq"
"""Key of the entry in `metadata_props`; its value is JSON."""


def stamp(
    model: Model,
    recipe: Recipe,
    target: str,
    precision: str,
    calibration: str | None,
    edits: Iterable[Edit] = (),
) -> None:
    """Record a run; nothing in it depends on when or where it ran.

    Args:
        calibration: digest of the calibration table, None without one.
        edits: all of them; those alike but for their target are kept together.
    """
    kept: dict[tuple[str, str, str], list[str]] = {}
    for edit in edits:
        kept.setdefault((edit.step, edit.verb, edit.reason), []).append(edit.target)
    content = {
        "version": onnxq.__version__,
        "recipe": recipe.as_dict(),
        "target": target,
        "precision": precision,
        "source": model.fingerprint,
        "calibration": calibration,
        "recipe_digest": _digest(recipe),
        "edits": [
            {"step": step, "verb": verb, "reason": reason, "targets": targets}
            for (step, verb, reason), targets in kept.items()
        ],
    }
    entry = model.header.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(content, sort_keys=True)


def recall(path: Path) -> tuple[Recipe, str, str]:
    """The recipe, target and precision of the run that wrote a model.

    Raises:
        OnnxqError: no run of onnxq wrote it.
    """
    from onnxq.graph.model import Model

    content = read(Model.load(path))
    if content is None:
        raise OnnxqError(
            f"{path} holds no record of onnxq", "name a model that onnxq wrote, or use --recipe"
        )
    try:
        recipe = from_dict(content["recipe"], str(path))
        return recipe, str(content["target"]), str(content["precision"])
    except KeyError as error:
        raise OnnxqError(f"{path}: its record has no {error}", "use --recipe") from None


def _digest(recipe: Recipe) -> str:
    """SHA-256 of what a recipe does, whatever it is called."""
    content = {k: v for k, v in recipe.as_dict().items() if k not in ("name", "description")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sparsity(model: Model) -> str:
    """The pattern of zeros that a recorded run put into a model; '' for none."""
    recipe = (read(model) or {}).get("recipe")
    return str(recipe.get("sparsity") or "") if isinstance(recipe, dict) else ""


def pruned(content: Mapping[str, Any]) -> frozenset[str] | None:
    """The nodes whose weights a recorded run pruned; None where it pruned nothing."""
    recipe, edits = content.get("recipe"), content.get("edits")
    if not isinstance(recipe, dict) or not recipe.get("sparsity") or not isinstance(edits, list):
        return None
    found: dict[tuple[str, str], set[str]] = {}
    for e in edits:
        found.setdefault((e["step"], e["verb"]), set()).update(e["targets"])
    done = found.get(("emit", "quantize"), set()) | found.get(("emit", "prune"), set())
    return frozenset(done - found.get(("sparsify", "leave"), set()))


def left(model: Model) -> dict[str, str]:
    """Why a recorded run left sites as they were, by their names; empty without a record."""
    edits = (read(model) or {}).get("edits")
    return {
        str(name): str(e.get("reason", ""))
        for e in (edits if isinstance(edits, list) else ())
        if isinstance(e, dict) and (e.get("step"), e.get("verb")) == ("emit", "leave")
        for name in e.get("targets", ())
    }


def erase(model: Model) -> None:
    """Take out the record of an earlier run."""
    kept = [e for e in model.header.metadata_props if e.key != KEY]
    model.header.ClearField("metadata_props")
    model.header.metadata_props.extend(kept)


def read(model: Model) -> dict[str, Any] | None:
    """The record of the run that wrote a model; None for a model of another hand."""
    text = {e.key: e.value for e in model.header.metadata_props}.get(KEY)
    try:
        content = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
