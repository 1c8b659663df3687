"""Linear, embedding, RMSNorm, SwiGLU (docs/math/rows.md); AdamW and merging (optimiser.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xlstm_distill.reference.scalars import Array, sigmoid

# ---- linear -------------------------------------------------------------------------------------


def linear_forward(x: Array, w: Array, b: Array | None = None) -> Array:
    """y [N, M] = x wᵀ + b for x [N, K], w [M, K], b [M] or None."""
    y = x @ w.T
    return y if b is None else y + b


def linear_backward(
    dy: Array, x: Array, w: Array, bias: bool = False
) -> tuple[Array, Array, Array | None]:
    """(dx [N, K], dw [M, K], db [M] or None if not `bias`) for dy [N, M]."""
    return dy @ w, dy.T @ x, np.sum(dy, axis=0) if bias else None


# ---- embedding ----------------------------------------------------------------------------------


def embedding_forward(ids: Array, w: Array) -> Array:
    """y [N, d] = w[ids] for ids [N] in 0..V-1, w [V, d]."""
    return w[ids]


def embedding_backward(dy: Array, ids: Array, vocab: int) -> Array:
    """dw [V, d]: row v is the sum of the rows of dy [N, d] whose id is v; V = `vocab`."""
    dw = np.zeros((vocab, dy.shape[1]), dy.dtype)
    np.add.at(dw, ids, dy)
    return dw


# ---- RMSNorm ------------------------------------------------------------------------------------


def rmsnorm_forward(x: Array, w: Array, eps: float) -> tuple[Array, Array]:
    """(y [N, d], rstd [N]): y = x rstd w with rstd = (mean x² + eps)^(-1/2); x [N, d], w [d].

    Source: arXiv:1910.07467; eps inside the root as in Llama.
    """
    rstd = 1 / np.sqrt(np.mean(x * x, axis=1) + eps)
    return x * rstd[:, None] * w, rstd


def rmsnorm_backward(dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array]:
    """(dx [N, d], dw [d]) for dy [N, d]; rstd [N] is what the forward returned."""
    xhat = x * rstd[:, None]
    dxhat = dy * w
    along = np.mean(dxhat * xhat, axis=1, keepdims=True)  # the part of dxhat that rescaling undoes
    return rstd[:, None] * (dxhat - xhat * along), np.sum(dy * xhat, axis=0)


# ---- SwiGLU -------------------------------------------------------------------------------------


def swiglu_forward(gate: Array, up: Array) -> Array:
    """y = silu(gate) up with silu(g) = g sigmoid(g), all [N, F]. Source: arXiv:2002.05202."""
    return gate * sigmoid(gate) * up


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """(dgate, dup), both [N, F], for dy [N, F]."""
    s = sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


# ---- optimiser and merge ------------------------------------------------------------------------


def adamw_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float = 1.0,
) -> None:
    """One AdamW step in place on p, m, v, all [n]; g [n] is multiplied by `scale` (clipping) first.

    `step` counts from 1. Decay is decoupled: it uses p before the step and no moment.
    Source: arXiv:1711.05101.
    """
    g = g * scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    mean, square = m / (1 - beta1**step), v / (1 - beta2**step)  # without the bias to zero
    p[...] = p - lr * (mean / (np.sqrt(square) + eps) + weight_decay * p)


def sumsq(x: Array) -> float:
    """Σ x² over all entries, in float64."""
    return float(np.sum(np.square(x, dtype=np.float64)))


def merge_linear(
    arrays: Sequence[Array], weights: Sequence[float], out: Array | None = None
) -> Array:
    """Σ weights[i] arrays[i]: added in float64 in the order given and rounded once.

    An array whose weight is 0 is not read. `out` receives the result if given; it may be one of the
    arrays. Source: arXiv:2203.05482.
    """
    total = np.zeros(arrays[0].shape)
    for array, weight in zip(arrays, weights, strict=True):
        if weight != 0:
            total += weight * array.astype(np.float64)
    if out is None:
        out = np.empty(arrays[0].shape, np.result_type(*arrays))
    out[...] = total
    return out
