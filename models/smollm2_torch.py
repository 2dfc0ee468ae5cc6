"""SmolLM2-135M-Instruct as torch exports it, for prefill or for decoding with a key/value cache.

    python -m models.smollm2_torch [--graph prefill|decode] [--dtype fp32|fp16] [--opset N]
                                   [--out DIR] [--force]

writes into models/out/smollm2-torch/ (-decode, -fp16, -decode-fp16 for the others)

    model.onnx, model.onnx.data   the graph as torch.onnx.export(dynamo=True) leaves it: linear
                                  weights called `val_N`, module paths only in the node metadata;
                                  Gather and the last Transpose both read `lm_head.weight`
    tokenizer.json                as models.smollm2 writes it

    prefill   input_ids, attention_mask int64 [batch, seq] -> logits [batch, seq, 49152]
    decode    input_ids, position_ids int64 [batch, seq], attention_mask int64 [batch, past + seq],
              past_key_values.N.key, .value [batch, 3, past, 64]
              -> logits, present.N.key, .value [batch, 3, past + seq, 64]; past may be 0

The weights are those of models.smollm2, and so are the results: perplexity 20.022 on 3 windows of
wiki_eval in fp32, 20.027 in fp16.

Needs torch, transformers, gguf. License: Apache-2.0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM

from models import packages
from models.files import OUT, finished, staged
from models.smollm2 import checkpoint
from models.torch_export import export_dynamo, summary

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Prefill(LlamaForCausalLM):
    """The whole prompt at once. A subclass, so that module paths are the checkpoint's own."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """int64 [B, S] each -> logits [B, S, V]."""
        result = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        )
        return result.logits


class Decode(LlamaForCausalLM):
    """Further tokens after those whose keys and values are in the cache."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Shapes as in the module's docstring; `past` has a (key, value) for each layer."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        result = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return result.logits, [(layer.keys, layer.values) for layer in cache.layers]


def load(kind: type[LlamaForCausalLM], dtype: torch.dtype) -> LlamaForCausalLM:
    """The trained model. The rotary frequencies stay float32, as from_pretrained keeps them."""
    source = checkpoint()
    sizes = dict(vars(source.config))
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = transformers.LlamaConfig(
        **sizes,
        rope_parameters=rope,
        tie_word_embeddings=True,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = kind(config)
    state = {name: torch.from_numpy(value.copy()) for name, value in source.weights()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"checkpoint and model differ: {missing}, {unexpected}")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def export_prefill(dtype: torch.dtype, opset: int) -> torch.onnx.ONNXProgram:
    ids = torch.arange(3, 19).reshape(2, 8)
    names, axes = ["input_ids", "attention_mask"], {0: "batch", 1: "seq"}
    arguments = (ids, torch.ones_like(ids))
    return export_dynamo(load(Prefill, dtype), arguments, names, ["logits"], (axes, axes), opset)


def export_decode(dtype: torch.dtype, opset: int) -> torch.onnx.ONNXProgram:
    model = load(Decode, dtype)
    config = model.config
    layers = range(config.num_hidden_layers)
    ids = torch.arange(3, 9).reshape(2, 3)
    cached = torch.zeros(2, config.num_key_value_heads, 5, config.head_dim, dtype=dtype)
    arguments: tuple[Any, ...] = (
        ids,
        torch.ones(2, 5 + 3, dtype=torch.int64),
        torch.arange(5, 8).repeat(2, 1),
        [(cached.clone(), cached.clone()) for _ in layers],
    )
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    tokens, past = {0: "batch", 1: "seq"}, {0: "batch", 2: "past"}
    return export_dynamo(
        model,
        arguments,
        ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in parts)],
        ["logits", *(f"present.{p}" for p in parts)],
        (tokens, {0: "batch", 1: "total"}, tokens, [(past, past) for _ in layers]),
        opset,
    )


GRAPHS = {"prefill": export_prefill, "decode": export_decode}


def build(folder: Path, graph: str, dtype: str, opset: int) -> None:
    """Export into `folder`."""
    start = time.perf_counter()
    with staged(folder) as stage:
        program = GRAPHS[graph](DTYPES[dtype], opset)
        program.save(stage / "model.onnx", external_data=True)
        checkpoint().tokenizer().save(str(stage / "tokenizer.json"))
    print(summary(folder / "model.onnx"), f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.smollm2_torch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--graph", choices=GRAPHS, default="prefill")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--opset", type=int, default=21)
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    name = "smollm2-torch" + ("-decode" if options.graph == "decode" else "")
    folder = options.out or OUT / (name + ("-fp16" if options.dtype == "fp16" else ""))
    if not finished(folder / "model.onnx", force=options.force):
        build(folder, options.graph, options.dtype, options.opset)


if __name__ == "__main__":
    packages.script(main)
