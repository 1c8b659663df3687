"""Continuations of many contexts, scored in batches, against whole rows read one by one."""

from __future__ import annotations

import numpy as np
import pytest
from models import random_model
from tolerances import PREFILL_STEP_F32

from xlstm_distill import scoring
from xlstm_distill.scoring import score_pairs
from xlstm_distill.testing import assert_close

PREFIX = [5, 9, 2, 30, 11, 8, 60, 3, 17]


def requests(prefix: list[int], seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Contexts of different lengths, most of them behind the prefix; one to four continuations, of
    which some have one token and some begin alike."""
    random = np.random.default_rng(seed)

    def tokens(n: int) -> list[int]:
        return random.integers(0, 61, n).tolist()

    found = []
    for n in range(14):
        context = [*prefix, *tokens(1 + 3 * n)] if n % 5 else tokens(4 + n)
        rest = [tokens(1 + (n + j) % 7) for j in range(1 + n % 4)]
        found.append((context, [*rest, [*rest[0], 7]] if n % 3 == 2 else rest))
    found.append((prefix or tokens(3), [[1], [2]]))  # nothing behind the prefix
    return found


def directly(model, context, continuation):
    ids = np.array([[*context, *continuation]])
    return model.score(ids)[0, len(context) - 1 :]


def assert_same(scores, expected):
    for of_request, wanted in zip(scores, expected, strict=True):
        for logp, other in zip(of_request, wanted, strict=True):
            assert_close(logp, other, PREFILL_STEP_F32, "log p of a continuation")


@pytest.mark.parametrize("mixer", ["attention", "window", "hybrid", "lolcats with sinks"])
@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_scores_are_those_of_whole_rows_in_any_order_and_any_batch(mixer, prefix, monkeypatch):
    model = random_model(mixer)
    asked = requests(prefix)
    expected = [[directly(model, context, c) for c in rest] for context, rest in asked]
    scorer = model.scorer(prefix)
    assert_same(scorer(asked), expected)
    assert_same(scorer(asked[::-1])[::-1], expected)
    assert_same([scorer([one])[0] for one in asked], expected)
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE", 30)
    monkeypatch.setattr(scoring, "_STATE_BYTES", 1)  # a row at a time
    assert_same(scorer(asked), expected)
    assert_same([model.score_continuations(*asked[3])], expected[3:4])


def test_a_greedy_scorer_says_which_tokens_are_the_most_probable():
    model = random_model("hybrid")
    asked = requests(PREFIX)
    for n, (context, rest) in enumerate(asked):  # some continuations that greedy decoding writes
        rest[0] = model.generate_batch([context], 1 + n % 4, 0.0, stop_ids=())[0]
    plain, found = (model.scorer(PREFIX, greedy=greedy)(asked) for greedy in (False, True))
    best_ones = 0
    for (context, rest), of_request, wanted in zip(asked, found, plain, strict=True):
        for c, values, logp in zip(rest, of_request, wanted, strict=True):
            assert_close(values[:, 0], logp, PREFILL_STEP_F32, "log p of a continuation")
            logits = model.logits([*context, *c])[0, len(context) - 1 : -1]
            assert np.array_equal(values[:, 1], logits.argmax(axis=1) == c)
            best_ones += values[:, 1].all()
    assert len(asked) <= best_ones < sum(len(rest) for _, rest in asked)


def test_pairs_of_one_context_are_one_request():
    calls = []

    def scorer(asked):
        calls.append(asked)
        return [[np.array([len(context), *c]) for c in rest] for context, rest in asked]

    pairs = [([1, 2], [3]), ([1], [4, 5]), ([1, 2], [6]), ([1, 2], [3])]
    found = [values.tolist() for values in score_pairs(scorer, pairs)]
    assert found == [[2, 3], [1, 4, 5], [2, 6], [2, 3]]
    assert calls == [[((1, 2), [[3], [6], [3]]), ((1,), [[4, 5]])]]


def watched(monkeypatch, model):
    """(rows, steps, bytes of the state behind) of every call, and the true tokens among them."""
    calls, tokens = [], []
    read = model.hidden_after

    def watching(ids, state, lengths=None):
        out = read(ids, state, lengths)
        calls.append((*np.shape(ids), out[1].nbytes))
        tokens.append(int(np.size(ids) if lengths is None else np.sum(lengths)))
        return out

    monkeypatch.setattr(model, "hidden_after", watching)
    return calls, tokens


def test_every_token_is_read_once(monkeypatch):
    model = random_model("hybrid")
    asked = requests(PREFIX)
    _, tokens = watched(monkeypatch, model)
    scorer = model.scorer(PREFIX)
    scorer(asked)
    scorer(asked)
    expected = 0
    for context, rest in asked:
        behind = context[: len(PREFIX)] == PREFIX and len(context) > len(PREFIX)
        expected += len(context) - len(PREFIX) * behind + sum(len(c) - 1 for c in rest)
    assert sum(tokens) == len(PREFIX) + 2 * expected


def test_batches_are_of_like_length_and_bounded(monkeypatch):
    model = random_model("attention")
    random = np.random.default_rng(3)
    asked = [
        (random.integers(0, 61, n).tolist(), [[3, 4, 5], [6, 7]])
        for n in random.integers(1, 200, 120)
    ]
    calls, tokens = watched(monkeypatch, model)
    one = model.new_state(1, 200).nbytes
    monkeypatch.setattr(scoring, "_STATE_BYTES", 40 * one)
    model.scorer()(asked)
    assert all(rows * steps <= scoring._TOKENS_AT_ONCE for rows, steps, _ in calls)
    assert max(size for *_, size in calls) <= 40 * one
    read = sum(rows * steps for rows, steps, _ in calls)
    assert read <= 1.25 * sum(tokens)


def test_what_cannot_be_scored_is_refused():
    scorer = random_model("hybrid").scorer()
    for context, rest in (([], [[1]]), ([1], [[2], []])):
        with pytest.raises(ValueError, match="need at least one token each"):
            scorer([([1], [[2]]), (context, rest)])
    assert scorer([]) == [] and scorer([([1, 2], [])]) == [[]]
