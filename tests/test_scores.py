"""Scores from mappings, tables and result files: what counts, by which metric, and what is refused.

Files have the form of lm-evaluation-harness 0.4.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.evaluate.results import passage_of
from xlstm_distill.evaluate.scores import exact, scores_of


def metrics(**values: Any) -> dict[str, Any]:
    return {"alias": "x", **{key.replace("__", ","): value for key, value in values.items()}}


MMLU = {
    "results": {
        "arc_easy": metrics(acc__none=0.6, acc_norm__none=0.5, acc_norm_stderr__none=0.05),
        "mmlu": metrics(acc__none=0.4, acc_stderr__none="N/A"),
        "mmlu_stem": metrics(acc__none=0.25),
        "mmlu_algebra": metrics(acc__none=0.25),
        "mmlu_physics": metrics(acc__none=0.25),
        "mmlu_law": metrics(acc__none=0.7),
        "wikitext": metrics(word_perplexity__none=20.0, bits_per_byte__none=0.9),
        "bundle": {" ": " ", "alias": "bundle"},
    },
    "groups": {"mmlu": metrics(acc__none=0.4), "mmlu_stem": metrics(acc__none=0.25)},
    "group_subtasks": {
        "mmlu": ["mmlu_stem", "mmlu_law"],
        "mmlu_stem": ["mmlu_algebra", "mmlu_physics"],
        "bundle": ["arc_easy", "wikitext"],
        "arc_easy": [],
    },
    "higher_is_better": {
        "arc_easy": {"acc": True, "acc_norm": True},
        "mmlu": {"acc": True},
        "wikitext": {"word_perplexity": False, "bits_per_byte": False},
    },
    "n-samples": {
        "mmlu_algebra": {"original": 100, "effective": 50},
        "mmlu_physics": {"original": 50, "effective": 50},
        "mmlu_law": {"original": 50, "effective": 50},
    },
    "configs": {"mmlu_algebra": {"output_type": "multiple_choice", "chance": 0.25}},
}


def test_groups_count_once_and_never_beside_their_subtasks():
    found = scores_of(MMLU, "s")
    assert list(found.tasks) == ["arc_easy", "mmlu", "wikitext"]
    assert found.notes == ("mmlu counts as one benchmark; its 4 subtasks do not",)
    mmlu = found.tasks["mmlu"]
    assert (mmlu.samples, mmlu.available, mmlu.stderr) == (150, 200, None)
    assert mmlu.group == "understanding"
    # Asked for, subtasks count; beside a group of theirs that was asked for too they do not.
    assert list(scores_of(MMLU, "s", tasks=["mmlu_law", "mmlu_a*"]).tasks) == [
        "mmlu_algebra",
        "mmlu_law",
    ]
    assert list(scores_of(MMLU, "s", tasks=["mmlu_*"]).tasks) == ["mmlu_stem", "mmlu_law"]
    with pytest.raises(UserError, match="s: has no results for task gsm8k"):
        scores_of(MMLU, "s", tasks=["gsm8k"])


def test_metric_and_filter():
    tasks = scores_of(MMLU, "s").tasks
    assert tasks["arc_easy"].metric == "acc_norm,none" and tasks["arc_easy"].stderr == 0.05
    assert tasks["wikitext"].metric == "bits_per_byte,none"
    assert tasks["wikitext"].kind == "likelihood" and tasks["mmlu"].kind == "accuracy"
    chosen = scores_of(MMLU, "s", metrics=["acc", "wiki*=word_perplexity,none"]).tasks
    assert chosen["arc_easy"].value == Fraction(3, 5)
    assert chosen["wikitext"].value == 20 and chosen["mmlu"].metric == "acc,none"
    with pytest.raises(UserError, match=r"arc_easy: has no metric f1 \(there: acc,none, acc_norm"):
        scores_of(MMLU, "s", metrics=["arc_easy=f1"])
    gsm8k = metrics(exact_match__strict=0.2, exact_match__flexible=0.3)
    several = {"results": {"gsm8k": gsm8k}}
    with pytest.raises(UserError, match=r"several filters; .* --metric gsm8k=exact_match,strict, "):
        scores_of(several, "s")
    for spec in ("exact_match,flexible", "gsm8k=exact_match,flexible"):
        assert scores_of(several, "s", metrics=[spec]).tasks["gsm8k"].value == Fraction(3, 10)
    unclear = {"results": {"x": metrics(one__none=1.0, two__none=2.0)}}
    with pytest.raises(UserError, match="task x: cannot tell which metric"):
        scores_of(unclear, "s")
    assert scores_of({"results": {"x": metrics(one__none=1.0)}}, "s").tasks["x"].value == 1


def test_higher_is_better_flips_and_null_excludes():
    results = {
        "results": {
            "a": metrics(brier_score__none=0.3),
            "b": metrics(score__none=0.5),
            "c": metrics(acc__none=0.5, odd__none=3),
        },
        "higher_is_better": {"a": {"brier_score": False}, "b": {"score": None}, "c": {"acc": None}},
    }
    found = scores_of(results, "s")
    assert found.tasks["a"].kind == "error" and found.tasks["a"].lower_is_better
    assert found.notes == ("b does not count: its higher_is_better is null",)
    assert found.tasks["c"].metric == "odd,none"
    del results["higher_is_better"]
    assert scores_of(results, "s").tasks["a"].kind == "error"
    results["higher_is_better"] = {"a": {"brier_score": "no"}}
    with pytest.raises(UserError, match="higher_is_better of brier_score is 'no'"):
        scores_of(results, "s")


def test_samples_of_both_forms(tmp_path):
    """Ours; lm-evaluation-harness's, whose lines hold the document, prompts and filters."""
    (tmp_path / "results_2030-01-01.json").write_text(
        json.dumps({"results": {"boolq": metrics(acc__none=0.5), "gsm8k": metrics(em__s=0.25)}})
    )
    rows = [
        {
            "doc_id": i,
            "doc": {"passage": f"p{i // 2}", "question": "?"},
            "arguments": ["long"] * 9,
            "resps": [[[-1.0, True]], [[-2.0, False]]],
            "filtered_resps": [],
            "filter": "none",
            "acc": float(i % 2),
        }
        for i in range(4)
    ]
    both = [
        {"doc_id": i, "doc": {}, "filter": f, "em": float(i == 0) if f == "s" else 1.0}
        for f in ("s", "t")
        for i in range(4)
    ]
    for task, lines in (("boolq", rows), ("gsm8k", both)):
        file = tmp_path / f"samples_{task}_2030-01-01.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = scores_of(tmp_path / "results_2030-01-01.json", "s")
    boolq = found.tasks["boolq"]
    assert boolq.outcomes.units == 2 and boolq.outcomes.score == 0.5
    assert boolq.chance == Fraction(1, 2)
    gsm8k = found.tasks["gsm8k"].outcomes
    assert boolq.samples == 4  # counted, where the results do not say it
    assert gsm8k.score == 0.25 and gsm8k.units == len(gsm8k.documents) == 4
    # Samples of another run are noticed.
    rows[0]["acc"] = 1.0
    results = {"results": {"boolq": metrics(acc__none=0.5)}, "samples": {"boolq": rows}}
    found = scores_of(results, "s")
    assert found.tasks["boolq"].outcomes is None
    assert "samples give 0.75, the results 0.5; the samples are not used" in found.notes[0]


