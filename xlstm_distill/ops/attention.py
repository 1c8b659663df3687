"""Attention with window and sinks, feature maps, output gate, mix and LoLCATs, on the C core.

`xlstm_distill.reference` has the same functions in plain NumPy; it is the specification. Shapes:
B batch, H query heads, G key/value heads (query head h reads h // (H/G)), T steps, D head width.
The maths is in docs/math/attention.md, feature_map.md, gates.md and lolcats.md.

Arrays may be anything NumPy can convert. The work is done in float64 if any input is float64 and in
float32 otherwise, and results have that dtype. Wrong dimensions and sizes that disagree raise
ValueError, a wrong kind of dtype raises TypeError, in one line that names the argument.
Nothing is written into what is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xlstm_distill.ops.arrays import FEATURE_MAPS, Array, choice, common_dtype, floats, same_shape
from xlstm_distill.runtime import core


def _grouped(heads: int, groups: int) -> None:
    """ValueError unless H query heads can share G key/value heads."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads are not a multiple of {groups} key/value heads")


def _key_heads(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    """q [B, H, T, D], k, v [B, G, T, D], converted and checked against each other."""
    q, k, v = floats("q", q, 4, dtype), floats("k", k, 4, dtype), floats("v", v, 4, dtype)
    batch, heads, steps, width = q.shape
    _grouped(heads, k.shape[1])
    same_shape("k", k, (batch, k.shape[1], steps, width))
    same_shape("v", v, k.shape)
    return q, k, v


# ---- attention ----------------------------------------------------------------------------------


def _positions(reset: ArrayLike | None, batch: int, steps: int) -> Array:
    """int32 [B, T]: position of each step in its document; the first step always starts one."""
    step = np.broadcast_to(np.arange(steps, dtype=np.int32), (batch, steps))
    if reset is None:
        return np.ascontiguousarray(step)
    given = np.asarray(reset)
    if given.dtype.kind not in "biu":
        raise TypeError(f"reset has dtype {given.dtype}, expected bool")
    same_shape("reset", given, (batch, steps))
    return step - np.maximum.accumulate(np.where(given, step, 0), axis=1, dtype=np.int32)


class _Attention:
    """Converted and checked arguments that forward and backward share."""

    def __init__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        window: int | None,
        sinks: int,
        reset: ArrayLike | None,
        mixed: bool,
        *more: ArrayLike,
    ) -> None:
        self.dtype = common_dtype(q, k, v, *more)
        self.q, self.k, self.v = _key_heads(q, k, v, self.dtype)
        if window is not None and window < 1:
            raise ValueError(f"window is {window}, expected at least 1 or None")
        if sinks < 0:
            raise ValueError(f"sinks is {sinks}, expected at least 0")
        batch, heads, steps, _ = self.q.shape
        self.o = np.empty_like(self.q)
        self.lse = np.empty((batch, heads, steps), self.dtype)
        row = max(1, steps)  # a longer window sees the whole row, and so do more sinks
        self.options = (
            _positions(reset, batch, steps),
            None,  # lengths: rows of the public functions are full
            row if window is None else min(int(window), row),
            min(int(sinks), row),
        )
        self.mixed = int(mixed)

    def forward(self, lse: Array | None) -> None:
        core(self.dtype).attention_forward(
            self.o, lse, self.q, self.k, self.v, *self.options, None, None, None, self.mixed
        )


def attention_forward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    window: int | None = None,
    sinks: int = 0,
    reset: ArrayLike | None = None,
    mixed: bool = False,
) -> Array:
    """o [B, H, T, D]: softmax attention over the last `window` tokens and the document's `sinks`.

    q [B, H, T, D], k and v [B, G, T, D], q and k after RoPE; scale 1/sqrt(D). The window counts the
    current token (None: all of the document), a sink inside it is counted once and there is one
    softmax over the union. reset bool [B, T]: True where a document starts. Time is linear in T for
    a fixed window; no [T, T] matrix is held. mixed: the operands of products are rounded to bf16
    where the processor gains by it. Source: arXiv:2603.15590, section 3; arXiv:2309.17453.
    """
    a = _Attention(q, k, v, window, sinks, reset, mixed)
    a.forward(None)
    return a.o


