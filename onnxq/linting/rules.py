"""The table of rules, worst first within each theme."""

from __future__ import annotations

from onnxq.linting import (
    additions,
    attention,
    elements,
    formats,
    layout,
    operators,
    portability,
    products,
    scales,
)
from onnxq.linting.finding import Rule

RULES: tuple[Rule, ...] = (
    *operators.RULES,
    *elements.RULES,
    *scales.RULES,
    *products.RULES,
    *layout.RULES,
    *formats.RULES,
    *attention.RULES,
    *additions.RULES,
    *portability.RULES,
)

BY_ID = {rule.id: rule for rule in RULES}
