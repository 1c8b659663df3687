"""Text of the user's files, before it is encoded: plain text, jsonl, Parquet and Arrow.

Field names of records are TRL's: `text`, `prompt` with `completion`, or `messages`. What is wrong
with a document is found here, named by file and line (or row), and refused or left out and counted.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import sha256_of
from .errors import UserError, check_package, short, spelt
from .tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_PLACES = 20
_ROWS_AT_ONCE = 256
_SHORTER = "split it or raise max_document_bytes"
_LINE_OF_TEXT = 8
"""Bytes of a line for a byte of text: JSON spells it with six at most, and has other fields."""
_FIELDS = ("text", "prompt", "completion", "messages", "tools")


class Text(NamedTuple):
    """A document as text. `marked`: it holds control tokens (a rendered chat). `answers`: the
    spans of characters [from, to) that are to be learnt where only answers count; None: all.
    `where`: file and line, for messages; names begin at the path that was asked for."""

    name: str
    text: str
    marked: bool = False
    answers: tuple[tuple[int, int], ...] | None = None
    where: str = ""


class MalformedError(UserError):
    """A document that cannot be used; `kind` is what it is counted as."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Malformed:
    """What happens to documents that cannot be used: the first one ends the reading, or, with
    `skip`, they are left out, counted by kind, and the first of them named. `max_bytes`: of the
    text of a line or a row (None: no limit); a file of plain text may have any length."""

    skip: bool = False
    max_bytes: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def record(self) -> Malformed:
        """An empty record with the same rules."""
        return Malformed(self.skip, self.max_bytes)

    def taken(self) -> Malformed:
        """What is in the record, which is empty afterwards."""
        found = Malformed(self.skip, self.max_bytes, self.counts, self.places)
        self.counts, self.places = Counter(), []
        return found

    def add(self, other: Malformed) -> None:
        """Note what another record has."""
        self.counts.update(other.counts)
        self.places += other.places[: _PLACES - len(self.places)]

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """A block that reads one document."""
        try:
            yield
        except MalformedError as error:
            if not self.skip:
                raise
            self.counts[error.kind] += 1
            if len(self.places) < _PLACES:
                self.places.append(str(error))

    def check_size(self, text: Text, where: str) -> None:
        """Refuse a text of more than `max_bytes` bytes of UTF-8, or of none: JSON can spell what
        UTF-8 cannot."""
        try:
            size = len(text.text.encode())
        except UnicodeEncodeError as error:
            message = f"{where}: holds half a surrogate pair (character {error.start} of the text)"
            raise MalformedError("not UTF-8", message) from None
        if self.max_bytes is not None and size > self.max_bytes:
            raise MalformedError(
                "too long",
                f"{where}: {size:,} bytes are more than a document may have here, "
                f"{self.max_bytes:,}; {_SHORTER}",
            )


def read_texts(
    paths: Iterable[str | Path], tokenizer: Tokenizer, malformed: Malformed
) -> Iterator[Text]:
    """Documents of text files (one each), of jsonl files (one a line), of Parquet and Arrow files
    (one a row), and of directories of these. A single file is text whatever its name, but for
    tables (`_TABLES`) and compressed files.

    The tokenizer renders chats. Raises UserError naming the file: nothing there, cannot be read,
    no such format; and what is wrong with a document as `malformed` says.
    """
    for path in paths:
        for file, name in _named(Path(path).expanduser()):
            if file.suffix.lower() in _RECORDS:
                yield from _record_texts(file, name, tokenizer, malformed)
            else:
                with malformed.tolerated():
                    yield Text(name, _plain(file), where=str(file))


