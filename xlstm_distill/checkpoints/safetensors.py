"""safetensors files: validated by the library, read through a memory map, written as a stream.

The library's NumPy front end cannot give bfloat16, and it copies; so it checks the header, and the
bytes are then taken from a memory map.
"""

from __future__ import annotations

import json
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


def _from_bf16(raw: _Bytes) -> Array:
    """bfloat16 is the upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


_READERS: dict[str, Callable[[_Bytes], Array]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _from_bf16,
}


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
    data: _Bytes = np.memmap(path, dtype=np.uint8, mode="r")
    header, start = _header(path)
    return {
        name: _source(path, name, entry, data[start:])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _source(path: Path, name: str, entry: Mapping[str, Any], body: _Bytes) -> TensorSource:
    reader = _READERS.get(entry["dtype"])
    if reader is None:
        raise UserError(
            f"{path}: tensor {name} has type {entry['dtype']}, supported: {', '.join(_READERS)}"
        )
    shape: Shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    raw = body[first:last]
    return TensorSource(shape, lambda: reader(raw).reshape(shape), str(path))


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
