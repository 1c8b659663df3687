"""The mLSTM: three equal forms, exact gradients, public code, documents, states, threads."""

from __future__ import annotations

import numpy as np
import pytest
import tolerances as tol

from xlstm_distill import ops, reference
from xlstm_distill.reference.attention import FEATURE_MAPS
from xlstm_distill.runtime import available_isas, core
from xlstm_distill.testing import assert_close, directional_derivative, inner, seeded

NAMES = ("q", "k", "v", "i", "f")
NORMALIZERS = ("ratio", "max")
LENGTHS = (1, 7, 63, 64, 65, 200, 500)


def inputs(T, normalizer="ratio", B=2, H=2, D=6, E=5, dtype=np.float64, shift=0.0):
    """q, k, v, i, f; the ratio form with signed q and k would lose digits by itself."""
    random = seeded("mlstm", T, normalizer, B, H, D, E, shift)
    q, k = (random.standard_normal((B, H, T, D)) for _ in range(2))
    if normalizer == "ratio":
        q, k = np.exp(q), np.exp(k)
    v = random.standard_normal((B, H, T, E))
    i, f = random.standard_normal((B, H, T)), random.standard_normal((B, H, T)) * 2 + 2
    return tuple(a.astype(dtype) for a in (q, k, v, i + shift, f))


def start_state(x, normalizer="ratio"):
    """A random state that a sequence of such inputs could have left."""
    q, _, v, *_ = x
    random = seeded("state", q.shape, v.shape)
    n = random.standard_normal(q.shape[:2] + q.shape[3:])
    c = random.standard_normal((*n.shape, v.shape[3]))
    m = random.standard_normal(n.shape[:2])
    return tuple(a.astype(q.dtype) for a in (c, np.exp(n) if normalizer == "ratio" else n, m))


def documents(x, rate=0.1):
    """Document starts of a packed batch, none at 0 in the last row."""
    B, _, T, _ = x[0].shape
    reset = seeded("documents", B, T).random((B, T)) < rate
    reset[:-1, 0] = True
    return reset


def cotangents(x):
    """Random gradients on h and on the last state."""
    q, _, v, *_ = x
    random = seeded("cotangents", v.shape)
    c = random.standard_normal((*q.shape[:2], q.shape[3], v.shape[3]))
    n = random.standard_normal(c.shape[:3])
    dstate = (c, n, np.zeros(c.shape[:2]))
    return random.standard_normal(v.shape).astype(q.dtype), tuple(a.astype(q.dtype) for a in dstate)


def flat(result):
    """(h, state) or the gradients as one list of arrays."""
    *arrays, state = result
    return [*arrays, *(state or ())]


# ---- forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_three_forms_agree(normalizer, T, chunk):
    x = inputs(T, normalizer)
    for state in (None, start_state(x, normalizer)):
        for reset in (None, documents(x)):
            options = {"state": state, "normalizer": normalizer, "reset": reset}
            expected = flat(ops.mlstm_forward(*x, **options, form="recurrent"))
            for form in ("chunkwise", "parallel"):
                found = flat(ops.mlstm_forward(*x, **options, form=form, chunk=chunk))
                for name, a, b in zip(("h", "C", "n", "m"), found, expected, strict=True):
                    assert_close(a, b, tol.FORMS_F64, f"mlstm {form} {name}", floor=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, tol.OP_F64), (np.float32, tol.CELL_F32)]
)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_forward_and_backward_are_the_reference(normalizer, dtype, tolerance):
    x = inputs(70, normalizer, B=2, H=3, D=17, E=9, dtype=dtype)
    state, reset = start_state(x, normalizer), documents(x)
    dh, dstate = cotangents(x)
    exact = [a.astype(np.float64) for a in x]
    wide = [None if s is None else [a.astype(np.float64) for a in s] for s in (state, dstate)]
    for s, w in ((None, None), (state, wide[0])):
        options = {"normalizer": normalizer, "reset": reset}
        found = flat(ops.mlstm_forward(*x, s, chunk=16, **options))
        expected = flat(reference.mlstm_forward(*exact, w, form="recurrent", **options))
        for name, a, b in zip(("h", "C", "n", "m"), found, expected, strict=True):
            assert a.dtype == dtype
            assert_close(a, b, tolerance, f"mlstm {name} {np.dtype(dtype)}")
        found = flat(ops.mlstm_backward(dh, *x, s, dstate, chunk=16, **options))
        expected = flat(
            reference.mlstm_backward(dh.astype(np.float64), *exact, w, wide[1], **options)
        )
        for name, a, b in zip((*NAMES, "C", "n", "m"), found, expected, strict=False):
            assert_close(a, b, tolerance, f"mlstm d{name} {np.dtype(dtype)}")


