"""What goes on inside a student: how its gates stand."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from .model import Model


def median_gates(
    model: Model, batches: Iterable[tuple[ArrayLike, ArrayLike | None]]
) -> list[list[float | None]]:
    """Median output gate o in 0..1, [layers][heads], over the tokens of batches (int ids [B, T],
    document starts bool [B, T] or None); None in layers without a gate."""
    values = [model.gate_values(ids, reset) for ids, reset in batches]
    medians = np.median(np.concatenate(values, axis=2), axis=2)
    return [[None if np.isnan(x) else float(x) for x in row] for row in medians]
