"""MMLU from small Arrow files: prompts, groups, how they count, and what is wrong with a file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks import Bigram

from xlstm_distill import packages
from xlstm_distill.commands import _indented
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import (
    compare,
    evaluate,
    load_task,
    questions,
    read_results,
    write_results,
)
from xlstm_distill.evaluate.mmlu import GROUPS, SUBJECTS, VARIANTS, tasks_in
from xlstm_distill.evaluate.names import expand_tasks

FILE = "data-00000-of-00001.arrow"
HISTORY = "high_school_us_history"
LAW = "international_law"
ANATOMY = "mmlu_anatomy"

Row = dict[str, Any]


def row(n: int, subject: str, question: str = "") -> Row:
    choices = [f"{word} {n}" for word in (" one", "two two ", "three", "four")]
    question = question or f" What is {n} in {subject}? "
    return {"question": question, "subject": subject, "choices": choices, "answer": n % 4}


def write_rows(folder: Path, rows: list[Row]) -> None:
    """As the datasets library writes it: a stream, here of batches of two rows."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(folder / FILE), table.schema) as sink:
        sink.write_table(table, max_chunksize=2)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """All subjects, with 4 questions the first, 5 the second and so on, up to 8."""
    root = tmp_path / "requests"
    for index, subject in enumerate(SUBJECTS.values()):
        asked = [row(n, subject) for n in range(4 + index % 5)]
        if subject == HISTORY:
            opening = "This question refers to the following information.\n"
            for n, one in enumerate(asked):
                one["question"] = f"{opening}Passage {n // 2},\nin two lines.\nWho was {n}?"
        write_rows(root / "mmlu" / subject / "test", asked)
        examples = [row(n, subject, f"Example {n}?") for n in range(6)]
        write_rows(root / "mmlu" / subject / "dev", examples)
    return root


# ---- documents ----------------------------------------------------------------------------------


def test_answers_are_scored_behind_five_examples_in_order(requests):
    task = load_task(ANATOMY, requests)
    assert (task.name, task.kind, task.shots) == (ANATOMY, "choice", 5)
    document = task.documents[1]
    assert document.pairs[2] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Question: Example 0?\nAnswer: one 0\n\n"
        "Question: Example 1?\nAnswer: two two  1\n\n"
        "Question: Example 2?\nAnswer: three 2\n\n"
        "Question: Example 3?\nAnswer: four 3\n\n"
        "Question: Example 4?\nAnswer: one 4\n\n"
        "Question: What is 1 in anatomy?\nAnswer:",
        " three 1",
    )
    assert document.choices == ("one 1", "two two  1", "three 1", "four 1")
    assert (document.doc_id, document.native_id, document.gold) == (1, "anatomy/test/1", 1)


def test_letters_are_scored_with_the_choices_in_the_prompt(requests):
    task = load_task(f"mmlu_{LAW}:mc_5shot", requests)
    assert (task.name, task.kind, task.shots) == (f"mmlu_{LAW}:mc_5shot", "label", 5)
    context = task.documents[0].pairs[0][0]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about international law.\n\n"
        "Question: Example 0?\n A. one 0\n B. two two  0\n C. three 0\n D. four 0\nAnswer: A\n\n"
        "Question: Example 1?\n"
    )
    assert context.endswith(
        "\nAnswer: A\n\nQuestion: What is 0 in international_law?\n"
        " A. one 0\n B. two two  0\n C. three 0\n D. four 0\nAnswer:"
    )
    assert task.documents[0].choices == ("A", "B", "C", "D")


def test_without_examples_the_prompt_is_the_question(requests):
    shutil.rmtree(requests / "mmlu/anatomy/dev")
    for variant, kind in (("rc_0shot", "choice"), ("mc_0shot", "label")):
        task = load_task(f"{ANATOMY}:{variant}", requests)
        assert (task.kind, task.shots) == (kind, 0)
        assert (
            task.documents[2]
            .pairs[0][0]
            .startswith(
                "The following are multiple choice questions (with answers) about anatomy.\n\n"
                "Question: What is 2 in anatomy?\n"
            )
        )


