"""A graph run piece by piece: what lies between some of its tensors, and what must be kept.

Tensors at which to stop come in graph order. The piece that leads to one holds the nodes it needs
that no earlier piece held; what later pieces read of it, or of the pieces before, is the frontier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxq.graph.model import Model
from onnxq.graph.pieces import Pieces


class Segments:
    """A model's pieces, each runnable by itself.

    Attributes:
        folder: where the external weights of the pieces lie.
    """

    def __init__(self, model: Model, stops: Sequence[str]) -> None:
        self._pieces, self.stops = Pieces(model, stops), list(stops)
        self.folder = self._pieces.folder
        self._steps = self._divided()

    def _divided(self) -> list[tuple[list[int], list[str]]]:
        """For each stop the steps that lead to it from the stop before, and the frontier then."""
        steps = self._pieces.steps
        maker = {name: i for i, step in enumerate(steps) for name in step.makes}
        held: set[int] = set()
        pieces = []
        for stop in self.stops:
            new: set[int] = set()
            waiting = [stop]
            while waiting:
                index = maker.get(waiting.pop(), -1)
                if index >= 0 and index not in held and index not in new:
                    new.add(index)
                    waiting += steps[index].reads
            held |= new
            pieces.append(sorted(new))
        divided: list[tuple[list[int], list[str]]] = []
        made: set[str] = set()
        for piece in pieces:
            made |= {name for i in piece for name in steps[i].makes}
            divided.append((piece, sorted(made)))
        wanted: set[str] = set()
        for index in reversed(range(len(divided))):
            piece, names = divided[index]
            divided[index] = piece, [name for name in names if name in wanted]
            wanted |= {name for i in piece for name in steps[i].reads} | {self.stops[index]}
        return divided

    def frontier(self, index: int) -> list[str]:
        """What the pieces behind stop `index` read of those up to it, without the graph's inputs.

        A stop that was made before its turn is in the frontiers until then.
        """
        return self._steps[index][1]

    def piece(
        self,
        index: int,
        held: Mapping[str, Any],
        weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> bytes | None:
        """The model from the frontier before stop `index` to the stop and the frontier behind it.

        Args:
            held: dtypes of the tensors of the frontier before it.
            weights: initializers to have other values than the model's, of the same type.

        Returns:
            None where nothing is to be computed: all of it is held already.
        """
        steps, frontier = self._steps[index]
        if not steps:
            return None
        made = {name for i in steps for name in self._pieces.steps[i].makes}
        outputs = [name for name in dict.fromkeys((self.stops[index], *frontier)) if name in made]
        return self._pieces.model(steps, outputs, held, weights=weights)
