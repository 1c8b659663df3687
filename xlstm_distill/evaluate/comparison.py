"""What a comparison found, as plain data for JSON, as tables, CSV and plots.

`compare` makes a `Comparison`; the report shows one, too. Its tables are rows of text (`listings`),
for the terminal and for pages alike.
"""

from __future__ import annotations

import csv
import json
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..atomic import write_text
from ..errors import UserError
from .noise import detects
from .scores import decimals
from .wintie import COVERAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Range = tuple[float, float]
"""Ends of a 95 % interval."""

Figures = dict[str, tuple[str, "Figure"]]
"""File name without its ending -> what the figure shows, and the figure."""

FEW = 30
"""Units from which on the intervals cover what they say (docs/math/wintie.md)."""


class Listing(NamedTuple):
    """A table: its title, column titles, rows of text, and how many columns are words (the others
    are numbers)."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    words: int


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Standing(_Part):
    """A student on one benchmark.

    recovery: student / teacher, or teacher / student where less is better; None where it does not
    exist. corrected: recovery with the chance level taken off both. basis: what the noise is known
    from: "paired" (samples of the same documents), "binomial" (score and number of documents),
    "standard error" (stated), None: unknown. detectable: the smallest true difference of the scores
    that shows in 8 of 10 cases. mcnemar: p of McNemar's exact test against the teacher.
    non_inferior: whether the whole interval of the recovery is at or above 1 - margin. recovered:
    control -> (control - student) / (control - teacher), where that control is separated.
    """

    score: float
    recovery: float | None
    recovery_interval: Range | None = None
    corrected: float | None = None
    basis: str | None = None
    detectable: float | None = None
    mcnemar: float | None = None
    non_inferior: bool | None = None
    recovered: dict[str, float] = {}
    recovered_interval: dict[str, Range] = {}


class Benchmark(_Part):
    """One benchmark.

    samples: documents scored, of `available` ones. units: passages (or documents) that the
    bootstrap draws. lead: the teacher's lead over the first control (positive: the teacher is
    better). separates: whether that lead is beyond its noise; a benchmark that does not separate
    says nothing. at_chance: whether the teacher's score is within its noise of `chance`. dropped:
    whether it was left out of the groups for that.
    """

    task: str
    metric: str
    kind: str
    samples: int | None
    available: int | None
    units: int | None
    chance: float | None
    at_chance: bool | None
    dropped: bool
    teacher: float
    students: dict[str, Standing]
    lead: float | None = None
    lead_interval: Range | None = None
    separates: bool | None = None

    @property
    def name(self) -> str:
        """With its marks: * says nothing, † the teacher is at chance."""
        return (
            self.task + (" †" if self.at_chance else "") + (" *" if self.separates is False else "")
        )

    @property
    def partial(self) -> bool:
        """Whether only some of the documents were scored."""
        return None not in (self.samples, self.available) and self.samples != self.available

    @property
    def documents(self) -> str:
        """How many were scored, and of how many where it is a part."""
        if self.samples is None:
            return "unknown"
        return f"{self.samples} of {self.available}" if self.partial else str(self.samples)


class Curve(_Part):
    """Win-and-Tie of one student over a group of benchmarks.

    tolerance: coverage ("0.9", "1") -> the smallest alpha that reaches it. worst: the benchmark of
    the lowest recovery. lossless_probability: of C_0 >= 1/2. non_inferior: whether the whole
    interval of alpha* is within the margin. recovered: control -> the share of the teacher's lead
    over it, of all separated benchmarks together.
    """

    alpha_star: float
    alpha_star_exact: str
    alpha_star_interval: Range | None = None
    tolerance: dict[str, float]
    worst: str | None
    lossless_probability: float | None = None
    non_inferior: bool | None = None
    recovered: dict[str, float] = {}
    recovered_interval: dict[str, Range] = {}
    alphas: list[float]
    coverage: list[float]


class Group(_Part):
    """Win-and-Tie over some benchmarks of one kind: "accuracy", "likelihood" or "error". name: ""
    for all of the kind, or the group's ("generation"). separating: whether only benchmarks on which
    the first control loses are in it. dominance: pairs of students, the curve of the first nowhere
    below that of the second."""

    kind: str
    name: str
    separating: bool
    tasks: list[str]
    students: dict[str, Curve]
    dominance: list[tuple[str, str]]

    @property
    def title(self) -> str:
        """For figures and tables: which benchmarks these are."""
        words = [self.kind, *([self.name] if self.name else [])]
        return f"{', '.join(words)}, {'separating' if self.separating else 'all'} {len(self.tasks)}"

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Student -> (alphas, coverages), for plots."""
        return {name: (c.alphas, c.coverage) for name, c in self.students.items()}


