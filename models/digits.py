"""A diffusion model that draws digits: the UNet of Stable Diffusion XL in small, trained here.

    python -m models.digits [--steps N] [--out DIR] [--force]

writes into models/out/digits/

    model.onnx             opset 21, float32, weights inline; sample [batch, 1, 16, 16], timestep
                           [batch], encoder_hidden_states [batch, 32, 32] -> out_sample: the noise
    classifier.onnx        an independent CNN: sample [batch, 1, 16, 16] -> scores [batch, 10]
    conditions.npz         what stands for each digit: encoder_hidden_states [10, 32, 32], `label`,
                           and negative.encoder_hidden_states [1, 32, 32], which stands for any
    scheduler_config.json  the betas it was trained with, SDXL's
    calib.npz, heldout.npz what the UNet is fed along 20 guided steps, a row each: 400 and 200
    samples.npz            `noise` and the `sample` that torch and diffusers make of it, 10 digits

984 thousand parameters, a convolutional block and one with attention on each side (64 pixels, 4
heads of 16), cross-attention to 32 tokens, the operators those of SDXL. Trained on 1400 digits of
scikit-learn's 8 x 8, enlarged to 16 x 16, a tenth of the time without condition, so that it can be
guided; the classifier on the same, tested on the other 397.

One thread and fixed seeds: the same machine trains the same model. Needs torch and diffusers.
License: BSD (scikit-learn), CC BY 4.0 (the digits: E. Alpaydin, C. Kaynak, UCI).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional

from models import packages
from models.files import OUT, finished, shown, size, staged
from models.module_names import name_by_module
from models.torch_export import export_dynamo, summary

FOLDER = OUT / "digits"
OPSET = 21
STEPS, BATCH, RATE = 2000, 16, 2e-3
WARM, AVERAGED_OVER = 100, 200
TOKENS, WIDTH, ANY = 32, 32, 10  # ANY: the class that stands for all
SIDE, TRAINED_ON = 16, 1400
DENOISING_STEPS, GUIDANCE = 20, 2.0

_DIGITS = "sklearn/datasets/data/digits.csv.gz"
_UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": True,
    "clip_sample_range": 1.0,
}


class DigitsUnet(UNet2DConditionModel):
    """The UNet with its output alone."""

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Shapes as in the module's docstring."""
        (result,) = super().forward(sample, timestep, encoder_hidden_states, return_dict=False)
        return result


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [1797, 1, 16, 16] from -1, paper, to 1, ink, and what they show, shuffled."""
    with gzip.open(packages.extract(packages.SCIKIT_LEARN, _DIGITS)) as file:
        rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    pictures = rows[:, :64].reshape(-1, 1, 8, 8) / 8 - 1
    larger = functional.interpolate(pictures, size=SIDE, mode="bilinear", align_corners=False)
    return larger, rows[:, 64].long()


def train_classifier(pictures: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A small CNN; prints how often it is right on what it was not trained on."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(25):
        for rows in torch.randperm(TRAINED_ON).split(64):
            loss = functional.cross_entropy(model(pictures[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = model(pictures[TRAINED_ON:]).argmax(1) == labels[TRAINED_ON:]
    print(f"classifier: {right.float().mean():.1%} of {len(right)} unseen digits")
    return model.eval()


def train_unet(
    pictures: torch.Tensor, labels: torch.Tensor, steps: int
) -> tuple[DigitsUnet, torch.Tensor]:
    """The UNet, and the conditions [11, TOKENS, WIDTH] that were trained with it.

    Noise prediction (Ho et al. 2020, arXiv 2006.11239, algorithm 1); the result is a moving average
    of the weights.
    """
    unet, table = DigitsUnet(**_UNET), nn.Embedding(ANY + 1, TOKENS * WIDTH)
    both = nn.ModuleList([unet, table])
    averaged = copy.deepcopy(both).requires_grad_(False)
    alphas = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
    optimizer = torch.optim.AdamW(both.parameters(), RATE, weight_decay=1e-4)
    start, recent = time.process_time(), 0.0
    for step in range(1, steps + 1):
        rate = RATE * min(1, step / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(TRAINED_ON, (BATCH,))
        asked = torch.where(torch.rand(BATCH) < 0.1, ANY, labels[rows])
        timesteps, noise = torch.randint(len(alphas), (BATCH,)), torch.randn(BATCH, 1, SIDE, SIDE)
        left = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = left.sqrt() * pictures[rows] + (1 - left).sqrt() * noise
        predicted = unet(noisy, timesteps, table(asked).view(-1, TOKENS, WIDTH))
        loss = functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        weight = 1 / min(step, AVERAGED_OVER)
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), both.parameters(), strict=True):
                mean.lerp_(now, weight)
        recent += weight * (loss.item() - recent)
        if step % 200 == 0:
            spent = time.process_time() - start
            print(f"step {step} of {steps}: loss {recent:.4f}, {spent:.0f} CPU s", flush=True)
    return averaged[0].eval(), averaged[1].weight.detach().view(-1, TOKENS, WIDTH)


def denoise(
    unet: DigitsUnet, conditions: torch.Tensor, noise: torch.Tensor, labels: list[int]
) -> tuple[torch.Tensor, dict[str, np.ndarray[Any, Any]]]:
    """Guided samples by diffusers' DDIM, and the rows the UNet was fed, half of them negative."""
    scheduler = DDIMScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(DENOISING_STEPS)
    asked = torch.cat([conditions[[ANY] * len(labels)], conditions[labels]])
    fed: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("sample", "timestep", "encoder_hidden_states")
    }
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            inputs = torch.cat([noise, noise]), timestep.float().repeat(len(asked)), asked
            for rows, array in zip(fed.values(), inputs, strict=True):
                rows.append(array)
            negative, wanted = unet(*inputs).chunk(2)
            predicted = negative + GUIDANCE * (wanted - negative)
            noise = scheduler.step(predicted, timestep, noise).prev_sample
    return noise, {name: torch.cat(rows).numpy() for name, rows in fed.items()}


