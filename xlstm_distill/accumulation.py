"""One gradient out of the micro-batches of a step, on one rank or on several.

A sum of floating-point numbers depends on its order. "sequence" adds one micro-batch after the
other into one buffer. "tree" adds over a binary tree of the micro-batches' numbers: [0, n) is the
sum of [0, p) and of [p, n), p the largest power of two below n. The tree does not know how many
ranks there are, so neither do the sum's bits; several ranks always add over it. A rank takes
neighbouring micro-batches and adds what lies within its share; then each rank gets the sums of
these subtrees for its shard of the numbers (shards.py), and adds them over the rest of the tree.
Gradients are added in their own dtype (float32), sums of losses in float64 in order.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from .communicator import ALONE, Communicator
from .errors import check_choice
from .parameters import Parameters
from .shards import PIECE, Shards

Order = Literal["sequence", "tree"]
Sums = NDArray[np.float64]
_Part = TypeVar("_Part")


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
        check_choice("accumulation", order, get_args(Order))
        self.shards, self.comm = Shards(params, names, comm), comm
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
        the same sums, and the gradient of its shard; the rest of `grads` is undefined then, until
        `shards.share(grads)`.
        """
        if not self.tree:
            return reduce(np.add, [one(part, grads) for part in parts])
        shares = _Shares(len(parts), self.comm.size)
        self._spare.append(grads)  # the first that is taken, so that it ends as the sum
        found: list[Sums] = []

        def leaf(number: int) -> Parameters:
            buffer = self._spare.pop() if self._spare else grads.zeros_like()
            buffer.zero(self.shards.entries)
            found.append(one(parts[number], buffer))
            return buffer

        def within(low: int, high: int) -> Parameters:
            """The sum of a subtree of this rank's share."""
            if high - low == 1:
                return leaf(low)
            middle = _middle(low, high)
            return self._added(within(low, middle), within(middle, high))

        held = [within(*subtree) for subtree in shares.whole_subtrees(self.comm.rank)]
        if self.comm.size > 1:
            self._scatter(held, shares, grads)
        self._spare = [buffer for buffer in (*self._spare, *held) if buffer is not grads]
        return reduce(np.add, itertools.chain.from_iterable(self.comm.gather(found)))

    def sums(self, parts: Sequence[_Part], one: Callable[[_Part], Sums]) -> Sums:
        """The sums that `one` returns, added, without a gradient."""
        return reduce(np.add, self.comm.map(one, parts))

    def _added(self, left: Parameters, right: Parameters) -> Parameters:
        for piece in self.shards.pieces(0, self.shards.size):
            left.flat[piece.place] += right.flat[piece.place]
        self._spare.append(right)
        return left

    def _scatter(self, held: Sequence[Parameters], shares: _Shares, grads: Parameters) -> None:
        """Set this rank's shard of `grads` to the sum of the subtrees that all ranks hold, a part
        of each shard at a time."""
        ranks = range(self.comm.size)
        ranges = [self.shards.range_of(rank) for rank in ranks]
        at_once = max(1, PIECE // sum(len(shares.whole_subtrees(rank)) for rank in ranks))
        for start in range(0, max(high - low for low, high in ranges), at_once):
            ends = [(low + start, min(low + start + at_once, high)) for low, high in ranges]
            self._scatter_parts(held, shares, ends, grads)

    def _scatter_parts(
        self,
        held: Sequence[Parameters],
        shares: _Shares,
        ends: Sequence[tuple[int, int]],
        grads: Parameters,
    ) -> None:
        """The same for the numbers between `ends` of each rank; there may be none."""
        me = self.comm.rank
        low, high = ends[me]
        others = {r: shares.whole_subtrees(r) for r in range(self.comm.size) if r != me}
        size = max(0, high - low)
        found = {r: np.empty((len(trees), size), grads.dtype) for r, trees in others.items()}
        pieces = [list(self.shards.pieces(*part)) for part in ends]
        # Neither side makes a copy: what is sent lies in the buffers, tensor after tensor.
        sent = {r: [b.flat[piece.place] for b in held for piece in pieces[r]] for r in others}
        received = {
            r: [row[piece.own] for row in rows for piece in pieces[me]] for r, rows in found.items()
        }
        self.comm.exchange(sent, received)
        mine = shares.whole_subtrees(me)
        for piece in pieces[me]:
            sums = {tree: b.flat[piece.place] for tree, b in zip(mine, held, strict=True)}
            for rank, trees in others.items():
                sums |= {t: row[piece.own] for t, row in zip(trees, found[rank], strict=True)}
            total = _total(sums, 0, shares.starts[-1])
            if me > 0:  # it is in the array of the first subtree: the first rank's, there `grads`
                grads.flat[piece.place] = total


def _middle(low: int, high: int) -> int:
    """Where the tree divides [low, high): behind a power of two, the largest below its length."""
    return low + (1 << (high - low - 1).bit_length() - 1)


def _total(sums: Mapping[tuple[int, int], NDArray[Any]], low: int, high: int) -> NDArray[Any]:
    """The sum of [low, high) out of those of its subtrees that are in `sums`, whose arrays change.

    As a closure it would be a cycle, which keeps the arrays until the garbage collector comes.
    """
    if (low, high) in sums:
        return sums[low, high]
    middle = _middle(low, high)
    left = _total(sums, low, middle)
    left += _total(sums, middle, high)
    return left


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
