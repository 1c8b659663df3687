"""What a recipe needs of memory and disk, stage by stage: from sizes alone, without a model.

A model is its tensors, a workspace is as large as the core asks for (`model.work_nbytes`), and
stages follow each other, so that the most memory is that of the largest one. Counted is one
process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .align import alignable_layers, trained_layers
from .config import ModelConfig
from .evaluate.fidelity import TOKENS_AT_ONCE
from .families import tensor_shapes
from .layerwise import layer_config, stream_bytes
from .linearize import student_config
from .lora import sizes
from .model import Work, state_nbytes, work_nbytes
from .optim import in_mixer
from .recipe import (
    AlignSection,
    DistillSection,
    FilesSource,
    Recipe,
    SampledSource,
    StdlibSource,
)
from .sources import stdlib_files
from .targets import ROWS_PER_SHARD, SHARDS_IN_MEMORY
from .texts import files_of

SAMPLE_FILLED = 0.75
"""Share of `max_new_tokens` that a sampled document has on average: many end by themselves."""
_MIB = 2**20
_PROCESS = 300 * _MIB
"""Memory beside what is counted: Python and its libraries, the text, what was mapped of files."""
_BYTES_A_TOKEN = 4
"""Text that a token stands for, about."""
_PROMPT = 64
"""Tokens of a prompt, at most."""
CALIBRATION_ROW, SAMPLE_BATCH = 1024, 64
"""Tokens of the row that the calibration trains on, and documents that it writes at a time."""


def text_bytes(recipe: Recipe) -> float:
    """Bytes of text that are read; of records a little more than their text. A file that is not
    there has none."""
    total = 0.0
    for domain in recipe.data.domains.values():
        for source in domain.sources:
            if isinstance(source, FilesSource):
                total += sum(_size(file) for path in source.paths for file in files_of(path))
            elif isinstance(source, StdlibSource):
                whole = sum(map(_size, stdlib_files()))
                enough = source.max_tokens
                total += whole if enough is None else min(whole, _BYTES_A_TOKEN * enough)
    return total


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def sampled_tokens(recipe: Recipe) -> float:
    """Tokens that the teacher writes."""
    return sum(
        source.documents * source.max_new_tokens * SAMPLE_FILLED
        for domain in recipe.data.domains.values()
        for source in domain.sources
        if isinstance(source, SampledSource)
    )


def stage_one_tokens(recipe: Recipe, config: ModelConfig) -> int:
    """Tokens of all steps of stage I, 0 where there is none."""
    student = student_config(config, recipe.teacher, **recipe.student.model_dump())
    steps = recipe.align.steps if alignable_layers(student) else 0
    return steps * recipe.align.rows * recipe.data.length


def target_rows(recipe: Recipe) -> float:
    """Rows of which targets are stored; experts and the generalist share those of a domain."""
    wanted = dict.fromkeys(recipe.data.domains, 0.0)
    for name, shares in recipe.trained.items():
        rows = recipe.steps_of(name) * recipe.distill.rows / sum(shares.values())
        for domain, share in shares.items():
            wanted[domain] = max(wanted[domain], rows * share)
    stored = recipe.distill.kl_weight > 0 and not recipe.targets.online
    return sum(wanted.values()) if stored else 0.0


def available_memory() -> int:
    """Bytes that this machine can still give without taking them from others."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@dataclass(frozen=True)