@pytest.mark.parametrize(
    ("metric", "values", "score"),
    [
        ("bits_per_byte", [[-6.931471805599453, 5], [-13.862943611198906, 10]], 2.0),
        ("word_perplexity", [[-1.0, 1], [-3.0, 3]], 2.718281828459045),
        ("perplexity", [-1.0, -3.0], 7.38905609893065),
        ("f1", [0.25, 1], 0.625),
    ],
)
def test_samples_of_every_metric(metric, values, score):
    samples = [{"doc_id": i, metric: value} for i, value in enumerate(values)]
    results = {"results": {"x": {f"{metric},none": score}}, "samples": {"x": samples}}
    assert scores_of(results, "s").tasks["x"].outcomes.score == pytest.approx(score, rel=1e-12)


def test_samples_of_a_group_are_those_of_its_subtasks():
    results = {
        "results": {
            "mmlu": metrics(acc__none=0.75),
            "a": metrics(acc__none=0.5),
            "b": metrics(acc__none=1.0),
        },
        "group_subtasks": {"mmlu": ["a", "b"]},
        "samples": {t: [{"doc_id": i, "acc": i or t == "b"} for i in range(2)] for t in "ab"},
    }
    assert scores_of(results, "s").tasks["mmlu"].outcomes.documents == (
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
    )


