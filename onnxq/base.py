"""The base precision step: decide whether a model is converted to 16 bits, and convert it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from onnxq.progress import Progress, silent
from onnxq.report import Edit

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import Device
    from onnxq.graph.model import Model

Precision = Literal["fp16", "bf16", "keep"]


def convert_base(
    model: Model,
    precision: Precision,
    *,
    convert_io: bool = False,
    samples: Samples | None = None,
    calibrated: Mapping[str, float] | None = None,
    beside: Path | None = None,
    memory: int | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> list[Edit]:
    """Convert an FP32 model in place; one whose layers are in 16 bits already is left alone.

    Args:
        convert_io: floating-point inputs and outputs change their type too.
        samples: all measure the inputs' ranges, the largest every other tensor's; None: patterns
            and weights alone decide what stays FP32.
        calibrated: max |x| of some tensors over all samples.
        beside: the file to be written; None: the model itself. In its folder waits what does not
            fit into `memory` bytes, or what the machine has.
    """
    from onnxq.calibrate.within import ranges_within
    from onnxq.graph.casting import apply_precision
    from onnxq.graph.precision import BASES, plan_precision

    if precision == "keep":
        return []
    if in_16_bits(model):
        return [Edit("precision", "keep", model.path.name, "its layers are in 16 bits already")]
    ranges = dict(calibrated or {})
    if samples is not None and precision == "fp16":
        measured = ranges_within(
            model,
            samples,
            beside=beside or model.path,
            memory=memory,
            device=device,
            progress=progress,
        )
        for peaks in (measured, samples.peaks):
            ranges |= {name: max(peak, ranges.get(name, 0.0)) for name, peak in peaks.items()}
    plan = plan_precision(model, BASES[precision], ranges)
    return apply_precision(model, plan, convert_io=convert_io)


def refuse_little_memory(
    model: Model, precision: Precision, samples: Samples, memory: int | None
) -> None:
    """Refuse, before anything is calibrated, memory that the conversion's ranges do not fit.

    Raises:
        OnnxqError: what would do.
    """
    from onnxq.calibrate.within import refuse_little

    if memory is not None and precision == "fp16" and not in_16_bits(model):
        refuse_little(model, samples, memory)


def in_16_bits(model: Model) -> bool:
    """Whether most of the layers compute in 16 bits as they are."""
    from onnxq.graph.precision import is_fp32
    from onnxq.placement import find_sites

    sites = [site for site in find_sites(model) if site.operand is not None]
    halves = [site for site in sites if not is_fp32(site.node.inputs[0])]
    return bool(sites) and 2 * len(halves) > len(sites)


def write_fp16(
    source: Path, folder: Path, *, samples: Samples | None = None, device: Device = "auto"
) -> Path | None:
    """Write the model in FP16 and nothing else; None where it is in 16 bits already."""
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.graph.save import save

    model, _ = prepare(Model.load(source), 0)
    if in_16_bits(model):
        return None
    path = folder / "fp16.onnx"
    convert_base(model, "fp16", samples=samples, beside=path, device=device)
    return save(model, path, external=True)[0]
