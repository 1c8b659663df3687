"""Decode states: what a model remembers between steps, row by row.

Window layers keep a ring of the last W keys and the S sinks, mLSTM layers a matrix per head: their
memory does not grow. Full attention keeps every key; its part grows by doubling.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file
from .errors import UserError
from .parameters import Parameters

if TYPE_CHECKING:
    from .config import ModelConfig
    from .model import Model

FIRST_CAPACITY = 256
STATE_CONVENTION = "q scaled, C and n scaled by exp(-m), keys after RoPE"


def _windows(config: ModelConfig) -> dict[int, int | None]:
    """Layer -> the window of its attention, of those that have some."""
    attends = ("attention", "window", "hybrid", "lolcats")
    return {n: m.window for n, m in enumerate(config.mixers) if m.mixer in attends}


def full_attention(config: ModelConfig) -> list[int]:
    """The layers that attend without a window: their part of a state grows with every token."""
    return [n for n, window in _windows(config).items() if window is None]


def state_capacity(config: ModelConfig, tokens: int) -> int:
    """Positions that a state must hold for `tokens` tokens; a constant without full attention."""
    if not full_attention(config):
        return 1 + max((w for w in _windows(config).values() if w is not None), default=0)
    capacity = FIRST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return capacity


class DecodeState:
    """State of B rows. `lengths` [B] int32: tokens seen by each row."""

    def __init__(self, model: Model, rows: int, capacity: int) -> None:
        if rows < 1:
            raise ValueError(f"a state of {rows} rows, expected 1 or more")
        self.model_config = model.config
        self.capacity = capacity
        plan, size = model.core.plan_list(model.capsule, rows, capacity)
        self.tensors = Parameters(plan, size, model.dtype)
        self.lengths: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self.forget()

    def forget(self) -> None:
        """Empty the recurrent part, exactly as at a document's start; the window's keys stay."""
        for e in self.tensors.entries:
            if e.name.endswith((".c", ".n", ".m")):
                self.tensors.view(e)[...] = -np.inf if e.name.endswith(".m") else 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of the state in bytes."""
        return int(self.tensors.raw.nbytes)

    def check(self, model: Model) -> None:
        """ValueError unless this is a state of `model`, or of one that differs in its weights."""
        # States of two models may have the same size: the core would read one as the other.
        mine, theirs = self.model_config, model.config
        if self.tensors.dtype != model.dtype or (mine is not theirs and mine != theirs):
            raise ValueError("the state belongs to a model of another configuration or dtype")

    def _take(self, model: Model, rows: Sequence[int] | NDArray[Any], capacity: int) -> DecodeState:
        self.check(model)
        index = np.asarray(rows, dtype=np.int64)
        other = DecodeState(model, len(index), capacity)
        other.lengths[:] = self.lengths[index]
        full = {f"layers.{n}.{name}" for n in full_attention(model.config) for name in "kv"}
        for mine, theirs in zip(self.tensors.entries, other.tensors.entries, strict=True):
            source, target = self.tensors.view(mine), other.tensors.view(theirs)
            # Position p lies in slot p of full attention, whatever the capacity, and of a window
            # that is wider than one of the two states: nothing in it was overwritten yet.
            if mine.name in full or mine.shape[1:] != theirs.shape[1:]:
                for n, (row, seen) in enumerate(zip(index, other.lengths, strict=True)):
                    target[n, :seen] = source[row, :seen]
            else:
                np.take(source, index, axis=0, out=target)
        return other

    def fork(self, model: Model, rows: Sequence[int], capacity: int | None = None) -> DecodeState:
        """A new state of the given rows, with the same capacity or another one that holds their
        tokens; repeats share a prefix, missing rows are dropped."""
        return self._take(model, rows, self.capacity if capacity is None else capacity)

    def put(self, rows: Sequence[int], other: DecodeState) -> None:
        """Set the given rows to those of another state: `fork` the other way. Both have room for
        the tokens of these rows."""
        self.lengths[rows] = other.lengths
        for mine, theirs in zip(self.tensors.entries, other.tensors.entries, strict=True):
            target, source = self.tensors.view(mine), other.tensors.view(theirs)
            # Full attention of another capacity: position p lies in slot p of both.
            slots = min(target.shape[1], source.shape[1])
            target[rows, :slots] = source[:, :slots]

    def joined(self, model: Model, other: DecodeState) -> DecodeState:
        """A new state of these rows and, behind them, those of `other`, with room for the tokens
        that they have: a longer row that was dropped leaves none behind."""
        self.check(model)
        other.check(model)
        longest = int(max(self.lengths.max(), other.lengths.max()))
        both = DecodeState(model, self.rows + other.rows, state_capacity(model.config, longest))
        both.put(range(self.rows), self)
        both.put(range(self.rows, both.rows), other)
        return both

    def grown(self, model: Model, tokens: int) -> DecodeState:
        """This state, or a copy with room for `tokens` tokens a row."""
        capacity = state_capacity(model.config, tokens)
        return self if capacity <= self.capacity else self._take(model, range(self.rows), capacity)

    def save(self, path: str | Path) -> None:
        """Write as .npz with its convention and configuration, to the name given (atomic)."""
        header = {
            "convention": STATE_CONVENTION,
            "capacity": self.capacity,
            "config": self.model_config.model_dump(mode="json"),
        }
        arrays: dict[str, Any] = {e.name: self.tensors.view(e) for e in self.tensors.entries}
        with atomic_file(path) as f:
            np.savez(f, header=np.array(json.dumps(header)), lengths=self.lengths, **arrays)


def load_state(path: str | Path, model: Model) -> DecodeState:
    """Read a state that `DecodeState.save` wrote; refused if the model's configuration differs."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        header = json.loads(str(arrays.pop("header")))
        lengths = arrays.pop("lengths")
        convention, config, capacity = (header[key] for key in ("convention", "config", "capacity"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: not a saved state ({e})") from e
    if convention != STATE_CONVENTION:
        raise UserError(f"{path}: convention {convention!r}, expected {STATE_CONVENTION!r}")
    if config != model.config.model_dump(mode="json"):
        raise UserError(f"{path}: the state belongs to a model of another configuration")
    if not isinstance(capacity, int) or not 1 <= capacity <= np.iinfo(np.int32).max:
        raise UserError(f"{path}: capacity is {capacity!r}, expected 1 or more")
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise UserError(f"{path}: lengths have shape {lengths.shape} and dtype {lengths.dtype}")
    most = capacity if full_attention(model.config) else np.iinfo(np.int32).max
    if lengths.min() < 0 or lengths.max() > most:
        raise UserError(f"{path}: lengths {lengths.tolist()} are outside 0..{most}")
    state = DecodeState(model, len(lengths), capacity)
    state.lengths[:] = lengths
    for name, shape in ((e.name, e.shape) for e in state.tensors.entries):
        if name not in arrays:
            raise UserError(f"{path}: tensor {name} is missing")
        value = arrays[name]
        if value.shape != shape or value.dtype.kind != "f":
            raise UserError(
                f"{path}: tensor {name} has shape {value.shape} and dtype {value.dtype}, "
                f"expected {shape} of floats"
            )
        if np.isnan(value).any():
            raise UserError(f"{path}: tensor {name} holds nan")
        state.tensors[name] = value
    return state
