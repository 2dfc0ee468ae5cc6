"""The output error of a layer, and the factor that second-order methods sweep with.

For y = x W with W [K, N] and H = X^T X / n [K, K] of the layer's input, a change E of the weight
changes the output by E||x E||^2 = tr(E^T H E): exact for the calibration data, no forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]


def output_errors(E: Matrix, H: Matrix) -> NDArray[np.float64]:
    """E||x e||^2 of each output channel: [N] for a change E [K, N] of the weight."""
    return np.asarray(np.einsum("kn,kn->n", H @ E, E, dtype=np.float64))


def output_error(E: Matrix, H: Matrix) -> float:
    """E||x E||^2 summed over the output channels, as tr(H E E^T): half the operations.

    Products of H's largest directions with E's cancel only in the sum. That is exact enough for an
    error that does not avoid them, such as that of rounding to nearest; behind GPTQ, whose errors
    lie where H is small, take `output_errors`.
    """
    from scipy.linalg import get_blas_funcs

    syrk = get_blas_funcs("syrk", (E,))
    # BLAS counts columns first, so that E as it lies is its transpose. One triangle is made.
    products = syrk(1.0, E.T, trans=1).T
    halves = np.einsum("ij,ij->i", products, H).sum(dtype=np.float64)
    return float(2 * halves - np.diag(products).astype(np.float64) @ np.diag(H))


def damped(H: Matrix, damp: float) -> NDArray[np.float64]:
    """H + damp * mean(diag H) I in float64; inputs that are always zero get a diagonal too."""
    result = np.array(H, np.float64)
    mean = float(np.diag(result).mean())
    result[np.diag_indices_from(result)] += damp * mean if mean > 0 else 1.0
    return result


def inverse_factor(H: Matrix) -> NDArray[np.float64]:
    """Upper triangular U with U^T U = H^-1 (GPTQ, arXiv:2210.17323, section 3.3, step 3).

    H = R R^T with R upper triangular, read off the Cholesky factor of H with both axes reversed;
    then H^-1 = R^-T R^-1, so U = R^-1. No inverse of H is formed.

    Raises:
        LinAlgError: H is not positive definite (damp it).
    """
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dtrtri

    R = cholesky(H[::-1, ::-1], lower=True)[::-1, ::-1]
    U, failed = dtrtri(R, lower=0)
    if failed:
        raise np.linalg.LinAlgError("the Cholesky factor is singular")
    return np.asarray(U)
