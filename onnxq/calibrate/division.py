"""Where a model is cut into segments that fit a memory budget: at narrow places.

A cut lies between two nodes of the graph's order; what crosses it waits on disk. Of all ways to cut
that fit, the one is taken that moves the fewest bytes through the disk, a session's start counting
as some. ONNX Runtime fuses nodes, and a fused pair computes with other roundings than its halves:
cuts lie where it fuses nothing, as far as the budget lets them. What it fuses away is a tensor that
has one reader and that nobody asks for, or lies within a pattern of arithmetic that it knows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from onnxq.graph.pieces import Pieces, Step
from onnxq.graph.sizes import Sized, weight

# Operators whose results lie within what ONNX Runtime knows as one: norms, GELU, SiLU, softmax,
# scaled and transposed operands of products.
_INNER = frozenset(
    (
        *("Sub", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Div", "Erf", "Tanh", "Exp", "Neg"),
        *("Sigmoid", "Transpose", "Cast", "QuantizeLinear", "DequantizeLinear", "ReduceSum"),
        *("Identity", "Dropout"),
    )
)
# Measured on SDXL's UNet (ONNX Runtime 1.31, CPU), bytes in memory a byte of weights: FP16 ones are
# read, widened to FP32 and packed, and let go only when all are.
_LOADING = {True: 2.75, False: 1.15}
_LOADED = {True: 2.1, False: 1.1}
# Kernels that give FP16 themselves, or hand on what they got. What others give is FP32 and cast for
# whoever asks for it, near the end of the run: until then both wait, of SDXL's GEGLU 63 MB a block.
_OWN_HALF = frozenset(
    (
        *("LayerNormalization", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"),
        *("Split", "Slice", "Identity", "Cast"),
    )
)
_SESSION = 40 << 20
"""Bytes a session takes without weights; the first one brings ONNX Runtime itself."""
_START = 96 << 20
"""Bytes moved through the disk that take as long as starting one more session."""


@dataclass(frozen=True)
class Segment:
    """Nodes that run together.

    Attributes:
        steps: of the pieces, from and up to.
        reads: tensors of earlier segments; inputs of the graph are not among them.
        gives: tensors that later segments read, and their bytes on disk for one sample.
        watched: those of its own that are asked for.
        memory: bytes it is expected to take at its peak, beside what the process has.
        parked: bytes of the statistics that wait on disk behind it.
    """

    steps: range
    reads: tuple[str, ...]
    gives: dict[str, int]
    watched: tuple[str, ...]
    memory: int
    parked: int


class Division:
    """The costs of cutting a model, for one sample's sizes.

    Args:
        sizes: of every tensor that the steps move.
        watched: {tensor asked for: bytes its statistics keep meanwhile}.
        samples: how many will run; the more, the dearer is what crosses a cut.
        throughout: bytes of statistics that stay in memory all the time.
        probed: tensors of which a largest value is taken in the graph.
    """

    def __init__(
        self,
        pieces: Pieces,
        sizes: Mapping[str, Sized],
        watched: Mapping[str, int],
        samples: int = 1,
        throughout: int = 0,
        probed: Collection[str] = (),
    ) -> None:
        self._always = _SESSION + throughout
        self._steps, self._watched, self._samples = pieces.steps, watched, max(samples, 1)
        self._inputs = frozenset(pieces.inputs)
        self._fetched = {name: weight(sized) for name, sized in sizes.items()}
        # FP16 is computed in FP32, and spooled so.
        self._run = {n: math.prod(s[0]) * max(s[1].itemsize, _wide(s)) for n, s in sizes.items()}
        self._kept = {
            name: self._fetched.get(name, 0) + held + self._copy(name, step.op, sizes)
            for step in self._steps
            for name in step.makes
            if (held := watched.get(name)) is not None
        }
        for step in self._steps:
            # A probe frees what it reads at once; what was cast waits, and is cast back for it.
            for name in step.makes:
                if name in probed and (copy := self._copy(name, step.op, sizes)):
                    self._kept[name] = self._fetched[name] + 2 * copy
        self._weights = {
            name: (pieces.weight_bytes(name), pieces.is_half(name))
            for step in self._steps
            for name in step.weights
        }
        self._last: dict[str, int] = {}
        readers: dict[str, int] = {}
        for index, step in enumerate(self._steps):
            for name in step.reads:
                self._last[name] = index
                readers[name] = readers.get(name, 0) + 1
        self._bound = {
            name
            for step in self._steps
            for name in step.makes
            if name not in sizes or self._is_bound(step, name, sizes[name], readers)
        }
        self._sized = sizes.keys()

    def _copy(self, name: str, op: str, sizes: Mapping[str, Sized]) -> int:
        """Bytes of what a tensor that is asked for was cast from, where that waits with it."""
        if name not in sizes or not _wide(sizes[name]) or op in _OWN_HALF:
            return 0
        return self._run[name]

    def _is_bound(self, step: Step, name: str, sized: Sized, readers: Mapping[str, int]) -> bool:
        """Whether ONNX Runtime may fuse the tensor away."""
        if name in self._watched or sized[1].kind in "iub":
            return False
        return readers.get(name, 0) < 2 or step.op in _INNER

    def whole(self) -> Segment:
        """All of it in one piece."""
        return self.segment(0, len(self._steps))

    def segment(self, start: int, stop: int) -> Segment:
        """The steps from `start` up to `stop`."""
        memory = next((size for end, size, _ in self._growing(start) if end == stop), 0)
        steps = self._steps[start:stop]
        made = {name for step in steps for name in step.makes}
        read = dict.fromkeys(name for step in steps for name in step.reads if name not in made)
        gives = {
            name: self._run.get(name, 0)
            for step in steps
            for name in step.makes
            if self._last.get(name, -1) >= stop
        }
        watched = tuple(name for step in steps for name in step.makes if name in self._watched)
        return Segment(
            range(start, stop),
            tuple(name for name in read if name not in self._inputs),
            gives,
            watched,
            memory,
            sum(self._watched[name] for name in watched),
        )

    def within(self, memory: int) -> list[Segment] | None:
        """The cheapest segments of at most `memory` bytes each; None where there are none."""
        for places in (self._places(loose=True), self._places(loose=False)):
            cuts = self._cheapest(places, memory)
            if cuts is not None:
                return [self.segment(*ends) for ends in pairwise(cuts)]
        return None

    def least(self) -> int:
        """The smallest memory that `within` finds segments for."""
        places = self._places(loose=False)
        return max(self.segment(*e).memory for e in pairwise(places))

    def cuts_fusions(self, segments: Sequence[Segment]) -> int:
        """At how many of the cuts something crosses that ONNX Runtime may fuse away."""
        crossed = [{*s.gives} & self._bound for s in segments[:-1]]
        return sum(bool(names) for names in crossed)

    def _places(self, *, loose: bool) -> list[int]:
        """Places to cut at, both ends included.

        Args:
            loose: only where ONNX Runtime fuses nothing, and only the narrowest of some neighbours.
        """
        count, width = len(self._steps), 0
        widths, bound = [0] * (count + 1), set[str]()
        places = []
        for index, step in enumerate(self._steps):
            for name in (*step.makes, *step.reads):
                end = self._last.get(name, -1)
                if name in step.makes and end > index:
                    width += self._run.get(name, 0)
                    if name not in self._sized or (loose and name in self._bound):
                        bound.add(name)
                elif name not in step.makes and end == index and name not in self._inputs:
                    width -= self._run.get(name, 0)
                    bound.discard(name)
            widths[index + 1] = width
            if not bound:
                places.append(index + 1)
        if loose:
            places = [p for p in places if widths[p] <= min(widths[q] for q in _near(places, p))]
        return sorted({0, count, *places})

    def _cheapest(self, places: Sequence[int], memory: int) -> list[int] | None:
        """Ends of segments, by dynamic programming over the places."""
        best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
        among = set(places)
        for start in places:
            if start not in best:
                continue
            for stop, needed, moved in self._growing(start):
                if needed > memory:
                    break
                cost = best[start][0] + moved * self._samples + _START
                if stop in among and (stop not in best or cost < best[stop][0]):
                    best[stop] = cost, start
        if len(self._steps) not in best:
            return None
        cuts = [len(self._steps)]
        while cuts[-1]:
            cuts.append(best[cuts[-1]][1])
        return cuts[::-1]

    def _growing(self, start: int) -> Iterator[tuple[int, int, int]]:
        """(stop, memory, bytes moved through the disk) of ever longer segments."""
        seen: set[str] = set()
        made: set[str] = set()
        loading = loaded = 0.0
        kept = entering = alive = peak = 0
        for index in range(start, len(self._steps)):
            step = self._steps[index]
            for name in set(step.weights) - seen:
                size, half = self._weights[name]
                copies = 2 * half + 1 if name in step.folded else 0
                loading += (_LOADING[half] + copies) * size
                loaded += (_LOADED[half] + copies) * size
            for name in step.reads:
                if name not in seen and name not in made:
                    entering += self._run.get(name, 0)
            seen.update(step.weights, step.reads)
            made.update(step.makes)
            size = sum(self._run.get(name, 0) for name in step.makes)
            kept += sum(self._kept.get(name, 0) for name in step.makes)
            alive += size
            peak = max(peak, alive + size * _BESIDE.get(step.op, 0) + kept)
            memory = int(max(loading, loaded + entering + peak)) + self._always
            ending = {n for n in (*step.makes, *step.reads) if self._last.get(n, index) <= index}
            alive -= sum(self._run.get(name, 0) for name in ending & made)
            yield index + 1, memory, alive + entering


_BESIDE = {"Softmax": 1, "Gelu": 2, "GroupNormalization": 3, "LayerNormalization": 1, "Gemm": 1}


def _wide(sized: Sized) -> int:
    return 4 if sized[1] == np.float16 else 0


def _near(places: Sequence[int], place: int, reach: int = 12) -> list[int]:
    """Those of sorted places within some nodes."""
    return list(places[bisect_left(places, place - reach) : bisect_right(places, place + reach)])
