"""Calibration within a memory budget: in one piece where the model fits, else in segments."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnxq.calibrate.data import Feed, Samples
from onnxq.calibrate.division import Division, Segment
from onnxq.calibrate.probe import measure_ranges
from onnxq.calibrate.run import calibrate
from onnxq.calibrate.segmented import calibrate_in_segments, measure_in_segments
from onnxq.calibrate.session import Device, open_session
from onnxq.calibrate.statistics import LARGE, PARKED, make
from onnxq.calibrate.table import CalibrationTable
from onnxq.errors import OnnxqError
from onnxq.files import scratch
from onnxq.graph.model import Model
from onnxq.graph.pieces import Pieces
from onnxq.graph.probe import GROUP, probed_tensors, range_probes
from onnxq.graph.sizes import tensor_sizes
from onnxq.graph.spool import Spool
from onnxq.memory import available_memory, peak_memory, resident_memory
from onnxq.progress import Progress, silent

_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "Loop"))
_RUNTIME = 100 << 20
"""Bytes that ONNX Runtime and the statistics take by themselves."""
_RESERVE = 0.05
"""Share of the rest that is left free: what is expected is not exact."""


@dataclass(frozen=True)
class Ran:
    """How calibration ran.

    Attributes:
        segments: 1: the whole model at once.
        cut_fusions: cuts where ONNX Runtime may have fused nodes: there the last bits may differ
            from those of the whole model.
        spooled_bytes: of activations, written to disk between segments.
        weight_bytes: of weights that are computed, written to disk for a session to load them.
        memory: bytes it was to keep within; None where nobody said.
        peak_rss: the most bytes the process took until the end of the calibration.
        seconds: that it took, all preparation included.
    """

    segments: int
    cut_fusions: int
    spooled_bytes: int
    weight_bytes: int
    memory: int | None
    peak_rss: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def calibrate_within(
    model: Model,
    watched: Mapping[str, str],
    samples: Samples,
    *,
    beside: Path,
    memory: int | None = None,
    fingerprint: str = "",
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[CalibrationTable, Ran]:
    """Statistics of the watched tensors; see `run.calibrate`.

    Args:
        beside: the file whose folder takes what waits between segments.
        memory: bytes the process may take; None: what it has and the machine has left.

    Raises:
        OnnxqError: as `run.calibrate`; or the memory is too small for any division.
    """
    started = time.monotonic()
    with scratch(beside) as folder:
        spool, divided = Spool(folder / "weights"), None
        if watched:
            divided = _divided(model, list(watched), watched, samples, memory, spool)
        if divided is None:
            # The memory is enough for all values at once, so that one pass does.
            count, cut, spooled = 1, 0, 0
            table = calibrate(
                partial(model.session_model, spool=spool),
                watched,
                samples,
                fingerprint=fingerprint,
                memory=memory,
                device=device,
                threads=threads,
                progress=progress,
            )
        else:
            pieces, segments, cut = divided
            count = len(segments)
            table, spooled = calibrate_in_segments(
                pieces,
                segments,
                watched,
                samples,
                folder,
                fingerprint=fingerprint,
                device=device,
                threads=threads,
                progress=progress,
            )
    took = round(time.monotonic() - started, 2)
    return table, Ran(count, cut, spooled, spool.written, memory, peak_memory(), took)


def ranges_within(
    model: Model,
    samples: Samples,
    *,
    beside: Path,
    only: Collection[str] | None = None,
    memory: int | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> dict[str, float]:
    """max |x| of every FP32 and FP16 tensor on the largest sample, or `only` of some of them.

    Other arguments, and errors, as before.
    """
    tensors = [name for name in probed_tensors(model) if only is None or name in only]
    feed = samples.largest()
    with scratch(beside) as folder:
        spool = Spool(folder / "weights")
        divided = _divided(model, tensors, {}, samples, memory, spool)
        if divided is None:
            probes = range_probes(model, only, spool)
            count = math.ceil(len(tensors) / GROUP)
            return measure_ranges(probes, feed, total=count, device=device, progress=progress)
        pieces, segments, _ = divided
        return measure_in_segments(
            pieces, segments, tensors, feed, folder, device=device, progress=progress
        )


def refuse_little(model: Model, samples: Samples, memory: int) -> None:
    """Raise what `ranges_within` would raise for too little memory, before anything has run."""
    _divided(model, probed_tensors(model), {}, samples, memory)


def divide(
    model: Model,
    tensors: Sequence[str],
    watched: Mapping[str, str],
    samples: Samples,
    spool: Spool | None = None,
) -> tuple[Pieces, Division]:
    """The model as far as the tensors need it, in steps, and what cutting it costs.

    Args:
        watched: {tensor to fetch: statistics}; the other tensors are probed.
        samples: the largest says how large everything is.
        spool: as `Pieces` takes it.
    """
    feed = samples.largest()
    shapes = {name: array.shape for name, array in feed.items()}
    sizes = tensor_sizes(model, shapes, lambda names: _measured(model, names, feed))
    pieces = Pieces(model, tensors, spool)
    channels = {n: (1, *sizes[n][0])[-1] if n in sizes else 1 for n in watched}
    held, throughout = dict.fromkeys(watched, 0), 0
    for name, kinds in watched.items():
        for statistic in make(kinds).values():
            if isinstance(statistic, PARKED):
                held[name] += statistic.bytes_for(channels[name])
            elif isinstance(statistic, LARGE):
                throughout += statistic.bytes_for(channels[name])
    probed = frozenset(tensors) - watched.keys()
    return pieces, Division(pieces, sizes, held, len(samples), throughout, probed)


def _measured(model: Model, names: Sequence[str], feed: Feed) -> dict[str, tuple[int, ...]]:
    """Shapes of those tensors that no product of matrices leads to."""
    dear: set[str] = set()
    for step in Pieces(model, names).steps:
        if step.op in _PRODUCTS or dear & {*step.reads}:
            dear.update(step.makes)
    cheap = [name for name in names if name not in dear]
    if not cheap:
        return {}
    proto, folder = model.session_model(cheap)
    values = open_session(proto, folder=folder, device="cpu").run(cheap, feed)
    return {name: value.shape for name, value in zip(cheap, values, strict=True)}


def _divided(
    model: Model,
    tensors: Sequence[str],
    watched: Mapping[str, str],
    samples: Samples,
    memory: int | None,
    spool: Spool | None = None,
) -> tuple[Pieces, list[Segment], int] | None:
    """The segments, and how many cuts may break a fusion; None where the whole model fits."""
    base, free = resident_memory() + _RUNTIME, available_memory()
    if memory is None and free is None:
        return None
    try:
        pieces, division = divide(model, tensors, watched, samples, spool)
    except OnnxqError:
        if memory is None:
            return None  # ONNX Runtime may run what onnx's inference does not understand
        raise
    room = int((memory - base if memory is not None else free or 0) * (1 - _RESERVE))
    if division.whole().memory <= room:
        return None
    segments = division.within(room)
    if segments is None:
        if memory is None:
            return None  # what is expected is not certain
        least = base + int(division.least() / (1 - _RESERVE))
        enough = math.ceil(least * 1.02 / 1e8) / 10
        raise OnnxqError(
            f"calibration does not fit into {memory / 1e9:.2f} GB: the widest part of the "
            f"model needs {least / 1e9:.2f} GB on the largest sample",
            f"give --memory {enough:.1f}GB, or smaller samples (--batch)",
        )
    return pieces, segments, division.cuts_fusions(segments)
