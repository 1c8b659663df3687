"""Benchmarks: `evaluate`, and ready-made request sets of multiple choice and bits per byte.

`packages.fetch("olmes")` gives a directory with one folder per task and, in it, one per variant
(`arc_easy/rc_5shot/requests.jsonl.gz`): contexts with their few-shot examples, continuations, gold
labels; `mmlu.py` makes the same of each subject of MMLU. For these and for texts (`perplexity.py`)
a model needs a `scorer` only; tasks whose answers it writes are `needle.py`'s.

Metrics have the names of lm-evaluation-harness:

- `acc`: the gold choice has the highest log-likelihood; `acc_norm`: the highest log-likelihood per
  character of the choice (without the space that joins it to the context), as there. `acc` only,
  as there, where lengths mean nothing: choices that stand in the context (winogrande) and labels
  that are the same for every document (boolq's yes and no).
- `acc_mutual_info`, of sets that ask for the choices behind "Answer:" alone too: the gold choice
  gains most by the question, as the difference of both log-likelihoods.
- `bits_per_byte` of the gold continuation: -(sum of log2 p) / (sum of UTF-8 bytes) over all
  documents, the joining space included on both sides; less is better.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..checkpoints import weights_file
from ..communicator import ALONE, Communicator
from ..errors import UserError
from ..json_files import read_json
from ..scoring import Request, score_pairs
from . import mmlu
from .generation import Questions, Sample, ScoringTokenizer, answers, prompt_ids, start_id
from .gsm8k import gsm8k
from .names import (
    DEFAULT_TASKS,
    REQUESTS,
    expand_tasks,
    find_task,
    groups_of,
    is_text,
    requests_root,
    short_name,
    source_of,
)
from .needle import needle
from .perplexity import Texts, document_samples, scored_windows, texts, windows_of
from .results import passage_of
from .scores import LIKELIHOOD, outcomes_of
from .unfinished import Unfinished

Logp = NDArray[Any]

_UNCONDITIONAL = 1_000_000
"""So much is added to a document's number where its choices are repeated behind "Answer:" alone."""
_WORTH_SHARING = 12
"""Tokens of a common beginning from which on documents are scored together."""
_BORDER = 4
"""Tokens left out of a common beginning: near its end the tokens may differ between documents."""
_TOKENS_TOGETHER = 2048
"""Tokens of documents that are scored together, and kept as soon as they are. More of them make the
rows of a batch more alike in length, but no longer faster (docs/speed.md)."""


class ScoringModel(Protocol):
    """What tasks need of a model. `tokenizer` is a ScoringTokenizer (or None: refused)."""

    @property
    def tokenizer(self) -> Any: ...

    def scorer(self, prefix: Sequence[int], /) -> Callable[[Sequence[Request]], list[list[Logp]]]:
        """Something that gives the log-probability of every token of each request's continuations.
        `prefix`: tokens that most contexts begin with, worth reading once."""


@dataclass(frozen=True)
class Document:
    """One question. `pairs` are (context, continuation) per choice; a bits-per-byte document has
    one, the gold one. `gold` indexes pairs. `choices` are the choices' own texts, `unconditional`
    their pairs without the question, or empty."""

    doc_id: int
    native_id: Any
    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int
    fields: Mapping[str, Any]
    unconditional: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """A request set, or a subject of MMLU. kind: "choice", "label" (the same choices in every
    document), "partial" (the choice stands in the context, one continuation for all) or "bpb"."""

    name: str
    kind: str
    documents: tuple[Document, ...]
    config: Mapping[str, Any]

    @property
    def shots(self) -> int | None:
        value = self.config.get("task_config", {}).get("num_shots")
        return value if isinstance(value, int) else None

    @property
    def metrics(self) -> tuple[str, ...]:
        if self.kind == "bpb":
            return ("bits_per_byte",)
        norm = ("acc_norm",) if self.kind == "choice" else ()
        mutual = ("acc_mutual_info",) if self.documents[0].unconditional else ()
        return ("acc", *norm, *mutual, "bits_per_byte")


# ---- reading ------------------------------------------------------------------------------------


