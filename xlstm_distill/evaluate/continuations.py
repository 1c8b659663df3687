"""Free-running fidelity: what the teacher thinks of text that a student writes by itself.

On given text a student is put right after every token. Here it writes, and goes on from its own
slips. The teacher's negative log-likelihood of the student's continuations is compared with
that of its own continuations of the same prompts, drawn with the same random numbers. An excess of
0 is a student that writes what the teacher would; one that grows with the position drifts away. A
greedy student that repeats itself can have less than the teacher: read the excess at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..errors import UserError
from .fidelity import BUCKETS
from .uncertainty import FloatArray, Interval, paired_bootstrap

_TOKENS_AT_ONCE = 8192


class Writer(Protocol):
    """What is needed of a student."""

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = ...,
        *,
        seed: int = ...,
        stop_ids: Sequence[int] = ...,
    ) -> list[list[int]]:
        """The new tokens of each prompt, row i drawn by (seed, i)."""


class Judge(Writer, Protocol):
    """What is needed of the teacher."""

    def score(self, ids: Any, /) -> NDArray[Any]:
        """Log-probabilities of the next tokens, [B, T - 1], of int ids [B, T]."""


class Continuations(BaseModel):
    """The teacher's nll, in nats a token, of what each model wrote after the same prompts.

    `nll`: name ("teacher" is its own) -> bucket -> prompt; `buckets` are ranges of the position in
    the continuation, end excluded. All continuations have `tokens` tokens.
    """

    model_config = ConfigDict(extra="forbid")

    prompts: int
    prompt_tokens: int
    tokens: int
    temperature: float
    seed: int
    buckets: list[tuple[int, int]]
    nll: dict[str, list[list[float]]]

    def mean(self, model: str, bucket: int | None = None) -> float:
        """Mean nll of a model's continuations, or of one bucket of their positions."""
        return float(self._by_prompt(model, bucket).mean())

    def excess(
        self, model: str, bucket: int | None = None, *, n: int = 10_000, seed: int = 0
    ) -> Interval:
        """`model`'s nll minus the teacher's own, with the paired 95 % interval over prompts."""
        a, b = (self._by_prompt(name, bucket).tolist() for name in (model, "teacher"))
        return paired_bootstrap(a, b, ratio=False, n=n, seed=seed)

    def _by_prompt(self, model: str, bucket: int | None) -> FloatArray:
        if model not in self.nll:
            raise ValueError(f"no model {model!r}; there are {', '.join(self.nll)}")
        values = np.array(self.nll[model])
        if bucket is not None:
            row: FloatArray = values[bucket]
            return row
        sizes = np.array([high - low for low, high in self.buckets])
        return sizes @ values / self.tokens


def continuations(
    models: Mapping[str, Writer],
    teacher: Judge,
    prompts: NDArray[Any],
    *,
    tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Continuations:
    """Let teacher and `models` continue prompts, int ids [prompts, T], and the teacher score all.

    An end-of-text token is a token like others: all continuations have the same length, so that
    none drops out of the later positions. temperature 0 is greedy. `progress(done, total)` counts
    continuations. Raises UserError for bad sizes and where the teacher's nll is not finite.
    """
    if "teacher" in models:
        raise UserError("continuations: the name 'teacher' is the teacher's own", usage=True)
    if tokens < 1 or prompts.ndim != 2 or not prompts.size:
        raise UserError(
            f"continuations: {tokens} tokens after prompts of shape {list(prompts.shape)}; both "
            "need at least one",
            usage=True,
        )
    writers = {"teacher": teacher, **models}
    rows = max(1, _TOKENS_AT_ONCE // (prompts.shape[1] + tokens))
    buckets = [(low, min(high, tokens)) for low, high in BUCKETS if low < tokens]
    found: dict[str, list[FloatArray]] = {name: [] for name in writers}
    done, total = 0, len(prompts) * len(writers)
    for start in range(0, len(prompts), rows):
        batch = prompts[start : start + rows]
        # Rows of a batch draw by their number in it: every batch needs a seed of its own.
        own = int(np.random.SeedSequence([seed, start]).generate_state(1)[0])
        for name, writer in writers.items():
            new = writer.generate_batch(batch.tolist(), tokens, temperature, seed=own, stop_ids=())
            nll = -teacher.score(np.concatenate([batch, new], axis=1))[:, -tokens:]
            if not np.isfinite(nll).all():
                raise UserError(f"continuations: the teacher's nll of {name}'s is not finite")
            found[name].append(nll.astype(np.float64))
            done += len(batch)
            if progress is not None:
                progress(done, total)
    nll_of = {name: np.concatenate(parts) for name, parts in found.items()}
    return Continuations(
        prompts=len(prompts),
        prompt_tokens=prompts.shape[1],
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        buckets=buckets,
        nll={
            name: [nll[:, low:high].mean(axis=1).tolist() for low, high in buckets]
            for name, nll in nll_of.items()
        },
    )
