"""In 16 bits a channel can be rescaled by so much: beyond, it overflows or loses its digits."""

from __future__ import annotations

from pathlib import Path

import fold_patterns as f
import graph_models as g
import numpy as np
import onnx
import pytest
from onnx import numpy_helper as nh
from test_fold import found, loaded

from onnxq.errors import OnnxqError
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand
from onnxq.graph.save import save
from onnxq.graph.weights import array

TINY = 2.0**-14  # FP16's smallest normal number
LIMIT = 0.9 * 65504


def scaled(gain: list[float], weight: list[float], dtype: type = np.float16) -> onnx.ModelProto:
    """t = LayerNorm(x) * gain + bias; y = t @ w, whose rows are `weight` throughout."""
    kind = "float16" if dtype == np.float16 else "float"
    count = len(gain)
    return g.parsed(
        f"""<ir_version: 10, opset_import: ["": 18]>
        g ({kind}[n, {count}] x) => ({kind}[n, 16] y) {{
            t = LayerNormalization <axis = -1> (x, gain, bias)   y = MatMul(t, w)
        }}""",
        nh.from_array(np.array(gain, dtype), "gain"),
        nh.from_array(np.full(count, TINY, dtype), "bias"),
        nh.from_array(np.repeat(np.array(weight, dtype)[:, None], 16, 1), "w"),
    )


def test_bounds_by_hand(tmp_path: Path) -> None:
    """Channel 0: a gain of 1 and weights of 1. 1: a large gain. 2: tiny weights. 3: a zero."""
    proto = scaled([1, 2.0**15, 1, 0], [1, 1, 2.0**-13, 1])
    low, high = found(loaded(g.saved(proto, tmp_path / "in.onnx"))).bounds()
    # Overflow of gain / s and of w * s; the largest of each must stay a normal number.
    np.testing.assert_allclose(low, [TINY, 2.0**15 / LIMIT, 0.5, TINY], rtol=1e-12)
    np.testing.assert_allclose(high, [1 / TINY, LIMIT, 2.0**14, LIMIT], rtol=1e-12)


def test_fp32_has_no_bounds_but_those_of_what_it_becomes(tmp_path: Path) -> None:
    proto = scaled([1, 1, 1, 1], [1, 1, 1, 1], np.float32)
    fold = found(loaded(g.saved(proto, tmp_path / "in.onnx")))
    low, high = fold.bounds()
    assert (low == 0).all() and np.isinf(high).all()
    low, high = fold.bounds("fp16")
    np.testing.assert_allclose(low, TINY)
    np.testing.assert_allclose(high, 1 / TINY)
    low, high = fold.bounds("bf16")
    assert (low < 2.0**-100).all() and (high > 2.0**100).all()


def test_activations_bound_it_where_their_maxima_are_known(tmp_path: Path) -> None:
    proto = scaled([1, 1, 1, 1], [1, 1, 1, 1])
    fold = found(loaded(g.saved(proto, tmp_path / "in.onnx")))
    low, high = fold.bounds(peaks={"t": np.array([LIMIT, LIMIT / 4, 1e-3, 0])})
    np.testing.assert_allclose(low, [1, 0.25, TINY, TINY], rtol=1e-6)
    np.testing.assert_allclose(high, [2.0**14, 2.0**14, 1e-3 / TINY, 2.0**14], rtol=1e-6)
    low, high = fold.bounds(peaks={"t": LIMIT / 2})  # of the whole tensor: no channel's least
    np.testing.assert_allclose(low, 0.5)
    np.testing.assert_allclose(high, 2.0**14)


def test_a_factor_of_1_is_always_within(tmp_path: Path) -> None:
    """Whatever the weights are now: at FP16's limit, or subnormal."""
    proto = scaled([65504, 2.0**-20, 1, 1], [1, 1, 65504, 2.0**-20])
    low, high = found(loaded(g.saved(proto, tmp_path / "in.onnx"))).bounds()
    np.testing.assert_allclose(low, [1, TINY, 1 / LIMIT, 1])
    np.testing.assert_allclose(high, [LIMIT, 1, 1, 2.0**14])