# ---- gradients ----------------------------------------------------------------------------------


def loss(x, dh, dstate, m_last, **options):
    """<dh, h> + <dC, C> + <dn, n>, the last state brought to the stabiliser m_last."""
    state = tuple(x[s] for s in ("C", "n", "m")) if "C" in x else None
    h, (c, n, m) = ops.mlstm_forward(*(x[a] for a in NAMES), state, chunk=16, **options)
    unit = np.exp(m - m_last)
    along_c = inner(dstate[0], c * unit[..., None, None])
    return inner(dh, h) + along_c + inner(dstate[1], n * unit[..., None])


def prefilled_backward(x, dh, state, dstate, normalizer, reset):
    """The core's backward on gradients that already hold something, which is taken off again."""
    batch, heads, _, width = x[0].shape
    before = [seeded("prefill", n).standard_normal(a.shape) for n, a in enumerate((*x, *state[:2]))]
    grads, dm = [a.copy() for a in before], np.full((batch, heads), 7.0)
    code = NORMALIZERS.index(normalizer)
    core(np.float64).mlstm_backward(
        *grads, dm, dh, *x, *state, *dstate, code, width**-0.5, 0, 16, reset, None, 0
    )
    assert np.all(dm == 0)
    return [a - b for a, b in zip(grads, before, strict=True)]


def away_from_the_kink(T, resets):
    """Inputs whose |n.q| (of the unscaled state) is nowhere near 1, where `max` has a kink that a
    finite difference must not cross; it is above at some steps and below at others."""
    for shift in np.arange(0.5, 2.5, 0.02):
        x = inputs(T, "max", shift=shift)
        q, k, _, i, f = x
        _, n, m = start_state(x, "max")
        reset = documents(x) if resets else None
        # with v = 1, C = n and everything far below the floor, h is n.q times a known factor
        ones, far = np.ones((*q.shape[:3], 1)), -200.0
        state = (n[..., None], n, m + far)
        h, _ = ops.mlstm_forward(q, k, ones, i + far, f, state, "max", reset=reset)
        den = np.abs(h) * np.exp(-far)
        if np.min(np.abs(den - 1)) > 5e-3:
            assert T < 30 or 0.1 < np.mean(den < 1) < 0.9
            return x
    raise AssertionError("no such inputs")


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("T", [1, 7, 33, 70])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_are_directional_derivatives(normalizer, T, resets):
    x = inputs(T, normalizer) if normalizer == "ratio" else away_from_the_kink(T, resets)
    state = start_state(x, normalizer)
    reset = documents(x) if resets else None
    dh, dstate = cotangents(x)
    options = {"normalizer": normalizer, "reset": reset}
    _, (_, _, m_last) = ops.mlstm_forward(*x, state, **options)
    at = dict(zip((*NAMES, "C", "n", "m"), (*x, *state), strict=True))
    gradients = prefilled_backward(x, dh, state, dstate, normalizer, reset)
    for name, gradient in zip((*NAMES, "C", "n"), gradients, strict=True):
        direction = seeded("direction", name, T).standard_normal(gradient.shape)
        expected = directional_derivative(
            lambda moved: loss(moved, dh, dstate, m_last, **options), at, {name: direction}
        )
        found = inner(gradient, direction)
        assert_close(found, expected, tol.GRADIENT_F64, f"mlstm directional d{name} {normalizer}")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_element_of_the_gradients(normalizer):
    x = inputs(5, normalizer, B=1, H=2, D=3, E=2)
    reset = np.array([[False, False, True, False, False]])
    dh, dstate = cotangents(x)
    options = {"normalizer": normalizer, "reset": reset}
    _, (_, _, m_last) = ops.mlstm_forward(*x, **options)
    gradients = ops.mlstm_backward(dh, *x, None, dstate, chunk=2, **options)
    at = dict(zip(NAMES, x, strict=True))
    for name, gradient in zip(NAMES, gradients[:5], strict=True):
        for where in np.ndindex(gradient.shape):
            unit = np.zeros_like(gradient)
            unit[where] = 1.0
            expected = directional_derivative(
                lambda moved: loss(moved, dh, dstate, m_last, **options), at, {name: unit}
            )
            assert_close(gradient[where], expected, tol.GRADIENT_F64, f"mlstm elements of d{name}")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_do_not_depend_on_the_chunk(normalizer):
    x = inputs(130, normalizer)
    state, reset = start_state(x, normalizer), documents(x, 0.03)
    dh, dstate = cotangents(x)
    expected = flat(ops.mlstm_backward(dh, *x, state, dstate, normalizer, chunk=1, reset=reset))
    for chunk in (7, 64, 1000):
        found = flat(
            ops.mlstm_backward(dh, *x, state, dstate, normalizer, chunk=chunk, reset=reset)
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, tol.FORMS_F64, "mlstm gradients over chunks")


