"""Divergence from the teacher in detail: tails of the KL, and KL by distance of what is needed.

The figures are those of llama.cpp's perplexity tool with --kl-divergence: mean and percentiles of
KL(teacher || student), the root mean square of the difference of the probabilities that both give
the true next token, and the share of positions with the same most probable token. Two things
differ: every position of a window counts, not those of its second half, and standard errors are
over windows, because neighbouring positions are not independent.

The distance of a position says how far back the context reaches that is worth copying: where the
two tokens before the next one were last followed by the same next token. A layer with a window of
64 tokens sees that token up to a distance of 64; beyond, it has to be remembered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from .fidelity import BUCKETS, Fidelity, FidelityTeacher, IntArray, Values, fidelity
from .uncertainty import FloatArray, ratio_stderr

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


class Estimate(NamedTuple):
    """A mean and its standard error over windows, None for a single one."""

    value: float
    stderr: float | None


class DistanceMeasure(BaseModel):
    """Means over the positions whose distance is in [low, high); both None: the two tokens were
    never followed by this one. nll in nats a token. Standard errors are over windows; None for a
    single one, and in files from before they were there."""

    model_config = ConfigDict(extra="forbid")

    low: int | None
    high: int | None
    positions: int
    kl: float
    agree: float
    nll: float
    teacher_nll: float
    kl_stderr: float | None = None
    nll_difference_stderr: float | None = None

    @property
    def perplexity(self) -> float:
        """The model's."""
        return math.exp(min(self.nll, 700.0))

    @property
    def teacher_perplexity(self) -> float:
        """The teacher's, on the same positions."""
        return math.exp(min(self.teacher_nll, 700.0))

    @property
    def range(self) -> str:
        """Its range in words."""
        return "new" if self.low is None else f"{self.low}–{self.high}"


class Divergence(BaseModel):
    """One model on one domain. kl_percentiles: percent -> KL in nats. probability_rms: of the
    student's minus the teacher's probability of the true next token. nll_difference: the student's
    minus the teacher's, the logarithm of the ratio of perplexities. by_distance: no empty ranges.
    """

    model_config = ConfigDict(extra="forbid")

    kl: Estimate
    kl_percentiles: dict[float, float]
    kl_max: float
    probability_rms: Estimate
    same_top: Estimate
    nll_difference: Estimate
    by_distance: list[DistanceMeasure]


def divergence(
    models: Mapping[str, Any],
    teacher: FidelityTeacher,
    documents: Mapping[str, Sequence[Sequence[int]]],
    **options: Any,
) -> tuple[Fidelity, dict[str, dict[str, Divergence]]]:
    """`fidelity` and, from the same pass, the details: model -> domain -> Divergence.

    Arguments and errors are those of `fidelity`.
    """
    found: dict[str, dict[str, Divergence]] = {name: {} for name in models}

    def details(domain: str, windows: IntArray, values: Mapping[str, Values]) -> None:
        for name in models:
            n = len(values[name]["kl"])
            theirs = values["teacher"]["nll"][:n]
            found[name][domain] = details_of(values[name], theirs, windows[:n])

    return fidelity(models, teacher, documents, **options, on_values=details), found


def details_of(values: Values, teacher_nll: FloatArray, windows: IntArray) -> Divergence:
    """Details of one model's values and the teacher's nll, [windows, T], on `windows` of tokens."""
    kl, agree = values["kl"], values["agree"]
    nll, theirs = values["nll"][:, :-1], teacher_nll[:, :-1]
    square = _estimate((np.exp(-nll) - np.exp(-theirs)) ** 2)
    rms = math.sqrt(square.value)
    # d sqrt(x) = dx / (2 sqrt(x))
    rms_stderr = square.stderr / (2 * rms) if square.stderr is not None and rms else square.stderr
    percentiles = np.percentile(kl, PERCENTILES)
    return Divergence(
        kl=_estimate(kl),
        kl_percentiles=dict(zip(PERCENTILES, percentiles.tolist(), strict=True)),
        kl_max=float(kl.max()),
        probability_rms=Estimate(rms, rms_stderr),
        same_top=_estimate(agree),
        nll_difference=_estimate(nll - theirs),
        by_distance=_by_distance(
            induction_distances(windows),
            {"kl": kl[:, :-1], "agree": agree[:, :-1], "nll": nll, "teacher_nll": theirs},
        ),
    )


def _estimate(values: FloatArray) -> Estimate:
    means = values.mean(axis=1)
    n = len(means)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else None)


def induction_distances(windows: IntArray) -> NDArray[np.int64]:
    """Distance of every position with a next token, [windows, T - 1] of token ids [windows, T].

    That of t is t - s for the last s < t at which tokens s - 1, s and s + 1 are those at t - 1, t
    and t + 1; 0 where there is none.
    """
    found = np.zeros((len(windows), windows.shape[1] - 1), dtype=np.int64)
    for row, ids in zip(found, windows, strict=True):
        triples = np.stack([ids[:-2], ids[1:-1], ids[2:]], axis=1)
        order = np.lexsort(triples.T)  # stable: equal ones stay in the order of the text
        again = (np.diff(triples[order], axis=0) == 0).all(axis=1)
        row[1 + order[1:][again]] = np.diff(order)[again]
    return found


def _by_distance(
    distances: NDArray[np.int64], values: Mapping[str, FloatArray]
) -> list[DistanceMeasure]:
    longest, excess = distances.shape[1], values["nll"] - values["teacher_nll"]
    ranges: list[tuple[int | None, int | None]] = [
        *((max(1, low), min(high, longest)) for low, high in BUCKETS if low < longest),
        (None, None),
    ]
    found = []
    for low, high in ranges:
        inside = distances == 0 if low is None or high is None else _within(distances, low, high)
        if inside.any():
            found.append(
                DistanceMeasure(
                    low=low,
                    high=high,
                    positions=int(inside.sum()),
                    kl_stderr=_stderr(values["kl"], inside),
                    nll_difference_stderr=_stderr(excess, inside),
                    **{m: float(v[inside].mean()) for m, v in values.items()},
                )
            )
    return found


def _stderr(values: FloatArray, inside: NDArray[np.bool_]) -> float | None:
    """Of the mean over the positions inside, over windows."""
    return ratio_stderr((values * inside).sum(axis=1), inside.sum(axis=1))


def _within(distances: NDArray[np.int64], low: int, high: int) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (low <= distances) & (distances < high)
    return inside
