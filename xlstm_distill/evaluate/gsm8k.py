"""GSM8K with written answers: `gsm8k:generate`, the request set's own prompts continued greedily.

The rule is lm-evaluation-harness's flexible-extract: the last number of the answer counts, commas,
dollar signs and a full stop at its end taken away, and must be spelt as the gold one is (18, not
18.00). An answer ends where the request set says: before an empty line or the next question.

Where the package math-verify (extra `math`) is installed, `math_verify` stands beside it: by that
library's own rules an answer is found in the text and equal to the gold one (18.00 is 18).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..errors import UserError
from .generation import AnswerScore, Question, Questions

if TYPE_CHECKING:
    from .tasks import Document, Task

GSM8K = "gsm8k:generate"

_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_SECONDS = 5
"""Most that math-verify takes to read one text or to compare two answers, as is its default."""


def gsm8k(task: Task, documents: Sequence[Document]) -> Questions:
    """The questions of the request set `task` that are in `documents`.

    Raises UserError where the set does not say how answers are written.
    """
    try:
        settings = task.config["task_config"]["generation_kwargs"]
        most, until = settings["max_gen_toks"], tuple(settings["stop_sequences"])
    except KeyError as error:
        raise UserError(f"task {GSM8K}: config.json of the request set lacks {error}") from None

    def question(index: int) -> Question:
        document = documents[index]
        targets = (str(document.fields["short_answer"]),)
        return Question(document.doc_id, document.pairs[0][0], targets, {})

    also = math_scores()
    judge = {"math_verify": version("math-verify")} if also else {}
    return Questions(
        name=GSM8K,
        count=len(documents),
        question=question,
        original=len(task.documents),
        max_new_tokens=most,
        metric="exact_match",
        score=last_number_matches,
        shots=task.shots,
        config={"request_set": task.config.get("task_hash"), **judge},
        until=until,
        also=also,
    )


def last_number_matches(answer: str, targets: Sequence[str]) -> float:
    """1 if the last number of the answer is spelt as that of the only target, else 0."""
    found = _NUMBER.findall(answer)
    return float(bool(found) and _plain(found[-1]) == _plain(targets[0]))


def math_scores() -> Mapping[str, AnswerScore]:
    """`math_verify`, 1 if an answer is equal to the only target, else 0; empty where math-verify is
    not installed. What takes too long is not equal; outside the main thread nothing is stopped,
    for math-verify measures time by signals."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return {}

    def equal(answer: str, targets: Sequence[str]) -> float:
        is_main = threading.current_thread() is threading.main_thread()
        seconds = _SECONDS if is_main else None
        gold, found = (parse(text, parsing_timeout=seconds) for text in (targets[0], answer))
        return float(verify(gold, found, timeout_seconds=seconds))

    return {"math_verify": equal}


def _plain(number: str) -> str:
    return re.sub(r"[,$]|\.$", "", number)
