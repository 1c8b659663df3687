"""Request sets, scoring and fidelity, against a bigram model small enough to check by hand."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from models import random_model
from tolerances import PREFILL_STEP_F32

from xlstm_distill import commands, packages
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import (
    compare,
    evaluate,
    fidelity,
    load_task,
    paired_bootstrap,
    passages,
    read_results,
    tasks,
    write_results,
)
from xlstm_distill.evaluate.fidelity import BUCKETS, windows_of
from xlstm_distill.evaluate.tasks import encode_pair
from xlstm_distill.testing import assert_close


class Bytes:
    """One token per UTF-8 byte; "th" at any place is one token, so that borders can merge."""

    bos_id: int | None = None
    adds_bos = False
    eos_ids = (256,)
    merged = 257

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids: list[int] = []
        for byte in text.encode():
            if ids and ids[-1] == ord("t") and byte == ord("h"):
                ids[-1] = self.merged
            else:
                ids.append(byte)
        return ids


class Bigram:
    """p(next | current) from a table; its "hidden state" is the row of log-probabilities."""

    vocabulary = 258

    def __init__(self, seed: int, sharpness: float = 1.0) -> None:
        z = sharpness * np.random.default_rng(seed).normal(size=(self.vocabulary, self.vocabulary))
        self.table = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        self.tokenizer: Any = Bytes()
        self.divergence_calls = self.tokens = 0

    def toward(self, other: Bigram, share: float) -> Bigram:
        """A model between this one (0) and `other` (1)."""
        mixed = Bigram(0)
        z = (1 - share) * self.table + share * other.table
        mixed.table = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        return mixed

    def scorer(self, prefix):
        return lambda requests: [
            [self.scored(prefix, context, c) for c in continuations]
            for context, continuations in requests
        ]

    def scored(self, prefix, context, continuation):
        ids = [context[-1], *continuation]
        return self.table[ids[:-1], ids[1:]].astype(np.float32)

    def divergence(self, students, ids):
        self.divergence_calls += 1
        ids = np.asarray(ids)
        following = np.roll(ids, -1, axis=1)[..., None]
        theirs = self.table[ids]
        out = {"kl": [], "agree": [], "nll": []}
        for student in students:
            student.tokens += ids.size
            mine = student.table[ids]
            out["kl"].append((np.exp(theirs) * (theirs - mine)).sum(-1))
            out["agree"].append((theirs.argmax(-1) == mine.argmax(-1)).astype(np.float32))
            out["nll"].append(-np.take_along_axis(mine, following, -1)[..., 0])
        out["teacher_nll"] = -np.take_along_axis(theirs, following, -1)[..., 0]
        out = {name: np.array(values) for name, values in out.items()}
        for name in ("nll", "teacher_nll"):
            out[name][..., -1] = 0
        return out


class Killed(Bigram):
    """A Bigram that scores so many batches of requests, and then is killed."""

    def __init__(self, seed: int, calls: int) -> None:
        super().__init__(seed)
        self.calls = calls

    def scorer(self, prefix):
        scorer = super().scorer(prefix)

        def until_the_kill(requests):
            if self.calls == 0:
                raise KeyboardInterrupt
            self.calls -= 1
            return scorer(requests)

        return until_the_kill


def request(doc_id: int, idx: int, context: str, continuation: str, label: Any, **doc: Any):
    return {
        "request_type": "loglikelihood",
        "doc": doc,
        "request": {"context": context, "continuation": continuation},
        "idx": idx,
        "doc_id": doc_id,
        "native_id": f"n{doc_id}",
        "label": label,
    }


def write_task(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    config = {"task_hash": "abc", "task_config": {"num_shots": 5}}
    (folder / "config.json").write_text(json.dumps(config))


WORDS = ("alpha", "be", "gamma ray", "delta", "of", "ether", "zeta zeta", "eta")


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    root = tmp_path / "requests"
    rows = []
    for d in range(40):
        choices = [WORDS[(d + j) % len(WORDS)] + str(d) for j in range(3)]
        # Written out of order: idx says which choice a row is.
        for j in (2, 0, 1):
            rows.append(request(d, j, f"Q{d}? Answer:", f" {choices[j]}", d % 3))
        rows += [request(1_000_000 + d, j, "So:", f" {choices[j]}", d % 3) for j in (1, 0, 2)]
    write_task(root, "arc_easy/rc_5shot", rows)
    write_task(root, "arc_easy/rc_0shot", rows[:12])
    partial = [
        request(d, j, f"The {who} and the", " cat sat.", d % 2)
        for d in range(10)
        for j, who in enumerate((f"dog{d}", f"cow{d}"))
    ]
    write_task(root, "winogrande/rc_5shot", partial)
    yes_no = [
        request(d, j, f"Is it {d}?", answer, d % 2)
        for d in range(10)
        for j, answer in enumerate((" yes", " no"))
    ]
    write_task(root, "boolq/val_rc_5shot", yes_no)
    squad = [
        request(
            d,
            0,
            f"Read. Number {d}. Answer:",
            f" né{d}",
            ["x"],
            query=f"Title: T\nBackground: Passage {d // 2}.\nQuestion: why?\nAnswer:",
            choices=[f"né{d}"],
        )
        for d in range(30)
    ]
    write_task(root, "squad/bpb_5shot", squad)
    drop = [request(0, 0, "How many? Answer:", " ('4', '5')", [["4"]], choices=[["4", "5"]])]
    write_task(root, "drop/bpb_5shot", drop)
    return root


# ---- reading ------------------------------------------------------------------------------------


def test_documents_of_a_choice_task(requests):
    task = load_task("arc_easy", requests)
    assert (task.name, task.kind, task.shots, len(task.documents)) == ("arc_easy", "choice", 5, 40)
    document = task.documents[1]
    assert document.choices == ("be1", "gamma ray1", "delta1") and document.gold == 1
    assert document.pairs[0] == ("Q1? Answer:", " be1")
    assert document.unconditional[1:] == (("So:", " gamma ray1"), ("So:", " delta1"))
    assert load_task("arc_easy:rc_5shot", requests).name == "arc_easy"
    assert load_task("arc_easy:rc_0shot", requests).name == "arc_easy:rc_0shot"


def test_kinds_and_repaired_gold(requests):
    assert load_task("winogrande", requests).kind == "partial"
    assert load_task("boolq", requests).kind == "label"
    assert load_task("squad", requests).kind == "bpb"
    assert load_task("drop", requests).documents[0].pairs[0][1] == " 4, 5"


def test_unknown_tasks_are_named(requests, tmp_path):
    with pytest.raises(UserError, match="arc_easy has the variants rc_0shot, rc_5shot"):
        load_task("arc_easy:rc_9shot", requests)
    with pytest.raises(UserError, match="task 'arc_eazy' is not known"):
        load_task("arc_eazy", requests)
    with pytest.raises(UserError, match="no such directory"):
        load_task("arc_easy", tmp_path / "none")


def test_damaged_request_sets_are_named(requests):
    file = requests / "squad/bpb_5shot/requests.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bpb_5shot/requests.jsonl.gz: damaged after line"):
        load_task("squad", requests)
    with gzip.open(file, "wt") as out:
        out.write('{"doc_id": 0}\n')
    with pytest.raises(UserError, match="not a scorable request set"):
        load_task("squad", requests)


def test_unconditional_requests_must_be_of_the_same_choices(requests):
    rows = [request(d, j, f"Q{d}:", f" {w}", 0) for d in (0, 1) for j, w in enumerate(WORDS[:2])]
    again = [request(1_000_000 + r["doc_id"], r["idx"], "A:", " be", 0) for r in rows]
    for name, wrong in (("csqa/others", again), ("csqa/few", again[2:])):
        write_task(requests, name, rows + wrong)
        with pytest.raises(UserError, match="document 0: other choices without the question"):
            load_task(name.replace("/", ":"), requests)


def test_passages_are_distinct(requests):
    assert passages("squad", requests) == [f"Passage {i}." for i in range(15)]
    with pytest.raises(UserError, match="'boolq' has none"):
        passages("boolq", requests)


# ---- tokens -------------------------------------------------------------------------------------


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation():
    context, rest = encode_pair(Bytes(), "What? ", "so")
    assert bytes(context) == b"What?" and bytes(rest) == b" so"


def test_tokens_that_merge_at_the_border_still_spell_the_continuation():
    # "cat" + "hat": the whole has one token "th" across the border.
    context, rest = encode_pair(Bytes(), "cat", "hat")
    assert bytes(context) == b"cat" and bytes(rest) == b"hat"
    _, rest = encode_pair(Bytes(), "ca", "that")
    assert rest == [Bytes.merged, ord("a"), ord("t")]


def test_start_of_a_document():
    assert encode_pair(Bytes(), "", "so")[0] == [256]
    tokenizer = Bytes()
    tokenizer.bos_id, tokenizer.adds_bos = 256, True
    assert encode_pair(tokenizer, "a", "b") == ([256, ord("a")], [ord("b")])


# ---- scoring ------------------------------------------------------------------------------------


def log_likelihood(model: Bigram, context: str, continuation: str) -> float:
    ids = Bytes().encode(context)[-1:] + Bytes().encode(continuation)
    return sum(float(model.table[a, b]) for a, b in itertools.pairwise(ids))


def test_multiple_choice_against_a_direct_computation(requests):
    model = Bigram(1)
    out = evaluate(model, ["arc_easy", "winogrande", "boolq"], requests=requests)
    plain, normed, mutual = [], [], []
    bits = size = 0.0
    for document in load_task("arc_easy", requests).documents:
        scores = np.array([log_likelihood(model, *pair) for pair in document.pairs])
        plain.append(np.argmax(scores) == document.gold)
        lengths = [len(choice) for choice in document.choices]
        normed.append(np.argmax(scores / lengths) == document.gold)
        alone = [log_likelihood(model, "So:", f" {choice}") for choice in document.choices]
        mutual.append(np.argmax(scores - alone) == document.gold)
        bits -= scores[document.gold] / math.log(2)
        size += len(document.pairs[document.gold][1])
    result = out["results"]["arc_easy"]
    assert result["acc,none"] == np.mean(plain) and result["acc_norm,none"] == np.mean(normed)
    assert result["acc_mutual_info,none"] == np.mean(mutual)
    assert result["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-6)
    assert plain != normed and mutual not in (plain, normed)
    assert [s["acc_mutual_info"] for s in out["samples"]["arc_easy"]] == mutual
    stderr = np.std(plain, ddof=1) / math.sqrt(40)
    assert result["acc_stderr,none"] == pytest.approx(stderr)
    assert out["n-samples"]["arc_easy"] == {"original": 40, "effective": 40}
    # Labels and partial contexts have no length to divide by.
    assert "acc_norm,none" not in out["results"]["winogrande"]
    assert out["higher_is_better"]["boolq"] == {"acc": True, "bits_per_byte": False}
    more = dict.fromkeys(("acc", "acc_norm", "acc_mutual_info"), True)
    assert out["higher_is_better"]["arc_easy"] == {**more, "bits_per_byte": False}


def test_bits_per_byte_against_a_direct_computation(requests):
    model = Bigram(2)
    out = evaluate(model, ["squad"], requests=requests)
    nll = size = 0.0
    for document in load_task("squad", requests).documents:
        nll -= log_likelihood(model, *document.pairs[0])
        size += len(document.pairs[0][1].encode())
    result = out["results"]["squad"]
    assert result["bits_per_byte,none"] == pytest.approx(nll / size / math.log(2), rel=1e-6)
    assert result["bits_per_byte_stderr,none"] > 0
    assert out["higher_is_better"]["squad"] == {"bits_per_byte": False}
    sample = out["samples"]["squad"][0]
    assert sample["target"] == " né0" and sample["bytes"] == 5 and sample["tokens"] == 5


def test_limit_takes_a_fixed_subset_and_smaller_ones_nest(requests):
    def ids(limit: int, seed: int = 0) -> list[int]:
        out = evaluate(Bigram(1), ["arc_easy"], limit=limit, seed=seed, requests=requests)
        return [s["doc_id"] for s in out["samples"]["arc_easy"]]

    assert ids(10) == ids(10) == sorted(ids(10))
    assert set(ids(5)) < set(ids(10)) and ids(10) != ids(10, seed=1)
    assert len(ids(1000)) == 40
    with pytest.raises(UserError, match="limit is 0"):
        evaluate(Bigram(1), ["arc_easy"], limit=0, requests=requests)


def test_long_contexts_lose_their_beginning(requests):
    seen: list[int] = []

    class Watching(Bigram):
        def scored(self, prefix, context, continuation):
            seen.append(len(context) + len(continuation))
            return super().scored(prefix, context, continuation)

    whole = evaluate(Watching(1), ["squad"], requests=requests)
    cut = evaluate(Watching(1), ["squad"], requests=requests, max_length=12)
    assert max(seen[:30]) > 12 and max(seen[30:]) == 12
    assert whole["results"] == cut["results"]  # a bigram does not see the difference
    with pytest.raises(UserError, match="a continuation has 5 tokens, the context length is 5"):
        evaluate(Bigram(1), ["squad"], requests=requests, max_length=5)


@pytest.mark.parametrize("name", ["squad", "arc_easy", "winogrande"])
def test_documents_are_scored_together(requests, monkeypatch, name):
    calls: list[list[tuple[Any, Any]]] = []
    prefixes = []

    class Watching(Bigram):
        def scorer(self, prefix):
            prefixes.append(bytes(prefix))
            scorer = super().scorer(prefix)
            return lambda requests: calls.append(requests) or scorer(requests)

    monkeypatch.setattr(tasks, "_TOKENS_TOGETHER", 4096)
    together = evaluate(Watching(1), [name], requests=requests)
    # Four tokens less than "Read. Number "; "Q" and "The " are not worth it.
    assert prefixes == [b"Read. Num" if name == "squad" else b""]
    expected: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for document in load_task(name, requests).documents:
        pairs = (*document.pairs, *document.unconditional)
        for context, rest in (encode_pair(Bytes(), *pair) for pair in pairs):
            expected.setdefault(tuple(context), []).append(tuple(rest))
    # One request a context, whatever continues it.
    assert len(calls) == 1 and calls[0] == list(expected.items())
    monkeypatch.setattr(tasks, "_TOKENS_TOGETHER", 100)
    calls.clear()
    assert evaluate(Watching(1), [name], requests=requests) == together
    again: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context, rest in itertools.chain(*calls):
        again.setdefault(context, []).extend(rest)
    assert len(calls) > 3 and list(again.items()) == list(expected.items())


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_a_document_scores_the_same_whatever_others_there_are(requests, mixer):
    model = random_model(mixer, vocab_size=258)
    model.tokenizer = Bytes()
    for name, metric in (("arc_easy", "loglikelihoods"), ("squad", "loglikelihood")):
        few, all_of_them = (
            evaluate(model, [name], limit=n, requests=requests)["samples"][name] for n in (7, None)
        )
        by_id = {sample["doc_id"]: np.array(sample[metric]) for sample in all_of_them}
        for sample in few:
            found = by_id[sample["doc_id"]]
            assert_close(np.array(sample[metric]), found, PREFILL_STEP_F32, "log-likelihood")


def test_progress_comes_before_the_first_batch_and_behind_each(requests, tmp_path, monkeypatch):
    calls = []
    options = {
        "limit": 3,
        "requests": requests,
        "unfinished": tmp_path,
        "progress": lambda *a: calls.append(a),
    }
    evaluate(Bigram(1), ["boolq"], **options)
    assert calls == [("boolq", 0, 3), ("boolq", 3, 3)]
    calls.clear()
    monkeypatch.setattr(tasks, "_TOKENS_TOGETHER", 1)
    evaluate(Bigram(1), ["boolq", "arc_easy"], **options)
    assert calls == [("boolq", 3, 3), *[("arc_easy", n, 3) for n in range(4)]]


def test_a_missing_tokenizer_is_refused(requests):
    model = Bigram(1)
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate(model, ["boolq"], requests=requests)


def test_a_model_that_gives_nan_is_refused(requests):
    model = Bigram(1)
    model.table[:] = np.nan
    with pytest.raises(UserError, match="log-likelihood is nan"):
        evaluate(model, ["squad"], requests=requests)


def test_result_files_round_trip(requests, tmp_path):
    out = evaluate(Bigram(1), ["arc_easy:rc_0shot", "squad"], requests=requests)
    files = write_results(out, tmp_path / "results_teacher.json")
    names = [f.name for f in files]
    assert names[1:] == ["samples_teacher_arc_easy_rc_0shot.jsonl", "samples_teacher_squad.jsonl"]
    assert read_results(files[0]) == out
    assert out["versions"] == {"arc_easy:rc_0shot": 0, "squad": 0}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'results'"):
        read_results(tmp_path / "other.json")


def test_lm_evaluation_harness_shows_our_results(requests):
    utils = pytest.importorskip("lm_eval.utils")
    table = utils.make_table(evaluate(Bigram(1), ["arc_easy", "squad"], requests=requests))
    arc, squad = (next(r for r in table.splitlines() if t in r) for t in ("arc_easy", "squad"))
    assert [cell.strip() for cell in arc.split("|")[1:6]] == ["arc_easy", "0", "none", "5", "acc"]
    assert "bits_per_byte" in squad and "acc_mutual_info" in table


def command(requests: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """`evaluate` of a saved model on the request sets in `requests`, and where results go."""
    monkeypatch.setattr(packages, "fetch", lambda name: requests)
    folder = requests.parent
    tiny_run.teacher().save(folder / "m")
    out = folder / "results_m.json"
    return ["evaluate", str(folder / "m"), "--limit", "2", "--out", str(out), "--tasks"], out


def test_a_results_file_says_which_model_was_measured(requests, monkeypatch):
    base, out = command(requests, monkeypatch)
    assert main([*base, "arc_easy"]) == 0
    written = json.loads(out.read_text())
    config = written["config"]
    assert config["model"] == base[1] and config["weights"] == "m (safetensors, as float32)"
    assert config["fingerprint"] == tiny_run.teacher().fingerprint()
    assert (config["compute"], config["limit"], config["seed"]) == ("f32", 2, 0)
    assert abs(written["date"] - time.time()) < 600
    other = {**written, "config": {**config, "model": "n", "fingerprint": "0", "weights": "n"}}
    assert compare(written, {"s": other}).warnings == []


def test_evaluate_refuses_before_any_work(requests, monkeypatch, capsys):
    base, out = command(requests, monkeypatch)
    monkeypatch.setattr(commands, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert main([*base, "squad,vt:512", "--haystack", "h"]) == 2
    assert "--haystack h: no task here reads it" in capsys.readouterr().err
    out.mkdir()
    assert main([*base, "squad"]) == 2
    assert f"--out {out}: is a directory, name a file" in capsys.readouterr().err
    with pytest.raises(UserError, match="seed is -1"):
        evaluate(Bigram(1), ["squad"], limit=2, seed=-1, requests=requests)


def test_samples_of_other_tasks_outlive_a_finished_evaluation(requests, monkeypatch):
    base, out = command(requests, monkeypatch)
    kept = out.with_suffix(".unfinished")
    kept.mkdir()
    (kept / "squad.jsonl").write_text("another run's")
    assert main([*base, "arc_easy:rc_0shot"]) == 0
    assert [file.name for file in kept.iterdir()] == ["squad.jsonl"]
    (kept / "squad.jsonl").unlink()
    assert main([*base, "squad"]) == 0
    assert out.is_file() and not kept.exists()


# ---- comparison ---------------------------------------------------------------------------------


def trained_on(requests: Path, share: float) -> Bigram:
    """A bigram model that is the better on squad's gold answers the larger `share`."""
    good = Bigram(3)
    for document in load_task("squad", requests).documents:
        ids = Bytes().encode("".join(document.pairs[0]))[-8:]
        # Set, not added: pairs that come often would leave nothing for the others.
        good.table[ids[:-1], ids[1:]] = 0
    good.table -= np.log(np.exp(good.table).sum(axis=1, keepdims=True))
    return Bigram(3).toward(good, share)


