"""Win-and-Tie: the paper's tables, exactness at the breakpoints, and what is refused."""

from __future__ import annotations

import csv
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import compare
from xlstm_distill.evaluate.scores import exact
from xlstm_distill.evaluate.wintie import split_groups, win_and_tie

TABLE = Path(__file__).parent.parent / "docs" / "published_scores.csv"
with TABLE.open(encoding="utf-8") as lines:
    ROWS = list(csv.DictReader(lines))
GENERATION = [row["task"] for row in ROWS if row["group"] == "generation"]

# Teacher, student, alpha* over all 13 benchmarks and over the 7 generation benchmarks, as printed
# to three digits.
PAPER = [
    ("Llama3.1-8B", "xLSTM-Llama3.1-8B", 0.0, 0.0),
    ("Olmo3-7B", "xLSTM-Olmo3-7B", 0.0105, 0.145),
    ("Llama3.1-8B", "LoLCATs", 0.833, 0.920),
    ("Qwen2.5-7B", "QRWKV6-7B", 0.296, 0.686),
]


def tasks(model: str) -> dict[str, float]:
    return {row["task"]: float(row[model]) for row in ROWS}


def harness(model: str) -> dict[str, Any]:
    """The same as lm-evaluation-harness writes it, in 0..1."""
    generated = {row["task"]: row["group"] == "generation" for row in ROWS}
    metric = {True: "exact_match,strict-match", False: "acc,none"}
    kind = {True: "generate_until", False: "multiple_choice"}
    return {
        "results": {
            row["task"]: {
                "alias": row["task"],
                metric[generated[row["task"]]]: float(Decimal(row[model]) / 100),
                metric[generated[row["task"]]].replace(",", "_stderr,"): "N/A",
            }
            for row in ROWS
        },
        "configs": {t: {"task": t, "output_type": kind[g]} for t, g in generated.items()},
        "higher_is_better": {t: {metric[g].split(",")[0]: True} for t, g in generated.items()},
    }


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("form", ["mapping", "table", "results", "results file"])
@pytest.mark.parametrize(("teacher", "student", "over_all", "over_generation"), PAPER)
def test_figures_of_the_paper(tmp_path, form, teacher, student, over_all, over_generation):
    make = {
        "mapping": tasks,
        "table": lambda model: f"{TABLE}:{model}",
        "results": harness,
        "results file": lambda model: write(tmp_path / f"{model}.json", harness(model)),
    }[form]
    t, s = make(teacher), make(student)
    star = win_and_tie(t, {"s": s}).alpha_star_exact["s"]
    assert float(star) == pytest.approx(over_all, abs=5e-4)
    groups = {"generation": GENERATION} if form == "mapping" else None
    found = compare(t, {"s": s}, groups=groups)
    assert found.groups[0].students["s"].alpha_star_exact == str(star)
    assert found.alpha_star(name="generation")["s"] == pytest.approx(over_generation, abs=5e-4)
    # To the last digit the same from every form: in per cent, as text or as floats.
    assert star == win_and_tie(tasks(teacher), {"s": tasks(student)}).alpha_star_exact["s"]


def test_a_column_of_a_table_is_named_or_has_the_models_name():
    named = win_and_tie(f"{TABLE}:Llama3.1-8B", {"LoLCATs": TABLE})
    assert named.alpha_star["LoLCATs"] == pytest.approx(0.833, abs=5e-4)
    with pytest.raises(UserError, match=r"has no scores of 'teacher' \(FILE.csv:COLUMN; there: Qw"):
        win_and_tie(TABLE, {"LoLCATs": TABLE})


def test_several_students_and_what_they_win():
    r = win_and_tie(
        tasks("Llama3.1-8B"), {"xlstm": tasks("xLSTM-Llama3.1-8B"), "lolcats": tasks("LoLCATs")}
    )
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