def test_a_gradient_that_is_not_wanted_costs_the_others_nothing():
    x = inputs(40)
    dh, _ = cotangents(x)
    none, options = (None,) * 3, (0, 0.4, 0, 16, None, None, 0)
    whole = [np.zeros_like(a) for a in x]
    core(np.float64).mlstm_backward(*whole, *none, dh, *x, *none, *none, *options)
    for wanted in range(5):
        one = [np.zeros_like(a) if j == wanted else None for j, a in enumerate(x)]
        core(np.float64).mlstm_backward(*one, *none, dh, *x, *none, *none, *options)
        assert np.array_equal(one[wanted], whole[wanted])


# ---- public implementations ---------------------------------------------------------------------


def public(function, x, dh, **options):
    """h and the gradients by torch's automatic differentiation of a public forward, eps = 0."""
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(a, requires_grad=True) for a in x]
    h = function(*leaves, eps=0.0, **options)
    h = h[0] if isinstance(h, tuple) else h
    torch.sum(h * torch.tensor(dh)).backward()
    return [h.detach().numpy(), *(a.grad.numpy() for a in leaves)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, tol.PUBLIC_F64), (np.float32, tol.PUBLIC_F32)]
)
@pytest.mark.parametrize("with_state", [False, True])
def test_public_chunkwise_and_parallel_forms(with_state, dtype, tolerance):
    native = pytest.importorskip("mlstm_kernels.torch.chunkwise.native")
    parallel = pytest.importorskip("mlstm_kernels.torch.parallel.native")
    x = inputs(256, "max", H=3, D=32, E=32, dtype=dtype)
    dh, _ = cotangents(x)
    state, names = None, {}
    if with_state:
        torch = pytest.importorskip("torch")
        state = start_state(x, "max")
        parts = zip(("c_initial", "n_initial", "m_initial"), state, strict=True)
        names = {name: torch.tensor(a) for name, a in parts}
    h, _ = ops.mlstm_forward(*x, state, "max")
    found = [h, *ops.mlstm_backward(dh, *x, state, normalizer="max")[:5]]
    results = [public(native.mlstm_chunkwise__native_autograd, x, dh, chunk_size=64, **names)]
    if not with_state:
        results.append(public(parallel.mlstm_parallel__native_autograd, x, dh))
    if dtype == np.float32:
        assert_close(h, results[0][0], tolerance, "mlstm public h, both float32", floor=0)
        # its own float32 gradients are off by 1.4e-5: ours are compared with its float64
        wide = tuple(a.astype(np.float64) for a in x)
        names = {name: a.double() for name, a in names.items()}
        function = native.mlstm_chunkwise__native_autograd
        results = [public(function, wide, dh.astype(np.float64), chunk_size=64, **names)]
    for expected in results:
        for name, a, b in zip(("h", *NAMES), found, expected, strict=True):
            label = "h" if name == "h" else f"d{name}"
            assert_close(a, b, tolerance, f"mlstm public {label} {np.dtype(dtype)}", floor=0)


