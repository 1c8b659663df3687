"""LoLCATs against torch and its own promises: keys counted once, documents, scores, threads.

The registry (cases.py) compares the op with the reference at small sizes, test_model.py the model's
gradients, prefill and steps. Here are the sizes that cross blocks, chunks and segments.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import MIXERS, random_batch, random_model
from tolerances import DOCUMENT_MOVED, MIXED_OP, OP_F32, OP_F64, PREFILL_STEP_F32

from xlstm_distill import ops, reference
from xlstm_distill.reference.attention import FEATURE_MAPS
from xlstm_distill.testing import assert_close, seeded

NAMES = ("y", "dq", "dk", "dv", "dw_q", "dw_k", "dfactor")
SPANS = [(1, 0), (64, 0), (20, 4), (300, 2)]
by_span = pytest.mark.parametrize("window, sinks", SPANS)


def inputs(shape, dtype=np.float64):
    """q, k, v, w_q, w_k, factor and dy of B, H, G, T, D."""
    b, h, g, t, d = shape
    rng = seeded("lolcats", shape)
    sizes = [(b, h, t, d), (b, g, t, d), (b, g, t, d), (h, d, d), (h, d, d), (h,), (b, h, t, d)]
    scales = (2, 1, 1, 0.3, 0.3, 1, 1)
    return [
        (scale * rng.standard_normal(size)).astype(dtype)
        for scale, size in zip(scales, sizes, strict=True)
    ]


def starts(batch, steps, *at):
    """reset [B, T], True at the steps `at` of every row."""
    reset = np.zeros((batch, steps), bool)
    reset[:, list(at)] = True
    return reset


def both(*x, **options):
    """Output and gradients for inputs with dy last."""
    *x, dy = x
    return ops.lolcats_forward(*x, **options), *ops.lolcats_backward(dy, *x, **options)


def compare(found, expected, tolerance, what):
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert_close(x, y, tolerance, f"{what} {name}")


def torch_lolcats(*arrays, window, sinks, reset, feature_map):
    """The same from torch's differentiation of the definition, in float64, query by query."""
    *x, dy = (torch.from_numpy(a.astype(np.float64)) for a in arrays)
    for a in x:
        a.requires_grad_()
    q, k, v, w_q, w_k, factor = x
    heads, steps, width = q.shape[1:]
    k, v = (a.repeat_interleave(heads // a.shape[1], dim=1) for a in (k, v))

    def features(rows, w):
        if feature_map == "elu":
            return torch.nn.functional.elu(rows @ w) + 1 + 1e-6 / width
        return (torch.softmax(rows @ w, dim=-1) + 1e-6 / width) / (1 + 1e-6)

    phi_q, phi_k, g = features(q, w_q), features(k, w_k), torch.sigmoid(factor)[:, None]
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(steps):
            start = max(np.flatnonzero(reset[b, : t + 1]), default=0)
            near = [s for s in range(start, t + 1) if t - s < window or s - start < sinks]
            far = sorted(set(range(start, t + 1)) - set(near))
            z = torch.einsum("hd,hsd->hs", q[b, :, t], k[b][:, near]) / width**0.5
            a = g * torch.exp(z - torch.amax(z, dim=1, keepdim=True))
            c = torch.einsum("hd,hsd->hs", phi_q[b, :, t], phi_k[b][:, far])
            num = torch.einsum("hs,hsd->hd", a, v[b][:, near])
            num = num + torch.einsum("hs,hsd->hd", c, v[b][:, far])
            y[b, :, t] = num / (a.sum(dim=1) + c.sum(dim=1))[:, None]
    y.backward(dy)
    return [y.detach().numpy(), *(a.grad.numpy() for a in x)]


@by_span
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, OP_F64), (np.float32, OP_F32)])
def test_equals_torch(window, sinks, dtype, tolerance, feature_map):
    x = inputs((2, 4, 2, 340, 12), dtype)
    how = {"window": window, "sinks": sinks, "reset": starts(2, 340, 0, 25)}
    how["feature_map"] = feature_map
    compare(both(*x, **how), torch_lolcats(*x, **how), tolerance, f"W{window}")


