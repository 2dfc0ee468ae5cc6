"""Cures that change nothing but what is wrong: of the values only roundings, and only where said.

Each takes a finding of its rule and edits the graph, or declines with None where the case is not
the plain one it was written for. What is left is told by the next run of the rules.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxq.gpus import Target
from onnxq.graph.edit import Editor
from onnxq.graph.ir import Node
from onnxq.graph.model import Model
from onnxq.graph.query import label
from onnxq.graph.survey import survey
from onnxq.linting import fix_codes, fix_products
from onnxq.linting.finding import Found
from onnxq.linting.rules import BY_ID
from onnxq.linting.subject import Subject
from onnxq.report import Edit

_MOST_PASSES = 5
"""A cure may bring the next fault to light; this many rounds are made at most."""

Cure = Callable[[Subject, Editor, Node], str | None]

CURES: dict[str, Cure] = {
    "repeated-name": fix_codes.rename,
    "contrib-domain": fix_codes.standard_domain,
    "int32-codes": fix_codes.as_floats,
    "scalar-codes": fix_codes.as_floats,
    "zero-point": fix_codes.signed_codes,
    "mixed-types": fix_codes.one_type,
    "scale-of-one": fix_products.plain_scale,
    "one-operand": fix_products.take_off,
    "attention-partly": fix_products.take_off_attention,
    "attention-int8": fix_products.take_off_attention,
    "attention-size": fix_products.take_off_attention,
    "attention-scores": fix_products.take_off_scores,
    "attention-operator": fix_products.take_off,
    "mask-quantized": fix_products.take_off_mask,
    "residual-quantized": fix_products.take_off,
    "raw-sums": fix_products.rescale_behind,
    "merged-scales": fix_products.rescale_behind,
    "packed-qkv": fix_products.rescale_behind,
}
"""Rule -> what cures it."""


def fix(model: Model, target: Target) -> tuple[Model, list[Edit]]:
    """Cure what can be cured safely; the model is edited in memory.

    Returns:
        The model (another object if its functions were inlined), and what was done.
    """
    model, _ = survey(model)
    edits: list[Edit] = []
    for _ in range(_MOST_PASSES):
        step = [edit for rule, cure in CURES.items() for edit in _apply(model, target, rule, cure)]
        if not step:
            break
        edits += step
    return model, edits


def _apply(model: Model, target: Target, rule: str, cure: Cure) -> list[Edit]:
    subject, editor = Subject(model, target), Editor(model)
    edits = []
    found: list[Found] = list(BY_ID[rule].check(subject))
    for entry in found:
        if isinstance(entry.node, str):
            continue
        done = cure(subject, editor, entry.node)
        if done:
            edits.append(Edit("lint", rule, label(entry.node), done))
    if edits:
        editor.finish()
    return edits
