"""The teacher's targets of every position of packed rows: its k most probable tokens, or k draws.

A cache is a directory of shards with a manifest that names the teacher, the tokenizer and the rows
it belongs to. Ids are uint16 where the vocabulary has at most 65,536 tokens and int32 otherwise.
Of the form topk log-probabilities are float16 (relative error at most 2^-11, so 0.005 at
log p = -10) and the captured mass is float32; of the form sampled the tokens that were drawn are
kept with how often each was. The draws of a row follow from the seed and the number of the row.
With `rows_before` the teacher reads what stands of a row's first document in so many rows before it
in its stream (`Rows.before`), as a student does that goes on from the state behind them.
Every shard has a sha256 in the manifest that is verified when it is read.

`OnlineTargets` has the teacher beside the student and stores nothing; what a student sees are the
same bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file, write_text
from .communicator import ALONE, Communicator
from .config import ModelConfig
from .data import MANIFEST, Rows
from .errors import UserError
from .model import Model
from .tokenizer import Tokenizer

Targets = tuple[NDArray[np.int32], NDArray[np.float32]]
Form = Literal["topk", "sampled"]
ROWS_PER_SHARD = 8
SHARDS_IN_MEMORY = 4

_UNSAID = {"form": "topk", "rows_before": 0}
"""What a manifest leaves out."""

_Arrays = dict[str, NDArray[Any]]


# ---- what is kept of a row ----------------------------------------------------------------------


class _TopK:
    """The k most probable tokens and their log-probabilities [T, k]; `mass` [T], what they
    capture."""

    statistic = "mass"

    def compute(self, teacher: Model, rows: Rows, index: int, k: int, before: int) -> _Arrays:
        """What is kept of one row."""
        ids, reset = _read(rows, index, before)
        tid, logp, mass = teacher.topk(ids, k, reset, rows.length)
        return {
            "ids": tid[0].astype(_id_type(teacher)),
            "logp": np.maximum(logp[0], np.finfo(np.float16).min).astype(np.float16),
            "mass": mass[0].astype(np.float32),
        }

    def pack(self, parts: Sequence[_Arrays]) -> _Arrays:
        """A shard: what is kept of several rows."""
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def unpack(self, shard: _Arrays, number: int) -> _Arrays:
        """What `pack` was given of one row."""
        return {name: values[number] for name, values in shard.items()}

    def targets(self, row: _Arrays, k: int) -> Targets:
        """Ids and log-probabilities [T, k] of a row."""
        return row["ids"].astype(np.int32), row["logp"].astype(np.float32)


class _Sampled:
    """The tokens that k draws gave, by rising id, and their counts, position after position;
    `distinct` [T], how many tokens a position has."""

    statistic = "distinct"

    def compute(self, teacher: Model, rows: Rows, index: int, k: int, before: int) -> _Arrays:
        """What is kept of one row."""
        ids, reset = _read(rows, index, before)
        # Key (seed, 0) is that of the order of documents.
        random = np.random.Generator(np.random.Philox(key=[rows.seed, 1 + index]))
        uniform = np.sort(random.random((1, rows.length, k)), axis=-1)
        tid, counts = teacher.draws(ids, uniform, reset)
        drawn = counts[0] > 0
        small = np.min_scalar_type(k)
        return {
            "ids": tid[0][drawn].astype(_id_type(teacher)),
            "counts": counts[0][drawn].astype(small),
            "distinct": drawn.sum(axis=1).astype(small),
        }

    def pack(self, parts: Sequence[_Arrays]) -> _Arrays:
        """A shard: what is kept of several rows, end to end."""
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**joined, "distinct": joined["distinct"].reshape(len(parts), -1)}

    def unpack(self, shard: _Arrays, number: int) -> _Arrays:
        """What `pack` was given of one row."""
        ends = np.cumsum(shard["distinct"].sum(axis=1, dtype=np.int64))
        own = slice(ends[number - 1] if number else 0, ends[number])
        return {
            "ids": shard["ids"][own],
            "counts": shard["counts"][own],
            "distinct": shard["distinct"][number],
        }

    def targets(self, row: _Arrays, k: int) -> Targets:
        """Ids and log(count / k) [T, k] of a row; -inf behind the last token."""
        there = np.arange(k) < row["distinct"][:, None]
        ids, logp = np.zeros(there.shape, np.int32), np.full(there.shape, -np.inf, np.float32)
        ids[there], logp[there] = row["ids"], np.log(row["counts"] / k)
        return ids, logp


_FORMS: dict[str, _TopK | _Sampled] = {"topk": _TopK(), "sampled": _Sampled()}


def _read(rows: Rows, index: int, before: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """What the teacher reads for one row: ids and reset [1, n + T]."""
    earlier = rows.before(index, before)
    ids, _, reset = rows.row(index)
    return np.concatenate([earlier, ids])[None], np.pad(reset, (len(earlier), 0))[None]


def _id_type(teacher: Model) -> type[np.integer[Any]]:
    return np.uint16 if teacher.config.vocab_size <= 1 << 16 else np.int32


def _check(teacher: Model, rows: Rows, k: int, form: Form, rows_before: int) -> None:
    vocab = teacher.config.vocab_size
    if form == "topk" and not 1 <= k <= vocab:
        raise UserError(f"k is {k}, expected 1 to {vocab}")
    if k < 1:
        raise UserError(f"k is {k}, expected at least 1 draw")
    if rows_before and not rows.streams:
        raise UserError("targets: rows_before needs rows of streams (Rows)")
    check_rows_before(rows_before, rows.length, teacher.config)


def check_rows_before(rows_before: int, length: int, teacher: ModelConfig) -> None:
    """UserError if so many rows and the one behind them are longer than the teacher's context."""
    context = teacher.max_position_embeddings
    if rows_before < 0 or (rows_before and (rows_before + 1) * length > context):
        raise UserError(
            f"targets: rows_before is {rows_before}, expected 0 to "
            f"{max(0, context // length - 1)}: the teacher reads at most {context} tokens, a row "
            f"has {length}"
        )


