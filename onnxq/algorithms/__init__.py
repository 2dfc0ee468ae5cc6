"""Methods on one weight matrix: pure numpy, one file each, never a graph.

`STEPS` is what a recipe can ask for, in the order the kinds must come in. A new method is a file
here, a row there, and a branch where its kind is applied.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["rescale", "target", "sparsify", "refit", "scale", "round", "refine", "settle"]

KINDS: dict[Kind, str] = {
    "rescale": "it changes the weights and the inputs that all other steps look at",
    "target": "it says what all that follows shall come near to",
    "sparsify": "zeros put in later undo what was chosen for the weights they replace",
    "refit": "it moves the weights, which then no longer fit their scales and codes",
    "scale": "codes mean nothing under other scales",
    "round": "it starts anew, whatever was refined",
    "refine": "the scales were fitted to codes that it changes",
    "settle": "",
}
"""In the order that makes sense: the layers themselves, what to come near to, zeros, the weights
left beside them, scales, values under them, those values again, then both. And why none can come
later."""

STEPS: dict[str, tuple[Kind, str]] = {
    "smoothquant": ("rescale", "loud channels of inputs made quieter, and their weights larger"),
    "awq": ("rescale", "weights that meet large inputs made larger, and the inputs smaller"),
    "sequential": ("target", "layer by layer, each making up for the error of those before it"),
    "magnitude": ("sparsify", "the smallest weights become zero"),
    "wanda": ("sparsify", "the weights that add least to an output become zero"),
    "sparsegpt": ("sparsify", "zeros where they cost least, made up for by inputs to come"),
    "alps": ("sparsify", "zeros by alternating directions, changing sides while that helps"),
    "refit": ("refit", "the weights beside the zeros by least squares"),
    "search": ("scale", "scales searched under diag(H)"),
    "gptq": ("round", "GPTQ: later inputs make up for the rounding of earlier ones"),
    "descent": ("refine", "every code looked at again, given all the others"),
    "scales": ("settle", "scales by least squares under their codes, and the codes again"),
}
"""Name -> kind and what it does."""

DATA_FREE = ("magnitude",)
"""Steps that look at nothing but the weight."""

NEEDS = {"smoothquant": ("channel_amax:-1", "rows")}
"""Name -> the statistics of its layer's input that a step needs; of all others but `DATA_FREE`, the
second moments ("gram")."""
