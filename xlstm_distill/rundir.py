"""A run directory: the lock, the recipe as used, the log, the interrupt.

    recipe.yaml  log.jsonl  data/  student0/  aligned/  targets/  experts/NAME/  merged/
    evaluation/  report/

docs/run_files.md describes the files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .atomic import lock
from .errors import UserError
from .recipe import Recipe, first_difference, load_recipe, save_recipe

STAGES = ("data", "linearize", "align", "targets", "distill", "merge", "evaluate", "report")
"""The stages of a run, in order."""
RECIPE, LOG, LOCK = "recipe.yaml", "log.jsonl", ".lock"
_STOPPING = "stopping as soon as what is done can be saved; asked again, at once"


class Interrupt:
    """Ctrl-C, made polite: the first one ends the work at the next safe place, a second at once.

    `check` raises KeyboardInterrupt once the user has asked; call it where stopping is safe.
    `speaks`: the first one is answered with a line on stderr, since a step may take long.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.asked, self.speaks = False, speaks

    def check(self) -> None:
        """Raise KeyboardInterrupt if the user has asked to stop."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Take over SIGINT, SIGTERM and SIGHUP inside the block (main thread only)."""

        def ask(number: int, frame: FrameType | None) -> None:
            if not self.asked:
                self.asked = True
                self._answer()
            elif number != signal.SIGHUP:  # a terminal that is lost may send several
                raise KeyboardInterrupt

        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            asking.append(signal.SIGHUP)
        before = {s: signal.signal(s, ask) for s in asking}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _answer(self) -> None:
        # The terminal may be gone, and the signal may have come amid another line.
        with suppress(OSError, RuntimeError, ValueError):
            if self.speaks:
                print(_STOPPING, file=sys.stderr, flush=True)


class RunDirectory:
    """An open run directory; one process at a time holds it. Use as a context manager.

    `writes` False: of a job's processes this is not the one that holds it; nothing is logged.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self._lock = -1

    def __enter__(self) -> RunDirectory:
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileExistsError:
            raise UserError(f"{self.path}: is not a directory; choose another --out") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {error.strerror}") from None
        lock(self._lock, self.path)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            os.close(self._lock)  # the kernel frees the lock, after a kill as well

    # ---- the recipe ---------------------------------------------------------------------------

    @property
    def has_recipe(self) -> bool:
        """True if the run has begun."""
        return (self.path / RECIPE).is_file()

    def recipe(self) -> Recipe:
        """The recipe that the run began with."""
        return load_recipe(self.path / RECIPE)

    def check_recipe(self, recipe: Recipe) -> None:
        """UserError naming the key if the run began with another recipe."""
        difference = first_difference(self.recipe(), recipe) if self.has_recipe else None
        if difference:
            raise UserError(
                f"{self.path}: the run began with another recipe: {difference}; choose another "
                "--out"
            )

    def begin(self, recipe: Recipe) -> Recipe:
        """Begin a run, or continue one that has the same recipe.

        Raises UserError naming the key if the run began with another recipe, or if the directory
        holds something else.
        """
        if self.has_recipe:
            self.check_recipe(recipe)
            return recipe
        foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise UserError(
                f"{self.path}: holds {foreign[0]} but no {RECIPE}: not a run directory; choose "
                "another --out"
            )
        save_recipe(recipe, self.path / RECIPE)
        return recipe

    def change(self, recipe: Recipe) -> None:
        """Go on with another recipe; the stages that are done must not depend on the difference."""
        save_recipe(recipe, self.path / RECIPE)

    # ---- the log ------------------------------------------------------------------------------

    def log(self, stage: str, **values: Any) -> None:
        """Append one line to log.jsonl."""
        if not self.writes:
            return
        line = json.dumps({"stage": stage, **values, "time": round(time.time(), 3)})
        try:
            with (self.path / LOG).open("ab+") as handle:
                if handle.tell() > 0:
                    handle.seek(-1, os.SEEK_END)
                    if handle.read(1) != b"\n":  # a kill cut the line before
                        handle.write(b"\n")
                handle.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.path / LOG}: cannot write: {error.strerror}") from None

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl; one that a kill cut short is left out."""
        found: list[dict[str, Any]] = []
        try:
            text = (self.path / LOG).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return found
        for line in text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found

    def steps(self, stage: str) -> list[dict[str, Any]]:
        """The metrics of each step of a stage in order; a step that was done again counts once."""
        latest = {
            line["step"]: line
            for line in self.read_log()
            if line.get("stage") == stage and "step" in line
        }
        return [latest[step] for step in sorted(latest)]

    def done(self, stage: str) -> dict[str, Any] | None:
        """The line that the end of a stage left in the log; the last one, if there are several."""
        lines = [x for x in self.read_log() if x.get("stage") == stage and x.get("event") == "done"]
        return lines[-1] if lines else None
