"""Head, cross-entropy, sparse distillation loss, divergences. Maths: docs/math/losses.md."""

from __future__ import annotations

import numpy as np

from xlstm_distill.reference.scalars import Array, log_sum_exp, softmax

KL_FORMS = ("renormalised", "tail", "sampled")
TAIL_FLOOR = 1e-12  # least teacher mass outside the targets: its logarithm stays finite


def _target_loss(z: Array, ids: Array, logp: Array, form: str) -> tuple[float, Array]:
    """Distillation loss of one row and its gradient on the logits z [V]; ids, logp [k]."""
    real = logp > -np.inf  # -inf is padding: such an id is neither a target nor excluded
    ids, logp = ids[real], logp[real]
    dz = np.zeros_like(z)
    if not ids.size:
        return 0.0, dz
    t = np.exp(logp)
    if form == "renormalised":
        s = z[ids] - log_sum_exp(z[ids])
        t, logt = t / np.sum(t), logp - log_sum_exp(logp)
        np.add.at(dz, ids, np.exp(s) - t)
        return float(np.sum(t * (logt - s))), dz
    p, lse = softmax(z), log_sum_exp(z)
    s = z[ids] - lse
    np.add.at(dz, ids, -t)
    if form == "sampled":
        return float(-np.sum(t * s)), dz + np.sum(t) * p
    outside = np.ones(z.shape, bool)
    outside[ids] = False
    tail = max(-float(np.expm1(log_sum_exp(logp))), TAIL_FLOOR)
    log_rest = log_sum_exp(z[outside]) - lse  # summed on its own, never 1 - Σ
    dz[outside] -= tail * softmax(z[outside])
    value = np.sum(t * (logp - s)) + tail * (np.log(tail) - log_rest)
    return float(value), dz + (np.sum(t) + tail) * p


def head_loss(
    x: Array,
    w: Array,
    labels: Array,
    target_ids: Array | None = None,
    target_logp: Array | None = None,
    ce_weight: float = 0.9,
    kl_weight: float = 0.1,
    form: str = "renormalised",
    scale: float = 1.0,
) -> tuple[float, float, int, Array, Array]:
    """(ce, kl, count, dx [N, d], dw [V, d]): stage II loss on logits x wᵀ.

    x [N, d] hidden states after the last norm, w [V, d], labels [N] next tokens (-1: the row counts
    nothing), target_ids, target_logp [N, k] the teacher's targets and their log-probabilities under
    its full softmax (-inf: padding), or both None. ce and kl are sums over the counted rows, in
    nats; dx, dw are gradients of scale (ce_weight ce + kl_weight kl). kl, t teacher, p student:

    renormalised  Σ t_j log(t_j / p_j), t and p renormalised over the targets
    tail          the rest of the vocabulary is one more bucket; needs k < V. The teacher's share of
                  it is at least TAIL_FLOOR
    sampled       - Σ exp(target_logp_j) log p_j over the full softmax, weights n_j / k

    Source: arXiv:2603.15590, equation (13).
    """
    if form not in KL_FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(KL_FORMS)}")
    logits = x @ w.T
    dz = np.zeros_like(logits)
    ce = kl = 0.0
    for n in np.flatnonzero(labels >= 0):
        z, label = logits[n], labels[n]
        ce += float(log_sum_exp(z) - z[label])
        dce = softmax(z)
        dce[label] -= 1
        dz[n] = scale * ce_weight * dce
        if target_ids is not None and target_logp is not None:
            value, dkl = _target_loss(z, target_ids[n], target_logp[n], form)
            kl += value
            dz[n] += scale * kl_weight * dkl
    return ce, kl, int(np.count_nonzero(labels >= 0)), dz @ w, dz.T @ x


def head_topk(x: Array, w: Array, k: int) -> tuple[Array, Array, Array]:
    """(ids [N, k] int32, logp [N, k], mass [N]): the k most probable tokens of softmax(x wᵀ).

    Best first, ties to the lower id; logp are those of the full softmax in nats, mass is the summed
    probability of the k. x [N, d], w [V, d], 1 <= k <= V.
    """
    z = x @ w.T
    ids = np.argsort(-z, axis=1, kind="stable")[:, :k].astype(np.int32)
    logp = np.take_along_axis(z, ids, axis=1) - log_sum_exp(z)[:, None]
    return ids, logp, np.sum(np.exp(logp), axis=1)


def head_draws(x: Array, w: Array, uniform: Array) -> tuple[Array, Array]:
    """(ids [N, k], counts [N, k], both int32): k draws from softmax(x wᵀ), row by row.

    A draw is the first token at which the distribution function exceeds uniform [N, k] in [0, 1),
    which rises within a row. Drawn tokens stand by rising id with how often they were drawn; behind
    them id 0 with count 0. x [N, d], w [V, d].
    """
    ids, counts = np.zeros(uniform.shape, np.int32), np.zeros(uniform.shape, np.int32)
    for n, z in enumerate(x @ w.T):
        below = np.cumsum(np.exp(z - z.max()).astype(np.float64))
        drawn = np.searchsorted(below, uniform[n] * below[-1], side="right")
        last = np.flatnonzero(z > -np.inf)[-1]  # the product may be rounded up to the total
        found, times = np.unique(np.minimum(drawn, last), return_counts=True)
        ids[n, : len(found)], counts[n, : len(found)] = found, times
    return ids, counts


def divergence(zt: Array, zs: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
    """(kl, agree, nll_s, nll_t), each [N], of logits zt (teacher) and zs (student), both [N, V].

    kl = KL(teacher || student) over the whole vocabulary in nats, agree = 1 where both prefer the
    same token (ties to the lower id), nll = -log p(label), 0 where the label is -1.
    """
    log_t = zt - log_sum_exp(zt)[:, None]
    log_s = zs - log_sum_exp(zs)[:, None]
    kl = np.maximum(np.sum(np.exp(log_t) * (log_t - log_s), axis=1), 0)  # -1e-16 is rounding
    agree = (np.argmax(zt, axis=1) == np.argmax(zs, axis=1)).astype(zt.dtype)
    rows, counted = np.arange(len(labels)), labels >= 0
    nll_s, nll_t = (np.where(counted, -a[rows, labels], 0) for a in (log_s, log_t))
    return kl, agree, nll_s, nll_t


def head_divergence(
    x: Array, w: Array, teacher_x: Array, teacher_w: Array, labels: Array
) -> tuple[Array, Array, Array, Array]:
    """`divergence` of the logits x wᵀ of a student from teacher_x teacher_wᵀ of its teacher."""
    return divergence(teacher_x @ teacher_w.T, x @ w.T, labels)


def mse_forward(h: Array, target: Array) -> tuple[float, float]:
    """(Σ (h - target)², Σ target²) over arrays of one shape, added in float64."""
    difference = np.subtract(h, target, dtype=np.float64)
    return float(np.sum(difference**2)), float(np.sum(np.square(target, dtype=np.float64)))


def mse_backward(h: Array, target: Array, scale: float = 1.0) -> Array:
    """dh = 2 scale (h - target): the gradient of scale times the first value of `mse_forward`."""
    return 2 * scale * (h - target)
