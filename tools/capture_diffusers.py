"""What a diffusers pipeline feeds its UNet at every denoising step, as calibration data.

    python tools/capture_diffusers.py --model DIR --prompts prompts.txt --steps 20 --out captures/

writes captures/PROMPT-STEP.npz, a sample each, with arrays named as the inputs of an exported SDXL
UNet: sample [2, 4, H/8, W/8] (the rows that classifier-free guidance runs together), timestep [2],
encoder_hidden_states [2, 77, C], text_embeds [2, P], time_ids [2, 6]; without the last two where
the model has none. `onnxq quantize --calib captures/` takes the folder, and keeps ranges by
timestep.

Needs torch and diffusers. DIR is a pipeline's folder; nothing is downloaded. It runs in float16 on
a GPU, else in float32, which a CPU is faster in; `onnxq quantize` takes either for a model of
either type. `python -m models.sdxl_unet --pipeline DIR` exports the UNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline


@contextmanager
def capturing(unet: Any, folder: Path, prompt: int) -> Iterator[list[Path]]:
    """Write each call of `unet` into `folder`; gives the files written so far."""
    written: list[Path] = []
    forward = unet.forward

    def captured(
        sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **others: Any
    ) -> Any:
        rows = sample.shape[0]
        arrays = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep).reshape(-1).expand(rows).to(sample.dtype),
            "encoder_hidden_states": encoder_hidden_states,
            **(others.get("added_cond_kwargs") or {}),
        }
        path = folder / f"{prompt:04}-{len(written):04}.npz"
        np.savez(path, **{name: array.detach().cpu().numpy() for name, array in arrays.items()})
        written.append(path)
        return forward(sample, timestep, encoder_hidden_states, **others)

    unet.forward = captured
    try:
        yield written
    finally:
        unet.forward = forward


def capture(
    pipeline: Any, prompts: list[str], folder: Path, *, steps: int, seed: int = 0, **options: Any
) -> int:
    """Run each prompt and keep what the UNet is fed; returns how many samples were written.

    Args:
        options: of the pipeline's call, such as height and width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: old captures would be mixed with new ones")
    total = 0
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + index)
        with capturing(pipeline.unet, folder, index) as written, torch.no_grad():
            pipeline(
                prompt,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
                **options,
            )
        total += len(written)
        print(f"{index + 1} of {len(prompts)} prompts, {total} samples", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompts", type=Path, required=True, help="a prompt a line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--size", type=int, help="pixels of a side; the pipeline's own if not said")
    parser.add_argument("--dtype", choices=("float16", "float32"), help="default: as above")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    prompts = [line.strip() for line in given.prompts.read_text().splitlines() if line.strip()]
    if not (given.model / "model_index.json").is_file():
        parser.error(f"{given.model} is no diffusers pipeline: it has no model_index.json")
    if not prompts:
        parser.error(f"{given.prompts} has no prompts")
    dtype = given.dtype or ("float32" if given.device == "cpu" else "float16")
    pipeline = DiffusionPipeline.from_pretrained(
        given.model, torch_dtype=getattr(torch, dtype), local_files_only=True
    ).to(given.device)
    if getattr(pipeline, "unet", None) is None:
        parser.error(f"the pipeline in {given.model} has no UNet")
    size = {} if given.size is None else {"height": given.size, "width": given.size}
    capture(pipeline, prompts[: given.limit], given.out, steps=given.steps, seed=given.seed, **size)
    print(
        f"wrote {given.out}; next: onnxq quantize MODEL.onnx --recipe sdxl-fp8 --calib {given.out}"
    )


if __name__ == "__main__":
    main()