class Room:
    """The room that a recipe needs; `config` is the teacher's."""

    recipe: Recipe
    config: ModelConfig

    @cached_property
    def student(self) -> ModelConfig:
        """The student's configuration."""
        settings = self.recipe.student.model_dump()
        return student_config(self.config, self.recipe.teacher, **settings)

    # ---- models -------------------------------------------------------------------------------

    @cached_property
    def student_bytes(self) -> int:
        """A student in memory or on the disk."""
        return _bytes(self.student)

    @cached_property
    def _mixer_bytes(self) -> int:
        """The student's own tensors, those that stage I trains."""
        if not alignable_layers(self.student):
            return 0
        layers = trained_layers(self.student, self.recipe.align.layers)
        return self._own_bytes(tuple(f"model.layers.{layer}." for layer in layers))

    def _own_bytes(self, within: str | tuple[str, ...] = "") -> int:
        """The tensors that the student has beside its teacher's."""
        shapes = tensor_shapes(self.student).items()
        own = (math.prod(s) for n, s in shapes if in_mixer(n) and n.startswith(within))
        return 4 * sum(own)

    @cached_property
    def _largest_tensor(self) -> int:
        return 4 * max(map(math.prod, tensor_shapes(self.student).values()))

    @cached_property
    def _teacher_bytes(self) -> int:
        return _bytes(self.config)

    # ---- memory -------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> dict[str, int]:
        """The most memory of each stage, in MiB."""
        stages = {
            "data": self._data(),
            "linearize": 2 * self._largest_tensor,  # as it is read, as it is written
            "align": self._align(),
            "targets": self._targets(),
            "distill": max(self._distill(), self._validation()),
            "merge": (2 + len(self.recipe.experts)) * self._largest_tensor,
            "evaluate": self._evaluate(),
        }
        return {stage: round((size + _PROCESS) / _MIB) for stage, size in stages.items()}

    def _data(self) -> int:
        found = [0]
        for domain in self.recipe.data.domains.values():
            for source in domain.sources:
                if isinstance(source, SampledSource):
                    rows = min(source.batch, source.documents)
                    found.append(self._writing(rows, _PROMPT + source.max_new_tokens))
        return max(found)

    def _writing(self, rows: int, tokens: int) -> int:
        """The teacher and, with mixed, its copy in bf16 that writes; the state of a batch."""
        copy = self._teacher_bytes // 2 if self.recipe.compute == "mixed" else 0
        state = state_nbytes(self.config, tokens, rows)
        work = work_nbytes(self.config, "forward", rows, _PROMPT)
        return self._teacher_bytes + copy + state + work

    def _align(self) -> int:
        recipe, section = self.recipe, self.recipe.align
        if not stage_one_tokens(recipe, self.config):
            return 2 * self._largest_tensor
        rows, length = section.micro_rows or section.rows, recipe.data.length
        if section.order == "step":
            # Gradients, and what is copied; a tensor as it is read.
            work = work_nbytes(self.student, "align", rows, length) + self._largest_tensor
            trained = (1 + _copies(section)) * self._mixer_bytes
            return self._teacher_bytes + self.student_bytes + trained + work
        layer = layer_config(self.student, alignable_layers(self.student)[0])
        work = work_nbytes(layer, "align", rows, length)
        mixer = self._mixer_bytes // len(trained_layers(self.student, section.layers))
        hidden = 4 * section.rows * length * self.student.hidden_size
        trained = (1 + _copies(section)) * mixer
        tensor = 4 * max(map(math.prod, tensor_shapes(layer).values()))  # as it is read
        training = _bytes(layer) + trained + work + 2 * hidden + tensor
        return max(training, 2 * self._largest_tensor)  # or when the student is written

    def _one_row(self) -> int:
        """What the teacher works in to give the targets of a row."""
        recipe = self.recipe
        length, k = recipe.data.length, min(recipe.targets.k, self.config.vocab_size)
        tokens = length * (1 + recipe.targets.rows_before)
        forward = work_nbytes(self.config, "forward", 1, tokens)
        return max(forward, work_nbytes(self.config, "head", 1, length, k))

    def _targets(self) -> int:
        if not target_rows(self.recipe):
            return 0
        shard = ROWS_PER_SHARD * self.recipe.data.length * self._target_bytes
        return self._teacher_bytes + self._one_row() + 3 * shard

    def _validation(self) -> int:
        """The teacher's targets of the rows that are set aside, before stage II begins."""
        section = self.recipe.distill
        asked = section.validate_every and section.kl_weight
        return self._teacher_bytes + self._one_row() if asked else 0

    def _distill(self) -> int:
        recipe, section = self.recipe, self.recipe.distill
        length, rows = recipe.data.length, min(section.micro_rows, section.rows)
        k = min(recipe.targets.k, self.config.vocab_size) if section.kl_weight else 0
        kind: Work = "recompute" if section.recompute else "train"
        streams = 0
        if section.state_passing:  # those of all rows, and of a step's once more
            one = state_nbytes(self.student, length, section.rows)
            streams = (len(recipe.data.domains) + 1) * one
        teacher = 0
        if section.kl_weight and recipe.targets.online:
            teacher = self._teacher_bytes + self._one_row()
        shards = 0
        if target_rows(recipe):
            shards = SHARDS_IN_MEMORY * ROWS_PER_SHARD * length * self._target_bytes
        work = work_nbytes(self.student, kind, rows, length, k)
        return self.student_bytes + self._trained + work + streams + teacher + shards

    @property
    def _trained(self) -> int:
        """What is held for each number that trains in stage II: its gradient, a buffer of it for
        every level of a tree, copies; of an adapter also the matrices as they were."""
        section = self.recipe.distill
        levels = 0
        if self.recipe.accumulation == "tree":
            levels = (-(-section.rows // section.micro_rows) - 1).bit_length()
        copies = _copies(section)
        if section.train == "lora":
            matrices, factors = sizes(self.student, section.lora.rank, section.lora.targets)
            own = self._own_bytes() + 4 * factors
            return (2 + levels) * 4 * matrices + (2 + copies) * own
        size = self.student_bytes if section.train == "all" else self._own_bytes()
        return (1 + levels + copies) * size

    def _evaluate(self) -> int:
        """Teacher, control, merged model, generalist and experts, all of them at a time, each with
        what it works in."""
        recipe, section = self.recipe, self.recipe.evaluate
        students = 1 + (recipe.generalist is not None)
        if len(recipe.experts) > 1 and any(s.expert_windows for s in section.fidelity):
            students += len(recipe.experts)
        models = 2 * self._teacher_bytes + students * self.student_bytes
        most = 0
        for one in section.fidelity:
            rows = max(1, min(one.windows, TOKENS_AT_ONCE // one.context))
            forward = work_nbytes(self.student, "forward", rows, one.context)
            head = work_nbytes(self.config, "head", 1, rows * one.context)
            hidden = 4 * rows * one.context * self.config.hidden_size
            work = (students + 1) * (forward + hidden) + max(forward, head) + hidden
            most = max(most, work)
        return models + most

    @property
    def calibration(self) -> int:
        """Bytes that the calibration takes: it holds what it measures side by side."""
        k = min(self.recipe.targets.k, self.config.vocab_size)
        work = work_nbytes(self.student, "train", 1, CALIBRATION_ROW, k)
        writing = self._writing(SAMPLE_BATCH, _PROMPT)
        return writing + self.student_bytes * 2 + self._trained + work + _PROCESS

    # ---- disk ---------------------------------------------------------------------------------

    @property
    def _target_bytes(self) -> int:
        """Bytes of the targets of a position: ids with float16 or, of draws, with counts: no more
        tokens than draws, and mostly far fewer."""
        k = min(self.recipe.targets.k, self.config.vocab_size)
        return k * ((2 if self.config.vocab_size <= 1 << 16 else 4) + 2) + 4

    @property
    def disk_mib(self) -> int:
        """The most disk at any time, in MiB: a state is whole beside the one that it replaces until
        it is renamed, and a stage's result stands before its state is removed."""
        return round(max(self._held_on_disk()) / _MIB)

    def _held_on_disk(self) -> Iterator[float]:
        recipe, section, model = self.recipe, self.recipe.align, self.student_bytes
        a_token = 2 if self.config.vocab_size <= 1 << 16 else 4
        tokens = text_bytes(recipe) / _BYTES_A_TOKEN + sampled_tokens(recipe)
        yield tokens * (4 + 2 * a_token)  # as it is read, as it is encoded, as it is written
        held = tokens * a_token + model
        state = _copies(section) * self._mixer_bytes if stage_one_tokens(recipe, self.config) else 0
        working = 2 * state
        if section.order == "layer" and state:
            layers = len(trained_layers(self.student, section.layers))
            hidden = stream_bytes(
                self.config.hidden_size, stage_one_tokens(recipe, self.config), section.stream
            )
            working = self._mixer_bytes + 2 * state // layers
            working += hidden if section.stream_place is None else 0
            state = self._mixer_bytes
        yield held + working
        yield held + state + model
        held += model
        held += target_rows(recipe) * recipe.data.length * self._target_bytes
        state = self._state_bytes
        for _ in recipe.trained:
            yield held + 2 * state
            yield held + state + model
            held += model
        yield held + model

    @property
    def _state_bytes(self) -> int:
        """A saved state of stage II."""
        section = self.recipe.distill
        copies = _copies(section)
        if section.train == "lora":
            _, factors = sizes(self.student, section.lora.rank, section.lora.targets)
            return copies * (self._own_bytes() + 4 * factors)
        return copies * (self.student_bytes if section.train == "all" else self._own_bytes())


def _copies(section: AlignSection | DistillSection) -> int:
    """Of what trains: two moments, the values themselves while a state is written or read, the
    running mean, the best values."""
    return 3 + (section.average is not None) + (section.keep == "best")


def _bytes(config: ModelConfig) -> int:
    return 4 * sum(map(math.prod, tensor_shapes(config).values()))
