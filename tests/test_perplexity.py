"""Perplexity of text files as a task: windows, samples, results, a kill, comparisons."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from test_tasks import Bigram, Bytes, Killed

from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import compare, evaluate, perplexity, read_results
from xlstm_distill.evaluate.names import check_task, expand_tasks
from xlstm_distill.evaluate.perplexity import rolling

DOCUMENTS = (
    "The river rises in the hills.\n",
    "Bread needs flour, wätér and salt; the oven needs heat. " * 3,
    " one",
    "both of them\nthen the other\n\n",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def nats(model: Bigram, text: str) -> float:
    """-log p of a text behind the end-of-text token; a bigram sees no window's border."""
    ids = [256, *Bytes().encode(text)]
    return -sum(float(np.float32(model.table[a, b])) for a, b in itertools.pairwise(ids))


def test_windows_are_those_of_lm_evaluation_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for n, longest in itertools.product((1, 2, 5, 11, 12, 13, 24, 25, 40), (1, 2, 4, 12, 50)):
        ids = list(range(100, 100 + n))
        theirs = utils.get_rolling_token_windows(ids, 7, longest, 1)
        assert list(rolling(ids, 7, longest)) == list(map(utils.make_disjoint_window, theirs))


@pytest.mark.parametrize("max_length", [None, 9])
def test_metrics_against_a_direct_computation(file, max_length):
    name = f"perplexity:{file}"
    model = Bigram(1)
    out = evaluate(model, [name], max_length=max_length)
    of_text = [nats(model, text) for text in DOCUMENTS]
    size = sum(len(text.encode()) for text in DOCUMENTS)
    words = 7 + 31 + 2 + 7  # what white space separates, also nothing at an end
    result = out["results"][name]
    assert result["bits_per_byte,none"] == pytest.approx(sum(of_text) / size / math.log(2))
    assert result["byte_perplexity,none"] == pytest.approx(math.exp(sum(of_text) / size))
    assert result["word_perplexity,none"] == pytest.approx(math.exp(sum(of_text) / words))
    assert all(result[f"{m}_stderr,none"] > 0 for m in out["higher_is_better"][name])
    assert set(out["higher_is_better"][name].values()) == {False}
    assert out["configs"][name]["output_type"] == "loglikelihood_rolling"
    assert out["n-samples"][name] == {"original": 4, "effective": 4}
    assert out["config"]["max_length"] == max_length
    samples = out["samples"][name]
    assert [s["loglikelihood"] for s in samples] == pytest.approx([-x for x in of_text])
    assert [s["native_id"] for s in samples] == [f"held_out.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert samples[2]["tokens"] == 4 and samples[2]["bytes"] == 4


def test_what_lm_evaluation_harness_finds_of_the_same_documents(file):
    """Its own aggregation of our samples."""
    metrics = pytest.importorskip("lm_eval.api.metrics")
    name = f"perplexity:{file}"
    out = evaluate(Bigram(1), [name])
    samples, result = out["samples"][name], out["results"][name]
    for metric in ("word_perplexity", "byte_perplexity"):
        pairs = [tuple(sample[metric]) for sample in samples]
        assert result[f"{metric},none"] == pytest.approx(metrics.weighted_perplexity(pairs))
    pairs = [(sample["loglikelihood"], sample["bytes"]) for sample in samples]
    assert result["bits_per_byte,none"] == pytest.approx(metrics.bits_per_byte(pairs))
    assert "word_perplexity" in pytest.importorskip("lm_eval.utils").make_table(out)


def test_a_long_document_goes_on_where_a_kill_stopped(file, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "_TOKENS_TOGETHER", 20)
    name = f"perplexity:{file}"
    whole = evaluate(Bigram(1), [name], max_length=10)

    options = {"max_length": 10, "unfinished": tmp_path / "unfinished"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(1, calls=5), [name], **options)  # in the second document
    shown = []
    again = evaluate(Bigram(1), [name], **options, progress=lambda *now: shown.append(now))
    assert again == whole
    assert shown[0][1] > 4 and shown[-1][1] == shown[-1][2] == shown[0][2]
    file.write_text(json.dumps({"text": "another"}))
    with pytest.raises(UserError, match="holds samples found with request_set"):
        evaluate(Bigram(1), [name], **options)


def test_a_limit_takes_some_documents(file):
    name = f"perplexity:{file}"
    out = evaluate(Bigram(1), [name], limit=2)
    assert out["n-samples"][name] == {"original": 4, "effective": 2}
    whole = {s["doc_id"]: s for s in evaluate(Bigram(1), [name])["samples"][name]}
    assert all(s == whole[s["doc_id"]] for s in out["samples"][name])


def test_models_are_compared_in_pairs_and_other_text_is_told(file):
    name = f"perplexity:{file}"
    teacher, student = (evaluate(Bigram(seed), [name]) for seed in (1, 2))
    found = compare(teacher, {"s": student}).benchmarks[0]
    assert (found.kind, found.metric, found.units) == ("likelihood", "bits_per_byte,none", 4)
    assert found.students["s"].basis == "paired" and found.students["s"].recovery_interval
    by_word = compare(teacher, {"s": student}, metrics=["word_perplexity"]).benchmarks[0]
    assert by_word.students["s"].basis == "paired" and by_word.teacher > 100
    file.write_text(file.read_text().replace("river", "water"))
    other = evaluate(Bigram(2), [name])
    assert "request set of s is" in compare(teacher, {"s": other}).warnings[0]
    with pytest.raises(UserError, match="not comparable: request set of s"):
        compare(teacher, {"s": other}, strict=True)
    shorter = evaluate(Bigram(2), [name], max_length=5)
    shorter["configs"] = student["configs"]
    alike = {**teacher, "config": {**teacher["config"], "max_length": 9}}
    assert "longest input of s is 5, of teacher 9" in compare(alike, {"s": shorter}).warnings


def test_one_document_has_a_score_and_no_noise(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text(DOCUMENTS[1])
    name = f"perplexity:{file}"
    teacher, student = (evaluate(Bigram(seed), [name]) for seed in (1, 2))
    assert teacher["results"][name]["bits_per_byte_stderr,none"] == "N/A"
    found = compare(teacher, {"s": student})
    s = found.benchmarks[0].students["s"]
    assert s.recovery is not None and s.recovery_interval is s.detectable is None
    curve = found.groups[0].students["s"]
    assert curve.alpha_star_interval is curve.lossless_probability is None
    assert "(no number of samples, or a single one)" in found.table()


def test_names_of_texts(file):
    name = f"perplexity:{file}"
    assert expand_tasks([name, name, "squad"]) == [name, "squad"]
    with pytest.raises(UserError, match=r"'perplexity:': expected a file or a directory, as in"):
        expand_tasks(["perplexity:"])
    with pytest.raises(UserError, match=r"none.txt: no such file or directory"):
        evaluate(Bigram(1), ["perplexity:none.txt"])
    with pytest.raises(UserError, match=r"text is no task of a recipe; use `xlstm-distill eval"):
        check_task(name)
    with pytest.raises(UserError, match="max_length is 0"):
        evaluate(Bigram(1), [name], max_length=0)
    file.write_text('{"title": "no text"}\n')
    with pytest.raises(UserError, match=r"held_out.jsonl:1: needs the field text"):
        evaluate(Bigram(1), [name])


@pytest.mark.parametrize("bos", [False, True])
def test_a_chat_that_brings_its_start_has_it_once(tmp_path, bos):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))

    class Chat(Bytes):
        bos_id = 0 if bos else None
        adds_bos = bos

        def apply_chat_template(self, messages, add_generation_prompt=True, tools=None):
            return "\0" + messages[0]["content"]

    tokenizer = Chat()
    (document,) = perplexity.texts(f"perplexity:{path}", tokenizer).documents
    (window,) = perplexity.windows_of(tokenizer, [document], None)
    start = 0 if bos else 256
    assert window.context == [start] and window.rest == ([] if bos else [0]) + list(b"hi")


def test_the_command_writes_results_of_files_and_directories(file, tmp_path, capsys):
    tiny_run.teacher().save(tmp_path / "m")
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, text in enumerate(DOCUMENTS[:2]):
        (folder / f"{n}.txt").write_text(text)
    out = tmp_path / "results_m.json"
    tasks = f"perplexity:{file},perplexity:{folder}"
    command = ["evaluate", str(tmp_path / "m"), "--tasks", tasks, "--max-length", "16"]
    assert main([*command, "--out", str(out)]) == 0
    assert "word_perplexity" in capsys.readouterr().out and not list(tmp_path.glob("*.unfinished"))
    found = read_results(out)
    assert found["config"]["max_length"] == 16
    first, second = found["samples"].values()
    assert [s["loglikelihood"] for s in first[:2]] == [s["loglikelihood"] for s in second]
    assert [s["native_id"] for s in second] == ["0.txt", "1.txt"]
