"""Intervals cover what they say; draws pair and cluster; McNemar's test; detectable effects."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from xlstm_distill.evaluate.uncertainty import (
    Outcomes,
    _student,
    alpha_star_draws,
    binomial_draws,
    detectable,
    interval,
    mcnemar,
    normal_draws,
    paired_bootstrap,
    paired_draws,
    resampled,
)
from xlstm_distill.evaluate.wintie import win_and_tie

DRAWS = 1000

# Simulated pairs: 1,000 in the deep tests, 200 in the suite.
simulated = pytest.mark.parametrize(
    "pairs",
    [pytest.param(200, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.deep)],
)


def covers(inside: int, pairs: int) -> bool:
    """Whether 93 to 97 % of 1,000 intervals hold the truth, .95 within 2.9 standard errors; of
    fewer pairs, within as many standard errors."""
    return abs(inside / pairs - 0.95) <= 0.02 * math.sqrt(1000 / pairs)


def outcomes(values, weights=None, passages=None, **more) -> Outcomes:
    names = tuple(range(len(values)))
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    passages = names if passages is None else tuple(passages)
    return Outcomes(names, passages, np.asarray(values, np.float64), weights, **more)


def right_or_wrong(rng, n: int, shares, alike: float) -> np.ndarray:
    """Answers [models, n] with given true shares of right ones, and a common difficulty."""
    common = math.sqrt(alike) * rng.normal(size=n)
    own = math.sqrt(1 - alike) * rng.normal(size=(len(shares), n))
    return common + own < np.array([NormalDist().inv_cdf(p) for p in shares])[:, None]


@simulated
@pytest.mark.parametrize(
    ("n", "teacher", "student"), [(30, 0.6, 0.5), (200, 0.8, 0.72), (1000, 0.35, 0.3)]
)
def test_intervals_of_accuracies_cover(n, teacher, student, pairs):
    rng = np.random.default_rng(n)
    difference = recovery = 0
    for _ in range(pairs):
        t, s = (outcomes(x) for x in right_or_wrong(rng, n, (teacher, student), 0.6))
        a, b = paired_draws([t, s], DRAWS, rng)
        found = interval(s.score - t.score, b - a, t.units)
        difference += found.low <= student - teacher <= found.high
        found = interval(s.score / t.score, b / a, t.units)
        recovery += found.low <= student / teacher <= found.high
    assert covers(difference, pairs) and covers(recovery, pairs)


@simulated
@pytest.mark.parametrize(("n", "lost"), [(50, 0.01), (50, 0.04), (200, 0.01), (500, 0.01)])
def test_intervals_hold_the_truth_where_few_documents_tell_models_apart(n, lost, pairs):
    """A student that loses one document in many and wins none: most samples show none or one."""
    rng = np.random.default_rng(n)
    difference = recovery = equal = 0
    for _ in range(pairs):
        right = rng.random(n) < 0.7
        student = right & (rng.random(n) >= lost / 0.7)
        t, s = outcomes(right), outcomes(student)
        a, b = paired_draws([t, s], DRAWS, rng)
        found = interval(s.score - t.score, b - a, t.units)
        difference += found.low <= -lost <= found.high
        found = interval(s.score / t.score, b / a, t.units)
        recovery += found.low <= 1 - lost / 0.7 <= found.high
        equal += found.low >= 1
    least = (0.93 - 0.02 * math.sqrt(1000 / pairs)) * pairs
    assert difference >= least and recovery >= least and equal == 0


def test_the_prior_is_half_a_document_for_each_pattern_of_two_models():
    models, rng = 5, np.random.default_rng(8)
    answers = rng.random((models, 40)) < 0.5
    drawn = paired_draws([outcomes(x) for x in answers], 40_000, rng)
    for i, one in enumerate(drawn):
        k = answers[i].sum()
        assert one.mean() == pytest.approx((k + 1) / 42, abs=0.002)  # Beta(k + 1, 41 - k)
        for j in range(i):
            # of Dirichlet(n11 + 1/2, n10 + 1/2, n01 + 1/2, n00 + 1/2)
            p = (
                np.array(
                    [
                        (a & b).sum() + 0.5
                        for a in (answers[i], ~answers[i])
                        for b in (answers[j], ~answers[j])
                    ]
                )
                / 42
            )
            gap = p[1] - p[2]
            assert (one - drawn[j]).var() == pytest.approx((p[1] + p[2] - gap**2) / 43, rel=0.05)


def test_models_that_answer_alike_are_not_known_to_be_equal():
    alike = outcomes([1, 0] * 25)
    a, b = paired_draws([alike, alike], 4000, np.random.default_rng(0))
    found = interval(1.0, b / a, alike.units)
    assert found.low < 0.95 and found.high > 1.05
    assert np.mean(b >= a) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("units", [2, 3, 4, 5, 10])
def test_intervals_of_few_windows_cover(units):
    """Two domains of so many windows."""
    rng, inside, pairs = np.random.default_rng(units), 0, 400
    for _ in range(pairs):
        b = rng.normal(1.0, 0.1, (2, units))
        a = b - 0.3 + rng.normal(0.0, 0.05, (2, units))
        found = paired_bootstrap(a.tolist(), b.tolist(), ratio=False, n=1000)
        inside += found.low <= -0.3 <= found.high
    assert inside / pairs > 0.92


@simulated
@pytest.mark.parametrize("passages", [30, 100])
def test_intervals_of_clustered_bits_per_byte_cover_and_unclustered_ones_do_not(passages, pairs):
    rng = np.random.default_rng(passages)
    clustered = single = 0
    for _ in range(pairs):
        of = np.repeat(np.arange(passages), rng.integers(1, 8, size=passages))
        size = rng.integers(3, 60, size=len(of)).astype(float)
        # A passage is hard for both models, and harder for the student by a factor of its own.
        bits = size * rng.gamma(4, 0.25, size=passages)[of]
        factor = 1.25 * rng.gamma(20, 0.05, size=passages)[of]
        t, s = outcomes(bits, size, of), outcomes(bits * factor, size, of)
        for alone in (False, True):
            sides = [outcomes(o.values, o.weights) if alone else o for o in (t, s)]
            a, b = paired_draws(sides, DRAWS, rng)
            found = interval(t.score / s.score, a / b, sides[0].units)
            inside = found.low <= 0.8 <= found.high
            single, clustered = single + alone * inside, clustered + (not alone) * inside
    assert covers(clustered, pairs)
    assert single < 0.85 * pairs


@simulated
def test_intervals_of_alpha_star_cover_where_the_true_gaps_stand_apart(pairs):
    """Gaps .05 apart, noise .005: alpha* is then the gap of one benchmark. docs/math/wintie.md has
    what happens where they are nearer than the noise."""
    rng = np.random.default_rng(3)
    n, gaps = 2000, [0.0, 0.05, 0.1, 0.15, 0.2]
    covered = 0
    for _ in range(pairs):
        sides, seen = [], []
        for gap in gaps:
            t, s = (outcomes(x) for x in right_or_wrong(rng, n, (0.9, 0.9 * (1 - gap)), 0.8))
            a, b = paired_draws([t, s], DRAWS, rng)
            sides.append((b, a))
            seen.append(max(0.0, 1 - s.score / t.score))
        found = interval(sorted(seen)[2], alpha_star_draws(sides)[0], n)
        covered += found.low <= 0.1 <= found.high
    assert covers(covered, pairs)


@simulated
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_binomial_intervals_cover(share, pairs):
    """Where the number of right answers takes few values, coverage jumps with the share: the mean
    over shares nearby is what an interval can promise."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(pairs):
        p = min(0.995, max(0.005, share + rng.uniform(-0.015, 0.015)))
        score = rng.binomial(200, p) / 2
        found = interval(score, binomial_draws(score, 200, 100.0, DRAWS, rng))
        covered += found.low <= 100 * p <= found.high
    assert covers(covered, pairs)


