"""lm-evaluation-harness with our models: `--model xlstm-distill --model_args pretrained=MODEL`.

This is the one module that imports lm_eval (the extra `lm-eval`). Importing it registers the model;
`run_cli` hands over to lm_eval's own command.

Text becomes tokens as lm_eval's `hf` model does it, control tokens written in it included, and
what is too long loses its beginning as there: scores of both are of the same tokens. Rows are
batched by what their contexts share (`_together`, scoring.py), whatever `batch_size` is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from .errors import UserError
from .generate import StopStrings
from .model import Compute, Model, load
from .scoring import Scorer, score_pairs

NAME = "xlstm-distill"

_TOKENS_AT_ONCE = 8192
"""Most tokens of prompts and answers that are written together: bounds the states' memory."""
_TOKENS_SHOWN = 2048
"""Tokens read from which on a batch ends and is seen to be done, and cached."""
_WORTH_SHARING = 12
"""Tokens of a common beginning from which on it is read once."""
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
"""Generation arguments, as `normalize_gen_kwargs` leaves them."""

Request = tuple[Any, list[int], list[int]]
"""lm_eval's: what the cache knows it by, or None; tokens of the context and of the continuation"""
_Row = tuple[list[int], list[int]]
"""Tokens of a context, cut to length, and of the continuation"""


def run_cli(arguments: Sequence[str]) -> None:
    """lm_eval's command `lm-eval` with these arguments; it prints, writes and exits as always."""
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # the one way in that it has
    try:
        utils.setup_logging()
        parser = HarnessCLI()
        parser.execute(parser.parse_args())
    finally:
        sys.argv = before