@pytest.mark.parametrize("steps", [1, 30, 100])
def test_a_window_over_the_row_is_softmax_attention(steps):
    *x, dy = inputs((2, 4, 2, steps, 8))
    y, *d = both(*x, dy, window=100)
    q, k, v, *_ = x
    assert_close(y, ops.attention_forward(q, k, v), OP_F64, "wide window")
    expected = ops.attention_backward(dy, q, k, v)
    for found, exact in zip(d[:3], expected, strict=True):
        assert_close(found, exact, OP_F64, "wide window, gradient")
    assert not any(dw.any() for dw in d[3:5])


def test_a_window_that_weighs_nothing_is_linear_attention():
    q, k, v, w_q, w_k, factor, _ = inputs((1, 2, 2, 150, 8))
    y = ops.lolcats_forward(q, k, v, w_q, w_k, np.full_like(factor, -400), window=5)
    weights = ops.feature_map_forward(q, w_q) @ ops.feature_map_forward(k, w_k).swapaxes(2, 3)
    weights *= np.tri(150, k=-5)
    expected = (weights @ v)[:, :, 5:] / weights.sum(axis=-1, keepdims=True)[:, :, 5:]
    assert_close(y[:, :, 5:], expected, OP_F64, "linear part")


@by_span
def test_every_key_of_the_document_is_counted_once(window, sinks):
    """With values that say where they come from, weights can be read from the output."""
    q, k, _, w_q, w_k, factor, _ = inputs((1, 2, 1, 90, 90))
    reset = starts(1, 90, 40)
    v = np.eye(90)[None, None]
    weights = ops.lolcats_forward(q, k, v, w_q, w_k, factor, window, sinks, reset)
    document = np.cumsum(reset[0])
    own = np.tri(90, dtype=bool) & (document[:, None] == document[None, :])
    assert (weights[:, :, own] > 0).all() and not weights[:, :, ~own].any()
    assert_close(weights.sum(axis=-1), np.ones((1, 2, 90)), OP_F64, "sum of weights")


def test_a_shift_of_a_querys_scores_changes_nothing():
    """As in softmax: the largest score is part of the function."""
    q, k, v, w_q, w_k, factor, _ = inputs((1, 2, 2, 100, 8))
    w_q[:, 0] = w_k[:, 0] = 0  # the features do not see the first entry, in which the scores move
    k[..., 0] = 1
    y = ops.lolcats_forward(q, k, v, w_q, w_k, factor, window=16)
    q[..., 0] += 300
    shifted = ops.lolcats_forward(q, k, v, w_q, w_k, factor, window=16)
    assert_close(shifted, y, 1e3 * OP_F64, "shifted scores")  # of size 300 / sqrt(8)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_large_scores_in_float32(size):
    """No exponential exceeds 1 and the divisor is at least the window's factor."""
    q, k, v, w_q, w_k, factor, dy = inputs((1, 2, 1, 200, 16), np.float32)
    x = (size * q, k, v, w_q, w_k, factor, dy)
    how = {"window": 32, "sinks": 1}
    exact = [a.astype(np.float64) for a in x]
    y, *d = both(*x, **how)
    assert all(np.isfinite(a).all() for a in (y, *d))
    # an error of 6e-8 of a score is one of its weight: no tighter than softmax attention
    assert_close(y, reference.lolcats_forward(*exact[:-1], **how), OP_F32 * max(1, size), "large")


@by_span
def test_other_documents_do_not_change_a_bit_and_their_nan_stays(window, sinks):
    x = inputs((1, 4, 2, 400, 8), np.float32)
    reset, own = starts(1, 400, 90, 350), slice(90, 350)
    expected = both(*x, window=window, sinks=sinks, reset=reset)
    for fill in (3.0, np.nan):
        other = [a.copy() for a in x]
        for a in (*other[:3], other[6]):
            a[:, :, :90] = a[:, :, 350:] = fill
        found = both(*other, window=window, sinks=sinks, reset=reset)
        for name, a, b in zip(NAMES[:4], found, expected, strict=False):
            assert np.array_equal(a[:, :, own], b[:, :, own]), name
    alone = [a if a.ndim < 4 else np.ascontiguousarray(a[:, :, own]) for a in x]
    found = both(*alone, window=window, sinks=sinks)
    for name, a, b in zip(NAMES[:4], found, expected, strict=False):
        assert_close(a, b[:, :, own], DOCUMENT_MOVED, f"moved {name}")


