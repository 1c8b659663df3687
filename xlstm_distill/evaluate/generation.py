"""Tasks whose answers a model writes: greedy continuations, scored as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..communicator import Communicator
from ..errors import UserError
from ..generate import StopStrings

_TOKENS_AT_ONCE = 16384
"""Most tokens of prompts and answers that are generated together: bounds the states' memory."""

Sample = dict[str, Any]
"""What is kept of one document, as in the samples files."""


class ScoringTokenizer(Protocol):
    """What tasks need of a tokenizer. `adds_bos`: documents start with `bos_id`."""

    bos_id: int | None
    adds_bos: bool
    eos_ids: tuple[int, ...]

    def encode(self, text: str, special: bool = ...) -> list[int]:
        """Token ids of `text`; nothing is added."""


@runtime_checkable
class GeneratingModel(Protocol):
    """What tasks with written answers need of a model; its `tokenizer` also decodes."""

    @property
    def tokenizer(self) -> Any: ...

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = ...,
        *,
        ends: Callable[[list[int]], bool] | None = ...,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the end-of-text token, up to the one after which
        `ends` is true of them; temperature 0: greedy."""


@dataclass(frozen=True)
class Question:
    """A prompt and what its answer is compared with. `facts` go into the sample."""

    doc_id: int
    prompt: str
    targets: tuple[str, ...]
    facts: Mapping[str, Any]


AnswerScore = Callable[[str, Sequence[str]], float]
"""score(answer, targets): 0..1."""


@dataclass(frozen=True)
class Questions:
    """A task with written answers: question(0) to question(count - 1), of the `original` ones that
    it has. `also`: scores beside that of `metric`. An answer ends before the first of `until`."""

    name: str
    count: int
    question: Callable[[int], Question]
    original: int
    max_new_tokens: int
    metric: str
    score: AnswerScore
    shots: int | None
    config: Mapping[str, Any]
    until: tuple[str, ...] = ()
    also: Mapping[str, AnswerScore] = field(default_factory=dict)


def string_match_all(answer: str, targets: Sequence[str]) -> float:
    """The share of `targets` that stand in the answer, in upper or lower case: RULER's score."""
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(target.lower() in text for target in targets) / len(targets)


def answers(
    model: object, task: Questions, done: int, comm: Communicator
) -> Iterator[list[Sample]]:
    """Samples of the task's questions, a batch at a time, from the batch of question `done` on.

    Batches depend on the task alone: one that is taken up again finds the same.
    """
    if not isinstance(model, GeneratingModel):
        raise UserError(f"task {task.name}: the model has no generate_batch")
    tokenizer = model.tokenizer
    stops = StopStrings(tokenizer, task.until)

    def written(batch: list[tuple[Question, list[int]]]) -> list[Sample]:
        prompts = [ids for _, ids in batch]
        new = model.generate_batch(prompts, task.max_new_tokens, 0.0, ends=stops.reached)
        return [
            _sample(task, question, stops.cut(tokenizer.decode(ids)))
            for (question, _), ids in zip(batch, new, strict=True)
        ]

    later = (batch for end, batch in _batches(tokenizer, task) if end > done)
    return comm.map(written, later)


def _batches(
    tokenizer: ScoringTokenizer, task: Questions
) -> Iterator[tuple[int, list[tuple[Question, list[int]]]]]:
    """Questions with the ids of their prompts, and the number of questions so far."""
    batch: list[tuple[Question, list[int]]] = []
    longest = 0
    for number in range(task.count):
        question = task.question(number)
        ids = prompt_ids(tokenizer, question.prompt)
        size = max(longest, len(ids) + task.max_new_tokens)
        if batch and size * (len(batch) + 1) > _TOKENS_AT_ONCE:
            yield number, batch
            batch, size = [], len(ids) + task.max_new_tokens
        batch.append((question, ids))
        longest = size
    if batch:
        yield task.count, batch


def start_id(tokenizer: ScoringTokenizer) -> int:
    """The token that stands where nothing does: the beginning- or end-of-text token. UserError
    where there is neither."""
    for token in (tokenizer.bos_id, *tokenizer.eos_ids):
        if token is not None:
            return token
    raise UserError("an empty context needs a beginning- or end-of-text token")


def prompt_ids(tokenizer: ScoringTokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, behind the beginning-of-text token if the model wants one."""
    ids = tokenizer.encode(prompt, special=False)
    return [tokenizer.bos_id, *ids] if tokenizer.adds_bos and tokenizer.bos_id is not None else ids


def _sample(task: Questions, question: Question, answer: str) -> Sample:
    scores = {task.metric: task.score, **task.also}
    return {
        "doc_id": question.doc_id,
        **question.facts,
        "target": list(question.targets),
        "answer": answer,
        **{metric: score(answer, question.targets) for metric, score in scores.items()},
    }
