"""One gradient out of the micro-batches of a step, on one rank or on several.

A sum of floating-point numbers depends on its order. "sequence" adds one micro-batch after the
other into one buffer. "tree" adds over a binary tree of the micro-batches' numbers: [0, n) is the
sum of [0, p) and of [p, n), p the largest power of two below n. The tree does not know how many
ranks there are, so neither do the sum's bits; several ranks always add over it. A rank takes
neighbouring micro-batches, adds what lies within its share and sends the sum of a subtree on.
Gradients are added in their own dtype (float32), sums of losses in float64 in order.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .communicator import ALONE, Communicator
from .parameters import Parameters

Order = Literal["sequence", "tree"]
Sums = NDArray[np.float64]
_Part = TypeVar("_Part")

_PIECE = 1 << 22
"""Numbers of one message: bounds the memory for what is received."""


class Accumulation:
    """Adds the gradients of the tensors `names` of a model with the parameters `params`.

    The tree holds as many buffers of gradients at a time as it is deep, and one more.
    """

    def __init__(
        self,
        params: Parameters,
        names: set[str],
        comm: Communicator = ALONE,
        order: Order = "sequence",
    ) -> None:
        self.entries, self.comm = [e for e in params.entries if e.name in names], comm
        self.tree = order == "tree" or comm.size > 1
        self._spare: list[Parameters] = []

    def __call__(
        self,
        parts: Sequence[_Part],
        one: Callable[[_Part, Parameters], Sums],
        grads: Parameters,
    ) -> Sums:
        """Add the gradient of all parts into `grads`, which is 0; returns the sums of all parts.

        `one` adds the gradient of a part into a buffer and returns the part's sums. Every rank gets
        the same.
        """
        if not self.tree:
            return reduce(np.add, [one(part, grads) for part in parts])
        shares = _Shares(len(parts), self.comm.size)
        self._spare.append(grads)  # the first that is taken, so that it ends as the sum
        found: list[Sums] = []

        def leaf(number: int) -> Parameters:
            buffer = self._spare.pop() if self._spare else grads.zeros_like()
            for e in self.entries:
                buffer.view(e).fill(0)
            found.append(one(parts[number], buffer))
            return buffer

        def within(low: int, high: int) -> Parameters:
            """The sum of a subtree of this rank's share."""
            if high - low == 1:
                return leaf(low)
            middle = _middle(low, high)
            return self._added(within(low, middle), within(middle, high))

        # First all that needs no other rank, so that no rank waits for one that still computes.
        held = {subtree: within(*subtree) for subtree in shares.whole_subtrees(self.comm.rank)}

        def across(low: int, high: int) -> Parameters | None:
            """The sum of a subtree, on the rank of its first micro-batch."""
            if (low, high) in held:
                return held.pop((low, high))
            if not shares.touches(self.comm.rank, low, high):
                return None
            middle = _middle(low, high)
            left, right = across(low, middle), across(middle, high)
            here, there = shares.rank_of(low), shares.rank_of(middle)
            if left is not None and right is not None:
                self._added(left, right)
            elif left is not None:
                self._receive(left, there)
            elif right is not None:
                self._send(right, here)
                self._spare.append(right)
            return left

        across(0, len(parts))
        for place in self._places():
            self.comm.spread(grads.flat[place])
        self._spare = [buffer for buffer in self._spare if buffer is not grads]
        return reduce(np.add, itertools.chain.from_iterable(self.comm.gather(found)))

    def sums(self, parts: Sequence[_Part], one: Callable[[_Part], Sums]) -> Sums:
        """The sums that `one` returns, added, without a gradient."""
        return reduce(np.add, self.comm.map(one, parts))

    def _places(self) -> Iterator[slice]:
        """Pieces of the tensors' places in a flat buffer."""
        for e in self.entries:
            first = e.offset * e.size // e.nbytes
            for start in range(first, first + e.size, _PIECE):
                yield slice(start, min(start + _PIECE, first + e.size))

    def _added(self, left: Parameters, right: Parameters) -> Parameters:
        for place in self._places():
            left.flat[place] += right.flat[place]
        self._spare.append(right)
        return left

    def _send(self, grads: Parameters, to: int) -> None:
        for place in self._places():
            self.comm.send(grads.flat[place], to)

    def _receive(self, grads: Parameters, source: int) -> None:
        """Add what another rank sends."""
        piece: NDArray[Any] = np.empty(_PIECE, dtype=grads.dtype)
        for place in self._places():
            received = piece[: place.stop - place.start]
            self.comm.receive(received, source)
            grads.flat[place] += received


def _middle(low: int, high: int) -> int:
    """Where the tree divides [low, high): behind a power of two, the largest below its length."""
    return low + (1 << (high - low - 1).bit_length() - 1)


class _Shares:
    """Neighbouring micro-batches for each rank, as even as can be; the first rank has some."""

    def __init__(self, count: int, ranks: int) -> None:
        self.starts = [-(-count * rank // ranks) for rank in range(ranks + 1)]

    def rank_of(self, number: int) -> int:
        """The rank that has a micro-batch."""
        return bisect_right(self.starts, number) - 1

    def touches(self, rank: int, low: int, high: int) -> bool:
        """True if a rank has micro-batches in [low, high)."""
        return max(low, self.starts[rank]) < min(high, self.starts[rank + 1])

    def whole_subtrees(self, rank: int) -> list[tuple[int, int]]:
        """The largest subtrees that a rank has whole, from the first on."""

        def inside(low: int, high: int) -> Iterator[tuple[int, int]]:
            if not self.touches(rank, low, high):
                return
            if self.starts[rank] <= low and high <= self.starts[rank + 1]:
                yield low, high
                return
            middle = _middle(low, high)
            yield from inside(low, middle)
            yield from inside(middle, high)

        return list(inside(0, self.starts[-1]))
