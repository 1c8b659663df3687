"""What is wrong with a recipe on this machine, found before any work: `run` and `sweep` refuse the
first problem, `validate` names all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import checkpoints
from .align import alignable_layers, trained_layers
from .checkpoints import Checkpoint
from .config import ModelConfig
from .data import MANIFEST
from .errors import UserError
from .evaluate import passages
from .evaluate.names import find_task, source_of
from .evaluate.needle import needle
from .layerwise import check_room, stream_bytes
from .linearize import student_config
from .recipe import DomainSection, Recipe
from .rundir import STAGES, RunDirectory
from .sampling import read_prompts
from .targets import check_rows_before
from .texts import check_path
from .tokenizer import Tokenizer
from .trackers import check_installed

PROBE_ROWS = 2
"""Rows a domain on which stage I's error is measured before and after."""


def check(
    recipe: Recipe,
    stages: Collection[str] = STAGES,
    place: str | Path | None = None,
    teacher: Checkpoint | None = None,
) -> None:
    """Raise the first of `problems`."""
    for problem in problems(recipe, stages, place, teacher):
        raise problem


def problems(
    recipe: Recipe,
    stages: Collection[str] = STAGES,
    place: str | Path | None = None,
    teacher: Checkpoint | None = None,
) -> Iterator[UserError]:
    """What would end a run of `stages`, each problem with its key or file: packages, teacher,
    student, text, targets, request sets. `place`: the run's directory; results that stand there
    need nothing any more. `teacher`: the recipe's, if it is opened already."""
    found = _Problems(recipe, stages, None if place is None else Path(place), teacher)
    yield from found.of("", partial(check_installed, recipe.trackers))
    if place is not None:
        yield from found.of("", lambda: RunDirectory(place).check_recipe(recipe))
    yield from found.of_text()
    yield from found.of_models()
    if "evaluate" in stages:
        yield from found.of_tasks()


