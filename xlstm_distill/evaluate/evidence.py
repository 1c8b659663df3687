"""What else is known of the models of a comparison, beside their scores.

The samples of a results file tell which needles were found. A fidelity file tells how near a
student stays to its teacher and how its gates stand; `evaluate --teacher` writes it beside the
results, `results_NAME.json` and `fidelity_NAME.json`. What a token costs follows from a model's
sizes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from .. import checkpoints
from ..bench import counted_costs
from ..errors import UserError, validated
from ..json_files import read_json
from .comparison import Figures, Listing
from .continuations import Continuations
from .divergence import DistanceMeasure, Divergence
from .fidelity import Fidelity
from .needle import is_needle, needle_grid
from .results import read_results
from .scores import decimals
from .uncertainty import seen_with

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gates = list[list[float | None]]

STUDENT = "student"
"""Name of the student in a fidelity file."""
_SAME_NLL = 1e-3
"""Nats by which a teacher's mean nll may differ between files: float32 on another processor moves
it by some 1e-6, weights in bf16 by more than this."""


class FidelityFile(BaseModel):
    """What `fidelity --out` and `evaluate --teacher` write: a student, named "student", beside its
    teacher. teacher: the file of its weights and what they are. divergence: domain -> details.
    gates: median output gate, [layers][heads], of a student that has some."""

    model_config = ConfigDict(extra="forbid")

    teacher: str = ""
    fidelity: Fidelity
    divergence: dict[str, Divergence]
    gates: Gates | None = None
    continuations: Continuations | None = None


_DETECTABLE = (
    "detectable: the true difference to the teacher that so many windows show in 8 of 10 cases"
)


def _detectable(stderr: float | None) -> str:
    return "unknown" if stderr is None else f"{seen_with(stderr):.4f}"


@dataclass
class Evidence:
    """What the files tell; what no file tells is empty.

    teacher: its weights, in words. needles: model -> `needle_grid`. fidelity: of all students on
    the same windows. by_distance: student -> measures by distance, over the positions of all
    domains.
    gates: student -> median output gate. costs: model -> `bench.counted_costs`. warnings: what does
    not compare and was left out.
    """

    teacher: str = ""
    needles: dict[str, dict[str, dict[int, list[float]]]] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    by_distance: dict[str, list[DistanceMeasure]] = field(default_factory=dict)
    gates: dict[str, Gates] = field(default_factory=dict)
    costs: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def students(self) -> list[str]:
        """Those whose fidelity is known."""
        return [] if self.fidelity is None else [n for n in self.fidelity.models if n != "teacher"]

    def figures(self) -> Figures:
        """File name without its ending -> what the figure shows, and the figure."""
        from .. import plots  # slow to import

        found: Figures = {}

        def add(name: str, text: str, figure: Figure) -> None:
            found[plots.file_name(name, found)] = text, figure

        for name, grid in self.needles.items():
            text = f"Needles found: {name}"
            add(f"needle_{name}", text, plots.needle_grid(grid, text))
        if self.fidelity is not None:
            text = "KL by position"
            add(
                "kl_by_position",
                text,
                plots.by_position(self.fidelity, "kl", self.students, text),
            )
        if self.by_distance:
            for metric, what in (("kl", "KL"), ("perplexity", "Perplexity")):
                text = f"{what} by distance of what can be copied"
                figure = plots.by_distance(self.by_distance, metric, text)
                add(f"{metric}_by_distance", text, figure)
        for name, gates in self.gates.items():
            text = f"Median output gate: {name}"
            add(f"gates_{name}", text, plots.gate_map(gates, text))
        if self.costs:
            text = "Cost against context, counted from the sizes"
            add("context_costs", text, plots.context_costs(self.costs, text))
        return found

    def listings(self) -> list[Listing]:
        """The figures' numbers as tables; each names the teacher."""
        found = []
        if self.fidelity is not None:
            found.append(self._positions(self.fidelity))
        if self.by_distance:
            found.append(self._distances())
        if self.costs:
            found.append(self._costs())
        return found

    def _positions(self, fidelity: Fidelity) -> Listing:
        rows = []
        for i, (low, high) in enumerate(fidelity.buckets):
            row = [f"{low}–{high}"]
            for name in self.students:
                kl, stderr = fidelity.mean(name, i).kl, fidelity.kl_stderr(name, i)
                row += [f"{kl:.4f}", _detectable(stderr)]
            rows.append(row)
        title = (
            "KL(teacher ‖ student) in nats by position in the window, mean of the domains; "
            + _DETECTABLE
        )
        columns = ["position"]
        for name in self.students:
            columns += [name, "detectable"]
        return Listing(self._of_teacher(title), columns, rows, 1)

    def _distances(self) -> Listing:
        rows = []
        ranges = list(dict.fromkeys(m.range for of in self.by_distance.values() for m in of))
        columns = ["distance", "positions", "teacher: perplexity"]
        for name in self.by_distance:
            columns += [f"{name}: perplexity", "NLL - teacher's", "detectable"]
            columns += [f"{name}: KL", "detectable"]
        for low_high in ranges:
            own = [
                next((m for m in of if m.range == low_high), None)
                for of in self.by_distance.values()
            ]
            any_of = next(m for m in own if m is not None)
            row = [low_high, f"{any_of.positions:,}", decimals(any_of.teacher_perplexity, 3)]
            for m in own:
                if m is None:
                    row += [""] * 5
                    continue
                row += [decimals(m.perplexity, 3), f"{m.nll - m.teacher_nll:.4f}"]
                row.append(_detectable(m.nll_difference_stderr))
                row += [f"{m.kl:.4f}", _detectable(m.kl_stderr)]
            rows.append(row)
        title = (
            "KL(teacher ‖ student) in nats and perplexity by how far back the next token could be "
            f"copied from (new: never in this window); {_DETECTABLE}"
        )
        return Listing(self._of_teacher(title), columns, rows, 1)

    def _costs(self) -> Listing:
        contexts = list(next(iter(self.costs.values()))["memory"])
        columns = ["context, tokens"]
        for name in self.costs:
            columns += [f"{name}: state, MiB", f"{name}: million multiply-adds a token"]
        rows = []
        for context in contexts:
            row = [f"{context:,}"]
            for of in self.costs.values():
                row += [f"{of['memory'][context]:,.3f}", f"{of['work'][context] / 1e6:,.1f}"]
            rows.append(row)
        # No samples, hence nothing to detect: every difference is one.
        title = (
            "What one more token costs, counted from the models' sizes (nothing is sampled: counts "
            "are exact), numbers of 4 bytes"
        )
        return Listing(self._of_teacher(title), columns, rows, 1)

    def _of_teacher(self, title: str) -> str:
        return f"{title}; teacher: {self.teacher or 'its file is not known'}"


