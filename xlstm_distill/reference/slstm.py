"""sLSTM: a scalar memory with exponential gates and recurrent weights. Maths: docs/math/slstm.md.

One step of a head, [i, f, z, o] = x_t + y r:

    m' = max(log sigmoid(f) + m, i)     F = exp(log sigmoid(f) + m - m')     I = exp(i - m')
    c' = F c + I tanh(z)                n' = F n + I                         y' = sigmoid(o) c' / n'

The first step (no state, or a document start) is y = 0 and m = -inf: then F = 0, m' = i, I = 1.
Source: arXiv:2405.04517, section 2.2 (exponential input gate, sigmoid forget gate).
"""

from __future__ import annotations

import numpy as np

from xlstm_distill.reference.scalars import Array, log_sigmoid, sigmoid

State = tuple[Array, Array, Array, Array]


def _start(state: State, begins: Array) -> State:
    """The state with the rows forgotten in which a document begins; begins bool [B]."""
    y, c, n, m = state
    first = begins[:, None, None]
    return (
        np.where(first, 0, y),
        np.where(first, 0, c),
        np.where(first, 0, n),
        np.where(first, -np.inf, m),
    )


def _step(state: State, x: Array, r: Array) -> tuple[State, Array, Array, Array]:
    """(state after, raw gates [B, H, 4, D], F, I) for x [B, H, 4, D]."""
    y, c, n, m = state
    raw = x + np.einsum("bhi,hgij->bhgj", y, r)
    i, f, z, o = (raw[:, :, g] for g in range(4))
    lf = m + log_sigmoid(f)
    m_new = np.maximum(i, lf)
    keep, write = np.exp(lf - m_new), np.exp(i - m_new)
    c, n = keep * c + write * np.tanh(z), keep * n + write
    return (sigmoid(o) * c / n, c, n, m_new), raw, keep, write


def _initial(x: Array, state: State | None) -> State:
    if state is not None:
        return state
    batch, heads, _, _, width = x.shape
    zero = np.zeros((batch, heads, width), x.dtype)
    return zero, zero, zero, np.full_like(zero, -np.inf)


def _begins(x: Array, reset: Array | None) -> Array:
    """bool [B, T]"""
    return np.zeros((x.shape[0], x.shape[2]), bool) if reset is None else reset.astype(bool)


def slstm_forward(
    x: Array, r: Array, state: State | None = None, reset: Array | None = None
) -> tuple[Array, State]:
    """(y [B, H, T, D], state = (y, c, n, m), each [B, H, D]).

    x [B, H, T, 4, D]: pre-activations W x + b in the order i, f, z, o; r [H, 4, D(in), D(out)]
    recurrent weights, raw_t[g] = x_t[g] + y_{t-1} r[h, g]. reset bool [B, T]: True where a document
    starts. T >= 1.
    """
    current, begins = _initial(x, state), _begins(x, reset)
    y = np.empty(x.shape[:3] + x.shape[4:], x.dtype)
    for t in range(x.shape[2]):
        current, _, _, _ = _step(_start(current, begins[:, t]), x[:, :, t], r)
        y[:, :, t] = current[0]
    return y, current


def slstm_backward(
    dy: Array,
    x: Array,
    r: Array,
    state: State | None = None,
    dstate: tuple[Array, ...] | None = None,
    reset: Array | None = None,
) -> tuple[Array, Array, State | None]:
    """(dx [B, H, T, 4, D], dr [H, 4, D, D], dstate) for dy [B, H, T, D].

    dstate = (dy, dc, dn, dm) is the gradient on the last state at fixed m (None: zero; dm is not
    read), and the last result the one on the start state at fixed m (dm = 0), None without a state.
    """
    current, begins = _initial(x, state), _begins(x, reset)
    steps = []
    for t in range(x.shape[2]):
        before = _start(current, begins[:, t])
        current, raw, keep, write = _step(before, x[:, :, t], r)
        steps.append((before, current, raw, keep, write))
    dx, dr, none = np.empty_like(x), np.zeros_like(r), np.zeros_like(current[0])
    dy_next, dc, dn = (none, none, none) if dstate is None else dstate[:3]
    for t in reversed(range(x.shape[2])):
        (y0, c0, n0, _), (_, c, n, _), raw, keep, write = steps[t]
        _, f, z, o = (raw[:, :, g] for g in range(4))
        # y = sigmoid(o) c / n
        dy_t = dy[:, :, t] + dy_next
        out, tanh_z = sigmoid(o), np.tanh(z)
        dc = dc + dy_t * out / n
        dn = dn - dy_t * out * c / (n * n)
        # c = F c0 + I tanh z,  n = F n0 + I
        di = write * (dc * tanh_z + dn)
        df = keep * (dc * c0 + dn * n0) * sigmoid(-f)
        dz = write * dc * (1 - tanh_z * tanh_z)
        do = dy_t * (c / n) * out * (1 - out)
        draw = np.stack([di, df, dz, do], axis=2)
        dx[:, :, t] = draw
        # raw = x + y0 r; y0, c0 and n0 are the constant 0 where a document begins
        dr += np.einsum("bhi,bhgj->hgij", y0, draw)
        dy_next = np.einsum("bhgj,hgij->bhi", draw, r)
        dy_next = np.where(begins[:, t][:, None, None], 0, dy_next)
        dc, dn = keep * dc, keep * dn
    return dx, dr, None if state is None else (dy_next, dc, dn, np.zeros_like(dn))
