"""The GGUF reader and the hand-built LLaMA graph, against a reference written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models import smollm2
from models.gguf_llama import LlamaConfig, module_name, permute, unpermute
from models.graph_writer import NAME_SCOPES, GraphWriter
from models.llama_graph import OPSET, LlamaGraph, stored


def rotate(x: np.ndarray, position: int, pairs: list[tuple[int, int]], theta: float) -> np.ndarray:
    """Rotary embedding of one head, pair by pair."""
    made = x.astype(np.float64)
    for index, (i, j) in enumerate(pairs):
        angle = position * theta ** (-2 * index / len(x))
        c, s = np.cos(angle), np.sin(angle)
        made[i], made[j] = x[i] * c - x[j] * s, x[j] * c + x[i] * s
    return made


def neighbours(dim: int) -> list[tuple[int, int]]:
    return [(2 * i, 2 * i + 1) for i in range(dim // 2)]


def halves(dim: int) -> list[tuple[int, int]]:
    return [(i, i + dim // 2) for i in range(dim // 2)]


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_unpermute_undoes_permute(heads: int) -> None:
    weight = np.random.default_rng(0).standard_normal((heads * 8, 5)).astype(np.float32)
    np.testing.assert_array_equal(unpermute(permute(weight, heads), heads), weight)
    np.testing.assert_array_equal(permute(unpermute(weight, heads), heads), weight)
    assert (permute(weight, heads) != weight).any()


def test_unpermute_is_the_order_that_rotate_half_needs() -> None:
    """Queries and keys from GGUF rows, rotated by neighbours, have the same products as ours."""
    rng, dim = np.random.default_rng(1), 8
    weights, x = rng.standard_normal((2, 3 * dim, 5)).astype(np.float32), rng.standard_normal(5)
    products = []
    for rows, pairs in (
        (weights, neighbours(dim)),
        ([unpermute(weight, 3) for weight in weights], halves(dim)),
    ):
        query, key = ((weight @ x).reshape(3, dim) for weight in rows)
        products.append(
            [
                rotate(q, 7, pairs, 1e4) @ rotate(k, 4, pairs, 1e4)
                for q, k in zip(query, key, strict=True)
            ]
        )
    np.testing.assert_allclose(products[0], products[1], rtol=1e-12)


def test_module_names_are_the_checkpoints() -> None:
    assert module_name("blk.12.ffn_gate.weight") == "model.layers.12.mlp.gate_proj"
    assert module_name("token_embd.weight") == "model.embed_tokens"


TINY = LlamaConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
    rope_theta=50.0,
)


def tiny_weights() -> dict[str, np.ndarray]:
    """Random weights by checkpoint name, linear ones [out, in]."""
    rng, c = np.random.default_rng(3), TINY
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = {
        "self_attn.q_proj": (queries, c.hidden_size),
        "self_attn.k_proj": (keys, c.hidden_size),
        "self_attn.v_proj": (keys, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, queries),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
        "input_layernorm": (c.hidden_size,),
        "post_attention_layernorm": (c.hidden_size,),
    }
    made = {"model.embed_tokens": (c.vocab_size, c.hidden_size), "model.norm": (c.hidden_size,)}
    for layer in range(c.num_hidden_layers):
        made |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.25
        for name, shape in made.items()
    }


def llama(ids: list[int], present: list[int], w: dict[str, np.ndarray]) -> np.ndarray:
    """The reference: LLaMA of one sequence, float64, head by head. Returns logits [S, V]."""
    c = TINY

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * w[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].astype(np.float64).T

    x = w["model.embed_tokens.weight"][ids].astype(np.float64)
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}"
        y, mixed = norm(x, f"{p}.input_layernorm"), []
        q, k, v = (
            linear(y, f"{p}.self_attn.{name}_proj").reshape(len(ids), -1, c.head_dim)
            for name in "qkv"
        )
        for head in range(c.num_attention_heads):
            group = head * c.num_key_value_heads // c.num_attention_heads
            turn = [
                [rotate(row[h], i, halves(c.head_dim), c.rope_theta) for i, row in enumerate(part)]
                for part, h in ((q, head), (k, group))
            ]
            scores = np.array(turn[0]) @ np.array(turn[1]).T / np.sqrt(c.head_dim)
            seen = np.tril(np.ones_like(scores)) * np.array(present)
            weights = np.where(seen > 0, np.exp(scores), 0)
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
        x = x + linear(np.concatenate(mixed, -1), f"{p}.self_attn.o_proj")
        y = norm(x, f"{p}.post_attention_layernorm")
        gate = linear(y, f"{p}.mlp.gate_proj")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(y, f"{p}.mlp.up_proj"), f"{p}.mlp.down_proj"
        )
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    dtype = smollm2.DTYPES[request.param]
    with path.with_name("model.onnx.data").open("wb") as data:
        writer = GraphWriter(data, "model.onnx.data")
        for name, value in tiny_weights().items():
            name, value = stored(name, value)
            writer.weight(name, value.astype(dtype))
        graph = LlamaGraph(writer, TINY, dtype)
        graph.build()
        writer.save(path, graph.inputs(), graph.outputs(), OPSET)
    return path


def test_llama_graph_computes_llama(tiny: Path) -> None:
    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0  # padding on the right: what is before it does not change
    mask[1, 2] = 0  # and a hole, which the tokens after it must not see
    session = ort.InferenceSession(tiny, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    reference = [
        llama(i.tolist(), m.tolist(), tiny_weights()) for i, m in zip(ids, mask, strict=True)
    ]
    # About 40 roundings in a row, of values up to about 10, as likely up as down.
    tolerance = np.sqrt(40) * 10 * float(np.finfo(logits.dtype).eps)
    np.testing.assert_allclose(logits, reference, rtol=0, atol=tolerance)
    holed = llama(ids[1].tolist(), [1] * 9, tiny_weights())
    assert np.abs(holed - reference[1])[3:6].max() > 3 * tolerance, "the mask would not be noticed"


def test_llama_graph_keeps_names_and_scopes(tiny: Path) -> None:
    model = onnx.load(tiny, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node), "two nodes with the same name"
    query = nodes["/model/layers.1/self_attn/q_proj/MatMul"]
    assert query.input[1] == "model.layers.1.self_attn.q_proj.weight_T"
    scopes = {item.key: item.value for item in query.metadata_props}[NAME_SCOPES]
    layer, path = "'model.layers.1', 'model.layers.1.self_attn'", "model.layers.1.self_attn.q_proj"
    assert scopes == f"['', 'model', {layer}, '{path}', 'matmul_10']"
    assert all(any(p.key == NAME_SCOPES for p in node.metadata_props) for node in nodes.values())
    readers = [n.op_type for n in nodes.values() if "model.embed_tokens.weight" in n.input]
    assert readers == ["Gather", "Transpose"]
    casts = sum("layernorm/Cast" in name for name in nodes)
    assert casts == (0 if "fp32" in str(tiny) else 2 * 2 * TINY.num_hidden_layers)


def test_weights_are_external_exact_and_aligned(tiny: Path) -> None:
    dtype = np.float16 if "fp16" in str(tiny) else np.float32
    content = tiny.with_name("model.onnx.data").read_bytes()
    tensors = {t.name: t for t in onnx.load(tiny, load_external_data=False).graph.initializer}
    for name, value in tiny_weights().items():
        name, value = stored(name, value)
        where = {item.key: item.value for item in tensors[name].external_data}
        offset, length = int(where["offset"]), int(where["length"])
        assert offset % 4096 == 0
        assert content[offset : offset + length] == value.astype(dtype).tobytes()
