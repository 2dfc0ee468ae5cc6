"""Ranges of all tensors on one sample, from models that measure themselves (`graph.probe`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from onnxq.calibrate.data import Feed
from onnxq.calibrate.session import Device, open_session
from onnxq.progress import Progress, silent


def measure_ranges(
    probes: Iterable[tuple[bytes, Path, dict[str, str]]],
    feed: Feed,
    *,
    total: int = 0,
    device: Device = "auto",
    progress: Progress = silent,
) -> dict[str, float]:
    """max |x| by tensor name; infinity as it is found.

    Args:
        probes: serialized model, folder of its weights, {output: tensor whose max |x| it is}.
        feed: one sample's inputs; a probe may have lost those that it does not need.
        total: how many probes there are, for the progress.

    Raises:
        OnnxqError: a probe does not load or run.
    """
    ranges: dict[str, float] = {}
    for done, (model, folder, names) in enumerate(probes, 1):
        session = open_session(model, folder=folder, device=device)
        wanted = {spec.name for spec in session.inputs}
        values = session.run(list(names), {k: v for k, v in feed.items() if k in wanted})
        ranges |= {name: float(v) for name, v in zip(names.values(), values, strict=True)}
        del session  # its memory goes before the next one's comes
        progress("measuring ranges", done, total)
    return ranges
