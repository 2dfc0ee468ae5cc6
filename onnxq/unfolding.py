"""A convolution as a product of matrices: each position of its output reads one row. Pure.

The row is the patch of the input under the kernel, tap after tap, of each tap all channels; so the
channels of a tap are neighbours, as a pattern of zeros along them wants. A convolution in groups is
as many products, each of its own channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CHUNK = 32 << 20
"""Bytes of rows that are made at a time."""

_TEXT = re.compile(r"(\d+)x([\d,]+);g(\d+);s([\d,]+);d([\d,]+);p([\d,]*|[A-Z_]+)")


@dataclass(frozen=True)
class Unfolding:
    """How the input of a convolution becomes rows.

    Attributes:
        channels: that one group reads.
        kernel: its taps along each spatial axis.
        pads: zeros before each spatial axis, then behind each; or `SAME_UPPER`, `SAME_LOWER`: as
            many as make the output as long as the input over the stride (ONNX's auto_pad).
    """

    channels: int
    kernel: tuple[int, ...]
    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str

    @property
    def length(self) -> int:
        """Of a row."""
        return self.channels * math.prod(self.kernel)

    def __str__(self) -> str:
        """In one word; `parse` reads it."""
        kernel, strides, dilations = map(_joined, (self.kernel, self.strides, self.dilations))
        pads = self.pads if isinstance(self.pads, str) else _joined(self.pads)
        return f"{self.channels}x{kernel};g{self.groups};s{strides};d{dilations};p{pads}"

    @classmethod
    def parse(cls, text: str) -> Unfolding:
        """Read what `str` writes.

        Raises:
            ValueError: it is not such a text.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"no convolution: {text!r}")
        channels, kernel, groups, strides, dilations, pads = found.groups()
        read = pads if pads.isupper() else _numbers(pads)
        steps = _numbers(strides), _numbers(dilations)
        return cls(int(channels), _numbers(kernel), int(groups), *steps, read)

    def rows(self, values: Array) -> Iterator[tuple[int, Array]]:
        """(group, rows [n, length]) of an input [samples, channels, spatial...], piece by piece.

        Raises:
            ValueError: it is no input of this convolution.
        """
        rank = len(self.kernel)
        if values.ndim != rank + 2 or values.shape[1] != self.channels * self.groups:
            raise ValueError(
                f"an input of shape {list(values.shape)} where {self.channels * self.groups} "
                f"channels and {rank} spatial axes are convolved"
            )
        pads = self._pads(values.shape[2:])
        for sample in values:
            for group in range(self.groups):
                own = sample[group * self.channels : (group + 1) * self.channels]
                last = np.ascontiguousarray(np.moveaxis(own, 0, -1))
                for rows in self._windows(np.pad(last, (*pads, (0, 0)))):
                    yield group, rows

    def _windows(self, padded: Array) -> Iterator[Array]:
        """Rows of a padded sample [spatial..., channels]."""
        axes = tuple(range(len(self.kernel)))
        extent = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        if any(size < least for size, least in zip(padded.shape, extent, strict=False)):
            return  # no position
        seen = np.lib.stride_tricks.sliding_window_view(padded, extent, axes)
        every = [slice(None, None, s) for s in self.strides]
        taps = [slice(None, None, d) for d in self.dilations]
        seen = np.moveaxis(seen[(*every, slice(None), *taps)], len(axes), -1)
        each = math.prod(seen.shape[1:]) * seen.dtype.itemsize
        count = max(1, _CHUNK // max(1, each))
        for start in range(0, len(seen), count):
            yield seen[start : start + count].reshape(-1, self.length)

    def _pads(self, spatial: tuple[int, ...]) -> list[tuple[int, int]]:
        """Zeros before and behind each spatial axis."""
        if not isinstance(self.pads, str):
            return list(zip(self.pads[: len(spatial)], self.pads[len(spatial) :], strict=True))
        found = []
        for size, k, s, d in zip(spatial, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.pads == "SAME_UPPER" else (more, less))
        return found


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
