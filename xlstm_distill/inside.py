"""What goes on inside a student: gates, attention on the sinks, feature maps, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import ops
from .config import MixerConfig
from .model import Model

Array = NDArray[Any]


class Inside(NamedTuple):
    """What every head does on a text, float64 [layers, heads] each, NaN in layers without it.

    gate: median output gate, 0 attention to 1 mLSTM. sinks: mean attention on a document's first
    tokens, of positions whose window has left them. entropy_q, entropy_k: mean entropy of the
    features of queries and keys (of their shares, where they do not add up to 1) over log D, 0 (a
    single feature) to 1 (all alike: the map tells nothing). horizon: tokens after which the mLSTM
    keeps 1/e of what was written, at the mean of the logarithms of the forget gate; infinite where
    nothing is forgotten.
    """

    gate: Array
    sinks: Array
    entropy_q: Array
    entropy_k: Array
    horizon: Array


def look_inside(
    model: Model, ids: ArrayLike, reset: ArrayLike | None = None, sinks: int | None = None
) -> Inside:
    """Measure a model on int ids [B, T]; reset bool [B, T]: True where a document starts.

    sinks: how many first tokens of a document attention is summed over (None: the sinks that each
    layer has); with it a teacher's full attention can be measured, too. Queries and keys of all
    layers are held at once, so a text is some thousand tokens.
    """
    c = model.config
    taps = model.taps(("o", "f", "q", "k"), ids, reset)
    starts = np.zeros(taps["o"].shape[1:3], dtype=bool)
    starts[:, 0] = True
    if reset is not None:
        starts |= np.asarray(reset, dtype=bool)
    nothing = np.full((c.num_hidden_layers, c.num_attention_heads), np.nan)
    found = Inside(*(nothing.copy() for _ in Inside._fields))
    for layer, mixer in enumerate(c.mixers):
        q, k = (np.moveaxis(taps[name][layer], 2, 1) for name in "qk")
        count = mixer.sinks if sinks is None else sinks
        if mixer.mixer in ("attention", "window", "hybrid") and count > 0:
            found.sinks[layer] = _attention_on_first(q, k, starts, mixer, count)
        for x, name, entropy in ((q, "map_q", found.entropy_q), (k, "map_k", found.entropy_k)):
            if (key := f"model.layers.{layer}.mixer.{name}") in model.params:
                phi = ops.feature_map_forward(x, model.params[key], mixer.feature_map)
                if mixer.feature_map != "softmax":  # no distribution: the shares of its features
                    phi /= phi.sum(axis=-1, keepdims=True)
                entropy[layer] = _entropy(phi)
        with np.errstate(over="ignore"):
            o = 1 / (1 + np.exp(-taps["o"][layer].astype(np.float64)))
        found.gate[layer] = np.median(o, axis=(0, 1))
        found.horizon[layer] = _horizon(taps["f"][layer].astype(np.float64), starts)
    return found


def _attention_on_first(
    q: Array, k: Array, starts: NDArray[np.bool_], mixer: MixerConfig, count: int
) -> Array:
    """Mean over positions, [H], of the attention on the first `count` tokens of the document, for
    q [B, H, T, D] and k [B, G, T, D] after RoPE; NaN if no position has left them behind."""
    steps = np.arange(starts.shape[1])
    position = steps - np.maximum.accumulate(np.where(starts, steps, 0), axis=1)
    # The sum of some weights is the output for values of 1 there and 0 elsewhere.
    values = np.zeros_like(k)
    values[..., 0] = (position < count)[:, None]
    mass = ops.attention_forward(q, k, values, mixer.window, mixer.sinks, starts)[..., 0]
    behind = position >= count + (0 if mixer.window is None else mixer.window - 1)
    if not behind.any():
        return np.full(q.shape[1], np.nan)
    mean: Array = np.moveaxis(mass, 1, 2)[behind].mean(axis=0, dtype=np.float64)
    return mean


def _entropy(features: Array) -> Array:
    """Mean entropy of features [B, H, T, D], which are positive and add up to 1, over log D; [H]"""
    p = features.astype(np.float64)
    mean: Array = -(p * np.log(p)).sum(axis=-1).mean(axis=(0, 2)) / math.log(p.shape[-1])
    return mean


def _horizon(f: Array, starts: NDArray[np.bool_]) -> Array:
    """1 / mean of -log sigmoid(f), [H], of f [B, T, H]; at a document's start nothing decays."""
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN without a gate, 0 if nothing decays
        horizon: Array = 1 / np.logaddexp(0, -f[~starts]).mean(axis=0)
    return horizon


def median_gates(
    model: Model, batches: Iterable[tuple[ArrayLike, ArrayLike | None]]
) -> list[list[float | None]]:
    """Median output gate o in 0..1, [layers][heads], over the tokens of batches (int ids [B, T],
    document starts bool [B, T] or None); None in layers without a gate."""
    values = [model.gate_values(ids, reset) for ids, reset in batches]
    medians = np.median(np.concatenate(values, axis=2), axis=2)
    return [[None if np.isnan(x) else float(x) for x in row] for row in medians]
