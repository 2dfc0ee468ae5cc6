"""ALPS: zeros by alternating directions, all weights of the layer at once.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", arXiv:2406.07831, section 3: minimise tr((V - W)^T H (V - W)) over V = D, where D has the
pattern. In turn V gives way towards D, D takes the pattern's nearest to V and to what they have
disagreed by so far, and the price rho of disagreeing grows, until the zeros settle. A sweep such as
SparseGPT's decides on the zeros of an input once; here they change sides while that helps.

With the inputs scaled so that H has ones on its diagonal. The schedule of rho is our own. Its zeros
are meant to be followed by least squares (`refit`), the paper's section 3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.sparsity import Mask, Pattern

Matrix = NDArray[Any]

_FIRST, _GROWS, _PASSES = 0.05, 1.15, 30
_SETTLED = 2e-4
"""Share of the weights that may still change sides at the end."""


def alps(W: Matrix, H: Matrix, pattern: Pattern) -> tuple[NDArray[np.float32], Mask]:
    """The weight [K, N] with zeros, the others moved; and which may be other than zero.

    Args:
        W: [K, N].
        H: [K, K], positive definite (see `hessian.damped`).
    """
    from scipy.linalg import eigh

    sizes = np.sqrt(np.diag(H))
    values, Q = eigh(H / sizes[:, None] / sizes, overwrite_a=True)
    values, Q = values.astype(np.float32)[:, None], Q.astype(np.float32)
    scaled = (W * sizes[:, None]).astype(np.float32)
    wanted = values * (Q.T @ scaled)
    keep = pattern.mask(np.abs(scaled))
    D, owed = np.where(keep, scaled, 0), np.zeros_like(scaled)
    rho = np.float32(_FIRST)
    for _ in range(_PASSES):
        V = Q @ ((wanted + Q.T @ (rho * D - owed)) / (values + rho))
        V += owed / rho
        before, keep = keep, pattern.mask(np.abs(V))
        D = np.where(keep, V, 0)
        owed = rho * (V - D)
        rho *= np.float32(_GROWS)
        if np.mean(before != keep) < _SETTLED:
            break
    return (D / sizes[:, None]).astype(np.float32), keep
