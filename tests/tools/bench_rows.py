"""Rows of the side-by-side table, made up."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def row(
    peer: str,
    recipe: str,
    *,
    model: str = "minilm",
    cpu: float = 1.0,
    peak: float = 100e6,
    size: int = 40,
    snr: float | None = 20.0,
    perplexity: float | str | None = "none",
    loads: str = "yes",
    share: float | None = 0.9,
    failed: str = "",
) -> Row:
    """A row; `share` None does not compile; `perplexity` None is NaN, "none" was not measured."""
    made: Row = {
        "model": model,
        "peer": peer,
        "recipe": recipe,
        "versions": {peer: "1.0"},
        "runs": [{"wall": 2 * cpu, "cpu": cpu, "peak": peak, "code": 0}],
        "failed": failed,
        "input_changed": False,
    }
    if failed or peer == "floor":
        return made
    outputs: Row = {"loads": loads, "reason": "" if loads == "yes" else "no kernel"}
    if loads != "no":
        outputs |= {"snr": snr, "cosine": 0.99}
    if perplexity != "none":
        outputs |= {"perplexity": perplexity, "reference": 20.0}
    compiled: Row = {"compiles": share is not None}
    if share is None:
        compiled["reason"] = "Int32 is no type"
    else:
        compiled |= {"eight_bits": share, "products": {"attention": {"fused fp16": 6}}}
    return made | {
        "bytes": size,
        "original_bytes": 100,
        "outputs": outputs,
        "compiled": compiled,
        "linted": {"findings": 3},
    }