def test_the_same_answers_in_every_document_are_no_labels(requests):
    same = [{**row(n, "moral_scenarios"), "choices": ["a", "bb", "ccc", "dddd"]} for n in range(3)]
    write_rows(requests / "mmlu/moral_scenarios/test", same)
    assert load_task("mmlu_moral_scenarios", requests).kind == "choice"


def test_questions_on_one_passage_share_it(requests):
    documents = load_task(f"mmlu_{HISTORY}", requests).documents
    assert documents[1].fields["passage"] == "Passage 0,\nin two lines."
    assert documents[1].fields["question"] == "Who was 1?"
    assert "Question: This question refers to" in documents[1].pairs[0][0]
    out = evaluate(Bigram(1), [f"mmlu_{HISTORY}", ANATOMY], requests=requests)
    passages = [sample["passage"] for sample in out["samples"][f"mmlu_{HISTORY}"]]
    assert passages[0] == passages[1] != passages[2] == passages[3]
    assert "passage" not in out["samples"][ANATOMY][0]
    asked = questions(f"mmlu_{HISTORY}", requests)[0]
    assert asked == "Passage 0,\nin two lines. Who was 0? one 0 two two  0 three 0 four 0"


def test_the_hash_is_that_of_the_files_that_were_used(requests):
    def found(variant: str) -> str:
        return load_task(f"{ANATOMY}:{variant}", requests).config["task_hash"]

    before = {variant: found(variant) for variant in VARIANTS}
    assert before["rc_5shot"] == before["mc_5shot"] != before["rc_0shot"] == before["mc_0shot"]
    write_rows(requests / "mmlu/anatomy/dev", [row(n, "anatomy", "Other?") for n in range(5)])
    assert found("rc_5shot") != before["rc_5shot"] and found("rc_0shot") == before["rc_0shot"]


# ---- groups -------------------------------------------------------------------------------------


def test_categories_hold_every_subject_once():
    assert GROUPS["mmlu"] == ("mmlu_stem", "mmlu_humanities", "mmlu_social_sciences", "mmlu_other")
    assert tasks_in("mmlu") == list(SUBJECTS) and len(set(SUBJECTS)) == 57
    # Sizes and samples of the paper's table of tasks.
    assert [len(GROUPS[category]) for category in GROUPS["mmlu"]] == [18, 13, 12, 14]
    for subject, category in (
        ("machine_learning", "stem"),
        ("moral_scenarios", "humanities"),
        ("econometrics", "social_sciences"),
        ("global_facts", "other"),
    ):
        assert f"mmlu_{subject}" in GROUPS[f"mmlu_{category}"]


@pytest.mark.parametrize("variant", ["", ":mc_5shot"])
def test_a_group_has_the_mean_over_all_documents(requests, variant):
    out = evaluate(Bigram(1), [f"mmlu{variant}"], requests=requests)
    categories = [f"{category}{variant}" for category in GROUPS["mmlu"]]
    assert out["group_subtasks"] == {
        f"mmlu{variant}": categories,
        **{f"{c}{variant}": [f"{task}{variant}" for task in GROUPS[c]] for c in GROUPS["mmlu"]},
    }
    assert set(out["samples"]) == {f"{task}{variant}" for task in SUBJECTS}
    metrics = ("acc",) if variant else ("acc", "acc_norm")
    for group, within in (
        (f"mmlu{variant}", list(SUBJECTS)),
        (categories[1], GROUPS["mmlu_humanities"]),
    ):
        samples = [sample for task in within for sample in out["samples"][f"{task}{variant}"]]
        for metric in metrics:
            values = [sample[metric] for sample in samples]
            mean, n = np.mean(values), len(values)
            assert out["results"][group][f"{metric},none"] == pytest.approx(mean)
            # Questions on one passage count as one unit.
            units: dict[Any, float] = {}
            for number, sample in enumerate(samples):
                unit = sample.get("passage", number)
                units[unit] = units.get(unit, 0.0) + sample[metric] - mean
            assert len(units) < n or group != f"mmlu{variant}"
            square = sum(total**2 for total in units.values())
            stderr = np.sqrt(len(units) / (len(units) - 1) * square) / n
            assert out["results"][group][f"{metric}_stderr,none"] == pytest.approx(stderr)
        assert out["results"][group]["alias"] == group
        directions = {**dict.fromkeys(metrics, True), "bits_per_byte": False}
        assert out["higher_is_better"][group] == directions
        means = [out["results"][f"{task}{variant}"]["acc,none"] for task in within]
        assert out["results"][group]["acc,none"] != np.mean(means)  # subjects differ in size


