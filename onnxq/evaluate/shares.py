"""Intervals of shares: of one, and of what two differ by on the same questions."""

from __future__ import annotations

import math

_Z = 1.959964  # two-sided 95 %


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): never outside [0, 1], good for few trials."""
    share, room = successes / trials, _Z * _Z / trials
    centre = (share + room / 2) / (1 + room)
    half = math.sqrt(share * (1 - share) * room + room * room / 4) / (1 + room)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(gained: int, lost: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares over the same trials (Agresti and Min
    2005): half a trial more in each of the four cells, so that few differences are no certainty.

    Args:
        gained, lost: trials in which only the first, only the second succeeded.
    """
    more, fewer, count = gained + 0.5, lost + 0.5, trials + 2
    difference = (more - fewer) / count
    half = _Z * math.sqrt(more + fewer - (more - fewer) ** 2 / count) / count
    return max(-1.0, difference - half), min(1.0, difference + half)
