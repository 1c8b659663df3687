"""Documents as token ids: of the user's files (texts.py reads them), and of the Python standard
library.

Texts are read in order and encoded by several threads; what comes out, and what is said of texts
that cannot be used, does not depend on how many there are. A `Watch` sees how far that is, and may
stop it between two documents.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import runtime
from .errors import UserError
from .spool import Spool
from .texts import Malformed, MalformedError, Text, read_texts
from .tokenizer import PIECE, Tokenizer

_AT_ONCE = 64  # documents that a thread takes at a time, or fewer with PIECE characters
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

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


def _nothing(*_: object) -> None:
    pass


class Watch(NamedTuple):
    """Who looks on while text is read. `check` is called between two documents, by any thread, and
    may raise to stop; `seen` is told of documents that were read and encoded: how many since the
    last call, and their bytes of UTF-8."""

    check: Callable[[], None] = _nothing
    seen: Callable[[int, int], None] = _nothing


class Document(NamedTuple):
    """A document: a name that does not change between runs, its token ids, and which of them are
    to be learnt (bool [ids]; None: all)."""

    name: str
    ids: Sequence[int] | NDArray[np.int32]
    counted: NDArray[np.bool_] | None = None

    def cut(self, most: int) -> Document:
        """Its first tokens, at most so many."""
        counted = None if self.counted is None else self.counted[:most]
        return Document(self.name, self.ids[:most], counted)


def hash_order(name: str) -> bytes:
    """Sort key: an order of names that has nothing to do with what they mean."""
    return hashlib.sha256(name.encode()).digest()


def up_to(documents: Iterable[Document], max_tokens: int | None) -> Iterator[Document]:
    """The first documents, up to the one with which they have `max_tokens` tokens (None: all)."""
    total = 0
    for document in documents:
        yield document
        total += len(document.ids)
        if max_tokens is not None and total >= max_tokens:
            break


def spooled(documents: Iterable[Document], place: Path) -> list[Document]:
    """The documents with their token ids on disk: int32 views of a memory map of a file without a
    name in the directory `place`. UserError if it cannot be written."""
    ids, counted = Spool(np.int32, place), Spool(np.bool_, place)
    marks: list[tuple[str, slice, slice | None]] = []
    for document in documents:
        starts = ids.size, counted.size
        ids.append(document.ids)
        if document.counted is not None:
            counted.append(document.counted)
        own = None if document.counted is None else slice(starts[1], counted.size)
        marks.append((document.name, slice(starts[0], ids.size), own))
    all_ids, all_counted = ids.array(), counted.array()
    return [
        Document(name, all_ids[there], None if own is None else all_counted[own])
        for name, there, own in marks
    ]


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
    watch: Watch = Watch(),  # noqa: B008 (it cannot be changed)
) -> Iterator[Document]:
    """Documents of files and directories (`read_texts` says which). With `answers`, only the
    assistant's turns and completions are to be learnt; plain text always is.

    Raises UserError naming the file and the line, unless `malformed` leaves such documents out.
    """
    rules = malformed or Malformed()
    reading = rules.record()
    texts = read_texts(paths, tokenizer, reading)
    yield from _encode(texts, tokenizer, rules, reading, watch, answers=answers)


class _Chunk(NamedTuple):
    """Texts that follow each other, what was wrong with others between them, and the error with
    which the reading ended."""

    texts: list[Text]
    malformed: Malformed
    error: UserError | None = None


def _chunks(
    texts: Iterable[Text], reading: Malformed, check: Callable[[], None]
) -> Iterator[_Chunk]:
    batch: list[Text] = []
    size = 0
    try:
        for text in texts:
            check()
            batch.append(text)
            size += len(text.text)
            if len(batch) == _AT_ONCE or size >= PIECE:
                yield _Chunk(batch, reading.taken())
                batch, size = [], 0
    except UserError as error:
        yield _Chunk([], reading.taken(), error)
        return
    yield _Chunk(batch, reading.taken())


def _encode(
    texts: Iterable[Text],
    tokenizer: Tokenizer,
    malformed: Malformed,
    reading: Malformed,
    watch: Watch,
    *,
    answers: bool = False,
) -> Iterator[Document]:
    """Documents of texts; what is wrong with others comes to `malformed`, in the order of the
    texts, from `reading`, to which `texts` reports it."""

    def encode(chunk: _Chunk) -> tuple[_Chunk, int, list[MalformedError], list[Document]]:
        own = chunk.texts if answers else [text._replace(answers=None) for text in chunk.texts]
        size = sum(len(text.text.encode(errors="replace")) for text in own)
        return chunk, size, *_encode_chunk(own, tokenizer, watch.check)

    chunks = _chunks(texts, reading, watch.check)
    for chunk, size, errors, documents in _in_order(encode, chunks):
        watch.seen(len(chunk.texts), size)
        malformed.add(chunk.malformed)
        if chunk.error is not None:
            raise chunk.error
        for error in errors:
            with malformed.tolerated():
                raise error
        yield from documents


def _in_order(work: Callable[[_Item], _Result], items: Iterator[_Item]) -> Iterator[_Result]:
    """`work` of every item, in order, done by as many threads as the core has."""
    threads = runtime.threads()
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _encode_chunk(
    texts: list[Text], tokenizer: Tokenizer, check: Callable[[], None]
) -> tuple[list[MalformedError], list[Document]]:
    """What is wrong with some of the texts, and the documents of the others: first those of plain
    texts, then those with control tokens."""
    errors: list[MalformedError] = []
    documents: list[Document] = []
    for text in sorted(texts, key=lambda text: text.marked):
        check()
        try:
            ids = tokenizer.encode_long(text.text, special=text.marked)
        except UserError as error:
            errors.append(MalformedError("byte without a token", f"{text.where}: {error}"))
        else:
            documents.append(_document(text, ids, tokenizer))
    return errors, documents


def _document(text: Text, ids: NDArray[np.int32], tokenizer: Tokenizer) -> Document:
    # A rendered chat brings its own start.
    start = [] if text.marked else document_start(tokenizer)
    end = document_end(tokenizer)
    whole = np.concatenate([start, ids, end], dtype=np.int32, casting="unsafe")
    if text.answers is None:
        return Document(text.name, whole)
    inside = tokenizer.tokens_inside(text.text, text.answers, special=text.marked)
    # The end of the document is part of a completion; a chat ends its turns itself.
    edges = np.zeros(len(start), bool), np.full(len(end), not text.marked)
    return Document(text.name, whole, np.concatenate([edges[0], inside, edges[1]]))


# ---- the standard library -----------------------------------------------------------------------


def read_stdlib(
    tokenizer: Tokenizer,
    root: str | Path | None = None,
    watch: Watch = Watch(),  # noqa: B008 (it cannot be changed)
) -> Iterator[Document]:
    """Sources (with their docstrings) of the running Python's standard library, a file a document.

    In hash order (`hash_order`), without tests, bundled projects and tables. Files that the
    vocabulary cannot spell are left out. `root` is another library directory.
    """
    folder = _library(root)
    files = stdlib_files(root)
    files.sort(key=lambda file: hash_order(file.relative_to(folder).as_posix()))
    if not files:
        raise UserError(f"{folder}: holds no Python sources of the standard library")
    rules = Malformed(skip=True)
    yield from _encode(_readable(files, folder), tokenizer, rules, rules.record(), watch)


def _library(root: str | Path | None) -> Path:
    return Path(root if root is not None else sysconfig.get_paths()["stdlib"])


def stdlib_files(root: str | Path | None = None) -> list[Path]:
    """The files of which `read_stdlib` makes documents, in no order."""
    folder = _library(root)
    return [
        file
        for file in folder.rglob("*.py")
        if not _NOT_LIBRARY & set(file.relative_to(folder).parts[:-1]) and file.is_file()
    ]


def _readable(files: Iterable[Path], folder: Path) -> Iterator[Text]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Text(file.relative_to(folder).as_posix(), text, where=str(file))