@register_model(NAME)
class XlstmDistillLM(TemplateLM):
    """A teacher or student of ours for lm_eval.

    pretrained: a model directory, a `.gguf` file, a fetched name or a `Model`; dtype: "f32", "bf16"
    or "int8"; max_length: most tokens of a context and what follows it (default: the model's
    `max_position_embeddings`); max_gen_toks: most new tokens where a task does not say; seed: of
    sampled answers. lm_eval always passes `batch_size`, `max_batch_size` and `device` ("cuda:0"
    unless told otherwise): they change nothing, the model runs on the CPU.

    Raises UserError for a model without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Model,
        dtype: Compute = "f32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, dtype)
        if self.model.tokenizer is None:
            raise UserError(f"{pretrained}: holds no tokenizer; lm_eval needs one")
        self.tokenizer = self.model.tokenizer
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks
        self.seed = seed

    # ---- tokens -------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self.tokenizer.eos_ids:
            raise UserError(f"{self.model.source}: the tokenizer has no end-of-text token")
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context consists of."""
        return self.tokenizer.start_id

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of requests knows the tokenizer by."""
        return self.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, behind the beginning-of-text token if the model wants one, the text does not
        begin with it, and add_special_tokens is not False."""
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode_prompt(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as the model's template writes them; without add_generation_prompt the last
        one is left open, to be continued."""
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        end = text.rfind(last)
        if end < 0:
            raise UserError("chat template: the last message is not in its output as it stands")
        return text[: end + len(last)]

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into `config` of its results."""
        return {
            "model_num_parameters": sum(v.size for v in self.model.tensors().values()),
            "model_dtype": self.model.compute,
            "model_sha": self.model.fingerprint(),
        }

    # ---- log-likelihoods ----------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request the sum of log p of the continuation, and whether it is what greedy
        decoding would write."""
        rows = [self._fitted(context, rest) for _, context, rest in requests]
        out = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for scorer, members in self._batches(rows):
                found = score_pairs(scorer, [rows[i] for i in members])
                for i, values in zip(members, found, strict=True):
                    total = float(np.sum(values[:, 0], dtype=np.float64))
                    if not math.isfinite(total):
                        raise UserError(
                            f"request {i + 1} of {len(rows)}: log-likelihood is {total}"
                        )
                    out[i] = total, bool(values[:, 1].all())
                    if requests[i][0] is not None:  # None: a window of a longer text
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
                bar.update(len(members))
        return out

    def _batches(self, rows: Sequence[_Row]) -> Iterator[tuple[Scorer, list[int]]]:
        """What scores rows, and the numbers of those that are seen to be done together."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for n, (tokens, _) in enumerate(rows):
            numbers.setdefault(tuple(tokens), []).append(n)
        for prefix, contexts in _together(numbers):
            scorer = self.model.scorer(prefix, greedy=True)
            members: list[int] = []
            read = 0
            for context in contexts:
                own = numbers[context]
                members += own
                read += len(context) - len(prefix) + sum(len(rows[n][1]) for n in own)
                if read >= _TOKENS_SHOWN or context is contexts[-1]:
                    yield scorer, members
                    members, read = [], 0

    def _fitted(self, context: list[int], rest: list[int]) -> _Row:
        """The end of the context that leaves room: all tokens but the last are read."""
        room = self.max_length + 1 - len(rest)
        if room < 1:
            raise UserError(
                f"a continuation has {len(rest)} tokens, max_length is {self.max_length}"
            )
        if not rest:
            raise UserError("a continuation adds no token to its context; its task must say more")
        return context[-room:], rest

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of whole texts, each in windows of max_length tokens."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for pair in map(utils.make_disjoint_window, pairs):
                windows.append((None, *pair))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (score, _) in zip(owners, found, strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- texts --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first string of `until`.

        Of a task's generation_kwargs until, max_gen_toks (and its other names), do_sample,
        temperature and top_p are known; UserError for others.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        out = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                wanted = _generation(requests[numbers[0]].args[1], self.max_gen_toks)
                room = self.max_length - wanted.max_new_tokens
                if room < 1:
                    raise UserError(
                        f"max_gen_toks is {wanted.max_new_tokens}, it must be less than max_length "
                        f"{self.max_length}"
                    )
                prompts = {n: self._prompt(requests[n].args[0])[-room:] for n in numbers}
                for batch in _of_like_length(prompts, wanted.max_new_tokens):
                    texts = self._continue([prompts[n] for n in batch], wanted, batch[0])
                    for n, text in zip(batch, texts, strict=True):
                        out[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(batch))
        return out

    def _prompt(self, context: str) -> list[int]:
        return self.tok_encode(context) or [self.prefix_token_id]

    def _continue(self, prompts: list[list[int]], wanted: _Generation, first: int) -> list[str]:
        stops = StopStrings(self.tokenizer, wanted.until)
        new = self.model.generate_batch(
            prompts,
            wanted.max_new_tokens,
            wanted.temperature,
            wanted.top_p,
            self.seed + first,  # another batch, other draws
            ends=stops.reached,
        )
        return [stops.cut(self.tokenizer.decode(ids, skip_special=True)) for ids in new]


@dataclass(frozen=True)
class _Generation:
    """How a task wants its answers written."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float


def _generation(arguments: Mapping[str, Any], max_gen_toks: int) -> _Generation:
    """A task's generation_kwargs, checked."""
    kwargs = normalize_gen_kwargs(dict(arguments), max_gen_toks)
    if unknown := sorted(set(kwargs) - set(_KNOWN)):
        raise UserError(f"generation_kwargs: {unknown[0]} is not known; {', '.join(_KNOWN)} are")
    return _Generation(
        until=tuple(stop for stop in kwargs["until"] if stop),
        max_new_tokens=kwargs["max_gen_toks"],
        temperature=float(kwargs.get("temperature", 0.0)),
        top_p=float(kwargs.get("top_p", 1.0)),
    )


def _together(
    contexts: Iterable[tuple[int, ...]],
) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Tokens worth reading once, and the contexts that begin with them; in the end, with none, the
    contexts that share too little."""
    alone: list[tuple[int, ...]] = []
    members: list[tuple[int, ...]] = []
    shared: tuple[int, ...] = ()
    for context in (*sorted(contexts), ()):  # the empty one ends the last group
        # Something must be left to read behind what is shared.
        common = _common(shared, context[:-1])
        # What the members would share no longer is then read for each of them but one.
        dearer = (len(shared) - common) * (len(members) - 1) >= common
        if common < _WORTH_SHARING or dearer:
            if len(members) > 1:
                yield shared, members
            else:
                alone += members
            members = []
        shared = shared[:common] if members else context[:-1]
        members.append(context)
    if alone:
        yield (), alone


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _of_like_length(prompts: Mapping[int, list[int]], new: int) -> Iterator[list[int]]:
    """Numbers of prompts that are continued together, the longest first."""
    batch: list[int] = []
    for n in sorted(prompts, key=lambda n: -len(prompts[n])):
        longest = len(prompts[batch[0] if batch else n]) + new
        if batch and longest * (len(batch) + 1) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch
