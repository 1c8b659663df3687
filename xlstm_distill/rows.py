"""Rows of tokens, [B, T]: what the core is handed, checked, and what follows from it.

Rows may be right padded (`lengths`) and hold several documents (`reset`: one starts here).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UserError

IntArray = NDArray[np.int32]


def checked_ids(ids: ArrayLike, vocab_size: int) -> IntArray:
    """Token ids as contiguous int32 [B, T]; [T] is one row.

    Raises ValueError for another shape or dtype, UserError for an id outside the vocabulary.
    """
    a = np.asarray(ids)
    if a.ndim == 1:
        a = a[None]
    if a.ndim != 2 or a.dtype.kind not in "iu":
        raise ValueError(f"ids have shape {a.shape} and dtype {a.dtype}, expected integers [B, T]")
    if a.size and (a.min() < 0 or a.max() >= vocab_size):
        bad = int(a.min()) if a.min() < 0 else int(a.max())
        raise UserError(f"token id {bad} is outside 0..{vocab_size - 1}")
    return np.ascontiguousarray(a, dtype=np.int32)


def checked_lengths(lengths: ArrayLike | None, ids: IntArray) -> IntArray | None:
    """Valid steps of each row, int32 [B]; None: all. Raises ValueError where they do not fit."""
    if lengths is None:
        return None
    n = np.asarray(lengths)
    whole = n.dtype.kind in "iu" or n.size == 0
    if n.shape != ids.shape[:1] or not whole or (n < 0).any() or (n > ids.shape[1]).any():
        raise ValueError(f"lengths {n.tolist()} do not fit ids of shape {ids.shape}")
    return np.ascontiguousarray(n, dtype=np.int32)


def checked_reset(reset: ArrayLike | None, ids: IntArray) -> NDArray[np.bool_] | None:
    """Where documents start, bool [B, T]; None: nowhere. Raises ValueError for another shape."""
    if reset is None:
        return None
    r = np.ascontiguousarray(reset, dtype=np.bool_)
    if r.shape != ids.shape:
        raise ValueError(f"reset has shape {r.shape}, ids have {ids.shape}")
    return r


def positions(ids: IntArray, reset: NDArray[np.bool_] | None, past: IntArray | None) -> IntArray:
    """Position of every token in its own document, [B, T]; `past` [B]: tokens before the row."""
    steps = np.arange(ids.shape[1], dtype=np.int32)[None]
    start = np.zeros((len(ids), 1), dtype=np.int32) if past is None else -past[:, None]
    if reset is None:
        return np.ascontiguousarray(steps - start, dtype=np.int32)
    starts = np.where(reset, steps, np.iinfo(np.int32).min)
    latest = np.maximum(np.maximum.accumulate(starts, axis=1), start)
    return np.ascontiguousarray(steps - latest, dtype=np.int32)


def next_tokens(ids: IntArray, lengths: IntArray | None) -> IntArray:
    """The token that follows each one, [B, T]; -1 where none does."""
    labels = np.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    if lengths is not None:
        steps = np.arange(ids.shape[1])[None]
        labels[steps + 1 >= lengths[:, None]] = -1
    return labels
