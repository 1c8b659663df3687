"""Stage III: experts from the same seed weights become one model, theta = sum_i lambda_i theta_i.

Source: linear merging of fine-tuned models, arXiv:2203.05482; paper.md 4, equation 14.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from . import checkpoints, ops
from .checkpoints import Checkpoint, LazyTensors, TensorSource
from .config import ModelConfig
from .errors import UserError
from .model import Model
from .tokenizer import Tokenizer

Expert = Model | str | Path
METHODS = ("linear",)
_TOTAL_TOLERANCE = 1e-6
"""How far the weights' sum may be from 1: decimals such as 0.333333 are meant as a third."""


class _Source:
    """An expert, whether in memory or on disk."""

    def __init__(self, name: str, weight: float, expert: Expert) -> None:
        self.name, self.weight = name, weight
        self.config: ModelConfig
        self.tensors: Mapping[str, NDArray[Any]]
        if isinstance(expert, Model):
            self.config, self.tensors, self.where = expert.config, expert.tensors(), expert.source
            self.tokenizer: Tokenizer | None = expert.tokenizer
            self.provenance = expert.provenance
        else:
            loaded: Checkpoint = checkpoints.load(expert)
            self.config, self.tensors, self.where = loaded.config, loaded.tensors, loaded.source
            self.tokenizer, self.provenance = loaded.tokenizer, loaded.provenance
        self.fingerprint = checkpoints.fingerprint(self.config, self.tensors)


@overload
def merge(
    models: Mapping[str, Expert],
    weights: Mapping[str, float] | None = None,
    method: Literal["linear"] = "linear",
    out: None = None,
) -> Model: ...


@overload
def merge(
    models: Mapping[str, Expert],
    weights: Mapping[str, float] | None = None,
    method: Literal["linear"] = "linear",
    *,
    out: str | Path,
) -> Path: ...


def merge(
    models: Mapping[str, Expert],
    weights: Mapping[str, float] | None = None,
    method: Literal["linear"] = "linear",
    out: str | Path | None = None,
) -> Model | Path:
    """Merge models or model directories by weight; None: all alike.

    Weights are 0 or more and add up to 1. Sums are made in float64 in the order of the experts'
    fingerprints, experts of weight 0 are not read, and each result is rounded once: the order in
    which experts are named changes no bit. With `out`, a model directory is written tensor by
    tensor (memory: one tensor of each expert) and its path returned.

    Raises UserError naming what differs (configuration field, tokenizer) or which weight is wrong.
    """
    if method not in METHODS:
        raise UserError(f"merge: method {method!r} is not known: {', '.join(METHODS)}", usage=True)
    shares = _shares(models, weights)
    sources = [_Source(name, shares[name], expert) for name, expert in models.items()]
    _check_alike(sources)
    used = sorted((s for s in sources if s.weight > 0), key=lambda s: s.fingerprint)
    first = used[0]
    experts = [{"name": s.name, "weight": s.weight, "fingerprint": s.fingerprint} for s in used]
    provenance: dict[str, Any] = {
        key: first.provenance[key] for key in ("teacher", "linearize") if key in first.provenance
    }
    provenance["merge"] = {"method": method, "experts": experts}

    def blended(name: str) -> NDArray[np.float32]:
        parts = [s.tensors[name] for s in used]
        return ops.merge_linear(parts, [s.weight for s in used]).astype(np.float32, copy=False)

    if out is not None:
        lazy = LazyTensors(
            {
                name: TensorSource(_shape(first, name), _reader(blended, name), str(out))
                for name in first.tensors
            }
        )
        return checkpoints.save(out, first.config, lazy, first.tokenizer, provenance)
    merged = Model(first.config, first.tokenizer, provenance=provenance, source="merge")
    for name in merged.params.names():
        merged.params[name] = blended(name)
    return merged


def _reader(blended: Any, name: str) -> Any:
    return lambda: blended(name)


def _shape(source: _Source, name: str) -> tuple[int, ...]:
    if isinstance(source.tensors, LazyTensors):
        return source.tensors.shape(name)
    return tuple(source.tensors[name].shape)


def _shares(models: Mapping[str, Expert], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not models:
        raise UserError("merge: there are no experts", usage=True)
    shares = dict(weights) if weights is not None else {n: 1.0 / len(models) for n in models}
    if set(shares) != set(models):
        odd = sorted(set(shares) ^ set(models))[0]
        raise UserError(f"merge: weights and experts disagree on {odd!r}", usage=True)
    for name, share in shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise UserError(
                f"merge: the weight of {name} is {share}, expected 0 or more", usage=True
            )
    check_total(shares, "merge")
    return shares


def check_total(weights: Mapping[str, float], where: str) -> None:
    """UserError, which `where` opens, unless weights of experts add up to 1."""
    total = math.fsum(weights.values())
    if not abs(total - 1) <= _TOTAL_TOLERANCE:
        raise UserError(f"{where}: the weights add up to {total:g}, expected 1", usage=True)


def _check_alike(sources: Sequence[_Source]) -> None:
    first = sources[0]
    mine = first.config.model_dump()
    for other in sources[1:]:
        theirs = other.config.model_dump()
        for key, value in mine.items():
            if theirs[key] != value:
                raise UserError(
                    f"merge: {first.name} and {other.name} differ in {key}: "
                    f"{value} and {theirs[key]}"
                )
        tokenizers = [s.tokenizer and s.tokenizer.fingerprint for s in (first, other)]
        if tokenizers[0] != tokenizers[1]:
            raise UserError(f"merge: {first.name} and {other.name} have different tokenizers")