def test_public_recurrent_step():
    torch = pytest.importorskip("torch")
    native = pytest.importorskip("mlstm_kernels.torch.recurrent.native_step")
    x = inputs(1, "max", D=16, E=16)
    state = start_state(x, "max")
    # the public step wants m [B, H, 1] and gates [B, H, 1], and squeezes what it is given in place
    h, (c, n, m) = native.mlstm_recurrent_step__native(
        *(torch.tensor(a[:, :, 0]) for a in x[:3]),
        *(torch.tensor(a) for a in x[3:]),
        *(torch.tensor(a) for a in (state[0], state[1], state[2][..., None])),
        eps=0.0,
        dtype_state=torch.float64,
    )
    found, (c1, n1, m1) = ops.mlstm_forward(*x, state, "max", form="recurrent")
    assert_close(found[:, :, 0], h.numpy(), tol.PUBLIC_F64, "mlstm public step h")
    assert_close(c1, c.numpy(), tol.PUBLIC_F64, "mlstm public step C")
    assert_close(n1, n.numpy(), tol.PUBLIC_F64, "mlstm public step n")
    assert_close(m1, m.numpy()[..., 0], tol.PUBLIC_F64, "mlstm public step m")


# ---- documents, states, rows --------------------------------------------------------------------


def run(x, dh, reset=None, state=None, dstate=None, **options):
    forward = ops.mlstm_forward(*x, state, reset=reset, **options)
    return [
        *flat(forward),
        *flat(ops.mlstm_backward(dh, *x, state, dstate, reset=reset, **options)),
    ]


PER_STEP = (0, 4, 5, 6, 7, 8)  # h and the gradients of the five inputs among the results of run


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("begin", "end"), [(0, 50), (37, 140), (140, 200), (199, 200)])
def test_a_document_does_not_see_its_neighbours(begin, end, dtype):
    x = inputs(200, B=1, dtype=dtype)
    dh, _ = cotangents(x)
    reset = np.zeros((1, 200), bool)
    reset[0, [0, begin]] = True
    if end < 200:
        reset[0, end] = True
    packed = run(x, dh, reset)
    others = [
        seeded("other", a.shape).standard_normal(a.shape).astype(dtype) ** 2 for a in (*x, dh)
    ]
    for other, own in zip(others, (*x, dh), strict=True):
        other[:, :, begin:end] = own[:, :, begin:end]
    changed = run(tuple(others[:5]), others[5], reset)
    inside = np.s_[:, :, begin:end]
    alone = run(tuple(a[inside] for a in x), dh[inside])  # and at another place
    for j in PER_STEP:
        assert np.array_equal(packed[j][inside], changed[j][inside])
        assert np.array_equal(packed[j][inside], alone[j])


def test_the_forget_gradient_is_zero_where_a_document_starts():
    x = inputs(100, B=3)
    dh, dstate = cotangents(x)
    reset = documents(x)
    df = ops.mlstm_backward(dh, *x, None, dstate, reset=reset)[4]
    starts = np.broadcast_to(reset[:, None], df.shape)
    assert np.all(df[starts] == 0) and np.all(df[:, :, 0] == 0)
    assert np.count_nonzero(df[~starts]) == np.count_nonzero(~starts) - 2  # step 0 of the last row


