"""Methods on one weight matrix: pure numpy, one file each, never a graph.

`STEPS` is what a recipe can ask for, in the order the kinds must come in. A new method is a file
here, a row there, and a branch where its kind is applied.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["scale", "round"]

KINDS: tuple[Kind, ...] = ("scale", "round")
"""In the order that makes sense: scales are fixed before values are rounded under them."""

STEPS: dict[str, tuple[Kind, str]] = {
    "search": ("scale", "scales searched under diag(H)"),
    "gptq": ("round", "GPTQ: later inputs make up for the rounding of earlier ones"),
}
"""Name -> kind and what it does. All of them need the Gram matrix of the layer's input."""
