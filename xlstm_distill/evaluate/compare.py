"""Teacher, students and controls side by side: Win-and-Tie that knows what the samples can show.

A benchmark on which a student that learnt nothing (the untrained window + sinks control) does as
well as the teacher cannot show what distillation gave. It is marked, alpha* is also given over the
benchmarks that separate the two, and on these the primary figure is the share of the teacher's lead
over the control that a student recovers. Definitions are in docs/math/wintie.md.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import uncertainty
from .comparable import check_pair, differences
from .comparison import Benchmark, Comparison, Curve, Group, Range, Standing
from .noise import DRAWS, detectable, noise_of
from .scores import ModelScores, Number, Score, Source, exact, scores_of
from .uncertainty import FloatArray
from .wintie import COVERAGES, WinTie, float_not_below, judge


def compare(
    teacher: Source,
    students: Mapping[str, Source],
    *,
    controls: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    chance: Mapping[str, Number] | None = None,
    drop_chance: bool = False,
    margin: Number | None = None,
    strict: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
    out: str | Path | None = None,
) -> Comparison:
    """Compare students with their teacher.

    teacher, students: scores of any form (`scores_of`, which takes `tasks` and `metrics`).
    controls: names among the students. A benchmark says nothing where the first control's score
    reaches the teacher's or its lead is within the noise (95 %; where no noise is known, only
    reaching counts). groups: name -> tasks or patterns that have an alpha* of their own (default:
    the groups that the sources tell, such as understanding and generation). chance: task or pattern
    -> score of guessing, before what the sources tell. drop_chance: leave benchmarks out on which
    the teacher is at chance. margin: the tolerance within which a student counts as not inferior.
    strict: raise where something was measured otherwise, rather than warn. draws, seed: of
    the noise. out: a directory that gets JSON, CSV and plots.

    Raises UserError for other task sets or metrics, damaged sources and unknown names.
    """
    if not students:
        raise UserError("compare: no students", usage=True)
    if "teacher" in students:
        raise UserError("a student cannot be named 'teacher'", usage=True)
    if seed < 0:
        raise UserError(f"seed is {seed}, expected at least 0", usage=True)
    for control in controls:
        if control not in students:
            raise UserError(f"control {control!r} is not among the students", usage=True)
    tolerance = None if margin is None else exact(margin, "margin")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UserError(f"margin is {margin}, expected 0 or more and less than 1", usage=True)
    sets = {
        name: scores_of(source, name, tasks=tasks, metrics=metrics)
        for name, source in {"teacher": teacher, **students}.items()
    }
    reference = sets["teacher"] = _with_chance(sets["teacher"], chance or {})
    if not reference.tasks:
        raise UserError(f"{reference.where}: no tasks")
    otherwise = {}
    for name in students:
        check_pair(reference, sets[name])
        otherwise[name] = differences(reference, sets[name])
    warnings = list(itertools.chain.from_iterable(otherwise.values()))
    # What the teacher does not state may still differ between a control and a student.
    alike = {name for name, lines in otherwise.items() if not lines}
    for control, name in itertools.product(controls, students):
        if {control, name} <= alike and name not in controls:
            warnings += differences(sets[control], sets[name])
    if strict and warnings:
        more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
        raise UserError(f"not comparable: {warnings[0]}{more}")
    judges = _Judges(sets, controls, tolerance, draws, seed)
    benchmarks = [judges.benchmark(task, drop_chance) for task in reference.tasks]
    comparison = Comparison(
        teacher=Path(teacher).name if isinstance(teacher, str | Path) else "",
        weights=reference.weights,
        controls=list(controls),
        students=list(students),
        margin=None if tolerance is None else float(tolerance),
        benchmarks=benchmarks,
        groups=list(judges.groups(benchmarks, groups)),
        warnings=warnings,
        notes=list(dict.fromkeys(note for scores in sets.values() for note in scores.notes)),
    )
    if out is not None:
        comparison.write(out)
    return comparison


def _with_chance(scores: ModelScores, chance: Mapping[str, Number]) -> ModelScores:
    tasks = dict(scores.tasks)
    for pattern, level in chance.items():
        named = [t for t in tasks if fnmatch.fnmatchcase(t, pattern)]
        named = [t for t in named if not tasks[t].lower_is_better]
        if not named:
            raise UserError(f"chance: {pattern} is not a task where more is better", usage=True)
        for task in named:
            tasks[task] = replace(tasks[task], chance=exact(level, f"the chance level of {task}"))
    for task, score in tasks.items():
        if score.chance is not None and not 0 <= score.chance <= score.unit:
            raise UserError(
                f"the chance level of {task} is {float(score.chance):g}, expected 0 to "
                f"{score.unit}, as its scores are"
            )
    return replace(scores, tasks=tasks)


# ---- noise --------------------------------------------------------------------------------------


def _interval(value: float, draws: FloatArray, units: int | None) -> Range | None:
    """None where the interval has no end, because a ratio's denominator may be 0."""
    with np.errstate(invalid="ignore"):
        _, low, high = uncertainty.interval(value, draws, units)
    return (low, high) if np.isfinite([low, high]).all() else None


