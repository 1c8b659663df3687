"""Llama 3's pre-tokenizer of GGUF files against its published pattern in another engine."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import regex
import tiny_run
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from xlstm_distill import tokenizer
from xlstm_distill.tokenizer import Tokenizer

# From the tokenizer.json of Llama 3.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS = "<|begin_of_text|>"
# A token that no merge makes: Llama 3's files hold such, and ignore_merges is what finds them.
UNMERGED = "qzqz"


def _fields() -> dict[str, Any]:
    """A GGUF header with some 500 tokens learnt from source code and made-up numbers."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    numbers = [f"{n * n} {n * 7919 % 1000}'s I'LL\r\n" for n in range(300)]
    core.train_from_iterator([*tiny_run.TEXT, *numbers], trainer)
    layout = json.loads(core.to_str())["model"]
    vocabulary = sorted(layout["vocab"], key=layout["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*vocabulary, UNMERGED, BOS],
        "tokenizer.ggml.token_type": [1] * (len(vocabulary) + 1) + [3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in layout["merges"]],
        "tokenizer.ggml.bos_token_id": len(vocabulary) + 1,
        "tokenizer.ggml.eos_token_id": len(vocabulary) + 1,
    }


FIELDS = _fields()
OURS = Tokenizer.from_gguf_fields(FIELDS)
VOCABULARY = {piece: n for n, piece in enumerate(FIELDS["tokenizer.ggml.tokens"])}
RANKS = {tuple(merge.split(" ")): n for n, merge in enumerate(FIELDS["tokenizer.ggml.merges"])}


def _letters() -> dict[int, str]:
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return {b: chr(b) if b in visible else chr(next(hidden)) for b in range(256)}


LETTERS = _letters()


def by_the_book(text: str) -> list[int]:
    """Pieces of the pattern; each is a token, or its bytes merged pair by pair, best rank first."""
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [LETTERS[byte] for byte in piece.encode("utf-8")]
        if "".join(parts) in VOCABULARY:
            parts = ["".join(parts)]
        while len(parts) > 1:
            ranks = [RANKS.get(pair, len(RANKS)) for pair in pairwise(parts)]
            if min(ranks) == len(RANKS):
                break
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids.extend(VOCABULARY[part] for part in parts)
    return ids


# Characters that this Python knows, so that both engines do; no surrogates.
characters = st.characters(exclude_categories=("Cs", "Cn", "Co"))
fragments = st.sampled_from(
    [
        *("'s", "'T", "'re", "I'LL", "'", " ", "  ", "\n", "\r\n", " \n ", "\t", "\u00a0"),
        *("1", "12", "123", "1234", "12345678", "½", "٣٤٥٦", "é", "e\u0301", "中文", "🙂"),
        *("qzqz", "the", " river", "(", "):", "->", "__", "...", "<|begin_of_text"),
    ]
)


@given(st.lists(fragments | characters, max_size=30).map("".join))
def test_llama3_splits_as_published(text: str) -> None:
    ids = OURS.encode(text, special=False)
    assert ids == by_the_book(text)
    assert OURS.decode(ids) == text


BY_NAME = {
    pre: Tokenizer.from_gguf_fields({**FIELDS, "tokenizer.ggml.pre": pre})
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2")
}
words = st.sampled_from(
    ["the", " river", " I", "'ll", " 12", " (a", ").", "\n", "\n\n", " \n ", "\u0301"]
)


@pytest.mark.parametrize("pre", BY_NAME)
@given(st.lists(words | fragments, max_size=60).map("".join))
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(pre: str, text: str) -> None:
    own, more = BY_NAME[pre], f"{text} and the end"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", 8)
        assert own.encode_long(more).tolist() == own.encode(more, special=False)
    assert own._cut(more, len(text)) < len(more)


def test_a_text_is_not_cut_where_a_token_goes_on() -> None:
    layout = json.loads(OURS._core.to_str())
    layout["pre_tokenizer"]["pretokenizers"] = layout["pre_tokenizer"]["pretokenizers"][1:]
    space = LETTERS[32]
    layout["model"]["vocab"][f"t{space}"] = len(VOCABULARY)
    layout["model"]["merges"].insert(0, ["t", space])
    across = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(layout)))
    assert across._cut("not that at all", 0) == len("not that at all")
    assert across._cut("not that in all", 0) == len("not that in")


def test_a_whole_piece_goes_before_the_merges() -> None:
    assert OURS.encode("qzqz") == [VOCABULARY[UNMERGED]]
    assert OURS.encode(f"{BOS}qzqz") == [VOCABULARY[BOS], VOCABULARY[UNMERGED]]
    other = Tokenizer.from_gguf_fields({**FIELDS, "tokenizer.ggml.pre": "qwen2"})
    assert VOCABULARY[UNMERGED] not in other.encode("qzqz")


def test_bos_begins_documents_of_files_that_do_not_say() -> None:
    named = {**FIELDS, "tokenizer.ggml.add_bos_token": False}
    assert OURS.adds_bos and not Tokenizer.from_gguf_fields(named).adds_bos
    ids = OURS.encode("qz")
    assert OURS.encode_prompt("qz") == OURS.encode_prompt(f"{BOS}qz") == [VOCABULARY[BOS], *ids]
    assert OURS.encode_prompt("") == [OURS.start_id] == [VOCABULARY[BOS]]
    assert Tokenizer.from_gguf_fields(named).encode_prompt("qz") == ids
    other = {**FIELDS, "tokenizer.ggml.pre": "olmo"}
    assert not Tokenizer.from_gguf_fields(other).adds_bos


def test_files_keep_it(tmp_path) -> None:
    OURS.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    text = "It's 1234567 qzqz\r\n\r\n  I'LL"
    assert again.encode(text) == OURS.encode(text) == by_the_book(text)
    assert again.adds_bos and again.fingerprint == OURS.fingerprint
