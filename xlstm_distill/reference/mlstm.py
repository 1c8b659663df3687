"""mLSTM: a matrix memory with exponential gates, in three equal forms. Maths: docs/math/mlstm.md.

One step of a head, gate pre-activations i and f, q scaled by `scale`:

    m' = max(log sigmoid(f) + m, i)      F = exp(log sigmoid(f) + m - m')      I = exp(i - m')
    C' = F C + I k vᵀ                    n' = F n + I k
    ratio: h = C'ᵀ q / (n' . q)          max: h = C'ᵀ q / max(|n' . q|, exp(-m'))

C and n are stored scaled by exp(-m), which cancels in h: m is free and only keeps exponentials at
most 1; 0/0 is 0. No state is m = -inf, which makes F = 0; a document start is the same, f = -inf
for one step. There is no eps. Source: arXiv:2405.04517 (max), arXiv:2603.15590 (8)-(10) (ratio).
"""

from __future__ import annotations

import math

import numpy as np

from xlstm_distill.reference.attention import feature_map_forward
from xlstm_distill.reference.scalars import Array, log_sigmoid, sigmoid

State = tuple[Array, Array, Array]
NORMALIZERS = ("ratio", "max")
FORMS = ("chunkwise", "parallel", "recurrent")


def _no_state(q: Array, v: Array) -> State:
    batch, heads, _, width = q.shape
    c = np.zeros((batch, heads, width, v.shape[3]), q.dtype)
    return c, np.zeros_like(c[..., 0]), np.full((batch, heads), -np.inf, q.dtype)


def _resets(reset: Array | None, q: Array) -> Array:
    """bool [B, 1, T]"""
    batch, _, steps, _ = q.shape
    return np.zeros((batch, 1, steps), bool) if reset is None else reset.astype(bool)[:, None, :]


def _normalise(num: Array, den: Array, m: Array, normalizer: str) -> tuple[Array, Array]:
    """(h, what num was multiplied by) for num [..., E], den [...], stabiliser m [...]; 0/0 is 0."""
    with np.errstate(over="ignore", divide="ignore"):  # exp(-m) = inf: above everything, h is 0
        used = den if normalizer == "ratio" else np.maximum(np.abs(den), np.exp(-m))
        inverse = np.where(used == 0, 0, 1 / used)
    return num * inverse[..., None], inverse


def _step(state: State, k: Array, v: Array, i: Array, lf: Array) -> tuple[State, Array, Array]:
    """The state after one step and F, I. k [B, H, D], v [B, H, E], i and lf = log f [B, H]."""
    c, n, m = state
    m_new = np.maximum(lf + m, i)
    keep, write = np.exp(lf + m - m_new), np.exp(i - m_new)
    c = keep[..., None, None] * c + write[..., None, None] * k[..., :, None] * v[..., None, :]
    n = keep[..., None] * n + write[..., None] * k
    return (c, n, m_new), keep, write


def _log_forget(f: Array, start: Array) -> Array:
    """log sigmoid(f), and -inf where a document starts: nothing is kept."""
    return np.where(start, -np.inf, log_sigmoid(f))


def _recurrent(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: State, normalizer: str, start: Array
) -> tuple[Array, State]:
    lf = _log_forget(f, start)
    h = np.empty_like(v)
    for t in range(q.shape[2]):
        state, _, _ = _step(state, k[:, :, t], v[:, :, t], i[:, :, t], lf[:, :, t])
        c, n, m = state
        num = np.einsum("bhd,bhde->bhe", q[:, :, t], c)
        den = np.einsum("bhd,bhd->bh", q[:, :, t], n)
        h[:, :, t], _ = _normalise(num, den, m, normalizer)
    return h, state


def _parallel(
    q: Array, k: Array, v: Array, i: Array, f: Array, state: State, normalizer: str, start: Array
) -> tuple[Array, State]:
    """All steps at once. D_ts = log of the weight of step s in the state after step t."""
    c0, n0, m0 = state
    steps = q.shape[2]
    document = np.cumsum(start, axis=2)  # [B, 1, T]; 0: still the document that the state is of
    # a start's own decay acts only across the boundary, where everything is masked
    b = np.cumsum(np.where(start, 0, log_sigmoid(f)), axis=2)
    causal = np.tri(steps, dtype=bool) & (document[..., :, None] == document[..., None, :])
    d = np.where(causal, b[..., :, None] - b[..., None, :] + i[..., None, :], -np.inf)
    carry = np.where(document == 0, b + m0[..., None], -np.inf)  # log weight of the start state
    m = np.maximum(np.max(d, axis=3), carry)
    weights, w0 = np.exp(d - m[..., None]), np.exp(carry - m)
    p = q @ k.swapaxes(2, 3) * weights
    num = p @ v + w0[..., None] * (q @ c0)
    den = np.sum(p, axis=3) + w0 * np.einsum("bhtd,bhd->bht", q, n0)
    h, _ = _normalise(num, den, m, normalizer)
    a, a0 = weights[:, :, -1, :], w0[:, :, -1]  # what is left of each step and of the start
    ak = a[..., None] * k
    c = ak.swapaxes(2, 3) @ v + a0[..., None, None] * c0
    n = np.sum(ak, axis=2) + a0[..., None] * n0
    return h, (c, n, m[:, :, -1])


