"""Checks and conversions that every op wrapper shares: dtypes and dimensions, never values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[Any]]
FEATURE_MAPS = ("softmax", "elu")


def common_dtype(*arrays: ArrayLike | None) -> np.dtype[Any]:
    """float64 if any array is float64, else float32. None entries are skipped."""
    for a in arrays:
        if a is not None and np.asarray(a).dtype == np.float64:
            return np.dtype(np.float64)
    return np.dtype(np.float32)


def floats(name: str, a: ArrayLike, ndim: int | None, dtype: Any) -> Array:
    """`a` as a C-contiguous array of `dtype` with `ndim` dimensions (None: any number)."""
    given = np.asarray(a)
    if given.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {given.dtype}, expected real numbers")
    if ndim is not None and given.ndim != ndim:
        raise ValueError(f"{name} has {given.ndim} dimensions, expected {ndim}")
    return np.require(given, dtype=dtype, requirements=["C", "A"])


def integers(name: str, a: ArrayLike, ndim: int) -> Array:
    """`a` as a C-contiguous int32 array with `ndim` dimensions; values must fit."""
    given = np.asarray(a)
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"{name} has dtype {given.dtype}, expected integers")
    if given.ndim != ndim:
        raise ValueError(f"{name} has {given.ndim} dimensions, expected {ndim}")
    limits = np.iinfo(np.int32)
    if given.size and (given.min() < limits.min or given.max() > limits.max):
        raise ValueError(f"{name} holds values that do not fit in 32 bits")
    return np.require(given, dtype=np.int32, requirements=["C", "A"])


def choice(name: str, value: str, allowed: tuple[str, ...]) -> int:
    """The place of `value` in `allowed`; ValueError if it is none of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    return allowed.index(value)


def same_shape(name: str, a: Array, shape: tuple[int, ...]) -> None:
    """ValueError unless `a` has `shape`."""
    if a.shape != shape:
        raise ValueError(f"{name} has shape {a.shape}, expected {shape}")
