"""How sure a score is: bootstrap draws, intervals, McNemar's test, what so many documents can show.

Everything comes from draws: scores as they might have been with other documents. Models that
answered the same documents are drawn together, which pairs them; documents that share a passage are
drawn together too (docs/math/wintie.md). From an aggregate score alone the draws are those of a
binomial proportion, or of a normal error that the source states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_NORMAL = NormalDist()
_LEVEL, _POWER = 0.95, 0.8
_COUNTS_AT_ONCE = 1 << 22
"""Counts of draws times units that are held at once (32 MiB)."""
_FEW = 5
"""Units from which quantiles of draws are taken."""
_PRIOR = 2.0
"""Documents' worth of what is believed before: half a document for each pattern of two models'
answers (Agresti and Min, Statistics in Medicine 24, 2005)."""


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """What a model got on each document of a benchmark, with its score as
    sum(values) / sum(weights), or the exponential of that (perplexities).

    documents: names of the documents. passages: what each asks about; documents of one passage are
    drawn together.
    """

    documents: tuple[Hashable, ...]
    passages: tuple[Hashable, ...]
    values: FloatArray
    weights: FloatArray
    exponential: bool = False

    @property
    def score(self) -> float:
        """The model's score on all documents."""
        return float(_ratio(self.values.sum(), self.weights.sum(), self.exponential))

    @property
    def stderr(self) -> float | None:
        """Its standard error over units (of a ratio, linearised); None for one unit. Documents that
        ask about one passage are right and wrong together: taken for independent, they would make
        it too small."""
        clusters = _clusters(self.passages)
        values, weights = (np.bincount(clusters, x) for x in (self.values, self.weights))
        error = ratio_stderr(values, weights)
        return error * self.score if error is not None and self.exponential else error

    @property
    def right_or_wrong(self) -> bool:
        """Whether every document is one answer, right (1) or wrong (0)."""
        whole = bool((self.weights == 1).all()) and not self.exponential
        return whole and {*self.values.tolist()} <= {0.0, 1.0}

    @property
    def units(self) -> int:
        """How many passages (or documents, where none is shared) can be drawn."""
        return int(_clusters(self.passages).max(initial=-1)) + 1


def _ratio(values: ArrayLike, weights: ArrayLike, exponential: bool) -> FloatArray:
    mean: FloatArray = np.asarray(values) / np.asarray(weights)
    return np.exp(np.minimum(mean, 700.0)) if exponential else mean


def ratio_stderr(values: NDArray[Any], weights: NDArray[Any]) -> float | None:
    """Standard error of sum(values) / sum(weights) over units, linearised; None for one unit."""
    n, total = len(values), float(weights.sum())
    if n < 2:
        return None
    rest = values - values.sum() / total * weights
    return math.sqrt(n / (n - 1) * float(rest @ rest)) / total


def _clusters(passages: Sequence[Hashable]) -> NDArray[np.intp]:
    """Number of each document's passage. One passage for all could not be drawn anew: then every
    document stands for itself."""
    numbers = {passage: i for i, passage in enumerate(dict.fromkeys(passages))}
    if len(numbers) < 2:
        return np.arange(len(passages))
    return np.array([numbers[p] for p in passages], dtype=np.intp)


# ---- draws --------------------------------------------------------------------------------------


