"""What a weight may become: rounded to nearest, then as each step of a recipe makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxq import numerics
from onnxq.algorithms.descent import descend
from onnxq.algorithms.hessian import damped, output_errors
from onnxq.algorithms.scales import fit_scales
from onnxq.algorithms.sparsegpt import sparsegpt_rounded
from onnxq.drafts import Drafts, by_part, rounding_damp
from onnxq.formats import QuantScheme
from onnxq.inputs import Moments, Parts
from onnxq.rounding import Array
from onnxq.scaling import scales_of, searched, spread
from onnxq.sites import Site
from onnxq.sparsity import Pattern


@dataclass(frozen=True)
class Candidate:
    """A weight in the format's values (units of a step) [K, N], the scales, and zero points."""

    name: str
    grid: Array
    scale: Array
    zero: Array | None


class Candidates:
    """Does the steps of a recipe on one weight after another.

    Args:
        pattern: of the zeros that a step puts in.
    """

    def __init__(self, steps: tuple[str, ...], pattern: Pattern | None) -> None:
        self._steps, self._pattern = steps, pattern
        self.drafts = Drafts(steps, pattern)

    def of(
        self, site: Site, W: Array, scheme: QuantScheme, parts: Parts, channels: int
    ) -> Iterator[Candidate]:
        """Rounding to nearest, then what each step makes with those before it."""
        fmt = scheme.format
        for draft in self.drafts.of(W, parts, channels):
            scale, zero = scales_of(site, draft.values, scheme)
            step, middle = spread(scale, zero, scheme, W.shape)
            grid = numerics.nearest(draft.values / step, fmt, middle)
            yield Candidate(draft.name or "nearest", grid, scale, zero)
        done, keep = [draft.name] if draft.name else [], draft.keep

        def joint(moments: Moments, W: Array, step: Array) -> tuple[Array, Array]:
            assert self._pattern is not None
            sweep = self.drafts.sweep_of(moments, channels)
            return sparsegpt_rounded(sweep, W, self._pattern, step, fmt)

        def swept(m: Moments, W: Array, step: Array, keep: Array, middle: Array) -> Array:
            return self.drafts.sweep_of(m, channels).round(W, step, fmt, keep, middle)

        def descended(
            m: Moments, grid: Array, W: Array, step: Array, keep: Array, middle: Array
        ) -> Array:
            H = damped(m.rounded, rounding_damp(m))
            return descend(grid, W, step, H, fmt, keep=keep, zero=middle)

        def fitted(m: Moments, grid: Array, W: Array, scale: Array) -> Array:
            return fit_scales(grid, W, scale, damped(m.rounded, rounding_damp(m)), scheme)

        for name in self._steps:
            wide = np.broadcast_to(step, W.shape)
            offset = None if middle is None else np.broadcast_to(middle, W.shape)
            if name == "search":
                scale, zero = searched(draft.values, _diagonals(parts, W), scheme)
                step, middle = spread(scale, zero, scheme, W.shape)
                grid = numerics.nearest(draft.values / step, fmt, middle)
            elif name == "gptq" and draft.joint and zero is None:
                grid, keep = by_part(joint, parts, draft.target, wide)
            elif name == "gptq":
                (grid,) = by_part(swept, parts, draft.values, wide, keep, offset)
            elif name == "descent":
                (grid,) = by_part(descended, parts, grid, draft.target, wide, keep, offset)
            elif name == "scales" and scale.ndim:
                (scale,) = by_part(fitted, parts, grid, draft.target, scale)
                step, middle = spread(scale, zero, scheme, W.shape)
                wide = np.broadcast_to(step, W.shape)
                (grid,) = by_part(descended, parts, grid, draft.target, wide, keep, offset)
            else:
                continue  # it has been done, before
            done.append(name)
            yield Candidate("+".join(done), grid, scale, zero)


def output_error(W: Array, values: Array, parts: Parts) -> float:
    """E||X W - Y V||^2 for the input X in full precision and Y behind rounded layers."""

    def error(moments: Moments, W: Array, V: Array) -> float:
        if moments.cross is moments.full:
            return float(output_errors(V - W, moments.full).sum())
        own = output_errors(W, moments.full).sum() + output_errors(V, moments.rounded).sum()
        return float(own - 2 * np.einsum("kn,kn->", moments.cross @ W, V, dtype=np.float64))

    return sum(map(error, parts, np.hsplit(W, len(parts)), np.hsplit(values, len(parts))))


def output_power(W: Array, parts: Parts) -> float:
    """E||X W||^2; 1 where it is nothing."""
    shares = zip(parts, np.hsplit(W, len(parts)), strict=True)
    return sum(float(output_errors(own, m.full).sum()) for m, own in shares) or 1.0


def _diagonals(parts: Parts, W: Array) -> Array:
    """diag(H) of the inputs [K]; where parts have inputs of their own, of each column's [K, N]."""
    own = [np.diag(moments.rounded) for moments in parts]
    if len(own) == 1:
        return own[0]
    return np.repeat(np.stack(own, axis=1), W.shape[1] // len(own), axis=1)
