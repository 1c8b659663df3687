"""The report of a run: one self-contained HTML file, the same facts as JSON and on the terminal.

The schema of the data is the pydantic model `ReportData` below; `report` and `terminal_table` take
an instance or a plain dict of the same form. Optional parts that are absent are left out of the
report. Unknown keys are errors.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .durations import duration
from .errors import UserError, validated
from .evaluate.comparison import Comparison
from .evaluate.evidence import Evidence
from .evaluate.fidelity import Fidelity
from .evaluate.scores import decimals
from .evaluate.uncertainty import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TeacherFacts(_Part):
    """The teacher. `form` says what the weights are, e.g. "Q4_1 GGUF, dequantised"."""

    name: str
    file: str
    form: str
    fingerprint: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int


class StudentFacts(_Part):
    """The student's mixer and how many parameters it has, `added` of them new."""

    mixer: str
    window: int | None
    sinks: int
    gate: str
    normalizer: str
    feature_map: str
    parameters: int
    added: int

    @property
    def words(self) -> str:
        """What the mixers are."""
        if self.mixer == "attention":
            return "the teacher's attention in every layer"
        window = "full attention" if self.window is None else f"window {self.window}"
        words = f"{self.mixer}, {window}, {self.sinks} sinks"
        if self.mixer == "window":
            return words
        return (
            f"{words}, {self.gate} gate, {self.feature_map} features, {self.normalizer} normaliser"
        )


class TextFacts(_Part):
    """A body of text. `use`: "training" or "evaluation"; `origin` in words. `left_out`: documents
    by why they were, repeated, malformed (which kind) or contaminated; of the last that they were
    only counted, where that was asked for. `passes`: how often the expert that read it most went
    through it in stage II."""

    domain: str
    use: str
    origin: str
    documents: int
    tokens: int
    passes: float = 0.0
    left_out: dict[str, int] = Field(default_factory=dict)


class StageFacts(_Part):
    """One stage as it ran. Times in seconds, memory in MiB; None: not measured or no steps."""

    name: str
    what: str
    steps: int | None = None
    tokens: int | None = None
    seconds: float
    peak_memory_mib: float | None = None


class LossCurve(_Part):
    """One line of a loss plot; curves of the same `stage` share one plot."""

    stage: str
    label: str
    steps: list[int]
    values: list[float]
    unit: str = "nats a token"

    @model_validator(mode="after")
    def _lengths(self) -> LossCurve:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.steps)} steps, but {len(self.values)} values")
        return self


class LayerErrors(_Part):
    """Stage I: relative error ||h - h^||^2 / ||h||^2 before and after, of the `layers` that were
    trained."""

    layers: list[int]
    before: list[float]
    after: list[float]

    @model_validator(mode="after")
    def _lengths(self) -> LayerErrors:
        sizes = [len(self.layers), len(self.before), len(self.after)]
        if len(set(sizes)) > 1:
            raise ValueError(f"{sizes[0]} layers, {sizes[1]} numbers before, {sizes[2]} after")
        return self


class GateMap(_Part):
    """Median output gate, [layers][heads], in 0..1 (1: mLSTM); None in layers without a gate."""

    values: list[list[float | None]]
    text: str = ""


class Sample(_Part):
    """A prompt and what each model wrote, name -> text."""

    prompt: str
    outputs: dict[str, str]


class Claim(_Part):
    """A statement that was checked, e.g. "merged KL / control KL", with what was found."""

    claim: str
    found: str
    holds: bool


