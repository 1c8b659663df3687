"""Perplexity of text files: `perplexity:PATH`, every token of every document scored.

Documents are those that a recipe's sources have (texts.py: .txt, .jsonl, .parquet, directories).
The rule is that of lm-evaluation-harness's `loglikelihood_rolling`: a document is cut into
windows of `max_length` tokens, each token is predicted once, the first one behind the beginning-
or end-of-text token. The first token of a later window follows the last one of the window before
and nothing else; the last window, which is shorter, begins so far back that it is full.

Metrics have the names and definitions of lm-evaluation-harness: over all documents,
`word_perplexity` = exp(-log p / words), words counted as what white space separates,
`byte_perplexity` = exp(-log p / bytes of UTF-8) and `bits_per_byte` = log2 of that.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..communicator import Communicator
from ..errors import UserError
from ..scoring import Request
from ..texts import Malformed, Text, read_texts
from .generation import Sample, ScoringTokenizer, start_id

PERPLEXITY = "perplexity"
"""What a task's name begins with; behind the colon stands a file or a directory."""

_TOKENS_TOGETHER = 2048
"""Tokens of windows that are scored together, and kept as soon as they are."""


class Whole(NamedTuple):
    """A document that is scored from its first token to its last."""

    doc_id: int
    text: Text


@dataclass(frozen=True)
class Texts:
    """The documents of a file or a directory. `config` has the sha256 of their texts."""

    name: str
    documents: tuple[Whole, ...]
    config: Mapping[str, Any]
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    shots = 0


class Window(NamedTuple):
    """Tokens `rest` of a document, scored behind `context`."""

    doc_id: int
    context: list[int]
    rest: list[int]


def texts(name: str, tokenizer: Any) -> Texts:
    """The documents of `perplexity:PATH`; `tokenizer` renders chats.

    Raises UserError, which names file and line, as `read_texts`.
    """
    found = list(read_texts([name.partition(":")[2]], tokenizer, Malformed()))
    digest = hashlib.sha256()
    for text in found:
        own = text.text.encode()
        digest.update(b"%d:%b" % (len(own), own))
    whole = tuple(Whole(n, text) for n, text in enumerate(found))
    return Texts(name, whole, {"request_set": digest.hexdigest()})


def windows_of(
    tokenizer: ScoringTokenizer, documents: Iterable[Whole], max_length: int | None
) -> list[Window]:
    """The windows of all documents, in order."""
    found = []
    for number, text in documents:
        try:
            ids = tokenizer.encode(text.text, special=text.marked)
        except UserError as error:
            raise UserError(f"{text.name}: {error}") from None
        start = start_id(tokenizer)
        if ids[:1] == [start]:  # a rendered chat brings its own
            ids = ids[1:]
        longest = max_length or max(1, len(ids))
        found += [Window(number, *pair) for pair in rolling(ids, start, longest)]
    return found


def rolling(
    ids: Sequence[int], start: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens scored behind it): each token once, at most `max_length` read in a row."""
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        context = ids[end - max_length - 1 : begin] if begin else [start]
        yield list(context), list(ids[begin:end])


def scored_windows(
    scorer: Callable[[Sequence[Request]], list[list[NDArray[Any]]]],
    windows: Sequence[Window],
    comm: Communicator,
) -> Iterator[list[Sample]]:
    """What is found of each window, in order and a batch at a time: log p and tokens."""

    def scored(batch: list[Window]) -> list[Sample]:
        parts = scorer([(window.context, [window.rest]) for window in batch])
        return [_part(window, logp) for window, (logp,) in zip(batch, parts, strict=True)]

    return comm.map(scored, _together(windows))


def _part(window: Window, logp: NDArray[Any]) -> Sample:
    total = float(np.sum(logp, dtype=np.float64))
    if not math.isfinite(total):
        raise UserError(f"document {window.doc_id}: log-likelihood is {total}")
    return {"doc_id": window.doc_id, "loglikelihood": total, "tokens": len(window.rest)}


def _together(windows: Iterable[Window]) -> Iterator[list[Window]]:
    batch: list[Window] = []
    tokens = 0
    for window in windows:
        if batch and tokens + len(window.rest) > _TOKENS_TOGETHER:
            yield batch
            batch, tokens = [], 0
        batch.append(window)
        tokens += len(window.rest)
    if batch:
        yield batch


def document_samples(documents: Iterable[Whole], parts: Iterable[Sample]) -> list[Sample]:
    """A sample for each document, from those of its windows."""
    of = {n: list(own) for n, own in itertools.groupby(parts, key=lambda part: part["doc_id"])}
    return [_sample(document, of.get(document.doc_id, [])) for document in documents]


def _sample(document: Whole, parts: Sequence[Sample]) -> Sample:
    """Perplexities as pairs (log p, size), the form of lm-evaluation-harness's samples."""
    text = document.text.text
    logp = math.fsum(part["loglikelihood"] for part in parts)
    words, size = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "doc_id": document.doc_id,
        "native_id": document.text.name,
        "loglikelihood": logp,
        "tokens": sum(part["tokens"] for part in parts),
        "words": words,
        "bytes": size,
        "word_perplexity": [logp, words],
        "byte_perplexity": [logp, size],
        "bits_per_byte": -logp / (size * math.log(2)),
    }
