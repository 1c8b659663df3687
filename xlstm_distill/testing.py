"""Helpers for tests and notebooks: seeded inputs, derivatives by finite differences, comparisons.

Imports NumPy only, so that a check of the maths never depends on the code it checks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, np.dtype[Any]]

#: Largest error seen by `assert_close` for each name, as a share of its tolerance.
shares: dict[str, float] = {}


def seeded(*key: object) -> np.random.Generator:
    """A generator that depends on the text of `key` alone: the same in every process."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def relative_error(actual: ArrayLike, expected: ArrayLike, floor: float = 1.0) -> float:
    """max |actual - expected| as a share of max(floor, max |expected|).

    Infinite where a NaN is in either and where an infinity is in one only; equal infinities count
    as equal. ValueError if the shapes differ. `floor` is the size below which a value is as good as
    zero: gradients that cancel exactly leave rounding noise only.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    if a.shape != e.shape:
        raise ValueError(f"shape {a.shape}, expected {e.shape}")
    if not e.size:
        return 0.0
    a, e = a.astype(np.float64), e.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf where both are infinite, replaced by 0
        difference = np.where(a == e, 0.0, np.abs(a - e))
    finite = np.abs(e[np.isfinite(e)])
    error = float(np.max(difference)) / max(floor, float(np.max(finite, initial=0.0)))
    return error if np.isfinite(error) else float("inf")


def assert_close(
    actual: ArrayLike, expected: ArrayLike, tolerance: float, what: str, floor: float = 1.0
) -> None:
    """AssertionError unless `relative_error` is at most `tolerance`; a NaN fails.

    The share of the tolerance that was used is kept in `shares` under `what`.
    """
    error = relative_error(actual, expected, floor)
    share = error / tolerance if tolerance else (0.0 if error == 0 else float("inf"))
    shares[what] = max(share, shares.get(what, 0.0))
    if not error <= tolerance:
        raise AssertionError(
            f"{what}: relative error {error:.3g}, tolerance {tolerance:.3g} (x{share:.3g})"
        )


def directional_derivative(
    function: Callable[[dict[str, Any]], float],
    at: Mapping[str, Any],
    direction: Mapping[str, Array],
    step: float = 1e-4,
) -> float:
    """d/ds function(at + s direction) at s = 0, by central differences of fourth order.

    `at` maps names to arguments; those named in `direction` are moved and must be float64. The
    error is about step⁴ times the fifth derivative plus 1e-16 |function| / step.
    """
    values = {}
    for s in (-2, -1, 1, 2):
        moved = {name: at[name] + s * step * d for name, d in direction.items()}
        values[s] = function({**at, **moved})
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


def inner(a: ArrayLike, b: ArrayLike) -> float:
    """Σ a b in float64 over arrays of one shape."""
    return float(np.sum(np.multiply(a, b, dtype=np.float64)))
