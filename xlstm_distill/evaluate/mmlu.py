"""MMLU: multiple choice of 57 subjects in four categories (Hendrycks et al., arXiv:2009.03300).

`packages.fetch("olmes")` has it as Arrow files, mmlu/SUBJECT/SPLIT/data-00000-of-00001.arrow. What
they say becomes rows like those of a request set, so that all behind them is one piece of code. The
documents are the test split's, the worked examples the first ones of the dev split, in order. A
prompt opens as the paper's does; the form of its questions is OLMES's (arXiv:2406.08446).

Variants: the answer itself is scored (rc) or its letter (mc), behind five worked examples or none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, short
from ..texts import arrow_rows

_CATEGORIES = {
    "stem": (
        "abstract_algebra",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "anatomy",
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
"""Category -> its subjects."""
VARIANTS = ("rc_5shot", "mc_5shot", "rc_0shot", "mc_0shot")
"""Variants of every subject, the default one first."""
SUBJECTS = {f"mmlu_{s}": s for subjects in _CATEGORIES.values() for s in subjects}
"""Task -> its subject."""
GROUPS = {
    "mmlu": tuple(f"mmlu_{category}" for category in _CATEGORIES),
    **{f"mmlu_{c}": tuple(f"mmlu_{s}" for s in subjects) for c, subjects in _CATEGORIES.items()},
}
"""Group -> the groups or tasks in it."""

_FILE = "data-00000-of-00001.arrow"
_LETTERS = "ABCD"
_OPENING = "This question refers to the following information.\n"
"""What questions on history begin with: a passage follows, and the question is the last line."""


class Requests(NamedTuple):
    """A subject in the form of a request set: `rows` and `config` as its files have them. kind: as
    that of a Task."""

    kind: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]


def tasks_in(group: str) -> list[str]:
    """The tasks of all subjects in a group, each once."""
    return [task for part in GROUPS[group] for task in GROUPS.get(part, (part,))]


def subject_requests(folder: Path, variant: str) -> Requests:
    """Documents of the subject that lies in `folder`, with prompts of a variant.

    Raises UserError in one line that names the file: missing, damaged, too few examples, not four
    choices, an answer out of range; and where pyarrow is not installed.
    """
    letters = variant.startswith("mc_")
    shots = int(variant.removeprefix("mc_").removeprefix("rc_").removesuffix("shot"))
    test, dev = (folder / split / _FILE for split in ("test", "dev"))
    digest = hashlib.sha256()
    opening = (
        "The following are multiple choice questions (with answers) about "
        f"{folder.name.replace('_', ' ')}.\n\n"
    )
    if shots:
        examples = _questions(dev)[:shots]
        if len(examples) < shots:
            raise UserError(f"{dev}: holds {len(examples)} questions, {shots} are needed")
        for example in examples:
            answer = example.continuations(letters)[example.answer]
            opening += f"{example.prompt(letters)}{answer}\n\n"
        digest.update(dev.read_bytes())
    rows = [
        {
            "doc_id": number,
            "native_id": f"{folder.name}/test/{number}",
            "idx": choice,
            "label": question.answer,
            "doc": question.document(),
            "request": {
                "context": opening + question.prompt(letters),
                "continuation": continuation,
            },
        }
        for number, question in enumerate(_questions(test))
        for choice, continuation in enumerate(question.continuations(letters))
    ]
    digest.update(test.read_bytes())
    config = {"task_hash": digest.hexdigest(), "task_config": {"num_shots": shots}}
    # Answers are "choice" also where all documents have the same four (moral_scenarios): a group
    # has the metrics that all its subjects have.
    return Requests("label" if letters else "choice", rows, config)


class _Question(NamedTuple):
    """A question with its four choices; answer: the index of the right one."""

    text: str
    choices: Sequence[str]
    answer: int

    def prompt(self, letters: bool) -> str:
        """What stands before the answer."""
        lines = [f"Question: {self.text}"]
        if letters:
            lines += [f" {a}. {c}" for a, c in zip(_LETTERS, self.choices, strict=True)]
        return "\n".join([*lines, "Answer:"])

    def continuations(self, letters: bool) -> list[str]:
        """The possible answers behind the prompt."""
        return [f" {answer}" for answer in (_LETTERS if letters else self.choices)]

    def document(self) -> dict[str, Any]:
        """Its words, with the passage that other questions may ask about too."""
        document: dict[str, Any] = {"question": self.text, "choices": list(self.choices)}
        if self.text.startswith(_OPENING):
            passage, _, question = self.text.removeprefix(_OPENING).rpartition("\n")
            document = {"passage": passage, **document, "question": question}
        return document


def _questions(file: Path) -> list[_Question]:
    found = []
    for number, row in enumerate(arrow_rows(file), 1):
        text, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{file}: row {number}: question is {short(text)}, expected a text")
        if (
            not isinstance(choices, list)
            or len(choices) != len(_LETTERS)
            or not all(isinstance(choice, str) and choice.strip() for choice in choices)
        ):
            raise UserError(f"{file}: row {number}: choices are {short(choices)}, expected 4 texts")
        if not isinstance(answer, int) or answer not in range(len(_LETTERS)):
            raise UserError(f"{file}: row {number}: answer is {short(answer)}, expected 0 to 3")
        found.append(_Question(text.strip(), [choice.strip() for choice in choices], answer))
    if not found:
        raise UserError(f"{file}: holds no questions")
    return found