def test_benchmarks_on_which_the_control_ties_say_nothing(requests, tmp_path):
    names = ["arc_easy", "boolq", "squad"]
    results = {
        name: evaluate(trained_on(requests, share), names, requests=requests)
        for name, share in (("teacher", 1.0), ("student", 0.6), ("control", 0.0))
    }
    # On boolq the control is the teacher.
    for part in ("results", "samples"):
        results["control"][part]["boolq"] = results["teacher"][part]["boolq"]
    paths = {n: write_results(r, tmp_path / f"{n}.json")[0] for n, r in results.items()}
    found = compare(
        paths["teacher"],
        {"student": paths["student"], "control": paths["control"]},
        controls=["control"],
        out=tmp_path / "out",
    )
    by_task = {b.task: b for b in found.benchmarks}
    assert by_task["boolq"].separates is False and by_task["boolq"].lead == 0
    squad = by_task["squad"]
    student, control = squad.students["student"], squad.students["control"]
    assert squad.separates and student.basis == "paired" and squad.kind == "likelihood"
    assert squad.teacher < student.score < control.score
    assert student.recovery == pytest.approx(squad.teacher / student.score)
    assert found.alpha_star("likelihood", separating=True)["student"] < 1
    separating = [g for g in found.groups if g.separating]
    assert all("boolq" not in g.tasks for g in separating)
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"comparison.json", "comparison.csv", "recovery.svg"} <= written
    assert "win_and_tie_likelihood_separating.svg" in written
    # One score a task, though all with choices have bits per byte, too.
    assert by_task["arc_easy"].metric == "acc_norm,none" and by_task["boolq"].metric == "acc,none"
    tasks_of = {g.kind: g.tasks for g in found.groups if not g.separating and not g.name}
    assert tasks_of == {"accuracy": ["arc_easy", "boolq"], "likelihood": ["squad"]}
    by_bits = compare(
        paths["teacher"], {"student": paths["student"]}, metrics=["arc_easy=bits_per_byte"]
    ).benchmarks[0]
    assert by_bits.kind == "likelihood" and by_bits.students["student"].basis == "paired"
    by_gain = compare(
        paths["teacher"], {"student": paths["student"]}, metrics=["acc_mutual_info"]
    ).benchmarks
    assert by_gain[0].metric == "acc_mutual_info,none" and by_gain[0].chance == pytest.approx(1 / 3)
    assert by_gain[0].students["student"].basis == "paired" and by_gain[1].metric == "acc,none"
    assert "boolq † *" in found.table()  # of the few documents no model answers enough
    rows = (tmp_path / "out/comparison.csv").read_text().splitlines()
    assert rows[0].startswith("task,metric,samples,teacher,student,control") and len(rows) == 4


