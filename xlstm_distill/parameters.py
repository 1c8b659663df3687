"""Flat buffers with named views: parameters, gradients, moments, decode states.

The core plans every buffer of a model (csrc/base/plan.h): names, shapes and offsets come from there
and nowhere else, so that freezing, learning-rate groups, decay and merging all read one list.
Tensors that the core does not know, a LoRA adapter's, lie in a buffer made by `Parameters.of`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .runtime import core

Storage = Literal["real", "bf16", "int8"]
_STORAGE: dict[int, Storage] = {0: "real", 4: "int8", 5: "bf16"}
"""By the core's number (xl_dtype)."""
ALIGNMENT = 64
"""Bytes; what the core asks of a flat buffer (XL_PLAN_ALIGN)."""


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Zeroed uint8 buffer of `size` bytes at an aligned address."""
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class Entry(NamedTuple):
    """One tensor of a flat buffer: `nbytes` bytes from `offset` on hold its `size` numbers."""

    name: str
    shape: tuple[int, ...]
    role: str
    """embedding, norm, map, gate, projection, mlp, head, bias (parameters) or work (states)"""
    group: int
    """layer, or -1 outside the layers"""
    offset: int
    nbytes: int
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
        for name, shape, role, group, kind, offset, nbytes in plan:
            size = int(np.prod(shape, dtype=np.int64))
            place = (offset, nbytes, size, _STORAGE[kind])
            self.entries.append(Entry(name, tuple(shape), role, group, *place))
        self._index = {e.name: i for i, e in enumerate(self.entries)}

    def __getstate__(self) -> tuple[list[Any], int, str, NDArray[np.uint8]]:
        return self._plan, self._size, self.dtype.str, self.raw

    def __setstate__(self, given: tuple[list[Any], int, str, NDArray[np.uint8]]) -> None:
        plan, size, dtype, raw = given
        self.__init__(plan, size, dtype)  # type: ignore[misc]  # NumPy's copies are not aligned
        self.raw[:] = raw

    @classmethod
    def of(
        cls, tensors: Iterable[tuple[str, tuple[int, ...], str, int]], dtype: DTypeLike
    ) -> Parameters:
        """Zeros for tensors that the core does not plan: (name, shape, role, layer) of each."""
        plan, end = [], 0
        for name, shape, role, layer in tensors:
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            plan.append((name, shape, role, layer, 0, end, nbytes))
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(plan, end, dtype)

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

    def stored(self, entry: Entry) -> NDArray[np.uint8]:
        """Writeable bytes of a tensor; bf16 and int8 lie in panels (csrc/base/plan.h)."""
        return self.raw[entry.offset : entry.offset + entry.nbytes]

    def view(self, entry: Entry) -> NDArray[Any]:
        """Writeable view of a tensor that is stored as it is."""
        if entry.storage != "real":
            raise TypeError(f"{entry.name} is stored as {entry.storage}: read and set it by name")
        return self.stored(entry).view(self.dtype).reshape(entry.shape)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.entries[self._index[name]]
        if entry.storage == "real":
            return self.view(entry)
        value = np.empty(entry.shape, self.dtype)
        core(self.dtype).unpack_weights(value, self.stored(entry), entry.storage == "int8")
        return value

    def __setitem__(self, name: str, value: NDArray[Any]) -> None:
        entry = self.entries[self._index[name]]
        if value.shape != entry.shape:
            raise ValueError(f"{name} has shape {value.shape}, expected {entry.shape}")
        if entry.storage == "real":
            self.view(entry)[...] = value
        else:
            whole = np.ascontiguousarray(value, self.dtype)
            core(self.dtype).pack_weights(self.stored(entry), whole, entry.storage == "int8")

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

    def zero(self, entries: Iterable[Entry]) -> None:
        """Set tensors that are stored as they are to 0."""
        for e in entries:
            core(self.dtype).zero(self.view(e).reshape(-1))

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
            h.update(self.stored(e))
        return h.hexdigest()


def digest_of(tensors: Mapping[str, NDArray[Any]], names: Iterable[str]) -> str:
    """`Parameters.digest` of tensors that are read one at a time, `names` in the buffer's order."""
    h = hashlib.sha256()
    for name in names:
        h.update(name.encode())
        h.update(np.ascontiguousarray(tensors[name]))
    return h.hexdigest()
