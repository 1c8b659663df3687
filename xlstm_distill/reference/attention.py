"""RoPE, attention with window and sinks, feature maps. Maths: the pages of these names."""

from __future__ import annotations

import math

import numpy as np

from xlstm_distill.reference.scalars import Array, repeat_heads, softmax, sum_heads

FEATURE_FLOOR = 1e-6  # total added to the D features, so that phi(q) . phi(k) is never 0 in float32
FEATURE_MAPS = ("softmax", "elu")

# ---- RoPE ---------------------------------------------------------------------------------------


def rope_forward(
    x: Array, positions: Array, inv_freq: Array, inverse: bool = False, scale: float = 1.0
) -> Array:
    """Rotates the pairs (x_j, x_{j + D/2}) of x [B, H, T, D] by positions [B, T] * inv_freq [D/2].

    The result is multiplied by `scale` (YaRN's attention factor, arXiv:2309.00071). `inverse`
    rotates by the negative angle: rotations being orthogonal, that is the backward, and without a
    scale the inverse. Angles are made in float64. Source: arXiv:2104.09864, Hugging Face's pairing.
    """
    angle = positions[:, None, :, None] * inv_freq.astype(np.float64)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    if inverse:
        sin = -sin
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) * x.dtype.type(scale)


# ---- attention ----------------------------------------------------------------------------------


def visible(batch: int, steps: int, window: int | None, sinks: int, reset: Array | None) -> Array:
    """bool [B, T, T]: which key s a query t sees.

    A key is seen if it is not later, lies in the same document, and is one of the last `window`
    tokens (counting the query's own; None: no limit) or one of the first `sinks` of the document.
    """
    starts = np.zeros((batch, steps), bool) if reset is None else reset.astype(bool)
    document = np.cumsum(starts, axis=1)
    t = np.arange(steps)
    first = np.maximum.accumulate(np.where(starts, t, 0), axis=1)  # where t's document starts
    age = t[:, None] - t[None, :]
    near = age < (steps if window is None else window)
    is_sink = (t - first < sinks)[:, None, :]
    same = document[:, :, None] == document[:, None, :]
    return same & (age >= 0) & (near | is_sink)


def _attention_weights(
    q: Array, k: Array, window: int | None, sinks: int, reset: Array | None
) -> Array:
    batch, _, steps, width = q.shape
    mask = visible(batch, steps, window, sinks, reset)[:, None]
    return softmax(np.where(mask, q @ k.swapaxes(2, 3) / math.sqrt(width), -np.inf))


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    window: int | None = None,
    sinks: int = 0,
    reset: Array | None = None,
) -> Array:
    """o [B, H, T, D]: softmax attention over the last `window` tokens and the document's `sinks`.

    q [B, H, T, D], k and v [B, G, T, D], q and k after RoPE; scale 1/sqrt(D). The window counts the
    current token, a sink inside it is counted once, there is one softmax over the union. reset bool
    [B, T]: True where a document starts. Source: arXiv:2603.15590, section 3; arXiv:2309.17453.
    """
    heads = q.shape[1]
    return _attention_weights(q, repeat_heads(k, heads), window, sinks, reset) @ repeat_heads(
        v, heads
    )


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    window: int | None = None,
    sinks: int = 0,
    reset: Array | None = None,
) -> tuple[Array, Array, Array]:
    """(dq [B, H, T, D], dk, dv [B, G, T, D]) for do [B, H, T, D]."""
    heads, groups, scale = q.shape[1], k.shape[1], 1 / math.sqrt(q.shape[3])
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    p = _attention_weights(q, k, window, sinks, reset)
    dp = do @ v.swapaxes(2, 3)
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    dk, dv = scale * ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ do
    return scale * ds @ k, sum_heads(dk, groups), sum_heads(dv, groups)


# ---- feature map --------------------------------------------------------------------------------


def _check_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        names = ", ".join(FEATURE_MAPS)
        raise ValueError(f"feature_map is {feature_map!r}, expected one of {names}")


def feature_map_forward(x: Array, w: Array, feature_map: str = "softmax") -> Array:
    """phi [B, H, T, D]: positive features of a head-wise linear map, kept away from zero.

    x [B, G, T, D], w [H, D, D]; head h reads x of group h // (H/G) as a row vector:
    z_j = Σ_i x_i w[h, i, j], and with c = 1e-6

        softmax    phi = (softmax(z) + c/D) / (1 + c)    arXiv:2603.15590, section 3 (Hedgehog,
                                                         arXiv:2402.04347)
        elu        phi = elu(z) + 1 + c/D                arXiv:2006.16236, section 3.2.1, which has
                                                         no w

    The floors are this project's.
    """
    _check_map(feature_map)
    z, floor = repeat_heads(x, w.shape[0]) @ w, FEATURE_FLOOR / x.shape[3]
    if feature_map == "elu":
        return np.maximum(z, 0) + np.exp(np.minimum(z, 0)) + floor
    return (softmax(z) + floor) / (1 + FEATURE_FLOOR)


def feature_map_backward(
    dphi: Array, x: Array, w: Array, feature_map: str = "softmax"
) -> tuple[Array, Array]:
    """(dx [B, G, T, D], dw [H, D, D]) for dphi [B, H, T, D]."""
    _check_map(feature_map)
    rows = repeat_heads(x, w.shape[0])
    z = rows @ w
    if feature_map == "elu":
        dz = dphi * np.exp(np.minimum(z, 0))
    else:
        p, dp = softmax(z), dphi / (1 + FEATURE_FLOOR)
        dz = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    return (
        sum_heads(dz @ w.swapaxes(1, 2), x.shape[1]),
        np.sum(rows.swapaxes(2, 3) @ dz, axis=0),
    )