def test_without_samples_the_stated_standard_errors_are_the_noise(requests):
    teacher = evaluate(trained_on(requests, 1), ["squad"], requests=requests)
    control = evaluate(trained_on(requests, 0), ["squad"], requests=requests)
    del control["samples"]
    found = compare(teacher, {"control": control}, controls=["control"]).benchmarks[0]
    assert found.students["control"].basis == "standard error"
    low, high = found.lead_interval
    noise = math.hypot(
        *(r["results"]["squad"]["bits_per_byte_stderr,none"] for r in (teacher, control))
    )
    # The teacher's side is its bootstrap, in which few documents vary less.
    assert (high - low) / 2 == pytest.approx(1.96 * noise, rel=0.25)


def test_compare_refuses_what_does_not_fit(requests):
    result = evaluate(Bigram(1), ["boolq"], requests=requests)
    other = evaluate(Bigram(1), ["squad"], requests=requests)
    with pytest.raises(UserError, match="the task sets differ: s lacks boolq"):
        compare(result, {"s": other})
    with pytest.raises(UserError, match="control 'c' is not among"):
        compare(result, {"s": result}, controls=["c"])
    with pytest.raises(UserError, match="s: has no results for task squad"):
        compare(
            {**result, "results": {**result["results"], **other["results"]}},
            {"s": result},
            tasks=["squad"],
        )


