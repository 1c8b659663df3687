"""Documents as token ids: of the user's files (texts.py reads them), and of the Python standard
library.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .texts import Malformed, MalformedError, Text, read_texts
from .tokenizer import Tokenizer

_AT_ONCE = 64  # documents that are encoded together

# Parts of the library that are tests, programs, copies of other projects or tables of numbers.
_NOT_LIBRARY = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


class Document(NamedTuple):
    """A document: a name that does not change between runs, its token ids, and which of them are
    to be learnt (bool [ids]; None: all)."""

    name: str
    ids: list[int]
    counted: NDArray[np.bool_] | None = None

    def cut(self, most: int) -> Document:
        """Its first tokens, at most so many."""
        counted = None if self.counted is None else self.counted[:most]
        return Document(self.name, self.ids[:most], counted)


def hash_order(name: str) -> bytes:
    """Sort key: an order of names that has nothing to do with what they mean."""
    return hashlib.sha256(name.encode()).digest()


def up_to(documents: Iterable[Document], max_tokens: int | None) -> list[Document]:
    """The first documents, up to the one with which they have `max_tokens` tokens (None: all)."""
    kept, total = [], 0
    for document in documents:
        kept.append(document)
        total += len(document.ids)
        if max_tokens is not None and total >= max_tokens:
            break
    return kept


def document_end(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a document: `<|endoftext|>` if there is one, else the first end token.

    Empty for a tokenizer without either. (A chat model's end token ends a turn, not a text.)
    """
    token = tokenizer.special.get("<|endoftext|>", next(iter(tokenizer.eos_ids), None))
    return [] if token is None else [token]


def document_start(tokenizer: Tokenizer) -> list[int]:
    """The token with which the model expects a document to begin; empty for most."""
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return []


def read_files(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    malformed: Malformed | None = None,
    *,
    answers: bool = False,
) -> Iterator[Document]:
    """Documents of files and directories (`read_texts` says which). With `answers`, only the
    assistant's turns and completions are to be learnt; plain text always is.

    Raises UserError naming the file and the line, unless `malformed` leaves such documents out.
    """
    rules = malformed or Malformed()
    yield from _encode(read_texts(paths, tokenizer, rules), tokenizer, rules, answers=answers)


def _encode(
    texts: Iterable[Text], tokenizer: Tokenizer, malformed: Malformed, *, answers: bool = False
) -> Iterator[Document]:
    """Documents of texts, several encoded at a time."""
    batch: list[Text] = []
    for text in texts:
        batch.append(text if answers else text._replace(answers=None))
        if len(batch) == _AT_ONCE:
            yield from _encode_batch(batch, tokenizer, malformed)
            batch = []
    yield from _encode_batch(batch, tokenizer, malformed)


def _encode_batch(
    batch: list[Text], tokenizer: Tokenizer, malformed: Malformed
) -> Iterator[Document]:
    for marked in (False, True):
        chosen = [text for text in batch if text.marked == marked]
        try:
            encoded = tokenizer.encode_batch([text.text for text in chosen], special=marked)
        except UserError:  # which of them is it?
            good = []
            for text in chosen:
                with malformed.tolerated():
                    _check_bytes(text, tokenizer)
                    good.append(text)
            chosen = good
            encoded = tokenizer.encode_batch([text.text for text in chosen], special=marked)
        for text, ids in zip(chosen, encoded, strict=True):
            yield _document(text, ids, tokenizer)


def _check_bytes(text: Text, tokenizer: Tokenizer) -> None:
    try:
        tokenizer.encode(text.text, special=text.marked)
    except UserError as error:
        raise MalformedError("byte without a token", f"{text.name}: {error}") from None


def _document(text: Text, ids: list[int], tokenizer: Tokenizer) -> Document:
    # A rendered chat brings its own start.
    start = [] if text.marked else document_start(tokenizer)
    end = document_end(tokenizer)
    whole = [*start, *ids, *end]
    if text.answers is None:
        return Document(text.name, whole)
    inside = tokenizer.tokens_inside(text.text, text.answers, special=text.marked)
    # The end of the document is part of a completion; a chat ends its turns itself.
    edges = np.zeros(len(start), bool), np.full(len(end), not text.marked)
    return Document(text.name, whole, np.concatenate([edges[0], inside, edges[1]]))


# ---- the standard library -----------------------------------------------------------------------


def read_stdlib(tokenizer: Tokenizer, root: str | Path | None = None) -> Iterator[Document]:
    """Sources (with their docstrings) of the running Python's standard library, a file a document.

    In hash order (`hash_order`), without tests, bundled projects and tables. Files that the
    vocabulary cannot spell are left out. `root` is another library directory.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in folder.rglob("*.py")
        if not _NOT_LIBRARY & set(file.relative_to(folder).parts[:-1]) and file.is_file()
    ]
    files.sort(key=lambda file: hash_order(file.relative_to(folder).as_posix()))
    if not files:
        raise UserError(f"{folder}: holds no Python sources of the standard library")
    yield from _encode(_readable(files, folder), tokenizer, Malformed(skip=True))


def _readable(files: Iterable[Path], folder: Path) -> Iterator[Text]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Text(file.relative_to(folder).as_posix(), text)