@pytest.mark.parametrize("mixed", [False, True])
@by_span
def test_threads_rows_and_heads_do_not_change_a_bit(window, sinks, mixed, runtime):
    x = inputs((3, 4, 2, 330, 16), np.float32)
    how = {"sinks": sinks, "window": window, "mixed": mixed}
    reset = starts(3, 330, 100)
    runtime.set_threads(1)
    expected = both(*x, reset=reset, **how)
    for threads in (2, 3):
        runtime.set_threads(threads)
        for name, a, b in zip(NAMES, both(*x, reset=reset, **how), expected, strict=True):
            assert np.array_equal(a, b), f"{name}, {threads} threads"
    row = [a if a.ndim < 4 else a[1:2] for a in x]
    for a, b in zip(both(*row, reset=reset[1:2], **how)[:4], expected, strict=False):
        assert np.array_equal(a, b[1:2])


@by_span
def test_operands_alone_are_rounded(window, sinks):
    x = inputs((1, 4, 2, 330, 64), np.float32)
    exact, found = (both(*x, window=window, sinks=sinks, mixed=mixed) for mixed in (False, True))
    for name, a, b in zip(NAMES, found, exact, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= MIXED_OP, f"{name}: {error:.4f}"


def test_equal_largest_scores():
    """Of equal scores the first is the largest, and its key gets the gradient of the maximum."""
    *x, dy = inputs((1, 1, 1, 60, 8))
    x[1][:, :, 20:30] = x[1][:, :, 20:21]
    found = ops.lolcats_backward(dy, *x, window=40)
    expected = reference.lolcats_backward(dy, *x, window=40)
    compare((0, *found), (0, *expected), OP_F64, "equal scores")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"feature_map": "relu"}, "feature_map is 'relu', expected one of softmax, elu"),
        ({"factor": np.zeros(3)}, r"factor has shape \(3,\), expected \(4,\)"),
        ({"w_k": np.zeros((4, 8, 7))}, "w_k has shape"),
        ({"v": np.zeros((1, 3, 20, 8))}, "v has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("q", "k", "v", "w_q", "w_k", "factor")
    given = dict(zip(names, inputs((1, 4, 2, 20, 8)), strict=False))
    with pytest.raises(ValueError, match=message):
        ops.lolcats_forward(**{**given, "window": 4, **change})


# ---- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lolcats", "lolcats with sinks", "lolcats elu"])
def test_pieces_and_steps_equal_the_forward(name):
    """Pieces shorter and longer than the window, and single steps, in float64."""
    model = random_model(name, dtype=np.float64)
    ids, _, _ = random_batch(model, 2, 70)
    whole = model.hidden(ids)
    state, t = model.new_state(2), 0
    for n in (1, 1, 3, 7, 1, 8, 20, 1, 1, 1, 26):
        part, state = model.hidden_after(ids[:, t : t + n], state)
        assert_close(part, whole[:, t : t + n], OP_F64, f"piece of {n} at {t}")
        t += n
    assert t == 70


def test_the_state_does_not_grow():
    model = random_model("lolcats")
    state = model.new_state(1, 10)
    before = state.nbytes
    _, state = model.prefill(np.arange(60)[None] % 61, state)
    assert state.nbytes == before


def test_a_window_that_the_first_tokens_fit_in_grows_with_full_attention():
    """Beside a layer of full attention, whose cache grows, the window begins with fewer slots."""
    wide = MIXERS["lolcats"].model_copy(update={"window": 300, "sinks": 2})
    model = random_model(mixers=[wide, MIXERS["attention"]])
    ids, _, _ = random_batch(model, 1, 620)
    whole = model.hidden(ids)
    state, parts, t = model.new_state(1), [], 0
    for n in (200, 1, 150, 1, 1, 267):
        part, state = model.hidden_after(ids[:, t : t + n], state)
        parts.append(part)
        t += n
    assert_close(np.concatenate(parts, axis=1), whole, PREFILL_STEP_F32, "grown state")