def _chunkwise(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: State,
    normalizer: str,
    start: Array,
    chunk: int,
) -> tuple[Array, State]:
    """Parallel within a chunk, recurrent from chunk to chunk; the last chunk may be short."""
    parts = []
    for begin in range(0, q.shape[2], chunk):
        s = np.s_[:, :, begin : begin + chunk]
        h, state = _parallel(q[s], k[s], v[s], i[s], f[s], state, normalizer, start[s])
        parts.append(h)
    return np.concatenate(parts, axis=2), state


def _check(normalizer: str, form: str, chunk: int) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer is {normalizer!r}, expected one of {', '.join(NORMALIZERS)}")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")


def mlstm_forward(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: State | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    form: str = "chunkwise",
    chunk: int = 64,
    reset: Array | None = None,
) -> tuple[Array, State]:
    """(h [B, H, T, E], state) with state = (C [B, H, D, E], n [B, H, D], m [B, H]).

    q, k [B, H, T, D] (after the feature maps), v [B, H, T, E], i, f gate pre-activations [B, H, T];
    `scale` multiplies q (None: 1/sqrt(D)); normalizer "ratio" | "max"; form "recurrent" |
    "parallel" | "chunkwise" with `chunk` steps at a time: the same to rounding. reset bool [B, T]:
    True where a document starts and the state is forgotten. T >= 1.
    """
    _check(normalizer, form, chunk)
    q = q * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    state = _no_state(q, v) if state is None else state
    start = _resets(reset, q)
    if form == "recurrent":
        return _recurrent(q, k, v, i, f, state, normalizer, start)
    if form == "parallel":
        return _parallel(q, k, v, i, f, state, normalizer, start)
    return _chunkwise(q, k, v, i, f, state, normalizer, start, chunk)


def mapped_mlstm_forward(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    w_q: Array,
    w_k: Array,
    state: State | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    form: str = "chunkwise",
    chunk: int = 64,
    reset: Array | None = None,
    feature_map: str = "softmax",
) -> tuple[Array, State]:
    """`mlstm_forward` of the features of q [B, H, T, D] under w_q, of k [B, G, T, D] under w_k."""
    phi_q, phi_k = (feature_map_forward(x, w, feature_map) for x, w in ((q, w_q), (k, w_k)))
    return mlstm_forward(phi_q, phi_k, v, i, f, state, normalizer, scale, form, chunk, reset)


def mlstm_backward(
    dh: Array,
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    state: State | None = None,
    dstate: tuple[Array, ...] | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    chunk: int = 64,
    reset: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array, State | None]:
    """(dq, dk, dv, di, df, dstate), each of the shape of its input, for dh [B, H, T, E].

    dstate = (dC, dn, dm) is the gradient on the last state at fixed m (None: zero; dm is not read),
    and the last result the one on the start state at fixed m (dm = 0), None if there was no state.
    The result does not depend on `chunk`: this is the recurrence run backwards, every state kept.
    """
    _check(normalizer, "recurrent", chunk)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    lf = _log_forget(f, _resets(reset, q))
    states, gates = [_no_state(q, v) if state is None else state], []
    for t in range(q.shape[2]):
        after, *keep_write = _step(states[-1], k[:, :, t], v[:, :, t], i[:, :, t], lf[:, :, t])
        states.append(after)
        gates.append(keep_write)
    dc, dn = (np.zeros_like(a) for a in states[0][:2]) if dstate is None else dstate[:2]
    dq, dk, dv, di, df = (np.empty_like(a) for a in (q, k, v, i, f))
    for t in reversed(range(q.shape[2])):
        (c, n, m), (c_before, n_before, _) = states[t + 1], states[t]
        q_t, k_t, v_t, dh_t = q[:, :, t] * scale, k[:, :, t], v[:, :, t], dh[:, :, t]
        # h = num inverse, num = q C, den = q . n
        num = np.einsum("bhd,bhde->bhe", q_t, c)
        den = np.einsum("bhd,bhd->bh", q_t, n)
        h, inverse = _normalise(num, den, m, normalizer)
        dnum = dh_t * inverse[..., None]
        dden = -np.sum(dh_t * h, axis=-1) * inverse
        if normalizer == "max":  # where the floor is used, den has no influence
            with np.errstate(over="ignore"):
                dden = np.where(np.abs(den) < np.exp(-m), 0, dden * np.sign(den))
        dq[:, :, t] = scale * (np.einsum("bhde,bhe->bhd", c, dnum) + n * dden[..., None])
        dc = dc + q_t[..., :, None] * dnum[..., None, :]
        dn = dn + q_t * dden[..., None]
        # C = F C_before + I k v,  n = F n_before + I k
        keep, write = gates[t]
        along_k = np.einsum("bhde,bhe->bhd", dc, v_t) + dn
        dk[:, :, t] = write[..., None] * along_k
        dv[:, :, t] = write[..., None] * np.einsum("bhde,bhd->bhe", dc, k_t)
        di[:, :, t] = write * np.sum(along_k * k_t, axis=-1)
        dlf = keep * (np.sum(dc * c_before, axis=(2, 3)) + np.sum(dn * n_before, axis=2))
        df[:, :, t] = dlf * sigmoid(-f[:, :, t])
        dc, dn = keep[..., None, None] * dc, keep[..., None] * dn
    return dq, dk, dv, di, df, None if state is None else (dc, dn, np.zeros_like(state[2]))
