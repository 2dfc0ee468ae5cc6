"""The record of a run in the metadata of the model it wrote."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnxq
from onnxq.recipe import Recipe

if TYPE_CHECKING:
    from onnxq.graph.model import Model

KEY = "onnxq"
"""Key of the entry in `metadata_props`; its value is JSON."""


def stamp(
    model: Model, recipe: Recipe, target: str, precision: str, calibration: str | None
) -> None:
    """Record a run; nothing in it depends on when or where it ran.

    Args:
        calibration: digest of the calibration table, None without one.
    """
    content = {
        "version": onnxq.__version__,
        "recipe": recipe.as_dict(),
        "target": target,
        "precision": precision,
        "source": model.fingerprint,
        "calibration": calibration,
    }
    entry = model.header.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(content, sort_keys=True)


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
