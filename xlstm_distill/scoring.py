"""Log-likelihoods of many continuations, each token of each context read once.

Behind a prefix that requests begin with, whose state is kept, each context is read once for all its
continuations: its last hidden state predicts their first tokens, and what is longer goes on from a
fork of its state. Rows are read in batches of like length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .state import DecodeState, state_capacity

if TYPE_CHECKING:
    from .model import Model

Request = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A context and its continuations, token ids"""

_TOKENS_AT_ONCE = 1024
"""Most tokens of a batch, padding included; products are hardly faster with more."""
_CALL_TOKENS = 48
"""Tokens that are read in the time that a call takes beside its tokens (packing of the weights)."""
_STATE_BYTES = 256 << 20
"""Most memory of the states of contexts, and of those that are read at once, a row at least."""


class _Row(NamedTuple):
    """Tokens to read behind row `base` of a state, and what the last of them predict."""

    ids: Sequence[int]
    base: int
    labels: Sequence[int]
    out: NDArray[Any]
    """where what is found of the labels belongs"""


def score_pairs(
    scorer: Callable[[Sequence[Request]], list[list[NDArray[Any]]]],
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
) -> list[NDArray[Any]]:
    """What `scorer` finds of the continuation of each (context, continuation). All pairs of one
    context are one request, so that it is read once."""
    rests: dict[tuple[int, ...], list[Sequence[int]]] = {}
    places = []  # of pairs: the context, and which of its continuations
    for context, rest in pairs:
        own = rests.setdefault(tuple(context), [])
        places.append((tuple(context), len(own)))
        own.append(rest)
    found = dict(zip(rests, scorer(list(rests.items())), strict=True))
    return [found[context][n] for context, n in places]


