"""Sampling: ragged prompts in one batch that rows join and leave between steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ops
from .errors import UserError
from .rows import checked_ids

if TYPE_CHECKING:
    from .model import Model
    from .state import DecodeState
    from .tokenizer import Tokenizer

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch once fewer than this share of its rows is running."""


def _check(temperature: float, top_p: float, max_new_tokens: int, seed: int) -> None:
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    if not 0 <= seed < 1 << 63:  # beyond it NumPy makes a float of the key: many seeds are one
        raise UserError(f"seed is {seed}, expected 0 to 2^63 - 1")


class StopStrings:
    """Strings that end a text: it is what stands before the first of them."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.stops = tuple(stops)
        # A token has at least a byte: a stop lies within as many tokens as it has bytes. (One with
        # a lone surrogate is in no text.)
        sizes = (len(stop.encode(errors="surrogatepass")) for stop in self.stops)
        self._reach = max(sizes, default=0)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether a stop ends in the last of the tokens (`ends` of generate_batch)."""
        if not self.stops:
            return False
        text = self._tokenizer.decode(ids[-self._reach :])
        return any(stop in text for stop in self.stops)

    def cut(self, text: str) -> str:
        """The text before the first stop."""
        return min((text.partition(stop)[0] for stop in self.stops), key=len, default=text)

    def settled(self, text: str) -> str:
        """The beginning of a growing text that what follows cannot change: without a character
        that is not whole yet, and without what may become a stop."""
        text = text.rstrip("\ufffd")
        held = (n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(held, default=0)]


