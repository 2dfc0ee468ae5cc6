"""What second-order rounding takes, beside what none can go below.

    python -m tools.bench.solving MODEL [RECIPE] [--samples N]

The statistics beside the bare forward passes over the same data (CPU seconds of the loops alone),
and the recipe's steps on all weights beside GPTQ's count of operations at the speed of the matrix
library, which is that of a product of the model's most frequent size, measured here.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tools.bench.models import CASES, data


def operations(layers: dict[str, list[tuple[int, int]]]) -> float:
    """Of GPTQ (floating-point, multiply and add counted apart).

    For each input K^3 / 3 for the Cholesky factor and as many for its inverse; for each weight
    [K, N] K^2 N: every input moves the half of the others that is still to come, on average.

    Args:
        layers: the shapes of the weights that read each input.
    """
    return float(
        sum(
            2 * shapes[0][0] ** 3 / 3 + sum(k * k * n for k, n in shapes)
            for shapes in layers.values()
        )
    )


def library_speed(k: int, n: int) -> float:
    """Operations a second of a product [k, k] x [k, n] in float32."""
    a, b = np.ones((k, k), np.float32), np.ones((k, n), np.float32)
    a @ b
    started, rounds = time.process_time(), 0
    while time.process_time() - started < 0.5:
        a @ b
        rounds += 1
    return rounds * 2 * k * k * n / (time.process_time() - started)


def _layers(model: Path, recipe: str) -> dict[str, list[tuple[int, int]]]:
    """The shapes of the weights that read each input."""
    import onnxq
    from onnxq.schemes import summed_axis

    placement = onnxq.inspect(model, recipe=recipe).placement
    assert placement is not None
    layers: dict[str, list[tuple[int, int]]] = {}
    for decision in placement.quantized:
        site = decision.site
        if site.kind == "linear" and site.operand is not None:
            k = site.operand.shape[summed_axis(site)]
            n = site.operand.shape[1 - summed_axis(site)]
            layers.setdefault(site.node.inputs[0].name, []).append((k, n))
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description="What second-order rounding takes.")
    parser.add_argument("model", choices=[name for name, case in CASES.items() if case.four])
    parser.add_argument("recipe", nargs="?", default="int4-gptq")
    parser.add_argument("--samples", type=int, help="of calibration text")
    options = parser.parse_args()
    case = CASES[options.model]

    import onnxq
    from onnxq.calibrate.session import open_session
    from onnxq.graph.model import Model
    from onnxq.recipe import load

    given = data(case.calib)
    if options.samples and given.text is not None:
        given = replace(given, samples=options.samples)
    samples = given.open(Model.load(case.model).inputs())
    session = open_session(case.model)
    started = time.process_time()
    for feed in samples:
        session.run(None, feed)
    forward = time.process_time() - started
    del session

    marks: dict[str, list[float]] = {}
    last = time.process_time()

    def progress(step: str, done: int, total: int) -> None:
        nonlocal last
        now = time.process_time()
        marks.setdefault(step, []).append(now - last)
        last = now

    with TemporaryDirectory() as folder:
        onnxq.quantize(
            case.model,
            Path(folder, "m.onnx"),
            recipe=options.recipe,
            changes=[f"block_size={case.block}"] if load(options.recipe).block_size else [],
            calib=given,
            progress=progress,
        )
    layers = _layers(case.model, options.recipe)
    common = Counter(shape for shapes in layers.values() for shape in shapes).most_common(1)[0][0]
    speed = library_speed(*common)
    # The first step of a loop has all that came before it: its share is that of the others.
    loops = {step: sum(t[1:]) * len(t) / max(len(t) - 1, 1) for step, t in marks.items()}
    solving = sum(seconds for step, seconds in loops.items() if step != "calibrate")
    count = operations(layers)
    print(f"{options.model} {options.recipe}, {samples.count} samples, CPU seconds")
    print(f"bare forward passes      {forward:8.1f}")
    statistics = loops["calibrate"]
    print(f"statistics               {statistics:8.1f}   {statistics / forward:.2f} x")
    weights = sum(map(len, layers.values()))
    each = ", ".join(f"{step} {seconds:.1f}" for step, seconds in loops.items())
    print(f"{weights:3} weights, all steps   {solving:8.1f}   ({each})")
    print(
        f"GPTQ's operations        {count / speed:8.1f}   {count:.3g} at {speed / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