def evidence(
    results: Mapping[str, str],
    fidelity: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
) -> Evidence:
    """What is known of the models whose scores lie in `results` (name -> file; one is "teacher").

    fidelity: student -> fidelity file, where it does not lie beside the results. models: name ->
    model directory, .gguf file or fetched name, of which only the sizes are read.

    Raises UserError for damaged files and names that are not in `results`.
    """
    fidelity, models = fidelity or {}, models or {}
    for option, names in (("--fidelity", fidelity), ("--model", models)):
        known = [n for n in results if n != "teacher" or option == "--model"]
        for name in names:
            if name not in known:
                message = f"{option} {name}: expected one of {', '.join(known)}"
                raise UserError(message, usage=True)
    found = Evidence()
    files = {}
    for name, result in results.items():
        place = Path(result)
        if place.suffix != ".json":
            continue
        if grid := _needles(place):
            found.needles[name] = grid
        beside = place.with_name(f"fidelity_{place.stem.removeprefix('results_')}.json")
        if name != "teacher" and beside.is_file():
            files[name] = beside
    files |= {name: Path(file) for name, file in fidelity.items()}
    _add_fidelity(found, {name: files[name] for name in results if name in files})
    for name in (n for n in results if n in models):
        model = checkpoints.load(models[name])
        found.costs[name] = counted_costs(model.config)
        if name == "teacher":
            found.teacher = checkpoints.weights_file(model.source)
    return found


