"""Draws of models' scores on a benchmark, from whatever is known of its documents, and what
difference they can show. Where the draws come from is in docs/math/wintie.md, "Noise".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from . import uncertainty
from .scores import Score
from .uncertainty import FloatArray

DRAWS = 4000
"""Draws of each score."""


@dataclass
class Noise:
    """Draws of the scores on one benchmark, by model, and where they come from. units: passages or
    documents that were drawn, None where nothing was drawn from samples."""

    draws: dict[str, FloatArray] = field(default_factory=dict)
    basis: dict[str, str] = field(default_factory=dict)
    units: int | None = None


def noise_of(task: str, scores: Mapping[str, Score], n: int, seed: int) -> Noise:
    """Draws of all models' scores on a task. Those of the teacher's documents are drawn together,
    the others apart; a task's draws do not depend on which other tasks there are."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    found = Noise()
    if (reference := scores["teacher"].outcomes) is not None:
        documents = set(reference.documents)
        same = {
            name: score.outcomes
            for name, score in scores.items()
            if score.outcomes is not None and set(score.outcomes.documents) == documents
        }
        drawn = uncertainty.paired_draws(list(same.values()), n, rng)
        found.draws = dict(zip(same, drawn, strict=True))
        found.basis = dict.fromkeys(same, "paired")
        found.units = reference.units
    for name, score in scores.items():
        value = float(score.value)
        if name in found.draws:
            continue
        if score.samples is not None and not score.lower_is_better:
            found.basis[name] = "binomial"
            draws = uncertainty.binomial_draws(value, score.samples, score.unit, n, rng)
            found.draws[name] = draws
        elif score.stderr is not None:
            found.basis[name] = "standard error"
            found.draws[name] = uncertainty.normal_draws(value, score.stderr, n, rng)
    return found


def detectable(scores: Mapping[str, Score], noise: Noise, student: str) -> float | None:
    """The smallest true difference between a student and its teacher that such samples show in 8 of
    10 cases; None where the noise of one of them is unknown, as that of a single unit."""
    if student not in noise.draws or "teacher" not in noise.draws or noise.units == 1:
        return None
    least, outcomes = 0.0, scores[student].outcomes
    if outcomes is not None and noise.basis[student] == "paired":
        least = 0.0 if scores[student].lower_is_better else 1 / len(outcomes.documents)
    return uncertainty.detectable(noise.draws[student], noise.draws["teacher"], least)


def detects(effects: Iterable[float | None]) -> str:
    """What differences the samples of some benchmarks and students can show, for the title of a
    table."""
    found = [effect for effect in effects if effect]
    if not found:
        return (
            "no noise is known of teacher and student both (no number of samples, or a single "
            "one), so that any difference may be noise"
        )
    span = " to ".join(dict.fromkeys(f"{x:.4g}" for x in (min(found), max(found))))
    return f"detectable: the true difference seen in 8 of 10 such samples, here {span}"