def noise(seed: int, count: int) -> torch.Tensor:
    """Sample i from numpy's default_rng(seed + i), as `onnxq evaluate diffusion` draws them."""
    rows = [np.random.default_rng(seed + i).standard_normal((1, SIDE, SIDE)) for i in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def export(model: nn.Module, path: Path, inputs: dict[str, torch.Tensor], output: str) -> None:
    """Write an ONNX file with its weights inline and the batch open."""
    program = export_dynamo(
        model, tuple(inputs.values()), list(inputs), [output], ({0: "batch"},) * len(inputs), OPSET
    )
    program.save(path, external_data=False)
    written = onnx.load(path)
    name_by_module(written)
    onnx.save(written, path)


def write_data(folder: Path, unet: DigitsUnet, conditions: torch.Tensor) -> None:
    """The conditions, what the UNet is fed, and samples to hold others against."""
    np.savez(
        folder / "conditions.npz",
        **{
            "encoder_hidden_states": conditions[:ANY].numpy(),
            "negative.encoder_hidden_states": conditions[ANY:].numpy(),
            "label": np.arange(ANY),
        },
    )
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    for name, labels, seed in (("calib", range(10), 10_000), ("heldout", range(0, 10, 2), 20_000)):
        _, fed = denoise(unet, conditions, noise(seed, len(labels)), list(labels))
        np.savez(folder / f"{name}.npz", **fed)
    start = noise(0, ANY)
    samples, _ = denoise(unet, conditions, start, list(range(ANY)))
    np.savez(folder / "samples.npz", noise=start.numpy(), sample=samples.numpy())


def build(folder: Path, steps: int) -> None:
    """Train both models, and write them and their data into `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, labels = digits()
    classifier = train_classifier(pictures, labels)
    unet, conditions = train_unet(pictures, labels, steps)
    with staged(folder) as stage:
        write_data(stage, unet, conditions)
        example = torch.zeros(2, 1, SIDE, SIDE)
        inputs = {"sample": example, "timestep": torch.zeros(2)}
        inputs["encoder_hidden_states"] = conditions[:2]
        export(unet, stage / "model.onnx", inputs, "out_sample")
        export(classifier, stage / "classifier.onnx", {"sample": example}, "scores")
    for name in ("calib.npz", "heldout.npz", "conditions.npz"):
        print(f"{shown(folder / name)}: {size(folder / name)}")
    print(summary(folder / "model.onnx"), f"{time.process_time():.0f} CPU s in all")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.digits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    if not finished(options.out / "model.onnx", force=options.force):
        build(options.out, options.steps)


if __name__ == "__main__":
    packages.script(main)
