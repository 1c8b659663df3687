"""Which scores may stand side by side.

Other task sets and other metrics cannot be compared at all. Scores that were measured otherwise
(another version of a task, other shots, documents, prompts, seeds) can, but the difference may be
the measurement's: each is named with both values.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from ..errors import UserError
from .scores import ModelScores

_MOST = 5
"""Names that are listed before "and ... more"."""


def check_pair(teacher: ModelScores, student: ModelScores) -> None:
    """Raise UserError where the task sets, or the metrics of a task, are not the same."""
    missing = [t for t in teacher.tasks if t not in student.tasks]
    extra = [t for t in student.tasks if t not in teacher.tasks]
    if missing or extra:
        parts = [f"{student.where} lacks {_listed(missing)}"] if missing else []
        parts += [f"{teacher.where} lacks {_listed(extra)}"] if extra else []
        if len(missing) < len(teacher.tasks):
            parts.append("--tasks names those to compare")
        raise UserError(f"the task sets differ: {'; '.join(parts)}")
    for task, score in teacher.tasks.items():
        other = student.tasks[task]
        if score.metric and other.metric and score.metric != other.metric:
            raise UserError(
                f"task {task}: {teacher.where} has {score.metric}, "
                f"{student.where} has {other.metric}"
            )
        if score.lower_is_better != other.lower_is_better:
            better = {True: "less is better", False: "more is better"}
            raise UserError(
                f"task {task}: {teacher.where}: {better[score.lower_is_better]}, "
                f"{student.where}: {better[other.lower_is_better]}"
            )


def differences(teacher: ModelScores, student: ModelScores) -> list[str]:
    """What was done otherwise, a line each: the field, both values, the tasks. What only one of
    the two sources states is unknown, not different."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for task, score in teacher.tasks.items():
        other = student.tasks[task]
        pairs: list[tuple[str, Any, Any]] = [
            (what, value, other.conditions[what])
            for what, value in score.conditions.items()
            if what in other.conditions
        ]
        if not score.lower_is_better:
            pairs.append(("best possible score", score.unit, other.unit))
        if score.outcomes and other.outcomes:
            a, b = score.outcomes.documents, other.outcomes.documents
            pairs.append(("documents with samples", _only(a, b), _only(b, a)))
        for what, value, others in pairs:
            if value != others:
                found.setdefault((what, _text(value), _text(others)), []).append(task)
    everywhere = len(teacher.tasks)
    return [
        f"{what} of {student.where} is {b}, of {teacher.where} {a}"
        + ("" if len(tasks) == everywhere else f" ({_listed(tasks)})")
        for (what, a, b), tasks in found.items()
    ]


def _only(a: Iterable[Hashable], b: Iterable[Hashable]) -> str:
    """The documents that are in `a` and not in `b`."""
    alone = sorted(str(d[-1] if isinstance(d, tuple) else d) for d in set(a) - set(b))
    return f"with {_listed(alone)}" if alone else "without these"


def _text(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    return ", ".join(listed[:_MOST]) + more
