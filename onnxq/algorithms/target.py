"""The weight to round towards, when the layer's input comes from layers that are rounded already.

With X the input in full precision and Y what arrives behind rounded layers, the weight whose
output Y T is nearest to X W is T = (Y^T Y)^-1 Y^T X W: least squares. GPTAQ (arXiv:2504.02692) and
Qronos (arXiv:2505.11695) round towards it. Few rows, and inputs that are nearly dependent, leave
directions in which T is made of noise: there W itself is the better guess, so it is drawn to W.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]

DAMP = 0.4
"""Pull towards W, in units of the mean diagonal of Y^T Y. Chosen on calibration data held back."""


def corrected_target(
    W: Matrix, rounded: Matrix, cross: Matrix, damp: float = DAMP
) -> NDArray[np.float32]:
    """argmin_T E||X W - Y T||^2 + damp mean(diag) ||T - W||^2 -> [K, N].

    Args:
        W: [K, N].
        rounded: Y^T Y / n [K, K].
        cross: Y^T X / n [K, K].
    """
    from scipy.linalg import cho_factor, cho_solve

    pull = damp * float(np.diag(rounded).mean()) or 1.0
    left = rounded.astype(np.float64)
    left[np.diag_indices_from(left)] += pull
    right = cross.astype(np.float64) @ W + pull * W.astype(np.float64)
    return np.asarray(cho_solve(cho_factor(left, overwrite_a=True), right), np.float32)
