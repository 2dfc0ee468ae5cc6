"""The digits model's schedule is SDXL's: two tables, since models/ knows nothing of onnxq."""

from __future__ import annotations

import ast
from pathlib import Path

from onnxq.evaluate.schedule import SDXL

SOURCE = Path(__file__).parents[2] / "models/digits.py"


def test_the_schedule_is_sdxls() -> None:
    """Read, not imported: the script needs torch."""
    (table,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(SOURCE.read_text()).body
        if isinstance(node, ast.AnnAssign)
        and node.value is not None
        and isinstance(node.target, ast.Name)
        and node.target.id == "SCHEDULER"
    )
    own = {"_class_name", "clip_sample", "clip_sample_range"}  # digits lie between -1 and 1
    assert {name: table[name] for name in table.keys() - own} == SDXL
