"""Win-and-Tie: on how many benchmarks a student reaches its teacher within a tolerance alpha.

A benchmark is won or tied at alpha where A_S >= (1 - alpha) A_T, coverage C_alpha is the share of
such benchmarks, and alpha* the smallest alpha with C_alpha >= 1/2 (docs/math/wintie.md). Floats get
the inequality wrong at its own breakpoints, so all comparisons are between fractions of the decimal
inputs: 0.1 means 1/10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from io import StringIO
from numbers import Rational
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

Number = int | float | str | Decimal | Fraction | np.number[Any]
Scores = Mapping[str, Any] | str | Path
"""Task -> score; or results as lm-evaluation-harness writes them (a mapping or a JSON file)."""

_PREFERRED = (
    "acc_norm,none",
    "acc,none",
    "exact_match,strict-match",
    "exact_match,flexible-extract",
    "exact_match,none",
    "pass@1,create_test",
    "f1,none",
    "bits_per_byte,none",
    "byte_perplexity,none",
    "word_perplexity,none",
    "perplexity,none",
)
_LOWER_IS_BETTER = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "nll")
_TABLE_ALPHAS = ("0", "0.01", "0.05", "0.1", "0.2")


def exact(value: Number, what: str = "score") -> Fraction:
    """The fraction that `value` shows in decimal: 0.1 is 1/10. `what` opens error messages."""
    if isinstance(value, bool | np.bool_):
        raise UserError(f"{what} is {value}, expected a number")
    if isinstance(value, Rational):
        return Fraction(value.numerator, value.denominator)
    try:
        decimal = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"{what} is {value!r}, expected a number") from None
    if not decimal.is_finite():
        raise UserError(f"{what} is {value}, expected a finite number")
    return Fraction(decimal)


def float_not_below(value: Fraction) -> float:
    """The nearest float whose decimal form is not below `value`.

    Coverage at alpha* printed as this float still counts the benchmark that defines alpha*.
    """
    x = float(value)
    while exact(x) < value:
        x = math.nextafter(x, math.inf)
    return x


def preferred_metric(results: Mapping[str, Any], where: str) -> str:
    """The key of the metric that stands for a task in a results mapping.

    Length-normalised accuracy before accuracy before exact match; bits per byte and perplexities
    where there is no accuracy; otherwise the only metric there is.
    """
    found = [
        key
        for key, value in results.items()
        if "stderr" not in key and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    for key in _PREFERRED:
        if key in found:
            return key
    metrics = [key for key in found if "," in key]
    if len(metrics) == 1:
        return metrics[0]
    listed = ", ".join(metrics) or "none"
    raise UserError(f"{where}: cannot tell which metric to compare (found: {listed})")


def is_lower_better(metric: str) -> bool:
    """Whether a metric's key names a likelihood metric, of which less is better."""
    return metric.partition(",")[0] in _LOWER_IS_BETTER


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object with results is expected")
    return value


class _ScoreSet:
    """One model's scores, exact, with the metric of each task where the source names it."""

    def __init__(self, scores: Scores, name: str) -> None:
        where = name
        if isinstance(scores, str | Path):
            where = f"{name} ({scores})"
            scores = read_json(Path(scores))
        self.where = where
        self.metrics: dict[str, str] = {}
        values: dict[str, Any] = {}
        if isinstance(scores.get("results"), Mapping):
            directions = scores.get("higher_is_better", {})
            self.lower: set[str] = set()
            for task, results in scores["results"].items():
                key = preferred_metric(results, f"{where}, task {task}")
                self.metrics[task] = key
                values[task] = results[key]
                stated = directions.get(task, {}).get(key.partition(",")[0])
                if not stated if stated is not None else is_lower_better(key):
                    self.lower.add(task)
        else:
            values = dict(scores)
            self.lower = set()
        self.exact = {
            str(task): exact(value, f"{where}: the score of {task}")
            for task, value in values.items()
        }
        for task, score in self.exact.items():
            if score < 0:
                raise UserError(f"{where}: the score of {task} is {float(score)}, below 0")