def test_a_reset_at_the_first_step_forgets_the_state():
    x = inputs(30, B=1)
    dh, dstate = cotangents(x)
    reset = np.zeros((1, 30), bool)
    fresh = run(x, dh, reset, None, dstate)
    reset[0, 0] = True
    found = run(x, dh, reset, start_state(x), dstate)
    assert all(np.array_equal(a, b) for a, b in zip(found, fresh, strict=False))
    assert all(np.all(a == 0) for a in found[9:])  # nothing reaches the state


def test_minus_infinity_in_f_forgets_and_in_i_writes_nothing():
    x = inputs(90, B=1)
    dh, _ = cotangents(x)
    reset = np.zeros((1, 90), bool)
    reset[0, [0, 20, 70]] = True
    expected = run(x, dh, reset)
    f = np.where(reset[:, None], -np.inf, x[4])
    assert all(np.array_equal(a, b) for a, b in zip(run((*x[:4], f), dh), expected, strict=True))
    # a step that writes nothing only lets the state decay: take it out, its decay to the next
    i, keep = x[3].copy(), np.arange(90) != 40
    i[:, :, 40] = -np.inf
    lf = np.minimum(x[4], 0) - np.log1p(np.exp(-np.abs(x[4])))
    lf[:, :, 41] += lf[:, :, 40]
    without = [a[:, :, keep] for a in (*x[:4], lf - np.log(-np.expm1(lf)))]
    for form in ("chunkwise", "recurrent"):
        h, state = ops.mlstm_forward(*x[:3], i, x[4], form=form)
        h2, state2 = ops.mlstm_forward(*without, form=form)
        assert_close(h[:, :, keep], h2, tol.FORMS_F64, "mlstm without an empty step")
        for a, b in zip(state, state2, strict=True):
            assert_close(a, b, tol.FORMS_F64, "mlstm state without an empty step")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("cut", [1, 64, 77, 149])
def test_a_sequence_can_be_cut_with_its_state(cut, normalizer):
    x = inputs(150, normalizer)
    state, reset = start_state(x, normalizer), documents(x, 0.02)
    dh, dstate = cotangents(x)
    whole = run(x, dh, reset, state, dstate, normalizer=normalizer)
    first, second = ([a[:, :, s] for a in (*x, dh)] for s in (np.s_[:cut], np.s_[cut:]))
    h1, middle = ops.mlstm_forward(*first[:5], state, normalizer, reset=reset[:, :cut])
    h2, last = ops.mlstm_forward(*second[:5], middle, normalizer, reset=reset[:, cut:])
    *d2, dmiddle = ops.mlstm_backward(
        second[5], *second[:5], middle, dstate, normalizer, reset=reset[:, cut:]
    )
    *d1, dstart = ops.mlstm_backward(
        first[5], *first[:5], state, dmiddle, normalizer, reset=reset[:, :cut]
    )
    joined = [np.concatenate(p, axis=2) for p in ((h1, h2), *zip(d1, d2, strict=True))]
    found = [joined[0], *last, *joined[1:], *dstart]
    for a, b in zip(found, whole, strict=True):
        assert_close(a, b, tol.FORMS_F64, "mlstm in two parts")


def test_steps_are_the_forward():
    x = inputs(40, dtype=np.float32)
    h, last = ops.mlstm_forward(*x)
    state, steps = None, []
    for t in range(40):
        step, state = ops.mlstm_forward(*(a[:, :, t : t + 1] for a in x), state, form="recurrent")
        steps.append(step)
    assert_close(np.concatenate(steps, axis=2), h, tol.PREFILL_STEP_F32, "mlstm steps h")
    for a, b in zip(state, last, strict=True):
        assert_close(a, b, tol.PREFILL_STEP_F32, "mlstm steps state")