class ReportData(_Part):
    """All a report shows.

    fidelity: result of `evaluate.fidelity`, whose `models` name every student and control;
    control: the name of the untrained control in it; main: the name of the student the report is
    about (the merged one). benchmarks: result of `evaluate.compare`. recipe: the recipe as
    nested plain values. machine: facts such as cpu, cores, instruction set, versions.
    """

    title: str
    created: str
    summary: str = ""
    teacher: TeacherFacts
    student: StudentFacts
    main: str
    control: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    text: list[TextFacts] = Field(default_factory=list)
    stages: list[StageFacts] = Field(default_factory=list)
    losses: list[LossCurve] = Field(default_factory=list)
    layer_errors: LayerErrors | None = None
    fidelity: Fidelity | None = None
    gates: GateMap | None = None
    benchmarks: Comparison | None = None
    samples: list[Sample] = Field(default_factory=list)
    claims: list[Claim] = Field(default_factory=list)
    machine: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


def report_data(data: ReportData | Mapping[str, Any]) -> ReportData:
    """`data` checked against the schema; raises UserError that names the key."""
    return data if isinstance(data, ReportData) else validated(ReportData, data, "report")


# ---- writing ------------------------------------------------------------------------------------


def report(data: ReportData | Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write `report.html` (one file, nothing is loaded from elsewhere) and `report.json`.

    Returns the path of the HTML file. Raises UserError for data that do not fit the schema or a
    directory that cannot be written.
    """
    facts = report_data(data)
    page = _page(
        "report.html.j2",
        facts=facts,
        recipe=yaml.safe_dump(facts.recipe, sort_keys=False, allow_unicode=True),
        figures=_figures(facts),
        fidelity=_fidelity_rows(facts),
        positions=_position_rows(facts),
    )
    files = {"report.html": page, "report.json": facts.model_dump_json(indent=1) + "\n"}
    return _write(files, Path(out_dir))


def comparison_report(
    comparison: Comparison, out_dir: str | Path, evidence: Evidence | None = None
) -> Path:
    """Write a comparison alone as `report.html`, one file as that of `report`, with what else is
    known of its models; beside it comparison.json, comparison.csv and each figure as SVG and PNG.

    Returns its path. Raises UserError for a directory that cannot be written, and for students
    whose names are those of other columns of the CSV.
    """
    from . import plots  # slow to import

    comparison.write_numbers(out_dir)
    found = evidence or Evidence()
    parts = {"benchmarks": comparison.figures(), "evidence": found.figures()}
    page = _page(
        "comparison.html.j2",
        comparison=comparison,
        evidence=found,
        figures=_drawn({section: list(of.values()) for section, of in parts.items() if of}),
    )
    place = _write({"report.html": page}, Path(out_dir))
    for figures in parts.values():
        plots.save_all(figures, out_dir, [".svg", ".png"])
    return place


def _write(files: Mapping[str, str], folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # Written beside and renamed: a reader never sees half a report.
            work = folder / f".{name}.tmp"
            work.write_text(text, encoding="utf-8")
            os.replace(work, folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the report: {error.strerror or error}") from None
    return folder / "report.html"


def _page(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("xlstm_distill", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        number=_number,
        decimals=decimals,
        count=_count,
        duration=duration,
        percent=lambda x: f"{100 * x:.1f} %",
    )
    page: str = environment.get_template(template).render(**values)
    return page


class _Drawn(NamedTuple):
    """A figure on a page: what it shows, for readers who do not see it, inline SVG, and its width
    in rem, by which letters have one size in all figures."""

    text: str
    image: Markup
    width: float


_REM_PER_INCH = 5.1
"""Two figures of the usual width side by side fill the page."""


def _drawn(figures: Mapping[str, Sequence[tuple[str, Figure]]]) -> dict[str, list[_Drawn]]:
    """The figures of each section."""
    from . import plots  # slow to import

    numbers = itertools.count()

    def drawn(text: str, figure: Figure) -> _Drawn:
        image = Markup(_unique_ids(plots.svg(figure), f"figure{next(numbers)}"))
        return _Drawn(text, image, round(_REM_PER_INCH * figure.get_figwidth(), 1))

    return {name: [drawn(*one) for one in of] for name, of in figures.items()}


def _figures(facts: ReportData) -> dict[str, list[_Drawn]]:
    from . import plots  # slow to import

    found: dict[str, list[tuple[str, Figure]]] = {}

    def add(section: str, text: str, figure: Figure) -> None:
        found.setdefault(section, []).append((text, figure))

    for stage in dict.fromkeys(curve.stage for curve in facts.losses):
        curves = [curve for curve in facts.losses if curve.stage == stage]
        lines = {c.label: (c.steps, c.values) for c in curves}
        add("losses", f"Loss of {stage}", plots.loss_curves(lines, stage, curves[0].unit))
    if facts.layer_errors is not None:
        errors = facts.layer_errors
        add(
            "layers",
            "Stage I error by layer",
            plots.layer_errors(errors.layers, errors.before, errors.after),
        )
    if facts.fidelity is not None:
        names = facts.fidelity.complete
        for metric, text in (("kl", "KL"), ("agree", "Agreement"), ("perplexity", "Perplexity")):
            shown = names if metric == "perplexity" else [n for n in names if n != "teacher"]
            title = f"{text} by position"
            figure = plots.by_position(facts.fidelity, metric, shown, title)
            add("fidelity", title, figure)
    if facts.gates is not None:
        add("gates", "Output gates", plots.gate_map(facts.gates.values, "Median output gate"))
    if facts.benchmarks is not None:
        found["benchmarks"] = list(facts.benchmarks.figures().values())
    return _drawn(found)


def _unique_ids(svg: str, stem: str) -> str:
    """Ids of one figure made different from those of the other figures on the page."""
    svg = re.sub(r'\bid="', f'id="{stem}-', svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{stem}-', svg)
    return re.sub(r"url\(#", f"url(#{stem}-", svg)


def _fidelity_rows(facts: ReportData) -> list[dict[str, Any]]:
    """One row per model and domain, the mean of the domains first."""
    result = facts.fidelity
    if result is None:
        return []
    rows = []
    for name in result.complete:
        of_domain = result.models[name]
        parts = [("all", result.mean(name)), *((d, of_domain[d].overall) for d in result.domains)]
        for domain, measure in parts:
            ratio = _ratio(facts, name, None if domain == "all" else domain)
            rows.append({"model": name, "domain": domain, "measure": measure, "ratio": ratio})
    return rows


def _ratio(facts: ReportData, name: str, domain: str | None) -> Interval | None:
    """KL over the control's; None for the teacher, the control and a control that is perfect."""
    result = facts.fidelity
    if result is None or name in ("teacher", facts.control) or facts.control not in result.models:
        return None
    return result.ratio(name, facts.control, domain=domain)


def _position_rows(facts: ReportData) -> list[dict[str, Any]]:
    result = facts.fidelity
    if result is None:
        return []
    names = [name for name in result.complete if name != "teacher"]
    return [
        {"bucket": f"{lo}–{hi}", "kl": {name: result.mean(name, i).kl for name in names}}
        for i, (lo, hi) in enumerate(result.buckets)
    ]


# ---- the terminal -------------------------------------------------------------------------------


def terminal_table(data: ReportData | Mapping[str, Any], console: Console | None = None) -> None:
    """Print the report's facts as tables."""
    facts = report_data(data)
    out = console if console is not None else Console()
    tables = [_overview(facts)]
    if facts.stages:
        tables.append(_stage_table(facts))
    if facts.layer_errors is not None:
        tables.append(_layer_table(facts.layer_errors))
    if facts.fidelity is not None:
        tables += [_fidelity_table(facts), _position_table(facts)]
    if facts.gates is not None:
        tables.append(_gate_table(facts.gates))
    if facts.benchmarks is not None:
        tables += facts.benchmarks.tables()
    tables += [_sample_table(sample) for sample in facts.samples]
    if facts.claims:
        tables.append(_claim_table(facts))
    for table in tables:
        # Above the table, not as its title: a title is folded to the width of its table.
        out.print(Text(str(table.title), style="bold"), soft_wrap=True)
        table.title = None
        out.print(table)
        out.print()
    remarks = facts.benchmarks.remarks() if facts.benchmarks is not None else []
    for note in [*remarks, *facts.notes]:
        out.print(Text(note))


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=Text(title))
    for name in left:
        table.add_column(Text(name), overflow="fold")
    for name in right:
        table.add_column(Text(name), justify="right")
    return table


