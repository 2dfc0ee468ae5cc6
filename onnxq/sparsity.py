"""Patterns of zeros: which weights of a layer may be other than zero. Pure.

N:M keeps N of each M neighbours along the axis the product sums over (input channels of a
convolution): 2:4 is what tensor cores from Ampere on skip (Mishra et al., "Accelerating Sparse Deep
Neural Networks", arXiv:2104.08378). A share, such as 0.5, makes that share of each output's weights
zero wherever they are; no kernel of TensorRT gains from that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError

Mask = NDArray[np.bool_]

_LARGEST_GROUP = 64


@dataclass(frozen=True)
class Pattern:
    """Either `keep` of each `group` neighbours stay, or all but a `share` of each output.

    Attributes:
        group: neighbours along the summed axis; 0: a share.
    """

    keep: int = 0
    group: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `2:4` or `0.5`.

        Raises:
            OnnxqError: it is neither.
        """
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if match is not None:
            keep, group = int(match[1]), int(match[2])
            if 0 < keep < group <= _LARGEST_GROUP:
                return cls(keep, group)
        elif re.fullmatch(r"0?\.\d+", text) and 0 < float(text) < 1:
            return cls(share=float(text))
        raise OnnxqError(
            f"no pattern of zeros: {text!r}",
            f"write N:M, N weights kept of each M up to {_LARGEST_GROUP}, such as 2:4; or the "
            "share that becomes zero, such as 0.5",
        )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.group else f"{self.share:g}"

    def obstacle(self, length: int) -> str:
        """Why a summed axis of `length` cannot have it, or ''."""
        if self.group and length % self.group:
            return f"its {length} inputs are no multiple of {self.group}"
        return ""

    def mask(self, scores: NDArray[Any]) -> Mask:
        """The weights that stay: those of the largest scores, of equal ones the first.

        Args:
            scores: [K, ...]: the summed axis first.
        """
        if not self.group:
            order = np.argsort(scores, axis=0, kind="stable")[::-1]
            result = np.zeros(scores.shape, bool)
            kept = len(scores) - round(self.share * len(scores))
            np.put_along_axis(result, order[:kept], True, 0)
            return result
        groups = scores.reshape(-1, self.group, *scores.shape[1:])
        better = np.zeros(groups.shape, np.uint8)  # how many of its group are ahead of each
        for i in range(self.group):
            for j in range(i + 1, self.group):
                first = groups[:, i] >= groups[:, j]
                better[:, j] += first
                better[:, i] += ~first
        return np.asarray((better < self.keep).reshape(scores.shape))

    def holds(self, zero: Mask, axis: int) -> bool:
        """Whether weights that are zero where `zero` says have the pattern along `axis`."""
        along = np.moveaxis(zero, axis, 0)
        if not self.group:
            return bool((along.sum(axis=0) >= round(self.share * len(along))).all())
        if len(along) % self.group:
            return False
        groups = along.reshape(-1, self.group, *along.shape[1:])
        return bool((groups.sum(axis=1) >= self.group - self.keep).all())
