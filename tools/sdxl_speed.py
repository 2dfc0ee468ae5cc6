"""The SDXL UNet at full size, predicted against what NVIDIA published.

    python -m tools.sdxl_speed FP16.onnx FP8.onnx INT8.onnx --save tests/golden/sdxl_speed.json

compiles the three for sm89 (about 10 GB of memory each), keeps what their kernels have to do and
prints predicted and published speed-ups; with `--load FILE` it prints those of a saved file.

Published (NVIDIA ModelOpt's examples for diffusers, TensorRT 9.3): 1024 x 1024 pixels, 30 steps,
batch 1, whole pipeline, against FP16, without FP8 attention. A pipeline is 30 calls of the UNet on
two rows (guidance), one of the VAE's decoder and of the two text encoders. These two are the same
before and after, and are estimated apart: the decoder from its configuration (diffusers'
AutoencoderKL for SDXL on 128 x 128 latents: 10.47 TFLOP, 12.1 x 10^9 elements in and out of its
layers), in TF32, since it overflows in FP16; the encoders (817 x 10^6 weights, 77 tokens, two rows)
in FP16.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path

from onnxq.engine.roofline import Assumptions, Work, seconds
from onnxq.gpus import Gpu, gpu

PUBLISHED = {
    "RTX 6000 Ada": {"int8": 1.43, "fp8": 1.45},
    "RTX 4090": {"int8": 1.20, "fp8": 1.14},
    "L40S": {"int8": 1.25, "fp8": 1.35},
}
STEPS = 30
APART = (
    Work("conv", "fp32", 10_470_392_070_144, 4 * 12_141_527_040),
    Work("gemm", "fp16", 2 * 2 * 77 * 817_000_000, 2 * 817_000_000),
)
SHAPES = [
    "sample:2x4x128x128",
    "timestep:2",
    "encoder_hidden_states:2x77x2048",
    "text_embeds:2x1280",
    "time_ids:2x6",
]

Plans = dict[str, list[Work]]


def pipeline(plan: Sequence[Work], card: Gpu, assumed: Assumptions) -> float:
    """Seconds of a picture."""
    return STEPS * seconds(plan, card, assumed) + seconds(APART, card, assumed)


def speed_ups(plans: Plans, assumed: Assumptions | None = None) -> dict[str, dict[str, float]]:
    """By card and format: how many times as fast as FP16."""
    assumed = assumed or Assumptions()
    return {
        name: {
            form: pipeline(plans["fp16"], gpu(name), assumed)
            / pipeline(plans[form], gpu(name), assumed)
            for form in published
        }
        for name, published in PUBLISHED.items()
    }


def compiled(model: Path) -> list[Work]:
    """What the kernels of a model have to do, alike ones together."""
    from onnxq.engine.build import build
    from onnxq.engine.roofline import work

    found = work(build(model, target="sm89", shapes=SHAPES).layers)
    if found is None:
        raise SystemExit(f"{model} has dynamic shapes inside")
    return [replace(one, count=count) for one, count in Counter(found).items()]


def save(plans: Plans, path: Path) -> None:
    rows = {name: [list(astuple(one)) for one in plan] for name, plan in plans.items()}
    path.write_text(
        "{\n"
        + ",\n".join(
            f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in found) + "\n]"
            for name, found in rows.items()
        )
        + "\n}\n"
    )


def load(path: Path) -> Plans:
    content = json.loads(path.read_text())
    return {name: [Work(*row) for row in rows] for name, rows in content.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sdxl_speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", type=Path, metavar="FP16 FP8 INT8")
    parser.add_argument("--save", type=Path, metavar="FILE")
    parser.add_argument("--load", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.load:
        plans = load(given.load)
    elif len(given.models) == 3:
        names = ("fp16", "fp8", "int8")
        plans = {name: compiled(model) for name, model in zip(names, given.models, strict=True)}
    else:
        parser.error("give three models, or --load")
    if given.save:
        save(plans, given.save)
    wide = replace(Assumptions(), narrow=False)
    print(Assumptions())
    print("                     predicted  published          FP16 products in FP32 predicted")
    for name, forms in speed_ups(plans).items():
        for form, predicted in forms.items():
            published = PUBLISHED[name][form]
            print(
                f"{name:14} {form:5} {predicted:9.2f} x {published:8.2f} x "
                f"{predicted / published - 1:+8.0%} {speed_ups(plans, wide)[name][form]:12.2f} x"
            )


if __name__ == "__main__":
    main()
