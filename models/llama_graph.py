"""The LLaMA prefill graph in ONNX operators, shaped as Hugging Face's LlamaForCausalLM exports.

What a quantizer must recognise is kept as the exporters write it: RMSNorm in six nodes, rotary
embedding computed in the graph, grouped-query attention through Unsqueeze/Expand/Reshape, an
additive mask, and an lm_head that multiplies by the Transpose of the embedding that Gather reads.
Dimensions in comments: B batch, S sequence, H hidden, D head_dim, N query heads, G key/value heads,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import TensorProto, ValueInfoProto, helper

from models.gguf_llama import LlamaConfig
from models.graph_writer import GraphWriter

OPSET = 21


class LlamaGraph:
    """Builds the nodes. Weights must be in `writer` under the names that `weight_name` gives."""

    def __init__(self, writer: GraphWriter, config: LlamaConfig, dtype: DTypeLike) -> None:
        self.w, self.config, self.dtype = writer, config, np.dtype(dtype)
        self.onnx_dtype = helper.np_dtype_to_tensor_dtype(self.dtype)

    def inputs(self) -> list[ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
            for name in ("input_ids", "attention_mask")
        ]

    def outputs(self) -> list[ValueInfoProto]:
        shape: list[str | int | None] = ["batch", "seq", self.config.vocab_size]
        return [helper.make_tensor_value_info("logits", self.onnx_dtype, shape)]

    def build(self) -> None:
        w = self.w
        with w.scope("model"):
            with w.scope("embed_tokens"):
                x = w.op("Gather", "model.embed_tokens.weight", "input_ids")  # [B, S, H]
            positions = self._positions()
            mask = self._mask(positions)
            cosine, sine = self._rotary(positions)
            for layer in range(self.config.num_hidden_layers):
                with w.scope(f"layers.{layer}"):
                    prefix = f"model.layers.{layer}"
                    y = self._rms_norm(x, prefix, "input_layernorm")
                    y = self._attention(y, f"{prefix}.self_attn", mask, cosine, sine)
                    x = w.op("Add", x, y)
                    y = self._rms_norm(x, prefix, "post_attention_layernorm")
                    x = w.op("Add", x, self._mlp(y, f"{prefix}.mlp"))
            x = self._rms_norm(x, "model", "norm")
        with w.scope("lm_head"):
            head = w.op("Transpose", "model.embed_tokens.weight", perm=[1, 0])  # [H, V]
            w.op("MatMul", x, head, output="logits")

    def _number(self, value: float) -> str:
        return self.w.constant(value, self.dtype)

    def _linear(self, x: str, module: str, name: str) -> str:
        with self.w.scope(name):
            return self.w.op("MatMul", x, weight_name(f"{module}.{name}.weight"))

    def _positions(self) -> str:
        """0, 1, ..., S - 1 as [1, S]; like Hugging Face's default, padding is not skipped."""
        w = self.w
        length = w.op("Gather", w.op("Shape", "input_ids"), w.constant(1), axis=0)
        counted = w.op("Range", w.constant(0), length, w.constant(1))
        return w.op("Unsqueeze", counted, w.constant([0]))

    def _mask(self, positions: str) -> str:
        """[B, 1, S, S]: 0 where query i may see key j (j <= i, not padding), else finfo.min."""
        w = self.w
        query = w.op("Transpose", positions, perm=[1, 0])  # [S, 1]
        causal = w.op("LessOrEqual", positions, query)  # [S, S]
        causal = w.op("Unsqueeze", causal, w.constant([0, 1]))
        present = w.op("Cast", "attention_mask", to=TensorProto.BOOL)
        present = w.op("Unsqueeze", present, w.constant([1, 2]))  # [B, 1, 1, S]
        lowest = self._number(float(np.finfo(self.dtype).min))
        return w.op("Where", w.op("And", causal, present), self._number(0.0), lowest)

    def _rotary(self, positions: str) -> tuple[str, str]:
        """(cosine, sine), each [1, 1, S, D], computed in float32."""
        w, dim = self.w, self.config.head_dim
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = (1.0 / self.config.rope_theta**exponents).astype(np.float32)
        with w.scope("rotary_emb"):
            inv_freq = w.weight("model.rotary_emb.inv_freq", frequencies[None, :, None])
            steps = w.op("Cast", positions, to=TensorProto.FLOAT)
            steps = w.op("Unsqueeze", steps, w.constant([1]))  # [1, 1, S]
            angles = w.op("MatMul", inv_freq, steps)  # [1, D/2, S]
            angles = w.op("Transpose", angles, perm=[0, 2, 1])
            angles = w.op("Concat", angles, angles, axis=-1)  # [1, S, D]
            made = []
            for function in ("Cos", "Sin"):
                value = self._cast(w.op(function, angles), self.onnx_dtype)
                made.append(w.op("Unsqueeze", value, w.constant([1])))
        return made[0], made[1]

    def _cast(self, x: str, to: int) -> str:
        """A Cast where the model is not float32; nothing otherwise."""
        return x if self.dtype == np.float32 else self.w.op("Cast", x, to=to)

    def _rms_norm(self, x: str, module: str, name: str) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32 (Zhang, Sennrich 2019)."""
        w = self.w
        with w.scope(name):
            x = self._cast(x, TensorProto.FLOAT)
            mean = w.op("ReduceMean", w.op("Pow", x, w.constant(2.0, np.float32)), w.constant([-1]))
            shifted = w.op("Add", mean, w.constant(self.config.rms_norm_eps, np.float32))
            x = w.op("Mul", x, w.op("Reciprocal", w.op("Sqrt", shifted)))
            return w.op("Mul", f"{module}.{name}.weight", self._cast(x, self.onnx_dtype))

    def _heads(self, x: str, heads: int) -> str:
        """[B, S, heads * D] -> [B, heads, S, D]"""
        shape = self.w.constant([0, 0, heads, self.config.head_dim])
        return self.w.op("Transpose", self.w.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _rotate(self, x: str, cosine: str, sine: str) -> str:
        """x cos + rotate_half(x) sin, with rotate_half([a, b]) = [-b, a] (Su et al. 2021)."""
        w, dim = self.w, self.config.head_dim
        axis, end = w.constant([3]), w.constant([np.iinfo(np.int64).max])
        first = w.op("Slice", x, w.constant([0]), w.constant([dim // 2]), axis)
        second = w.op("Slice", x, w.constant([dim // 2]), end, axis)
        turned = w.op("Concat", w.op("Neg", second), first, axis=-1)
        return w.op("Add", w.op("Mul", x, cosine), w.op("Mul", turned, sine))

    def _repeat(self, x: str) -> str:
        """Give every query head its key or value head: [B, G, S, D] -> [B, N, S, D]."""
        w, config = self.w, self.config
        groups = config.num_attention_heads // config.num_key_value_heads
        x = w.op("Unsqueeze", x, w.constant([2]))
        x = w.op("Expand", x, w.constant([1, 1, groups, 1, 1]))  # [B, G, N/G, S, D]
        return w.op("Reshape", x, w.constant([0, config.num_attention_heads, -1, config.head_dim]))

    def _attention(self, x: str, module: str, mask: str, cosine: str, sine: str) -> str:
        w, config = self.w, self.config
        with w.scope("self_attn"):
            query = self._heads(self._linear(x, module, "q_proj"), config.num_attention_heads)
            key = self._heads(self._linear(x, module, "k_proj"), config.num_key_value_heads)
            value = self._heads(self._linear(x, module, "v_proj"), config.num_key_value_heads)
            query = self._rotate(query, cosine, sine)
            key = self._repeat(self._rotate(key, cosine, sine))
            scores = w.op("MatMul", query, w.op("Transpose", key, perm=[0, 1, 3, 2]))
            scores = w.op("Mul", scores, self._number(config.head_dim**-0.5))
            weights = w.op("Softmax", w.op("Add", scores, mask), axis=-1)  # [B, N, S, S]
            mixed = w.op("MatMul", weights, self._repeat(value))
            mixed = w.op("Transpose", mixed, perm=[0, 2, 1, 3])
            width = config.num_attention_heads * config.head_dim
            mixed = w.op("Reshape", mixed, w.constant([0, 0, width]))
            return self._linear(mixed, module, "o_proj")

    def _mlp(self, x: str, module: str) -> str:
        """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)"""
        w = self.w
        with w.scope("mlp"):
            gate = self._linear(x, module, "gate_proj")
            with w.scope("act_fn"):
                gate = w.op("Mul", gate, w.op("Sigmoid", gate))
            product = w.op("Mul", gate, self._linear(x, module, "up_proj"))
            return self._linear(product, module, "down_proj")


def weight_name(name: str) -> str:
    """The initializer's name for a linear weight: `_T`, because it is stored [in, out]."""
    return f"{name}_T"


def stored(name: str, value: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    """A checkpoint tensor as the graph wants it: linear weights transposed and renamed."""
    if name.endswith("_proj.weight"):
        return weight_name(name), value.T
    return name, value
