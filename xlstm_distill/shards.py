"""Which rank holds which of the numbers that train: neighbouring ones, as many on every rank.

The numbers of the trained tensors are counted one tensor after the other, without the gaps between
them and without what is frozen. Each rank makes the optimiser's step of its shard alone, so that it
holds moments for no others, and gives the new values to all. A shard begins at a tensor or where
the core begins a block of a sum of squares: a sum block by block has the same bits however the
numbers are divided.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .communicator import ALONE, Communicator
from .errors import UserError
from .parameters import Entry, Parameters

BLOCK = 16384
"""Numbers that the core adds up by themselves (csrc/ops/adamw.c)."""
PIECE = 1 << 22
"""Numbers of one message: bounds the memory for what is sent and received."""


class Piece(NamedTuple):
    """A tensor, or a part of one that is cut."""

    entry: Entry
    place: slice
    """in the flat buffer"""
    own: slice
    """in the range of numbers that was asked for"""


class Shards:
    """Shards of the tensors `names` of a flat buffer with the plan of `params`.

    `size` numbers in all, `low` to `high` of them on this rank, in the parts `own` of tensors.
    """

    def __init__(self, params: Parameters, names: set[str], comm: Communicator = ALONE) -> None:
        self.entries, self.comm = [e for e in params.entries if e.name in names], comm
        self._itemsize, self._starts, self.size = params.dtype.itemsize, [], 0
        for e in self.entries:
            self._starts.append(self.size)
            self.size += e.size
        self._cuts = [self._cut(self.size * rank // comm.size) for rank in range(comm.size)]
        self._cuts.append(self.size)
        self.low, self.high = self.range_of(comm.rank)
        self.own = list(self.pieces(self.low, self.high))

    def _cut(self, number: int) -> int:
        """The last place up to a number where a shard may begin."""
        start = self._starts[self._entry_of(number)]
        return start + (number - start) // BLOCK * BLOCK

    def _entry_of(self, number: int) -> int:
        return bisect_right(self._starts, number) - 1

    def range_of(self, rank: int) -> tuple[int, int]:
        """The first number of a rank's shard, and the first behind it."""
        return self._cuts[rank], self._cuts[rank + 1]

    def pieces(self, low: int, high: int) -> Iterator[Piece]:
        """The parts of tensors that make up the numbers low to high."""
        first = low
        while first < high:
            number = self._entry_of(first)
            e, start = self.entries[number], self._starts[number]
            end = min(high, start + e.size)
            offset = e.offset // self._itemsize - start
            yield Piece(e, slice(first + offset, end + offset), slice(first - low, end - low))
            first = end

    def read(self, flat: NDArray[Any], low: int, high: int) -> NDArray[Any]:
        """A copy of the numbers low to high of a flat buffer."""
        values: NDArray[Any] = np.empty(high - low, flat.dtype)
        for piece in self.pieces(low, high):
            values[piece.own] = flat[piece.place]
        return values

    def write(self, flat: NDArray[Any], low: int, values: NDArray[Any]) -> None:
        """Set numbers of a flat buffer, from `low` on."""
        for piece in self.pieces(low, low + len(values)):
            flat[piece.place] = values[piece.own]

    def part(self, name: str, values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """This rank's shard of all numbers; UserError, naming them, if they are not as many, or not
        of the dtype."""
        if values.shape != (self.size,) or values.dtype != dtype:
            raise UserError(
                f"saved state: {name} has shape {values.shape} of {values.dtype}, "
                f"expected {(self.size,)} of {dtype}"
            )
        own = values[self.low : self.high]
        return own if self.comm.size == 1 else own.copy()  # a view would keep all numbers

    def share(self, params: Parameters) -> None:
        """Give every rank the numbers of all shards, each from the rank that holds it."""
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        own = self._messages(params.flat, self.comm.rank)
        received = {rank: self._messages(params.flat, rank) for rank in others}
        self.comm.exchange(dict.fromkeys(others, own), received)

    def _messages(self, flat: NDArray[Any], rank: int) -> list[NDArray[Any]]:
        """A rank's shard where it lies in a flat buffer, in parts of at most PIECE numbers."""
        low, high = self.range_of(rank)
        starts = range(low, high, PIECE)
        parts = (self.pieces(start, min(start + PIECE, high)) for start in starts)
        return [flat[piece.place] for piece in itertools.chain.from_iterable(parts)]

    def gathered(self, own: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """On the first rank the numbers of all shards in order, in pieces; the others have none,
        but send theirs (`own`) while they go through it."""
        for rank in range(self.comm.size):
            low, high = self.range_of(rank)
            for start in range(low, high, PIECE):
                if rank == self.comm.rank:
                    piece = own[start - low : start - low + PIECE]
                    if not self.comm.first:
                        self.comm.exchange({0: [piece]}, {})
                elif self.comm.first:
                    piece = np.empty(min(PIECE, high - start), own.dtype)
                    self.comm.exchange({}, {rank: [piece]})
                if self.comm.first:
                    yield piece
