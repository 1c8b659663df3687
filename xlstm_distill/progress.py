"""How long work shows itself: a bar on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .durations import clock

Metrics = Mapping[str, Any]

_LINE_EVERY = 15.0
"""Seconds between plain lines."""
_NARROW = 120
"""Columns of a terminal on which numbers get the room of the bar."""


class Reporter:
    """Shows the progress of stages. `quiet` shows nothing but notes."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        stream = stream or sys.stderr
        # A file stays one where FORCE_COLOR is set: bars would fill it.
        terminal = None if stream is not None and stream.isatty() else False
        self.console = Console(
            file=stream, force_terminal=terminal, highlight=False, soft_wrap=True
        )

    @property
    def _bars_move(self) -> bool:
        """True on a terminal that can rewrite a line."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, markup=False)

    def follow(
        self, lines: Iterable[tuple[str, dict[str, Any]]], titles: Mapping[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Pass (stage, line) on and show the steps among them, each stage with its title: `step` of
        `steps`, rate, loss, the last validation."""
        last: dict[str, Metrics] = {stage: {} for stage in titles}
        with self._bars(titles) as update:
            for stage, m in lines:
                if "validation" in m:
                    last[stage] = {"validation": m["validation"], "validated": m["step"]}
                if "step" in m:
                    update[stage]({**m, **last[stage]})
                yield stage, m

    @contextmanager
    def bar(self, title: str, done: int = 0) -> Iterator[Callable[[Metrics], None]]:
        """A function that shows metrics as they come. done: steps from before, which took none of
        the time that is seen to pass."""
        with self._bars({title: title}, done) as update:
            yield update[title]

    @contextmanager
    def side_by_side(self) -> Iterator[Callable[[str, str], None]]:
        """A function that shows what each of several runs says: (name of the run, a line; "" once
        it is over). On a terminal each has one line, which changes; otherwise lines follow each
        other, each with its run. It may be called from any thread."""
        if self.quiet:
            yield lambda name, line: None
        elif self._bars_move:
            columns = (
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.fields[line]}", markup=False),
            )
            with Progress(*columns, console=self.console) as progress:
                tasks: dict[str, TaskID] = {}

                def show(name: str, line: str) -> None:
                    if line:
                        if name not in tasks:
                            tasks[name] = progress.add_task(name, line=line)
                        progress.update(tasks[name], line=line)
                    elif name in tasks:
                        progress.remove_task(tasks.pop(name))

                yield show
        else:
            yield lambda name, line: self.note(f"{name}: {line}") if line else None

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[str], None]]:
        """A function that shows how far work is whose end is not known: "300 documents"."""
        with self.side_by_side() as show:
            if self._bars_move:
                yield lambda line: show(title, line)
                return
            shown = time.monotonic()  # what takes no longer than a line does not need one

            def now_and_then(line: str) -> None:
                nonlocal shown
                if time.monotonic() - shown >= _LINE_EVERY:
                    shown = time.monotonic()
                    show(title, line)

            yield now_and_then

    @contextmanager
    def in_turn(self, names: Sequence[str]) -> Iterator[Callable[[str, int, int], None]]:
        """A function (name, steps done, steps) that shows each of `names` in a bar of its own, one
        after the other. What the first call for a name finds done was done before."""
        titles = {name: f"{name} ({n} of {len(names)})" for n, name in enumerate(names, 1)}
        updates: dict[str, Callable[[Metrics], None]] = {}
        with ExitStack() as shown:

            def show(name: str, done: int, total: int) -> None:
                if name not in updates:
                    shown.close()  # the bar before
                    updates[name] = shown.enter_context(self.bar(titles[name], done))
                updates[name]({"step": done, "steps": total})

            yield show

    @contextmanager
    def _bars(
        self, titles: Mapping[str, str], done: int | None = None
    ) -> Iterator[dict[str, Callable[[Metrics], None]]]:
        """Such a function for each of several things that go on together. done: steps from before,
        where it is known; else the first call is taken to come behind the first step."""
        if self.quiet:
            yield dict.fromkeys(titles, lambda m: None)
        elif self._bars_move:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description:<22}", markup=False),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                _FiguresColumn(),
            ]
            if self.console.width > _NARROW:
                columns.insert(1, BarColumn(bar_width=28))
            with Progress(*columns, console=self.console) as progress:
                yield {key: _bar(progress, title, done or 0) for key, title in titles.items()}
        else:
            yield {key: _Lines(self, title, done) for key, title in titles.items()}


class _FiguresColumn(ProgressColumn):
    """Loss, rate and so on. The one column that a narrow terminal cuts."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def _bar(progress: Progress, title: str, done: int) -> Callable[[Metrics], None]:
    task = progress.add_task(title, total=None, completed=done, figures="")

    def show(m: Metrics) -> None:
        progress.update(task, total=m.get("steps"), completed=m.get("step"), figures=_figures(m))

    return show


class _Lines:
    """Plain lines: the first, then one every few seconds, and the last."""

    def __init__(self, reporter: Reporter, title: str, first: int | None) -> None:
        self.reporter, self.title, self.first = reporter, title, first
        self.started = time.monotonic()
        self.shown = float("-inf")

    def __call__(self, m: Metrics) -> None:
        now = time.monotonic()
        step, steps = int(m.get("step", 0)), int(m.get("steps", 0))
        if self.first is None:
            self.first = step - 1
        if now - self.shown < _LINE_EVERY and step < steps:
            return
        self.shown = now
        done = step - self.first
        parts = [f"{self.title}: {step}/{steps} {_figures(m)}".rstrip()]
        if done > 0 and step < steps:
            parts.append(f"{clock((now - self.started) / done * (steps - step))} left")
        self.reporter.note(", ".join(parts))


def _figures(m: Metrics) -> str:
    parts = []
    for key, form in (  # a narrow terminal shows the first of them
        ("loss", "loss {:.4g}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("relative_error", "error {:.4f}"),
        ("kl", "KL {:.4f}"),
    ):
        if isinstance(m.get(key), float):
            parts.append(form.format(m[key]))
    if isinstance(m.get("validation"), float):
        parts.append(f"validation {m['validation']:.4g} (step {m['validated']})")
    return ", ".join(parts)