class WinTie:
    """The result of `win_and_tie`.

    tasks: names in the teacher's order. students: names. teacher_scores[task] and
    scores[student][task] are Fractions. recovery[student][task]: A_S / A_T (A_T / A_S where less is
    better), None where it does not exist (division by zero). alpha_star[student]: float;
    alpha_star_exact[student]: Fraction. lower_is_better: whether less is better (in all tasks).
    """

    def __init__(
        self,
        teacher: Mapping[str, Fraction],
        students: Mapping[str, Mapping[str, Fraction]],
        lower_is_better: bool,
    ) -> None:
        self.tasks = list(teacher)
        self.students = list(students)
        self.lower_is_better = lower_is_better
        self.teacher_scores = dict(teacher)
        self.scores = {name: dict(scores) for name, scores in students.items()}
        self.recovery: dict[str, dict[str, float | None]] = {}
        self._gaps: dict[str, dict[str, Fraction]] = {}
        for name, scores in self.scores.items():
            pairs = {task: (scores[task], teacher[task]) for task in self.tasks}
            if lower_is_better:
                pairs = {task: (a_t, a_s) for task, (a_s, a_t) in pairs.items()}
            # (15) is reached >= (1 - alpha) * wanted in both directions.
            self._gaps[name] = {task: _gap(*pair) for task, pair in pairs.items()}
            self.recovery[name] = {
                task: None if wanted == 0 else float(reached / wanted)
                for task, (reached, wanted) in pairs.items()
            }
        middle = math.ceil(len(self.tasks) / 2) - 1
        self.alpha_star_exact = {
            name: sorted(gaps.values())[middle] for name, gaps in self._gaps.items()
        }
        self.alpha_star = {
            name: float_not_below(value) for name, value in self.alpha_star_exact.items()
        }

    def coverage(self, alpha: Number) -> dict[str, float]:
        """C_alpha of every student: the share of benchmarks won or tied at tolerance `alpha`."""
        a = exact(alpha, "alpha")
        if not 0 <= a <= 1:
            raise UserError(f"alpha is {alpha}, expected 0 to 1")
        return {
            name: sum(gap <= a for gap in gaps.values()) / len(gaps)
            for name, gaps in self._gaps.items()
        }

    def won(self, student: str, alpha: Number = 0) -> list[str]:
        """The benchmarks that `student` wins or ties at `alpha`."""
        a = exact(alpha, "alpha")
        return [task for task, gap in self._gaps[student].items() if gap <= a]

    def lossless(self, student: str) -> bool:
        """Whether half of the benchmarks are won or tied with no tolerance (alpha* = 0)."""
        return self.alpha_star_exact[student] == 0

    def curve(self, student: str) -> tuple[list[float], list[float]]:
        """The step function C_alpha as (alphas, coverages): it jumps to coverages[i] at alphas[i],
        begins at alpha 0 and ends at 1."""
        gaps = self._gaps[student].values()
        alphas = sorted({Fraction(0), Fraction(1), *gaps})
        return (
            [float_not_below(a) for a in alphas],
            [sum(gap <= a for gap in gaps) / len(gaps) for a in alphas],
        )

    def dominates(self, first: str, second: str) -> bool:
        """Whether the curve of `first` is nowhere below that of `second`."""
        pairs = zip(
            sorted(self._gaps[first].values()), sorted(self._gaps[second].values()), strict=True
        )
        return all(a <= b for a, b in pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One plain mapping per task: task, teacher, and per student score and recovery."""
        return [
            {
                "task": task,
                "teacher": float(self.teacher_scores[task]),
                **{name: float(self.scores[name][task]) for name in self.students},
                **{f"{name} recovery": self.recovery[name][task] for name in self.students},
            }
            for task in self.tasks
        ]

    def table(self) -> str:
        """Scores, recovery, coverage and alpha* as text."""
        from rich.console import Console
        from rich.table import Table

        better = "less is better" if self.lower_is_better else "more is better"
        table = Table(title=f"Win-and-Tie, {len(self.tasks)} benchmarks ({better})")
        table.add_column("benchmark")
        table.add_column("teacher", justify="right")
        for name in self.students:
            table.add_column(name, justify="right")
            table.add_column("recovery", justify="right")
        for task in self.tasks:
            cells = [task, f"{float(self.teacher_scores[task]):.4g}"]
            for name in self.students:
                recovery = self.recovery[name][task]
                cells.append(f"{float(self.scores[name][task]):.4g}")
                cells.append("n/a" if recovery is None else f"{recovery:.3f}")
            table.add_row(*cells)
        table.add_section()
        for alpha in _TABLE_ALPHAS:
            covered = self.coverage(alpha)
            values = [x for name in self.students for x in (f"{covered[name]:.2f}", "")]
            table.add_row(f"coverage at {alpha}", "", *values)
        stars = [x for name in self.students for x in (f"{self.alpha_star[name]:.4f}", "")]
        table.add_row("alpha*", "", *stars)
        # Wide enough for any set of students: a terminal's width must not cut figures off.
        console = Console(file=StringIO(), width=60 + 40 * max(1, len(self.students)))
        with console.capture() as text:
            console.print(table)
        return text.get()

    def plot(self, path: str | Path) -> Path:
        """Write the coverage curves as an image (.svg, .png or .pdf by the path's ending)."""
        from .. import plots  # slow to import

        return plots.save(plots.win_tie_curves(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: tasks, scores, recovery, alpha*, curves."""
        return {
            "lower_is_better": self.lower_is_better,
            "tasks": self.tasks,
            "teacher": {task: float(value) for task, value in self.teacher_scores.items()},
            "students": {
                name: {
                    "scores": {task: float(value) for task, value in self.scores[name].items()},
                    "recovery": self.recovery[name],
                    "alpha_star": self.alpha_star[name],
                    "alpha_star_exact": str(self.alpha_star_exact[name]),
                    "curve": [list(side) for side in self.curve(name)],
                }
                for name in self.students
            },
        }


def _gap(reached: Fraction, wanted: Fraction) -> Fraction:
    """The smallest alpha in [0, 1] with reached >= (1 - alpha) * wanted; both are >= 0."""
    return Fraction(0) if reached >= wanted else 1 - reached / wanted


def win_and_tie(
    teacher_scores: Scores,
    students: Mapping[str, Scores],
    lower_is_better: Collection[str] | Mapping[str, bool] = (),
) -> WinTie:
    """Win-and-Tie of one or several students against a teacher.

    teacher_scores and each student's scores: a mapping task -> score, or a results file or mapping
    of lm-evaluation-harness (of each task one metric is taken, `preferred_metric`). Scores may be
    in 0..1 or in per cent, but in one unit for teacher and students of a task.
    lower_is_better: the tasks (or task -> bool) whose score is a likelihood metric such as bits per
    byte or perplexity; results files say it themselves. For these recovery is A_T / A_S.

    Raises UserError, in one line, for other task sets, different metrics, negative or NaN scores,
    and where accuracy and likelihood metrics meet: one alpha* never mixes them (`split_groups`).
    """
    groups = split_groups(teacher_scores, students, lower_is_better)
    if len(groups) > 1:
        first = {kind: result.tasks[0] for kind, result in groups.items()}
        raise UserError(
            f"win_and_tie: {first['accuracy']} is an accuracy and {first['likelihood']} a "
            "likelihood metric; compare them apart (split_groups)",
            usage=True,
        )
    return next(iter(groups.values()))


def split_groups(
    teacher_scores: Scores,
    students: Mapping[str, Scores],
    lower_is_better: Collection[str] | Mapping[str, bool] = (),
) -> dict[str, WinTie]:
    """Win-and-Tie for each kind of metric: "accuracy" (more is better), "likelihood" (less is
    better). Only kinds that occur are there; arguments and errors as in `win_and_tie`."""
    if not students:
        raise UserError("win_and_tie: no students", usage=True)
    teacher = _ScoreSet(teacher_scores, "teacher")
    if not teacher.exact:
        raise UserError(f"{teacher.where}: no tasks")
    sets = {name: _ScoreSet(scores, name) for name, scores in students.items()}
    for student in sets.values():
        _check_pair(teacher, student)
    lower = _lower_tasks(lower_is_better, teacher)
    groups: dict[str, WinTie] = {}
    for kind in ("accuracy", "likelihood"):
        tasks = [t for t in teacher.exact if (t in lower) == (kind == "likelihood")]
        if tasks:
            groups[kind] = WinTie(
                {t: teacher.exact[t] for t in tasks},
                {name: {t: s.exact[t] for t in tasks} for name, s in sets.items()},
                kind == "likelihood",
            )
    return groups


def _lower_tasks(named: Collection[str] | Mapping[str, bool], teacher: _ScoreSet) -> set[str]:
    if isinstance(named, str):
        raise UserError(f"lower_is_better is the string {named!r}, expected a set", usage=True)
    lower = set(teacher.lower)
    entries = named.items() if isinstance(named, Mapping) else ((task, True) for task in named)
    for task, is_lower in entries:
        if task not in teacher.exact:
            raise UserError(f"lower_is_better names {task}, which is not a task", usage=True)
        (lower.add if is_lower else lower.discard)(task)
    return lower


def _check_pair(teacher: _ScoreSet, student: _ScoreSet) -> None:
    missing = _listed(t for t in teacher.exact if t not in student.exact)
    extra = _listed(t for t in student.exact if t not in teacher.exact)
    if missing or extra:
        parts = [f"{student.where} lacks {missing}"] if missing else []
        parts += [f"{teacher.where} lacks {extra}"] if extra else []
        raise UserError(f"the task sets differ: {'; '.join(parts)}")
    for task, metric in teacher.metrics.items():
        other = student.metrics.get(task)
        if other is not None and other != metric:
            raise UserError(
                f"task {task}: {teacher.where} has {metric}, {student.where} has {other}"
            )


def _listed(tasks: Iterable[str], most: int = 5) -> str:
    names: Sequence[str] = list(tasks)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
