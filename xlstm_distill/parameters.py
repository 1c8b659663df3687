"""Flat buffers with named views: parameters, gradients, moments, decode states.

The core plans every buffer (csrc/base/plan.h): names, shapes and offsets come from there and
nowhere else, so that freezing, learning-rate groups, decay and merging all read one list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Storage = Literal["real", "bf16", "int8"]
_STORAGE: dict[int, Storage] = {0: "real", 1: "bf16", 4: "int8"}
"""By the core's number (xl_dtype)."""
ALIGNMENT = 64
"""Bytes; what the core asks of a flat buffer (XL_PLAN_ALIGN)."""


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Zeroed uint8 buffer of `size` bytes at an aligned address."""
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def bf16_round(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bf16 bits, to nearest, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (
        np.where(np.isnan(x), np.uint32(0x7FC00000), rounded)
        .astype(np.uint32)
        .view(np.uint16)[..., 1::2]
        .reshape(x.shape)
    )


def bf16_widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bf16 bits to float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def int8_round(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows [rows, cols] as signed bytes and a scale each [rows]: x is about scale * bytes.

    The largest entry of a row becomes 127; no entry is further off than half its row's scale.
    """
    scale = np.abs(x).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
    whole = np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.rint(x / whole).astype(np.int8), scale


class Entry(NamedTuple):
    """One tensor of a flat buffer. `offset` and `size` count elements of the buffer's dtype."""

    name: str
    shape: tuple[int, ...]
    role: str
    """embedding, norm, map, gate, projection, mlp, head, bias (parameters) or work (states)"""
    group: int
    """layer, or -1 outside the layers"""
    offset: int
    size: int
    storage: Storage = "real"


class Parameters:
    """Named tensors in one flat, aligned buffer.

    `flat` is the whole buffer (gaps between tensors are zeros), `self[name]` a writeable view.
    A buffer with matrices in bf16 or int8 (inference) has no `flat`; `self[name]` then widens a
    copy.
    """

    def __init__(self, plan: list[Any], size: int, dtype: DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self.raw = aligned_bytes(size)
        self._plan, self._size = plan, size
        self.entries: list[Entry] = []
        for name, shape, role, group, kind, offset in plan:
            storage = _STORAGE[kind]
            count = int(np.prod(shape, dtype=np.int64))
            at = offset // self._stored(storage).itemsize
            self.entries.append(Entry(name, tuple(shape), role, group, at, count, storage))
        self._index = {e.name: i for i, e in enumerate(self.entries)}

    def _stored(self, storage: Storage) -> np.dtype[Any]:
        return np.dtype({"real": self.dtype, "bf16": np.uint16, "int8": np.int8}[storage])

    @property
    def packed(self) -> bool:
        """True if matrices are stored as bf16 or int8."""
        return any(e.storage != "real" for e in self.entries)

    @property
    def flat(self) -> NDArray[Any]:
        """The whole buffer as one vector of `dtype`."""
        if self.packed:
            raise TypeError(
                "a model in bf16 or int8 has no flat float32 parameters; load it with f32"
            )
        return self.raw.view(self.dtype)

    def view(self, entry: Entry) -> NDArray[Any]:
        """Writeable view of a tensor (uint16 bits where it is stored as bf16, bytes as int8)."""
        typed = self.raw.view(self._stored(entry.storage))
        return typed[entry.offset : entry.offset + entry.size].reshape(entry.shape)

    def scales(self, entry: Entry) -> NDArray[Any]:
        """Writeable view of the scales [rows] of a tensor stored as int8; they lie behind it."""
        start = entry.offset + -(-entry.size // ALIGNMENT) * ALIGNMENT
        end = start + entry.shape[0] * self.dtype.itemsize
        return self.raw[start:end].view(self.dtype)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.entries[self._index[name]]
        view = self.view(entry)
        if entry.storage == "int8":
            return view * self.scales(entry)[:, None]
        return bf16_widen(view) if entry.storage == "bf16" else view

    def __setitem__(self, name: str, value: NDArray[Any]) -> None:
        entry = self.entries[self._index[name]]
        if value.shape != entry.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {entry.shape}")
        if entry.storage == "int8":
            self.view(entry)[...], self.scales(entry)[...] = int8_round(value)
        else:
            self.view(entry)[...] = bf16_round(value) if entry.storage == "bf16" else value

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def names(self) -> list[str]:
        """Names in the order of the buffer."""
        return [e.name for e in self.entries]

    def zeros_like(self) -> Parameters:
        """A buffer of the same plan, all zeros: gradients, moments."""
        return Parameters(self._plan, self._size, self.dtype)

    def copy(self) -> Parameters:
        """A deep copy."""
        other = self.zeros_like()
        other.raw[:] = self.raw
        return other

    def flags(self, names: set[str] | None) -> NDArray[np.uint8] | None:
        """One flag per entry for the core's `wanted`; None means all. Unknown names: ValueError."""
        if names is None:
            return None
        if unknown := names - set(self._index):
            raise ValueError(f"no parameter is called {min(unknown)}")
        return np.array([e.name in names for e in self.entries], dtype=np.uint8)

    def digest(self) -> str:
        """sha256 over names and bytes."""
        h = hashlib.sha256()
        for e in self.entries:
            h.update(e.name.encode())
            h.update(np.ascontiguousarray(self.view(e)))
            if e.storage == "int8":
                h.update(np.ascontiguousarray(self.scales(e)))
        return h.hexdigest()
