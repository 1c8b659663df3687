"""Repeats, benchmark text, evaluation text."""

from __future__ import annotations

import tracemalloc

import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from xlstm_distill.cleaning import (
    Collection,
    Contamination,
    document_hash,
    read_hashes,
    without_repeats,
)
from xlstm_distill.errors import UserError
from xlstm_distill.sources import Document
from xlstm_distill.texts import Malformed

QUESTION = "Which of the four gases in the flask would turn limewater cloudy after a minute or two?"


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=30))
def test_each_text_is_kept_once_and_first(texts):
    documents = [Document(str(n), ids) for n, ids in enumerate(texts)]
    kept, hashes = without_repeats(documents)
    first = {tuple(d.ids): d.name for d in reversed(documents)}
    assert {d.name for d in kept} == set(first.values())
    assert [d.name for d in kept] == sorted((d.name for d in kept), key=int)
    assert hashes == [document_hash(d) for d in kept]
    assert without_repeats(documents, hashes) == ([], [])


def test_runs_of_words_are_found_whatever_their_dress():
    found = Contamination([QUESTION, "Too short to look for."], 13)
    assert found.short == 1
    runs = len(QUESTION.split()) - 12
    dressed = QUESTION.upper().replace(" ", "\n *")
    assert found.runs_in(f"see: {dressed} !") == runs
    assert found.runs_in(QUESTION.replace("gases", "liquids")) == 0
    assert found.runs_in(" ".join(QUESTION.split()[:12])) == 0


def test_memory_does_not_grow_with_the_words_of_the_text():
    found = Contamination([QUESTION])
    tracemalloc.start()
    try:
        for n in range(100):
            assert not found.runs_in(" ".join(f"word{n}x{m}" for m in range(200)))
        assert tracemalloc.get_traced_memory()[0] < 100_000  # 20,000 words are 2 MB
    finally:
        tracemalloc.stop()


@given(st.lists(st.sampled_from("abcd"), max_size=40), st.integers(1, 5))
def test_runs_are_those_of_a_plain_search(words, n):
    questions = ["a b c a b c", "b b b", "c"]
    known = {tuple(q.split()[i : i + n]) for q in questions for i in range(len(q.split()) - n + 1)}
    expected = sum(tuple(words[i : i + n]) in known for i in range(len(words) - n + 1))
    assert Contamination(questions, n).runs_in(" ".join(words)) == expected


def collection(*texts: str) -> Collection:
    tokenizer = tiny_run.tokenizer()
    read = [Document(f"d{n}", tokenizer.encode(text)) for n, text in enumerate(texts)]
    return Collection([Document("s0", tokenizer.encode("sampled"))], read, Malformed())


@pytest.mark.parametrize("drop", [True, False])
def test_a_document_with_benchmark_text_is_counted_or_dropped(drop):
    found = collection("harmless", f"Exercise. {QUESTION} Answer: the second.")
    found.check(Contamination([QUESTION]), tiny_run.tokenizer(), drop=drop)
    assert found.facts["contaminated"] == 1 and found.facts["questions_too_short"] == 0
    assert found.facts["contaminated_first"] == ["d1"]
    assert [d.name for d in found.train] == ["s0", "d0", *([] if drop else ["d1"])]


def test_repeats_go_across_domains(tmp_path):
    first, second = collection("a", "b", "a"), collection("b", "c")
    first.deduplicate([], tmp_path / "first.npy")
    second.deduplicate(read_hashes(tmp_path / "first.npy"), tmp_path / "second.npy")
    assert first.facts["repeated"] == 1
    assert [d.name for d in second.train] == ["d1"]  # the sampled text was there as well
    assert read_hashes(tmp_path / "nothing.npy") == []
    (tmp_path / "first.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        read_hashes(tmp_path / "first.npy")


def test_what_was_left_out_for_its_form_is_among_the_facts():
    malformed = Malformed(skip=True)
    malformed.counts["empty"] = 2
    malformed.places.append("a.jsonl:3: the document is empty")
    facts = Collection([], [], malformed).facts
    assert facts == {"malformed": {"empty": 2}, "malformed_first": malformed.places}


def test_where_no_document_is_left_the_reasons_are_named():
    malformed = Malformed(skip=True)
    malformed.counts.update({"empty": 2, "not JSON": 1})
    malformed.places.append("a.jsonl:3: the document is empty")
    message = r"malformed: 3\); .* the first of the malformed: a\.jsonl:3: the document is empty"
    with pytest.raises(UserError, match=message):
        Collection([], [], malformed).check_not_empty("domain a")