# ---- fidelity -----------------------------------------------------------------------------------


@pytest.fixture
def documents() -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(0)
    return {
        name: [rng.integers(0, 256, size=n).tolist() for n in (30, 500, 90, 400)]
        for name in ("prose", "code")
    }


def test_windows_are_one_stream():
    windows = windows_of([[1, 2, 3], [4, 5], [6]], 2)
    assert windows.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert windows_of([[1, 2, 3], [4]], 2, separator=0).tolist() == [[1, 2], [3, 0]]
    assert windows_of([[1]], 2).shape == (0, 2)


def test_buckets_leave_no_position_out():
    assert BUCKETS[0][0] == 0 and (1024, 2048) in BUCKETS
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(BUCKETS))


def test_request_sets_go_on_where_a_kill_stopped(requests, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_TOKENS_TOGETHER", 100)

    names = ["arc_easy", "squad"]
    options = {"requests": requests, "unfinished": tmp_path / "unfinished"}
    whole = evaluate(Bigram(1), names, requests=requests)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(1, calls=2), names, **options)
    assert evaluate(Bigram(1), names, **options) == whole
    assert evaluate(Killed(1, calls=0), names, **options) == whole


def test_samples_of_other_metrics_are_not_gone_on_with(requests, tmp_path):
    options = {"requests": requests, "unfinished": tmp_path / "unfinished"}
    evaluate(Bigram(1), ["boolq"], **options)
    file = options["unfinished"] / "boolq.jsonl"
    header, *batches = file.read_text().splitlines()
    old = {key: value for key, value in json.loads(header).items() if key != "metric_list"}
    file.write_text("\n".join([json.dumps(old), *batches, ""]))
    with pytest.raises(UserError, match="holds samples found with metric_list None, now it is"):
        evaluate(Bigram(1), ["boolq"], **options)


