"""Teacher, students and control side by side: Win-and-Tie that knows which benchmarks say nothing.

A benchmark on which a student that learnt nothing (the untrained window + sinks control) does as
well as the teacher cannot show what distillation gave. It is marked, and alpha* is also given over
the benchmarks that separate the two.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..errors import UserError
from .tasks import read_results
from .wintie import WinTie, preferred_metric, split_groups

Results = Mapping[str, Any] | str | Path
"""Results of `evaluate` or of lm-evaluation-harness, or a file of them."""


class Benchmark(BaseModel):
    """One benchmark. `scores` and `recovery` go by model name ("teacher" in scores only).

    advantage: the teacher's lead over the control (positive: the teacher is better), with its
    paired standard error `advantage_stderr`; None without a control. separates: False where the
    control ties the teacher, so that the benchmark says nothing; None without a control.
    """

    model_config = ConfigDict(extra="forbid")

    task: str
    metric: str
    lower_is_better: bool
    samples: int | None = None
    scores: dict[str, float]
    recovery: dict[str, float | None]
    advantage: float | None = None
    advantage_stderr: float | None = None
    paired: bool | None = None
    separates: bool | None = None


class Curve(BaseModel):
    """alpha* and coverage of one student over one group of benchmarks."""

    model_config = ConfigDict(extra="forbid")

    alpha_star: float
    alphas: list[float]
    coverage: list[float]


class Group(BaseModel):
    """Win-and-Tie over some benchmarks. kind: "accuracy" or "likelihood"; separating: whether only
    benchmarks on which the control loses are in it."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    separating: bool
    tasks: list[str]
    students: dict[str, Curve]

    @property
    def title(self) -> str:
        """For figures and tables: which benchmarks these are."""
        return f"{self.kind}, {'separating' if self.separating else 'all'} {len(self.tasks)}"


