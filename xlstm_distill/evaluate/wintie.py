"""Win-and-Tie: on how many benchmarks a student reaches its teacher within a tolerance alpha.

A benchmark is won or tied at alpha where A_S >= (1 - alpha) A_T, coverage C_alpha is the share of
such benchmarks, and alpha* the smallest alpha with C_alpha >= 1/2 (docs/math/wintie.md). Floats get
the inequality wrong at its own breakpoints, so all comparisons are between fractions of the decimal
inputs: 0.1 means 1/10.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import UserError
from .comparable import check_pair
from .noise import DRAWS, detectable, detects, noise_of
from .scores import ModelScores, Number, Source, decimals, exact, scores_of

_TABLE_ALPHAS = ("0", "0.01", "0.05", "0.1", "0.2")
COVERAGES = ("0.9", "1")
"""Coverages whose tolerance is given beside alpha*, for which half of the tasks may collapse."""


def float_not_below(value: Fraction) -> float:
    """The nearest float whose decimal form is not below `value`.

    Coverage at alpha* printed as this float still counts the benchmark that defines alpha*.
    """
    x = float(value)
    while exact(x) < value:
        x = math.nextafter(x, math.inf)
    return x


class WinTie:
    """The result of `win_and_tie`.

    tasks: names in the teacher's order. students: names. teacher_scores[task] and
    scores[student][task] are Fractions. recovery[student][task]: A_S / A_T (A_T / A_S where less is
    better), None where it does not exist (division by zero). corrected[student][task]: the same
    with the chance level taken off both, (A_S - c) / (A_T - c); None where no level is known or the
    teacher does not exceed it. detectable[student][task]: the smallest true difference of the
    scores that their samples show in 8 of 10 cases, None where nothing is known of them.
    alpha_star[student]: float; alpha_star_exact[student]: Fraction.
    lower_is_better: whether less is better (in all tasks). teacher: where its scores come from and
    what its weights are, in words.
    """

    def __init__(
        self,
        teacher: Mapping[str, Fraction],
        students: Mapping[str, Mapping[str, Fraction]],
        lower_is_better: bool,
        chance: Mapping[str, Fraction] | None = None,
        detectable: Mapping[str, Mapping[str, float | None]] | None = None,
        where: str = "teacher",
    ) -> None:
        self.teacher = where
        self.tasks = list(teacher)
        self.students = list(students)
        self.lower_is_better = lower_is_better
        self.teacher_scores = dict(teacher)
        self.scores = {name: dict(scores) for name, scores in students.items()}
        self.recovery: dict[str, dict[str, float | None]] = {}
        self.corrected: dict[str, dict[str, float | None]] = {}
        effects = detectable or {}
        self.detectable = {
            name: {task: effects.get(name, {}).get(task) for task in self.tasks}
            for name in self.students
        }
        self._gaps: dict[str, dict[str, Fraction]] = {}
        chance = chance or {}
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
            self.corrected[name] = {
                task: float((scores[task] - chance[task]) / (teacher[task] - chance[task]))
                if task in chance and teacher[task] > chance[task]
                else None
                for task in self.tasks
            }
        self.alpha_star_exact = {
            name: self.tolerance(name, Fraction(1, 2)) for name in self.students
        }
        self.alpha_star = {
            name: float_not_below(value) for name, value in self.alpha_star_exact.items()
        }

    def tolerance(self, student: str, coverage: Number) -> Fraction:
        """The smallest alpha with C_alpha >= `coverage`; for 1/2 that is alpha*."""
        share = exact(coverage, "coverage")
        if not 0 < share <= 1:
            raise UserError(f"coverage is {coverage}, expected more than 0 and at most 1")
        gaps = sorted(self._gaps[student].values())
        return gaps[math.ceil(share * len(gaps)) - 1]

    def worst(self, student: str) -> str | None:
        """The benchmark of the lowest recovery; None where no recovery exists."""
        rates = {t: r for t, r in self.recovery[student].items() if r is not None}
        return min(rates, key=lambda task: rates[task], default=None)

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
        """One plain mapping per task: task, teacher, and per student score, recovery and what
        difference is detectable."""
        return [
            {
                "task": task,
                "teacher": float(self.teacher_scores[task]),
                **{name: float(self.scores[name][task]) for name in self.students},
                **{f"{name} recovery": self.recovery[name][task] for name in self.students},
                **{f"{name} detectable": self.detectable[name][task] for name in self.students},
            }
            for task in self.tasks
        ]

    def table(self) -> str:
        """Scores, recovery, coverage and alpha* as text, and what the samples can show."""
        from rich.console import Console
        from rich.table import Table

        better = "less is better" if self.lower_is_better else "more is better"
        title = f"Win-and-Tie, {len(self.tasks)} benchmarks ({better}), scores of {self.teacher}"
        table = Table()
        table.add_column("benchmark")
        table.add_column("teacher", justify="right")
        for name in self.students:
            table.add_column(name, justify="right")
            table.add_column("recovery", justify="right")
            table.add_column("detectable", justify="right")
        for task in self.tasks:
            cells = [task, f"{float(self.teacher_scores[task]):.4g}"]
            for name in self.students:
                recovery = self.recovery[name][task]
                cells.append(f"{float(self.scores[name][task]):.4g}")
                cells.append("n/a" if recovery is None else decimals(recovery, 3))
                effect = self.detectable[name][task]
                cells.append("unknown" if effect is None else f"{effect:.4g}")
            table.add_row(*cells)
        table.add_section()
        for alpha in _TABLE_ALPHAS:
            covered = self.coverage(alpha)
            values = [x for name in self.students for x in (f"{covered[name]:.2f}", "", "")]
            table.add_row(f"coverage at {alpha}", "", *values)
        stars = [x for name in self.students for x in (f"{self.alpha_star[name]:.4f}", "", "")]
        table.add_row("alpha*", "", *stars)
        for share in COVERAGES:
            needed = [float_not_below(self.tolerance(name, share)) for name in self.students]
            cells = [x for alpha in needed for x in (f"{alpha:.4f}", "", "")]
            table.add_row(f"alpha at coverage {share}", "", *cells)
        worst = [x for name in self.students for x in (self.worst(name) or "n/a", "", "")]
        table.add_row("worst", "", *worst)
        # Wide enough for any set of students: a terminal's width must not cut figures off.
        # Plain text in notebooks, too.
        console = Console(
            width=60 + 55 * max(1, len(self.students)),
            file=StringIO(),
            force_jupyter=False,
            color_system=None,
        )
        with console.capture() as text:
            console.print(title, soft_wrap=True, highlight=False, markup=False)
            console.print(table)
            effects = (x for of in self.detectable.values() for x in of.values())
            console.print(detects(effects), soft_wrap=True, highlight=False)
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
                    "corrected": self.corrected[name],
                    "detectable": self.detectable[name],
                    "worst": self.worst(name),
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
    teacher_scores: Source,
    students: Mapping[str, Source],
    lower_is_better: Collection[str] | Mapping[str, bool] = (),
) -> WinTie:
    """Win-and-Tie of one or several students against a teacher.

    teacher_scores and each student's scores: a mapping task -> score, a table (FILE.csv or
    FILE.csv:COLUMN), or a results file or mapping of lm-evaluation-harness (`scores_of`).
    Scores may be in 0..1 or in per cent, but in one unit for teacher and students of a task.
    lower_is_better: the tasks (or task -> bool) of mappings whose score is a likelihood metric such
    as bits per byte or perplexity; results files and tables say it themselves. For these recovery
    is A_T / A_S.

    Raises UserError, in one line, for other task sets, different metrics, negative or NaN scores,
    and where accuracy and likelihood metrics meet: one alpha* never mixes them (`split_groups`).
    """
    groups = split_groups(teacher_scores, students, lower_is_better)
    if len(groups) > 1:
        (kind, one), (other_kind, other) = list(groups.items())[:2]
        raise UserError(
            f"win_and_tie: {one.tasks[0]} is of the kind {kind} and {other.tasks[0]} of the kind "
            f"{other_kind}; compare them apart (split_groups)",
            usage=True,
        )
    return next(iter(groups.values()))


def split_groups(
    teacher_scores: Source,
    students: Mapping[str, Source],
    lower_is_better: Collection[str] | Mapping[str, bool] = (),
) -> dict[str, WinTie]:
    """Win-and-Tie for each kind of metric: "accuracy" (more is better), "likelihood" and "error"
    (less is better). Only kinds that occur are there; arguments and errors as in `win_and_tie`."""
    if not students:
        raise UserError("win_and_tie: no students", usage=True)
    if "teacher" in students:
        raise UserError("a student cannot be named 'teacher'", usage=True)
    teacher = scores_of(teacher_scores, "teacher")
    if not teacher.tasks:
        raise UserError(f"{teacher.where}: no tasks")
    lower = _directions(lower_is_better, teacher)
    teacher = _directed(teacher, lower)
    sets = {name: _directed(scores_of(s, name), lower) for name, s in students.items()}
    for student in sets.values():
        check_pair(teacher, student)
    kinds = {score.kind for score in teacher.tasks.values()}
    effects = _detectable({"teacher": teacher, **sets})
    return {
        kind: judge(
            teacher, sets, [t for t, score in teacher.tasks.items() if score.kind == kind], effects
        )
        for kind in sorted(kinds)
    }


def judge(
    teacher: ModelScores,
    students: Mapping[str, ModelScores],
    tasks: Iterable[str],
    detectable: Mapping[str, Mapping[str, float | None]] | None = None,
) -> WinTie:
    """Win-and-Tie over `tasks`, which are of one kind and in all scores (`check_pair`)."""
    of = {task: teacher.tasks[task] for task in tasks}
    return WinTie(
        {task: score.value for task, score in of.items()},
        {name: {task: s.tasks[task].value for task in of} for name, s in students.items()},
        all(score.lower_is_better for score in of.values()),
        {task: score.chance for task, score in of.items() if score.chance is not None},
        detectable,
        ", ".join(filter(None, [teacher.where, teacher.weights])),
    )


def _detectable(sets: Mapping[str, ModelScores]) -> dict[str, dict[str, float | None]]:
    """Student -> task -> what difference to the teacher, which is among `sets`, can be seen."""
    found: dict[str, dict[str, float | None]] = {name: {} for name in sets if name != "teacher"}
    for task in sets["teacher"].tasks:
        scores = {name: of.tasks[task] for name, of in sets.items()}
        noise = noise_of(task, scores, DRAWS, seed=0)
        for name, of in found.items():
            of[task] = detectable(scores, noise, name)
    return found


def _directions(
    named: Collection[str] | Mapping[str, bool], teacher: ModelScores
) -> Mapping[str, bool]:
    """Task -> whether less is better, for the tasks that are named."""
    if isinstance(named, str):
        raise UserError(f"lower_is_better is the string {named!r}, expected a set", usage=True)
    directions = named if isinstance(named, Mapping) else dict.fromkeys(named, True)
    for task in directions:
        if task not in teacher.tasks:
            raise UserError(f"lower_is_better names {task}, which is not a task", usage=True)
    return directions


def _directed(scores: ModelScores, lower: Mapping[str, bool]) -> ModelScores:
    tasks = {
        task: replace(score, kind="likelihood" if lower[task] else "accuracy")
        if task in lower and lower[task] != score.lower_is_better
        else score
        for task, score in scores.tasks.items()
    }
    return replace(scores, tasks=tasks)
