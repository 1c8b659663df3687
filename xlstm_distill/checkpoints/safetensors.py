"""safetensors files: validated by the library, read through a memory map, written as a stream.

The library's NumPy front end cannot give bfloat16, and it copies; so it checks the header, and the
bytes are then taken from a memory map, a piece at a time: what has been read of a file larger than
the memory does not stay mapped.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import UserError
from ..families import Shape
from .checkpoint import Array, TensorSource

_Bytes = NDArray[np.uint8]


_PIECE = 1 << 24
"""Numbers that are converted at a time."""


def _from_bf16(raw: _Bytes) -> Array:
    """bfloat16 is the upper half of a float32."""
    wide = raw.view("<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


_READERS: dict[str, tuple[int, Callable[[_Bytes], Array]]] = {
    "F32": (4, lambda raw: raw.view("<f4")),
    "F16": (2, lambda raw: raw.view("<f2").astype(np.float32)),
    "BF16": (2, _from_bf16),
}
"""Bytes of a number, and what they stand for."""


def open_file(path: Path) -> dict[str, TensorSource]:
    """The tensors of one file, in the order of the file; each converted to float32 when read.

    Raises `UserError` naming the file, and the tensor where one is to blame: truncated or damaged
    file, type other than F32, F16 and BF16.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # opening checks lengths, offsets, types and shapes against each other
    except Exception as error:  # the library's own class, OSError and others
        cut = _cut_tensor(path)
        reason = f"cut off in tensor {cut}" if cut else str(error)
        raise UserError(f"{path}: not a valid safetensors file ({reason})") from None
    with path.open("rb") as handle:
        mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    header, start = _header(path)
    return {
        name: _source(path, name, entry, mapping, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _source(
    path: Path, name: str, entry: Mapping[str, Any], mapping: mmap.mmap, start: int
) -> TensorSource:
    if entry["dtype"] not in _READERS:
        raise UserError(
            f"{path}: tensor {name} has type {entry['dtype']}, supported: {', '.join(_READERS)}"
        )
    size, convert = _READERS[entry["dtype"]]
    shape: Shape = tuple(entry["shape"])
    first, last = (start + offset for offset in entry["data_offsets"])
    raw = np.frombuffer(mapping, np.uint8)[first:last]

    def read() -> Array:
        values = np.empty((last - first) // size, dtype=np.float32)
        for at in range(0, len(values), _PIECE):
            piece = values[at : at + _PIECE]
            piece[:] = convert(raw[size * at : size * (at + len(piece))])
            _release(mapping, first + size * at, size * len(piece))
        return values.reshape(shape)

    def rows(wanted: NDArray[np.int64]) -> Array:
        found = raw.reshape(shape[0], -1)[wanted]
        _release(mapping, first, last - first)
        return convert(found.reshape(-1)).reshape(len(wanted), *shape[1:])

    return TensorSource(shape, read, str(path), rows if len(raw) else None)


def _release(mapping: mmap.mmap, first: int, size: int) -> None:
    """Let the kernel have back the pages that hold these bytes; a later look reads them again."""
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, start, first + size - start)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as parsed JSON, and the offset at which the tensors' bytes begin."""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length)), 8 + length


def _cut_tensor(path: Path) -> str | None:
    """The first tensor that reaches beyond the end of a truncated file, if the header stands."""
    try:
        header, start = _header(path)
        size = path.stat().st_size
        ends = {
            name: start + entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, OverflowError, MemoryError, ValueError, KeyError, TypeError, struct.error):
        return None
    beyond = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    return beyond[0] if beyond else None


def write_file(path: Path, tensors: Mapping[str, Array], shapes: Mapping[str, Shape]) -> None:
    """Write float32 tensors in the order of `shapes`, one at a time (memory: one tensor)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned to 8 bytes
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            array = np.ascontiguousarray(tensors[name], dtype="<f4")
            handle.write(array.reshape(-1).view(np.uint8).data)
