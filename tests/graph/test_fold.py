"""A factor per channel, moved into what makes a tensor: the model computes what it did before."""

from __future__ import annotations

from pathlib import Path

import fold_patterns as f
import graph_models as g
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper as nh

from onnxq.errors import OnnxqError
from onnxq.graph.edit import Editor
from onnxq.graph.fold import Fold, find_fold
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save


def tensor(model: Model, name: str = "t") -> gs.Tensor:
    return model.graph.tensors()[name]


def layers(read: gs.Tensor) -> list[gs.Node]:
    return [n for n in read.outputs if n.op in ("MatMul", "Gemm", "Conv")]


def loaded(path: Path) -> Model:
    return prepare(Model.load(path), 0)[0]


def found(model: Model, name: str = "t", explicit: bool = False) -> Fold:
    read = tensor(model, name)
    fold = find_fold(model, read, layers(read), explicit=explicit)
    assert isinstance(fold, Fold), fold
    return fold


def operators(model: Model) -> list[str]:
    return sorted(n.op for n in model.graph.nodes)


def factors(fold: Fold, powers: bool) -> np.ndarray:
    rng = np.random.default_rng(5)
    if powers:
        return fold.shared(2.0 ** rng.integers(-3, 4, fold.size), "max")
    return fold.shared(rng.lognormal(0, 1, fold.size))


def aligned(s: np.ndarray, rank: int, axis: int) -> np.ndarray:
    return s.reshape([-1 if i == axis else 1 for i in range(rank)])


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("name", f.FOLDS)
def test_every_pattern(tmp_path: Path, name: str, powers: bool) -> None:
    """t becomes t / s, y stays, and no operator is added.

    Powers of two change exponents only: y is equal to the bit. For others each of up to 96 terms
    of a sum is rounded at most three times more, 2^-24 each (2^-11 in FP16): less than 3e-5
    (2e-3 for random signs) of the norm.
    """
    source = g.saved(f.FOLDS[name](), tmp_path / "in.onnx")
    feed = g.feed_of(source)
    model = loaded(source)
    before = operators(model)
    t = g.outputs_of(*_session(model, ["t"], feed))[0]
    y = g.outputs_of(source, feed)[0]

    fold = found(model)
    s = factors(fold, powers)
    editor = Editor(model)
    fold.apply(editor, s)
    editor.finish()
    assert set(operators(model)) <= set(before)
    assert len(operators(model)) <= len(before)
    out = save(model, tmp_path / "out.onnx")[0]
    t_now = g.outputs_of(*_session(loaded(out), ["t"], feed))[0]
    y_now = g.outputs_of(out, feed)[0]

    channels = aligned(s, t.ndim, 1 if layers(tensor(model))[0].op == "Conv" else t.ndim - 1)
    assert t_now.dtype == t.dtype and y_now.dtype == y.dtype
    want = t.astype(np.float64) / channels
    half = any(c.dtype == np.float16 for c in model.constants())
    loose = (2e-3 if half else 1e-5) * abs(want).max()
    np.testing.assert_allclose(t_now, want, rtol=1e-4, atol=loose)
    if powers:
        np.testing.assert_array_equal(y_now, y)
    assert _distance(y_now, y) < (2e-3 if half else 3e-5)


