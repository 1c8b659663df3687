"""Needles in haystacks: what is asked, how it is scored, the way from the command to the plot."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny_run

from xlstm_distill import plots
from xlstm_distill.cli import main
from xlstm_distill.communicator import ALONE
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import compare, evaluate, needle_grid, write_results
from xlstm_distill.evaluate.generation import Question, Questions, answers, string_match_all
from xlstm_distill.evaluate.needle import TASKS, needle
from xlstm_distill.evaluate.tasks import open_task, read_tokens
from xlstm_distill.evaluate.unfinished import held

TOKENIZER = tiny_run.tokenizer()  # a token a byte
NIAHS = [task for task in TASKS if task != "vt"]


class Reader:
    """Answers as one that sees the last `sees` characters of a prompt; stopped after `batches`."""

    tokenizer = TOKENIZER

    def __init__(self, sees: int = 1 << 30, batches: int = 1 << 30) -> None:
        self.sees, self.batches, self.prompts = sees, batches, 0

    def generate_batch(self, prompts, max_new_tokens, temperature=1.0, ends=None):
        assert temperature == 0
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.prompts += len(prompts)
        texts = [TOKENIZER.decode(ids) for ids in prompts]
        return [TOKENIZER.encode(self.answer(text))[:max_new_tokens] for text in texts]

    def answer(self, text: str) -> str:
        hay = text[-self.sees :]
        if asked := re.search(r"for (\S+) mentioned in the provided text is$", text):
            found = re.search(rf"for {asked[1]} is: (\S+)\.", hay)
            return f" {found[1]}." if found else " unknown."
        value = re.search(r"the value (\d+), they are:$", text)[1]
        names = []
        while found := re.search(rf"VAR (\w+) = {value}", hay):
            names.append(found[1])
            value = f"VAR {found[1]} "
        return " " + " ".join(names)


@pytest.mark.parametrize("task", NIAHS)
def test_the_needle_lies_in_a_haystack_of_the_length_asked_for(task):
    short, long = (needle(f"{task}:{n}", TOKENIZER, limit=5) for n in (2048, 8192))
    for index in range(5):
        few, many = short.question(index), long.question(index)
        assert few == needle(f"{task}:2048", TOKENIZER).question(index)
        # The same needle at every length, elsewhere only by the length of the haystack.
        assert few.targets == many.targets and few.facts["depth"] == many.facts["depth"]
        for question, length in ((few, 2048), (many, 8192)):
            tokens = len(TOKENIZER.encode(question.prompt))
            assert tokens == question.facts["prompt_tokens"] <= length - 128
            # No room for one more line or sentence; the reference's longest has 900 letters.
            assert tokens > length - 128 - 900
            assert question.prompt.count(question.targets[0]) == 1
            at = question.prompt.index(question.targets[0]) / len(question.prompt)
            # The question and, at 2,048, single lines are up to a fifth of the prompt.
            assert abs(at - question.facts["depth"] / 100) < (0.35 if length == 2048 else 0.1)
    assert short.question(0).targets != short.question(1).targets
    other = needle(f"{task}:2048", TOKENIZER, seed=1).question(0)
    assert other.targets != short.question(0).targets


def test_haystacks_are_those_of_the_task():
    def prompt(task):
        return needle(f"{task}:4096", TOKENIZER).question(3).prompt

    assert prompt("niah_single_1").count("The grass is green.") > 20
    assert "Assert statements are a convenient way" in prompt("niah_single_2")
    assert prompt("niah_multikey_1").count("One of the special magic numbers for") == 4
    assert prompt("niah_multikey_2").count("One of the special magic numbers for") > 40
    assert prompt("niah_multikey_3").count("One of the special magic uuids for") > 25
    assert prompt("vt").count("Question: Find all variables") == 2


def test_depths_are_covered_evenly():
    task = needle("niah_single_1:1024", TOKENIZER)
    depths = [task.question(n).facts["depth"] for n in range(40)]
    assert sorted(depths) == [round(100 * n / 39) for n in range(40)]
    assert sorted(min(d // 20, 4) for d in depths[:5]) == [0, 1, 2, 3, 4]


def test_the_score_is_the_share_of_values_found():
    assert string_match_all(" ABC and\x01def.", ["abc", "DEF"]) == 1
    assert string_match_all("abc", ["abc", "def"]) == 0.5
    assert string_match_all("", ["abc"]) == 0


def test_one_that_reads_finds_all_and_one_that_sees_the_end_finds_what_lies_there():
    names = [f"{task}:2048" for task in TASKS]
    found = evaluate(Reader(), names, limit=5)
    assert all(r["string_match_all,none"] == 1 for r in found["results"].values())
    assert found["n-samples"]["vt:2048"] == {"original": 500, "effective": 5}
    assert found["n-shot"] == {name: int(name.startswith("vt")) for name in names}
    assert found["configs"]["niah_single_2:2048"]["output_type"] == "generate_until"
    assert len(found["configs"]["niah_single_2:2048"]["request_set"]) == 64
    near = evaluate(Reader(sees=900), ["niah_single_1:2048", "niah_single_1:4096"], limit=10)
    grid = needle_grid(near["samples"])
    assert list(grid) == ["niah_single_1"] and sorted(grid["niah_single_1"]) == [2048, 4096]
    assert grid["niah_single_1"][4096] == [0, 0, 0, 0, 1]
    for sample in near["samples"]["niah_single_1:2048"]:
        assert sample["string_match_all"] == float(sample["depth"] > 60)
    assert np.isnan(needle_grid({"vt:64": [], "squad": []})["vt"][64]).all()
    plots.needle_grid({**grid, "vt": {2048: [0.5]}}, "near")


def test_an_answer_ends_before_a_stop():
    class Talker(Reader):
        def answer(self, text):
            return "four\n\nQ: five"

    def exact(answer, targets):
        return float(answer == targets[0])

    task = Questions(
        "t",
        1,
        lambda n: Question(n, "two?", ("four",), {}),
        1,
        20,
        "exact_match",
        exact,
        0,
        {},
        ("\n\n",),
    )
    ((sample,),) = answers(Talker(), task, 0, ALONE)
    assert sample["answer"] == "four" and sample["exact_match"] == 1


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path):
    names = ["niah_single_1:4096", "vt:4096"]  # four to a batch
    whole = evaluate(Reader(), names, limit=6)
    place = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Reader(batches=1), names, limit=6, unfinished=place)
    file = place / "niah_single_1_4096.jsonl"
    kept = file.read_text()
    assert len(kept.splitlines()) == 2
    file.write_text(kept + '[{"doc_id": 4, "dep')  # killed while writing
    reader = Reader()
    assert evaluate(reader, names, limit=6, unfinished=place) == whole
    assert reader.prompts == 2 + 6
    assert evaluate(Reader(batches=0), names, limit=6, unfinished=place) == whole
    with pytest.raises(
        UserError, match=r"4096.jsonl: holds samples found with limit 6, now it is 5"
    ):
        evaluate(Reader(), names, limit=5, unfinished=place)
    file.write_text(kept + "{\n")
    with pytest.raises(UserError, match=r"4096.jsonl: damaged"):
        evaluate(Reader(), names, limit=6, unfinished=place)


def test_results_are_compared_by_the_share_found_and_its_samples(tmp_path):
    names = ["niah_single_1:2048", "vt:2048"]
    for name, sees in {"teacher": 1 << 30, "near": 900}.items():
        results = evaluate(Reader(sees), names, limit=10)
        write_results(results, tmp_path / f"results_{name}.json")
    found = compare(tmp_path / "results_teacher.json", {"near": tmp_path / "results_near.json"})
    assert not found.warnings
    assert [b.task for b in found.benchmarks] == names
    for benchmark in found.benchmarks:
        assert benchmark.metric == "string_match_all,none" and benchmark.kind == "accuracy"
        assert benchmark.teacher == 1 and benchmark.samples == 10 and benchmark.available == 500
        near = benchmark.students["near"]
        assert near.basis == "paired" and near.recovery == near.score < 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vt", "expected a length in tokens, as in vt:4096"),
        ("niah_single_1:long", "expected a length"),
        ("niah_single_1:300", "too short; the smallest prompt has"),
        ("niah_*", "expected a length in tokens"),
    ],
)
def test_what_cannot_be_made_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        evaluate(Reader(), [name])


def test_an_estimate_counts_prompts_and_answers():
    name = "niah_single_1:1024"
    task = open_task(name, TOKENIZER)
    prompt = len(TOKENIZER.encode(task.question(0).prompt))
    tokens = read_tokens(TOKENIZER, task, measured=1).of(10)
    assert tokens == 10 * (prompt + 128) <= 10 * 1024


def test_a_haystack_of_the_users(tmp_path):
    file = tmp_path / "hay.txt"
    file.write_text("One two three. Four, five! ----\n=====\nSix?" * 100)
    task = needle("niah_single_2:2048", TOKENIZER, haystack=file)
    assert "One two three. Four, five!" in task.question(0).prompt
    assert "===" not in task.question(0).prompt
    with pytest.raises(UserError, match="niah_single_2:65536: the haystack is too short"):
        needle("niah_single_2:65536", TOKENIZER, haystack=file)
    file.with_name("b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"b.txt: not UTF-8 text"):
        needle("niah_single_2:2048", TOKENIZER, haystack=file.with_name("b.txt"))


def test_the_command_writes_results_samples_and_a_grid(capsys, tmp_path):
    tiny_run.teacher().save(tmp_path / "teacher")
    out = tmp_path / "results_tiny.json"
    suite = ["evaluate", str(tmp_path / "teacher"), "--suite", "needle", "--lengths", "2048"]
    assert main([*suite, "--limit", "1", "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["results"]) == [f"{task}:2048" for task in TASKS]
    assert json.loads(out.read_text())["results"] == printed["results"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"needle_tiny.svg", "samples_tiny_vt_2048.jsonl"} <= names
    assert not any("unfinished" in name for name in names)
    assert main([*suite, "--haystack", str(tmp_path / "no.txt"), "--out", str(out)]) == 1
    assert "no.txt" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == names  # a refusal leaves nothing
    tasks = ["--limit", "1", "--tasks", "vt:2048", "--tasks", "niah_single_1:1024"]
    assert main([*suite[:2], *tasks, "--out", str(out)]) == 0
    shown = capsys.readouterr().err.splitlines()
    names = ("vt:2048 (1 of 2)", "niah_single_1:1024 (2 of 2)")
    assert shown == [f"{name}: {done}/1" for name in names for done in (0, 1)]
    assert main(["evaluate", "m", "--tasks", ",", "--out", "o"]) == 2
    assert "--tasks names no task" in capsys.readouterr().err
    # An empty list is not the long default of a suite.
    assert main([*suite[:4], "--lengths", "", "--out", "o"]) == 2
    assert "expected a length in tokens" in capsys.readouterr().err
    wrong = ["evaluate", "m", "--tasks", "squad", "--lengths", "1", "--out", "o"]
    assert main(wrong) == 2


def test_a_second_command_on_the_same_out_is_refused_while_one_runs(capsys, tmp_path):
    tiny_run.teacher().save(tmp_path / "teacher")
    out = tmp_path / "results_tiny.json"
    command = ["evaluate", str(tmp_path / "teacher"), "--tasks", "niah_single_1:1024"]
    command += ["--limit", "1", "--out", str(out)]
    with held(tmp_path / "results_tiny.unfinished"):
        assert main(command) == 1
    assert "another process is working here" in capsys.readouterr().err
    assert main(command) == 0 and out.is_file()
