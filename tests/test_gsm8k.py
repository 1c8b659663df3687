"""Answers that a model writes: where they end, what counts in them."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiny_run
from test_tasks import request, write_task

from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import evaluate, gsm8k
from xlstm_distill.evaluate.gsm8k import last_number_matches, math_scores

GOLD = [18, 3, 70000, 5]
ANSWERS = [
    " She has 16 - 3 = 13. Then 9 * 2 = $18.\n\nQuestion: How many? 7",
    " So the answer is 4.",
    " In all $70,000 profit.",
    " None.",
]


@pytest.fixture
def requests(tmp_path):
    rows = [
        request(n, 0, f"Question: {n}?\nAnswer:", f" {gold}.", None, short_answer=str(gold))
        for n, gold in enumerate(GOLD)
    ]
    write_task(tmp_path, "gsm8k/gold_bpb_5shot", rows)
    written = {"max_gen_toks": 60, "stop_sequences": ["Question:", "\n\n"]}
    config = {"task_hash": "h", "task_config": {"num_shots": 8, "generation_kwargs": written}}
    (tmp_path / "gsm8k/gold_bpb_5shot/config.json").write_text(json.dumps(config))
    return tmp_path


class Scripted:
    """Writes ANSWERS, a byte a token, until told to stop."""

    tokenizer = tiny_run.tokenizer()

    def generate_batch(self, prompts, max_new_tokens, temperature=1.0, *, ends=None):
        out = []
        for ids in prompts:
            number = int(self.tokenizer.decode(ids).split()[1].removesuffix("?"))
            new = []
            for token in self.tokenizer.encode(ANSWERS[number])[:max_new_tokens]:
                new.append(token)
                if ends(new):
                    break
            out.append(new)
        return out


def test_the_last_number_of_the_answer_counts(requests):
    found = evaluate(Scripted(), ["gsm8k:generate"], requests=requests)
    assert found["results"]["gsm8k:generate"]["exact_match,none"] == 0.5
    samples = found["samples"]["gsm8k:generate"]
    assert [s["exact_match"] for s in samples] == [1, 0, 1, 0]
    assert samples[0]["answer"] == " She has 16 - 3 = 13. Then 9 * 2 = $18."
    assert found["n-shot"] == {"gsm8k:generate": 8}
    assert found["configs"]["gsm8k:generate"]["request_set"] == "h"
    some = evaluate(Scripted(), ["gsm8k:generate"], limit=2, requests=requests)
    assert some["n-samples"]["gsm8k:generate"] == {"original": 4, "effective": 2}


def test_math_verify_stands_beside_it(requests, monkeypatch):
    """With a stand-in that compares the last words as numbers."""
    seconds = []

    def parse(text, parsing_timeout):
        seconds.append(parsing_timeout)
        return [text.rstrip(".").split()[-1].strip("$").replace(",", "")]

    def verify(gold, found, timeout_seconds):
        seconds.append(timeout_seconds)
        return gold == found

    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=parse, verify=verify))
    monkeypatch.setattr(gsm8k, "version", lambda name: f"{name} 1")
    found = evaluate(Scripted(), ["gsm8k:generate"], requests=requests)
    samples = found["samples"]["gsm8k:generate"]
    assert [s["math_verify"] for s in samples] == [1, 0, 0, 0]
    assert [s["exact_match"] for s in samples] == [1, 0, 1, 0]
    assert found["results"]["gsm8k:generate"]["exact_match,none"] == 0.5
    assert found["results"]["gsm8k:generate"]["math_verify,none"] == 0.25
    assert found["configs"]["gsm8k:generate"]["math_verify"] == "math-verify 1"
    assert len(seconds) == 12 and set(seconds) == {5}
    # Its time-outs are signals, which Python allows in the main thread alone.
    del seconds[:]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(math_scores()["math_verify"], "is 18.", ["18"]).result() == 1
    assert seconds == [None] * 3


def test_without_math_verify_nothing_changes(requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    found = evaluate(Scripted(), ["gsm8k:generate"], requests=requests)
    assert "math_verify" not in json.dumps(found)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("is $18.00.", "18", 1),
        ("is \\boxed{18}", "18", 1),
        ("36/2", "18", 1),
        ("In all $70,000 profit.", "70000", 1),
        ("5 of 6", "5", 0),
        ("none", "5", 0),
        ("", "5", 0),
    ],
)
def test_what_math_verify_finds_equal(answer, gold, right):
    pytest.importorskip("math_verify")
    equal = math_scores()["math_verify"]
    assert equal(answer, [gold]) == right
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(equal, answer, [gold]).result() == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("is 18.", "18", 1),
        ("is 18.00", "18", 0),
        ("-3 or -4", "-4", 1),
        ("1,234 and $1,235.", "1235", 1),
        ("5 of 6", "5", 0),
        ("none", "5", 0),
        ("x = 7", "7", 1),
    ],
)
def test_the_rule(answer, gold, right):
    assert last_number_matches(answer, [gold]) == right


def test_a_set_without_settings_is_refused(requests):
    (requests / "gsm8k/gold_bpb_5shot/config.json").unlink()
    with pytest.raises(UserError, match="lacks 'task_config'"):
        evaluate(Scripted(), ["gsm8k:generate"], requests=requests)


def test_rows_end_by_themselves():
    model = tiny_run.teacher()
    prompts = [[5, 6, 7], [9, 10], [20]]
    whole = model.generate_batch(prompts, 30, 1.0, seed=2, stop_ids=())
    cut = model.generate_batch(
        prompts, 30, 1.0, seed=2, stop_ids=(), ends=lambda ids: ids[-1] > 180
    )
    for long, short in zip(whole, cut, strict=True):
        stops = [n for n, token in enumerate(long) if token > 180]
        assert short == (long[: stops[0] + 1] if stops else long)
    assert cut != whole
