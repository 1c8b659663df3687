"""Rows that are continued together: each is written as it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
from models import random_model
from tolerances import PREFILL_STEP_F32

from xlstm_distill.errors import UserError
from xlstm_distill.generate import Batch, Row, StopStrings, random_stream
from xlstm_distill.testing import assert_close


@pytest.mark.parametrize("mixer", ["attention", "hybrid", "lolcats"])
def test_rows_that_join_and_leave_are_written_as_alone(mixer):
    model = random_model(mixer)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 61, n).tolist() for n in (5, 1, 300, 9, 2, 17)]

    def row(i: int) -> Row:
        return Row(prompts[i], 6 + 5 * i, random_stream(7, i), 0.5 * (i % 3), scores_top=2)

    alone = [row(i) for i in range(6)]
    for each in alone:
        batch = Batch(model)
        batch.join([each])
        while batch.step():
            pass
    batch, rows = Batch(model), [row(i) for i in range(6)]
    for joining in (rows[:2], rows[2:3], rows[3:]):
        batch.join(joining)
        for _ in range(4):
            batch.step()
    assert batch._state.rows < 6 and rows[0].reason == "length"  # the first has left
    while batch.step():
        pass
    assert batch.rows == [] and batch._state is None
    for one, other in zip(alone, rows, strict=True):
        assert one.new == other.new and len(one.new) == one.max_new_tokens
        assert [s.token for s in one.scored] == [s.token for s in other.scored]
        assert_close(
            np.array([s.logp for s in other.scored]),
            np.array([s.logp for s in one.scored]),
            PREFILL_STEP_F32,
            f"log-probabilities, {mixer}",
        )


def test_a_long_row_that_left_takes_no_room():
    """Of full attention: a server counts the tokens that its rows may have."""
    model, batch = random_model("attention"), Batch(random_model("attention"))
    rows = [Row([i] * n, m, random_stream(0, i), 0) for i, n, m in ((5, 300, 1), (7, 3, 9))]
    batch.join(rows)
    batch.step()
    assert batch._state.capacity == 512 and rows[0].reason == "length"
    rows.append(Row([9], 9, random_stream(0, 9), 0))
    batch.join(rows[2:])
    assert batch._state.capacity == 256
    while batch.step():
        pass
    wanted = model.generate_batch([row.prompt for row in rows], 9, 0.0, stop_ids=())
    assert [row.new for row in rows] == [wanted[0][:1], *wanted[1:]]


def test_a_growing_text_is_told_as_far_as_it_stands():
    tokenizer = tiny_run.tokenizer()
    stops = StopStrings(tokenizer, ["</end>", "\n\n"])
    for text, settled in (
        ("a b", "a b"),
        ("a <", "a "),
        ("a </en", "a "),
        ("a </es", "a </es"),
        ("a\n", "a"),
        ("a\ufffd", "a"),
        ("", ""),
    ):
        assert stops.settled(text) == settled
    for none in ([], ["\ud800"]):  # no text has a lone surrogate
        never = StopStrings(tokenizer, none)
        assert never.settled("abc") == never.cut("abc") == "abc" and not never.reached([70, 71])


def test_no_rows_are_no_texts():
    assert random_model("hybrid").generate_batch([], 4) == []


def test_prompts_are_whole_numbers_and_seeds_have_63_bits():
    model = random_model("hybrid")
    for prompt in ([1.5], [2**40], "abc"):
        with pytest.raises((ValueError, UserError), match=r"expected integers|outside 0..60"):
            model.generate_batch([prompt], 3)
    for seed in (-1, 1 << 63):
        with pytest.raises(UserError, match="expected 0 to 2\\^63 - 1"):
            model.generate_batch([[1]], 3, seed=seed)
    model.generate_batch([[1]], 3, seed=(1 << 63) - 1)
    assert model.generate_batch([], 3) == []