def _session(model: Model, outputs: list[str], feed: g.Feed) -> tuple[bytes, g.Feed, Path]:
    content, folder = model.session_model(outputs)
    wanted = {i.name for i in g.session(content, folder).get_inputs()}
    return content, {k: v for k, v in feed.items() if k in wanted}, folder


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_heads_that_share_keys_and_values_share_factors(tmp_path: Path) -> None:
    """Query heads 0 and 1 read one head of v, 2 and 3 the other: channel c of each pair is one."""
    path = g.saved(f.FOLDS["values of attention, 2 heads of 4, Expand"](), tmp_path / "in.onnx")
    fold = found(loaded(path))
    assert fold.tie is not None
    same = fold.tie[:, None] == fold.tie[None, :]
    head, channel = np.divmod(np.arange(32), 8)
    want = (head[:, None] // 2 == head[None, :] // 2) & (channel[:, None] == channel[None, :])
    np.testing.assert_array_equal(same, want)

    s = np.arange(1, 33, dtype=np.float64)
    first, second = s.reshape(4, 8)[0::2], s.reshape(4, 8)[1::2]
    pairs = np.stack([second, second], 1)
    np.testing.assert_array_equal(fold.shared(s, "max"), pairs.reshape(-1))
    means = np.sqrt(first * second)
    np.testing.assert_allclose(fold.shared(s), np.stack([means, means], 1).reshape(-1))
    model = loaded(path)
    with pytest.raises(OnnxqError, match="share a head have different factors"):
        found(model).apply(Editor(model), s)


def test_one_head_of_values_for_all(tmp_path: Path) -> None:
    path = "values broadcast over the heads by the product itself"
    fold = found(loaded(g.saved(f.FOLDS[path](), tmp_path / "in.onnx")))
    assert fold.tie is not None
    np.testing.assert_array_equal(fold.tie.reshape(4, 8), np.tile(fold.tie[:8], (4, 1)))
    assert len(set(fold.tie)) == 8


def test_no_heads_share_where_each_has_its_own(tmp_path: Path) -> None:
    path = g.saved(f.FOLDS["values of attention, 4 heads of 4, none"](), tmp_path / "in.onnx")
    assert found(loaded(path)).tie is None


def test_it_says_which_tensors_change(tmp_path: Path) -> None:
    """Their old statistics are wrong: up is divided too, the gate and what it activates are not."""
    model = loaded(g.saved(f.FOLDS["gated MLP"](), tmp_path / "in.onnx"))
    fold = found(model)
    assert [t.name for t, _ in fold.scaled] == ["t", "up"]
    assert fold.reason == "into wu of MatMul 'MatMul:up'"
    half = found(loaded(g.saved(f.FOLDS["GEGLU, both halves of one layer"](), tmp_path / "b.onnx")))
    names = {t.name: index for t, index in half.scaled}
    assert list(names) == ["t", "up", "b", "a"]
    np.testing.assert_array_equal(names["a"], [*[-1] * 40, *range(40)])


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize(
    "name", ["LayerNormalization, two readers", "InstanceNormalization, a depthwise Conv reads"]
)
def test_an_explicit_mul_where_nothing_takes_the_factor(
    tmp_path: Path, name: str, powers: bool
) -> None:
    proto = f.FOLDS[name]()
    proto.graph.output.add().name = "t"  # what leaves the model must stay as it is
    source = g.saved(proto, tmp_path / "in.onnx")
    model = loaded(source)
    feed = g.feed_of(source)
    y, t = g.outputs_of(source, feed)
    read, before = tensor(model), operators(model)
    assert find_fold(model, read, layers(read)) == "'t' is an output of the model"
    fold = found(model, explicit=True)
    assert fold.explicit and fold.reason.endswith("'t' is an output of the model")
    editor = Editor(model)
    edit = fold.apply(editor, factors(fold, powers))
    editor.finish()
    assert edit.verb == "scale"
    assert operators(model) == sorted([*before, "Mul"])
    out = save(model, tmp_path / "out.onnx")[0]
    y_now, t_now = g.outputs_of(out, feed)
    np.testing.assert_array_equal(t_now, t)
    if powers:
        np.testing.assert_array_equal(y_now, y)
    assert 0 < _distance(y_now, y) < 3e-5 or powers


STOPS = {
    "another reader": (
        "t = LayerNormalization <axis = -1> (x, c32)   u = Tanh(t)",
        "'t' is read by Tanh 'Tanh:u' too",
    ),
    "an activation": ("a = MatMul(x, w0)   t = Tanh(a)", "Tanh 'Tanh:t' passes no factor on"),
    "SiLU": (
        "a = MatMul(x, w0)   s = Sigmoid(a)   t = Mul(a, s)",
        "'a' is read by Sigmoid 'Sigmoid:s' too; Sigmoid 'Sigmoid:s' passes no factor on",
    ),
    "softmax": ("t = Softmax <axis = -1> (x)", "Softmax 'Softmax:t' passes no factor on"),
    "an input": ("t = Neg(x)", "'x' is an input of the model"),
    "an output": ("a = MatMul(x, w0)   u = Neg(a)   t = Relu(u)", "'u' is an output of the model"),
    "a residual stream": (
        "a = MatMul(x, w0)   b = MatMul(x, w1)   t = Add(a, b)   u = Add(b, x)",
        "'b' is read by Add 'Add:u' too",
    ),
    "twice the same": (
        "a = MatMul(x, w0)   t = Add(a, a)",
        "Add 'Add:t' reads 'a' twice",
    ),
    "a Clip at 6": (
        "a = MatMul(x, w0)   t = Clip(a, zero, six)",
        "Clip 'Clip:t' has limits other than 0",
    ),
    "channels mixed by a Reshape": (
        "a = MatMul(x, w0)   b = Transpose <perm = [0, 2, 1]> (a)   t = Reshape(b, mixed)",
        "Reshape 'Reshape:t' from [?, 32, ?] to [?, ?, 32] may mix channels",
    ),
    "a factor a token": (
        "a = Abs(x)   b = ReduceMax <keepdims = 1> (a, last)   t = Div(b, x)",
        "'b' has 1 values where 32 are rescaled",
    ),
    "a constant of other axes": (
        "a = MatMul(x, w0)   t = Add(a, rows)",
        "'rows' has other axes than the channels",
    ),
    "a channel taken twice": (
        "a = MatMul(x, w0)   t = Gather <axis = 2> (a, twice)",
        "Gather 'Gather:t' takes a channel twice",
    ),
    "tokens mixed": (
        "a = MatMul(x, w0)   b = Tanh(past)   c = Transpose <perm = [0, 2, 1]> (a)   "
        "t = MatMul(c, b)",
        "Tanh 'Tanh:b' passes no factor on",
    ),
    "an integer": ("t = Cast <to = 1> (many)", "Cast 'Cast:t' is not between floating-point types"),
    "values of a cache": (
        "v = MatMul(x, w0)   all = Concat <axis = 1> (past, v)   t = Relu(all)",
        "'past' is an input of the model",
    ),
}


def stopped(body: str, folder: Path) -> Path:
    """x [n, seq, 32], many, past -> t, which a MatMul reads, and u if the body makes it."""
    out = ", float[n, seq, d] u" if " u =" in body else ""
    proto = g.parsed(
        f"""<ir_version: 10, opset_import: ["": 18]>
        g (float[n, seq, 32] x, int64[n, seq, 32] many, float[n, seq, 32] past)
            => (float[n, seq, p] y{out}) {{ {body}   y = MatMul(t, w) }}""",
        *(g.weight(name, 32, 32) for name in ("w", "w0", "w1")),
        g.weight("c32", 32),
        nh.from_array(np.float32(0), "zero"),
        nh.from_array(np.float32(6), "six"),
        nh.from_array(np.array([-1], np.int64), "last"),
        nh.from_array(np.arange(32) // 2, "twice"),
        g.weight("rows", 8, 1),
        nh.from_array(np.array([0, -1, 32], np.int64), "mixed"),
    )
    return g.saved(proto, folder / "in.onnx")


@pytest.mark.parametrize("name", STOPS)
def test_reasons(tmp_path: Path, name: str) -> None:
    body, reason = STOPS[name]
    model = loaded(stopped(body, tmp_path))
    read = tensor(model)
    assert find_fold(model, read, layers(read)) == reason


def test_a_body_that_reads_the_tensor_stops_it(tmp_path: Path) -> None:
    model = loaded(g.saved(g.with_if(), tmp_path / "in.onnx"))
    read = tensor(model)
    assert find_fold(model, read, layers(read)) == "'t' is read by a subgraph"


def test_groups_have_gains_before_opset_21(tmp_path: Path) -> None:
    proto = g.parsed(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[n, 32, 4, 4] x) => (float[n, 8, 4, 4] y) {
            t = GroupNormalization <num_groups = 4> (x, gain, bias)   y = Conv(t, w)
        }""",
        *(g.weight("gain", 4), g.weight("bias", 4), g.weight("w", 8, 32, 1, 1)),
    )
    model = loaded(g.saved(proto, tmp_path / "in.onnx"))
    read = tensor(model)
    reason = find_fold(model, read, layers(read))
    assert isinstance(reason, str) and "has a gain a group, not a channel" in reason


def test_transposed_convolutions_in_groups(tmp_path: Path) -> None:
    proto = g.parsed(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[n, 8, 4, 4] x) => (float[n, 16, a, b] y) {
            t = ConvTranspose <group = 2> (x, w1)   y = Conv (t, w)
        }""",
        *(g.weight("w1", 8, 16, 2, 2), g.weight("w", 16, 32, 3, 3)),
    )
    model = loaded(g.saved(proto, tmp_path / "in.onnx"))
    read = tensor(model)
    assert find_fold(model, read, layers(read)) == "ConvTranspose 'ConvTranspose:t' has groups"


def test_readers_of_different_axes(tmp_path: Path) -> None:
    """8 channels for the Conv, 8 columns for the MatMul: not the same 8."""
    proto = g.parsed(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[n, 8, 4, 8] x) => (float[n, 8, 4, 8] y) {
            t = Mul(x, c)   a = Conv(t, w)   b = MatMul(t, v)   y = Add(a, b)
        }""",
        *(g.weight("c", 8, 1, 8), g.weight("w", 8, 8, 1, 1), g.weight("v", 8, 8)),
    )
    model = loaded(g.saved(proto, tmp_path / "in.onnx"))
    read = tensor(model)
    assert "do not agree on its channels" in str(find_fold(model, read, layers(read)))


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("y = MatMul(w, t)", "does not read 't' as its first operand"),
        ("y = Gemm <transA = 1> (t, w)", "reads its first operand transposed"),
        ("v = Relu(w)   y = MatMul(t, v)", "is computed or quantized"),
        ("a = MatMul(t, w)   b = MatMul(t, n)   y = Concat <axis = 1> (a, b)", ""),
    ],
)
def test_readers_that_take_no_factor(tmp_path: Path, reader: str, reason: str) -> None:
    proto = g.parsed(
        f"""<ir_version: 8, opset_import: ["": 18]>
        g (float[32, 32] x) => (float[p, q] y) {{ t = Mul(x, c)   {reader} }}""",
        *(g.weight("c", 32), g.weight("w", 32, 32), g.weight("n", 32, 8)),
    )
    model = loaded(g.saved(proto, tmp_path / "in.onnx"))
    read = tensor(model)
    fold = find_fold(model, read, layers(read))
    assert reason in fold if isinstance(fold, str) else not reason


def test_some_of_the_readers_are_not_all(tmp_path: Path) -> None:
    name = "LayerNormalization, two readers"
    model = loaded(g.saved(f.FOLDS[name](), tmp_path / "in.onnx"))
    read = tensor(model)
    assert find_fold(model, read, layers(read)[:1]) == "'t' is read by MatMul 'MatMul:b' too"