def files_of(path: str | Path) -> list[Path]:
    """The files that are read of a path: itself, or those of known kinds below a directory, in
    name order. Links are followed, to a directory once."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return [place]
    found: list[Path] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        files = (Path(folder, name) for name in names)
        found += [f for f in files if _kind(f) in _KNOWN and f.is_file()]
    return sorted(found)


def fingerprint(path: str | Path) -> str:
    """sha256 of what there is to be read at a path: contents, and names below a directory."""
    place, digest = Path(path).expanduser(), hashlib.sha256()
    for file in files_of(place):
        name = spelt(file.relative_to(place).as_posix())
        digest.update(f"{name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _kind(file: Path) -> str:
    """The suffix that says what is in a file, compressed or not."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def check_path(path: str | Path) -> None:
    """UserError if there is nothing to read at a path, or nothing that this program reads."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{place}: no such file or directory", usage=True)
    files = files_of(place)
    if not files:
        raise UserError(f"{place}: holds no {', '.join(_KNOWN)} files")
    for file in files:
        if (suffix := file.suffix.lower()) in _TABLES:
            raise UserError(
                f"{file}: {suffix} files are not read; give one document a line as .jsonl"
            )
        if suffix in _COMPRESSED:
            raise UserError(f"{file}: compressed files are not read; unpack it")
        if _RECORDS.get(suffix) is _rows:
            check_package("pyarrow", "arrow", f"{file}: reading it")


def _named(path: Path) -> Iterator[tuple[Path, str]]:
    """(file, name) of a file, or of all files of known kinds below a directory."""
    check_path(path)
    if not path.is_dir():
        yield path, spelt(path.name)
        return
    for file in files_of(path):
        # An empty file in a directory (a package marker) is nobody's mistake.
        if file.stat().st_size:
            yield file, spelt(file.relative_to(path).as_posix())


def _plain(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MalformedError("not UTF-8", f"{file}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise MalformedError("empty", f"{file}: the file is empty")
    return text


# ---- records ------------------------------------------------------------------------------------

Place = tuple[str, str]
"""(name of the document, where it stands: the opening of an error message)"""


def _record_texts(
    file: Path, name: str, tokenizer: Tokenizer, malformed: Malformed
) -> Iterator[Text]:
    seen = False
    for (own, where), record in _RECORDS[file.suffix.lower()](file, name, malformed.max_bytes):
        seen = True
        with malformed.tolerated():
            if isinstance(record, bytes):
                record = _parsed(record, where)
            elif isinstance(record, MalformedError):
                raise record
            found = _text_of(record, own, where, tokenizer)
            malformed.check_size(found, where)
            yield found._replace(where=where)
    if not seen:
        with malformed.tolerated():
            raise MalformedError("empty", f"{file}: the file is empty")


def _lines(
    file: Path, name: str, max_bytes: int | None
) -> Iterator[tuple[Place, bytes | MalformedError]]:
    """Lines that are not empty. One that is far longer than its text may be, a whole file of JSON
    without line ends say, is not held in memory."""
    most = -1 if max_bytes is None else _LINE_OF_TEXT * max_bytes
    try:
        with file.open("rb") as handle:
            for number in itertools.count(1):
                line = handle.readline(most)
                if not line:
                    break
                place = f"{name}:{number}", f"{file}:{number}"
                if len(line) == most and not line.endswith(b"\n"):
                    while (rest := handle.readline(most)) and not rest.endswith(b"\n"):
                        pass
                    message = f"{place[1]}: a line of more than {most:,} bytes; {_SHORTER}"
                    yield place, MalformedError("too long", message)
                    continue
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield place, line
    except OSError as error:
        raise UserError(f"{file}: cannot read: {error.strerror}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 text (byte {error.start} of the line)"
        raise MalformedError("not UTF-8", message) from None
    except (ValueError, RecursionError) as error:
        raise MalformedError("not JSON", f"{where}: not valid JSON ({error})") from None


def _rows(file: Path, name: str, _: int | None) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, row in enumerate(arrow_rows(file, _FIELDS), start=1):
        yield (f"{name}:{number}", f"{file}: row {number}"), row


def arrow_rows(file: Path, wanted: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or Arrow file, column -> value: the wanted columns, or all if it has none
    of them. Raises UserError where pyarrow is not installed, or the file is missing or damaged."""
    check_package("pyarrow", "arrow", f"{file}: reading it")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in _arrow_batches(file, wanted, pyarrow):
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield row
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot read behind row {number}: {reason}") from None