def test_only_groups_that_are_named_are_in_results(requests):
    out = evaluate(Bigram(1), ["mmlu_h*", "mmlu_other"], limit=2, requests=requests)
    assert list(out["group_subtasks"]) == ["mmlu_other"]
    assert "mmlu_humanities" not in out["results"] and "mmlu_human_aging" in out["results"]
    assert {n["effective"] for n in out["n-samples"].values()} == {2}
    lines = list(_indented(out))
    at = lines.index((0, "mmlu_other"))
    assert lines[at + 1 :] == [(1, task) for task in GROUPS["mmlu_other"]]
    assert sorted(task for _, task in lines) == sorted(out["results"])
    out = evaluate(Bigram(1), ["mmlu"], limit=1, requests=requests)
    assert [line for line in _indented(out) if line[0] < 2] == [
        (0, "mmlu"),
        *((1, category) for category in GROUPS["mmlu"]),
    ]


def test_compare_counts_a_group_once_and_subjects_one_by_one(requests, tmp_path):
    def written(name: str, seed: int, tasks: list[str]) -> Path:
        path = tmp_path / f"results_{name}.json"
        write_results(evaluate(Bigram(seed), tasks, requests=requests), path)
        return path

    pair = {n: written(n, seed, ["mmlu"]) for seed, n in enumerate(("teacher", "student"))}
    assert read_results(pair["teacher"])["group_subtasks"]["mmlu"] == list(GROUPS["mmlu"])
    found = compare(pair["teacher"], {"student": pair["student"]})
    (benchmark,) = found.benchmarks
    assert benchmark.task == "mmlu"
    assert any("mmlu counts as one benchmark; its 61 subtasks do not" in n for n in found.notes)
    total = sum(4 + index % 5 for index in range(57))
    assert benchmark.samples == total and benchmark.chance == 0.25
    assert not any("samples are not used" in note for note in found.notes)
    chosen = compare(pair["teacher"], {"student": pair["student"]}, tasks=["mmlu_s*"])
    # Sociology and security studies match too, and are in one of the categories that do.
    assert [b.task for b in chosen.benchmarks] == ["mmlu_stem", "mmlu_social_sciences"]
    pair = {n: written(n, seed, ["mmlu_h*"]) for seed, n in enumerate(("teacher", "student"))}
    found = compare(pair["teacher"], {"student": pair["student"]})
    assert [b.task for b in found.benchmarks] == expand_tasks(["mmlu_h*"])


def test_a_group_goes_on_after_a_kill(requests, tmp_path):
    def kill(task: str, done: int, total: int) -> None:
        if task == GROUPS["mmlu_other"][3]:
            raise KeyboardInterrupt

    kept = tmp_path / "unfinished"
    whole = evaluate(Bigram(1), ["mmlu_other"], requests=requests)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Bigram(1), ["mmlu_other"], requests=requests, unfinished=kept, progress=kill)
    assert len(list(kept.iterdir())) == 4
    assert evaluate(Bigram(1), ["mmlu_other"], requests=requests, unfinished=kept) == whole


