"""One small graph a fault, and its sound neighbours: which rules each must trip.

Every case was compiled with tensorrt-rtx 1.7.1 before its rule was written; `python -m
tools.lint_truth` compiles them again.
"""

from __future__ import annotations

from tools.lint_truth import forms_graphs, forms_layout, forms_products, forms_scales
from tools.lint_truth.cases import CASES as CASES

for theme in (forms_products, forms_scales, forms_layout, forms_graphs):
    theme.add_all()
