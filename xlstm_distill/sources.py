"""Where documents come from: files of the user, and the Python standard library.

Field names of jsonl files are TRL's: `text`, `prompt` with `completion`, or `messages`.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError
from .tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
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
    """A document: a name that does not change between runs, and its token ids."""

    name: str
    ids: list[int]


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


def _encode(
    texts: Iterable[tuple[str, str, bool]], tokenizer: Tokenizer, skip: bool = False
) -> Iterator[Document]:
    """Documents of (name, text, text has control tokens), several encoded at a time.

    A text that the vocabulary cannot spell is an error that names it, or left out with `skip`.
    """
    batch: list[tuple[str, str, bool]] = []
    for item in texts:
        batch.append(item)
        if len(batch) == _AT_ONCE:
            yield from _encode_batch(batch, tokenizer, skip)
            batch = []
    yield from _encode_batch(batch, tokenizer, skip)


def _encode_batch(
    batch: list[tuple[str, str, bool]], tokenizer: Tokenizer, skip: bool
) -> Iterator[Document]:
    start, end = document_start(tokenizer), document_end(tokenizer)
    encoded: list[list[int] | None]
    for special in (False, True):
        chosen = [(name, text) for name, text, marked in batch if marked == special]
        try:
            encoded = list(tokenizer.encode_batch([text for _, text in chosen], special=special))
        except UserError:
            encoded = [_encode_one(name, text, special, tokenizer, skip) for name, text in chosen]
        for (name, _), ids in zip(chosen, encoded, strict=True):
            if ids is not None:
                # A rendered chat brings its own start.
                yield Document(name, [*([] if special else start), *ids, *end])


def _encode_one(
    name: str, text: str, special: bool, tokenizer: Tokenizer, skip: bool
) -> list[int] | None:
    try:
        return tokenizer.encode(text, special=special)
    except UserError as error:
        if skip:
            return None
        raise UserError(f"{name}: {error}") from None


# ---- files of the user --------------------------------------------------------------------------


def read_files(paths: Iterable[str | Path], tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents of text files (one each), jsonl files (one a line) and directories of both.

    Raises UserError naming the file, and the line of a jsonl file: nothing there, empty, not UTF-8,
    not JSON, none of the known fields, a byte that the vocabulary lacks.
    """
    for path in paths:
        for file, name in _files(Path(path).expanduser()):
            if file.suffix == ".jsonl":
                yield from _encode(_records(file, name, tokenizer), tokenizer)
            else:
                text = _text(file)
                if not text.strip():
                    raise UserError(f"{file}: the file is empty")
                yield from _encode([(name, text, False)], tokenizer)


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """(file, name) of a file, or of all text and jsonl files below a directory, in name order."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not path.is_dir():
        yield path, path.name
        return
    wanted = (*TEXT_SUFFIXES, ".jsonl")
    found = sorted(f for f in path.rglob("*") if f.suffix in wanted and f.is_file())
    if not found:
        raise UserError(f"{path}: holds no {', '.join(wanted)} files")
    for file in found:
        # An empty file in a directory (a package marker) is nobody's mistake.
        if file.stat().st_size:
            yield file, file.relative_to(path).as_posix()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None


def _records(file: Path, name: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str, bool]]:
    empty = True
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a JSON object is expected")
        text, marked = _record_text(record, where, tokenizer)
        yield f"{name}:{number}", text, marked
    if empty:
        raise UserError(f"{file}: the file is empty")


def _record_text(record: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """The text of a record and whether it holds control tokens (a rendered chat)."""
    if "messages" in record:
        return _chat(record["messages"], where, tokenizer), True
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat([*prompt, *completion], where, tokenizer), True
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion, False
        raise UserError(f"{where}: prompt and completion must be two strings or two lists")
    if isinstance(record.get("text"), str):
        return record["text"], False
    keys = ", ".join(sorted(map(str, record))) or "none"
    raise UserError(
        f"{where}: needs the field text, prompt with completion, or messages; found: {keys}"
    )


def _chat(messages: Any, where: str, tokenizer: Tokenizer) -> str:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list that is not empty")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    yield from _encode(_readable(files, folder), tokenizer, skip=True)


def _readable(files: Iterable[Path], folder: Path) -> Iterator[tuple[str, str, bool]]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield file.relative_to(folder).as_posix(), text, False
