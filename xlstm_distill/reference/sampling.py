"""Sampling from logits. Source of the nucleus: arXiv:1904.09751."""

from __future__ import annotations

import numpy as np

from xlstm_distill.reference.scalars import Array


def sample(logits: Array, temperature: float, top_p: float, uniform: Array) -> Array:
    """One token a row, [N, V] -> int32 [N]: the first at which the distribution function exceeds
    uniform [N]; temperature 0 takes the first of the most probable."""
    if temperature == 0:
        return np.argmax(logits, axis=1).astype(np.int32)
    chosen = np.empty(len(logits), np.int32)
    for n, z in enumerate(logits):
        p = np.exp((z - z.max()) / temperature).astype(np.float64)
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        if top_p < 1:  # entries before which the mass does not reach top_p
            p[order[before >= top_p * p.sum()]] = 0
        total = np.cumsum(p)
        chosen[n] = np.searchsorted(total, uniform[n] * total[-1], side="right")
    return chosen