def test_fidelity_against_a_direct_computation(documents):
    teacher, student = Bigram(1), Bigram(1).toward(Bigram(2), 0.4)
    buckets = [(0, 32), (32, 64), (64, 128), (128, 256)]
    result = fidelity(
        {"student": student, "same": teacher}, teacher, documents, context=64, buckets=buckets
    )
    assert result.buckets == [(0, 32), (32, 64)]
    assert result.tokens == {"prose": 1020 // 64 * 64, "code": 1020 // 64 * 64}
    ids = windows_of(documents["code"], 64)
    p, q = teacher.table[ids], student.table[ids]
    kl = (np.exp(p) * (p - q)).sum(-1)
    code = result.models["student"]["code"]
    assert code.overall.kl == pytest.approx(kl.mean(), rel=1e-9)
    assert code.by_position[1].kl == pytest.approx(kl[:, 32:].mean(), rel=1e-9)
    assert code.windows["kl"] == pytest.approx(kl.mean(axis=1))
    nll = -np.take_along_axis(q[:, :-1], ids[:, 1:, None], -1).mean()
    assert code.overall.nll == pytest.approx(nll, rel=1e-9)
    assert code.overall.perplexity == pytest.approx(math.exp(nll), rel=1e-9)
    same = result.models["same"]["prose"].overall
    assert same.kl == 0 and same.agree == 1
    assert same.nll == result.models["teacher"]["prose"].overall.nll
    domains = [result.models["student"][d].overall.kl for d in ("prose", "code")]
    assert result.mean("student").kl == pytest.approx(np.mean(domains))


def test_the_teacher_runs_once_for_all_students(documents):
    teacher = Bigram(1)
    calls = []
    fidelity(
        {str(i): Bigram(i) for i in range(3)},
        teacher,
        documents,
        context=64,
        max_windows=5,
        progress=lambda *a: calls.append(a),
    )
    assert teacher.divergence_calls == 2 and calls[-1] == (10, 10)


def test_some_models_on_fewer_windows(documents):
    teacher, model = Bigram(1), Bigram(2)
    some = {"whole": model, "part": Bigram(2)}
    sizes = {"context": 64, "max_windows": 7}
    found = fidelity(some, teacher, documents, **sizes, fewer={"part": 3})
    whole, part = (found.models[name]["code"] for name in ("whole", "part"))
    assert found.complete == ["teacher", "whole"] and found.tokens["code"] == 7 * 64
    assert some["part"].tokens == 2 * 3 * 64 and model.tokens == 2 * 7 * 64
    assert part.windows["kl"] == whole.windows["kl"][:3]
    assert part.overall.kl == pytest.approx(np.mean(whole.windows["kl"][:3]))
    alone = fidelity({"whole": model}, teacher, documents, **sizes)
    assert alone.models["whole"] == found.models["whole"]
    for wrong in ({"part": 0}, {"unknown": 3}):
        with pytest.raises(UserError, match="is not a known model with at least 1 window"):
            fidelity(some, teacher, documents, **sizes, fewer=wrong)


def test_ratio_to_the_control(documents):
    teacher, far = Bigram(1), Bigram(2)
    near = teacher.toward(far, 0.3)
    result = fidelity({"near": near, "far": far}, teacher, documents, context=64)
    ratio = result.ratio("near", "far")
    assert ratio.low < ratio.value < ratio.high < 1
    assert ratio.value == pytest.approx(result.mean("near").kl / result.mean("far").kl)
    assert result.ratio("near", "far", bucket=1).high < 1
    assert result.ratio("far", "far") == pytest.approx((1, 1, 1))
    assert result.ratio("near", "far", domain="code").value != ratio.value


def test_fidelity_refuses_what_does_not_fit(documents):
    with pytest.raises(UserError, match="domain 'short' has fewer than 64 tokens"):
        fidelity({}, Bigram(1), {"short": [[1] * 63]}, context=64)
    with pytest.raises(UserError, match="the name 'teacher'"):
        fidelity({"teacher": Bigram(1)}, Bigram(1), documents)
    broken = Bigram(1)
    broken.table[:] = np.nan
    with pytest.raises(UserError, match="kl of broken on prose is not finite"):
        fidelity({"broken": broken}, Bigram(1), documents, context=64)


def test_paired_bootstrap_covers_and_pairs():
    rng = np.random.default_rng(5)
    b = rng.gamma(2, size=60)
    a = 0.8 * b + rng.normal(0, 0.01, size=60)
    found = paired_bootstrap(a, b, seed=1)
    assert found == paired_bootstrap(a, b, seed=1)
    assert found.low < 0.8 < found.high
    # Pairing removes what the units have in common: unpaired, the interval is many times wider.
    unpaired = paired_bootstrap(a, rng.permutation(b), seed=1)
    assert (found.high - found.low) * 10 < unpaired.high - unpaired.low
    difference = paired_bootstrap(a, b, ratio=False)
    assert difference.value == pytest.approx(a.mean() - b.mean())
    with pytest.raises(ValueError, match="different numbers of units"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no units"):
        paired_bootstrap([], [])


def test_bootstrap_over_strata_is_the_mean_of_means():
    a, b = [[1.0, 1.0], [3.0, 3.0, 3.0]], [[2.0, 2.0], [6.0, 6.0, 6.0]]
    assert paired_bootstrap(a, b, n=100) == (0.5, 0.5, 0.5)
    assert paired_bootstrap(a, b, ratio=False, n=100) == (-2, -2, -2)
