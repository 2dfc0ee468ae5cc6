"""How loud the inputs of a diffusion model's layers are at each denoising step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxq.calibrate.ranges import Ranges
from onnxq.calibrate.steps import NO_STEP, StepAmax
from onnxq.calibrate.table import CalibrationTable
from onnxq.page import change
from onnxq.placement import Placement

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 3
_COLUMNS = 50


def loudness(
    placement: Placement, table: CalibrationTable, ranges: Ranges
) -> dict[str, Any] | None:
    """The largest magnitude of each quantized layer's input by step, and the mean over its samples.

    Returns:
        `steps`, from the noisiest on, and by layer its `module`, `peaks`, `means`, and the
        magnitude `covered` by its codes; None where the calibration was not kept by step, or knows
        of one alone.
    """
    layers: dict[str, Any] = {}
    steps: tuple[float, ...] = ()
    for site in (decision.site for decision in placement.quantized):
        found = table.statistics.get(site.node.inputs[0].name, {}).get(StepAmax.name)
        if isinstance(found, StepAmax) and len(found.steps) > 1:
            steps = found.steps
            covered = ranges.get((id(site.node), 0))
            layers[site.name] = {
                "module": site.module,
                "peaks": found.peaks(),
                "means": found.means(),
                "covered": None if covered is None else covered.peak,
            }
    return {"steps": list(steps), "layers": layers} if layers else None


def lines(found: Mapping[str, Any]) -> list[str]:
    """The layers that change most over the steps, drawn."""
    layers = {entry["module"] or name: entry["peaks"] for name, entry in found["layers"].items()}
    loudest = sorted(layers, key=lambda name: -change(layers[name]))[:_SHOWN]
    said = [
        f"{name} {_bars(layers[name])} {min(layers[name]):.3g} to {max(layers[name]):.3g}"
        for name in loudest
    ]
    return [f"amax over {len(found['steps'])} steps, noisiest first: {text}" for text in said]


def missing(table: CalibrationTable) -> bool:
    """Whether ranges were to be kept by step, and the data did not say which."""
    by_step = [
        s for found in table.statistics.values() for s in found.values() if isinstance(s, StepAmax)
    ]
    return bool(by_step) and all(s.steps == (NO_STEP,) for s in by_step)


def _bars(values: Sequence[float]) -> str:
    every = -(-len(values) // _COLUMNS)
    shown = [max(values[i : i + every]) for i in range(0, len(values), every)]
    return "".join(_BARS[min(7, int(8 * value / max(values)))] for value in shown)
