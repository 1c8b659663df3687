"""How long work shows itself: a bar on a terminal, plain lines otherwise, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Metrics = Mapping[str, Any]

_LINE_EVERY = 15.0
"""Seconds between plain lines."""


class Reporter:
    """Shows the progress of stages. `quiet` shows nothing but notes."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, markup=False)

    def follow(self, metrics: Iterable[dict[str, Any]], title: str) -> Iterator[dict[str, Any]]:
        """Pass metrics on and show them: `step` of `steps`, rate, loss, the last validation."""
        last: Metrics = {}
        with self.bar(title) as update:
            for m in metrics:
                if "validation" in m:
                    last = {"validation": m["validation"], "validated": m["step"]}
                update({**m, **last})
                yield m

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[Metrics], None]]:
        """A function that shows metrics as they come."""
        if self.quiet:
            yield lambda m: None
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<22}", markup=False),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(title, total=None, figures="")

                def show(m: Metrics) -> None:
                    total, done = m.get("steps"), m.get("step")
                    progress.update(task, total=total, completed=done, figures=_figures(m))

                yield show
        else:
            yield _Lines(self, title)


class _Lines:
    """Plain lines: the first, then one every few seconds, and the last."""

    def __init__(self, reporter: Reporter, title: str) -> None:
        self.reporter, self.title = reporter, title
        self.started = time.monotonic()
        self.shown = float("-inf")
        self.first: int | None = None

    def __call__(self, m: Metrics) -> None:
        now = time.monotonic()
        step, steps = int(m.get("step", 0)), int(m.get("steps", 0))
        if self.first is None:
            self.first = step - 1
        if now - self.shown < _LINE_EVERY and step < steps:
            return
        self.shown = now
        done = step - self.first
        left = (now - self.started) / max(1, done) * (steps - step)
        text = f"{self.title}: {step}/{steps} {_figures(m)}"
        self.reporter.note(text + (f", {_minutes(left)} left" if step < steps else ""))


def _figures(m: Metrics) -> str:
    parts = []
    for key, form in (
        ("loss", "loss {:.4g}"),
        ("relative_error", "error {:.4f}"),
        ("kl", "KL {:.4f}"),
    ):
        if isinstance(m.get(key), float):
            parts.append(form.format(m[key]))
    if isinstance(m.get("validation"), float):
        parts.append(f"validation {m['validation']:.4g} (step {m['validated']})")
    if isinstance(m.get("tokens_per_second"), float):
        parts.append(f"{m['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
