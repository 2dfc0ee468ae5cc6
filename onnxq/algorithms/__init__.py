"""Methods on one weight matrix: pure numpy, one file each, never a graph.

`STEPS` is what a recipe can ask for, in the order the kinds must come in. A new method is a file
here, a row there, and a branch where its kind is applied.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["rescale", "target", "scale", "round", "refine"]

KINDS: tuple[Kind, ...] = ("rescale", "target", "scale", "round", "refine")
"""In the order that makes sense: the layers themselves, what to round towards, scales, values
under them, those values again."""

STEPS: dict[str, tuple[Kind, str]] = {
    "awq": ("rescale", "weights that meet large inputs made larger, and the inputs smaller"),
    "sequential": ("target", "layer by layer, each making up for the error of those before it"),
    "search": ("scale", "scales searched under diag(H)"),
    "gptq": ("round", "GPTQ: later inputs make up for the rounding of earlier ones"),
    "descent": ("refine", "every code looked at again, given all the others"),
}
"""Name -> kind and what it does. All of them need the second moments of the layer's input."""
