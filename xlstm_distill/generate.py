"""Sampling: ragged prompts in one batch, rows that stop leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import ops
from .errors import UserError

if TYPE_CHECKING:
    from .model import Model
    from .tokenizer import Tokenizer

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from the batch once fewer than this share of its rows is running."""


def _check(temperature: float, top_p: float, max_new_tokens: int) -> None:
    if temperature < 0:
        raise UserError(f"temperature is {temperature}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")


class StopStrings:
    """Strings that end a text: it is what stands before the first of them."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.stops = tuple(stops)
        # A token has at least a byte: a stop lies within as many tokens as it has bytes.
        self._reach = max((len(stop.encode()) for stop in self.stops), default=0)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether a stop ends in the last of the tokens (`ends` of generate_batch)."""
        if not self.stops:
            return False
        text = self._tokenizer.decode(ids[-self._reach :])
        return any(stop in text for stop in self.stops)

    def cut(self, text: str) -> str:
        """The text before the first stop."""
        return min((text.partition(stop)[0] for stop in self.stops), key=len, default=text)


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
    _check(temperature, top_p, max_new_tokens)
    if not all(len(p) for p in prompts):
        raise UserError("a prompt is empty; begin with the model's bos or eos token")
    stops = set(model.config.eos_token_ids if stop_ids is None else stop_ids)
    streams = [
        np.random.Generator(np.random.Philox(key=[seed, row])) for row in range(len(prompts))
    ]
    lengths = np.array([len(p) for p in prompts], dtype=np.int32)
    ids = np.zeros((len(prompts), int(lengths.max(initial=1))), dtype=np.int32)
    for row, p in enumerate(prompts):
        ids[row, : len(p)] = p
    logits, state = model.prefill(ids, lengths=lengths)
    out: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt of each row of the batch
    running = set(rows)
    while True:
        uniform = np.array([streams[row].random() for row in rows])
        tokens = ops.sample(logits, temperature, top_p, uniform)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row not in running:
                continue
            if token in stops:
                running.discard(row)
                continue
            out[row].append(token)
            if len(out[row]) >= max_new_tokens or (ends is not None and ends(out[row])):
                running.discard(row)
        if on_tokens is not None:
            on_tokens(len(running))
        if not running:
            return out
        if len(running) < _COMPACT_BELOW * len(rows):
            keep = [i for i, row in enumerate(rows) if row in running]
            state = model.fork(state, keep)
            rows, tokens = [rows[i] for i in keep], tokens[keep]
        logits, state = model.step(tokens, state)


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
    _check(temperature, top_p, max_new_tokens)
    tokenizer = model.tokenizer
    ids = list(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    if not ids:
        raise UserError("the prompt is empty")
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    logits, state = model.prefill(np.array([ids]))
    new: list[int] = []
    shown = ""
    while len(new) < max_new_tokens:
        token = int(ops.sample(logits, temperature, top_p, random.random(1))[0])
        if token in model.config.eos_token_ids:
            break
        new.append(token)
        if stream is not None:
            text = tokenizer.decode(new)
            if not text.endswith("\ufffd"):  # a character may need several tokens
                stream(text[len(shown) :])
                shown = text
        if len(new) < max_new_tokens:
            logits, state = model.step([token], state)
    return tokenizer.decode(new)