@given(scores, st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 20))
def test_alpha_star_is_brute_force_over_all_breakpoints(pairs, directions, twentieths):
    """Mixed directions: one result for each kind, each the least breakpoint with coverage 1/2 (or
    any other coverage) by the definition, on numbers read as decimals."""
    teacher, student = by_name(t for t, _ in pairs), by_name(s for _, s in pairs)
    lower = {f"b{i}": directions[i] for i in range(len(pairs))}
    wanted = Fraction(twentieths, 20)
    for kind, r in split_groups(teacher, {"s": student}, lower).items():
        sides = [(Fraction(str(student[b])), Fraction(str(teacher[b]))) for b in r.tasks]
        if kind == "likelihood":
            sides = [(t, s) for s, t in sides]

        def share(alpha, sides=sides):
            return Fraction(sum(s >= (1 - alpha) * t for s, t in sides), len(sides))

        points = {Fraction(0), Fraction(1), *(1 - s / t for s, t in sides if t and s < t)}
        assert r.alpha_star_exact["s"] == min(a for a in points if share(a) >= Fraction(1, 2))
        assert share(r.alpha_star_exact["s"]) >= Fraction(1, 2)
        assert r.tolerance("s", wanted) == min(a for a in points if share(a) >= wanted)


@given(scores, st.integers(1, 1000), st.integers(0, 1000))
def test_a_benchmark_that_the_student_wins_never_raises_alpha_star(pairs, score, more):
    longer = [*pairs, (score / 10, (score + more) / 10)]
    assert run(longer).alpha_star_exact["s"] <= run(pairs).alpha_star_exact["s"]


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
    with pytest.raises(UserError, match="arc is of the kind accuracy and squad of the kind like"):
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


def test_the_worst_benchmark_and_the_tolerance_of_more():
    r = win_and_tie(f"{TABLE}:Olmo3-7B", {"x": f"{TABLE}:xLSTM-Olmo3-7B"})
    assert r.worst("x") == "MBPP"
    assert f"13 benchmarks (more is better), scores of teacher ({TABLE}:Olmo3-7B)" in r.table()
    assert r.tolerance("x", 1) == 1 - Fraction(368, 506)
    # The 12th of 13: ceil(.9 * 13).
    assert r.tolerance("x", "0.9") == 1 - Fraction(524, 717)
    assert win_and_tie({"a": 0}, {"s": {"a": 0}}).worst("s") is None
    for wrong in (0, 1.1):
        with pytest.raises(UserError, match=f"coverage is {wrong}"):
            r.tolerance("x", wrong)


def test_table_dict_and_plot(tmp_path):
    r = win_and_tie(tasks("Olmo3-7B"), {"xlstm": tasks("xLSTM-Olmo3-7B")})
    table = r.table()
    assert "alpha*" in table and "0.0105" in table and "HumanEval+" in table
    plain = json.loads(json.dumps(r.to_dict()))
    assert plain["students"]["xlstm"]["alpha_star"] == r.alpha_star["xlstm"]
    assert len(r.rows()) == 13 and r.rows()[0]["xlstm recovery"] == pytest.approx(77.9 / 78.1)
    first = r.plot(tmp_path / "curve.svg").read_bytes()
    assert first.startswith(b"<?xml") and b"<svg" in first
    assert r.plot(tmp_path / "again.svg").read_bytes() == first
    assert r.plot(tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_the_samples_can_show():
    alone = win_and_tie({"a": 0.8, "b": 0.5}, {"s": {"a": 0.74, "b": 0.4}})
    assert alone.detectable == {"s": {"a": None, "b": None}} and "unknown" in alone.table()
    assert "no noise is known of teacher and student both" in alone.table()

    def results(a: float, b: float) -> dict:
        return {
            "results": {"a": {"acc,none": a}, "b": {"acc,none": b}},
            "n-samples": {"a": {"effective": 400}},
        }

    found = win_and_tie(results(0.8, 0.5), {"s": results(0.74, 0.4)})
    error = math.sqrt(0.8 * 0.2 / 400 + 0.74 * 0.26 / 400)
    assert found.detectable["s"]["a"] == pytest.approx(2.8 * error, rel=0.1)
    shown = f"{found.detectable['s']['a']:.4g}"
    assert f"seen in 8 of 10 such samples, here {shown}" in found.table()
    assert found.detectable["s"]["b"] is None
    assert found.rows()[0]["s detectable"] == found.to_dict()["students"]["s"]["detectable"]["a"]
    # One of the two is not enough.
    mixed = win_and_tie(results(0.8, 0.5), {"s": {"a": 0.74, "b": 0.4}})
    assert "no noise is known of teacher and student both" in mixed.table()
    with pytest.raises(UserError, match="a student cannot be named 'teacher'"):
        win_and_tie({"a": 0.5}, {"teacher": {"a": 0.5}})