class Comparison(_Part):
    """All benchmarks, and Win-and-Tie over all of them, by group, and over the separating ones.

    teacher: the file that its scores come from, "" where there is none. weights: the teacher's, as
    that file states them, or "". warnings: what was measured otherwise for some model. notes: what
    was left out or not used. margin: the tolerance of non-inferiority, stated beforehand.
    """

    teacher: str
    weights: str = ""
    controls: list[str]
    students: list[str]
    margin: float | None
    benchmarks: list[Benchmark]
    groups: list[Group]
    warnings: list[str]
    notes: list[str]

    def alpha_star(
        self, kind: str = "accuracy", separating: bool = False, name: str = ""
    ) -> dict[str, float]:
        """alpha* by student; empty where there are no such benchmarks."""
        for group in self.groups:
            if (group.kind, group.separating, group.name) == (kind, separating, name):
                return {student: curve.alpha_star for student, curve in group.students.items()}
        return {}

    def rows(self) -> list[dict[str, Any]]:
        """One flat mapping per benchmark, for CSV; None is an empty cell. Raises UserError where a
        student's name is that of another column."""
        found = []
        for b in self.benchmarks:
            row: dict[str, Any] = {}
            parts: list[dict[str, Any]] = [
                {"task": b.task, "metric": b.metric, "samples": b.samples, "teacher": b.teacher},
                {name: b.students[name].score for name in self.students},
                *(self._columns(name, b.students[name]) for name in self.students),
                {"chance": b.chance, "teacher at chance": b.at_chance},
                _with_ends("teacher over control", b.lead, b.lead_interval),
                {"says nothing": None if b.separates is None else not b.separates},
            ]
            for part in parts:
                if twice := row.keys() & part.keys():
                    message = f"two columns of the CSV are named {min(twice)!r}; rename a student"
                    raise UserError(message, usage=True)
                row |= part
            found.append(row)
        return found

    def _columns(self, name: str, s: Standing) -> dict[str, Any]:
        """A student's columns in the CSV, beside its score."""
        found: dict[str, Any] = _with_ends("recovery", s.recovery, s.recovery_interval)
        found |= {"recovery over chance": s.corrected, "noise known from": s.basis}
        found |= {"detectable": s.detectable, "McNemar p": s.mcnemar}
        found["not inferior"] = s.non_inferior
        for control in self.controls:
            share, ends = s.recovered.get(control), s.recovered_interval.get(control)
            found |= _with_ends(f"recovered from {control}", share, ends)
        return {f"{name} {what}": value for what, value in found.items()}

    def write(self, directory: str | Path) -> list[Path]:
        """Write comparison.json, comparison.csv, and curves and recovery as SVG. Raises UserError
        as `write_numbers`."""
        from .. import plots  # slow to import

        return self.write_numbers(directory) + plots.save_all(self.figures(), directory, [".svg"])

    def write_numbers(self, directory: str | Path) -> list[Path]:
        """Write comparison.json and comparison.csv. Raises UserError where they cannot be written,
        and as `rows`."""
        folder, rows = Path(directory), self.rows()
        files = [folder / "comparison.json", folder / "comparison.csv"]
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        write_text(files[0], text + "\n")
        table = StringIO()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(files[1], table.getvalue())
        return files

    def figures(self) -> Figures:
        """File name without its ending -> what the figure shows, and the figure."""
        from .. import plots  # slow to import

        found: Figures = {}
        for group in self.groups:
            words = ["win_and_tie", group.kind, group.name, "separating" * group.separating]
            name = plots.file_name("_".join(word for word in words if word), found)
            figure = plots.coverage_curves(group.curves(), group.title)
            found[name] = f"Win-and-Tie, {group.title}", figure
        found["recovery"] = "Recovery rates", plots.recovery_bars(self)
        return found

    # -- tables --

    def listings(self) -> list[Listing]:
        """Scores and recovery; tests against the teacher and controls; alpha*, where a benchmark is
        left."""
        found = [self._scores(), self._tests()]
        return [*found, self._stars()] if self.groups else found

    def _scores(self) -> Listing:
        titles = ["benchmark", "metric", "documents", "chance", "teacher"]
        for name in self.students:
            titles += [name, "recovery (95 %)", "detectable"]
        rows = []
        for b in self.benchmarks:
            less = " ↓" if b.kind != "accuracy" else ""
            row = [b.name, b.metric + less, b.documents, _number(b.chance), _number(b.teacher)]
            for name in self.students:
                s = b.students[name]
                row += [
                    _number(s.score),
                    _ranged(s.recovery, s.recovery_interval),
                    _number(s.detectable, "unknown"),
                ]
            rows.append(row)
        marks = ["↓ less is better"] if any(b.kind != "accuracy" for b in self.benchmarks) else []
        if any(b.separates is False for b in self.benchmarks):
            marks.append(f"* says nothing: {self.controls[0]} ties the teacher")
        if any(b.at_chance for b in self.benchmarks):
            dropped = ", left out" if any(b.dropped for b in self.benchmarks) else ""
            marks.append(f"† the teacher is at chance{dropped}")
        title = "; ".join(["Benchmarks", *self._of_teacher(), *marks, self._detects()])
        return Listing(title, titles, rows, 2)

    def _of_teacher(self) -> list[str]:
        """Whose scores are the measure, for the title of every table."""
        words = [self.teacher, f"scores of {self.weights}" if self.weights else ""]
        return [f"teacher: {', '.join(filter(None, words))}"] if any(words) else []

    def _detects(self) -> str:
        """What differences the samples can show, for the title of every table."""
        return detects(s.detectable for b in self.benchmarks for s in b.students.values())

    def _tests(self) -> Listing:
        columns = ["benchmark", "student", "noise known from", "over chance", "McNemar p"]
        columns += self._margin_column() + self._recovered_columns()
        rows = []
        for b in self.benchmarks:
            for name in self.students:
                s = b.students[name]
                units = f", {b.units} units" if s.basis == "paired" else ""
                row = [b.name, name, (s.basis or "unknown") + units]
                row += [_number(s.corrected), _number(s.mcnemar)]
                rows.append(row + self._margin_cell(s) + self._recovered_cells(s))
        title = "Students against teacher and controls"
        title = "; ".join([title, *self._of_teacher(), self._detects()])
        return Listing(title, columns, rows, 3)

    def _stars(self) -> Listing:
        columns = ["benchmarks", "student", "worst", "alpha* (95 %)"]
        columns += [f"alpha at {c}" for c in COVERAGES] + ["P(C_0 >= 1/2)"]
        columns += self._margin_column() + self._recovered_columns()
        rows = []
        for group in self.groups:
            for name, c in group.students.items():
                row = [group.title, name, c.worst or ""]
                row.append(_ranged(c.alpha_star, c.alpha_star_interval, 4))
                row += [f"{c.tolerance[share]:.4f}" for share in COVERAGES]
                row.append(_number(c.lossless_probability, "unknown"))
                rows.append(row + self._margin_cell(c) + self._recovered_cells(c))
        title = "Win-and-Tie: the tolerance that half of the benchmarks need"
        title = "; ".join([title, *self._of_teacher(), self._detects()])
        return Listing(title, columns, rows, 3)

    def _margin_column(self) -> list[str]:
        return [] if self.margin is None else [f"not inferior, margin {self.margin:g}"]

    def _margin_cell(self, of: Standing | Curve) -> list[str]:
        words = {True: "yes", False: "not shown", None: "unknown"}
        return [] if self.margin is None else [words[of.non_inferior]]

    def _recovered_columns(self) -> list[str]:
        return [f"recovered from {control} (95 %)" for control in self.controls]

    def _recovered_cells(self, of: Standing | Curve) -> list[str]:
        return [
            _ranged(of.recovered.get(control), of.recovered_interval.get(control))
            for control in self.controls
        ]

    def remarks(self) -> list[str]:
        """Warnings, notes and what intervals cannot be trusted, a line each."""
        few = [b.task for b in self.benchmarks if b.units is not None and b.units < FEW]
        found = [f"warning: {warning}" for warning in self.warnings] + self.notes
        if not self.groups:
            all_dropped = "warning: the teacher is at chance on all benchmarks, which are left out"
            found.insert(0, f"{all_dropped}: there is no alpha*; compare without --drop-chance")
        if few:
            found.append(f"fewer than {FEW} units, intervals are rough: {', '.join(few)}")
        if parts := [b.task for b in self.benchmarks if b.partial]:
            found.append(f"measured on a part of the documents: {', '.join(parts)}")
        for group in self.groups:
            found += [
                f"{group.title}: the curve of {first} is nowhere below that of {second}"
                for first, second in group.dominance
            ]
        return found

    def tables(self) -> list[Any]:
        """The listings as `rich` tables."""
        from rich.table import Table
        from rich.text import Text

        found = []
        for listing in self.listings():
            table = Table(title=Text(listing.title), title_justify="left")
            for i, name in enumerate(listing.columns):
                table.add_column(Text(name), justify="left" if i < listing.words else "right")
            for row in listing.rows:
                table.add_row(*map(Text, row))
            found.append(table)
        return found

    def table(self) -> str:
        """Tables and remarks as text."""
        from rich.console import Console

        # Wide enough for any set of students: a terminal's width must not cut figures off.
        # Plain text in notebooks, too.
        console = Console(width=10_000, file=StringIO(), force_jupyter=False, color_system=None)
        with console.capture() as text:
            for table in self.tables():
                title, table.title = table.title, None
                console.print(title)
                console.print(table)
            for remark in self.remarks():
                console.print(remark, markup=False, highlight=False)
        return text.get()


def _with_ends(name: str, value: float | None, ends: Range | None) -> dict[str, float | None]:
    low, high = ends or (None, None)
    return {name: value, f"{name} low": low, f"{name} high": high}


def _number(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.4g}"


def _ranged(value: float | None, ends: Range | None, digits: int = 3) -> str:
    if value is None:
        return "n/a"
    text = decimals(value, digits)
    if ends is None:
        return text
    return f"{text} ({decimals(ends[0], digits)}–{decimals(ends[1], digits)})"
