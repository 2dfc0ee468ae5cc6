"""Read a LLaMA-shaped checkpoint from a GGUF file: configuration, weights, tokenizer.

Weights get the names they have in Hugging Face checkpoints. Needs gguf, numpy, tokenizers; no
torch. Weights are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

FloatArray = NDArray[np.float32]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes that a LLaMA graph needs; names as in Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float


class Checkpoint:
    """A GGUF file, mapped, not read."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)

    def field(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    @cached_property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.field("llama.vocab_size"),
            hidden_size=self.field("llama.embedding_length"),
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=self.field("llama.attention.head_count"),
            num_key_value_heads=self.field("llama.attention.head_count_kv"),
            head_dim=self.field("llama.rope.dimension_count"),
            max_position_embeddings=self.field("llama.context_length"),
            rms_norm_eps=self.field("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self.field("llama.rope.freq_base"),
        )

    def weights(self) -> Iterator[tuple[str, FloatArray]]:
        """(name, float32 array) for every tensor, e.g. `model.layers.0.mlp.up_proj.weight`.

        Linear weights have torch's layout [out, in]; query and key rows are in the order that
        rotate_half expects.
        """
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }
        for tensor in self._reader.tensors:
            value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                value = unpermute(value, heads[kind])
            yield module_name(tensor.name) + ".weight", value

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer; numbers are split into digits, as SmolLM's are."""
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self.field("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        made = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        made.decoder = decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type")
        made.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == _CONTROL_TOKEN
            ]
        )
        return made


def module_name(tensor: str) -> str:
    """The module of a GGUF tensor: `blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj`."""
    parts = tensor.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}"
    return _TOP[parts[0]]


def unpermute(weight: FloatArray, heads: int) -> FloatArray:
    """Undo the row order that GGUF gives query and key weights, [heads * dim, in].

    llama.cpp rotates neighbours (0, 1), (2, 3), ...; Hugging Face's rotate_half rotates (0, dim/2),
    (1, dim/2 + 1), ... So within a head, row 2 i + j of the file is row j * dim/2 + i here (j = 0,
    1).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def permute(weight: FloatArray, heads: int) -> FloatArray:
    """The inverse of `unpermute`: what llama.cpp's converter does."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
