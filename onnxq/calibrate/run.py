"""Runs the model over the data and keeps statistics of the watched tensors, in bounded memory.

Watched tensors are fetched as outputs, and their statistics are updated before the next run, so
that at most one step's values are held. When one step's values are more than `memory`, the tensors
are divided into groups, in the order given, and the data is run over once for each group; a model
that is cut after its last watched tensor makes the early passes shorter.

The statistics do not depend on groups, batches or order. ONNX Runtime's own sums can: a matrix
product over another number of rows or threads may add in another order and differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxq.calibrate.data import Feed, Samples
from onnxq.calibrate.passes import MakeModel, Opener, fetch, plan
from onnxq.calibrate.session import Device, Session
from onnxq.calibrate.statistics import NotFiniteError, Statistic, make
from onnxq.calibrate.table import CalibrationTable, DataOrigin
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent


def calibrate(
    make_model: MakeModel,
    watched: Mapping[str, str],
    samples: Samples,
    *,
    fingerprint: str = "",
    memory: int | None = None,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> CalibrationTable:
    """Statistics of the watched tensors over all samples.

    Args:
        make_model: gives the model with the tensors asked for as its outputs.
        watched: {tensor: statistics}, as `statistics.make` reads them: "amax", "histogram", ...
            In the model's own order, so that a pass over the first ones can stop early.
        samples: the data.
        fingerprint: the model's, kept in the table.
        memory: bytes of watched values held at a time; None: about what the loaded model takes.
        threads: ONNX Runtime's; None: one per core.

    Raises:
        OnnxqError: a tensor becomes NaN or infinite (which one, in which sample), the model does
            not load or run.
    """
    collected = {tensor: make(names) for tensor, names in watched.items()}
    notes = list(samples.notes)
    opener = Opener(make_model, device, threads)
    groups = plan(opener, list(watched), samples.largest(), memory) if watched else []
    done, total = 0, len(groups) * len(samples)
    for group in groups:
        session = opener(group)
        notes += [note for note in session.notes if note not in notes]
        for step, feed in enumerate(samples):
            _update(session, group, feed, collected, samples.label(step))
            done += 1
            progress("calibrate", done, total)
        del session  # its memory goes before the next pass's comes
    return CalibrationTable(
        fingerprint=fingerprint,
        statistics=collected,
        data=(DataOrigin(samples.description, samples.digest, samples.count),),
        notes=tuple(notes),
    )


def _update(
    session: Session,
    group: list[str],
    feed: Feed,
    collected: Mapping[str, Mapping[str, Statistic]],
    label: str,
) -> None:
    """Run one step and add its values to the statistics."""
    for name, values in fetch(session, group, feed, label):
        try:
            for statistic in collected[name].values():
                statistic.update(values)
        except NotFiniteError as error:
            raise OnnxqError(
                f"the tensor {name!r} is not finite in {label}: {error}",
                "repair or leave out that sample; if every sample does it, the model overflows "
                "by itself: give its FP32 original",
            ) from error
        except OnnxqError as error:
            raise OnnxqError(
                f"the tensor {name!r} in {label}: {error.message}", error.hint
            ) from error
