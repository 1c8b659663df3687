"""The teacher's targets on disk: the k most probable tokens of every position of packed rows.

A cache is a directory of shards with a manifest that names the teacher, the tokenizer and the rows
it belongs to. Ids are uint16 where the vocabulary has at most 65,536 tokens and int32 otherwise;
log-probabilities are float16 (relative error at most 2^-11, so 0.005 at log p = -10); the captured
mass is float32. Every shard has a sha256 in the manifest that is verified when it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file, write_text
from .communicator import ALONE, Communicator
from .data import MANIFEST, Rows
from .errors import UserError
from .model import Model

Targets = tuple[NDArray[np.int32], NDArray[np.float32]]
ROWS_PER_SHARD = 8
_SHARDS_IN_MEMORY = 4


def identity_of(teacher: Model, rows: Rows, k: int) -> dict[str, Any]:
    """What a cache must agree on with those who use it."""
    tokenizer = teacher.tokenizer
    return {
        "teacher": teacher.fingerprint(),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        **rows.identity,
        "k": k,
    }


def write_targets(
    teacher: Model,
    rows: Rows,
    directory: str | Path,
    *,
    count: int | None = None,
    k: int = 256,
    comm: Communicator = ALONE,
) -> Iterator[dict[str, Any]]:
    """Compute targets of the first `count` rows (None: all); yields metrics a shard.

    Finished shards of an earlier run are kept. The ranks of `comm` take shards in turns; the first
    one writes them, the same bytes for any number of ranks. A directory made for another teacher,
    tokenizer, text, length, seed or k is refused with a UserError that names the field and both
    values.
    """
    vocab = teacher.config.vocab_size
    if not 1 <= k <= vocab:
        raise UserError(f"k is {k}, expected 1 to {vocab}")
    folder = Path(directory)
    total = len(rows) if count is None else count
    if not 0 < total <= len(rows):
        raise UserError(f"targets of {total} rows were asked for, the text has {len(rows)}")
    wanted = identity_of(teacher, rows, k)
    done = comm.broadcast(_finished(folder, wanted) if comm.first else [])
    steps = -(-total // ROWS_PER_SHARD)

    def indices_of(step: int) -> range:
        return range(step * ROWS_PER_SHARD, min((step + 1) * ROWS_PER_SHARD, total))

    def make(step: int) -> tuple[bytes, float, float]:
        started = time.perf_counter()
        shard, mass = _shard(teacher, rows, indices_of(step), k)
        return shard, mass, (time.perf_counter() - started) / comm.size

    enough = {s["file"]: s["rows"] for s in done}
    missing = [n for n in range(steps) if enough.get(_name(n), 0) < len(indices_of(n))]
    for step, (shard, mass, seconds) in zip(missing, comm.map(make, missing), strict=True):
        name, indices = _name(step), indices_of(step)
        entry = {"file": name, "rows": len(indices), "sha256": hashlib.sha256(shard).hexdigest()}
        done = sorted([*(s for s in done if s["file"] != name), entry], key=lambda s: s["file"])
        if comm.first:
            with atomic_file(folder / name) as handle:
                handle.write(shard)
            manifest = {**wanted, "shards": done}
            write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        yield {
            "step": step + 1,
            "steps": steps,
            "tokens": len(indices) * rows.length,
            "mass": mass,
            "seconds": seconds,
            "tokens_per_second": len(indices) * rows.length / seconds,
        }


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.npz"


def _finished(folder: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The shards that an earlier run finished."""
    if not (folder / MANIFEST).exists():
        return []
    manifest = _read_manifest(folder)
    _check_identity(folder, manifest, wanted)
    return [s for s in manifest["shards"] if (folder / s["file"]).is_file()]


def _shard(teacher: Model, rows: Rows, indices: range, k: int) -> tuple[bytes, float]:
    """The bytes of one shard, and its mean captured mass."""
    small = teacher.config.vocab_size <= 1 << 16
    parts = []
    for i in indices:  # one row at a time: the bits do not depend on how shards are cut
        ids, _, reset = rows.row(i)
        parts.append(teacher.topk(ids[None], k, reset=reset[None]))
    tid, logp, mass = (np.concatenate(column) for column in zip(*parts, strict=True))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=tid.astype(np.uint16 if small else np.int32),
        logp=np.maximum(logp, np.finfo(np.float16).min).astype(np.float16),
        mass=mass.astype(np.float32),
    )
    return buffer.getvalue(), float(mass.mean())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values["shards"], list):
            raise TypeError("shards is not a list")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a target cache ({error})") from None
    return values


def _check_identity(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
        _check_identity(self.directory, self.manifest, expect or {})
        self.rows = sum(shard["rows"] for shard in self.manifest["shards"])
        self._loaded: dict[int, dict[str, NDArray[Any]]] = {}

    @property
    def k(self) -> int:
        """Targets of a position."""
        return int(self.manifest["k"])

    def get(self, indices: Sequence[int]) -> Targets:
        """Targets of rows: ids int32 [B, T, k] and log-probabilities float32 [B, T, k]."""
        picked = [self._row(index) for index in indices]
        ids = np.stack([p["ids"] for p in picked]).astype(np.int32)
        return ids, np.stack([p["logp"] for p in picked]).astype(np.float32)

    def mass(self) -> float:
        """The mean probability that the targets capture."""
        numbers = range(len(self.manifest["shards"]))
        values = np.concatenate([self._shard(n)["mass"].reshape(-1) for n in numbers])
        return float(values.mean(dtype=np.float64))

    def _row(self, index: int) -> dict[str, NDArray[Any]]:
        if not 0 <= index < self.rows:
            raise UserError(
                f"{self.directory}: has targets of {self.rows} rows, not of row {index}"
            )
        shard = self._shard(index // ROWS_PER_SHARD)
        return {name: values[index % ROWS_PER_SHARD] for name, values in shard.items()}

    def _shard(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._loaded:
            entry = self.manifest["shards"][number]
            path = self.directory / entry["file"]
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot read: {error.strerror}") from None
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise UserError(f"{path}: damaged: sha256 differs from {MANIFEST}; delete it")
            with np.load(io.BytesIO(content), allow_pickle=False) as part:
                self._loaded[number] = {name: part[name] for name in part.files}
            while len(self._loaded) > _SHARDS_IN_MEMORY:
                self._loaded.pop(next(iter(self._loaded)))
        return self._loaded[number]
