"""Comparisons: what does not compare, controls, chance, intervals, groups, tables."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from xlstm_distill import plots
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import compare, scores_of, win_and_tie, write_results
from xlstm_distill.evaluate.comparable import differences

N = 400


def results(seed: int = 0, **skills: float) -> dict[str, Any]:
    """Results with samples; a task's skill is its share of right answers. The same documents are
    hard in all results, so that models can be paired."""
    out: dict[str, Any] = {
        "results": {},
        "higher_is_better": {},
        "versions": {},
        "n-shot": {},
        "n-samples": {},
        "configs": {},
        "config": {"limit": None, "random_seed": 0, "fewshot_seed": 1234},
        "chat_template_sha": None,
        "samples": {},
    }
    rng = np.random.default_rng(seed)
    for number, (task, skill) in enumerate(skills.items()):
        hardness = np.random.default_rng(number).random(N) + 0.2 * rng.normal(size=N)
        right = np.argsort(np.argsort(hardness)) < skill * N
        out["results"][task] = {"alias": task, "acc,none": right.sum() / N}
        out["higher_is_better"][task] = {"acc": True}
        out["versions"][task] = 1.0
        out["n-shot"][task] = 5
        out["n-samples"][task] = {"original": N, "effective": N}
        out["configs"][task] = {"output_type": "multiple_choice", "chance": 0.25}
        out["samples"][task] = [
            {"doc_id": i, "acc": float(x)} for i, x in enumerate(right.tolist())
        ]
    return out


def aggregates(of: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in of.items() if key != "samples"}


TEACHER = results(0, arc=0.8, piqa=0.7, boolq=0.27, squad=0.6)
STUDENT = results(1, arc=0.74, piqa=0.71, boolq=0.28, squad=0.5)
CONTROL = results(2, arc=0.6, piqa=0.7, boolq=0.27, squad=0.2)


# ---- what does not compare ----------------------------------------------------------------------


def test_tables_stay_readable_where_a_score_is_astronomic(tmp_path):
    table = tmp_path / "x.csv"
    table.write_text("task,metric,teacher,stu\na,word_perplexity,1e90,2\n")
    found = compare(f"{table}:teacher", {"stu": f"{table}:stu"})
    assert "5e+89" in found.table() and max(map(len, found.table().splitlines())) < 250
    judged = win_and_tie(f"{table}:teacher", {"stu": f"{table}:stu"})
    assert "5e+89" in judged.table()


@pytest.mark.parametrize("level", [-1, 25])
def test_a_chance_level_in_another_unit_than_the_scores_is_refused(level):
    with pytest.raises(UserError, match=f"chance level of arc is {level}, expected 0 to 1"):
        compare({"arc": 0.5}, {"stu": {"arc": 0.4}}, chance={"arc": level})


def test_sources_that_share_tasks_are_told_how_to_compare_these():
    with pytest.raises(UserError, match="lacks b; --tasks names those to compare"):
        compare({"a": 0.5, "b": 0.5}, {"stu": {"a": 0.4}})
    with pytest.raises(UserError, match="task sets differ") as nothing:
        compare({"a": 0.5}, {"stu": {"b": 0.4}})
    assert "--tasks" not in str(nothing.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("versions", "arc"), 2.0, "task version of s is 2.0, of teacher 1.0 (arc)"),
        (("n-shot", "arc"), 0, "shots of s is 0, of teacher 5 (arc)"),
        (("config", "limit"), 100, "limit of s is 100, of teacher null"),
        (("config", "random_seed"), 1, "random seed of s is 1, of teacher 0"),
        (("config", "fewshot_seed"), 1, "few-shot seed of s is 1, of teacher 1234"),
        (("chat_template_sha",), "ab12", "chat template of s is ab12, of teacher null"),
        (
            ("n-samples", "piqa", "effective"),
            200,
            "number of samples of s is 200, of teacher 400 (piqa)",
        ),
    ],
)
def test_other_measurements_are_named_with_both_values(path, value, message):
    other = copy.deepcopy(STUDENT)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = compare(TEACHER, {"s": other}, draws=50)
    assert found.warnings == [message] and f"warning: {message}" in found.table()
    with pytest.raises(UserError, match="not comparable: ") as error:
        compare(TEACHER, {"s": other}, strict=True, draws=50)
    assert message in str(error.value)
    # What one side does not state is not known to differ.
    del place[path[-1]]
    assert compare(TEACHER, {"s": other}, strict=True, draws=50).warnings == []


def test_other_documents_and_other_scales_are_named():
    other = copy.deepcopy(STUDENT)
    other["samples"]["arc"][0]["doc_id"] = 1000
    (line,) = differences(scores_of(TEACHER, "teacher"), scores_of(other, "s"))
    assert line == "documents with samples of s is with 1000, of teacher with 0 (arc)"
    found = compare(TEACHER, {"s": other}, draws=50).benchmarks[0]
    assert found.students["s"].basis == "binomial" and found.students["s"].mcnemar is None
    percent = compare({"a": 61.5, "b": 20}, {"s": {"a": 0.6, "b": 0.2}})
    assert percent.warnings == ["best possible score of s is 1, of teacher 100"]


def test_other_metrics_and_directions_are_refused():
    other = {"results": {"arc": {"acc_norm,none": 0.5}}}
    with pytest.raises(UserError, match="task arc: teacher has acc,none, s has acc_norm,none"):
        compare(TEACHER, {"s": other}, tasks=["arc"])
    flipped = copy.deepcopy(STUDENT)
    flipped["higher_is_better"]["arc"]["acc"] = False
    with pytest.raises(UserError, match="arc: teacher: more is better, s: less is better"):
        compare(TEACHER, {"s": flipped})


# ---- controls, chance, groups -------------------------------------------------------------------


def test_control_and_teacher_bound_what_is_recovered():
    found = compare(TEACHER, {"s": STUDENT, "c": CONTROL}, controls=["c"], draws=1000)
    by_task = {b.task: b for b in found.benchmarks}
    assert {t: b.separates for t, b in by_task.items()} == {
        "arc": True,
        "piqa": False,
        "boolq": False,
        "squad": True,
    }
    arc = by_task["arc"]
    assert arc.lead == pytest.approx(0.2) and 0 < arc.lead_interval[0] < 0.2 < arc.lead_interval[1]
    s = arc.students["s"]
    assert s.recovered["c"] == pytest.approx((0.6 - 0.74) / (0.6 - 0.8))
    low, high = s.recovered_interval["c"]
    assert 0.4 < low < 0.7 < high < 0.95
    assert "c" not in by_task["piqa"].students["s"].recovered
    assert "c" not in arc.students["c"].recovered
    everywhere, separating = (g for g in found.groups if g.kind == "accuracy")
    assert separating.tasks == ["arc", "squad"] and everywhere.tasks == list(by_task)
    assert separating.students["s"].alpha_star > everywhere.students["s"].alpha_star == 0
    # Of both benchmarks together: .14 + .3 of .2 + .4.
    assert separating.students["s"].recovered["c"] == pytest.approx(0.44 / 0.6)
    assert everywhere.dominance == [("s", "c")]
    assert "piqa *" in found.table()


def test_several_controls_where_less_is_better():
    """Bits per byte without samples; the second control was trained as the student was."""
    teacher, student, untrained, window = (
        {"results": {"squad": {"bits_per_byte,none": x, "bits_per_byte_stderr,none": 0.01}}}
        for x in (0.5, 0.8, 1.5, 1.0)
    )
    found = compare(
        teacher,
        {"s": student, "untrained": untrained, "window": window},
        controls=["untrained", "window"],
    ).benchmarks[0]
    assert found.kind == "likelihood" and found.separates and found.lead == pytest.approx(1.0)
    s = found.students["s"]
    assert s.basis == "standard error"
    assert s.recovered == {"untrained": pytest.approx(0.7), "window": pytest.approx(0.4)}
    low, high = s.recovered_interval["window"]
    # Bits and perplexities have no sum: each has its share, their group none.
    other = {"wiki": {"word_perplexity,none": 20.0}, "squad": {"bits_per_byte,none": 0.5}}
    more = [
        {"results": {t: {k: v * f for k, v in m.items()} for t, m in other.items()}}
        for f in (1, 1.2, 2)
    ]
    both = compare(more[0], {"s": more[1], "c": more[2]}, controls=["c"])
    assert [b.students["s"].recovered["c"] for b in both.benchmarks] == pytest.approx([0.8, 0.8])
    assert both.groups[0].students["s"].recovered == {}
    # d(ratio) = sqrt(.01^2 + .01^2 (1 - .4)^2 + .01^2 .4^2) / .5, twice that to both sides.
    assert (high - low) / 2 == pytest.approx(1.96 * 0.01 * np.sqrt(1 + 0.36 + 0.16) / 0.5, rel=0.1)


def test_a_teacher_at_chance_is_marked_and_can_be_left_out():
    found = compare(TEACHER, {"s": STUDENT}, draws=1000)
    at_chance = {b.task: b.at_chance for b in found.benchmarks}
    assert at_chance == {"arc": False, "piqa": False, "boolq": True, "squad": False}
    assert "boolq †" in found.table() and found.groups[0].tasks == list(at_chance)
    s = {b.task: b.students["s"] for b in found.benchmarks}
    assert s["arc"].corrected == pytest.approx((0.74 - 0.25) / (0.8 - 0.25))
    dropped = compare(TEACHER, {"s": STUDENT}, drop_chance=True, draws=1000)
    assert dropped.groups[0].tasks == ["arc", "piqa", "squad"]
    assert [b.dropped for b in dropped.benchmarks] == [False, False, True, False]
    nothing = compare(TEACHER, {"s": STUDENT}, tasks=["boolq"], drop_chance=True, draws=1000)
    assert nothing.groups == [] and len(nothing.listings()) == 2
    line = "warning: the teacher is at chance on all benchmarks, which are left out: there is no"
    assert nothing.table().count(line) == 1 and line not in dropped.table()


def test_the_recovery_figure_says_which_ratio_it_shows():
    metrics = {"arc": "acc,none", "piqa": "acc,none", "squad": "bits_per_byte,none"}

    def axis(*tasks: str) -> tuple[str, list[str]]:
        teacher = {"results": {task: {metrics[task]: 0.5} for task in tasks}}
        (axes,) = plots.recovery_bars(compare(teacher, {"s": teacher})).axes
        return axes.get_xlabel(), [label.get_text() for label in axes.get_yticklabels()]

    assert axis("arc", "piqa") == ("student / teacher", ["arc", "piqa"])
    assert axis("squad") == ("teacher / student", ["squad"])
    label, names = axis("arc", "squad")
    assert label == "student / teacher, of ↓ (less is better) teacher / student"
    assert names == ["arc", "squad ↓"]
    told = compare(TEACHER, {"s": STUDENT}, chance={"*": 0, "boolq": "0.3"}, draws=1000)
    assert [b.chance for b in told.benchmarks] == [0, 0, 0.3, 0]
    assert told.benchmarks[2].students["s"].corrected is None
    with pytest.raises(UserError, match="chance: x is not a task where more is better"):
        compare(TEACHER, {"s": STUDENT}, chance={"x": 0.5})


def test_groups_have_their_own_alpha_star():
    groups = {"long": ["sq*", "boolq"], "short": ["arc"]}
    found = compare(TEACHER, {"s": STUDENT}, groups=groups, draws=50)
    assert [(g.name, g.tasks) for g in found.groups[1:]] == [
        ("long", ["boolq", "squad"]),
        ("short", ["arc"]),
    ]
    assert found.alpha_star(name="short") == {"s": pytest.approx(1 - 0.74 / 0.8)}
    assert found.groups[1].title == "accuracy, long, all 2"
    with pytest.raises(UserError, match="group g: x is not a task"):
        compare(TEACHER, {"s": STUDENT}, groups={"g": ["x"]})
    mixed = copy.deepcopy(TEACHER)
    mixed["configs"]["squad"]["output_type"] = "generate_until"
    own = compare(mixed, {"s": STUDENT}, draws=50)
    assert [g.name for g in own.groups] == ["", "understanding", "generation"]


# ---- uncertainty --------------------------------------------------------------------------------


def test_noise_of_samples_is_smaller_than_that_of_aggregates_and_said_so():
    paired = compare(TEACHER, {"s": STUDENT}, margin="0.1", draws=1000)
    alone = compare(aggregates(TEACHER), {"s": aggregates(STUDENT)}, margin="0.1", draws=1000)
    for a, b in zip(paired.benchmarks, alone.benchmarks, strict=True):
        p, q = a.students["s"], b.students["s"]
        assert (p.basis, q.basis) == ("paired", "binomial")
        assert p.recovery == q.recovery and p.detectable < q.detectable
        assert p.recovery_interval[0] > q.recovery_interval[0]
        assert p.mcnemar is not None and q.mcnemar is None
    arc = paired.benchmarks[0].students["s"]
    assert arc.mcnemar < 0.05 and arc.recovery_interval[1] < 1
    piqa = paired.benchmarks[1].students["s"]
    assert piqa.non_inferior is True and arc.non_inferior is False
    star = paired.groups[0].students["s"]
    assert star.alpha_star_interval[0] <= star.alpha_star <= star.alpha_star_interval[1]
    assert 0.3 < star.lossless_probability < 1
    assert "paired, 400 units" in paired.table() and "binomial" in alone.table()
    assert "detectable: " in alone.table()
    # The binomial detectable difference: 2.8 standard errors of two independent shares.
    error = np.sqrt(0.8 * 0.2 / N + 0.74 * 0.26 / N)
    assert alone.benchmarks[0].students["s"].detectable == pytest.approx(2.8 * error, rel=0.1)


def test_scores_alone_have_no_noise_and_the_tables_say_so():
    found = compare({"a": 0.5, "b": 0.4}, {"s": {"a": 0.4, "b": 0.4}}, margin=0)
    assert found.table().count("no noise is known of teacher and student both") == 3
    s = found.benchmarks[0].students["s"]
    assert s.basis is s.recovery_interval is s.detectable is s.non_inferior is None
    assert found.groups[0].students["s"].alpha_star_interval is None


def test_ratios_that_may_not_exist_have_no_interval():
    teacher, student = results(0, a=0.005), results(1, a=0.0)
    found = compare(teacher, {"s": student}).benchmarks[0].students["s"]
    assert found.recovery == 0  # two right answers of 400 and none: next to nothing is known
    assert found.recovery_interval[0] == 0 and found.recovery_interval[1] > 1
    nothing = compare(results(0, a=0.0), {"s": student}, draws=50).benchmarks[0].students["s"]
    assert nothing.recovery is None and nothing.recovery_interval is None


def test_a_part_of_the_documents_and_few_of_them_are_marked():
    teacher, student = copy.deepcopy(TEACHER), copy.deepcopy(STUDENT)
    for r in (teacher, student):
        r["samples"]["arc"] = r["samples"]["arc"][:8]
        r["results"]["arc"]["acc,none"] = float(np.mean([s["acc"] for s in r["samples"]["arc"]]))
        r["n-samples"]["arc"]["effective"] = 8
    found = compare(teacher, {"s": student}, draws=50)
    assert found.benchmarks[0].documents == "8 of 400"
    assert "fewer than 30 units, intervals are rough: arc" in found.remarks()
    assert "measured on a part of the documents: arc" in found.remarks()


def test_the_same_bits_whatever_the_order_of_tasks():
    found = compare(TEACHER, {"s": STUDENT}, draws=200)
    assert found == compare(TEACHER, {"s": STUDENT}, draws=200)
    back = {**TEACHER, "results": dict(reversed(TEACHER["results"].items()))}
    other = compare(back, {"s": STUDENT}, draws=200)
    assert {b.task: b for b in other.benchmarks} == {b.task: b for b in found.benchmarks}
    assert compare(TEACHER, {"s": STUDENT}, draws=200, seed=1) != found


# ---- files and arguments ------------------------------------------------------------------------


def test_written_files(tmp_path):
    for name, r in (("teacher", TEACHER), ("s", STUDENT), ("c", CONTROL)):
        write_results(r, tmp_path / f"results_{name}.json")
    files = {name: tmp_path / f"results_{name}.json" for name in ("s", "c")}
    found = compare(
        tmp_path / "results_teacher.json",
        files,
        controls=["c"],
        groups={"a/b c": ["arc", "squad"]},
        margin="0.05",
        out=tmp_path / "out",
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "comparison.json",
        "comparison.csv",
        "recovery.svg",
        "win_and_tie_accuracy.svg",
        "win_and_tie_accuracy_separating.svg",
        "win_and_tie_accuracy_a_b_c.svg",
        "win_and_tie_accuracy_a_b_c_separating.svg",
    }
    plain = json.loads((tmp_path / "out/comparison.json").read_text())
    assert plain == json.loads(found.model_dump_json()) and plain["margin"] == 0.05
    header = (tmp_path / "out/comparison.csv").read_text().splitlines()[0].split(",")
    assert header[:6] == ["task", "metric", "samples", "teacher", "s", "c"]
    assert len(header) == len(set(header)) and "s recovered from c high" in header
    # What was written can be compared again.
    table = tmp_path / "out/comparison.csv"
    again = win_and_tie(f"{table}:teacher", {"s": f"{table}:s"})
    assert again.alpha_star["s"] == found.alpha_star()["s"]


def test_no_group_takes_the_file_of_another(tmp_path):
    groups = {"a b": ["arc"], "a_b": ["squad"], "A-b": ["arc", "squad"], "separating": ["arc"]}
    students = {"s": STUDENT, "c": CONTROL}
    found = compare(TEACHER, students, controls=["c"], groups=groups, draws=50)
    figures = found.figures()
    assert len(figures) == len(found.groups) + 1 == len({name.lower() for name in figures})
    assert {f"win_and_tie_accuracy_separating{more}" for more in ("", "_2")} <= set(figures)
    assert figures["win_and_tie_accuracy_a_b_2"][0] == "Win-and-Tie, accuracy, a_b, all 1"
    found.write(tmp_path)
    assert {p.stem for p in tmp_path.glob("*.svg")} == set(figures)


@pytest.mark.parametrize("names", [("metric",), ("says nothing",), ("s", "s recovery")])
def test_a_student_with_the_name_of_a_column_is_refused(tmp_path, names):
    found = compare(TEACHER, dict.fromkeys(names, STUDENT), draws=50)
    with pytest.raises(UserError, match=f"two columns of the CSV are named '{names[-1]}'; rename"):
        found.write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controls": ["x"]}, "control 'x' is not among the students"),
        ({"students": {}}, "no students"),
        ({"students": {"teacher": {"a": 1}}}, "cannot be named 'teacher'"),
        ({"margin": 1}, "margin is 1, expected 0 or more and less than 1"),
        ({"margin": "x"}, "margin is 'x', expected a number"),
        ({"teacher": {}}, "teacher: no tasks"),
    ],
)
def test_bad_arguments(change, message):
    arguments: dict[str, Any] = {"teacher": {"a": 1}, "students": {"s": {"a": 1}}}
    arguments.update(change)
    with pytest.raises(UserError, match=message):
        compare(arguments.pop("teacher"), arguments.pop("students"), **arguments)


def test_the_command(tmp_path, capsys):
    table = tmp_path / "scores.csv"
    table.write_text("task,samples,t,s,c\narc,400,80,74,60\npiqa,400,70,71,70\n")
    arguments = ["compare", "--teacher", f"{table}:t", "--out", str(tmp_path / "out")]
    arguments += [x for name in "sc" for x in ("--student", f"{name}={table}:{name}")]
    arguments += ["--control", "c", "--group", "hard=arc", "--chance", "*=25", "--margin", "0.1"]
    assert main([*arguments, "--strict"]) == 0
    printed = capsys.readouterr().out
    assert "arc" in printed and "piqa *" in printed and "not inferior, margin 0.1" in printed
    assert main([*arguments, "--json", "--tasks", "arc", "--tasks", "p*,none"]) == 1
    assert "has no results for task none" in capsys.readouterr().err
    assert main([*arguments, "--json", "--tasks", "arc", "--tasks", "p*"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [b["task"] for b in found["benchmarks"]] == ["arc", "piqa"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "scores.csv:t" in page and "piqa *" in page
    # Curves over all, the separating and the group (which separates), and the bars.
    assert page.count("<svg") == 5
    assert [g["name"] for g in found["groups"]] == ["", "", "hard", "hard"]
    assert found["benchmarks"][0]["students"]["s"]["recovered"]["c"] == pytest.approx(0.7)
    # Other shots: a warning, and with --strict an error.
    other = tmp_path / "teacher.json"
    other.write_text(json.dumps(aggregates(TEACHER)))
    student = tmp_path / "s.json"
    student.write_text(json.dumps({**aggregates(STUDENT), "n-shot": {"arc": 0}}))
    arguments = ["compare", "--teacher", str(other), "--student", f"s={student}", "--out", "x"]
    assert main([*arguments, "--strict"]) == 1
    assert "not comparable: shots of s" in capsys.readouterr().err


def test_a_student_and_a_control_that_were_measured_otherwise_are_told_of(tmp_path):
    """Also where the teacher, here a table of scores, states nothing."""
    part = copy.deepcopy(STUDENT)
    part["config"] = {**part.get("config", {}), "limit": 50}
    whole = copy.deepcopy(STUDENT)
    whole["config"] = {**whole.get("config", {}), "limit": None}
    teacher = {task: 0.9 for task in STUDENT["results"]}
    found = compare(teacher, {"s": whole, "c": part}, controls=["c"])
    assert any("limit of s is null, of c 50" in w for w in found.warnings)
    assert not compare(teacher, {"s": whole, "c": whole}, controls=["c"]).warnings
    with pytest.raises(UserError, match="not comparable: limit of s is null, of c 50"):
        compare(teacher, {"s": whole, "c": part}, controls=["c"], strict=True)


def test_a_metric_that_no_task_has_is_refused_and_tasks_without_it_are_named():
    with pytest.raises(UserError, match="no task has a metric bogus"):
        compare(TEACHER, {"s": STUDENT}, metrics=["bogus"])
    with pytest.raises(UserError, match="seed is -1, expected at least 0"):
        compare(TEACHER, {"s": STUDENT}, seed=-1)
    teacher, student = copy.deepcopy(TEACHER), copy.deepcopy(STUDENT)
    for one, score in ((teacher, 0.5), (student, 0.6)):
        one["results"]["squad"] = {"bits_per_byte,none": score}
        one["higher_is_better"]["squad"] = {"bits_per_byte": False}
        del one["samples"]["squad"]
    notes = compare(teacher, {"s": student}, metrics=["acc"]).notes
    assert "s lacks acc in some tasks: squad by bits_per_byte,none" in notes