def _add(table: Table, *cells: str) -> None:
    # As Text: square brackets in names and generated text are not markup.
    table.add_row(*(Text(cell) for cell in cells))


def _overview(facts: ReportData) -> Table:
    teacher, student = facts.teacher, facts.student
    table = _table(facts.title, ("", "teacher", "student"))
    _add(table, "what", f"{teacher.name}: {teacher.form}", student.words)
    _add(table, "file", teacher.file, facts.main)
    added = f"{_count(student.parameters)} ({_count(student.added)} new)"
    _add(table, "parameters", _count(teacher.parameters), added)
    return table


def _stage_table(facts: ReportData) -> Table:
    table = _table("Stages", ("stage", "what"), ("steps", "tokens", "time", "memory, MiB"))
    for stage in facts.stages:
        _add(
            table,
            stage.name,
            stage.what,
            _count(stage.steps),
            _count(stage.tokens),
            duration(stage.seconds),
            _count(stage.peak_memory_mib),
        )
    total = sum(stage.seconds for stage in facts.stages)
    _add(table, "together", "", "", "", duration(total), "")
    return table


def _layer_table(errors: LayerErrors) -> Table:
    table = _table("Stage I: relative error by layer", ("layer",), ("before", "after", "ratio"))
    for layer, before, after in zip(errors.layers, errors.before, errors.after, strict=True):
        ratio = f"{after / before:.3f}" if before > 0 else "n/a"
        _add(table, str(layer), _number(before), _number(after), ratio)
    return table


