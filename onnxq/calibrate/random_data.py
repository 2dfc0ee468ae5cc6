"""Seeded random feeds, for trying a static recipe without data. Ranges from them are guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Samples
from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.sources import Feeds
from onnxq.progress import Progress, silent

Array = NDArray[Any]

_SEQUENCE, _PIXELS, _OTHER = 32, 64, 8  # sizes of open dimensions
_IDS = 100  # token ids and other whole numbers stay below: any vocabulary has that many


def random_samples(
    inputs: Sequence[InputSpec],
    *,
    seed: int = 0,
    samples: int = 8,
    progress: Progress = silent,
) -> Samples:
    """`samples` random feeds: floats from a standard normal, ids below 100, masks of ones.

    Open dimensions: the batch 1, sequences 32, heights and widths 64, a past 0. The same seed
    gives the same feeds.
    """
    generator = np.random.default_rng(seed)
    feeds = [{spec.name: _random(spec, generator) for spec in inputs} for _ in range(samples)]
    return Samples(
        Feeds(list(feeds), f"{samples} random samples (seed {seed}), not real data"),
        inputs,
        progress,
    )


def _random(spec: InputSpec, generator: np.random.Generator) -> Array:
    shape = tuple(_size(spec, axis) for axis in range(len(spec.shape)))
    name = spec.name.lower()
    if spec.dtype.kind == "b" or "mask" in name:
        return np.ones(shape).astype(spec.dtype)
    if spec.dtype.kind not in "iu":
        return generator.standard_normal(shape).astype(np.float32).astype(spec.dtype)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(spec.dtype)
    if "type" in name:
        return np.zeros(shape, spec.dtype)
    return generator.integers(0, _IDS, shape).astype(spec.dtype)


def _size(spec: InputSpec, axis: int) -> int:
    """The size of one dimension: fixed, or guessed by what it is called and where it stands."""
    dim, rank = spec.shape[axis], len(spec.shape)
    if isinstance(dim, int):
        return dim
    name = (dim or "").lower()
    if "past" in name or ("past" in spec.name.lower() and axis == rank - 2):
        return 0
    if axis == 0 or "batch" in name:
        return 1
    if "seq" in name or "len" in name or (rank == 2 and spec.dtype.kind in "iu"):
        return _SEQUENCE
    if name in ("h", "w", "height", "width") or (rank == 4 and axis >= 2):
        return _PIXELS
    return _SEQUENCE if rank == 3 and axis == 1 else _OTHER