class Scored(NamedTuple):
    """A token, its log-probability (None: nothing stands before it) and the most probable tokens
    in its place with theirs, best first."""

    token: int
    logp: float | None
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """A prompt and what is written behind it.

    `stream` decides the draws. A token of `stop_ids` ends the row and is not among the new ones;
    one after which `ends(new)` is true ends it too, and is. With `scores_top` (not None) every
    drawn token is noted in `scored`, the stop token too, with so many of the most probable ones;
    with `echo` also the tokens of the prompt. `reason` says why a row no longer runs; whoever
    wants no more of it sets it to "left".
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stream: np.random.Generator
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: Collection[int] = ()
    ends: Callable[[list[int]], bool] | None = None
    scores_top: int | None = None
    echo: bool = False
    new: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reason: Literal["stop", "length", "left"] | None = None

    def take(self, token: int) -> None:
        """The token that was drawn."""
        if token in self.stop_ids:
            self.reason = "stop"
            return
        self.new.append(token)
        if self.ends is not None and self.ends(self.new):
            self.reason = "stop"
        elif len(self.new) >= self.max_new_tokens:
            self.reason = "length"


def random_stream(seed: int, row: int) -> np.random.Generator:
    """The draws of a row: those of other rows and seeds are independent of it."""
    return np.random.Generator(np.random.Philox(key=[seed, row]))


class Batch:
    """Rows that are continued together. Rows join between steps; rows that ended leave by
    themselves. Not safe from several threads at once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rows: list[Row] = []
        """Those of the state; some have ended."""
        self._state: DecodeState | None = None
        self._hidden: NDArray[Any] | None = None  # [rows, d], decides what is drawn next
        self._drawn: NDArray[np.int32] | None = None  # [rows], not yet read

    @property
    def running(self) -> list[Row]:
        """Rows that have not ended."""
        return [row for row in self.rows if row.reason is None]

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of `rows`, together, and let them take part in the next step."""
        model = self.model
        lengths = np.array([len(row.prompt) for row in rows], dtype=np.int32)
        ids = np.zeros((len(rows), int(lengths.max(initial=1))), dtype=np.int32)
        for i, row in enumerate(rows):
            ids[i, : lengths[i]] = checked_ids(row.prompt, model.config.vocab_size)
        hidden, state = model.hidden_after(ids, model.new_state(*ids.shape), lengths)
        for i, row in enumerate(rows):
            if row.echo and row.scores_top is not None:
                row.scored.append(Scored(row.prompt[0], None, []))
                self._score([row] * (lengths[i] - 1), hidden[i, : lengths[i] - 1], row.prompt[1:])
            if row.max_new_tokens == 0:
                row.reason = "length"
        last = hidden[np.arange(len(rows)), lengths - 1]
        self._read()
        if self.rows:
            self._keep(self._running())
        if self._state is None or self._hidden is None:
            self.rows, self._state, self._hidden = list(rows), state, last
        else:
            self.rows = [*self.rows, *rows]
            self._state = self._state.joined(model, state)
            self._hidden = np.concatenate([self._hidden, last])

    def step(self) -> list[Row]:
        """Draw a token for every running row; returns these rows, none where none is left."""
        self._read()
        if self._hidden is None or not self.running:
            self._keep([])
            return []
        logits = self.model.head_logits(self._hidden)
        tokens = self._sample(logits)
        scored = [i for i in self._running() if self.rows[i].scores_top is not None]
        self._score([self.rows[i] for i in scored], self._hidden[scored], tokens[scored].tolist())
        taking = []
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            if row.reason is None:
                row.take(token)
                taking.append(row)
        self._drawn = tokens
        return taking

    def _running(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.reason is None]

    def _read(self) -> None:
        """The model reads what was drawn last; rows that ended are dropped where that pays."""
        if self._drawn is None:
            return
        keep = self._running()
        if len(keep) < _COMPACT_BELOW * len(self.rows):
            self._keep(keep)
        if self._state is not None and self._drawn is not None:
            ended = [i for i, row in enumerate(self.rows) if row.reason is not None]
            self._state.lengths[ended] = 0  # they would go on, and their part of the state grow
            hidden, self._state = self.model.hidden_after(self._drawn[:, None], self._state)
            self._hidden = hidden[:, 0]
        self._drawn = None

    def _keep(self, rows: list[int]) -> None:
        """Drop the other rows and their states."""
        if len(rows) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in rows]
        if self._state is not None:
            self._state = self._state.fork(self.model, rows) if rows else None
        self._hidden = None if self._hidden is None or not rows else self._hidden[rows]
        self._drawn = None if self._drawn is None or not rows else self._drawn[rows]

    def _sample(self, logits: NDArray[Any]) -> NDArray[np.int32]:
        uniform = np.array([row.stream.random() for row in self.rows])
        alike: dict[tuple[float, float], list[int]] = {}
        for i, row in enumerate(self.rows):
            alike.setdefault((row.temperature, row.top_p), []).append(i)
        tokens = np.empty(len(self.rows), dtype=np.int32)
        for (temperature, top_p), rows in alike.items():
            tokens[rows] = ops.sample(logits[rows], temperature, top_p, uniform[rows])
        return tokens

    def _score(self, rows: Sequence[Row], hidden: NDArray[Any], tokens: Sequence[int]) -> None:
        """Note `tokens` [N], each in its row, that follow hidden states [N, d]."""
        if not rows:
            return
        most = max(1, *(row.scores_top or 0 for row in rows))
        labels = np.array(tokens, dtype=np.int32)
        logp, best, best_logp = self.model.score_hidden(hidden, labels, most)
        lists = zip(rows, tokens, logp.tolist(), best.tolist(), best_logp.tolist(), strict=True)
        for row, token, own, ids, theirs in lists:
            top = list(zip(ids, theirs, strict=True))[: row.scores_top]
            # One log-probability a token: two kernels may differ in the last bit.
            row.scored.append(Scored(token, own, [(t, own if t == token else p) for t, p in top]))


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    ends: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to `max_new_tokens` tokens; returns the new tokens of each.

    Rows have their own lengths, positions, random streams (seed, row) and stops: a token of
    `stop_ids` (None: the model's end-of-sequence tokens) ends its row and is not returned; one
    after which `ends(the row's new tokens)` is true ends it too, and is.
    on_tokens(n) hears of n new tokens after each step.
    """
    _check(temperature, top_p, max_new_tokens, seed)
    if len(prompts) == 0:
        return []
    if not all(len(p) for p in prompts):
        raise UserError("a prompt is empty; begin with the model's bos or eos token")
    stops = set(model.config.eos_token_ids if stop_ids is None else stop_ids)
    rows = [
        Row(p, max_new_tokens, random_stream(seed, i), temperature, top_p, stops, ends)
        for i, p in enumerate(prompts)
    ]
    batch = Batch(model)
    batch.join(rows)
    while batch.step():
        if on_tokens is not None:
            on_tokens(len(batch.running))
    return [row.new for row in rows]


def generate(
    model: Model,
    prompt: str | Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
) -> str:
    """Continue one prompt and return the new text; `stream` hears each piece as it is decoded."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: use generate_batch with token ids")
    _check(temperature, top_p, max_new_tokens, seed)
    tokenizer = model.tokenizer
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    if not ids:
        raise UserError("the prompt is empty")
    stops = model.config.eos_token_ids
    row = Row(ids, max_new_tokens, random_stream(seed, 0), temperature, top_p, stops)
    batch = Batch(model)
    batch.join([row])
    shown = ""
    while batch.step():
        text = tokenizer.decode(row.new)
        if stream is not None and not text.endswith("\ufffd") and text != shown:
            stream(text[len(shown) :])  # a character may need several tokens
            shown = text
    return tokenizer.decode(row.new)