def _needles(results: Path) -> dict[str, dict[int, list[float]]]:
    """The grid of the needle tasks that have samples of our form; lm-evaluation-harness's tasks of
    these names have no length."""
    samples = {
        task: of
        for task, of in read_results(results)["samples"].items()
        if is_needle(task)
        and task.partition(":")[2].isdecimal()
        and all(isinstance(sample.get("string_match_all"), int | float) for sample in of)
    }
    return needle_grid(samples)


def read_fidelity(file: Path) -> FidelityFile:
    """A fidelity file. Raises UserError for what is none, and for NaN."""
    values = read_json(file, unique=True)
    found = validated(FidelityFile, values, str(file))
    if STUDENT not in found.fidelity.models or "teacher" not in found.fidelity.models:
        raise UserError(f"{file}: fidelity.models: expected 'teacher' and '{STUDENT}'")
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise UserError(f"{file}: holds NaN or infinity; measure the fidelity again") from None
    return found


def _add_fidelity(found: Evidence, files: Mapping[str, Path]) -> None:
    """Students whose fidelity was measured as that of the first one; others are warned of."""
    first: tuple[Path, FidelityFile] | None = None
    for name, file in files.items():
        own = read_fidelity(file)
        if first is None:
            first = file, own
            found.teacher = own.teacher
            models = {"teacher": own.fidelity.models["teacher"]}
            found.fidelity = own.fidelity.model_copy(update={"models": models})
        elif difference := _difference(file, own, *first):
            found.warnings.append(f"{difference}: fidelity of {name} is left out")
            continue
        assert found.fidelity is not None
        found.fidelity.models[name] = own.fidelity.models[STUDENT]
        found.by_distance[name] = _pooled(list(own.divergence.values()))
        if own.gates is not None:
            found.gates[name] = own.gates


def _difference(file: Path, own: FidelityFile, first: Path, other: FidelityFile) -> str | None:
    """What was measured otherwise in two files, with both values."""

    def facts(of: Fidelity) -> dict[str, Any]:
        return {"context": of.context, "ranges of positions": of.buckets, "tokens": of.tokens}

    for what, value in facts(own.fidelity).items():
        if value != (theirs := facts(other.fidelity)[what]):
            return f"{what} of {file} is {value}, of {first} {theirs}"
    for domain in own.fidelity.domains:
        mine, theirs = (f.fidelity.models["teacher"][domain].overall.nll for f in (own, other))
        if not abs(mine - theirs) <= _SAME_NLL:
            return f"the teacher's NLL on {domain} in {file} is {mine:.4f}, in {first} {theirs:.4f}"
    return None


def _pooled(domains: Sequence[Divergence]) -> list[DistanceMeasure]:
    """Measures by distance over the positions of all domains."""
    measures = sorted(itertools.chain.from_iterable(d.by_distance for d in domains), key=_by_range)
    found = []
    for _, group in itertools.groupby(measures, key=_by_range):
        of = list(group)
        count = sum(m.positions for m in of)
        shares = [m.positions / count for m in of]
        pooled: dict[str, float | None] = {
            what: sum(share * getattr(m, what) for share, m in zip(shares, of, strict=True))
            for what in ("kl", "agree", "nll", "teacher_nll")
        }
        for what in ("kl_stderr", "nll_difference_stderr"):
            errors = [getattr(m, what) for m in of]
            known = None not in errors
            pooled[what] = math.hypot(*np.multiply(shares, errors)) if known else None
        found.append(of[0].model_copy(update={"positions": count, **pooled}))
    return found


def _by_range(measure: DistanceMeasure) -> tuple[bool, int]:
    """Near to far, what is new last."""
    return measure.low is None, measure.low or 0
