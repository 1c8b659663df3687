"""Text without a network: the teacher writes its own training text.

`general` continues short openings, `chat` answers instructions in the model's chat format. Openings
and instructions are combined from the lists of prompts.py by a generator that the seed starts.
Documents are made in batches; each batch is a file, so that a killed run goes on with the next one
and ends with the same bits.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .atomic import atomic_file
from .communicator import ALONE, Communicator
from .errors import UserError, spelt
from .model import Model
from .prompts import INSTRUCTIONS, OPENINGS, TOPICS
from .sources import Document, document_end, document_start

Style = Literal["general", "chat"]


def prompts(
    model: Model, style: Style, count: int, seed: int, file: str | Path | None = None
) -> list[list[int]]:
    """`count` prompts as token ids, the same for the same seed; those of `file` in turns, if given:
    a text file (one a line) or jsonl (the field prompt, instruction or text)."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("sampling: the teacher has no tokenizer")
    if file is not None:
        given = read_prompts(file)
        texts = [given[n % len(given)] for n in range(count)]
    else:
        texts = _made_prompts(style, count, seed)
    if style == "chat":
        messages = [[{"role": "user", "content": text}] for text in texts]
        rendered = [tokenizer.apply_chat_template(m) for m in messages]
        return tokenizer.encode_batch(rendered)
    start = document_start(tokenizer)
    return [[*start, *ids] for ids in tokenizer.encode_batch(texts, special=False)]


def _made_prompts(style: Style, count: int, seed: int) -> list[str]:
    random = np.random.Generator(np.random.Philox(key=[seed, style == "chat"]))
    patterns = INSTRUCTIONS if style == "chat" else OPENINGS
    return [
        patterns[random.integers(len(patterns))].format(topic=TOPICS[random.integers(len(TOPICS))])
        for _ in range(count)
    ]


def read_prompts(file: str | Path) -> list[str]:
    """Prompts of a text file, one a line, or of a jsonl file. UserError names the file and line."""
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    is_text = path.suffix.lower() not in (".jsonl", ".ndjson")
    found = [
        line if is_text else _prompt_of(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{path}: the file is empty")
    return found


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if isinstance(record, dict):
        for key in ("prompt", "instruction", "text"):
            value = record.get(key)
            if isinstance(value, str) and value.strip():
                if spelt(value) != value:
                    raise UserError(f"{where}: {key} holds half a surrogate pair")
                return value
    raise UserError(f"{where}: needs the field prompt, instruction or text")


def sampler(teacher: Model) -> Model:
    """The model that writes: with "mixed" a copy with weights in bf16, to which the products of a
    batch round them anyway, so that a step reads and packs half the memory."""
    return teacher.copy(compute="bf16") if teacher.compute == "mixed" else teacher


def sample_documents(
    teacher: Model,
    style: Style,
    *,
    documents: int,
    max_new_tokens: int,
    directory: str | Path,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch: int = 32,
    prompts_file: str | Path | None = None,
    seed: int = 0,
    check: Callable[[], None] | None = None,
    comm: Communicator = ALONE,
) -> Iterator[dict[str, Any]]:
    """Write `documents` sampled documents as files in `directory`; yields metrics a batch.

    Finished files of an earlier run are kept. `check` is called after every token and may raise to
    stop: what is finished stays. The ranks of `comm` take batches in turns; the first one writes
    them, the same for any number of ranks. Read the result with `read_documents`.
    """
    folder = Path(directory)
    stops = {*teacher.config.eos_token_ids}
    if teacher.tokenizer is not None:
        stops.update(document_end(teacher.tokenizer))
    asked = prompts(teacher, style, documents, seed, prompts_file)
    longest = max(map(len, asked), default=0)
    if longest + max_new_tokens > (context := teacher.config.max_position_embeddings):
        raise UserError(
            f"sampling: the longest prompt has {longest} tokens and max_new_tokens is "
            f"{max_new_tokens}; the teacher's context is {context}"
        )
    writer = sampler(teacher)
    steps = -(-documents // batch)
    missing = comm.broadcast([n for n in range(steps) if not _part(folder, n).is_file()])

    def write(step: int) -> tuple[bytes, dict[str, Any]]:
        started = time.perf_counter()
        own = asked[step * batch : (step + 1) * batch]
        new = writer.generate_batch(
            own,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed * 1_000_003 + step,
            stop_ids=stops,
            on_tokens=None if check is None else lambda _: check(),
        )
        pairs = list(zip(own, new, strict=True))
        lengths = np.array([[len(p), len(n), len(n) < max_new_tokens] for p, n in pairs])
        ids = np.array([token for p, n in pairs for token in (*p, *n)], dtype=np.int32)
        buffer = io.BytesIO()
        np.savez(buffer, lengths=lengths, ids=ids)
        seconds = (time.perf_counter() - started) / comm.size
        tokens = int(lengths[:, 1].sum())
        return buffer.getvalue(), {
            "step": step + 1,
            "steps": steps,
            "documents": len(own),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }

    for step, (content, metrics) in zip(missing, comm.map(write, missing), strict=True):
        if comm.first:
            with atomic_file(_part(folder, step)) as handle:
                handle.write(content)
        yield metrics


def read_documents(
    teacher: Model, directory: str | Path, style: Style, *, answers: bool = False
) -> list[Document]:
    """The documents that `sample_documents` wrote, in order; with `answers`, only what the teacher
    wrote is to be learnt of chats.

    A document that the teacher ended is closed by the end token, a chat by the end of its turn
    before it; one that was cut at `max_new_tokens` is left open.
    """
    if teacher.tokenizer is None:
        raise UserError("sampling: the teacher has no tokenizer")
    end = document_end(teacher.tokenizer)
    closing = [*teacher.tokenizer.eos_ids[:1], *end] if style == "chat" else end
    found: list[Document] = []
    for path in sorted(Path(directory).glob("part-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                lengths, ids = part["lengths"], part["ids"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run again") from None
        at = 0
        for prompt, new, ended in lengths.tolist():
            document = ids[at : at + prompt + new].tolist()
            at += prompt + new
            whole = [*document, *(closing if ended else [])]
            counted = None
            if answers and style == "chat":
                counted = np.arange(len(whole)) >= prompt
                if ended and end:
                    counted[-len(end) :] = False  # a chat ends its turns itself
            found.append(Document(f"{style}:{len(found)}", whole, counted))
    return found


def _part(folder: Path, step: int) -> Path:
    return folder / f"part-{step:05d}.npz"
