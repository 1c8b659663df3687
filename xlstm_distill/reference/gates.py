"""The output gate, its folding, and the mix of the two branches. Maths: docs/math/gates.md."""

from __future__ import annotations

import numpy as np

from xlstm_distill.reference.scalars import Array, repeat_heads, sigmoid, sum_heads


def output_gate_forward(q: Array, k: Array, v: Array, w: Array, b: Array) -> Array:
    """a [B, H, T] = [q_t k_t v_t] w_h + b_h, the gate before the sigmoid, from q, k, v before RoPE.

    q [B, H, T, D], k and v [B, G, T, D], w [H, 3D], b [H]. Source: arXiv:2603.15590, section 3.
    """
    heads = q.shape[1]
    joined = np.concatenate([q, repeat_heads(k, heads), repeat_heads(v, heads)], axis=-1)
    return np.einsum("bhtj,hj->bht", joined, w) + b[None, :, None]


def output_gate_backward(
    da: Array, q: Array, k: Array, v: Array, w: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """(dq [B, H, T, D], dk, dv [B, G, T, D], dw [H, 3D], db [H]) for da [B, H, T]."""
    heads, groups = q.shape[1], k.shape[1]
    joined = np.concatenate([q, repeat_heads(k, heads), repeat_heads(v, heads)], axis=-1)
    dq, dk, dv = np.split(da[..., None] * w[None, :, None, :], 3, axis=-1)
    dw = np.einsum("bht,bhtj->hj", da, joined)
    return dq, sum_heads(dk, groups), sum_heads(dv, groups), dw, np.sum(da, axis=(0, 2))


def mix_forward(hm: Array, hs: Array, a: Array) -> Array:
    """h = o hm + (1 - o) hs with o = sigmoid(a); hm, hs [B, H, T, E], a [B, H, T].

    hm is the mLSTM's output, hs the attention's. Source: arXiv:2603.15590, equation (11).
    """
    o = sigmoid(a)[..., None]
    return o * hm + (1 - o) * hs


def mix_backward(dh: Array, hm: Array, hs: Array, a: Array) -> tuple[Array, Array, Array]:
    """(dhm, dhs [B, H, T, E], da [B, H, T]) for dh [B, H, T, E]."""
    o = sigmoid(a)
    da = o * (1 - o) * np.sum(dh * (hm - hs), axis=-1)
    return dh * o[..., None], dh * (1 - o[..., None]), da


def fold_output_gate(
    wq: Array,
    wk: Array,
    wv: Array,
    w: Array,
    b: Array,
    bq: Array | None = None,
    bk: Array | None = None,
    bv: Array | None = None,
) -> tuple[Array, Array]:
    """(w' [H, d], b' [H]) such that x_t w'ᵀ + b' is the output gate before the sigmoid.

    wq [H*D, d], wk, wv [G*D, d] project the block's input x_t to q, k, v (biases bq [H*D], bk, bv
    [G*D] or None); w [H, 3D], b [H] are the gate. Exact as long as nothing but these projections
    lies between x_t and the gate (no norm of q or k). Source: substitution, docs/math/gates.md.
    """
    heads, width = w.shape[0], w.shape[1] // 3
    parts = np.split(w, 3, axis=1)
    folded, bias = np.zeros((heads, wq.shape[1]), w.dtype), b.copy()
    for part, weight, shift in zip(parts, (wq, wk, wv), (bq, bk, bv), strict=True):
        groups = weight.shape[0] // width
        of_head = np.repeat(weight.reshape(groups, width, -1), heads // groups, axis=0)
        folded += np.einsum("hj,hjd->hd", part, of_head)
        if shift is not None:
            shift_of_head = np.repeat(shift.reshape(groups, width), heads // groups, axis=0)
            bias += np.sum(part * shift_of_head, axis=1)
    return folded, bias