class Comparison(BaseModel):
    """All benchmarks and Win-and-Tie over all of them and over the separating ones."""

    model_config = ConfigDict(extra="forbid")

    control: str | None
    students: list[str]
    benchmarks: list[Benchmark]
    groups: list[Group]

    def alpha_star(self, kind: str = "accuracy", separating: bool = False) -> dict[str, float]:
        """alpha* by student; empty where there are no such benchmarks."""
        for group in self.groups:
            if group.kind == kind and group.separating == separating:
                return {name: curve.alpha_star for name, curve in group.students.items()}
        return {}

    def write(self, directory: str | Path) -> list[Path]:
        """Write comparison.json, comparison.csv, and curves and recovery as SVG."""
        from .. import plots  # slow to import

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "comparison.json", folder / "comparison.csv"]
        text = json.dumps(self.model_dump(), indent=1, allow_nan=False)
        files[0].write_text(text + "\n", encoding="utf-8")
        with files[1].open("w", newline="", encoding="utf-8") as handle:
            rows = self.rows()
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for group in self.groups:
            suffix = "_separating" if group.separating else ""
            target = folder / f"win_and_tie_{group.kind}{suffix}.svg"
            files.append(plots.save(plots.coverage_curves(_curves(group), group.title), target))
        files.append(plots.save(plots.recovery_bars(*self.recovery()), folder / "recovery.svg"))
        return files

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per benchmark, for CSV and tables; None is an empty cell."""
        return [
            {
                "task": b.task,
                "metric": b.metric,
                "samples": b.samples,
                "teacher": b.scores["teacher"],
                **{name: b.scores[name] for name in self.students},
                **{f"{name} recovery": b.recovery[name] for name in self.students},
                "teacher over control": b.advantage,
                "standard error": b.advantage_stderr,
                "says nothing": None if b.separates is None else not b.separates,
            }
            for b in self.benchmarks
        ]

    def recovery(self) -> tuple[list[str], dict[str, list[float | None]]]:
        """(benchmarks, student -> recovery rates); those that say nothing have an asterisk."""
        names = [b.task + ("" if b.separates is not False else " *") for b in self.benchmarks]
        return names, {s: [b.recovery[s] for b in self.benchmarks] for s in self.students}

    def table(self) -> str:
        """Scores, recovery and alpha* as text."""
        from rich.console import Console

        console = Console(width=60 + 30 * len(self.students))
        with console.capture() as text:
            for table in self.tables():
                console.print(table)
        return text.get()

    def tables(self) -> list[Any]:
        """The same as two `rich` tables."""
        from rich.table import Table

        scores = Table(
            title="Benchmarks (* says nothing: the control ties the teacher)", title_justify="left"
        )
        scores.add_column("benchmark")
        scores.add_column("metric")
        scores.add_column("teacher", justify="right")
        for name in self.students:
            scores.add_column(name, justify="right")
            scores.add_column("recovery", justify="right")
        for b in self.benchmarks:
            cells = [b.task + (" *" if b.separates is False else ""), b.metric.partition(",")[0]]
            cells.append(f"{b.scores['teacher']:.4f}")
            for name in self.students:
                recovery = b.recovery[name]
                cells += [f"{b.scores[name]:.4f}", "n/a" if recovery is None else f"{recovery:.3f}"]
            scores.add_row(*cells)
        stars = Table(title="Win-and-Tie: alpha*", title_justify="left")
        stars.add_column("benchmarks")
        for name in self.students:
            stars.add_column(name, justify="right")
        for group in self.groups:
            values = [f"{curve.alpha_star:.4f}" for curve in group.students.values()]
            stars.add_row(group.title, *values)
        return [scores, stars]


def _curves(group: Group) -> dict[str, tuple[list[float], list[float]]]:
    return {name: (c.alphas, c.coverage) for name, c in group.students.items()}


def compare(
    teacher: Results,
    students: Mapping[str, Results],
    *,
    control: str | None = None,
    tasks: Sequence[str] | None = None,
    out: str | Path | None = None,
) -> Comparison:
    """Compare results of students with the teacher's.

    control: the name (among `students`) of the untrained control. A benchmark says nothing where
    the control's score reaches the teacher's or lies within one standard error of their difference
    (paired over documents where both have samples of the same documents, else from the two standard
    errors; without either, only reaching counts). tasks: only these. out: a directory that gets
    JSON, CSV and plots. Raises UserError for other task sets, metrics or an unknown control.
    """
    if control is not None and control not in students:
        raise UserError(f"control {control!r} is not among the students", usage=True)
    if "teacher" in students:
        raise UserError("a student cannot be named 'teacher'", usage=True)
    reference = _loaded(teacher, "teacher", tasks)
    others = {name: _loaded(results, name, tasks) for name, results in students.items()}
    groups = split_groups(reference, others)
    benchmarks = []
    for kind, result in groups.items():
        for task in result.tasks:
            benchmarks.append(
                _benchmark(task, kind, result, reference, others.get(control or ""), control)
            )
    order = {task: i for i, task in enumerate(reference["results"])}
    benchmarks.sort(key=lambda b: order[b.task])
    found = [_group(kind, False, result) for kind, result in groups.items()]
    if control is not None:
        kept = [b.task for b in benchmarks if b.separates]
        if kept:
            inside = split_groups(
                _only(reference, kept, "teacher"),
                {name: _only(results, kept, name) for name, results in others.items()},
            )
            found += [_group(kind, True, result) for kind, result in inside.items()]
    comparison = Comparison(
        control=control, students=list(students), benchmarks=benchmarks, groups=found
    )
    if out is not None:
        comparison.write(out)
    return comparison


def _loaded(results: Results, name: str, tasks: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(results, str | Path):
        results = read_results(results)
    if not isinstance(results.get("results"), Mapping):
        raise UserError(f"{name}: has no 'results'")
    return _only(results, tasks, name) if tasks is not None else dict(results)


def _only(results: Mapping[str, Any], tasks: Sequence[str], name: str) -> dict[str, Any]:
    for task in tasks:
        if task not in results["results"]:
            raise UserError(f"{name}: has no results for task {task}")
    return {**results, "results": {task: results["results"][task] for task in tasks}}


def _group(kind: str, separating: bool, result: WinTie) -> Group:
    curves = {}
    for name in result.students:
        alphas, coverage = result.curve(name)
        curves[name] = Curve(alpha_star=result.alpha_star[name], alphas=alphas, coverage=coverage)
    return Group(kind=kind, separating=separating, tasks=result.tasks, students=curves)


def _benchmark(
    task: str,
    kind: str,
    result: WinTie,
    teacher: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    control_name: str | None,
) -> Benchmark:
    metric = preferred_metric(teacher["results"][task], f"teacher, task {task}")
    lower = kind == "likelihood"
    scores = {name: float(result.scores[name][task]) for name in result.students}
    scores = {"teacher": float(result.teacher_scores[task]), **scores}
    found = Benchmark(
        task=task,
        metric=metric,
        lower_is_better=lower,
        samples=teacher.get("n-samples", {}).get(task, {}).get("effective"),
        scores=scores,
        recovery={name: result.recovery[name][task] for name in result.students},
    )
    if control is None or control_name is None:
        return found
    sign = -1 if lower else 1
    found.advantage = sign * (scores["teacher"] - scores[control_name])
    error, found.paired = _difference_stderr(teacher, control, task, metric)
    found.advantage_stderr = error
    found.separates = found.advantage > (error or 0.0)
    return found


def _difference_stderr(
    first: Mapping[str, Any], second: Mapping[str, Any], task: str, metric: str
) -> tuple[float | None, bool]:
    """(standard error of the difference of two models' scores, whether it is paired)."""
    a = {s["doc_id"]: s for s in first.get("samples", {}).get(task, [])}
    b = {s["doc_id"]: s for s in second.get("samples", {}).get(task, [])}
    name = metric.partition(",")[0]
    if len(a) > 1 and a.keys() == b.keys():
        pairs = [(a[key], b[key]) for key in a]
        if all("loglikelihood" in x and "bytes" in x for pair in pairs for x in pair):
            nll = np.array([y["loglikelihood"] - x["loglikelihood"] for x, y in pairs])
            size = np.array([x["bytes"] for x, _ in pairs], dtype=np.float64)
            bits = nll / math.log(2)
            deviations = (bits - bits.sum() / size.sum() * size) / size.mean()
            return float(deviations.std(ddof=1) / math.sqrt(len(pairs))), True
        if all(name in x for pair in pairs for x in pair):
            difference = np.array([x[name] - y[name] for x, y in pairs], dtype=np.float64)
            return float(difference.std(ddof=1) / math.sqrt(len(pairs))), True
    key = metric.replace(",", "_stderr,", 1)
    errors = [r["results"][task].get(key) for r in (first, second)]
    if all(isinstance(e, int | float) for e in errors):
        return math.hypot(*errors), False
    return None, False
