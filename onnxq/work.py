"""What the phases of `quantize` hand on to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.progress import Progress
from onnxq.report import Report
from onnxq.unfinished import Unfinished

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.ranges import Ranges
    from onnxq.calibrate.session import Device
    from onnxq.calibrate.table import CalibrationTable
    from onnxq.graph.model import Model
    from onnxq.placement import Placement


@dataclass
class Work:
    """A model on its way from as it was given to as it is written.

    Attributes:
        graph: the model; phases edit it in place.
        placement: what is quantized, with what; phases leave sites out of it.
        unsolved: layers that no second-order method works on, by id of the node, and why.
        report: phases add what they did and found.
        destination, memory, device, progress: as `quantize` has them; beside the destination waits
            what does not fit the memory.
        samples: the data; None where there is none.
        unfinished: what an earlier run has finished; empty but for a resumed run.
        table: what was measured, behind the rescale steps once they are done; None for recipes that
            need nothing.
        ranges: of the inputs that get static scales; None where there are no such.
    """

    graph: Model
    placement: Placement
    unsolved: Mapping[int, str]
    report: Report
    destination: Path
    memory: int | None
    device: Device
    progress: Progress
    samples: Samples | None = None
    unfinished: Unfinished = field(default_factory=Unfinished)
    table: CalibrationTable | None = None
    ranges: Ranges | None = None
