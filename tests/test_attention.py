"""Attention against torch, finite differences and its own promises: documents, cache, ragged rows.

The registry (cases.py) compares it with the reference at small sizes; here are the sizes that cross
blocks, chunks and segments, and the parts that the public functions do not show.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tolerances import DOCUMENT_MOVED, GRADIENT_F64, OP_F32, OP_F64, PREFILL_STEP_F32

from xlstm_distill import ops, reference
from xlstm_distill.runtime import core
from xlstm_distill.testing import assert_close, directional_derivative, inner, seeded

both_types = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])

# window, sinks: narrow blocks with one chunk, wide blocks with several, everything
SPANS = [(1, 0), (5, 3), (64, 4), (300, 4), (None, 0)]
by_span = pytest.mark.parametrize("window, sinks", SPANS)


def inputs(shape, dtype=np.float64, name="attention"):
    """q, k, v, do of B, H, G, T, D."""
    b, h, g, t, d = shape
    rng = seeded(name, shape)
    sizes = [(b, h, t, d), (b, g, t, d), (b, g, t, d), (b, h, t, d)]
    return [rng.standard_normal(s).astype(dtype) for s in sizes]


def starts(batch, steps, *at):
    """reset [B, T], True at the steps `at` of every row."""
    reset = np.zeros((batch, steps), bool)
    reset[:, list(at)] = True
    return reset


def both(q, k, v, do, *options):
    return ops.attention_forward(q, k, v, *options), *ops.attention_backward(do, q, k, v, *options)


def torch_attention(q, k, v, do, **how):
    """The same results from torch in float64."""
    q, k, v = (torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (q, k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    o.backward(torch.from_numpy(do.astype(np.float64)))
    return [x.numpy() for x in (o.detach(), q.grad, k.grad, v.grad)]


def compare(found, expected, tolerance, what):
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
        assert_close(x, y, tolerance, f"{what} {name}")


# ---- oracles ------------------------------------------------------------------------------------


@both_types
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 4), (2, 6, 2, 85, 16), (1, 3, 1, 350, 64), (1, 2, 2, 40, 300)]
)
def test_full_attention_equals_torch(shape, dtype):
    arrays = inputs(shape, dtype)
    expected = torch_attention(*arrays, is_causal=True)
    compare(both(*arrays), expected, OP_F64 if dtype == np.float64 else OP_F32, "torch causal")


@both_types
@by_span
def test_window_sinks_and_documents_equal_torch(window, sinks, dtype):
    arrays = inputs((2, 6, 2, 420, 16), dtype)
    reset = starts(2, 420, 3, 31, 370)
    reset[1, [3, 31]] = False
    mask = torch.from_numpy(reference.attention.visible(2, 420, window, sinks, reset))
    expected = torch_attention(*arrays, attn_mask=mask[:, None])
    tolerance = OP_F64 if dtype == np.float64 else OP_F32
    compare(both(*arrays, window, sinks, reset), expected, tolerance, "torch masked")


@by_span
def test_gradients_equal_finite_differences(window, sinks):
    q, k, v, do = inputs((2, 4, 2, 90, 6))
    options = (window, sinks, starts(2, 90, 20, 33))
    direction = dict(zip("qkv", inputs((2, 4, 2, 90, 6), name="direction"), strict=False))
    found = directional_derivative(
        lambda a: inner(do, ops.attention_forward(a["q"], a["k"], a["v"], *options)),
        {"q": q, "k": k, "v": v},
        direction,
    )
    gradients = dict(zip("qkv", ops.attention_backward(do, q, k, v, *options), strict=True))
    exact = sum(inner(gradients[name], d) for name, d in direction.items())
    assert_close(exact, found, GRADIENT_F64, "attention directional derivative")


def test_large_scores():
    """Scores of some hundreds make a softmax of nearly one key; nothing overflows."""
    q, k, v, do = inputs((1, 2, 1, 300, 8))
    q, k = 10 * q, 10 * k
    expected = reference.attention_forward(q, k, v), *reference.attention_backward(do, q, k, v)
    compare(both(q, k, v, do), expected, OP_F64, "large scores")


# ---- what a query sees --------------------------------------------------------------------------


def test_a_window_of_one_copies_the_value():
    q, k, v, _ = inputs((2, 4, 2, 70, 8), np.float32)
    assert np.array_equal(ops.attention_forward(q, k, v, window=1), np.repeat(v, 2, axis=1))


@pytest.mark.parametrize("steps", [20, 300])
def test_a_window_over_the_row_is_full_attention(steps):
    q, k, v, _ = inputs((1, 2, 1, steps, 8), np.float32)
    full = ops.attention_forward(q, k, v)
    for window, sinks in [(steps, 0), (10 * steps, 4), (2**62, 2**62), (None, 7)]:
        assert np.array_equal(ops.attention_forward(q, k, v, window, sinks), full)


@both_types
def test_sinks_are_counted_once_and_belong_to_their_document(dtype):
    """With equal scores the output is the mean of the values that are seen."""
    _, k, v, _ = inputs((1, 1, 1, 60, 4), dtype)
    o = ops.attention_forward(np.zeros_like(v), k, v, 5, 3, starts(1, 60, 25))
    for start, stop in [(0, 25), (25, 60)]:
        for t in range(start, stop):
            seen = {*range(start, min(start + 3, t + 1)), *range(max(start, t - 4), t + 1)}
            mean = v[0, 0, sorted(seen)].astype(np.float64).mean(axis=0)
            assert_close(o[0, 0, t], mean, OP_F64 if dtype == np.float64 else OP_F32, "mean")


# ---- documents and batches ----------------------------------------------------------------------


@by_span
def test_other_documents_contents_do_not_change_a_bit(window, sinks):
    arrays = inputs((1, 4, 2, 700, 16), np.float32)
    options = (window, sinks, starts(1, 700, 45, 420))
    before = both(*arrays, *options)
    others = inputs((1, 4, 2, 700, 16), np.float32, "others")
    for x, other in zip(arrays, others, strict=True):
        other[:, :, 45:420] = x[:, :, 45:420]
    for x, y in zip(before, both(*others, *options), strict=True):
        assert np.array_equal(x[:, :, 45:420], y[:, :, 45:420])


@by_span
def test_a_document_that_moves(window, sinks):
    alone = inputs((1, 4, 2, 330, 16), np.float32)
    packed = inputs((1, 4, 2, 600, 16), np.float32, "packed")
    for x, whole in zip(alone, packed, strict=True):
        whole[:, :, 101:431] = x
    found = both(*packed, window, sinks, starts(1, 600, 101, 431))
    expected = both(*alone, window, sinks)
    compare([x[:, :, 101:431] for x in found], expected, DOCUMENT_MOVED, "moved document")


@by_span
def test_rows_and_groups_are_independent(window, sinks):
    q, k, v, do = arrays = inputs((3, 6, 3, 350, 8), np.float32)
    whole = both(*arrays, window, sinks)
    for b, g in [(0, 2), (2, 1)]:
        row, heads, group = slice(b, b + 1), slice(2 * g, 2 * g + 2), slice(g, g + 1)
        own = both(q[row, heads], k[row, group], v[row, group], do[row, heads], window, sinks)
        for x, y, part in zip(own, whole, (heads, heads, group, group), strict=True):
            assert np.array_equal(x, y[row, part])


@by_span
def test_threads_do_not_change_a_bit(window, sinks, runtime):
    arrays = inputs((1, 6, 3, 800, 16), np.float32)
    options = (window, sinks, starts(1, 800, 130))
    runtime.set_threads(1)
    expected = both(*arrays, *options)
    for threads in (2, 3, 8):
        runtime.set_threads(threads)
        for x, y in zip(both(*arrays, *options), expected, strict=True):
            assert np.array_equal(x, y)


def test_a_nan_stays_in_what_it_can_reach():
    q, k, v, _ = inputs((1, 2, 1, 300, 8), np.float32)
    q[0, 1, 200] = np.nan
    o = ops.attention_forward(q, k, v)
    assert np.isnan(o[0, 1, 200]).all() and np.isnan(o).sum() == 8
    k[0, 0, 250] = np.nan
    later = np.isnan(ops.attention_forward(q, k, v, 30))
    assert (
        later[0, 0, 250:280].all() and not later[0, 0, 280:].any() and not later[0, 0, :240].any()
    )


# ---- ragged rows --------------------------------------------------------------------------------


def positions(reset, past=None):
    """int32 [B, T] from document starts; the first document goes on from `past` [B]."""
    pos = np.zeros(reset.shape, np.int32)
    for b, row in enumerate(reset):
        seen = 0 if past is None else past[b]
        for t, begins in enumerate(row):
            seen = 0 if begins else seen
            pos[b, t], seen = seen, seen + 1
    return pos


@by_span
def test_padding_is_never_read(window, sinks):
    shape = (4, 4, 2, 400, 8)
    arrays = inputs(shape, np.float32)
    lengths = np.array([400, 0, 1, 333], np.int32)
    pos = positions(starts(4, 400, 290))
    span = (min(window or 400, 400), sinks)
    c = core(np.float32)

    def run(fill):
        q, k, v, do = (x.copy() for x in arrays)
        for x in (q, k, v, do):
            for b, n in enumerate(lengths):
                x[b, :, n:] = fill
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan, np.float32)
        c.attention_forward(o, lse, q, k, v, pos, lengths, *span, None, None, None, 0)
        d = [np.zeros_like(x) for x in (q, k, v)]
        c.attention_backward(*d, do, q, k, v, o, lse, pos, lengths, *span, None, None, None, 0)
        return o, lse, *d

    clean, dirty = run(0.0), run(np.nan)
    for x, y in zip(clean, dirty, strict=True):
        assert np.array_equal(x, y)
    for b, n in enumerate(lengths):
        assert not any(x[b, :, n:].any() for x in clean)
        if n:
            part = [x[b : b + 1, :, :n] for x in arrays]
            reset = starts(1, n, *([290] if n > 290 else []))
            expected = both(*part, window, sinks, reset)
            found = [x[b : b + 1, :, :n] for x in (clean[0], *clean[2:])]
            compare(found, expected, DOCUMENT_MOVED, "ragged row")


@by_span
def test_backward_adds_and_skips_what_is_not_wanted(window, sinks):
    q, k, v, do = inputs((2, 4, 2, 200, 8))
    expected = ops.attention_backward(do, q, k, v, window, sinks)
    o, lse = np.empty_like(q), np.empty(q.shape[:3])
    pos, span = positions(starts(2, 200, 0)), (min(window or 200, 200), sinks)
    c = core(np.float64)
    c.attention_forward(o, lse, q, k, v, pos, None, *span, None, None, None, 0)
    for wanted in [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        given = [
            np.full_like(x, 0.5) if w else None for x, w in zip((q, k, v), wanted, strict=True)
        ]
        past = (None, None, None)
        c.attention_backward(*given, do, q, k, v, o, lse, pos, None, *span, *past, 0)
        for x, y in zip(given, expected, strict=True):
            if x is not None:
                assert_close(x, y + 0.5, OP_F64, "added gradient")


# ---- cache --------------------------------------------------------------------------------------


class Cached:
    """Attention over a cache: pieces of a row one after another, as the model calls it."""

    def __init__(self, shape, window, sinks, dtype):
        b, _, g, _, d = shape
        self.c, self.sinks, self.window = core(dtype), sinks, window
        self.k = np.full((b, window + sinks, g, d), np.nan, dtype)  # an unused slot is never read
        self.v = self.k.copy()
        self.seen = np.zeros(b, np.int32)

    def __call__(self, q, k, v, reset, lengths=None):
        pos, o = positions(reset, self.seen), np.full_like(q, np.nan)
        past = (self.k, self.v, self.seen)
        if q.shape[2] == 1:
            self.c.attention_step(o, q, k, v, *past, pos, lengths, self.sinks)
        else:
            span = (self.window, self.sinks)
            self.c.attention_forward(o, None, q, k, v, pos, lengths, *span, *past, 0)
            self.c.attention_append(*past, k, v, pos, lengths, self.sinks)
        for b in range(len(q)):
            n = q.shape[2] if lengths is None else lengths[b]
            if n:
                self.seen[b] = pos[b, n - 1] + 1
        return o


def part(x, t0, t1):
    return np.ascontiguousarray(x[:, :, t0:t1])


@both_types
@pytest.mark.parametrize("window, sinks", [(1, 0), (5, 3), (64, 4), (300, 4), (1000, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_pieces_and_steps_equal_the_whole(window, sinks, dtype, seed):
    """A row cut at random into prefills and steps, with documents that start anywhere."""
    shape = (2, 4, 2, 390, 8)
    q, k, v, _ = inputs(shape, dtype)
    rng = seeded("pieces", seed, window)
    reset = rng.random((2, 390)) < 0.008
    expected = ops.attention_forward(q, k, v, min(window, 390), sinks, reset)
    cached, t = Cached(shape, window, sinks, dtype), 0
    while t < 390:
        n = min(390 - t, int(rng.choice([1, 1, 2, 30, 85, 200])))
        piece = [part(x, t, t + n) for x in (q, k, v)]
        o = cached(*piece, reset[:, t : t + n])
        tolerance = OP_F64 if dtype == np.float64 else PREFILL_STEP_F32
        assert_close(o, part(expected, t, t + n), tolerance, "pieces")
        t += n


@pytest.mark.parametrize("window, sinks", [(5, 3), (64, 4), (600, 0)])
def test_ragged_pieces_and_steps(window, sinks):
    """Rows of their own lengths; a row of length 0 keeps its cache and gives zeros."""
    shape = (3, 4, 2, 320, 8)
    q, k, v, _ = inputs(shape)
    expected = ops.attention_forward(q, k, v, min(window, 320), sinks)
    cached, at = Cached(shape, window, sinks, np.float64), np.zeros(3, int)
    for lengths in [[90, 0, 7], [1, 0, 0], [1, 1, 1], [40, 150, 1], [0, 60, 200], [1, 1, 1]]:
        n = max(lengths)
        take = [np.full((3, x.shape[1], n, 8), np.nan) for x in (q, k, v)]
        for b, m in enumerate(lengths):
            for piece, x in zip(take, (q, k, v), strict=True):
                piece[b, :, :m] = x[b, :, at[b] : at[b] + m]
        before = cached.k.copy()
        o = cached(*take, np.zeros((3, n), bool), np.array(lengths, np.int32))
        for b, m in enumerate(lengths):
            assert m or np.array_equal(cached.k[b], before[b], equal_nan=True)
            assert_close(o[b, :, :m], expected[b, :, at[b] : at[b] + m], OP_F64, "ragged pieces")
            assert not o[b, :, m:].any()
        at += lengths
    assert cached.seen.tolist() == at.tolist()


@pytest.mark.parametrize("steps", [1, 2, 30, 190, 380])
@pytest.mark.parametrize("window, sinks", [(1, 0), (5, 3), (2, 40), (64, 4), (300, 4), (600, 0)])
def test_gradients_behind_a_cache(window, sinks, steps, runtime):
    """Those of the whole row from its last steps, but for the keys and values of the cache."""
    before, shape = 390 - steps, (3, 4, 2, 390, 8)
    q, k, v, do = inputs(shape)
    do[:, :, :before] = 0
    reset = starts(3, 390)
    reset[0, before - 3] = reset[1, [7, before + steps // 2]] = True
    expected = both(q, k, v, do, min(window, 390), sinks, reset)
    cached = Cached(shape, window, sinks, np.float64)
    cached(*(part(x, 0, before) for x in (q, k, v)), reset[:, :before])
    q, k, v, do = (part(x, before, 390) for x in (q, k, v, do))
    rest = positions(reset[:, before:], cached.seen), None, window, sinks
    past = cached.k, cached.v, cached.seen
    found = []
    for threads in (1, 3):
        runtime.set_threads(threads)
        o, lse = np.full_like(q, np.nan), np.full(q.shape[:3], np.nan)
        gradients = [np.zeros_like(x) for x in (q, k, v)]
        cached.c.attention_forward(o, lse, q, k, v, *rest, *past, 0)
        cached.c.attention_backward(*gradients, do, q, k, v, o, lse, *rest, *past, 0)
        found.append([o, *gradients])
    compare(found[0], [part(x, before, 390) for x in expected], OP_F64, "behind a cache")
    assert all(np.array_equal(x, y) for x, y in zip(*found, strict=True))


def test_a_step_does_not_depend_on_threads_or_batch(runtime):
    shape = (5, 6, 2, 1, 16)
    q, k, v, _ = inputs(shape, np.float32)
    rng = seeded("step")
    slots = rng.standard_normal((2, 5, 700, 2, 16)).astype(np.float32)
    seen = np.array([0, 3, 650, 256, 5000], np.int32)

    def step(rows):
        o = np.empty_like(q[rows])
        past = [np.ascontiguousarray(x[rows]) for x in slots]
        core(np.float32).attention_step(
            o, q[rows], k[rows], v[rows], *past, seen[rows], seen[rows, None], None, 4
        )
        return o

    runtime.set_threads(1)
    expected = step(slice(0, 5))
    for threads in (1, 2, 3):
        runtime.set_threads(threads)
        assert np.array_equal(step(slice(0, 5)), expected)
        for b in range(5):
            assert np.array_equal(step(slice(b, b + 1)), expected[b : b + 1])


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"k": np.zeros((1, 3, 5, 4))}, "4 heads are not a multiple of 3"),
        ({"k": np.zeros((1, 0, 5, 4)), "v": np.zeros((1, 0, 5, 4))}, "not a multiple of 0"),
        ({"k": np.zeros((1, 2, 6, 4))}, "k has shape"),
        ({"v": np.zeros((1, 2, 5, 3))}, "v has shape"),
        ({"q": np.zeros((4, 5, 4))}, "q has 3 dimensions"),
        ({"reset": np.zeros((1, 4), bool)}, "reset has shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    args = {"q": np.zeros((1, 4, 5, 4)), "k": np.zeros((1, 2, 5, 4)), "v": np.zeros((1, 2, 5, 4))}
    with pytest.raises(ValueError, match=message):
        ops.attention_forward(**{**args, **change})
    with pytest.raises(TypeError, match="reset has dtype float64"):
        ops.attention_forward(**args, reset=np.zeros((1, 5)))
    with pytest.raises(ValueError, match="do has shape"):
        ops.attention_backward(np.zeros((1, 4, 5, 3)), **args)


@pytest.mark.parametrize(
    "pos, lengths, slots, message",
    [
        ([0, 1, 3], None, None, r"pos\[0, 2\] is 3, expected 0 or 2"),
        ([4, 5, 6], None, None, r"pos\[0, 0\] is 4, expected 0 or 0"),
        ([0, -1, 0], None, None, r"pos\[0, 1\] is -1"),
        ([0, 1, 2], [4], None, r"lengths\[0\] is 4, T is 3"),
        ([0, 1, 2], [-1], None, r"lengths\[0\] is -1, T is 3"),
        ([0, 1, 2], None, 6, "the cache has 6 slots, not window 4 \\+ sinks 1"),
        ([3, 4, 5], None, 5, r"pos\[0, 0\] is 3, expected 0 or 2"),
    ],
)
def test_the_core_refuses_what_does_not_fit(pos, lengths, slots, message):
    q, k, v, _ = inputs((1, 2, 1, 3, 4))
    past = (None, None, None)
    if slots:
        past = (np.zeros((1, slots, 1, 4)), np.zeros((1, slots, 1, 4)), np.array([2], np.int32))
    n = None if lengths is None else np.array(lengths, np.int32)
    with pytest.raises(ValueError, match=message):
        core(np.float64).attention_forward(
            np.empty_like(q), None, q, k, v, np.array([pos], np.int32), n, 4, 1, *past, 0
        )


def test_a_cache_needs_more_than_its_sinks():
    q, k, v, _ = inputs((1, 2, 1, 1, 4))
    past = (np.zeros((1, 4, 1, 4)), np.zeros((1, 4, 1, 4)), np.zeros(1, np.int32))
    pos = np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="window is 0"):
        core(np.float64).attention_append(*past, k, v, pos, None, 4)
    with pytest.raises(ValueError, match="window is -1"):
        core(np.float64).attention_step(np.empty_like(q), q, k, v, *past, pos, None, 5)