def test_binomial_draws_are_not_degenerate_at_the_ends():
    rng = np.random.default_rng(0)
    low, high = (interval(v, binomial_draws(v, 100, 1.0, 4000, rng)) for v in (0.0, 1.0))
    assert 0 < low.high < 0.05 and 0.95 < high.low < 1
    assert (normal_draws(0.01, 0.1, 1000, rng) >= 0).all()


def test_models_are_drawn_on_the_same_documents_whatever_their_order():
    rng = np.random.default_rng(1)
    values = rng.random(50)
    there = outcomes(values)
    order = rng.permutation(50)
    other = Outcomes(tuple(order.tolist()), tuple(order.tolist()), 2 * values[order], np.ones(50))
    a, b = paired_draws([there, other], 200, rng)
    np.testing.assert_allclose(b, 2 * a, rtol=1e-12)  # the same sums in another order
    assert a.std() > 0
    with pytest.raises(ValueError, match="did not answer the same documents"):
        paired_draws([there, outcomes(values[:49])], 10, rng)


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    units = np.random.default_rng(2).random((40, 3))
    whole = resampled(units, 100, np.random.default_rng(5))
    monkeypatch.setattr(sys.modules[resampled.__module__], "_COUNTS_AT_ONCE", 7 * 40)
    parts = resampled(units, 100, np.random.default_rng(5))
    np.testing.assert_array_equal(whole, parts)
    # Units that are equal are counted as one kind: the same distribution.
    twice = np.repeat(units[:2], 50, axis=0)
    drawn = resampled(twice, 4000, np.random.default_rng(6)).mean(axis=0)
    np.testing.assert_allclose(drawn, twice.sum(axis=0), rtol=0.02)  # standard error .003


def test_one_passage_for_all_cannot_be_drawn():
    assert outcomes([0, 1, 1], passages="aaa").units == 3
    assert outcomes([0, 1, 1], passages="aab").units == 2


