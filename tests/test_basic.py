"""The row ops beyond what the registry checks: divergence, updates in place, merging, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from xlstm_distill import ops, reference, runtime


def relative(actual, expected) -> float:
    """Largest difference as a share of 1 + the largest expected value; NaN counts as infinite."""
    error = np.max(np.abs(np.asarray(actual) - expected), initial=0)
    error = float(error / (1 + np.max(np.abs(expected), initial=0)))
    return error if np.isfinite(error) else float("inf")


def heads(rows: int, width: int, vocab: int, dtype, seed: int = 0):
    """Hidden states and heads of a student and a teacher, and labels of which some do not count."""
    random = np.random.default_rng(seed)
    x, tx = (random.standard_normal((rows, width)).astype(dtype) for _ in range(2))
    w, tw = (random.standard_normal((vocab, width)).astype(dtype) for _ in range(2))
    return x, w, tx, tw, random.integers(-1, vocab, rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(1, 3, 2), (37, 29, 101), (530, 8, 33)])
def test_divergence_is_that_of_the_logits(dtype, tolerance, rows, width, vocab):
    x, w, tx, tw, labels = heads(rows, width, vocab, dtype)
    exact = [a.astype(np.float64) for a in (x, w, tx, tw)]
    expected = reference.divergence(exact[2] @ exact[3].T, exact[0] @ exact[1].T, labels)
    for found, wanted in zip(ops.head_divergence(x, w, tx, tw, labels), expected, strict=True):
        assert relative(found, wanted) < tolerance


def test_divergence_of_a_model_from_itself_is_zero():
    x, w, _, _, labels = heads(40, 16, 77, np.float32)
    kl, agree, nll, teacher_nll = ops.head_divergence(x, w, x, w, labels)
    assert np.all(kl < 1e-6) and np.all(kl >= 0) and np.all(agree == 1)
    assert np.array_equal(nll, teacher_nll)


def test_nan_in_a_head_stays_in_its_row():
    x, w, tx, tw, labels = heads(5, 4, 9, np.float32)
    x[2, 1] = np.nan
    kl, _, nll, _ = ops.head_divergence(x, w, tx, tw, np.abs(labels))
    assert np.isnan(kl[2]) and np.isnan(nll[2])
    assert np.isfinite(np.delete(kl, 2)).all() and np.isfinite(np.delete(nll, 2)).all()


def test_top_k_breaks_ties_by_the_lower_id():
    x, w = np.ones((3, 1), np.float32), np.array([[1], [2], [2], [0], [2]], np.float32)
    ids, logp, mass = ops.head_topk(x, w, 4)
    assert ids.tolist() == [[1, 2, 4, 0]] * 3
    assert relative(np.exp(logp).sum(1), mass) < 1e-6


def nucleus_by_sorting(p: np.ndarray, top_p: float) -> set[int]:
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order], dtype=np.float64) - p[order]
    return set(order[before < top_p * p.sum(dtype=np.float64)].tolist())


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_sampling_stays_in_the_nucleus_and_reaches_all_of_it(top_p, spread):
    random = np.random.default_rng(1)
    logits = np.round(random.standard_normal((1, 1500)) * spread, 1).astype(np.float32)
    p = np.exp(logits[0] - logits.max())
    allowed = nucleus_by_sorting(p, top_p)
    uniform = (np.arange(20_000) + 0.5) / 20_000
    tokens = ops.sample(np.repeat(logits, len(uniform), axis=0), 1.0, top_p, uniform)
    assert set(tokens.tolist()) <= allowed
    share = np.bincount(tokens, minlength=1500) / len(uniform)
    kept = np.where(np.isin(np.arange(1500), list(allowed)), p, 0)
    assert np.max(np.abs(share - kept / kept.sum())) <= 2 / len(uniform)


def test_sampling_from_far_apart_and_from_impossible_logits():
    z = np.array([[-np.inf, 0.0, -300.0, -np.inf]], np.float32)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert ops.sample(z, 1.0, 0.9, [uniform]).tolist() == [1]
        assert ops.sample(z, 1.0, 1.0, [uniform]).tolist() == [1]
        for little in (1e-38, 1e-39, 1e-308):  # 1 / temperature overflows in float32
            assert ops.sample(np.array([[1.0, 3.0, 2.0]], np.float32), little, 1.0, [uniform]) == 1
    for bad in (np.nan, np.inf):
        rows = np.zeros((4, 5), np.float32)
        rows[2:, 3] = bad
        with pytest.raises(FloatingPointError, match="logits of row 2 are not finite"):
            ops.sample(rows, 1.0, 0.9, np.zeros(4))


def vectors(n: int = 50_000, dtype=np.float32):
    random = np.random.default_rng(0)
    p, g = (random.standard_normal(n).astype(dtype) for _ in range(2))
    return p, g, np.zeros_like(p), np.zeros_like(p)


RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def test_adamw_updates_slices_of_a_buffer_without_copies():
    whole = vectors()
    part = [a[1000:40_001] for a in whole]
    alone = [a.copy() for a in part]
    before = whole[0].copy()
    ops.adamw_step(*part, **RATES, step=1, scale=0.5)
    ops.adamw_step(*alone, **RATES, step=1, scale=0.5)
    assert np.array_equal(part[0], alone[0]) and not np.array_equal(part[0], before[1000:40_001])
    assert np.array_equal(whole[0][:1000], before[:1000])
    assert np.array_equal(whole[0][40_001:], before[40_001:])


def test_adamw_refuses_what_it_would_have_to_copy():
    p, g, m, v = vectors(100)
    for bad, error, text in (
        ((p[::2], g[::2].copy(), m[::2].copy(), v[::2].copy()), ValueError, "contiguous"),
        ((p, p, m, v), ValueError, "p and g overlap"),
        ((p, g, m[:50], v), ValueError, "expected 100"),
        ((p, g.astype(np.float64), m, v), TypeError, "float64"),
        ((list(p), g, m, v), TypeError, "list"),
        ((p.reshape(10, 10), g, m, v), ValueError, "dimensions"),
    ):
        with pytest.raises(error, match=text):
            ops.adamw_step(*bad, **RATES, step=1)
    p.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        ops.adamw_step(p, g, m, v, **RATES, step=1)
    with pytest.raises(ValueError, match="step is 0"):
        ops.adamw_step(*vectors(9), **RATES, step=0)


def test_sums_do_not_depend_on_threads():
    x, y, *_ = vectors(300_001)
    before, found = runtime.threads(), set()
    try:
        for n in (1, 2, 3, 7):
            runtime.set_threads(n)
            found.add((ops.sumsq(x), ops.mse_forward(x, y)))
    finally:
        runtime.set_threads(before)
    assert len(found) == 1


def test_merge_adds_in_double_and_rounds_once():
    random = np.random.default_rng(1)
    arrays = [random.standard_normal((1027, 1033)).astype(np.float32) for _ in range(3)]
    weights = [0.3, 0.3, 0.4]
    exact = sum(w * a.astype(np.float64) for w, a in zip(weights, arrays, strict=True))
    assert np.array_equal(ops.merge_linear(arrays, weights), exact.astype(np.float32))
    out = arrays[1]  # may be one of the sources
    assert ops.merge_linear(arrays, weights, out=out) is out
    assert np.array_equal(out, exact.astype(np.float32))


def test_merge_does_not_read_an_array_of_weight_zero():
    bad = np.full((3, 4), np.nan, np.float32)
    good = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(ops.merge_linear([bad, good], [0.0, 1.0]), good)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda z: ops.linear_forward(z((3, 4)), z((5, 3))),
            ValueError,
            "w: size 3 in dimension 1",
        ),
        (lambda z: ops.linear_forward(z(3), z((5, 3))), ValueError, "x has 1 dimensions"),
        (lambda z: ops.linear_forward(z((1, 3)).astype(complex), z((5, 3))), TypeError, "complex"),
        (lambda z: ops.embedding_forward([0, 9], z((5, 3))), ValueError, "token id 9 at index 1"),
        (lambda z: ops.embedding_forward([0.5], z((5, 3))), TypeError, "integers"),
        (lambda z: ops.embedding_forward([1 << 40], z((5, 3))), ValueError, "32 bits"),
        (lambda z: ops.rope_forward(z((1, 1, 2, 6)), [[0, 1]], z(2)), ValueError, "inv_freq"),
        (lambda z: ops.rope_forward(z((1, 1, 2, 3)), [[0, 1]], z(1)), ValueError, "inv_freq"),
        (lambda z: ops.head_loss(z((2, 3)), z((4, 3)), [0, 4]), ValueError, "label 4 at row 1"),
        (lambda z: ops.head_loss(z((1, 3)), z((4, 3)), [0], [[0]]), TypeError, "go together"),
        (lambda z: ops.head_loss(z((1, 3)), z((4, 3)), [0], form="x"), ValueError, "form is 'x'"),
        (lambda z: ops.head_topk(z((2, 3)), z((4, 3)), 5), ValueError, "k is 5, expected 1 to 4"),
        (lambda z: ops.merge_linear([z(3), z(4)], [1, 2]), ValueError, "arrays\\[1\\] has shape"),
        (lambda z: ops.merge_linear([z(3)], [np.inf]), ValueError, "finite"),
        (lambda z: ops.rmsnorm_forward(z((2, 3)), z(4), 1e-5), ValueError, "w: size 4"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_argument(call, error, text):
    with pytest.raises(error, match=text) as info:
        call(np.zeros)
    assert "\n" not in str(info.value) and "%" not in str(info.value)


def test_empty_inputs_give_empty_results():
    z = np.zeros
    assert ops.linear_forward(z((0, 4)), z((5, 4))).shape == (0, 5)
    assert not ops.linear_forward(z((3, 0)), z((5, 0))).any()
    ce, kl, count, _, dw = ops.head_loss(z((0, 4)), z((5, 4)), np.zeros(0, int))
    assert (ce, kl, count) == (0, 0, 0) and not dw.any()