class Scorer:
    """Scores requests of which most begin with `prefix` (token ids; may be empty), which is read
    once, with the first of them: parameters of the model must not change in between. greedy: also
    finds out which tokens are the most probable ones in their places."""

    def __init__(self, model: Model, prefix: Sequence[int] = (), greedy: bool = False) -> None:
        self.model = model
        self.prefix = list(prefix)
        self.greedy = greedy
        self._behind_prefix: DecodeState | None = None

    def __call__(self, requests: Sequence[Request]) -> list[list[NDArray[Any]]]:
        """Log-probability of every token of each request's continuations, in nats: an array [T] a
        continuation, of the model's dtype. With `greedy` [T, 2]: behind it 1 where greedy decoding
        would write the token, else 0.

        Neither the order of requests nor what else is among them matters, beyond the rounding of
        sums in another order. Raises ValueError for an empty context or continuation, UserError for
        a token id outside the vocabulary.
        """
        if not all(len(context) and all(map(len, rest)) for context, rest in requests):
            raise ValueError("context and continuations need at least one token each")
        dtype, more = self.model.dtype, (2,) * self.greedy
        out = [[np.empty((len(c), *more), dtype=dtype) for c in rest] for _, rest in requests]
        n = len(self.prefix)
        parts: dict[int, list[tuple[Request, list[NDArray[Any]]]]] = {n: [], 0: []}
        for (context, rest), arrays in zip(requests, out, strict=True):
            begins = len(context) > n and list(context[:n]) == self.prefix
            start = n if begins else 0
            parts[start].append(((context[start:], rest), arrays))
        for start, members in parts.items():
            if members:
                self._score(members, self._prefix_state() if start else self.model.new_state(1))
        return out

    def _prefix_state(self) -> DecodeState:
        if self._behind_prefix is None:
            empty = self.model.new_state(1, len(self.prefix))
            _, self._behind_prefix = self.model.hidden_after([self.prefix], empty)
        return self._behind_prefix

    def _score(
        self, requests: Sequence[tuple[Request, list[NDArray[Any]]]], start: DecodeState
    ) -> None:
        """Score requests behind the one row of `start`, into their arrays."""
        whole, shared = [], []
        for (context, rest), out in requests:
            if len(rest) == 1:  # nothing to share: read in one go
                whole.append(_Row([*context, *rest[0][:-1]], 0, rest[0], out[0]))
            else:
                shared.append(((context, rest), out))
        for rows, _ in self._batches(whole, start):
            self._scored(rows, start)
        shared.sort(key=lambda r: len(r[0][0]))
        while shared:
            n = self._states_at_once(start, len(shared[-1][0][0]))
            self._score_shared(shared[-n:], start)
            del shared[-n:]

    def _score_shared(
        self, requests: Sequence[tuple[Request, list[NDArray[Any]]]], start: DecodeState
    ) -> None:
        """Score requests whose contexts are read once each, and their states kept meanwhile."""
        contexts = [_Row(context, 0, (), np.empty(0)) for (context, _), _ in requests]
        seen = int(start.lengths[0]) + max(len(row.ids) for row in contexts)
        states = self.model.new_state(len(contexts), seen)
        last = np.empty((len(contexts), self.model.config.hidden_size), dtype=self.model.dtype)
        for rows, places in self._batches(contexts, start):
            hidden, state = self._hidden(rows, start)
            states.put(places, state)
            last[places] = hidden[range(len(rows)), [len(row.ids) - 1 for row in rows]]
        # What follows the contexts at once needs no more reading.
        every = [
            (n, c, out)
            for n, ((_, rest), arrays) in enumerate(requests)
            for c, out in zip(rest, arrays, strict=True)
        ]
        first = self._values(last[[n for n, _, _ in every]], [c[0] for _, c, _ in every])
        for (_, _, out), value in zip(every, first, strict=True):
            out[0] = value
        longer = [_Row(c[:-1], n, c[1:], out[1:]) for n, c, out in every if len(c) > 1]
        for rows, _ in self._batches(longer, states):
            self._scored(rows, states)

    def _scored(self, rows: Sequence[_Row], state: DecodeState) -> None:
        """Read rows behind those of `state` and score their labels."""
        hidden, _ = self._hidden(rows, state)
        ends = [(len(row.ids) - len(row.labels), len(row.ids)) for row in rows]
        wanted = [hidden[n, begin:end] for n, (begin, end) in enumerate(ends)]
        labels = np.concatenate([row.labels for row in rows])
        values = self._values(np.concatenate(wanted), labels)
        cuts = np.cumsum([len(row.labels) for row in rows])[:-1]
        for row, part in zip(rows, np.split(values, cuts), strict=True):
            row.out[:] = part

    def _values(self, hidden: NDArray[Any], labels: ArrayLike) -> NDArray[Any]:
        """What belongs into the arrays of tokens `labels` [N] that follow hidden states [N, d]."""
        if not self.greedy:
            return self.model.log_likelihoods(hidden, labels)
        labels = np.asarray(labels, dtype=np.int32)
        logp, best, _ = self.model.score_hidden(hidden, labels, 1)
        return np.stack([logp, best[:, 0] == labels], axis=1)

    def _hidden(self, rows: Sequence[_Row], state: DecodeState) -> tuple[NDArray[Any], DecodeState]:
        """Hidden states [B, T, d] of rows behind those of `state`, and the state behind them."""
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int32)
        ids = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row.ids)] = row.ids
        capacity = self._capacity(state, ids.shape[1])
        forked = state.fork(self.model, [row.base for row in rows], capacity)
        return self.model.hidden_after(ids, forked, lengths)

    # ---- batches --------------------------------------------------------------------------------

    def _batches(
        self, rows: Sequence[_Row], state: DecodeState
    ) -> Iterator[tuple[list[_Row], list[int]]]:
        """Rows that are read together behind rows of `state`, with their places: cut, in order of
        length, where padding and calls together cost least."""
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))
        cost, begins = [0], [0]  # of the best batches of the first n; where the last of them begins
        for n, place in enumerate(order, start=1):
            length = len(rows[place].ids)
            earlier = range(max(0, n - self._rows_at_once(state, length)), n)
            cost_of = {i: cost[i] + (n - i) * length + _CALL_TOKENS for i in earlier}
            begin = min(earlier, key=cost_of.__getitem__)
            cost.append(cost_of[begin])
            begins.append(begin)
        n = len(order)
        while n:
            places = order[begins[n] : n]
            yield [rows[place] for place in places], places
            n = begins[n]

    def _rows_at_once(self, state: DecodeState, longest: int) -> int:
        """Rows of up to `longest` tokens that may be read together behind rows of `state`."""
        return max(1, min(_TOKENS_AT_ONCE // longest, self._states_at_once(state, longest)))

    def _states_at_once(self, state: DecodeState, longest: int) -> int:
        """Rows behind `longest` tokens more than rows of `state` that may be held."""
        _, size = self.model.core.plan_list(self.model.capsule, 1, self._capacity(state, longest))
        return max(1, _STATE_BYTES // int(size))

    def _capacity(self, state: DecodeState, new: int) -> int:
        return state_capacity(self.model.config, int(state.lengths.max(initial=0)) + new)