@pytest.mark.parametrize("form", [0, 1, 2])
def test_rows_have_their_own_lengths(form):
    x = inputs(70, B=4)
    dh, dstate = cotangents(x)
    state, lengths = start_state(x), np.array([70, 0, 1, 65], np.int32)
    for a in (*x, dh):
        for row, length in enumerate(lengths):
            a[row, :, length:] = np.nan  # padding is never read
    h, last = np.full_like(x[2], np.nan), [np.full_like(a, np.nan) for a in state]
    options = (0, 0.4, form, 16, None, lengths, 0)
    core(np.float64).mlstm_forward(h, *last, *x, *state, *options, None, None, 0)
    grads, dfirst = [np.zeros_like(a) for a in x], [np.zeros_like(a) for a in state]
    core(np.float64).mlstm_backward(*grads, *dfirst, dh, *x, *state, *dstate, *options)
    for b, length in enumerate(lengths):
        assert not h[b, :, length:].any() and not any(g[b, :, length:].any() for g in grads)
        if not length:  # the state and its gradient pass through
            assert all(np.array_equal(y[b], z[b]) for y, z in zip(last, state, strict=True))
            assert all(np.array_equal(y[b], z[b]) for y, z in zip(dfirst, dstate, strict=True))
            continue
        row = np.s_[b : b + 1, :, :length]
        own = [tuple(a[b : b + 1] for a in s) for s in (state, dstate)]
        name = ("chunkwise", "parallel", "recurrent")[form]
        alone = ops.mlstm_forward(*(a[row] for a in x), own[0], scale=0.4, form=name, chunk=16)
        assert np.array_equal(h[row], alone[0])
        assert all(np.array_equal(y[b], z[0]) for y, z in zip(last, alone[1], strict=True))
        alone = ops.mlstm_backward(dh[row], *(a[row] for a in x), *own, scale=0.4, chunk=16)
        assert all(np.array_equal(y[row], z) for y, z in zip(grads, alone[:5], strict=True))
        assert all(np.array_equal(y[b], z[0]) for y, z in zip(dfirst, alone[5], strict=True))


