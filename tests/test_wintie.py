"""Win-and-Tie: the paper's tables, exactness at the breakpoints, and what is refused."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.errors import UserError
from xlstm_distill.evaluate.wintie import exact, split_groups, win_and_tie

UNDERSTANDING = ("PIQA", "ARC-e", "ARC-c", "HellaSwag", "Winogrande", "MMLU")
GENERATION = ("GPQA-D", "GPQA", "GSM8K", "HumanEval", "HumanEval+", "MBPP", "MBPP+")
QWEN = (78.7, 80.3, 63.7, 80.2, 76.4, 75.3, 32.3, 30.8, 80.8, 65.9, 47.6, 62.6, 80.4)
QRWKV = (79.4, 80.6, 60.2, 77.9, 73.9, 65.4, 9.60, 13.2, 23.8, 20.7, 33.5, 0.0, 27.0)
LLAMA = (80.1, 81.6, 57.8, 81.9, 76.9, 65.9, 10.6, 13.8, 48.4, 35.4, 29.9, 48.4, 61.9)
LOLCATS = (79.5, 83.2, 54.6, 75.3, 74.0, 52.9, 1.77, 2.23, 3.87, 2.13, 3.35, 0.0, 0.0)
XLSTM_LLAMA = (80.0, 82.9, 55.9, 82.3, 79.0, 66.1, 17.7, 15.8, 57.8, 39.0, 23.8, 42.8, 56.9)
OLMO = (78.1, 80.7, 58.4, 56.7, 73.4, 66.4, 20.7, 19.0, 67.5, 32.9, 28.7, 50.6, 71.7)
XLSTM_OLMO = (77.9, 81.1, 57.8, 56.9, 72.8, 65.7, 17.7, 19.4, 56.6, 32.3, 27.4, 36.8, 52.4)

# Teacher, student, alpha* over all 13 benchmarks and over the 7 generation benchmarks, as printed
# to three digits.
PAPER = [
    (LLAMA, XLSTM_LLAMA, 0.0, 0.0),
    (OLMO, XLSTM_OLMO, 0.0105, 0.145),
    (LLAMA, LOLCATS, 0.833, 0.920),
    (QWEN, QRWKV, 0.296, 0.686),
]


def tasks(scores: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(UNDERSTANDING + GENERATION, scores, strict=True))


@pytest.mark.parametrize(("teacher", "student", "over_all", "over_generation"), PAPER)
def test_figures_of_the_paper(teacher, student, over_all, over_generation):
    t, s = tasks(teacher), tasks(student)
    assert win_and_tie(t, {"s": s}).alpha_star["s"] == pytest.approx(over_all, abs=5e-4)
    generation = win_and_tie(
        {b: t[b] for b in GENERATION}, {"s": {b: s[b] for b in GENERATION}}
    ).alpha_star["s"]
    assert generation == pytest.approx(over_generation, abs=5e-4)


def test_several_students_and_what_they_win():
    r = win_and_tie(tasks(LLAMA), {"xlstm": tasks(XLSTM_LLAMA), "lolcats": tasks(LOLCATS)})
    assert r.lossless("xlstm") and not r.lossless("lolcats")
    assert r.dominates("xlstm", "lolcats") and not r.dominates("lolcats", "xlstm")
    assert r.coverage(0)["xlstm"] == 8 / 13
    assert r.won("lolcats") == ["ARC-e"]
    assert r.recovery["xlstm"]["GSM8K"] == pytest.approx(57.8 / 48.4)
    assert r.recovery["lolcats"]["MBPP"] == 0
    assert r.coverage(1) == {"xlstm": 1.0, "lolcats": 1.0}


def test_the_inequality_holds_at_its_own_breakpoint_where_floats_fail():
    # In floats 1 - 0.55 / 0.6 gives an alpha at which 0.55 >= (1 - alpha) * 0.6 is False for many
    # such pairs; as fractions never.
    failures = 0
    for a_t in range(1, 101):
        for a_s in range(a_t):
            t, s = a_t / 100, a_s / 100
            alpha = 1 - s / t
            failures += not s >= (1 - alpha) * t
            r = win_and_tie({"b": t}, {"s": {"b": s}})
            assert r.alpha_star_exact["s"] == 1 - Fraction(a_s, a_t)
            assert r.coverage(r.alpha_star_exact["s"])["s"] == 1
            assert r.coverage(r.alpha_star["s"])["s"] == 1
    assert failures > 0


scores = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=12
).map(lambda pairs: [(a / 10, b / 10) for a, b in pairs])


def by_name(values) -> dict[str, float]:
    return {f"b{i}": v for i, v in enumerate(values)}


def run(pairs, lower: bool = False):
    teacher = by_name(t for t, _ in pairs)
    return win_and_tie(teacher, {"s": by_name(s for _, s in pairs)}, list(teacher) if lower else ())


@given(scores, st.booleans())
def test_alpha_star_is_the_infimum_of_the_definition(pairs, lower):
    r = run(pairs, lower)
    star = r.alpha_star_exact["s"]
    assert 0 <= star <= 1
    assert r.coverage(star)["s"] >= 0.5
    # Below it, by whatever small amount, coverage is under one half.
    if star > 0:
        assert r.coverage(star * (1 - Fraction(1, 10**9)))["s"] < 0.5
    # The definition itself, on the decimal numbers.
    reached = 0
    for t, s in pairs:
        t, s = (exact(s), exact(t)) if lower else (exact(t), exact(s))
        reached += s >= (1 - star) * t
    assert reached / len(pairs) == r.coverage(star)["s"]


@given(scores)
def test_curve_is_a_monotone_step_function_that_agrees_with_coverage(pairs):
    r = run(pairs)
    alphas, coverages = r.curve("s")
    assert alphas[0] == 0 and alphas[-1] == 1 and coverages[-1] == 1
    assert alphas == sorted(alphas) and coverages == sorted(coverages)
    for alpha, coverage in zip(alphas, coverages, strict=True):
        assert r.coverage(alpha)["s"] == coverage


@given(scores)
def test_a_student_equal_to_the_teacher_is_lossless_and_scale_does_not_matter(pairs):
    same = [(t, t) for t, _ in pairs]
    assert run(same).alpha_star["s"] == 0
    percent = [(t * 10, s * 10) for t, s in pairs]
    assert run([(round(t, 3), round(s, 3)) for t, s in percent]).alpha_star == run(pairs).alpha_star


@given(scores, st.randoms(use_true_random=False))
def test_order_of_tasks_does_not_matter(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert run(pairs).alpha_star_exact == run(shuffled).alpha_star_exact


def test_teacher_at_zero_passes_and_has_no_recovery():
    r = win_and_tie({"a": 0, "b": 0.5}, {"s": {"a": 0.0, "b": 0.4}})
    assert r.recovery["s"] == {"a": None, "b": pytest.approx(0.8)}
    assert r.alpha_star["s"] == 0
    assert "n/a" in r.table()


def test_less_is_better():
    r = win_and_tie(
        {"squad": 0.5, "drop": 1.0}, {"s": {"squad": 0.625, "drop": 0.9}}, {"squad", "drop"}
    )
    assert r.recovery["s"]["squad"] == 0.8
    assert r.alpha_star_exact["s"] == 0
    assert r.coverage(0.2)["s"] == 1 and r.coverage("0.1999")["s"] == 0.5


def test_accuracy_and_likelihood_are_never_mixed():
    teacher, student = {"arc": 0.5, "squad": 0.7}, {"arc": 0.4, "squad": 1.0}
    with pytest.raises(UserError, match="arc is an accuracy and squad a likelihood"):
        win_and_tie(teacher, {"s": student}, {"squad": True, "arc": False})
    groups = split_groups(teacher, {"s": student}, {"squad"})
    assert groups["accuracy"].tasks == ["arc"] and groups["likelihood"].tasks == ["squad"]
    assert groups["accuracy"].alpha_star_exact["s"] == Fraction(1, 5)
    assert groups["likelihood"].alpha_star_exact["s"] == Fraction(3, 10)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({"a": -0.1}, {"a": 0.1}, "teacher: the score of a is -0.1, below 0"),
        ({"a": 0.1}, {"a": float("nan")}, "s: the score of a is nan"),
        ({"a": 0.1}, {"a": math.inf}, "s: the score of a is inf"),
        ({"a": 0.1}, {"a": "much"}, "s: the score of a is 'much'"),
        ({"a": 0.1}, {"a": True}, "s: the score of a is True"),
        ({"a": 0.1}, {"a": None}, "s: the score of a is None"),
        ({"a": 0.1, "b": 0.2}, {"a": 0.1}, "s lacks b"),
        ({"a": 0.1}, {"a": 0.1, "c": 1}, "teacher lacks c"),
        ({}, {}, "no tasks"),
    ],
)
def test_bad_scores_are_named_in_one_line(teacher, student, message):
    with pytest.raises(UserError, match=message) as error:
        win_and_tie(teacher, {"s": student})
    assert "\n" not in str(error.value)


def test_other_bad_arguments():
    with pytest.raises(UserError, match="no students"):
        win_and_tie({"a": 1}, {})
    with pytest.raises(UserError, match=r"alpha is 1\.5"):
        win_and_tie({"a": 1}, {"s": {"a": 1}}).coverage(1.5)
    with pytest.raises(UserError, match="names b, which is not a task"):
        win_and_tie({"a": 1}, {"s": {"a": 1}}, ["b"])


def test_numbers_of_all_kinds_mean_their_decimal_form():
    assert exact(0.1) == exact("0.1") == exact(np.float32(0.1)) == Fraction(1, 10)
    assert exact(np.int64(3)) == exact(3) == 3
    assert exact(Fraction(1, 3)) == Fraction(1, 3)
    assert exact(1e-7) == Fraction(1, 10**7)


def harness_file(path: Path, accuracy: float, bits: float) -> Path:
    results = {
        "results": {
            "arc_easy": {
                "alias": "arc_easy",
                "acc,none": 0.9,
                "acc_stderr,none": 0.01,
                "acc_norm,none": accuracy,
                "acc_norm_stderr,none": 0.01,
            },
            "squad": {"alias": "squad", "bits_per_byte,none": bits},
        },
        "higher_is_better": {
            "arc_easy": {"acc": True, "acc_norm": True},
            "squad": {"bits_per_byte": False},
        },
    }
    path.write_text(json.dumps(results))
    return path


def test_result_files(tmp_path):
    teacher = harness_file(tmp_path / "t.json", 0.5, 1.0)
    student = harness_file(tmp_path / "s.json", 0.45, 1.25)
    groups = split_groups(teacher, {"s": student})
    assert groups["accuracy"].alpha_star_exact["s"] == Fraction(1, 10)
    assert groups["likelihood"].alpha_star_exact["s"] == Fraction(1, 5)
    with pytest.raises(UserError, match="s lacks squad"):
        split_groups(teacher, {"s": {"arc_easy": 0.3}})
    (tmp_path / "broken.json").write_text('{"results": ')
    with pytest.raises(UserError, match=r"broken\.json: not valid JSON"):
        win_and_tie(teacher, {"s": tmp_path / "broken.json"})
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        win_and_tie(teacher, {"s": str(tmp_path / "none.json")})
    unclear = {"results": {"x": {"alias": "x", "one,none": 1.0, "two,none": 2.0}}}
    with pytest.raises(UserError, match="task x: cannot tell which metric"):
        win_and_tie(unclear, {"s": unclear})


def test_table_dict_and_plot(tmp_path):
    r = win_and_tie(tasks(OLMO), {"xlstm": tasks(XLSTM_OLMO)})
    table = r.table()
    assert "alpha*" in table and "0.0105" in table and "HumanEval+" in table
    plain = json.loads(json.dumps(r.to_dict()))
    assert plain["students"]["xlstm"]["alpha_star"] == r.alpha_star["xlstm"]
    assert len(r.rows()) == 13 and r.rows()[0]["xlstm recovery"] == pytest.approx(77.9 / 78.1)
    first = r.plot(tmp_path / "curve.svg").read_bytes()
    assert first.startswith(b"<?xml") and b"<svg" in first
    assert r.plot(tmp_path / "again.svg").read_bytes() == first
    assert r.plot(tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
