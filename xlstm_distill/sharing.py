"""What a run can take from others: results of stages whose keys agree, as hard links (copies where
the file system has none) with their lines of the log, so that it stays complete by itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .atomic import atomic_directory
from .recipe import Recipe
from .rundir import STAGES, RunDirectory


@dataclass(frozen=True)
class Part:
    """A stage, or a domain's share of it. `depends`: all that decides its result."""

    place: str
    log: tuple[str, ...]
    depends: dict[str, Any]

    @property
    def stage(self) -> int:
        """Its stage's place in STAGES."""
        return STAGES.index(self.log[-1].split()[0])

    @cached_property
    def key(self) -> str:
        """The same for the same part of two runs."""
        return json.dumps((self.place, self.depends), sort_keys=True)


def parts(recipe: Recipe) -> Iterator[Part]:
    """What a run can take from another one whose recipe agrees in `depends`.

    Titles, budgets, trackers and how often states are saved decide no bit of a result.
    """
    values = recipe.model_dump()
    models = {key: values[key] for key in ("teacher", "compute")}
    text = {"teacher": recipe.teacher, "data": values["data"]}
    sources = {name: domain.sources for name, domain in recipe.data.domains.items()}
    if any(source.kind == "sampled" for own in sources.values() for source in own):
        text.update(models, seed=recipe.seed)
    section = recipe.distill
    rows = {
        "text": text,
        "seed": recipe.seed,
        "reserved": recipe.reserved_rows,
    }
    for name, own in sources.items():
        sampled = [f"sample {name} {n}" for n, s in enumerate(own) if s.kind == "sampled"]
        yield Part(f"data/{name}", (*sampled, f"data {name}"), text)
    student = {**models, "student": values["student"]}
    yield Part("student0", ("linearize",), student)
    stage_one = {key: values[key] for key in ("align", "accumulation")}
    yield Part("aligned", ("align",), {**student, **rows, **stage_one})
    if section.kl_weight and not recipe.targets.online:
        reached = {key: values[key] for key in ("targets", "experts", "generalist")}
        reached.update(steps=section.steps, rows_a_step=section.rows)
        reached["state_passing"] = section.state_passing  # it numbers rows in another way
        for name in recipe.data.domains:
            yield Part(f"targets/{name}", (f"targets {name}",), {**models, **rows, **reached})


def share(
    directory: RunDirectory, recipe: Recipe, others: Mapping[Path, Recipe]
) -> dict[str, Path]:
    """Take from `others` what they have done already; returns place -> the run it came from.

    Files come before the lines of the log, and both steps look at what is there: a kill in between
    is made up for by the next call.
    """
    found: dict[str, Path] = {}
    for part in parts(recipe):
        if directory.done(part.log[-1]):
            continue
        for place, other in others.items():
            if place == directory.path or not any(part == own for own in parts(other)):
                continue
            donor = RunDirectory(place)  # read only: its lock is not taken
            if donor.done(part.log[-1]) is None or not (place / part.place).is_dir():
                continue
            target = directory.path / part.place
            if not target.exists():
                with atomic_directory(target, "config.json") as work:
                    shutil.copytree(
                        place / part.place, work, copy_function=_link, dirs_exist_ok=True
                    )
            elif not _whole(target):
                break  # this run began it by itself, and goes on
            for line in donor.read_log():
                if line.get("stage") in part.log:
                    directory.log(**{**line, "taken_from": place.name})
            found[part.place] = place
            break
    return found


def _whole(place: Path) -> bool:
    """True if the result of a stage stands there, and not only its beginnings."""
    return any((place / name).is_file() for name in ("config.json", "train/manifest.json"))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
