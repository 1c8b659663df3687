"""What becomes of a collection of documents before it is trained on: repeats go, so does what holds
text of the benchmarks on which models will be judged, and some is set aside for evaluation.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file
from .errors import UserError
from .sources import Document, hash_order
from .texts import Malformed
from .tokenizer import Tokenizer

_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]


def document_hash(document: Document) -> int:
    """64 bits of a document's tokens."""
    data = np.asarray(document.ids, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def without_repeats(
    documents: Iterable[Document], seen: Iterable[int] = ()
) -> tuple[list[Document], list[int]]:
    """(the documents whose tokens did not occur before, their hashes); `seen`: hashes of documents
    elsewhere."""
    known = {int(x) for x in seen}
    kept, hashes = [], []
    for document in documents:
        own = document_hash(document)
        if own not in known:
            known.add(own)
            kept.append(document)
            hashes.append(own)
    return kept, hashes


class Contamination:
    """Runs of `n` words of benchmark questions, to be looked for in training text.

    Words are letters and digits, without case. A question of fewer than `n` words is not looked
    for: `short` counts them.
    """

    def __init__(self, questions: Iterable[str], n: int = 13) -> None:
        self.n = n
        self.short = 0
        self._words: dict[str, int] = {}
        found: list[Hashes] = []
        for question in questions:
            self._learn(question)
            runs = self._runs(question)
            self.short += not len(runs)
            found.append(runs)
        self._known: Hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)

    def runs_in(self, text: str) -> int:
        """How many runs of words of the text stand in a question."""
        if not len(self._known):
            return 0
        runs = self._runs(text)
        nearest = np.searchsorted(self._known[:-1], runs)  # they are sorted: no scan a document
        return int((self._known[nearest] == runs).sum())

    def _runs(self, text: str) -> Hashes:
        """A hash of each run of n words; words that no question has are alike."""
        found = _words(text)
        words = np.fromiter((self._words.get(word, 0) for word in found), np.uint64, len(found))
        count = max(0, len(words) - self.n + 1)
        runs = np.zeros(count, np.uint64)
        for i in range(self.n):  # Horner's rule in the ring of 64-bit numbers
            runs = runs * _MULTIPLIER + words[i : i + count]
        return runs

    def _learn(self, question: str) -> None:
        """Give each word of a question a number, never 0."""
        for word in _words(question):
            if word not in self._words:
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
                self._words[word] = int.from_bytes(digest, "little") or 1


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def split_held_out(
    documents: Sequence[Document], tokens: int, where: str
) -> tuple[list[Document], list[Document]]:
    """(for training, held out): whole documents, chosen by a hash of their names.

    The held-out set is the shortest run of documents in hash order with at least `tokens` tokens,
    so that text stays held out whatever else is in the collection; a document counts with at most
    a tenth of `tokens`, so that one long file is not the whole sample. UserError if nothing would
    be left for training.
    """
    if tokens <= 0:
        return list(documents), []
    ordered = sorted(documents, key=lambda d: hash_order(d.name))
    held, counted = 0, 0
    while held < len(ordered) and counted < tokens:
        counted += min(len(ordered[held].ids), max(1, tokens // 10))
        held += 1
    if counted < tokens or held == len(ordered):
        total = sum(len(d.ids) for d in documents)
        raise UserError(
            f"{where}: {len(ordered)} documents with {total} tokens cannot give {tokens} held-out "
            "tokens and text to train on; add text or lower held_out_tokens"
        )
    chosen = set(map(id, ordered[:held]))  # two files in different places may have one name
    return [d for d in documents if id(d) not in chosen], ordered[:held]


class Collection:
    """Documents of a domain on their way to `train` and `held_out`; `facts` counts what was left
    out, for the manifest.

    sampled: what the teacher wrote, never held out; read: what people wrote. `watch` is called
    between two documents wherever all of them are looked at, and may raise to stop.
    """

    def __init__(
        self,
        sampled: list[Document],
        read: list[Document],
        malformed: Malformed,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampled, self.read, self._watch = sampled, read, watch
        self.held_out: list[Document] = []
        self.facts: dict[str, Any] = {}
        if malformed.counts:
            self.facts["malformed"] = dict(sorted(malformed.counts.items()))
            self.facts["malformed_first"] = malformed.places

    @property
    def train(self) -> list[Document]:
        """What is trained on."""
        return [*self.sampled, *self.read]

    def _watched(self) -> Iterator[Document]:
        for document in self.train:
            self._watch()
            yield document

    def deduplicate(self, seen: Iterable[int], hashes: str | Path) -> None:
        """Leave out repeats, also of documents elsewhere; writes the hashes of the others."""
        before = len(self.train)
        kept, own = without_repeats(self._watched(), seen)
        self._keep(kept)
        self.facts["repeated"] = before - len(kept)
        with atomic_file(hashes) as handle:
            np.save(handle, np.array(own, dtype=np.uint64))

    def check(self, contamination: Contamination, tokenizer: Tokenizer, *, drop: bool) -> None:
        """Count the documents that hold benchmark text, and leave them out."""
        clean, touched = [], Counter[str]()
        for document in self._watched():
            if contamination.runs_in(tokenizer.decode(document.ids, skip_special=True)):
                touched[document.name] += 1
            else:
                clean.append(document)
        self.facts["questions_too_short"] = contamination.short
        self.facts["contaminated"] = touched.total()
        self.facts["contaminated_first"] = sorted(touched)[:20]
        if drop:
            self._keep(clean)

    def check_not_empty(self, where: str) -> None:
        """UserError with the reasons if no document is left."""
        if not self.train:
            reasons = ", ".join(
                f"{name}: {count}"
                for name, count in (
                    ("malformed", sum(self.facts.get("malformed", {}).values())),
                    ("repeated", self.facts.get("repeated")),
                    ("contaminated", self.facts.get("contaminated")),
                )
                if count
            )
            first = "; ".join(self.facts.get("malformed_first", [])[:1])
            raise UserError(
                f"{where}: no document is left ({reasons or 'no text'}); add other text"
                + (f"; the first of the malformed: {first}" if first else "")
            )

    def hold_out(self, tokens: int, where: str) -> None:
        """Set evaluation text aside; no document is more than a tenth of it."""
        self.read, held = split_held_out(self.read, tokens, where)
        self.evaluate_on(held)
        self.held_out = [document.cut(max(1, tokens // 10)) for document in held]

    def evaluate_on(self, held: list[Document]) -> None:
        """Take `held` for evaluation, and leave out what is the same to be trained on."""
        self.held_out = held
        hashes, lengths = set(map(document_hash, held)), {len(d.ids) for d in held}

        def same(document: Document) -> bool:  # the length first: a hash reads the whole text
            return len(document.ids) in lengths and document_hash(document) in hashes

        self._keep([d for d in self._watched() if not same(d)])

    def _keep(self, documents: Sequence[Document]) -> None:
        chosen = set(map(id, documents))
        self.sampled = [d for d in self.sampled if id(d) in chosen]
        self.read = [d for d in self.read if id(d) in chosen]


def read_hashes(path: str | Path) -> list[int]:
    """What `Collection.deduplicate` wrote; nothing where there is no such file."""
    try:
        return [int(x) for x in np.load(path, allow_pickle=False)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the domain's data") from None