def test_a_bias_may_vanish(tmp_path: Path) -> None:
    """It is added to what does not; it may not overflow."""
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float16[n, 4] x) => (float16[n, 4] y) {
            a = MatMul(x, v)   t = Add(a, b)   y = MatMul(t, w)
        }""",
        nh.from_array(np.ones((4, 4), np.float16), "v"),
        nh.from_array(np.array([TINY, 2.0**15, 0, 1], np.float16), "b"),
        nh.from_array(np.ones((4, 4), np.float16), "w"),
    )
    low, high = found(loaded(g.saved(proto, tmp_path / "in.onnx"))).bounds()
    np.testing.assert_allclose(low, [TINY, 2.0**15 / LIMIT, TINY, TINY])
    np.testing.assert_allclose(high, 2.0**14)


def test_heads_that_share_factors_share_bounds(tmp_path: Path) -> None:
    name = "values of attention, 2 heads of 4, Expand"
    fold = found(loaded(g.saved(f.FOLDS[name](), tmp_path / "in.onnx")))
    assert fold.tie is not None
    peaks = np.linspace(1e3, 5e4, 32)
    low, _ = fold.bounds("fp16", {"t": peaks})
    strictest = peaks.reshape(2, 2, 8).max(1, keepdims=True) / LIMIT
    np.testing.assert_allclose(low, np.broadcast_to(strictest, (2, 2, 8)).reshape(-1))


@pytest.mark.parametrize("at", ["low", "high"])
def test_beyond_is_refused_and_at_the_bound_is_exact(tmp_path: Path, at: str) -> None:
    """Powers of two up to the bound: y stays to the bit, but for a bias that vanishes."""
    proto = scaled([1, 2.0**14, 2.0**-10, 1], [1, 2.0**-4, 2.0**12, 4])
    source = g.saved(proto, tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    fold = found(model)
    low, high = fold.bounds()
    edge = low if at == "low" else high
    nearest = np.exp2(np.ceil(np.log2(low)) if at == "low" else np.floor(np.log2(high)))
    for channel in range(4):
        s = np.ones(4)
        s[channel] = edge[channel] * (0.99 if at == "low" else 1.01)
        with pytest.raises(OnnxqError, match=f"channel {channel} cannot be rescaled by"):
            fold.apply(Editor(model), s)
    fold.apply(Editor(model), nearest)
    out = save(model, tmp_path / "out.onnx")[0]
    got, want = g.outputs_of(out, feed)[0], g.outputs_of(source, feed)[0]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=2**-10)


def test_a_weight_that_leaves_its_type_unnoticed_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folds may each be within their bounds when they are found, and beyond together."""
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float16[n, 32] x) => (float16[n, 32] y) { t = Mul(x, c)   y = MatMul(t, w) }""",
        nh.from_array(np.full(32, 1, np.float16), "c"),
        nh.from_array(np.full((32, 32), 8, np.float16), "w"),
    )
    model = Model.load(g.saved(proto, tmp_path / "in.onnx"))
    fold = found(model)
    monkeypatch.setattr(type(fold), "bounds", lambda self: (np.zeros(32), np.full(32, np.inf)))
    fold.apply(Editor(model), np.full(32, 2.0**13))
    with pytest.raises(OnnxqError, match="'w' leaves the range of its type"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gain_is_not_rounded_where_the_weights_can_take_it(tmp_path: Path, dtype: type) -> None:
    """gain / s in FP16 would be off by up to 2^-11, for every token alike."""
    gain = np.linspace(0.5, 3, 32).astype(np.float16)
    weight = np.exp2(np.arange(32) % 4)
    source = g.saved(scaled(list(gain), list(weight), dtype), tmp_path / "in.onnx")
    model = loaded(source)
    fold = found(model)
    s = np.random.default_rng(0).lognormal(0, 0.5, 32)
    near = fold.rounded(s, "fp16")
    exact = gain.astype(np.float64) / near
    assert (np.abs(exact.astype(np.float16) - exact) <= 2.0**-50 * exact).all()
    assert 0 < np.abs(near / s - 1).max() <= 2**-11
    fold.apply(Editor(model), s)  # of a gain in FP16 it does so by itself
    operands = {n.op: constant_operand(n, 1) for n in model.graph.nodes}
    new_gain, new_weight = (operands[op] for op in ("LayerNormalization", "MatMul"))
    assert new_gain is not None and new_weight is not None
    ratio = array(new_gain.constant).astype(np.float64) * new_weight.load()[:, 0]
    want = gain.astype(np.float64) * weight
    if dtype == np.float16:  # FP16's rounding of the gain is gone; float32's of the weight stays
        np.testing.assert_allclose(ratio, want, rtol=2**-23)
    else:
        np.testing.assert_array_equal(fold.rounded(s), s)