# ---- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b", "c"]}, r"row 3: choices are \['a', 'b', 'c'\], expected 4 texts"),
        ({"choices": ["a", "b", "c", " "]}, "row 3: choices are .*expected 4 texts"),
        ({"choices": ["a", "b", "c", None]}, "row 3: choices are .*expected 4 texts"),
        ({"choices": None}, "row 3: choices are None, expected 4 texts"),
        ({"answer": 4}, "row 3: answer is 4, expected 0 to 3"),
        ({"answer": -1}, "row 3: answer is -1, expected 0 to 3"),
        ({"answer": None}, "row 3: answer is None, expected 0 to 3"),
        ({"question": " "}, "row 3: question is ' ', expected a text"),
    ],
)
def test_bad_rows_are_named(requests, change, message):
    rows = [row(n, "anatomy") for n in range(5)]
    rows[2] |= change
    write_rows(requests / "mmlu/anatomy/dev", rows)
    with pytest.raises(UserError, match=f"mmlu/anatomy/dev/{FILE}: {message}"):
        load_task(ANATOMY, requests)


def test_bad_files_are_named(requests):
    dev, test = (requests / "mmlu/anatomy" / split / FILE for split in ("dev", "test"))
    write_rows(dev.parent, [row(n, "anatomy") for n in range(4)])
    with pytest.raises(UserError, match=f"dev/{FILE}: holds 4 questions, 5 are needed"):
        load_task(ANATOMY, requests)
    write_rows(test.parent, [{"text": "other"}])
    with pytest.raises(UserError, match=f"test/{FILE}: row 1: question is None"):
        load_task(f"{ANATOMY}:rc_0shot", requests)
    write_rows(test.parent, [row(n, "anatomy") for n in range(3)])
    test.write_bytes(test.read_bytes()[:-400])
    with pytest.raises(UserError, match=f"test/{FILE}: cannot read behind row") as caught:
        load_task(f"{ANATOMY}:rc_0shot", requests)
    assert "\n" not in str(caught.value)
    test.unlink()
    with pytest.raises(UserError, match=f"test/{FILE}: cannot read behind row 0"):
        load_task(f"{ANATOMY}:rc_0shot", requests)
    shutil.rmtree(requests / "mmlu")
    with pytest.raises(UserError, match=r"mmlu/anatomy: no such directory; .* fetch olmes`"):
        load_task(ANATOMY, requests)


def test_pyarrow_is_named_where_it_is_missing(requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'mmlu_anatomy' needs .* pyarrow: .*\[arrow\]"):
        load_task(ANATOMY, requests)


# ---- the data that is fetched -------------------------------------------------------------------


@pytest.mark.real
def test_the_fetched_subjects_are_those_of_the_paper():
    root = packages.fetch("olmes")
    assert sorted(p.name for p in (root / "mmlu").iterdir()) == sorted(SUBJECTS.values())
    loaded = {task: load_task(task, root) for task in SUBJECTS}
    sizes = {task: len(one.documents) for task, one in loaded.items()}
    assert sum(sizes.values()) == 14042 and sizes["mmlu_professional_law"] == 1534
    assert sizes[ANATOMY] == 135
    shared = {}
    for task, one in loaded.items():
        passages = [d.fields["passage"] for d in one.documents if "passage" in d.fields]
        if passages:
            assert len(passages) == sizes[task]
            shared[task] = len(set(passages))
    assert shared == {
        "mmlu_high_school_european_history": 60,
        "mmlu_high_school_us_history": 66,
        "mmlu_high_school_world_history": 75,
    }
    info = json.loads((root / "mmlu/anatomy/test/dataset_info.json").read_text())
    assert info["splits"]["test"]["num_examples"] == sizes[ANATOMY]