def test_student_quantiles():
    """Against tables; as exact as the docstring says."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 6: 2.44691, 10: 2.22814, 30: 2.04227}
    for freedom, value in table.items():
        error = abs(_student(0.025, freedom) / value - 1)
        assert error < (0.008 if freedom == 3 else 0.001)


def test_few_units_widen_the_interval():
    draws = np.random.default_rng(0).normal(size=100_000)
    wide, usual = interval(0.0, draws, 8), interval(0.0, draws)
    assert usual.high == pytest.approx(1.96, rel=0.02)
    # t of 7 degrees of freedom, times sqrt(8 / 7).
    assert wide.high == pytest.approx(2.365 * math.sqrt(8 / 7), rel=0.04)
    # 4 strata of 8 units: t of 28 degrees of freedom.
    strata = interval(0.0, draws, 8, 4)
    assert strata.high == pytest.approx(2.048 * math.sqrt(8 / 7), rel=0.04)
    assert interval(0.0, draws, 1)[1:] == (-math.inf, math.inf)


def test_alpha_star_of_draws_is_that_of_the_engine():
    rng = np.random.default_rng(4)
    reached, wanted = rng.integers(0, 100, size=(2, 9, 20))
    stars, lossless = alpha_star_draws(list(zip(reached, wanted, strict=True)))
    results = [
        win_and_tie(
            {str(i): int(wanted[i, j]) for i in range(9)},
            {"s": {str(i): int(reached[i, j]) for i in range(9)}},
        )
        for j in range(20)
    ]
    expected = [r.alpha_star_exact["s"] for r in results]
    np.testing.assert_allclose(stars, [float(x) for x in expected], atol=1e-15)
    assert lossless == np.mean([r.lossless("s") for r in results])


def test_mcnemar_is_the_exact_binomial_test():
    first = [1] * 30 + [0] * 30
    for lost, gained in ((0, 0), (0, 5), (0, 6), (3, 12), (12, 3), (7, 7)):
        second = [0] * lost + [1] * (30 - lost) + [1] * gained + [0] * (30 - gained)
        n, k = lost + gained, min(lost, gained)
        p = min(Fraction(1), 2 * sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1)))
        assert mcnemar(outcomes(first), outcomes(second)) == pytest.approx(float(p), rel=1e-12)
    many = outcomes([0, 1] * 5000), outcomes([1, 0] * 5000)
    assert mcnemar(*many) == 1
    assert mcnemar(outcomes([0.5, 1]), outcomes([0, 1])) is None
    shared = [outcomes([0, 1, 1], passages="aab") for _ in range(2)]
    assert mcnemar(*shared) is None
    with pytest.raises(ValueError, match="did not answer the same documents"):
        mcnemar(outcomes([1]), outcomes([1, 0]))


@pytest.mark.slow
def test_what_is_detectable_is_found_in_eight_of_ten_cases():
    rng = np.random.default_rng(11)
    n, teacher = 500, 0.7
    t, s = (outcomes(x) for x in right_or_wrong(rng, n, (teacher, teacher), 0.5))
    effect = detectable(*paired_draws([t, s], 4000, rng), 1 / n)
    found = 0
    for _ in range(400):
        t, s = (outcomes(x) for x in right_or_wrong(rng, n, (teacher, teacher - effect), 0.5))
        a, b = paired_draws([t, s], 400, rng)
        found += interval(t.score - s.score, a - b, n).low > 0
    # The effect is estimated from one sample (its error some 4 %) and shifts the noise itself.
    assert 0.7 < found / 400 < 0.9
    same = outcomes([1.0] * 50)
    assert detectable(*paired_draws([same, same], 100, rng), 1 / 50) == pytest.approx(
        2.8 / 50, 1e-3
    )


@pytest.mark.parametrize("exponential", [False, True])
def test_the_standard_error_of_a_score_is_that_of_its_draws(exponential):
    """Passages of one to five documents that are hard together; taken for independent, the same
    documents have a smaller error."""
    rng = np.random.default_rng(8)
    passages = np.repeat(np.arange(300), rng.integers(1, 6, 300))
    size = rng.integers(5, 50, len(passages)).astype(float)
    values = size * (0.7 + 0.2 * rng.normal(size=300)[passages] + 0.1 * rng.normal(size=len(size)))
    one = outcomes(values, size, passages, exponential=exponential)
    (draws,) = paired_draws([one], 20_000, rng)
    assert one.stderr == pytest.approx(draws.std(), rel=0.03)
    assert outcomes(values, size, exponential=exponential).stderr < 0.8 * one.stderr


def test_the_standard_error_of_independent_answers_is_the_usual_one():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert outcomes(values).stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert outcomes(values, passages=["one"] * 5).stderr == outcomes(values).stderr
    assert outcomes([1.0]).stderr is None