def attention_backward(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    window: int | None = None,
    sinks: int = 0,
    reset: ArrayLike | None = None,
    mixed: bool = False,
) -> tuple[Array, Array, Array]:
    """(dq [B, H, T, D], dk, dv [B, G, T, D]) of `attention_forward` for do [B, H, T, D].

    Runs the forward again for the logsumexp of every row.
    """
    a = _Attention(q, k, v, window, sinks, reset, mixed, do)
    do = floats("do", do, 4, a.dtype)
    same_shape("do", do, a.q.shape)
    a.forward(a.lse)
    dq, dk, dv = np.zeros_like(a.q), np.zeros_like(a.k), np.zeros_like(a.v)
    core(a.dtype).attention_backward(
        dq, dk, dv, do, a.q, a.k, a.v, a.o, a.lse, *a.options, None, None, None, a.mixed
    )
    return dq, dk, dv


# ---- feature map --------------------------------------------------------------------------------


def _map(x: ArrayLike, w: ArrayLike, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    x, w = floats("x", x, 4, dtype), floats("w", w, 3, dtype)
    _grouped(w.shape[0], x.shape[1])
    same_shape("w", w, (w.shape[0], x.shape[3], x.shape[3]))
    return x, w


def _features(x: Array, w: Array, options: tuple[int, int]) -> Array:
    phi = np.empty((x.shape[0], w.shape[0], *x.shape[2:]), x.dtype)
    core(x.dtype).feature_map_forward(phi, x, w, *options)
    return phi


def _map_options(feature_map: str, mixed: bool) -> tuple[int, int]:
    return choice("feature_map", feature_map, FEATURE_MAPS), int(mixed)


def feature_map_forward(
    x: ArrayLike, w: ArrayLike, feature_map: str = "softmax", mixed: bool = False
) -> Array:
    """phi [B, H, T, D]: positive features of a head-wise linear map, kept away from zero.

    x [B, G, T, D], w [H, D, D]; head h reads x of group h // (H/G) as a row vector:
    z_j = Σ_i x_i w[h, i, j], and with c = 1e-6

        softmax    phi = (softmax(z) + c/D) / (1 + c)    arXiv:2603.15590, section 3 (Hedgehog,
                                                         arXiv:2402.04347)
        elu        phi = elu(z) + 1 + c/D                arXiv:2006.16236, section 3.2.1, which has
                                                         no w

    mixed: x and w are rounded to bf16 where the processor gains by it. The floors are this
    project's.
    """
    return _features(*_map(x, w, common_dtype(x, w)), _map_options(feature_map, mixed))


def feature_map_backward(
    dphi: ArrayLike,
    x: ArrayLike,
    w: ArrayLike,
    feature_map: str = "softmax",
    mixed: bool = False,
) -> tuple[Array, Array]:
    """(dx [B, G, T, D], dw [H, D, D]) of `feature_map_forward` for dphi [B, H, T, D].

    Runs the forward again; dx is added over the heads that read a group.
    """
    dtype = common_dtype(dphi, x, w)
    x, w = _map(x, w, dtype)
    options = _map_options(feature_map, mixed)
    dphi, phi = floats("dphi", dphi, 4, dtype), _features(x, w, options)
    same_shape("dphi", dphi, phi.shape)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    core(dtype).feature_map_backward(dx, dw, dphi, phi, x, w, *options)
    return dx, dw


# ---- output gate --------------------------------------------------------------------------------


def _gate_weight(w: ArrayLike, q: Array) -> Array:
    w = floats("w", w, 2, q.dtype)
    same_shape("w", w, (q.shape[1], 3 * q.shape[3]))
    return w


def output_gate_forward(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, w: ArrayLike, b: ArrayLike
) -> Array:
    """a [B, H, T] = [q_t k_t v_t] w_h + b_h, the gate before the sigmoid, from q, k, v before RoPE.

    q [B, H, T, D], k and v [B, G, T, D], w [H, 3D], b [H]. Source: arXiv:2603.15590, section 3.
    """
    dtype = common_dtype(q, k, v, w, b)
    q, k, v = _key_heads(q, k, v, dtype)
    w, b = _gate_weight(w, q), floats("b", b, 1, dtype)
    same_shape("b", b, (q.shape[1],))
    a = np.empty(q.shape[:3], dtype)
    core(dtype).output_gate_forward(a, q, k, v, w, b)
    return a


def output_gate_backward(
    da: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike, w: ArrayLike
) -> tuple[Array, Array, Array, Array, Array]:
    """(dq [B, H, T, D], dk, dv [B, G, T, D], dw [H, 3D], db [H]) for da [B, H, T]."""
    dtype = common_dtype(da, q, k, v, w)
    q, k, v = _key_heads(q, k, v, dtype)
    w, da = _gate_weight(w, q), floats("da", da, 3, dtype)
    same_shape("da", da, q.shape[:3])
    dq, dk, dv, dw = (np.zeros_like(x) for x in (q, k, v, w))
    db = np.zeros(q.shape[1], dtype)
    core(dtype).output_gate_backward(dq, dk, dv, dw, db, da, q, k, v, w)
    return dq, dk, dv, dw, db


# ---- mix ----------------------------------------------------------------------------------------


def _branches(
    hm: ArrayLike, hs: ArrayLike, a: ArrayLike, dtype: np.dtype[Any]
) -> tuple[Array, Array, Array]:
    hm, hs, a = floats("hm", hm, 4, dtype), floats("hs", hs, 4, dtype), floats("a", a, 3, dtype)
    same_shape("hs", hs, hm.shape)
    same_shape("a", a, hm.shape[:3])
    return hm, hs, a


def mix_forward(hm: ArrayLike, hs: ArrayLike, a: ArrayLike) -> Array:
    """h = o hm + (1 - o) hs with o = sigmoid(a); hm, hs [B, H, T, E], a [B, H, T].

    hm is the mLSTM's output, hs the attention's. Source: arXiv:2603.15590, equation (11).
    """
    dtype = common_dtype(hm, hs, a)
    hm, hs, a = _branches(hm, hs, a, dtype)
    h = np.empty_like(hm)
    core(dtype).mix_forward(h, hm, hs, a)
    return h


def mix_backward(
    dh: ArrayLike, hm: ArrayLike, hs: ArrayLike, a: ArrayLike
) -> tuple[Array, Array, Array]:
    """(dhm, dhs [B, H, T, E], da [B, H, T]) of `mix_forward` for dh [B, H, T, E]."""
    dtype = common_dtype(dh, hm, hs, a)
    hm, hs, a = _branches(hm, hs, a, dtype)
    dh = floats("dh", dh, 4, dtype)
    same_shape("dh", dh, hm.shape)
    dhm, dhs, da = np.zeros_like(hm), np.zeros_like(hs), np.zeros_like(a)
    core(dtype).mix_backward(dhm, dhs, da, dh, hm, hs, a)
    return dhm, dhs, da


# ---- LoLCATs ------------------------------------------------------------------------------------


class _Lolcats:
    """Converted and checked arguments that forward and backward share."""

    def __init__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        w_q: ArrayLike,
        w_k: ArrayLike,
        factor: ArrayLike,
        window: int | None,
        sinks: int,
        reset: ArrayLike | None,
        chunk: int,
        feature_map: str,
        mixed: bool,
        *more: ArrayLike,
    ) -> None:
        a = _Attention(q, k, v, window, sinks, reset, mixed, w_q, w_k, factor, *more)
        heads, width = a.q.shape[1], a.q.shape[3]
        maps = [floats(name, w, 3, a.dtype) for name, w in (("w_q", w_q), ("w_k", w_k))]
        for name, w in zip(("w_q", "w_k"), maps, strict=True):
            same_shape(name, w, (heads, width, width))
        factor = floats("factor", factor, 1, a.dtype)
        same_shape("factor", factor, (heads,))
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1")
        self.dtype, self.y = a.dtype, a.o
        self.inputs = (a.q, a.k, a.v, *maps, factor)
        self.options = (
            *a.options,
            min(int(chunk), max(1, a.q.shape[2])),
            choice("feature_map", feature_map, FEATURE_MAPS),
            a.mixed,
        )


