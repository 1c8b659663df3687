"""TensorBoard and Weights & Biases: the steps of log.jsonl, shown elsewhere.

`log.jsonl` is the record; a tracker gets the same steps, each exactly once, whatever was killed and
done again. The packages are optional, and nothing leaves the machine unless the user asks for it
(WANDB_MODE=online).
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from .atomic import write_text
from .errors import UserError, check_package

Name = Literal["tensorboard", "wandb"]
Metrics = Mapping[str, Any]
Show = Callable[[Metrics], None]

_PACKAGES: dict[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Tracker -> the module that it needs; the extra of the same name installs it."""

_FLUSH_SECONDS = 10
"""So often steps reach an event file that somebody may be watching."""


class Tracker(Protocol):
    """Where the steps of stages are shown."""

    def begin(self, stage: str, logged: Sequence[Metrics], first: int) -> None:
        """A stage goes on with step `first`; `logged` are the steps that log.jsonl has of it."""

    def step(self, stage: str, metrics: Metrics) -> None:
        """Show one step."""

    def end(self, stage: str) -> None:
        """The stage ends or stops; its steps are safe when this returns."""

    def close(self) -> None:
        """The process's work ends."""


class Trackers:
    """The trackers of a run directory, opened when there is a first step to show."""

    def __init__(
        self, names: Sequence[str], run: Path, title: str, recipe: Mapping[str, Any]
    ) -> None:
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(run),
            "wandb": lambda: Wandb(run, title, recipe),
        }
        self._makers = [makers[name] for name in dict.fromkeys(names)]
        self._open: list[Tracker] = []

    @contextmanager
    def stage(self, name: str, logged: Callable[[], Sequence[Metrics]]) -> Iterator[Show]:
        """A function that shows the steps of a stage, each after it was logged.

        logged: gives the steps of the stage that log.jsonl has; asked before the first one.
        """
        before = logged() if self._makers else []
        begun: list[Tracker] = []

        def show(metrics: Metrics) -> None:
            if not self._open:
                self._open = [make() for make in self._makers]
            for tracker in self._open:
                if tracker not in begun:
                    tracker.begin(name, before, metrics["step"])
                    begun.append(tracker)
                tracker.step(name, metrics)

        try:
            yield show
        finally:
            for tracker in begun:
                tracker.end(name)

    def close(self) -> None:
        """End this process's part."""
        for tracker in self._open:
            tracker.close()
        self._open = []


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError, naming the extra to install, if a tracker's package is missing."""
    for name in names:
        check_package(_PACKAGES[name], extra=name, who=f"trackers: {name}")


def scalars(metrics: Metrics) -> Iterator[tuple[str, float]]:
    """The numbers among metrics; a list is `key/0`, `key/1` ..., without what is None."""
    for key, value in metrics.items():
        if key in ("step", "steps", "time", "stage"):
            continue
        if isinstance(value, list):
            numbers = ((i, v) for i, v in enumerate(value) if v is not None)
            yield from ((f"{key}/{i:02}", float(v)) for i, v in numbers)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


class TensorBoard:
    """Event files in `RUN/tensorboard/STAGE/`.

    A stage that goes on gets new ones, with the steps before it from log.jsonl: a kill leaves
    neither gaps nor steps that are there twice.
    """

    def __init__(self, run: Path) -> None:
        self.place = run / "tensorboard"
        self._writers: dict[str, _EventFile] = {}

    def begin(self, stage: str, logged: Sequence[Metrics], first: int) -> None:
        folder = self.place.joinpath(*stage.split())
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writers[stage] = _EventFile(folder)
        for metrics in logged:
            if metrics["step"] < first:
                self.step(stage, metrics)

    def step(self, stage: str, metrics: Metrics) -> None:
        with self._writing(self._writers[stage].folder):
            self._writers[stage].add(metrics)

    def end(self, stage: str) -> None:
        file = self._writers.pop(stage)
        with self._writing(file.folder):
            file.close()

    def close(self) -> None:
        return

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"trackers: tensorboard: {folder}: cannot write: {error.strerror}"
            raise UserError(message) from None


class _EventFile:
    """An event file, written by the caller.

    tensorboardX's SummaryWriter leaves that to a thread: when the disk is full the thread ends, and
    who hands it one more step waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        _import_without_torch()
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self.folder = folder
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = float("-inf")

    def add(self, metrics: Metrics) -> None:
        """The numbers of one step."""
        when = metrics.get("time", time.time())
        for key, value in scalars(metrics):
            summary = self._scalar(key, value)
            event = self._event(summary=summary, step=metrics["step"], wall_time=when)
            self._writer.write_event(event)
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Nothing comes any more."""
        self._writer.close()


def _import_without_torch() -> None:
    """Import tensorboardX without torch, which it imports where that is installed."""
    if "torch" in sys.modules or "tensorboardX" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # its import fails
    try:
        importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


class Wandb:
    """A run of Weights & Biases in `RUN/wandb/`, offline unless WANDB_MODE says otherwise.

    All parts of a run that was continued have one id. Steps that log.jsonl had already are not sent
    again; the one after which a kill came may be missing.
    """

    def __init__(self, run: Path, title: str, recipe: Mapping[str, Any]) -> None:
        import wandb

        file = run / "wandb" / "run-id"
        if not file.is_file():
            write_text(file, secrets.token_hex(8))
        mode: Any = os.environ.get("WANDB_MODE", "offline")  # a word that wandb checks
        try:
            # What init is told holds for the run alone: the package's own telemetry goes by the
            # settings of the process, and looked up its server beside runs that were offline.
            wandb.setup(settings=wandb.Settings(mode=mode))
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "xlstm_distill"),
                name=f"{title}: {run.resolve().name}",
                id=file.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(run),
                mode=mode,
                config=dict(recipe),
            )
        except (wandb.Error, ValueError) as error:  # ValueError: of a mode that is none
            raise UserError(f"trackers: wandb: {error}; WANDB_MODE=offline needs no one") from None
        self._sent: dict[str, int] = {}

    def begin(self, stage: str, logged: Sequence[Metrics], first: int) -> None:
        group = "/".join(stage.split())
        self._run.define_metric(f"{group}/step")
        self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._sent[stage] = max((m["step"] for m in logged), default=0)

    def step(self, stage: str, metrics: Metrics) -> None:
        if metrics["step"] > self._sent[stage]:
            group = "/".join(stage.split())
            values = {f"{group}/{key}": value for key, value in scalars(metrics)}
            self._run.log({f"{group}/step": metrics["step"], **values})

    def end(self, stage: str) -> None:
        return

    def close(self) -> None:
        self._run.finish()
