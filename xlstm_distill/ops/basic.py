"""The ops on rows: linear, embedding, RMSNorm, RoPE, SwiGLU, head and losses, AdamW, merge.

`xlstm_distill.reference` has the same functions in plain NumPy; it is the specification. Shapes:
N rows, K inputs, M outputs, d model width, F MLP width, V vocabulary, k targets of a row.

Arrays may be anything NumPy can convert. The work is done in float64 if any input is float64 and in
float32 otherwise, and results have that dtype. Wrong dimensions and sizes that disagree raise
ValueError, a wrong kind of dtype raises TypeError, in one line that names the argument.
Only `adamw_step` and `merge_linear(out=)` write into what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xlstm_distill.ops.arrays import Array, common_dtype, floats, integers, same_shape
from xlstm_distill.runtime import core

KL_FORMS = ("renormalised", "tail", "sampled")


# ---- linear -------------------------------------------------------------------------------------


def linear_forward(x: ArrayLike, w: ArrayLike, b: ArrayLike | None = None) -> Array:
    """y [N, M] = x wᵀ + b for x [N, K], w [M, K], b [M] or None."""
    dtype = common_dtype(x, w, b)
    x, w = floats("x", x, 2, dtype), floats("w", w, 2, dtype)
    bias = None if b is None else floats("b", b, 1, dtype)
    y = np.empty((x.shape[0], w.shape[0]), dtype)
    core(dtype).linear_forward(y, x, w, bias)
    return y


def linear_backward(
    dy: ArrayLike, x: ArrayLike, w: ArrayLike, bias: bool = False
) -> tuple[Array, Array, Array | None]:
    """(dx [N, K], dw [M, K], db [M] or None) of `linear_forward` for dy [N, M]."""
    dtype = common_dtype(dy, x, w)
    dy, x, w = floats("dy", dy, 2, dtype), floats("x", x, 2, dtype), floats("w", w, 2, dtype)
    db = np.zeros(w.shape[0], dtype) if bias else None
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    core(dtype).linear_backward(dx, dw, db, dy, x, w)
    return dx, dw, db


# ---- embedding ----------------------------------------------------------------------------------


def embedding_forward(ids: ArrayLike, w: ArrayLike) -> Array:
    """y [N, d] = w[ids] for ids [N] in 0..V-1, w [V, d]. ValueError names an id outside."""
    dtype = common_dtype(w)
    ids, w = integers("ids", ids, 1), floats("w", w, 2, dtype)
    y = np.empty((ids.size, w.shape[1]), dtype)
    core(dtype).embedding_forward(y, ids, w)
    return y


def embedding_backward(dy: ArrayLike, ids: ArrayLike, vocab: int) -> Array:
    """dw [V, d]: row v is the sum of the rows of dy [N, d] whose id is v. V = `vocab`."""
    dtype = common_dtype(dy)
    dy, ids = floats("dy", dy, 2, dtype), integers("ids", ids, 1)
    if vocab < 1:
        raise ValueError(f"vocab is {vocab}, expected at least 1")
    dw = np.zeros((vocab, dy.shape[1]), dtype)
    core(dtype).embedding_backward(dw, dy, ids)
    return dw


# ---- RMSNorm ------------------------------------------------------------------------------------


def rmsnorm_forward(x: ArrayLike, w: ArrayLike, eps: float) -> tuple[Array, Array]:
    """(y [N, d], rstd [N]): y = x rstd w, rstd = (mean x² + eps)^(-1/2); x [N, d], w [d].

    eps is added to the mean square inside the root. Source: arXiv:1910.07467, as Llama uses it.
    """
    dtype = common_dtype(x, w)
    x, w = floats("x", x, 2, dtype), floats("w", w, 1, dtype)
    y, rstd = np.empty_like(x), np.empty(x.shape[0], dtype)
    core(dtype).rmsnorm_forward(y, rstd, x, w, eps)
    return y, rstd


def rmsnorm_backward(
    dy: ArrayLike, x: ArrayLike, w: ArrayLike, rstd: ArrayLike
) -> tuple[Array, Array]:
    """(dx [N, d], dw [d]) of `rmsnorm_forward` for dy [N, d]; rstd is what the forward returned."""
    dtype = common_dtype(dy, x, w, rstd)
    dy, x = floats("dy", dy, 2, dtype), floats("x", x, 2, dtype)
    w, rstd = floats("w", w, 1, dtype), floats("rstd", rstd, 1, dtype)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    core(dtype).rmsnorm_backward(dx, dw, dy, x, w, rstd)
    return dx, dw


# ---- RoPE ---------------------------------------------------------------------------------------


def rope_forward(
    x: ArrayLike,
    positions: ArrayLike,
    inv_freq: ArrayLike,
    inverse: bool = False,
    scale: float = 1.0,
) -> Array:
    """Rotary embedding: x [B, H, T, D], integer positions [B, T], inv_freq [D/2] in radians a step.

    Element j is paired with j + D/2 (the pairing of Hugging Face's Llama, not the interleaved one).
    The result is multiplied by `scale` (YaRN's attention factor). `inverse` rotates by the negative
    angle, which is the backward. Angles are made in float64. Source: arXiv:2104.09864.
    """
    dtype = common_dtype(x)
    y = np.array(floats("x", x, 4, dtype))
    pos, freq = integers("positions", positions, 2), floats("inv_freq", inv_freq, 1, np.float64)
    core(dtype).rope(y, pos, freq, int(inverse), float(scale))
    return y


# ---- SwiGLU -------------------------------------------------------------------------------------


def swiglu_forward(gate: ArrayLike, up: ArrayLike) -> Array:
    """y = silu(gate) up with silu(g) = g sigmoid(g), all [N, F]. Source: arXiv:2002.05202."""
    dtype = common_dtype(gate, up)
    gate, up = floats("gate", gate, 2, dtype), floats("up", up, 2, dtype)
    y = np.empty_like(gate)
    core(dtype).swiglu_forward(y, gate, up)
    return y


def swiglu_backward(dy: ArrayLike, gate: ArrayLike, up: ArrayLike) -> tuple[Array, Array]:
    """(dgate, dup), both [N, F], of `swiglu_forward` for dy [N, F]."""
    dtype = common_dtype(dy, gate, up)
    dy, gate = floats("dy", dy, 2, dtype), floats("gate", gate, 2, dtype)
    up = floats("up", up, 2, dtype)
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    core(dtype).swiglu_backward(dgate, dup, dy, gate, up)
    return dgate, dup


# ---- head and losses ----------------------------------------------------------------------------


def head_loss(
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    target_ids: ArrayLike | None = None,
    target_logp: ArrayLike | None = None,
    ce_weight: float = 0.9,
    kl_weight: float = 0.1,
    form: str = "renormalised",
    scale: float = 1.0,
) -> tuple[float, float, int, Array, Array]:
    """Head, cross-entropy and top-k KL in one; the logits of all rows are never held at once.

    x [N, d] hidden states after the last norm, w [V, d] head, labels [N] next tokens (-1: the row
    counts nothing); target_ids, target_logp [N, k]: the teacher's most probable tokens and their
    log-probabilities under its full softmax (-inf: padding), or both None.

    form "renormalised": both distributions are renormalised over the k targets. "tail": the rest of
    the vocabulary is one more outcome. "sampled": the targets are draws from the teacher,
    target_logp = log(count / number of draws).

    Returns (ce, kl, count, dx [N, d], dw [V, d]): sums over the counted rows in nats, their number,
    and the gradients of scale * (ce_weight * ce + kl_weight * kl). Source: arXiv:2603.15590, (13).
    """
    if form not in KL_FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(KL_FORMS)}")
    dtype = common_dtype(x, w, target_logp)
    x, w, labels = floats("x", x, 2, dtype), floats("w", w, 2, dtype), integers("labels", labels, 1)
    ids = None if target_ids is None else integers("target_ids", target_ids, 2)
    logp = None if target_logp is None else floats("target_logp", target_logp, 2, dtype)
    sums, weights = np.zeros(3), np.array([ce_weight, kl_weight, scale], np.float64)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    core(dtype).head_loss(
        sums, None, dx, dw, x, w, labels, ids, logp, weights, KL_FORMS.index(form)
    )
    return float(sums[0]), float(sums[1]), int(sums[2]), dx, dw


def head_topk(x: ArrayLike, w: ArrayLike, k: int) -> tuple[Array, Array, Array]:
    """The k most probable tokens of each row of softmax(x wᵀ); x [N, d], w [V, d], 1 <= k <= V.

    Returns (ids [N, k] int32, best first, ties to the lower id; logp [N, k], log-probabilities of
    the full softmax in nats; mass [N], the summed probability of the k).
    """
    dtype = common_dtype(x, w)
    x, w = floats("x", x, 2, dtype), floats("w", w, 2, dtype)
    if not 1 <= k <= w.shape[0]:
        raise ValueError(f"k is {k}, expected 1 to {w.shape[0]}")
    n = x.shape[0]
    ids, logp, mass = np.empty((n, k), np.int32), np.empty((n, k), dtype), np.empty(n, dtype)
    core(dtype).head_topk(ids, logp, mass, x, w)
    return ids, logp, mass


def head_draws(
    x: ArrayLike, w: ArrayLike, uniform: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """k draws from softmax(x wᵀ) of each row; x [N, d], w [V, d], uniform [N, k] float64.

    A draw is the first token at which the distribution function exceeds `uniform`, in [0, 1) and
    rising within a row (ValueError otherwise). Returns (ids [N, k], counts [N, k]), both int32: the
    tokens that were drawn by rising id and how often each was; behind them id 0 with count 0.
    Raises FloatingPointError for a row whose largest logit is not finite.
    """
    dtype = common_dtype(x, w)
    x, w = floats("x", x, 2, dtype), floats("w", w, 2, dtype)
    u = floats("uniform", uniform, 2, np.float64)
    ids, counts = np.empty(u.shape, np.int32), np.empty(u.shape, np.int32)
    core(dtype).head_draws(ids, counts, x, w, u)
    return ids, counts


def head_divergence(
    x: ArrayLike, w: ArrayLike, teacher_x: ArrayLike, teacher_w: ArrayLike, labels: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """How far a student's predictions are from its teacher's, over the whole vocabulary, by row.

    x, teacher_x [N, d] hidden states after the last norm, w, teacher_w [V, d] heads, labels [N]
    (-1: none). Returns four arrays [N]: KL(teacher || student) in nats; 1 where both prefer the
    same token (ties to the lower id), else 0; student's and teacher's negative log-likelihood of
    the label, 0 where there is none. `reference.divergence` is the same from logits.
    """
    dtype = common_dtype(x, w, teacher_x, teacher_w)
    x, w = floats("x", x, 2, dtype), floats("w", w, 2, dtype)
    tx, tw = floats("teacher_x", teacher_x, 2, dtype), floats("teacher_w", teacher_w, 2, dtype)
    kl, agree, nll, teacher_nll = (np.empty(x.shape[0], dtype) for _ in range(4))
    labels = integers("labels", labels, 1)
    core(dtype).head_divergence(kl, agree, nll, teacher_nll, x, w, tx, tw, labels)
    return kl, agree, nll, teacher_nll


def mse_forward(h: ArrayLike, target: ArrayLike) -> tuple[float, float]:
    """(Σ (h - target)², Σ target²) over arrays of the same shape, added in float64."""
    dtype = common_dtype(h, target)
    h, target = floats("h", h, None, dtype), floats("target", target, None, dtype)
    same_shape("target", target, h.shape)
    sums = np.zeros(2)
    core(dtype).mse_forward(sums, h.reshape(-1), target.reshape(-1))
    return float(sums[0]), float(sums[1])


def mse_backward(h: ArrayLike, target: ArrayLike, scale: float = 1.0) -> Array:
    """dh = 2 scale (h - target), of scale times the first value of `mse_forward`."""
    dtype = common_dtype(h, target)
    h, target = floats("h", h, None, dtype), floats("target", target, None, dtype)
    same_shape("target", target, h.shape)
    dh = np.zeros_like(h)
    core(dtype).mse_backward(dh.reshape(-1), h.reshape(-1), target.reshape(-1), scale)
    return dh


# ---- sampling -----------------------------------------------------------------------------------


def sample(
    logits: ArrayLike, temperature: float, top_p: float, uniform: ArrayLike
) -> NDArray[np.int32]:
    """One token a row: logits [N, V], uniform [N] in [0, 1) -> int32 [N].

    The first token at which the distribution function of softmax(logits / temperature) exceeds
    `uniform`; temperature 0 takes the most probable one, the first of equals. top_p < 1 leaves the
    fewest most probable tokens whose mass reaches top_p, of equals the first. Raises
    FloatingPointError for a row whose largest logit is not finite. Source: arXiv:1904.09751.
    """
    dtype = common_dtype(logits)
    z = floats("logits", logits, 2, dtype)
    u = floats("uniform", uniform, 1, np.float64)
    same_shape("uniform", u, z.shape[:1])
    ids = np.empty(len(z), np.int32)
    core(dtype).sample(ids, z, float(temperature), float(top_p), u)
    return ids


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
    """One step of AdamW in place on p, m, v: contiguous vectors of one dtype, never copied.

    The gradient g is multiplied by `scale` first (clipping); `step` counts from 1 for the bias
    correction; the decay is decoupled: p -= lr * weight_decay * p. ValueError for vectors that are
    not contiguous, not writeable, or that overlap. Source: arXiv:1711.05101.
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1, beta2 are {beta1}, {beta2}, expected 0 <= beta < 1")
    vectors = {"p": p, "g": g, "m": m, "v": v}
    for name, a in vectors.items():
        if not isinstance(a, np.ndarray):
            raise TypeError(f"{name} is a {type(a).__name__}, expected a NumPy array")
    for name, other in (("p", "g"), ("p", "m"), ("p", "v"), ("g", "m"), ("g", "v"), ("m", "v")):
        if np.may_share_memory(vectors[name], vectors[other]):
            raise ValueError(f"{name} and {other} overlap")
    core(p.dtype).adamw_step(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, scale)


def sumsq(x: ArrayLike) -> float:
    """Σ x² over all entries, added in float64 in fixed blocks (the same for any thread count)."""
    dtype = common_dtype(x)
    return float(core(dtype).sumsq(floats("x", x, None, dtype).reshape(-1)))


def merge_linear(
    arrays: Sequence[ArrayLike], weights: Sequence[float], out: Array | None = None
) -> Array:
    """Σ weights[i] arrays[i], added in float64 in the order given and rounded once.

    Arrays of one shape; an array whose weight is 0 is not read. `out` (contiguous, of the common
    dtype) receives the result if given and may be one of the arrays. Source: arXiv:2203.05482.
    """
    if len(arrays) != len(weights) or not arrays:
        raise ValueError(
            f"{len(arrays)} arrays and {len(weights)} weights, expected as many, not 0"
        )
    if not np.isfinite(weights).all():
        raise ValueError(f"weights are {list(weights)}, expected finite numbers")
    dtype = common_dtype(*arrays)
    parts = [floats(f"arrays[{i}]", a, None, dtype) for i, a in enumerate(arrays)]
    shape = parts[0].shape
    for i, part in enumerate(parts):
        same_shape(f"arrays[{i}]", part, shape)
    if out is None:
        out = np.empty(shape, dtype)
    same_shape("out", out, shape)
    if out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be a contiguous, writeable array of {dtype}")
    used = [n for n, weight in enumerate(weights) if weight != 0]
    flat = [parts[n].reshape(-1) for n in used]
    core(dtype).merge(out.reshape(-1), flat, np.array([weights[n] for n in used], np.float64))
    return out
