"""Wanda: a weight counts for as much as it adds to its output, |w| times the size of its input.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695,
section 3: scores |W_ij| ||X_j||_2, compared within an output; the weights that stay do not change.
Magnitude pruning is this with all inputs alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]


def magnitude_scores(W: Matrix) -> Matrix:
    """|w|."""
    return np.asarray(np.abs(W))


def wanda_scores(W: Matrix, h: Matrix) -> Matrix:
    """|w_kn| ||x_k||, up to a common factor.

    Args:
        W: [K, N].
        h: diag(X^T X) [K], any multiple of it.
    """
    return np.asarray(np.abs(W) * np.sqrt(np.maximum(h, 0))[:, None])
