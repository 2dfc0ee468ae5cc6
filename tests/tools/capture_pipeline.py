"""Run in the environment of models/: saves an SDXL pipeline with random weights, and captures it.

python capture_pipeline.py FOLDER CAPTURES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools import capture_diffusers

_WORDS = ["!", "a</w>", "h", "o", "r", "s", "e</w>", "<|startoftext|>", "<|endoftext|>"]
_WIDTH = 32  # of each text encoder; together 64
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 2 * _WIDTH,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + _WIDTH,
}


def tokenizer(folder: Path) -> CLIPTokenizer:
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(_WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        unk_token="!",
        pad_token="!",
    )


def save_pipeline(folder: Path) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(_WORDS),
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        bos_token_id=7,
        eos_token_id=8,
        pad_token_id=0,
        projection_dim=_WIDTH,
    )
    words = tokenizer(folder)
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=[8] * 4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=words,
        tokenizer_2=words,
        unet=UNet2DConditionModel(**_UNET),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    ).save_pretrained(folder / "pipeline")


if __name__ == "__main__":
    folder, captures = map(Path, sys.argv[1:])
    save_pipeline(folder)
    (folder / "prompts.txt").write_text("a horse\n\na a\n")
    words = f"--model {folder}/pipeline --prompts {folder}/prompts.txt --steps 3 --out {captures}"
    sys.argv = ["capture_diffusers.py", *words.split()]
    capture_diffusers.main()