# ---- threads, rows, instruction sets ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_do_not_depend_on_threads_batch_or_heads(runtime, dtype):
    x = inputs(150, B=3, H=5, D=24, E=16, dtype=dtype)
    dh, dstate = cotangents(x)
    state, reset = start_state(x), documents(x, 0.02)
    results = []
    for threads in (1, 2, 3):
        runtime.set_threads(threads)
        results.append(run(x, dh, reset, state, dstate))
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(other, results[0], strict=True))
    part = np.s_[1:2, 3:4]
    own = [tuple(a[part] for a in s) for s in (x, state, dstate)]
    alone = run(own[0], dh[part], reset[1:2], own[1], own[2])
    assert all(np.array_equal(a[part], b) for a, b in zip(results[0], alone, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_chunks_side_by_side_give_the_same_bits(normalizer, rate, mixed, runtime):
    """One row, two heads, eight threads. With rate 0.5 there are too many documents for it."""
    dtype = np.float32 if mixed else np.float64
    x = inputs(200, normalizer, B=1, H=2, D=24, E=16, dtype=dtype)
    x[4][0, 1, 77] = -np.inf  # one head forgets by itself
    dh, dstate = cotangents(x)
    reset = documents(x, rate)
    results = []
    for start in (None, start_state(x, normalizer)):
        for threads in (1, 8):
            runtime.set_threads(threads)
            options = {"normalizer": normalizer, "chunk": 16, "reset": reset, "mixed": mixed}
            forward = ops.mlstm_forward(*x, state=start, **options)
            backward = ops.mlstm_backward(dh, *x, state=start, dstate=dstate, **options)
            results.append([*flat(forward), *flat(backward)])
    for one, eight in (results[:2], results[2:]):
        assert all(np.array_equal(a, b) for a, b in zip(one, eight, strict=True))
        assert all(np.isfinite(a).all() for a in one)


def test_instruction_sets_agree(runtime):
    x = inputs(100, D=40, E=24, dtype=np.float32)
    dh, dstate = cotangents(x)
    results = {}
    for isa in available_isas():
        runtime.set_isa(isa)
        results[isa] = run(x, dh, None, None, dstate)
    for isa, found in results.items():
        for a, b in zip(found, results["generic"], strict=True):
            assert_close(a, b, tol.CELL_F32, f"mlstm {isa} against generic")


# ---- extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chunkwise", "parallel", "recurrent"])
@pytest.mark.parametrize(
    ("i_shift", "f_shift"), [(-110, 0), (110, 0), (0, 30), (0, -60), (-300, 0), (300, -300)]
)
def test_extreme_gates_in_float32(form, i_shift, f_shift):
    q, k, v, i, f = inputs(300, D=16, E=8, dtype=np.float32)
    q, k = (a / a.sum(3, keepdims=True) for a in (q, k))
    x = (q, k, v, i + np.float32(i_shift), f + np.float32(f_shift))
    h, state = ops.mlstm_forward(*x, form=form)
    exact, _ = ops.mlstm_forward(*(a.astype(np.float64) for a in x), form="recurrent")
    assert_close(h, exact, tol.CELL_F32, f"mlstm extreme gates {form}")
    dh, _ = cotangents(x)
    for a in (*state, *ops.mlstm_backward(dh, *x)[:5]):
        assert np.all(np.isfinite(a))


def test_nothing_written_gives_zeros_not_nan():
    x = inputs(20)
    nothing = np.full_like(x[3], -np.inf)
    for form in ("chunkwise", "parallel", "recurrent"):
        h, (c, n, m) = ops.mlstm_forward(*x[:3], nothing, x[4], form=form)
        assert not h.any() and not c.any() and not n.any() and np.all(m == -np.inf)
    dh, _ = cotangents(x)
    assert all(np.all(np.isfinite(a)) for a in ops.mlstm_backward(dh, *x[:3], nothing, x[4])[:5])


def test_nan_is_not_hidden():
    for which in range(5):
        x = [a.copy() for a in inputs(20, B=1, H=1)]
        x[which][0, 0, 7] = np.nan
        for form in ("chunkwise", "parallel", "recurrent"):
            h, _ = ops.mlstm_forward(*x, form=form)
            assert np.isnan(h[0, 0, 7 : 8 if which == 0 else 20]).any(axis=-1).all()


# ---- wrong arguments ----------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    x = inputs(9)
    q, k, v, i, f = x
    for arguments, options, message in [
        ((q, k[:, :, :8], v, i, f), {}, r"k has shape \(2, 2, 8, 6\), expected \(2, 2, 9, 6\)"),
        ((q, k, v[:1], i, f), {}, "v has shape"),
        ((q, k, v, i[..., None], f), {}, "i has 4 dimensions, expected 3"),
        (x, {"normalizer": "mean"}, "normalizer is 'mean', expected one of ratio, max"),
        (x, {"form": "fast"}, "form is 'fast'"),
        (x, {"chunk": 0}, "chunk is 0, expected at least 1"),
        (x, {"reset": np.zeros((2, 8), bool)}, r"reset has shape \(2, 8\), expected \(2, 9\)"),
        (x, {"state": (np.zeros((2, 2, 6, 5)),)}, "state has 1 parts, expected 3: C, n, m"),
        (x, {"state": [np.zeros((2, 2, 6, 4)), 0, 0]}, "state C has shape"),
        ((q[..., :0], k[..., :0], v, i, f), {}, "head widths are 0 and 5, expected 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.mlstm_forward(*arguments, **options)
    with pytest.raises(TypeError, match="reset has dtype float64, expected bool"):
        ops.mlstm_forward(*x, reset=np.zeros((2, 9)))
    with pytest.raises(ValueError, match="dh has shape"):
        ops.mlstm_backward(v[:, :1], *x)
    h, none = np.empty_like(v), (None,) * 3
    with pytest.raises(ValueError, match=r"lengths\[1\] is 10, T is 9"):
        core(np.float64).mlstm_forward(
            h, *none, *x, *none, 0, 1.0, 0, 64, None, np.array([9, 10], np.int32), 0, None, None, 0
        )


def test_an_empty_sequence_hands_the_state_through():
    x = inputs(0)
    state = start_state(x)
    h, last = ops.mlstm_forward(*x, state)
    assert h.shape == x[2].shape
    assert all(np.array_equal(a, b) for a, b in zip(last, state, strict=True))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("heads", [(2, 1), (6, 3)])  # chunks side by side, and heads over threads
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_maps_a_chunk_at_a_time_change_no_bit(feature_map, heads, mixed, isa, runtime):
    runtime.set_isa(isa)
    H, G = heads
    T, D = 150, 40
    random = seeded("mapped", H, G)
    q, k = (random.standard_normal((1, n, T, D)).astype("f4") for n in (H, G))
    w_q, w_k = (random.standard_normal((H, D, D)).astype("f4") for _ in range(2))
    _, _, v, i, f = inputs(T, B=1, H=H, D=D, E=24, dtype=np.float32)
    how = {"feature_map": feature_map, "mixed": mixed}
    phi = [ops.feature_map_forward(x, w, **how) for x, w in ((q, w_q), (k, w_k))]
    for options in (
        {},
        {"normalizer": "max", "scale": 0.5},
        {"form": "parallel"},
        {"chunk": 7, "reset": random.random((1, T)) < 0.05},
    ):
        expected = flat(ops.mlstm_forward(*phi, v, i, f, mixed=mixed, **options))
        for threads in (1, 2, 3):
            runtime.set_threads(threads)
            found = ops.mapped_mlstm_forward(q, k, v, i, f, w_q, w_k, **how, **options)
            for a, b in zip(flat(found), expected, strict=True):
                assert np.array_equal(a, b), (options, threads)


def test_open_gates_on_features_of_elu_are_linear_attention():
    """The definition: of the tokens so far, the mean of v by phi(q) . phi(k), phi = elu + 1 and the
    floor, where the map is the identity."""
    q, k = 2 * seeded("linear attention").standard_normal((2, 1, 2, 150, 6))
    _, _, v, i, f = inputs(150, B=1, H=2, D=6)
    gates, one = (np.zeros_like(i), np.full_like(f, np.inf)), np.stack([np.eye(6)] * 2)
    h, _ = ops.mapped_mlstm_forward(q, k, v, *gates, one, one, chunk=16, feature_map="elu")
    phi_q, phi_k = (np.where(x > 0, x + 1, np.exp(x)) + 1e-6 / 6 for x in (q, k))
    weights = np.tri(150) * (phi_q @ phi_k.swapaxes(2, 3))
    assert_close(h, weights @ v / weights.sum(-1, keepdims=True), tol.OP_F64, "linear attention")


def test_maps_that_do_not_fit_are_refused():
    q, k, v, i, f = inputs(5)
    w = np.ones((2, 6, 6))
    with pytest.raises(ValueError, match="w_k has shape"):
        ops.mapped_mlstm_forward(q, k, v, i, f, w, w[:1])
    with pytest.raises(ValueError, match="no multiple of 3 key heads"):
        ops.mapped_mlstm_forward(q, np.ones((2, 3, 5, 6)), v, i, f, w, w)
    with pytest.raises(ValueError, match="recurrent form takes features"):
        ops.mapped_mlstm_forward(q, k, v, i, f, w, w, form="recurrent")
    with pytest.raises(ValueError, match="feature_map is 'relu', expected one of softmax, elu"):
        ops.mapped_mlstm_forward(q, k, v, i, f, w, w, feature_map="relu")