def load_task(name: str, requests: str | Path | None = None) -> Task:
    """Read a request set, "squad" (its default variant) or "arc_easy:rc_0shot", or a subject of
    MMLU, "mmlu_anatomy". The task's name is the one in results.

    `requests` is the directory of the request sets (default: `packages.fetch("olmes")`), with a
    directory per subject in its `mmlu`.
    Raises UserError for an unknown task or variant (with those that are there), a damaged file, and
    for MMLU where pyarrow is not installed.
    """
    folder = find_task(name, requests)
    base, _, variant = name.partition(":")
    if base in mmlu.SUBJECTS:
        kind, rows, config = mmlu.subject_requests(folder, variant or mmlu.VARIANTS[0])
        return Task(short_name(name), kind, _documents(rows, kind), config)
    rows = list(_read_rows(folder / REQUESTS))
    config_file = folder / "config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    try:
        kind = _kind(rows)
        documents = _documents(rows, kind)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{folder / REQUESTS}: not a scorable request set ({error!r})") from None
    if not documents:
        raise UserError(f"{folder / REQUESTS}: holds no documents")
    return Task(short_name(f"{folder.parent.name}:{folder.name}"), kind, documents, config)


def open_task(
    name: str,
    tokenizer: ScoringTokenizer,
    limit: int | None = None,
    seed: int = 0,
    requests: str | Path | None = None,
    haystack: str | Path | None = None,
) -> Task | Questions:
    """Whatever `evaluate` knows by a name beside text: a request set, or questions whose answers
    are written.

    Arguments as there; UserError, before any work, for what cannot be scored: as `load_task`, and
    for a length that is too short for its needles or longer than the haystack.
    """
    source = source_of(name)
    if source.requests is None:
        return needle(name, tokenizer, limit=limit, seed=seed, haystack=haystack)
    task = load_task(source.requests, requests)
    return gsm8k(task, _subset(task.name, task.documents, limit, seed)) if source.written else task


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (named in the error)
                yield json.loads(line)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number} ({error})") from None


def _documents(rows: Sequence[Mapping[str, Any]], kind: str) -> tuple[Document, ...]:
    documents = []
    again = _by_document(rows, unconditional=True)
    for doc_id, requests in _by_document(rows).items():
        first = min(requests, key=lambda r: r["idx"])
        pairs, unconditional = _pairs(requests), _pairs(again.get(doc_id, ()))
        choices = tuple(c.lstrip(" ") for _, c in pairs)
        gold = 0 if kind == "bpb" else int(first["label"])
        if not 0 <= gold < len(pairs) or not all(c for _, c in pairs):
            raise ValueError(f"document {doc_id}: bad label or empty continuation")
        if again and [c for _, c in unconditional] != [c for _, c in pairs]:
            raise ValueError(f"document {doc_id}: other choices without the question")
        native_id, fields = first.get("native_id"), first["doc"]
        documents.append(Document(doc_id, native_id, pairs, choices, gold, fields, unconditional))
    return tuple(documents)


