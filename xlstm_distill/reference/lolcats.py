"""LoLCATs: softmax attention inside the window, linear attention over the keys before it, and one
normaliser for both. Maths: docs/math/lolcats.md.

With z = q . k / sqrt(D), g = sigmoid(factor) and V the keys that the softmax sees, L the others of
the document, the weight of a key is

    V: g exp(z - max over V of z)        L: phi(q) . phi(k)

and y is the mean of v by these weights. The largest score is part of the function: it keeps the
exponentials at most 1, but does not cancel. Source: arXiv:2410.10254, the form with a sliding
window; the sinks are this project's.
"""

from __future__ import annotations

import math

import numpy as np

from xlstm_distill.reference.attention import (
    feature_map_backward,
    feature_map_forward,
    visible,
)
from xlstm_distill.reference.scalars import Array, repeat_heads, sigmoid, sum_heads


def _masks(
    batch: int, steps: int, window: int | None, sinks: int, reset: Array | None
) -> tuple[Array, Array]:
    """(V, L), bool [B, 1, T, T]: which keys a query sees by softmax, which by linear attention."""
    inside = visible(batch, steps, window, sinks, reset)
    return inside[:, None], (visible(batch, steps, None, 0, reset) & ~inside)[:, None]


def _weights(
    q: Array, k: Array, phi_q: Array, phi_k: Array, factor: Array, inside: Array, before: Array
) -> tuple[Array, Array, Array]:
    """(weights of V, weights of L, scores), [B, H, T, T] each; k has H heads."""
    z = np.where(inside, q @ k.swapaxes(2, 3) / math.sqrt(q.shape[3]), -np.inf)
    near = sigmoid(factor)[:, None, None] * np.exp(z - np.max(z, axis=-1, keepdims=True))
    return near, before * (phi_q @ phi_k.swapaxes(2, 3)), z


def lolcats_forward(
    q: Array,
    k: Array,
    v: Array,
    w_q: Array,
    w_k: Array,
    factor: Array,
    window: int | None = None,
    sinks: int = 0,
    reset: Array | None = None,
    chunk: int = 64,
    feature_map: str = "softmax",
) -> Array:
    """y [B, H, T, D]: one mean of v over the document, the weights of which are softmax's for the
    last `window` tokens and the `sinks`, and linear attention's for the others.

    q [B, H, T, D], k and v [B, G, T, D], q and k after RoPE; feature maps w_q, w_k [H, D, D];
    factor [H], whose sigmoid multiplies softmax's weights. Window, sinks and reset as in
    `attention_forward`. The result does not depend on `chunk`.
    """
    phi_q, phi_k = (feature_map_forward(x, w, feature_map) for x, w in ((q, w_q), (k, w_k)))
    batch, heads, steps, _ = q.shape
    masks = _masks(batch, steps, window, sinks, reset)
    near, far, _ = _weights(q, repeat_heads(k, heads), phi_q, phi_k, factor, *masks)
    weights = near + far
    return weights @ repeat_heads(v, heads) / np.sum(weights, axis=-1, keepdims=True)


def lolcats_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    w_q: Array,
    w_k: Array,
    factor: Array,
    window: int | None = None,
    sinks: int = 0,
    reset: Array | None = None,
    chunk: int = 64,
    feature_map: str = "softmax",
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """(dq, dk, dv, dw_q, dw_k, dfactor), each of the shape of its input, for dy [B, H, T, D]."""
    batch, heads, steps, width = q.shape
    groups, scale = k.shape[1], 1 / math.sqrt(width)
    phi_q, phi_k = (feature_map_forward(x, w, feature_map) for x, w in ((q, w_q), (k, w_k)))
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    inside, before = _masks(batch, steps, window, sinks, reset)
    near, far, z = _weights(q, keys, phi_q, phi_k, factor, inside, before)
    weights = near + far
    total = np.sum(weights, axis=-1, keepdims=True)
    y = weights @ values / total
    dweights = (dy @ values.swapaxes(2, 3) - np.sum(dy * y, axis=-1, keepdims=True)) / total
    dv = (weights / total).swapaxes(2, 3) @ dy
    # softmax's weights: z moves its own, and the largest z all of them the other way
    dnear = near * dweights
    moved = np.sum(dnear, axis=-1)
    dfactor = np.sum(moved, axis=(0, 2)) * sigmoid(-factor)
    largest = np.argmax(z, axis=-1)[..., None]
    dz = dnear.copy()
    np.put_along_axis(dz, largest, np.take_along_axis(dz, largest, -1) - moved[..., None], -1)
    dq, dk = scale * dz @ keys, sum_heads(scale * dz.swapaxes(2, 3) @ q, groups)
    dfar = before * dweights
    dq_far, dw_q = feature_map_backward(dfar @ phi_k, q, w_q, feature_map)
    dk_far, dw_k = feature_map_backward(dfar.swapaxes(2, 3) @ phi_q, k, w_k, feature_map)
    return dq + dq_far, dk + dk_far, sum_heads(dv, groups), dw_q, dw_k, dfactor