def _fidelity_table(facts: ReportData) -> Table:
    context = facts.fidelity.context if facts.fidelity is not None else 0
    right = ("KL", "KL / control (95 %)", "agreement", "perplexity")
    table = _table(f"Fidelity to the teacher, context {context}", ("model", "domain"), right)
    for row in _fidelity_rows(facts):
        m, ratio, of = row["measure"], row["ratio"], partial(decimals, digits=3)
        _add(
            table,
            row["model"] + (" (control)" if row["model"] == facts.control else ""),
            row["domain"],
            decimals(m.kl, 4),
            "" if ratio is None else f"{of(ratio.value)} ({of(ratio.low)}–{of(ratio.high)})",
            decimals(m.agree, 4),
            decimals(m.perplexity, 3),
        )
    return table


def _position_table(facts: ReportData) -> Table:
    rows = _position_rows(facts)
    names = list(rows[0]["kl"]) if rows else []
    table = _table("KL by position in the window", ("position",), names)
    for row in rows:
        _add(table, row["bucket"], *(decimals(row["kl"][name], 4) for name in names))
    return table


def _gate_table(gates: GateMap) -> Table:
    table = _table("Median output gate (0 attention, 1 mLSTM)", ("layer", "heads"))
    for layer, row in enumerate(gates.values):
        _add(table, str(layer), " ".join("   -" if v is None else f"{v:.2f}" for v in row))
    return table


def _sample_table(sample: Sample) -> Table:
    table = _table(f"Prompt: {sample.prompt}", ("model", "text"))
    for name, text in sample.outputs.items():
        _add(table, name, text)
    return table


def _claim_table(facts: ReportData) -> Table:
    table = _table("Checked", ("statement", "found", "holds"))
    for claim in facts.claims:
        _add(table, claim.claim, claim.found, "yes" if claim.holds else "NO")
    return table


# ---- words for numbers --------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