def test_what_questions_are_about():
    squad = {"query": "Title: T\nBackground: Text.\nQuestion: Who?\nAnswer:"}
    other = {"query": "Title: T\nBackground: Text.\nQuestion: When?\nAnswer:"}
    assert passage_of(squad) == passage_of(other) is not None
    assert passage_of({"story": "x", "query": "y"}) == passage_of({"story": "x", "query": "z"})
    assert passage_of({"query": "Question: Who?"}) is passage_of({"context": " "}) is None
    jeopardy = {"category": "science", "query": "Category: SCIENCE\nQuestion: This?\nAnswer:"}
    assert passage_of(jeopardy) is None
    assert passage_of({"query": "Category: A\nText of it.\nQuestion: Who?"}) is not None
    papers = [
        {"id": f"{n}", "abstract": f"We {verb}.", "full_text": {"paragraphs": []}, "query": f"{n}?"}
        for n, verb in enumerate(("read", "read", "write"))
    ]
    first, second, other = map(passage_of, papers)
    assert first == second is not None and other not in (first, None)


def test_a_table_says_what_it_knows(tmp_path):
    file = tmp_path / "scores.csv"
    file.write_text(
        "\ufefftask,metric,higher_is_better,samples,chance,group,m,m stderr,n\r\n"
        "arc,acc,,100,25,understanding,61.5,1.5,40\r\n"
        "squad,bits_per_byte,,,,,0.5,,\r\n"
        '"odd, one",,false,,,,3,,2\r\n',
        encoding="utf-8",
    )
    tasks = scores_of(f"{file}:m", "s").tasks
    arc = tasks["arc"]
    assert (arc.value, arc.samples, arc.chance, arc.stderr) == (Fraction(123, 2), 100, 25, 1.5)
    assert (arc.unit, arc.group, arc.kind) == (100, "understanding", "accuracy")
    assert tasks["squad"].kind == tasks["odd, one"].kind == "likelihood"
    assert list(scores_of(file, "n").tasks) == ["arc", "odd, one"]


def table(text: str) -> tuple[str, str]:
    return "x.csv", text


def results(value: Any) -> tuple[str, str]:
    return "x.json", json.dumps({"results": value})


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (("x.json", '{"results": {"a": {"acc,none": 0.5'), "x.json: not valid JSON"),
        (("x.json", ""), "x.json: not valid JSON"),
        (("x.json", "[1, 2]"), "x.json: a JSON object is expected"),
        (("x.json", "[" * 100_000), "x.json: not valid JSON (nested too deeply)"),
        (("x.json", "{}"), "x.json: has no 'results'"),
        (("x.json", '{"results": {"a": {}, "a": {}}}'), "the key 'a' appears twice"),
        (("x.json", '{"results": {"a": {"acc,none": ' + "9" * 5000 + "}}}"), "not valid JSON"),
        (results([1]), "'results' is [1], expected an object"),
        (results({"a": 0.5}), "'a' is 0.5, expected an object"),
        (results({"a": None}), "has no 'a'"),
        (results({"a": {"acc,none": float("nan")}}), "task a: acc,none is nan"),
        (results({"a": {"acc,none": float("inf")}}), "task a: acc,none is inf"),
        (results({"a": {"acc,none": "high"}}), "task a: acc,none is 'high', expected a number"),
        (results({"a": {"acc,none": [0.5]}}), "task a: acc,none is [0.5], expected a number"),
        (results({"a": {"acc,none": True}}), "task a: acc,none is True, expected a number"),
        (results({"a": {"acc,none": -0.5}}), "task a: acc,none is -0.5, below 0"),
        (results({"a": {"acc,none": 10**400}}), "task a: acc,none is out of range"),
        (
            results({"a": {"acc,none": "N/A"}}),
            "task a: acc,none is N/A, no score; measure the task",
        ),
        (results({"a": {"alias": "a"}}), "cannot tell which metric to compare (there: none)"),
        (results({"a": {"acc,none": 0.5, "acc_stderr,none": "x"}}), "acc_stderr is 'x'"),
        (table(""), "x.csv: the first line must name the columns"),
        (table("benchmark,m\na,1\n"), "`task` among them"),
        (table("task,m\na,1\na,2\n"), "line 3: task a appears twice"),
        (table("task,m\na,1,2\n"), "line 2 has 3 cells, the first line 2"),
        (table("task,m\na,much\n"), "the score of a is 'much', expected a number"),
        (table("task,m\na,nan\n"), "the score of a is nan, expected a finite number"),
        (table("task,m\na,-1\n"), "the score of a is -1.0, below 0"),
        (table("task,m\na,1e999999999\n"), "the score of a is '1e999999999', out of range"),
        (table("task,m,m\na,1,2\n"), "two columns have the same name"),
        (table('task,m\n"a,1\n'), "x.csv: not a table"),
        (table("task,samples,m\na,0,1\n"), "samples is 0, expected a number of documents"),
        (table("task,higher_is_better,m\na,maybe,1\n"), "higher_is_better is 'maybe'"),
        (table("task,metric,chance,m\na,nll,1,2\n"), "chance is 1, but less is better in a"),
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path, file, message):
    name, text = file
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        scores_of(tmp_path / name, "s")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert name in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("versions", [1], "'versions' is [1], expected an object"),
        ("n-samples", {"a": {"effective": "all"}}, "n-samples is 'all'"),
        ("group_subtasks", {"a": "b"}, "group_subtasks: a is 'b'"),
        ("higher_is_better", {"a": True}, "'a' is True, expected an object"),
        ("samples", {"a": "b"}, "the samples of a are not a list of objects"),
        ("samples", {"a": [{"acc": 1}]}, "document None is not a name or number"),
        ("samples", {"a": [{"doc_id": 1, "acc": 1}] * 2}, "document 1 appears twice"),
        ("samples", {"a": [{"doc_id": 1, "acc": float("nan")}]}, "document 1: acc is nan"),
        ("configs", {"a": {"chance": "x"}}, "chance is 'x'"),
    ],
)
def test_damaged_parts_of_results_are_named(key, value, message):
    with pytest.raises(UserError) as error:
        scores_of({"results": {"a": {"acc,none": 0.5}}, key: value}, "s")
    assert message in str(error.value)


