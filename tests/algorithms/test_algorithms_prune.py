"""Patterns of zeros, and the weights beside them, against forms written out here."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from onnxq import numerics
from onnxq.algorithms.alps import alps
from onnxq.algorithms.gptq import Sweep
from onnxq.algorithms.hessian import damped
from onnxq.algorithms.refit import refit
from onnxq.algorithms.sparsegpt import sparsegpt, sparsegpt_rounded
from onnxq.algorithms.wanda import magnitude_scores, wanda_scores
from onnxq.errors import OnnxqError
from onnxq.formats import PerBlock, QuantScheme, quant_format
from onnxq.sparsity import Pattern

TWO_OF_FOUR = Pattern.parse("2:4")
INT4 = QuantScheme(quant_format("int4"), PerBlock(0, 16), "float32")


def _inputs(rows: int, k: int, seed: int) -> np.ndarray:
    """Rows whose neighbouring channels are alike and of unlike sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k))
    for i in range(1, k):
        x[:, i] = 0.8 * x[:, i - 1] + 0.6 * x[:, i]
    return x * np.exp(rng.standard_normal(k))


def _weight(k: int, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def _masks(keep: int, group: int, k: int) -> list[np.ndarray]:
    """Every mask [k] that keeps `keep` of each `group`."""
    ones = [[i in chosen for i in range(group)] for chosen in combinations(range(group), keep)]
    return [np.concatenate(parts) for parts in product(np.array(ones), repeat=k // group)]


def _error(V: np.ndarray, W: np.ndarray, H: np.ndarray) -> float:
    E = (V - W).astype(np.float64)
    return float(np.trace(E.T @ H @ E))


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:3"])
def test_of_all_masks_it_takes_the_one_of_largest_scores(text: str) -> None:
    keep, group = map(int, text.split(":"))
    scores = np.abs(_weight(group, 50, 0))
    found = Pattern.parse(text).mask(scores)
    for n in range(50):
        best = max(_masks(keep, group, group), key=lambda m: scores[m, n].sum())
        np.testing.assert_array_equal(found[:, n], best)


def test_of_equal_scores_the_first_stay() -> None:
    found = TWO_OF_FOUR.mask(np.ones((8, 1)))
    assert found[:, 0].tolist() == [True, True, False, False] * 2


def test_a_share_is_taken_of_every_output() -> None:
    scores = np.abs(_weight(40, 9, 1))
    found = Pattern.parse("0.3").mask(scores)
    assert (found.sum(axis=0) == 28).all()
    for n in range(9):
        assert scores[found[:, n], n].min() > scores[~found[:, n], n].max()


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "1.5", "0", "1.0", "half", "2:4:8", "2:400"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(OnnxqError, match="no pattern of zeros"):
        Pattern.parse(text)


def test_a_pattern_is_judged_along_its_axis() -> None:
    W = _weight(16, 16, 2) * TWO_OF_FOUR.mask(np.abs(_weight(16, 16, 2)))
    assert TWO_OF_FOUR.holds(W == 0, 0)
    assert not TWO_OF_FOUR.holds(W == 0, 1)
    assert TWO_OF_FOUR.holds(W.T == 0, 1)
    W[0:4, 3] = [1, 2, 3, 0]
    assert not TWO_OF_FOUR.holds(W == 0, 0)
    assert not TWO_OF_FOUR.holds(np.ones((6, 2), bool), 0)  # no multiple of four
    assert Pattern.parse("0.25").holds(np.eye(4, dtype=bool), 0)
    assert not Pattern.parse("0.5").holds(np.eye(4, dtype=bool), 0)


def test_wanda_is_the_best_mask_where_inputs_have_nothing_in_common() -> None:
    """With a diagonal H and weights left as they are, by trying all 36 masks of two groups."""
    W, h = _weight(8, 12, 3), np.random.default_rng(4).uniform(0.1, 9, 8)
    mask = TWO_OF_FOUR.mask(wanda_scores(W, h))
    for n in range(12):
        tried = [_error((W[:, n] * m)[:, None], W[:, [n]], np.diag(h)) for m in _masks(2, 4, 8)]
        found = _error((W[:, n] * mask[:, n])[:, None], W[:, [n]], np.diag(h))
        assert found == pytest.approx(min(tried))
    assert (TWO_OF_FOUR.mask(magnitude_scores(W)) != mask).any()


@pytest.mark.parametrize("act_order", [False, True])
def test_there_sparsegpt_is_wanda(act_order: bool) -> None:
    W, h = _weight(64, 12, 5), np.random.default_rng(6).uniform(0.1, 9, 64)
    sweep = Sweep(np.diag(h), damp=0.0, act_order=act_order, group=4)
    values, keep = sparsegpt(sweep, W, TWO_OF_FOUR)
    np.testing.assert_array_equal(keep, TWO_OF_FOUR.mask(wanda_scores(W, h)))
    np.testing.assert_array_equal(values, W * keep)


def _naive(
    W: np.ndarray, H: np.ndarray, pattern: tuple[int, int], step: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT one input at a time, with the inverse of what is left of H computed each time."""
    keep_n, group = pattern
    K, N = W.shape
    rest, keep = W.astype(np.float64).copy(), np.zeros(W.shape, bool)
    out = np.zeros((K, N))
    for k in range(K):
        if k % group == 0:
            for n in range(N):
                gains = []
                for i in range(k, k + group):
                    own = np.linalg.inv(H[i:, i:])[0, 0]
                    w = rest[i, n]
                    q = 0.0 if step is None else np.clip(np.rint(w / step[i, n]), -8, 7)
                    left = 0.0 if step is None else (w - q * step[i, n]) ** 2
                    gains.append((w * w - left) / own)
                for i in np.argsort(gains)[::-1][:keep_n]:
                    keep[k + i, n] = True
        inverse = np.linalg.inv(H[k:, k:])
        wanted = rest[k] * keep[k]
        if step is not None:
            wanted = np.clip(np.rint(wanted / step[k]), -8, 7) * step[k]
        out[k] = wanted
        rest[k:] -= np.outer(inverse[0] / inverse[0, 0], rest[k] - wanted)
    return out, keep


@pytest.mark.parametrize("text", ["2:4", "4:8", "2:3"])
def test_sparsegpt_is_the_algorithm_as_it_is_written(text: str) -> None:
    """150 inputs cross the lazy blocks. The sweep's float32 differs by 1e-6 a step."""
    k, n = 168, 6
    X, W = _inputs(600, k, 7), _weight(k, n, 8)
    H = damped(X.T @ X / 600, 0.01)
    keep_n, group = map(int, text.split(":"))
    sweep = Sweep(X.T @ X / 600, act_order=False, group=group)
    values, keep = sparsegpt(sweep, W, Pattern.parse(text))
    wanted, mask = _naive(W, H, (keep_n, group), None)
    np.testing.assert_array_equal(keep, mask)
    np.testing.assert_allclose(values, wanted, atol=2e-4)
    assert (values[~keep] == 0).all()
    assert not np.signbit(values[~keep]).any()  # FP8's -0 is another code than its 0


def test_jointly_it_is_the_algorithm_as_it_is_written() -> None:
    k, n = 144, 6
    X, W = _inputs(600, k, 9), _weight(k, n, 10)
    H = damped(X.T @ X / 600, 0.01)
    peak = numerics.peaks(W, INT4.granularity)
    step = numerics.steps(numerics.scales_for(peak, INT4), INT4, W.shape)
    sweep = Sweep(X.T @ X / 600, act_order=False, group=4)
    grid, keep = sparsegpt_rounded(sweep, W, TWO_OF_FOUR, step, INT4.format)
    wanted, mask = _naive(W, H, (2, 4), step)
    assert np.mean(keep != mask) < 0.01  # float32 beside a tie moves what follows in its column
    same = (keep == mask).all(axis=0)
    assert same.sum() >= n - 1
    assert np.mean(np.abs(grid * step - wanted)[:, same] > 1e-4) < 0.01
    assert not np.signbit(grid[~keep]).any()
    assert TWO_OF_FOUR.holds(grid == 0, 0)


def test_groups_keep_their_inputs_whatever_the_order() -> None:
    X, W = _inputs(400, 96, 11), _weight(96, 24, 12)
    H = X.T @ X / 400
    sweep = Sweep(H, group=4)
    assert (sweep.order.reshape(-1, 4) % 4 == np.arange(4)).all()
    heavy = np.diag(H).reshape(-1, 4).sum(axis=1)[sweep.order[::4] // 4]
    assert (np.diff(heavy) <= 0).all()
    values, _ = sparsegpt(sweep, W, TWO_OF_FOUR)
    assert TWO_OF_FOUR.holds(values == 0, 0)
    plain = W * TWO_OF_FOUR.mask(wanda_scores(W, np.diag(H)))
    assert _error(values, W, H) < 0.7 * _error(plain, W, H)


def test_a_share_is_swept_too() -> None:
    X, W = _inputs(800, 300, 13), _weight(300, 16, 14)
    H, pattern = X.T @ X / 800, Pattern.parse("0.5")
    values, _ = sparsegpt(Sweep(H, act_order=False), W, pattern)
    assert pattern.holds(values == 0, 0)
    plain = W * pattern.mask(wanda_scores(W, np.diag(H)))
    assert _error(values, W, H) < 0.7 * _error(plain, W, H)


def test_refit_is_least_squares() -> None:
    """Against numpy.linalg.lstsq on the inputs each output keeps, from two starts."""
    X, W = _inputs(500, 48, 15), _weight(48, 10, 16)
    keep = TWO_OF_FOUR.mask(np.abs(W))
    H = X.T @ X / 500
    for start in (None, np.zeros_like(W)):
        found = refit(W, keep, H, start, passes=500)
        assert (found[~keep] == 0).all()
        for n in range(10):
            kept = keep[:, n]
            best = np.linalg.lstsq(X[:, kept], X @ W[:, n], rcond=None)[0]
            fitted = np.zeros(48)
            fitted[kept] = best
            least = np.sum((X @ (fitted - W[:, n])) ** 2)
            assert np.sum((X @ (found[:, n] - W[:, n])) ** 2) <= 1.001 * least


def test_refit_leaves_channels_that_are_never_fed() -> None:
    X, W = _inputs(200, 16, 17), _weight(16, 4, 18)
    X[:, 5] = 0
    keep = TWO_OF_FOUR.mask(np.abs(W))
    found = refit(W, keep, damped(X.T @ X / 200, 0.01))
    np.testing.assert_allclose(found[5], (W * keep)[5], rtol=1e-5)


def test_of_all_masks_sparsegpt_finds_a_good_one() -> None:
    """Two groups, every mask with its least squares: the best, and how near each method comes.

    The bounds are what the seeds give, with a third to spare; magnitude is off by far more.
    """
    X, W = _inputs(300, 8, 19), _weight(8, 40, 20)
    H = X.T @ X / 300
    least = np.full(40, np.inf)
    for m in _masks(2, 4, 8):
        mask = np.repeat(m[:, None], 40, 1)
        fitted = refit(W, mask, H, passes=200)
        errors = np.einsum("kn,kj,jn->n", fitted - W, H, fitted - W)
        least = np.minimum(least, errors)
    swept, keep = sparsegpt(Sweep(H, group=4, damp=1e-6), W, TWO_OF_FOUR)
    ratio = _error(swept, W, H) / least.sum()
    fitted = _error(refit(W, keep, H, swept, passes=200), W, H) / least.sum()
    plain = _error(W * TWO_OF_FOUR.mask(np.abs(W)), W, H) / least.sum()
    _, settled = alps(W, H, TWO_OF_FOUR)
    alternated = _error(refit(W, settled, H, passes=200), W, H) / least.sum()
    assert 1 <= alternated < 1.3
    assert 1 <= fitted < 1.3
    assert fitted < ratio < 2.4
    assert plain > 5


@pytest.mark.parametrize("text", ["2:4", "1:2", "0.5"])
def test_alternating_where_inputs_have_nothing_in_common_is_wanda(text: str) -> None:
    """There each weight answers for itself, and nothing has a reason to change sides."""
    pattern, W = Pattern.parse(text), _weight(64, 24, 5)
    H = np.diag(np.exp(np.random.default_rng(6).standard_normal(64)))
    found, keep = alps(W, H, pattern)
    np.testing.assert_array_equal(keep, pattern.mask(wanda_scores(W, np.diag(H))))
    np.testing.assert_allclose(found, np.where(keep, W, 0), rtol=1e-4)


def test_alternating_has_the_pattern_and_beats_the_sweep() -> None:
    """On correlated inputs, with the least squares that belong behind both."""
    X, W = _inputs(400, 96, 21), _weight(96, 64, 22)
    H = X.T @ X / 400
    values, keep = alps(W, damped(H, 0.1), TWO_OF_FOUR)
    assert TWO_OF_FOUR.holds(values == 0, 0) and not values[~keep].any()
    _, other = sparsegpt(Sweep(H, group=4, damp=0.1), W, TWO_OF_FOUR)
    errors = [_error(refit(W, k, damped(H, 0.01)), W, H) for k in (keep, other)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("seed", range(3))
def test_on_correlated_inputs_alps_halves_what_sparsegpt_loses(seed: int) -> None:
    """H of an AR(1) process, rho .9; one pass, or passes without duals, lose twice SparseGPT's."""
    places = np.arange(64)
    H = 0.9 ** np.abs(np.subtract.outer(places, places))
    W = _weight(64, 48, seed)
    swept, _ = sparsegpt(Sweep(H, group=4), W, TWO_OF_FOUR)
    values, keep = alps(W, H, TWO_OF_FOUR)
    assert _error(values, W, H) < 0.6 * _error(swept, W, H)
    assert _error(values, W, H) < 1.05 * _error(refit(W, keep, H), W, H)  # of that mask the best