def lolcats_forward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    factor: ArrayLike,
    window: int | None = None,
    sinks: int = 0,
    reset: ArrayLike | None = None,
    chunk: int = 64,
    feature_map: str = "softmax",
    mixed: bool = False,
) -> Array:
    """y [B, H, T, D]: softmax attention over the last `window` tokens and the document's `sinks`,
    linear attention over its other tokens, one normaliser for both.

    q [B, H, T, D], k and v [B, G, T, D], q and k after RoPE; maps w_q, w_k [H, D, D] and
    `feature_map` as in `feature_map_forward`; factor [H]. The weight of a token that softmax sees
    is sigmoid(factor) times exp(score - largest score), that of another phi(q) . phi(k). Window,
    sinks and reset as in `attention_forward`. Time is linear in T; the linear part works on `chunk`
    steps at a time, which changes rounding only. mixed: the operands of products are rounded to
    bf16 where the processor gains by it. Source: arXiv:2410.10254, the form with a sliding window;
    the sinks are this project's.
    """
    a = _Lolcats(q, k, v, w_q, w_k, factor, window, sinks, reset, chunk, feature_map, mixed)
    core(a.dtype).lolcats_forward(a.y, *a.inputs, *a.options)
    return a.y


def lolcats_backward(
    dy: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    factor: ArrayLike,
    window: int | None = None,
    sinks: int = 0,
    reset: ArrayLike | None = None,
    chunk: int = 64,
    feature_map: str = "softmax",
    mixed: bool = False,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """(dq, dk, dv, dw_q, dw_k, dfactor) of `lolcats_forward`, each of the shape of its input, for
    dy [B, H, T, D]. The gradient through the largest score is in them.

    Runs the forward again.
    """
    a = _Lolcats(q, k, v, w_q, w_k, factor, window, sinks, reset, chunk, feature_map, mixed, dy)
    dy = floats("dy", dy, 4, a.dtype)
    same_shape("dy", dy, a.y.shape)
    dq, dk, dv, dw_q, dw_k, dfactor = gradients = tuple(np.zeros_like(x) for x in a.inputs)
    core(a.dtype).lolcats_backward(*gradients, dy, a.y, *a.inputs, *a.options)
    return dq, dk, dv, dw_q, dw_k, dfactor


# ---- folding ------------------------------------------------------------------------------------


def fold_output_gate(
    wq: ArrayLike,
    wk: ArrayLike,
    wv: ArrayLike,
    w: ArrayLike,
    b: ArrayLike,
    bq: ArrayLike | None = None,
    bk: ArrayLike | None = None,
    bv: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """(w' [H, d], b' [H]) such that x_t w'ᵀ + b' is the output gate before the sigmoid.

    wq [H*D, d], wk, wv [G*D, d] project the block's input x_t to q, k, v (biases bq [H*D], bk, bv
    [G*D] or None); w [H, 3D], b [H] are the gate. Exact as long as nothing but these projections
    lies between x_t and the gate (no norm of q or k). A one-off for inference, so it is NumPy; it
    adds in float64 and rounds once. Source: substitution, docs/math/gates.md.
    """
    dtype = common_dtype(wq, wk, wv, w, b, bq, bk, bv)
    w, bias = floats("w", w, 2, np.float64), floats("b", b, 1, np.float64).copy()
    heads, width = w.shape[0], w.shape[1] // 3
    same_shape("w", w, (heads, 3 * width))
    same_shape("b", bias, (heads,))
    wq = floats("wq", wq, 2, np.float64)
    same_shape("wq", wq, (heads * width, wq.shape[1]))
    wk = floats("wk", wk, 2, np.float64)
    groups = wk.shape[0] // max(1, width)
    _grouped(heads, groups)
    folded = np.zeros((heads, wq.shape[1]))
    for n, (name, weight, shift, count) in enumerate(
        (("q", wq, bq, heads), ("k", wk, bk, groups), ("v", wv, bv, groups))
    ):
        part = w[:, n * width : (n + 1) * width]
        matrix = floats(f"w{name}", weight, 2, np.float64)
        same_shape(f"w{name}", matrix, (count * width, wq.shape[1]))
        of_head = np.repeat(matrix.reshape(count, width, -1), heads // count, axis=0)
        folded += np.einsum("hj,hjd->hd", part, of_head)
        if shift is not None:
            vector = floats(f"b{name}", shift, 1, np.float64)
            same_shape(f"b{name}", vector, (count * width,))
            of_head = np.repeat(vector.reshape(count, width), heads // count, axis=0)
            bias += np.sum(part * of_head, axis=1)
    return folded.astype(dtype), bias.astype(dtype)