def identity_of(
    teacher: str,
    tokenizer: Tokenizer | None,
    rows: Rows,
    k: int,
    form: Form = "topk",
    rows_before: int = 0,
) -> dict[str, Any]:
    """What a cache must agree on with those who use it. teacher: its fingerprint."""
    identity = {
        "teacher": teacher,
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        **rows.identity,
        "k": k,
        "form": form,
        "rows_before": rows_before,
    }
    return {key: value for key, value in identity.items() if _UNSAID.get(key, ...) != value}


class OnlineTargets:
    """Targets that the teacher computes when they are asked for: those that a cache would hold."""

    def __init__(
        self,
        teacher: Model,
        rows: Rows,
        k: int = 256,
        form: Form = "topk",
        rows_before: int = 0,
    ) -> None:
        _check(teacher, rows, k, form, rows_before)
        self.teacher, self.rows, self.k, self.form = teacher, rows, k, form
        self.rows_before = rows_before

    def get(self, indices: Sequence[int]) -> Targets:
        """As `TargetCache.get`."""
        form = _FORMS[self.form]
        teacher, rows, k, before = self.teacher, self.rows, self.k, self.rows_before
        kept = (form.compute(teacher, rows, index, k, before) for index in indices)
        return _stacked(form.targets(row, k) for row in kept)


def _stacked(rows: Iterable[Targets]) -> Targets:
    ids, logp = zip(*rows, strict=True)
    return np.stack(ids), np.stack(logp)


# ---- on disk ------------------------------------------------------------------------------------


