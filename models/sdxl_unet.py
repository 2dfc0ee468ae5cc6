"""The UNet of Stable Diffusion XL: its real architecture with random weights, in three sizes.

    python -m models.sdxl_unet [--size tiny|quarter|full] [--dtype fp16|fp32] [--dynamic]
                               [--out DIR] [--force]
    python -m models.sdxl_unet --pipeline DIR --out DIR [--dtype fp16|fp32] [--dynamic]

writes into models/out/sdxl-unet-SIZE-DTYPE/, with --dynamic into one that ends in -dynamic

    model.onnx, model.onnx.data  opset 21; sample [batch, 4, S, S], timestep [batch],
                                 encoder_hidden_states [batch, 77, C], text_embeds [batch, P],
                                 time_ids [batch, 6] -> out_sample [batch, 4, S, S]; with
                                 --dynamic height and width are open, multiples of 4
    config.json                  the diffusers configuration
    calib.npz, heldout.npz       4 and 2 samples of all inputs (not for full); a sample is two rows,
                                 the pair that classifier-free guidance runs

    size     S    C     P     parameters  nodes
    tiny     16   128   64    8 M         one and two transformer blocks: runs in CI
    quarter  32   512   320   106 M       as many blocks as full, a fifth of the width
    full     128  2048  1280  2567 M      stabilityai/stable-diffusion-xl-base-1.0

With --pipeline it is the UNet of a diffusers pipeline saved in DIR, with its size and its weights;
no calib.npz (tools/capture_diffusers.py makes captures), but the pipeline's scheduler_config.json,
by which `onnxq evaluate diffusion` samples.

Otherwise the numbers are random, so a quantized copy can be compared with the original, but no
image comes of it. Every norm and bias is drawn by itself: the exporter merges equal initializers,
and constant norms would give one weight to 70 layers, which no trained model has.

Initializers are called by their module path: linear weights, which the exporter stores transposed
as `val_N`, become `<module path>.weight_T`.

Needs torch and diffusers. Configuration: diffusers documentation, CreativeML Open RAIL++-M model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging as diffusers_logging

from models.files import OUT, finished, staged
from models.module_names import name_by_module
from models.torch_export import export_dynamo, summary

OPSET = 21
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")

_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "full": _SDXL,
    "quarter": _SDXL
    | {
        "sample_size": 32,
        "block_out_channels": [64, 128, 256],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 512,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 64 + 320,
    },
    "tiny": _SDXL
    | {
        "sample_size": 16,
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [1, 2, 4],
        "cross_attention_dim": 128,
        "transformer_layers_per_block": [1, 1, 2],
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 32 + 64,
    },
}


class SdxlUnet(UNet2DConditionModel):
    """The UNet with SDXL's conditions as plain inputs."""

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Shapes as in the module's docstring.

        diffusers concatenates text_embeds with float32 time embeddings, which torch promotes; the
        exporter would write a Concat of mixed types, which no runtime loads. So promote first.
        """
        conditions = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        (result,) = super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            added_cond_kwargs=conditions,
            return_dict=False,
        )
        return result


def random_unet(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> SdxlUnet:
    """Weights uniform within 1/sqrt(fan in); norm weights near 1, biases near 0, all different."""
    diffusers_logging.set_verbosity_error()  # it warns of modules to keep in float32, naming none
    with torch.device("meta"):
        unet = SdxlUnet(**config)
    unet = unet.to(dtype).to_empty(device="cpu")
    unet.set_attn_processor(AttnProcessor2_0())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() >= 2:
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("weight"):
                parameter.normal_(1, 0.1, generator=generator)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    return unet.eval()


def pipeline_unet(folder: Path, dtype: torch.dtype) -> SdxlUnet:
    """The UNet of a diffusers pipeline of SDXL's kind.

    Raises:
        SystemExit: there is none, or it takes other conditions.
    """
    if not (folder / "unet" / "config.json").is_file():
        raise SystemExit(f"{folder} is no diffusers pipeline with a UNet: no unet/config.json")
    diffusers_logging.set_verbosity_error()
    unet: SdxlUnet = SdxlUnet.from_pretrained(
        folder, subfolder="unet", torch_dtype=dtype, local_files_only=True
    )
    if unet.config["addition_embed_type"] != "text_time":
        raise SystemExit(f"the UNet of {folder} does not take text_embeds and time_ids as SDXL's")
    unet.set_attn_processor(AttnProcessor2_0())
    return unet.eval()


def samples(
    config: Mapping[str, Any], dtype: np.dtype[Any], count: int, seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """`count` samples of two rows each: the same latents and timestep, different conditions."""
    rng = np.random.default_rng(seed)
    side, rows = config["sample_size"], 2 * count
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    pixels = 8 * side  # one latent is 8 x 8 pixels
    made = {
        "sample": rng.standard_normal((count, 4, side, side)).repeat(2, axis=0),
        "timestep": rng.integers(0, 1000, count).repeat(2),
        "encoder_hidden_states": rng.standard_normal((rows, 77, config["cross_attention_dim"])),
        "text_embeds": rng.standard_normal((rows, pooled)),
        # original size, crop corner, target size
        "time_ids": np.tile([pixels, pixels, 0, 0, pixels, pixels], (rows, 1)),
    }
    return {name: made[name].astype(dtype) for name in INPUTS}


def build(
    folder: Path, unet: SdxlUnet, config: Mapping[str, Any], dtype: str, dynamic: bool = False
) -> None:
    """Export the UNet into `folder`."""
    kind = np.dtype(np.float16 if dtype == "fp16" else np.float32)
    example = samples(config, kind, count=1, seed=0)
    sides = {2: "height", 3: "width"} if dynamic else {}
    path = folder / "model.onnx"
    program = export_dynamo(
        unet,
        tuple(torch.from_numpy(example[name]) for name in INPUTS),
        INPUTS,
        ["out_sample"],
        ({0: "batch"} | sides, *({0: "batch"},) * (len(INPUTS) - 1)),
        OPSET,
    )
    program.save(path, external_data=True)
    del program
    model = onnx.load(path, load_external_data=False)
    name_by_module(model)
    onnx.save(model, path)


def write_data(folder: Path, config: Mapping[str, Any], dtype: str) -> None:
    """Random samples, to calibrate a random UNet with and to measure it."""
    kind = np.dtype(np.float16 if dtype == "fp16" else np.float32)
    for name, count, seed in (("calib.npz", 4, 1), ("heldout.npz", 2, 2)):
        np.savez(folder / name, **samples(config, kind, count, seed))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.sdxl_unet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--size", choices=CONFIGS, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--dynamic", action="store_true", help="any height and width")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    parser.add_argument("--pipeline", type=Path, metavar="DIR", help="export the UNet in it")
    options = parser.parse_args()
    if options.pipeline and not options.out:
        parser.error("--pipeline needs --out")
    suffix = "-dynamic" if options.dynamic else ""
    folder = options.out or OUT / f"sdxl-unet-{options.size}-{options.dtype}{suffix}"
    if finished(folder / "model.onnx", force=options.force):
        return
    start, config = time.perf_counter(), CONFIGS[options.size]
    if options.pipeline:
        unet = pipeline_unet(options.pipeline, DTYPES[options.dtype])
        config = {name: unet.config[name] for name in config}
    else:
        unet = random_unet(config, DTYPES[options.dtype])
    with staged(folder) as stage:
        build(stage, unet, config, options.dtype, options.dynamic)
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        schedule = Path(options.pipeline or "", "scheduler", "scheduler_config.json")
        if options.pipeline and schedule.is_file():
            shutil.copyfile(schedule, stage / schedule.name)
        elif not options.pipeline and options.size != "full":
            write_data(stage, config, options.dtype)
    print(summary(folder / "model.onnx"), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