def _arrow_batches(file: Path, wanted: Sequence[str], pyarrow: Any) -> Iterator[Any]:
    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = [name for name in wanted if name in table.schema_arrow.names] or None
            yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:  # a file with an index, or a stream as the datasets library writes it
            reader = pyarrow.ipc.open_file(source)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        for batch in batches:
            columns = [name for name in wanted if name in batch.schema.names]
            yield batch.select(columns) if columns else batch


_RECORDS = {".jsonl": _lines, ".ndjson": _lines, ".parquet": _rows, ".arrow": _rows}
_KNOWN = (*TEXT_SUFFIXES, *_RECORDS)
"""What is looked for in a directory."""
_TABLES = (".json", ".csv", ".tsv")
"""What would pass for one long document of plain text."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def _text_of(record: Any, name: str, where: str, tokenizer: Tokenizer) -> Text:
    if not isinstance(record, dict):
        raise MalformedError("not an object", f"{where}: a JSON object is expected")
    found = _fields(record, name, where, tokenizer)
    if not found.text.strip():
        raise MalformedError("empty", f"{where}: the document is empty")
    return found


def _fields(record: Mapping[str, Any], name: str, where: str, tokenizer: Tokenizer) -> Text:
    tools = record.get("tools")
    if record.get("messages") is not None:
        return _chat([], record["messages"], tools, name, where, tokenizer)
    prompt, completion = record.get("prompt"), record.get("completion")
    if prompt is not None and completion is not None:
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat(prompt, completion, tools, name, where, tokenizer)
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion
            return Text(name, text, answers=((len(prompt), len(text)),))
        message = f"{where}: prompt and completion must be two strings or two lists"
        raise MalformedError("no text field", message)
    found = record.get("text")
    if isinstance(found, str):
        return Text(name, found)
    if found is not None:
        message = f"{where}: text must be a string, found {short(found)}"
        raise MalformedError("no text field", message)
    filled = ", ".join(sorted(key for key, value in record.items() if value is not None))
    raise MalformedError(
        "no text field",
        f"{where}: needs the field text, prompt with completion, or messages; found: "
        f"{textwrap.shorten(filled, 200) or 'none'}",
    )


def _chat(
    prompt: list[Any], messages: Any, tools: Any, name: str, where: str, tokenizer: Tokenizer
) -> Text:
    """A rendered chat; the answers are those of `messages`, which follow `prompt`."""
    if not isinstance(messages, list) or not messages:
        message = f"{where}: messages must be a list that is not empty"
        raise MalformedError("bad chat", message)
    # A table has every key in every message.
    turns = [
        {k: v for k, v in m.items() if v is not None or k == "content"}
        if isinstance(m, dict)
        else m
        for m in (*prompt, *messages)
    ]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=False, tools=tools)
        spans = _answers(turns, len(prompt), tools, text, tokenizer)
        return Text(name, text, True, tuple(spans))
    except UserError as error:
        raise MalformedError("bad chat", f"{where}: {error}") from None


def _answers(
    messages: list[Any], first: int, tools: Any, text: str, tokenizer: Tokenizer
) -> Iterator[tuple[int, int]]:
    """Where the assistant's turns from the `first` message on stand, the mark of their end included
    and the white space behind it not: what the model itself would write after the prompt for an
    answer."""
    for n, message in enumerate(messages):
        if n < first or message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:n], tools=tools) if n else ""
        through = tokenizer.apply_chat_template(
            messages[: n + 1], add_generation_prompt=False, tools=tools
        )
        if not (through.startswith(before) and text.startswith(through.rstrip())):
            raise UserError(
                "the chat template does not render turns one behind the other, so that answers "
                "cannot be told from prompts"
            )
        yield len(before), len(through.rstrip())