def write_targets(
    teacher: Model,
    rows: Rows,
    directory: str | Path,
    *,
    count: int | None = None,
    k: int = 256,
    form: Form = "topk",
    rows_before: int = 0,
    comm: Communicator = ALONE,
) -> Iterator[dict[str, Any]]:
    """Compute targets of the first `count` rows (None: all); yields metrics a shard.

    form: the k most probable tokens of a position, or k draws. rows_before: so many rows of a
    stream are read before a row. Finished shards of an earlier run are kept. The ranks of `comm`
    take shards in turns; the first one writes them, the same bytes for any number of ranks. A
    directory made for another teacher, tokenizer, text, length, seed, k, form or rows_before is
    refused with a UserError that names the field and both values.

    Metrics: mass, the mean probability that the k tokens capture, or distinct, the mean number of
    tokens that were drawn; tokens, seconds.
    """
    _check(teacher, rows, k, form, rows_before)
    folder = Path(directory)
    total = len(rows) if count is None else count
    if not 0 < total <= len(rows):
        raise UserError(f"targets of {total} rows were asked for, the text has {len(rows)}")
    wanted = identity_of(teacher.fingerprint(), teacher.tokenizer, rows, k, form, rows_before)
    done = comm.broadcast(_finished(folder, wanted) if comm.first else [])
    steps, how = -(-total // ROWS_PER_SHARD), _FORMS[form]

    def indices_of(step: int) -> range:
        return range(step * ROWS_PER_SHARD, min((step + 1) * ROWS_PER_SHARD, total))

    def make(step: int) -> tuple[bytes, float, float]:
        started = time.perf_counter()
        # One row at a time: the bits do not depend on how shards are cut.
        kept = [how.compute(teacher, rows, index, k, rows_before) for index in indices_of(step)]
        shard, mean = _written(how.pack(kept), how.statistic)
        return shard, mean, (time.perf_counter() - started) / comm.size

    enough = {s["file"]: s["rows"] for s in done}
    missing = [n for n in range(steps) if enough.get(_name(n), 0) < len(indices_of(n))]
    for step, (shard, mean, seconds) in zip(missing, comm.map(make, missing), strict=True):
        name, indices = _name(step), indices_of(step)
        entry = {"file": name, "rows": len(indices), "sha256": hashlib.sha256(shard).hexdigest()}
        others = [shard for shard in done if shard["file"] != name]
        done = sorted([*others, entry], key=lambda shard: (len(shard["file"]), shard["file"]))
        if comm.first:
            with atomic_file(folder / name) as handle:
                handle.write(shard)
            manifest = {**wanted, "shards": done}
            write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        yield {
            "step": step + 1,
            "steps": steps,
            "tokens": len(indices) * rows.length,
            how.statistic: mean,
            "seconds": seconds,
            "tokens_per_second": len(indices) * rows.length / seconds,
        }


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.npz"


def holds(directory: str | Path, rows: int) -> bool:
    """True if a cache has the first `rows` rows, and no shard of it was deleted."""
    folder = Path(directory)
    return sum(shard["rows"] for shard in _there(folder)) >= rows


def _there(folder: Path) -> list[dict[str, Any]]:
    """The shards of a cache whose files are there."""
    if not (folder / MANIFEST).exists():
        return []
    return [s for s in _read_manifest(folder)["shards"] if (folder / s["file"]).is_file()]


def _finished(folder: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The shards that an earlier run finished."""
    if (folder / MANIFEST).exists():
        _check_identity(folder, _read_manifest(folder), wanted)
    return _there(folder)


def _written(shard: _Arrays, statistic: str) -> tuple[bytes, float]:
    """The bytes of one shard, and the mean of its statistic."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = shard
    np.savez(buffer, **arrays)
    return buffer.getvalue(), float(shard[statistic].mean())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for shard in values["shards"]:
            str(shard["file"]), int(shard["rows"]), str(shard["sha256"])
        int(values["k"])
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no targets (no {MANIFEST})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: not that of targets ({reason}); delete the directory to make them again"
        ) from None
    return values


def _check_identity(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    found, wanted = {**_UNSAID, **found}, {**_UNSAID, **wanted}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: targets were made for {key} {found.get(key)}, here it is {value}; "
                "delete the directory to make them again"
            )


class TargetCache:
    """A finished cache, read shard by shard."""

    def __init__(self, directory: str | Path, expect: Mapping[str, Any] | None = None) -> None:
        """Open `directory`; `expect` holds fields that must agree (`identity_of`, or a part)."""
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        if expect is not None:
            _check_identity(self.directory, self.manifest, expect)
        self.rows = 0
        for number, shard in enumerate(self.manifest["shards"]):
            if (shard["file"], self.rows) != (_name(number), number * ROWS_PER_SHARD):
                raise UserError(
                    f"{self.directory}: {_name(number)} is missing or not full; make the targets "
                    "again: those that are there are kept"
                )
            self.rows += shard["rows"]
        self._loaded: dict[int, _Arrays] = {}

    @property
    def k(self) -> int:
        """Targets of a position."""
        return int(self.manifest["k"])

    @property
    def form(self) -> Form:
        """The k most probable tokens, or k draws."""
        form: Form = self.manifest.get("form", "topk")
        return form

    def get(self, indices: Sequence[int]) -> Targets:
        """Targets of rows: ids int32 [B, T, k] and log-probabilities float32 [B, T, k]; of draws
        the logarithms of their shares, -inf behind the last token that was drawn."""
        form = _FORMS[self.form]
        return _stacked(form.targets(self._row(index), self.k) for index in indices)

    def mean(self) -> float:
        """Of the form topk the mean probability that the targets capture, of draws the mean number
        of tokens that were drawn."""
        numbers, name = range(len(self.manifest["shards"])), _FORMS[self.form].statistic
        values = np.concatenate([self._shard(n)[name].reshape(-1) for n in numbers])
        return float(values.mean(dtype=np.float64))

    def _row(self, index: int) -> _Arrays:
        if not 0 <= index < self.rows:
            raise UserError(
                f"{self.directory}: has targets of {self.rows} rows, not of row {index}"
            )
        shard = self._shard(index // ROWS_PER_SHARD)
        return _FORMS[self.form].unpack(shard, index % ROWS_PER_SHARD)

    def _shard(self, number: int) -> _Arrays:
        if number not in self._loaded:
            entry = self.manifest["shards"][number]
            path = self.directory / entry["file"]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(
                    f"{path}: cannot read: {error.strerror}; the same command makes a file that is "
                    "gone again"
                ) from None
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise UserError(
                    f"{path}: damaged: sha256 differs from {MANIFEST}; delete this file, and the "
                    "same command makes it again"
                )
            with np.load(io.BytesIO(content), allow_pickle=False) as part:
                self._loaded[number] = {name: part[name] for name in part.files}
            while len(self._loaded) > SHARDS_IN_MEMORY:
                self._loaded.pop(next(iter(self._loaded)))
        return self._loaded[number]
