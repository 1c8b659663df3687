"""Scalar functions that several ops share, written so that no input overflows."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), from the side whose exponential is at most 1."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def log_sigmoid(x: Array) -> Array:
    """log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def softmax(z: Array) -> Array:
    """exp(z) / Σ exp(z) over the last axis; entries of -inf give 0."""
    e = np.exp(z - np.max(z, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def log_sum_exp(z: Array) -> Array:
    """log Σ exp(z) over the last axis; -inf where every entry is -inf."""
    top = np.max(z, axis=-1, keepdims=True)
    shift = np.where(np.isneginf(top), np.zeros_like(top), top)
    with np.errstate(divide="ignore"):  # log(0) = -inf is the result of an empty sum
        return (shift + np.log(np.sum(np.exp(z - shift), axis=-1, keepdims=True)))[..., 0]


def repeat_heads(x: Array, heads: int) -> Array:
    """[B, G, ...] → [B, heads, ...]: query head h reads key/value head h // (heads / G)."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def sum_heads(x: Array, groups: int) -> Array:
    """[B, H, ...] → [B, groups, ...]: the backward of `repeat_heads` adds a head's readers."""
    b, h, *rest = x.shape
    return np.sum(x.reshape(b, groups, h // groups, *rest), axis=2)