def test_spaces_around_the_names_of_columns_do_not_count(tmp_path):
    (tmp_path / "x.csv").write_text("task, metric, m\na, acc, 0.5\n")
    score = scores_of(tmp_path / "x.csv", "m").tasks["a"]
    assert (score.value, score.metric) == (Fraction(1, 2), "acc")


def test_groups_that_contain_each_other_end(tmp_path):
    loop = {"a": ["b"], "b": ["a"]}
    entries = {t: metrics(acc__none=0.5) for t in "ab"}
    assert list(scores_of({"results": entries, "group_subtasks": loop}, "s").tasks) == ["a"]


def test_files_that_are_not_there_or_not_text_or_too_large(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot read: No such file"):
        scores_of(tmp_path / "none.json", "s")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"x\.json: not UTF-8 text"):
        scores_of(tmp_path / "x.json", "s")
    with (tmp_path / "x.json").open("wb") as large:
        large.truncate(100 << 20)
    with pytest.raises(UserError, match=r"x\.json: has 100 MiB, more than the 64 MiB"):
        scores_of(tmp_path / "x.json", "s")
    (tmp_path / "y.json").write_text(json.dumps({"results": {"a": {"acc,none": 1}}}))
    for line in ('{"doc_id": 1', "[1]", '{"doc_id": "\ud800'):
        samples = '{"doc_id": 0, "acc": 1}\n' + line + "\n"
        (tmp_path / "samples_y_a.jsonl").write_bytes(samples.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=r"samples_y_a\.jsonl: line \d is not a sample"):
            scores_of(tmp_path / "y.json", "s")


def test_extreme_numbers():
    assert exact("0e-999999999") == 0
    for wrong in ("1e101", "1e-101", "1e-999999999"):
        with pytest.raises(UserError, match="out of range"):
            exact(wrong)
    with pytest.raises(UserError, match="expected a number"):
        exact("1" * 100 + "x")


def test_nothing_is_read_from_outside_the_folder(tmp_path: Path):
    """A task's name cannot point the reader at another folder's samples."""
    (tmp_path / "in").mkdir()
    (tmp_path / "samples_r_a.jsonl").write_text("not read")
    (tmp_path / "in/r.json").write_text(json.dumps({"results": {"../a": {"acc,none": 1}}}))
    assert scores_of(tmp_path / "in/r.json", "s").tasks["../a"].outcomes is None