def _quotient(above: FloatArray, below: FloatArray) -> FloatArray:
    """above / below; beyond all bounds where `below` is not positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.inf)


def _scale(score: Score) -> str:
    """In what a score is counted: accuracies of all metrics in their unit, others by metric."""
    return score.metric.partition(",")[0] if score.lower_is_better else str(score.unit)


# ---- judging ------------------------------------------------------------------------------------


class _Judges:
    """What can be said of the benchmarks, one by one and in groups. `sets` has the scores of the
    teacher and of all students."""

    def __init__(
        self,
        sets: Mapping[str, ModelScores],
        controls: Sequence[str],
        margin: Fraction | None,
        draws: int,
        seed: int,
    ) -> None:
        self.teacher = sets["teacher"]
        self.students = {name: scores for name, scores in sets.items() if name != "teacher"}
        self.controls, self.margin = controls, margin
        self.scores = {
            task: {name: scores.tasks[task] for name, scores in sets.items()}
            for task in self.teacher.tasks
        }
        self.noise = {task: noise_of(task, of, draws, seed) for task, of in self.scores.items()}

    def lead(self, task: str, of: str, over: str) -> tuple[float, FloatArray | None]:
        """By how much one model is better than another, with draws where the noise is known."""
        scores, drawn = self.scores[task], self.noise[task].draws
        sign = -1 if scores[of].lower_is_better else 1
        value = sign * float(scores[of].value - scores[over].value)
        if of not in drawn or over not in drawn:
            return value, None
        return value, sign * (drawn[of] - drawn[over])

    def separates(self, task: str, control: str) -> bool:
        """Whether the teacher's lead over a control is beyond its noise."""
        value, draws = self.lead(task, "teacher", control)
        if draws is None:
            return value > 0
        return uncertainty.interval(value, draws, self.noise[task].units).low > 0

    def sides(self, task: str, student: str) -> tuple[FloatArray, FloatArray] | None:
        """Draws of what is reached and what is wanted in (15)."""
        drawn = self.noise[task].draws
        if student not in drawn or "teacher" not in drawn:
            return None
        lower = self.scores[task][student].lower_is_better
        reached, wanted = ("teacher", student) if lower else (student, "teacher")
        return drawn[reached], drawn[wanted]

    def recovered(self, tasks: Sequence[str], student: str, found: Standing | Curve) -> None:
        """Fill in (control - student) / (control - teacher) for each control, over the sums of the
        tasks that separate it from the teacher. Scores on several scales have no sum."""
        for control in self.controls:
            separated = [task for task in tasks if self.separates(task, control)]
            scales = {_scale(self.teacher.tasks[task]) for task in separated}
            if control == student or len(scales) != 1:
                continue
            above = [self.lead(task, student, control) for task in separated]
            below = [self.lead(task, "teacher", control) for task in separated]
            value = sum(lead for lead, _ in above) / sum(lead for lead, _ in below)
            found.recovered[control] = value
            drawn = [[d for _, d in side if d is not None] for side in (above, below)]
            if all(len(side) == len(separated) for side in drawn):
                draws = _quotient(*(np.sum(side, axis=0) for side in drawn))
                if (ends := _interval(value, draws, self.units(separated))) is not None:
                    found.recovered_interval[control] = ends

    def units(self, tasks: Iterable[str]) -> int | None:
        """The fewest units of any task that is drawn from samples."""
        known = [u for task in tasks if (u := self.noise[task].units) is not None]
        return min(known, default=None)

    # -- one benchmark --

    def benchmark(self, task: str, drop_chance: bool) -> Benchmark:
        """All there is to say of one task."""
        score, noise = self.teacher.tasks[task], self.noise[task]
        at_chance = None
        if score.chance is not None:
            least = float(score.value)
            if "teacher" in noise.draws:
                least = uncertainty.interval(least, noise.draws["teacher"], noise.units).low
            at_chance = least <= float(score.chance)
        found = Benchmark(
            task=task,
            metric=score.metric,
            kind=score.kind,
            samples=score.samples,
            available=score.available,
            units=noise.units,
            chance=None if score.chance is None else float(score.chance),
            at_chance=at_chance,
            dropped=drop_chance and at_chance is True,
            teacher=float(score.value),
            students={name: self.standing(task, name) for name in self.students},
        )
        if self.controls:
            found.lead, draws = self.lead(task, "teacher", self.controls[0])
            if draws is not None:
                found.lead_interval = _interval(found.lead, draws, noise.units)
            found.separates = self.separates(task, self.controls[0])
        return found

    def standing(self, task: str, student: str) -> Standing:
        """One student on one task."""
        scores, noise = self.scores[task], self.noise[task]
        judged = judge(self.teacher, self.students, [task])
        found = Standing(
            score=float(scores[student].value),
            recovery=judged.recovery[student][task],
            corrected=judged.corrected[student][task],
        )
        if (sides := self.sides(task, student)) is not None:
            found.basis = noise.basis[student]
            found.detectable = detectable(scores, noise, student)
            mine, theirs = scores[student].outcomes, scores["teacher"].outcomes
            if found.basis == "paired" and mine is not None and theirs is not None:
                found.mcnemar = uncertainty.mcnemar(theirs, mine)
            if found.recovery is not None:
                draws = _quotient(*sides)
                found.recovery_interval = _interval(found.recovery, draws, noise.units)
            if self.margin is not None and found.recovery_interval is not None:
                found.non_inferior = found.recovery_interval[0] >= 1 - self.margin
        self.recovered([task], student, found)
        return found

    # -- groups --

    def groups(
        self, benchmarks: Sequence[Benchmark], named: Mapping[str, Sequence[str]] | None
    ) -> Iterator[Group]:
        """All of a kind, then by group; each also over the separating benchmarks."""
        members = self.members(named)
        kept = [b for b in benchmarks if not b.dropped]
        for kind in dict.fromkeys(b.kind for b in kept):
            of_kind = [b for b in kept if b.kind == kind]
            for name in ("", *members):
                inside = [b for b in of_kind if not name or b.task in members[name]]
                if not inside or (name and len(inside) == len(of_kind)):
                    continue
                yield self.group(kind, name, False, [b.task for b in inside])
                if separating := [b.task for b in inside if b.separates]:
                    yield self.group(kind, name, True, separating)

    def members(self, named: Mapping[str, Sequence[str]] | None) -> dict[str, set[str]]:
        """Group -> its tasks: as named, or as the teacher's source tells."""
        found: dict[str, set[str]] = {}
        if named is None:
            for task, score in self.teacher.tasks.items():
                if score.group is not None:
                    found.setdefault(score.group, set()).add(task)
            return found
        for name, patterns in named.items():
            for pattern in patterns:
                tasks = [t for t in self.teacher.tasks if fnmatch.fnmatchcase(t, pattern)]
                if not tasks:
                    raise UserError(f"group {name}: {pattern} is not a task", usage=True)
                found.setdefault(name, set()).update(tasks)
        return found

    def group(self, kind: str, name: str, separating: bool, tasks: list[str]) -> Group:
        """Win-and-Tie over some tasks."""
        judged = judge(self.teacher, self.students, tasks)
        return Group(
            kind=kind,
            name=name,
            separating=separating,
            tasks=tasks,
            students={student: self.curve(judged, student) for student in self.students},
            dominance=[
                (a, b)
                for a in self.students
                for b in self.students
                if a != b and judged.dominates(a, b)
            ],
        )

    def curve(self, judged: WinTie, student: str) -> Curve:
        """Win-and-Tie of one student."""
        alphas, coverage = judged.curve(student)
        found = Curve(
            alpha_star=judged.alpha_star[student],
            alpha_star_exact=str(judged.alpha_star_exact[student]),
            tolerance={c: float_not_below(judged.tolerance(student, c)) for c in COVERAGES},
            worst=judged.worst(student),
            alphas=alphas,
            coverage=coverage,
        )
        sides = [pair for task in judged.tasks if (pair := self.sides(task, student)) is not None]
        if len(sides) == len(judged.tasks):
            draws, lossless = uncertainty.alpha_star_draws(sides)
            units = self.units(judged.tasks)
            found.alpha_star_interval = _interval(found.alpha_star, draws, units)
            if units != 1:  # whose draws are all alike
                found.lossless_probability = lossless
            if self.margin is not None and found.alpha_star_interval is not None:
                found.non_inferior = found.alpha_star_interval[1] <= self.margin
        self.recovered(judged.tasks, student, found)
        return found
