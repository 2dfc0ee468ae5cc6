"""Pruning as a verb, and the proof of a file's zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxq import record
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.results import Checked, Quantized
from onnxq.samples import Data
from onnxq.sparsity import Pattern

if TYPE_CHECKING:
    pass

PathLike = str | Path
METHODS = ("magnitude", "wanda", "sparsegpt", "alps")
DEFAULT_PATTERN = "2:4"


def prune(
    model: PathLike,
    output: PathLike | None = None,
    *,
    pattern: str = DEFAULT_PATTERN,
    method: str | None = None,
    least_squares: bool = False,
    sequential: bool = False,
    calib: PathLike | Data | None = None,
    load_calib: Sequence[PathLike] = (),
    **options: Any,
) -> Quantized:
    """Write a copy of a model with zeros in its weights, which keep their type.

    Args:
        output: default: beside the model, `<name>.sparse24.onnx`.
        pattern: `N:M`, or the share that becomes zero (see `sparsity`).
        method: `magnitude`, which needs no data, `wanda`, `sparsegpt` or `alps`. None: `sparsegpt`
            with data, else `magnitude`.
        least_squares: give the weights that stay the values that serve the output best.
        sequential: layer by layer, each on what the layers pruned before it really give.
        options: as `quantize` has them: `rules`, `changes`, `memory`, `device`, `save_calib`, ...

    Raises:
        OnnxqError: anything wrong with the input; nothing has been written then.
    """
    from onnxq.quantizing import quantize

    data = Data.of(calib)
    if method is None:
        method = "sparsegpt" if data.given or load_calib else "magnitude"
    if method not in METHODS:
        raise OnnxqError(f"no such method: {method!r}", f"choose one of: {', '.join(METHODS)}")
    Pattern.parse(pattern)
    steps = ["sequential"] * sequential + [method] + ["refit"] * least_squares
    recipe = Recipe(
        name=f"sparse{pattern.replace(':', '')}",
        description=f"{pattern} zeros by {method}; weights keep their type",
        weights="none",
        activations="none",
        sparsity=pattern,
        steps=tuple(steps),
    )
    return quantize(
        model,
        output,
        recipe=recipe,
        calib=data,
        load_calib=load_calib,
        precision="keep",
        **options,
    )


def check_zeros(
    model: PathLike, *, pattern: str | None = None, progress: Progress = silent
) -> Checked:
    """Prove the zeros of a file, in floats, in codes and in packed ones.

    Every weight that onnxq's record in the file says was pruned must have the pattern along the
    axis its product sums over; in a file without such a record every weight that can.

    Args:
        pattern: None: what the record says, else 2:4.
    """
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import infer_types
    from onnxq.graph.stored import stored_weight
    from onnxq.layouts import layout_under
    from onnxq.sites import find_sites

    graph = Model.load(Path(model))
    infer_types(graph)
    made = record.read(graph) or {}
    wanted = pattern or str(made.get("recipe", {}).get("sparsity") or DEFAULT_PATTERN)
    parsed, claimed = Pattern.parse(wanted), record.pruned(made)
    rows: list[dict[str, Any]] = []
    sites = [s for s in find_sites(graph) if s.node.op in ("MatMul", "Gemm", "Conv")]
    for done, site in enumerate(sites, 1):
        weight = stored_weight(site.node)
        if (
            weight is None
            or len(weight.shape) < 2
            or (len(weight.shape) > 2) != (site.kind == "conv")
        ):
            continue  # a product of two computed operands, or of many matrices
        zero = weight.zeros()
        layout = layout_under(site.node, zero.shape)
        reason = parsed.obstacle(layout.channels)
        holds = not reason and parsed.holds(layout.matrix(zero), 0)
        rows.append(
            {
                "node": site.name,
                "shape": list(zero.shape),
                "stored": weight.form,
                "holds": holds,
                "zeros": round(float(np.mean(zero)), 4),
                "elements": math.prod(zero.shape),
                "must": site.name in claimed if claimed is not None else not reason,
                "reason": reason or ("" if holds else f"is not {wanted} along its inputs"),
            }
        )
        progress("checking weights", done, len(sites))
    report = Report(f"{Path(model).name}: {wanted} along the summed axis of every weight")
    failed = [row["node"] for row in rows if row["must"] and not row["holds"]]
    report.facts.update(model=Path(model), pattern=wanted, weights=rows, failed=failed)
    if claimed is None:
        report.notes.append("no record says which weights were pruned: all that can have it must")
    return Checked(report, not failed and any(row["holds"] for row in rows))