def _pairs(requests: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    in_order = sorted(requests, key=lambda r: r["idx"])
    return tuple((r["request"]["context"], _continuation(r)) for r in in_order)


def _kind(rows: Sequence[Mapping[str, Any]]) -> str:
    documents = _by_document(rows).values()
    most = max(map(len, documents), default=1)
    if most < 2:
        return "bpb"
    if any(len({r["request"]["context"] for r in requests}) > 1 for requests in documents):
        return "partial"
    distinct = {r["request"]["continuation"] for requests in documents for r in requests}
    return "label" if len(documents) > 1 and len(distinct) == most else "choice"


def _by_document(
    rows: Sequence[Mapping[str, Any]], unconditional: bool = False
) -> dict[int, list[Mapping[str, Any]]]:
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        repeats, doc_id = divmod(row["doc_id"], _UNCONDITIONAL)
        if repeats == unconditional:
            grouped.setdefault(doc_id, []).append(row)
    return grouped


def _continuation(row: Mapping[str, Any]) -> str:
    """The continuation of a request. Where the set's writer printed a list of gold spans as a
    Python tuple (drop: " ('44',)"), the spans joined by ", ", as its few-shot answers have them."""
    choices = row["doc"].get("choices")
    if choices and isinstance(choices[0], list):
        return " " + ", ".join(choices[0])
    text: str = row["request"]["continuation"]
    return text


# ---- tokens -------------------------------------------------------------------------------------


def encode_pair(
    tokenizer: ScoringTokenizer, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and of a continuation after it.

    As lm-evaluation-harness: spaces at the context's end belong to the continuation, and the
    continuation's tokens are those of the whole text behind the context's tokens. Where the whole
    text does not begin with the context's tokens (the two merge at the border), the continuation
    is encoded by itself, so that the tokens scored always spell it. A document starts with the
    beginning-of-text token if the model wants one; an empty context is that or the end-of-text
    token.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    first = tokenizer.encode(context, special=False)
    whole = tokenizer.encode(context + continuation, special=False)
    if whole[: len(first)] == first and len(whole) > len(first):
        rest = whole[len(first) :]
    else:
        rest = tokenizer.encode(continuation, special=False)
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        first = [tokenizer.bos_id, *first]
    return first or [start_id(tokenizer)], rest


def _fit(context: list[int], longest: int, limit: int | None) -> list[int]:
    """The end of `context` that leaves room for `longest` tokens within `limit`."""
    if limit is None or len(context) + longest <= limit:
        return context
    room = limit - longest
    if room < 1:
        raise UserError(f"a continuation has {longest} tokens, the context length is {limit}")
    return context[-room:]


# ---- scoring ------------------------------------------------------------------------------------


def evaluate(
    model: ScoringModel,
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    requests: str | Path | None = None,
    haystack: str | Path | None = None,
    unfinished: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    comm: Communicator = ALONE,
) -> dict[str, Any]:
    """Score `model` on `tasks`; results in the form of lm-evaluation-harness.

    Names are those of request sets, of needle.py with a length ("niah_single_1:4096"), of mmlu.py's
    subjects and groups of them, "gsm8k:generate", or "perplexity:" with a text file or a directory.
    limit: at most so many documents a task (of a group: a subject), a subset fixed by `seed` and
    the task's name (a smaller limit takes a subset of a larger one's). max_length: longest context
    and continuation of request sets in tokens (default: the model's `max_position_embeddings`);
    longer contexts lose their beginning, and text is cut into windows of so many. haystack: a text
    file to hide needles in. unfinished: a directory that keeps the samples found so far; with it
    the same call goes on where a killed one stopped, with the same results. progress(task,
    documents done, total), of text windows done, is called for every task before its first batch,
    also where nothing is left to do, and behind each batch. The ranks of `comm` take batches of
    documents in turns, with the same results.

    Returns `results` (task -> `acc,none`, `acc_norm,none`, `acc_mutual_info,none`,
    `bits_per_byte,none`, `word_perplexity,none`, `byte_perplexity,none`, `string_match_all,none`,
    `exact_match,none` and `..._stderr,none`, over passages where documents share some),
    `versions`, `higher_is_better`, `n-samples`, `n-shot`, `configs` (with the `chance` of guessing
    right), `config` (the model, as far as it knows itself, and the settings) and `samples` (task ->
    one mapping per document; documents that ask about one text have the same `passage`).
    A group that is named ("mmlu", not one whose subjects a pattern matches) stands in `results` and
    `higher_is_better` too, with metrics over all documents of its subjects; `group_subtasks` says
    what is in it.
    Deterministic.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1", usage=True)
    if seed < 0:
        raise UserError(f"seed is {seed}, expected at least 0", usage=True)
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length is {max_length}, expected at least 1", usage=True)
    if getattr(model, "tokenizer", None) is None:
        raise UserError("evaluate: the model has no tokenizer")

    names = expand_tasks(tasks, requests)
    if any(source_of(name).requests is not None for name in names):
        requests = requests_root(requests)  # whose sums are verified here, not for each task
    loaded = [
        texts(name, model.tokenizer)
        if is_text(name)
        else open_task(name, model.tokenizer, limit, seed, requests, haystack)
        for name in names
    ]
    if max_length is None:
        max_length = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    settings = {"limit": limit, "seed": seed, "max_length": max_length}
    measured = comm.broadcast(_measured(model) if comm.first else {})
    kept = None
    if unfinished is not None and comm.first:
        who = {name: measured.get(name) for name in ("fingerprint", "compute")}  # wherever it lies
        kept = Unfinished(unfinished, {**who, **settings})
    out: dict[str, Any] = {
        "results": {},
        "versions": {},
        "higher_is_better": {},
        "n-samples": {},
        "n-shot": {},
        "configs": {},
        "config": {**measured, **settings},
        "samples": {},
        "group_subtasks": groups_of(tasks),
    }
    for task in loaded:
        work = _work(model, task, limit, seed, max_length, comm)
        parts = comm.broadcast(kept.read(task.name, work.config) if kept is not None else [])
        if progress is not None:
            progress(task.name, len(parts), work.steps)
        for batch in work.batches(len(parts)):
            if kept is not None:
                kept.add(task.name, batch)
            parts += batch
            if progress is not None:
                progress(task.name, len(parts), work.steps)
        metrics = _metrics(task)
        samples = out["samples"][task.name] = work.samples(parts)
        out["versions"][task.name] = task.config.get("task_config", {}).get("version", 0)
        results = _aggregate(metrics, {task.name: samples})
        out["results"][task.name] = {"alias": task.name, **results}
        out["higher_is_better"][task.name] = {m: m not in LIKELIHOOD for m in metrics}
        out["n-samples"][task.name] = {"original": work.original, "effective": len(samples)}
        out["n-shot"][task.name] = task.shots
        out["configs"][task.name] = work.config
    for group in out["group_subtasks"]:
        subjects = expand_tasks([group])
        directions = out["higher_is_better"][subjects[0]]
        inside = {subject: out["samples"][subject] for subject in subjects}
        out["results"][group] = {"alias": group, **_aggregate(list(directions), inside)}
        out["higher_is_better"][group] = directions
    return out


def _measured(model: ScoringModel) -> dict[str, Any]:
    """Which model it is, as far as it knows."""
    source = getattr(model, "source", "")
    found = {"model": source, "weights": weights_file(source)} if source else {}
    for name in ("fingerprint", "compute"):
        if (value := getattr(model, name, None)) is not None:
            found[name] = value() if callable(value) else value
    return found


class _Work(NamedTuple):
    """What there is to do for a task. config: of the results. original: documents that it has.
    steps: parts to be found; batches(done): those behind the first `done`, a batch at a time;
    samples(parts): what all of them come to, one for each document."""

    config: dict[str, Any]
    original: int
    steps: int
    batches: Callable[[int], Iterator[list[Sample]]]
    samples: Callable[[list[Sample]], list[Sample]] = list


def _work(
    model: ScoringModel,
    task: Task | Questions | Texts,
    limit: int | None,
    seed: int,
    max_length: int | None,
    comm: Communicator,
) -> _Work:
    if isinstance(task, Questions):
        config = _config(task, "generate_until", task.config)
        return _Work(
            config, task.original, task.count, lambda done: answers(model, task, done, comm)
        )
    original = len(task.documents)
    if isinstance(task, Texts):
        whole = _subset(task.name, task.documents, limit, seed)
        windows = windows_of(model.tokenizer, whole, max_length)
        return _Work(
            _config(task, "loglikelihood_rolling", task.config),
            original,
            len(windows),
            lambda done: scored_windows(model.scorer(()), windows[done:], comm),
            lambda parts: document_samples(whole, parts),
        )
    documents = _subset(task.name, task.documents, limit, seed)
    facts: dict[str, Any] = {"request_set": task.config.get("task_hash")}
    if task.kind != "bpb":
        guesses = [1 / len(document.pairs) for document in documents]
        facts["chance"] = math.fsum(guesses) / len(guesses)
    return _Work(
        _config(task, "loglikelihood" if task.kind == "bpb" else "multiple_choice", facts),
        original,
        len(documents),
        lambda done: _scored_samples(model, task, documents, done, max_length, comm),
    )


def _config(
    task: Task | Questions | Texts, output_type: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "task": task.name,
        "output_type": output_type,
        "num_fewshot": task.shots,
        "metric_list": [{"metric": metric} for metric in _metrics(task)],
        **facts,
    }


def _metrics(task: Task | Questions | Texts) -> tuple[str, ...]:
    return (task.metric, *task.also) if isinstance(task, Questions) else task.metrics


_D = TypeVar("_D")


def _subset(task: str, documents: Sequence[_D], limit: int | None, seed: int) -> list[_D]:
    if limit is None or limit >= len(documents):
        return list(documents)
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    chosen = np.sort(rng.permutation(len(documents))[:limit])
    return [documents[i] for i in chosen]


_Encoded = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""(context, continuation) of each pair of a document, as tokens, behind them the unconditional"""


def _scored_samples(
    model: ScoringModel,
    task: Task,
    documents: Sequence[Document],
    done: int,
    max_length: int | None,
    comm: Communicator,
) -> Iterator[list[Sample]]:
    """Samples of the documents, in order and a batch at a time, behind the first `done`."""
    sample = _gold_sample if task.kind == "bpb" else _choice_sample
    # What all contexts begin with (the few-shot examples: up to nine tenths of the tokens).
    prefix = _shared_tokens(model.tokenizer, documents)
    scorer = model.scorer(prefix)

    def scored(batch: list[tuple[Document, _Encoded]]) -> list[Sample]:
        samples = []
        found = _log_likelihoods(scorer, [pairs for _, pairs in batch])
        for (document, pairs), scores in zip(batch, found, strict=True):
            for score in scores:
                if not math.isfinite(score):
                    raise UserError(f"document {document.doc_id}: log-likelihood is {score}")
            lengths = [len(rest) for _, rest in pairs]
            made = sample(task, document, list(zip(scores, lengths, strict=True)))
            if (passage := passage_of(document.fields)) is not None:
                made["passage"] = passage
            samples.append(made)
        return samples

    return comm.map(scored, _together(model.tokenizer, documents[done:], prefix, max_length))


def _together(
    tokenizer: ScoringTokenizer,
    documents: Sequence[Document],
    prefix: Sequence[int],
    max_length: int | None,
) -> Iterator[list[tuple[Document, _Encoded]]]:
    """Documents that are scored together: all, in order."""
    batch: list[tuple[Document, _Encoded]] = []
    tokens = 0
    for document in documents:
        pairs = _encoded(tokenizer, document, max_length)
        new = _new_tokens(pairs, len(prefix))
        if batch and tokens + new > _TOKENS_TOGETHER:
            yield batch
            batch, tokens = [], 0
        batch.append((document, pairs))
        tokens += new
    if batch:
        yield batch


def _encoded(tokenizer: ScoringTokenizer, document: Document, max_length: int | None) -> _Encoded:
    both = (*document.pairs, *document.unconditional)
    pairs = [encode_pair(tokenizer, *pair) for pair in both]
    longest = max(len(rest) for _, rest in pairs)
    return [(tuple(_fit(context, longest, max_length)), tuple(rest)) for context, rest in pairs]


def _new_tokens(pairs: _Encoded, prefix: int) -> int:
    """Tokens of a document that are read, behind a prefix of so many: each context once."""
    contexts = {context for context, _ in pairs}
    return sum(max(0, len(c) - prefix) for c in contexts) + sum(len(rest) for _, rest in pairs)


def _log_likelihoods(
    scorer: Callable[[Sequence[Request]], list[list[Logp]]], documents: Sequence[_Encoded]
) -> list[list[float]]:
    """Of every pair of each document."""
    found = iter(score_pairs(scorer, itertools.chain.from_iterable(documents)))
    return [[float(np.sum(next(found), dtype=np.float64)) for _ in pairs] for pairs in documents]


def _shared_tokens(tokenizer: ScoringTokenizer, documents: Sequence[Document]) -> tuple[int, ...]:
    """Tokens that the contexts of all documents begin with; empty where it is not worth it."""
    pairs = [pair for document in documents for pair in document.pairs]
    # All texts lie between the first and the last in order: what these two share, all share.
    first, last = (encode_pair(tokenizer, *pick(pairs))[0] for pick in (min, max))
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    # The last tokens before the texts part may be others in other documents.
    return tuple(first[: n - _BORDER]) if n >= _WORTH_SHARING else ()


class ReadTokens(NamedTuple):
    """Tokens that scoring a task takes: `shared` once, `each` for every document."""

    shared: float
    each: float

    def of(self, documents: int) -> float:
        """Tokens for so many documents."""
        return self.shared + self.each * documents if documents else 0.0


def read_tokens(
    tokenizer: ScoringTokenizer, task: Task | Questions, measured: int = 8
) -> ReadTokens:
    """What scoring takes, from the first `measured` documents; answers count with all the tokens
    that they may have, like those that are read."""
    if isinstance(task, Questions):
        prompts = [task.question(n).prompt for n in range(min(measured, task.count))]
        sizes = [len(prompt_ids(tokenizer, p)) + task.max_new_tokens for p in prompts]
        return ReadTokens(0, float(np.mean(sizes)))
    documents = task.documents[:measured]
    prefix = _shared_tokens(tokenizer, documents)
    new = [_new_tokens(_encoded(tokenizer, document, None), len(prefix)) for document in documents]
    return ReadTokens(len(prefix), float(np.mean(new)))


def _choice_sample(task: Task, document: Document, found: list[tuple[float, int]]) -> Sample:
    n, gold = len(document.pairs), document.gold
    scores, unconditional = [s for s, _ in found[:n]], [s for s, _ in found[n:]]
    sample: Sample = {
        "doc_id": document.doc_id,
        "native_id": document.native_id,
        "target": gold,
        "loglikelihoods": scores,
        "acc": _chosen(scores, gold),
    }
    if task.kind == "choice":
        per_character = [
            s / max(1, len(choice)) for s, choice in zip(scores, document.choices, strict=True)
        ]
        sample["acc_norm"] = _chosen(per_character, gold)
    if unconditional:
        gains = [s - u for s, u in zip(scores, unconditional, strict=True)]
        sample["unconditional_loglikelihoods"] = unconditional
        sample["acc_mutual_info"] = _chosen(gains, gold)
    return sample | _bits(document, found)


def _chosen(scores: Sequence[float], gold: int) -> float:
    return float(int(np.argmax(scores)) == gold)


def _gold_sample(task: Task, document: Document, found: list[tuple[float, int]]) -> Sample:
    return {
        "doc_id": document.doc_id,
        "native_id": document.native_id,
        "target": document.pairs[0][1],
        **_bits(document, found),
    }


def _bits(document: Document, found: list[tuple[float, int]]) -> Sample:
    """What is known of the gold continuation."""
    score, tokens = found[document.gold]
    size = len(document.pairs[document.gold][1].encode("utf-8"))
    return {
        "loglikelihood": score,
        "tokens": tokens,
        "bytes": size,
        "bits_per_byte": -score / (size * math.log(2)),
    }


def _aggregate(
    metrics: Sequence[str], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, float | str]:
    """Metrics over the documents of all tasks in `samples`, with their standard errors, "N/A" as in
    lm-evaluation-harness where a single unit tells none."""
    out: dict[str, float | str] = {}
    for metric in metrics:
        outcomes = outcomes_of(samples, metric, "evaluate")
        assert outcomes is not None
        out[f"{metric},none"] = outcomes.score
        error = outcomes.stderr
        out[f"{metric}_stderr,none"] = "N/A" if error is None else error
    return out


# ---- text ---------------------------------------------------------------------------------------


_PASSAGES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "squad": lambda doc: _between(doc["query"], "Background:", "\nQuestion:"),
    "coqa": lambda doc: str(doc["story"]),
    "drop": lambda doc: str(doc["passage"]),
}
PASSAGE_TASKS = tuple(_PASSAGES)
"""Tasks that `passages` knows."""


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].rpartition(end)[0]


def passages(task: str, requests: str | Path | None = None) -> list[str]:
    """The distinct passages that the documents of squad, coqa or drop ask about: human text to
    measure fidelity on, never to train on. In the order of the request set, stripped."""
    base = task.partition(":")[0]
    if base not in _PASSAGES:
        raise UserError(f"passages: {task!r} has none; {', '.join(_PASSAGES)} have", usage=True)
    take = _PASSAGES[base]
    texts = [take(d.fields).strip() for d in load_task(task, requests).documents]
    return [text for text in dict.fromkeys(texts) if text]


def questions(task: str, requests: str | Path | None = None) -> list[str]:
    """The text of each question of a request set, its few-shot examples left out: all that its
    original record says in words (to be looked for in training text)."""
    return [" ".join(_words_of(d.fields)) for d in load_task(task, requests).documents]


def _words_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _words_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _words_of(part)