def _kinds(units: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """The different units in the order in which they come, and how often each is there. Answers
    right or wrong are few kinds, however many documents."""
    _, first, repeats = np.unique(units, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return units[first[order]], repeats[order]


def _sums(draw: Callable[[int], NDArray[Any]], kinds: FloatArray, n: int) -> FloatArray:
    """Sums of the kinds, as often as each of `n` draws says; `draw(m)` gives [m, kinds]."""
    step = max(1, _COUNTS_AT_ONCE // len(kinds))
    # Not `@`: the order in which a BLAS sums may depend on its threads and on the rows at once.
    parts = (np.einsum("nk,kc->nc", draw(min(step, n - i)), kinds) for i in range(0, n, step))
    return np.concatenate(list(parts))


def resampled(units: FloatArray, n: int, rng: np.random.Generator) -> FloatArray:
    """Sums over `n` draws with replacement of as many units as there are: [units, columns] to
    [n, columns]. Columns are drawn together."""
    kinds, repeats = _kinds(units)
    share = repeats / len(units)
    return _sums(lambda m: rng.multinomial(len(units), share, size=m), kinds, n)


def _posterior(units: FloatArray, models: int, n: int, rng: np.random.Generator) -> FloatArray:
    """As `resampled` for columns (right answers, documents) of each model, up to a factor of a row:
    how often each kind of unit occurs is drawn from its posterior (Dirichlet).

    Drawing with replacement knows no other answers than those seen: where no document tells two
    models apart it finds no noise at all. Here every pattern of answers may occur.
    """
    kinds, repeats = _kinds(units)
    # Runs of a Hadamard design: any two models have each pattern of answers equally often.
    runs = 1 << models.bit_length()
    right = np.bitwise_count(np.arange(runs)[:, None] & np.arange(1, models + 1)) % 2
    patterns = np.stack([right, np.ones_like(right)], axis=2).reshape(runs, 2 * models)
    shape = np.concatenate([repeats, np.full(runs, _PRIOR / runs)])
    kinds = np.concatenate([kinds, patterns])
    return _sums(lambda m: rng.standard_gamma(shape, size=(m, len(shape))), kinds, n)


def paired_draws(
    outcomes: Sequence[Outcomes], n: int, rng: np.random.Generator
) -> list[FloatArray]:
    """Scores [n] of each model, all on the same drawn documents; where every answer is right or
    wrong, from the posterior of their frequencies.

    All outcomes are of the same documents, in any order. Raises ValueError where they are not.
    """
    first = outcomes[0]
    columns = []
    clusters = _clusters(first.passages)
    for one in outcomes:
        place = {document: i for i, document in enumerate(one.documents)}
        if place.keys() != set(first.documents):
            raise ValueError("paired_draws: the models did not answer the same documents")
        order = np.array([place[document] for document in first.documents])
        columns += [np.bincount(clusters, side[order]) for side in (one.values, one.weights)]
    units = np.stack(columns, axis=1).astype(np.float64)
    binary = all(one.right_or_wrong for one in outcomes)
    sums = _posterior(units, len(outcomes), n, rng) if binary else resampled(units, n, rng)
    return [
        _ratio(sums[:, 2 * i], sums[:, 2 * i + 1], one.exponential)
        for i, one in enumerate(outcomes)
    ]


def binomial_draws(
    score: float, documents: int, unit: float, n: int, rng: np.random.Generator
) -> FloatArray:
    """Scores [n] of a proportion known by its value (in 0..`unit`) and its number of documents:
    Jeffreys' posterior, which is not degenerate at 0 and 1."""
    right = min(score / unit, 1.0) * documents
    return unit * rng.beta(right + 0.5, documents - right + 0.5, size=n)


def normal_draws(score: float, stderr: float, n: int, rng: np.random.Generator) -> FloatArray:
    """Scores [n] of a value with a stated standard error; never below 0."""
    return np.maximum(rng.normal(score, stderr, size=n), 0.0)


def alpha_star_draws(sides: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, float]:
    """alpha* [n] of the draws, and the share of draws in which it is 0 (C_0 >= 1/2).

    sides: for each benchmark the draws of what is reached and of what is wanted in
    reached >= (1 - alpha) * wanted; benchmarks are drawn apart.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = [np.where(r >= w, 0.0, 1 - r / w) for r, w in sides]
    middle = math.ceil(len(gaps) / 2) - 1
    stars: FloatArray = np.partition(np.stack(gaps), middle, axis=0)[middle]
    return stars, float(np.mean(stars == 0))


# ---- intervals ----------------------------------------------------------------------------------


def interval(
    value: float, draws: FloatArray, units: int | None = None, strata: int = 1
) -> Interval:
    """`value` with the 95 % percentile interval of its draws.

    units: how many units were drawn from, in each of so many strata. Percentiles of few units lie
    too near: they are taken further out, by Student's t (strata * (units - 1) degrees of freedom)
    and the bootstrap's missing sqrt(units / (units - 1)). Below 5 units the outermost draws are not
    far enough: the ends are so many standard errors away. One unit says nothing: there are no ends.
    """
    tail = (1 - _LEVEL) / 2
    if units is not None:
        if units < 2:
            return Interval(value, -math.inf, math.inf)
        wide = _student(tail, strata * (units - 1)) * math.sqrt(units / (units - 1))
        if units < _FEW:
            away = wide * float(draws.std())
            return Interval(value, value - away, value + away)
        tail = _NORMAL.cdf(-wide)
    low, high = np.quantile(draws, [tail, 1 - tail])
    # A value at an end of its range, 0 right answers say, is no draw of a posterior.
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _student(tail: float, freedom: int) -> float:
    """Upper quantile of Student's t: exact for 1 and 2, else an expansion in 1 / freedom, too small
    by 0.8 % at 3 degrees of freedom and by less than 0.1 % from 6 on."""
    if freedom == 1:
        return math.tan(math.pi * (0.5 - tail))
    if freedom == 2:
        return (1 - 2 * tail) * math.sqrt(2 / (1 - (1 - 2 * tail) ** 2))
    z = _NORMAL.inv_cdf(1 - tail)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def detectable(first: FloatArray, second: FloatArray, least: float = 0.0) -> float:
    """`seen_with` the standard error of the difference of two scores, known by their draws.

    least: a bound of the standard error from below, for samples in which no document tells the
    models apart.
    """
    return seen_with(max(float((first - second).std()), least))


def seen_with(stderr: float) -> float:
    """The smallest true difference that samples with such a standard error show in 8 of 10 cases,
    in a two-sided test at 5 %: 2.8 standard errors."""
    return (_NORMAL.inv_cdf((1 + _LEVEL) / 2) + _NORMAL.inv_cdf(_POWER)) * stderr


def mcnemar(first: Outcomes, second: Outcomes) -> float | None:
    """McNemar's exact two-sided p of "both models are right equally often".

    None where the answers are not right or wrong, or where documents share a passage (the test
    takes them for independent). Raises ValueError where the documents are not the same.
    """
    a, b = (dict(zip(o.documents, o.values.tolist(), strict=True)) for o in (first, second))
    if a.keys() != b.keys():
        raise ValueError("mcnemar: the models did not answer the same documents")
    if not (first.right_or_wrong and second.right_or_wrong) or first.units < len(a):
        return None
    changed = [b[document] for document, value in a.items() if value != b[document]]
    n, fewer = len(changed), min(changed.count(0.0), changed.count(1.0))
    # log of C(n, k) / 2^n: the terms themselves leave the range of floats for n > 1,000.
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


# ---- means of windows ---------------------------------------------------------------------------


def paired_bootstrap(
    a: Sequence[float] | Sequence[Sequence[float]],
    b: Sequence[float] | Sequence[Sequence[float]],
    ratio: bool = True,
    n: int = 10_000,
    seed: int = 0,
) -> Interval:
    """mean(a) / mean(b), or mean(a) - mean(b), with its 95 % percentile interval.

    a, b: values of the same units (windows, documents), drawn together with replacement `n` times.
    Lists of lists are strata (domains): units are drawn within each, and the mean is the mean of
    the strata's means. Few units widen the interval as in `interval`, by the smallest stratum.
    Deterministic by `seed`. Raises ValueError where the units do not pair.
    """
    strata_a, strata_b = _strata(a), _strata(b)
    if [len(x) for x in strata_a] != [len(x) for x in strata_b]:
        raise ValueError("paired_bootstrap: a and b have different numbers of units")
    if not strata_a or not all(len(x) for x in strata_a):
        raise ValueError("paired_bootstrap: no units")
    rng = np.random.default_rng(seed)
    drawn = np.zeros((n, 2))
    for x, y in zip(strata_a, strata_b, strict=True):
        drawn += resampled(np.stack([x, y], axis=1), n, rng) / (len(x) * len(strata_a))
    mean_a = float(np.mean([x.mean() for x in strata_a]))
    mean_b = float(np.mean([y.mean() for y in strata_b]))
    units, strata = min(map(len, strata_a)), len(strata_a)
    if not ratio:
        return interval(mean_a - mean_b, drawn[:, 0] - drawn[:, 1], units, strata)
    if mean_b == 0 or (drawn[:, 1] == 0).any():
        raise ValueError("paired_bootstrap: b is zero, the ratio does not exist")
    return interval(mean_a / mean_b, drawn[:, 0] / drawn[:, 1], units, strata)


def _strata(values: Sequence[float] | Sequence[Sequence[float]]) -> list[FloatArray]:
    if len(values) and isinstance(values[0], Sequence | np.ndarray):
        return [np.asarray(v, dtype=np.float64) for v in values]
    return [np.asarray(values, dtype=np.float64)]
