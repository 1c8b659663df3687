"""Arrays that grow piece by piece, on disk where they may be larger than memory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .errors import UserError


class Spool:
    """A flat array that is written at its end: in memory, or in a file in the directory `place`.

    The file has no name, so that nothing is left of it when the process ends, however it ends.
    """

    def __init__(self, dtype: DTypeLike, place: Path | None = None) -> None:
        self.dtype, self.place, self.size = np.dtype(dtype), place, 0
        self._file: IO[bytes] = io.BytesIO()
        if place is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 (closed when collected)
            except OSError as error:
                raise self._cannot(error) from None

    def append(self, values: ArrayLike) -> None:
        """Write values behind those that are there. UserError if the disk is full."""
        piece = np.ascontiguousarray(values, dtype=self.dtype)
        try:
            self._file.write(piece.data)
        except OSError as error:
            raise self._cannot(error) from None
        self.size += piece.size

    def array(self) -> NDArray[Any]:
        """All values; of a file a memory map, which is not to be written."""
        if isinstance(self._file, io.BytesIO):
            return np.frombuffer(self._file.getbuffer(), dtype=self.dtype)
        if not self.size:
            return np.empty(0, dtype=self.dtype)
        try:
            self._file.flush()
        except OSError as error:
            raise self._cannot(error) from None
        # A plain view: slices of it are small, and hold the map open.
        return np.asarray(np.memmap(self._file, dtype=self.dtype, mode="r", shape=(self.size,)))

    def _cannot(self, error: OSError) -> UserError:
        return UserError(f"{self.place}: cannot write: {error.strerror or error}")