class _Problems:
    def __init__(
        self,
        recipe: Recipe,
        stages: Collection[str],
        place: Path | None,
        teacher: Checkpoint | None,
    ) -> None:
        self.recipe, self.stages, self.place, self.teacher = recipe, stages, place, teacher

    def of(self, key: str, look: Callable[[], Any]) -> Iterator[UserError]:
        """The error of `look`, if it has one, with the key."""
        try:
            look()
        except UserError as error:
            yield UserError(f"{key}: {error}", usage=error.usage) if key else error

    def stands(self, result: str) -> bool:
        """True if a result of the run is there."""
        return self.place is not None and (self.place / result).exists()

    # ---- text ---------------------------------------------------------------------------------

    def of_text(self) -> Iterator[UserError]:
        """Files and request sets of the domains whose text is still to be made."""
        left = {
            name: domain
            for name, domain in self.recipe.data.domains.items()
            if not all(self.stands(f"data/{name}/{part}/{MANIFEST}") for part in domain.parts)
        }
        for name, domain in left.items():
            yield from self._of_domain(f"data.domains.{name}", domain)
        section = self.recipe.data.contamination
        for task in section.tasks if section is not None and left else ():
            yield from self.of("data.contamination.tasks", partial(find_task, task))

    def _of_domain(self, key: str, domain: DomainSection) -> Iterator[UserError]:
        for number, source in enumerate(domain.sources):
            where = f"{key}.sources.{number}"
            if source.kind == "files":
                for path in source.paths:
                    yield from self.of(f"{where}.paths", partial(check_path, path))
            elif source.kind == "sampled" and source.prompts is not None:
                prompts = source.prompts
                yield from self.of(f"{where}.prompts", partial(_check_prompts, prompts))
        for task in domain.passages:
            yield from self.of(f"{key}.passages", partial(passages, task))

    # ---- teacher and student ------------------------------------------------------------------

    def of_models(self) -> Iterator[UserError]:
        """The teacher's files, and what the student is to be made of them."""
        try:
            self.teacher = teacher = self.teacher or open_teacher(self.recipe)
            tokenizer = tokenizer_of(teacher, self.recipe.teacher)
            settings = self.recipe.student.model_dump()
            student = student_config(teacher.config, teacher.source, **settings)
        except UserError as error:
            yield error
            return
        yield from self._of_chats(tokenizer)
        if "align" in self.stages:
            yield from self.of("", partial(self._check_student, student))
        if "targets" in self.stages:
            before, length = self.recipe.targets.rows_before, self.recipe.data.length
            yield from self.of("", lambda: check_rows_before(before, length, teacher.config))

    def _of_chats(self, tokenizer: Tokenizer) -> Iterator[UserError]:
        asked = {
            f"data.domains.{name}.sources.{number}.style: chat": "data"
            for name, domain in self.recipe.data.domains.items()
            for number, source in enumerate(domain.sources)
            if source.kind == "sampled" and source.style == "chat"
        }
        if self.recipe.evaluate.chats:
            asked["evaluate.chats"] = "evaluate"
        for key, stage in asked.items():
            if stage in self.stages and tokenizer.chat_template is None:
                yield UserError(
                    f"{key} needs a chat template, which the teacher lacks; leave it out"
                )

    def _check_student(self, config: ModelConfig) -> None:
        """Refuse layers that cannot train, and hidden states without room."""
        recipe, section = self.recipe, self.recipe.align
        if self.stands("aligned.state") or self.stands("aligned"):
            return
        layers = aligned_layers(recipe, config)
        if recipe.distill.train == "mixer" and not alignable_layers(config):
            raise UserError(
                "distill.train: mixer has nothing to train: no layer of this student has tensors "
                "of its own; choose all or lora"
            )
        if not config.has_gates:
            for key, asked in (
                ("distill.window_dropout", recipe.distill.window_dropout),
                ("evaluate.branches", recipe.evaluate.branches),
            ):
                if asked:
                    raise UserError(f"{key} needs a hybrid layer; this student has none")
        if section.order == "step" or not layers:
            return
        measured = PROBE_ROWS + (section.validate_rows if section.validate_every else 0)
        rows = section.steps * section.rows + measured * len(recipe.data.domains)
        state = (self.place or Path()) / "aligned.state"
        place = state if section.stream_place is None else Path(section.stream_place)
        tokens = rows * recipe.data.length
        check_room(place, stream_bytes(config.hidden_size, tokens, section.stream))

    # ---- request sets -------------------------------------------------------------------------

    def of_tasks(self) -> Iterator[UserError]:
        """Request sets that are not there, needles that do not fit into their length."""
        for task in self.recipe.evaluate.tasks:
            yield from self.of("evaluate.tasks", partial(self._check_task, task))

    def _check_task(self, task: str) -> None:
        requests = source_of(task).requests
        if requests is not None:
            find_task(requests)
        elif self.teacher is not None and self.teacher.tokenizer is not None:
            needle(task, self.teacher.tokenizer, seed=self.recipe.seed)


def open_teacher(recipe: Recipe) -> Checkpoint:
    """The files of a recipe's teacher; a name that fetch knows is fetched."""
    try:
        return checkpoints.load(recipe.teacher)
    except UserError as error:
        # Wrong use: the name leads nowhere. Else its files have a fault.
        todo = "; put it there, or name another with --set teacher=MODEL" if error.usage else ""
        raise UserError(f"teacher: {error}{todo}", usage=error.usage) from None


def tokenizer_of(checkpoint: Checkpoint, name: str) -> Tokenizer:
    """The tokenizer of a teacher; UserError if it has none."""
    if checkpoint.tokenizer is None:
        raise UserError(f"{name}: holds no tokenizer; a run needs one")
    return checkpoint.tokenizer


def aligned_layers(recipe: Recipe, config: ModelConfig) -> list[int]:
    """The layers of the student that stage I trains; none: there is no stage I."""
    section = recipe.align
    nothing_of_their_own = section.layers is None and not alignable_layers(config)
    if section.steps == 0 or nothing_of_their_own:
        return []
    return trained_layers(config, section.layers)


def _check_prompts(file: str) -> None:
    check_path(file)
    read_prompts(file)
