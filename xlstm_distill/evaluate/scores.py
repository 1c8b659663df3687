"""Scores of a model: from a mapping, a table (CSV), or results of lm-evaluation-harness's form.

`scores_of` reads all of them into `ModelScores`: of each benchmark one exact score, by which metric
it is, and what else the source tells: samples, chance level, conditions. What is damaged or unclear
is a `UserError` in one line that names the file and the key.
"""

from __future__ import annotations

import csv
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from numbers import Rational
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, short
from ..json_files import text_of
from .results import object_at, read_results, slim
from .uncertainty import Outcomes

Number = int | float | str | Decimal | Fraction | np.number[Any]
Source = Mapping[str, Any] | str | Path
"""Task -> score; or results of `evaluate` or lm-evaluation-harness (a mapping or a JSON file); or a
table, FILE.csv or FILE.csv:COLUMN."""

_DIGITS = 100
"""Powers of ten that a score may be away from 1: far beyond any, and ratios are still floats."""
_SAME = 1e-4
"""How far the score that samples give may be from the stated one, which may be rounded."""

_PREFERRED = (
    "acc_norm",
    "acc",
    "exact_match",
    "pass@1",
    "f1",
    "bits_per_byte",
    "byte_perplexity",
    "word_perplexity",
    "perplexity",
)
"""Which metric stands for a task that has several."""
LIKELIHOOD = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "nll")
"""Metrics of the kind "likelihood"."""
_EXPONENTIAL = ("byte_perplexity", "word_perplexity", "perplexity")
_ERROR = ("brier_score", "ter", "wer", "cer", "mae", "mse")
_CHOICE = ("acc", "acc_norm", "acc_mutual_info")
"""Metrics of multiple choice, for which guessing gives the chance level."""
_GROUPS = {"multiple_choice": "understanding", "generate_until": "generation"}
"""Kinds of tasks by lm-evaluation-harness's `output_type`."""

_TASK = object()
_CONDITIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("task version", ("versions", _TASK)),
    ("request set", ("configs", _TASK, "request_set")),
    ("shots", ("n-shot", _TASK)),
    ("number of samples", ("n-samples", _TASK, "effective")),
    ("documents and prompts", ("task_hashes", _TASK)),
    ("limit", ("config", "limit")),
    ("longest input", ("config", "max_length")),
    ("chat template", ("chat_template_sha",)),
    ("system instruction", ("system_instruction_sha",)),
    ("few-shot as turns", ("fewshot_as_multiturn",)),
    ("seed", ("config", "seed")),
    ("random seed", ("config", "random_seed")),
    ("numpy seed", ("config", "numpy_seed")),
    ("torch seed", ("config", "torch_seed")),
    ("few-shot seed", ("config", "fewshot_seed")),
)
"""What must agree between results, and where it stands in them."""
_ABSENT = object()

_COLUMNS = ("task", "metric", "higher_is_better", "samples", "chance", "group")
"""Columns of a table that are not scores; those that end in " stderr" are neither."""


@dataclass(frozen=True)
class Score:
    """A model's score on one benchmark.

    metric: as in the source ("acc_norm,none"), "" where it names none. kind: "accuracy" (more is
    better), "likelihood" or "error" (less is better). samples: documents that were scored, of
    `available` ones. unit: the best possible accuracy, 1 or 100. chance: the score of guessing.
    group: "understanding", "generation" or the table's own. conditions: by the names of
    `_CONDITIONS`.
    """

    value: Fraction
    metric: str = ""
    kind: str = "accuracy"
    stderr: float | None = None
    samples: int | None = None
    available: int | None = None
    unit: int = 1
    chance: Fraction | None = None
    group: str | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Outcomes | None = None

    @property
    def lower_is_better(self) -> bool:
        return self.kind != "accuracy"


@dataclass(frozen=True)
class ModelScores:
    """All scores of a model, in the source's order. where: for messages. notes: what was left out
    or not used, in words. weights: the file that was measured and its form, where it is stated."""

    where: str
    tasks: Mapping[str, Score]
    notes: tuple[str, ...] = ()
    weights: str = ""


# ---- numbers ------------------------------------------------------------------------------------


def exact(value: Number, what: str = "score") -> Fraction:
    """The fraction that `value` shows in decimal: 0.1 is 1/10. `what` opens error messages."""
    if isinstance(value, bool | np.bool_):
        raise UserError(f"{what} is {value}, expected a number")
    if isinstance(value, Rational):
        return Fraction(value.numerator, value.denominator)
    try:
        decimal = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"{what} is {short(value)}, expected a number") from None
    if not decimal.is_finite():
        raise UserError(f"{what} is {value}, expected a finite number")
    if decimal == 0:
        return Fraction(0)
    if abs(decimal.adjusted()) > _DIGITS:
        raise UserError(f"{what} is {short(value)}, out of range")
    return Fraction(decimal)


def decimals(value: float, digits: int) -> str:
    """A number for tables, with so many decimals; from a million on in four digits and a power of
    ten, for a perplexity of a model that is lost may have hundreds of digits."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.4g}"


def _score(value: Any, what: str) -> Fraction:
    score = exact(value, what)
    if abs(score) > 10**_DIGITS:
        raise UserError(f"{what} is out of range")
    if score < 0:
        raise UserError(f"{what} is {float(score)}, below 0")
    return score


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{what} is {short(value)}, expected a number of documents")
    return value


def _kind(metric: str, more_is_better: Any, where: str) -> str:
    name = metric.partition(",")[0]
    if more_is_better is _ABSENT:
        more_is_better = name not in (*LIKELIHOOD, *_ERROR)
    if not isinstance(more_is_better, bool):
        raise UserError(f"{where}: higher_is_better of {name} is {short(more_is_better)}")
    if more_is_better:
        return "accuracy"
    return "likelihood" if name in ("", *LIKELIHOOD) else "error"


# ---- any source ---------------------------------------------------------------------------------


def scores_of(
    source: Source,
    name: str,
    *,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] = (),
) -> ModelScores:
    """The scores of one model.

    name: the model's, for messages, and the column of a table with several. tasks: only these;
    patterns with *. metrics: which stand for the tasks of results: "METRIC" or "METRIC,FILTER" for
    every task that has it, "TASK=METRIC,FILTER" for tasks of that name or pattern. Without it the
    first of acc_norm, acc, exact_match, pass@1, f1, bits_per_byte and perplexities is taken; of
    several filters one must be named.

    A group counts once, by its own score, and its subtasks are left out; a group without a score is
    left out and its subtasks count. A metric whose `higher_is_better` is null does not count.
    Raises UserError, in one line.
    """
    wanted = [_wanted(metric) for metric in metrics]
    if isinstance(source, str | Path):
        text = str(source)
        head, colon, column = text.partition(".csv:")
        if colon or text.endswith(".csv"):
            scores = _of_table(Path(head + ".csv" if colon else text), column, name)
            return _selected(scores, tasks)
        return _of_results(read_results(source), f"{name} ({text})", tasks, wanted)
    if isinstance(source.get("results"), Mapping):
        return _of_results(source, name, tasks, wanted)
    values = {str(t): _score(v, f"{name}: the score of {t}") for t, v in source.items()}
    unit = 100 if max(values.values(), default=0) > 1 else 1
    return _selected(ModelScores(name, {t: Score(v, unit=unit) for t, v in values.items()}), tasks)


def _selected(scores: ModelScores, tasks: Sequence[str] | None) -> ModelScores:
    if tasks is None:
        return scores
    chosen = _chosen(scores.tasks, tasks, scores.where)
    return replace(scores, tasks={t: scores.tasks[t] for t in chosen})


def _chosen(there: Iterable[str], tasks: Sequence[str], where: str) -> list[str]:
    names = list(there)
    for pattern in tasks:
        if not any(fnmatch.fnmatchcase(t, pattern) for t in names):
            raise UserError(f"{where}: has no results for task {pattern}")
    return [t for t in names if any(fnmatch.fnmatchcase(t, pattern) for pattern in tasks)]


# ---- tables -------------------------------------------------------------------------------------


def _of_table(file: Path, column: str, name: str) -> ModelScores:
    try:
        rows = list(csv.reader(text_of(file).splitlines(), strict=True))
    except csv.Error as error:
        raise UserError(f"{file}: not a table ({error})") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if "task" not in header:
        raise UserError(f"{file}: the first line must name the columns, `task` among them")
    if len(set(header)) < len(header):
        raise UserError(f"{file}: two columns have the same name")
    models = [c for c in header if c not in _COLUMNS and not c.endswith(" stderr")]
    column = column or (models[0] if len(models) == 1 else name)
    if column not in models:
        listed = ", ".join(models) or "none"
        raise UserError(f"{file}: has no scores of {column!r} (FILE.csv:COLUMN; there: {listed})")
    tasks: dict[str, Score] = {}
    for number, cells in enumerate(rows[1:], 2):
        if not cells:
            continue
        where = f"{file}: line {number}"
        if len(cells) != len(header):
            raise UserError(f"{where} has {len(cells)} cells, the first line {len(header)}")
        row = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
        if row["task"] in tasks:
            raise UserError(f"{where}: task {row['task']} appears twice")
        if row[column]:
            tasks[row["task"]] = _row_score(row, column, where)
    shares = [s.value for s in tasks.values() if not s.lower_is_better]
    unit = 100 if max(shares, default=0) > 1 else 1
    tasks = {task: replace(score, unit=unit) for task, score in tasks.items()}
    return ModelScores(f"{name} ({file}:{column})", tasks)


def _row_score(row: Mapping[str, str], column: str, where: str) -> Score:
    """The score of one model in one line of a table."""
    metric, samples = row.get("metric", ""), row.get("samples", "")
    stated = {"": _ABSENT, "true": True, "false": False}
    direction = row.get("higher_is_better", "").lower()
    if direction not in stated:
        raise UserError(f"{where}: higher_is_better is {direction!r}, expected true or false")
    if samples and not samples.isdecimal():
        raise UserError(f"{where}: samples is {short(samples)}, expected a number of documents")
    stderr, chance = row.get(f"{column} stderr"), row.get("chance")
    kind = _kind(metric, stated[direction], where)
    if chance and kind != "accuracy":
        raise UserError(f"{where}: chance is {chance}, but less is better in {row['task']}")
    return Score(
        _score(row[column], f"{where}: the score of {row['task']}"),
        metric=metric,
        kind=kind,
        stderr=float(_score(stderr, f"{where}: the standard error")) if stderr else None,
        samples=_count(int(samples), f"{where}: samples") if samples else None,
        chance=_score(chance, f"{where}: chance") if chance else None,
        group=row.get("group") or None,
    )


# ---- results of lm-evaluation-harness's form ----------------------------------------------------


def _of_results(
    results: Mapping[str, Any],
    where: str,
    tasks: Sequence[str] | None,
    metrics: Sequence[tuple[str, str]],
) -> ModelScores:
    listed = object_at(results, "results", where, needed=True)
    entries = {task: object_at(listed, task, f"{where}: results", needed=True) for task in listed}
    chosen = list(entries) if tasks is None else _chosen(entries, tasks, where)
    subtasks = _subtasks(results, where)
    notes: list[str] = []
    found: dict[str, Score] = {}
    for task in _counted(chosen, entries, subtasks, notes):
        what = f"{where}, task {task}"
        directions = object_at(object_at(results, "higher_is_better", where), task, what)
        metric = _metric(task, entries[task], directions, metrics, what)
        if metric is None:
            notes.append(f"{task} does not count: its higher_is_better is null")
            continue
        leaves = _leaves(task, subtasks)
        score = _task_score(results, task, metric, directions, leaves, what)
        samples = {leaf: _samples(results, leaf, where) for leaf in leaves}
        outcomes = outcomes_of(samples, metric, where)
        if outcomes is not None and not math.isclose(
            outcomes.score, float(score.value), rel_tol=_SAME, abs_tol=_SAME
        ):
            notes.append(
                f"{what}: its samples give {outcomes.score:.4g}, the results "
                f"{float(score.value):.4g}; the samples are not used"
            )
            outcomes = None
        if outcomes is not None and score.samples is None:
            score = replace(score, samples=len(outcomes.documents))
        found[task] = replace(score, outcomes=outcomes)
    notes += _without(found, metrics, where)
    weights = object_at(results, "config", where).get("weights")
    return ModelScores(where, found, tuple(notes), weights if isinstance(weights, str) else "")


def _without(
    found: Mapping[str, Score], wanted: Sequence[tuple[str, str]], where: str
) -> Iterator[str]:
    """A note on the tasks that are not compared by a metric that was asked for in all of them."""
    everywhere = [spec for pattern, spec in wanted if not pattern]
    of_task = {
        task: {score.metric, score.metric.partition(",")[0]} for task, score in found.items()
    }
    for spec in everywhere:
        if not any(spec in names for names in of_task.values()):
            raise UserError(f"{where}: no task has a metric {spec}")
    named = [pattern for pattern, _ in wanted if pattern]
    others = [
        f"{task} by {found[task].metric}"
        for task, names in of_task.items()
        if not names & {*everywhere} and not any(fnmatch.fnmatchcase(task, p) for p in named)
    ]
    if everywhere and others:
        yield f"{where} lacks {' and '.join(everywhere)} in some tasks: {', '.join(others)}"


def _wanted(metric: str) -> tuple[str, str]:
    """(task or pattern, "" for all; metric with or without filter)."""
    task, equals, of = metric.partition("=")
    return (task, of) if equals else ("", metric)


def _subtasks(results: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Groups and what is in them."""
    found = {}
    for group, inside in object_at(results, "group_subtasks", where).items():
        if not isinstance(inside, list) or not all(isinstance(t, str) for t in inside):
            raise UserError(f"{where}: group_subtasks: {group} is {short(inside)}")
        if inside:
            found[group] = inside
    return found


def _within(group: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """All that is below a group, at any depth, each once."""
    found: dict[str, None] = {}
    waiting = list(subtasks.get(group, ()))
    while waiting:
        task = waiting.pop(0)
        if task not in found and task != group:
            found[task] = None
            waiting += subtasks.get(task, ())
    return list(found)


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    return [t for t in _within(task, subtasks) if t not in subtasks] or [task]


def _counted(
    chosen: Sequence[str],
    entries: Mapping[str, Mapping[str, Any]],
    subtasks: Mapping[str, Sequence[str]],
    notes: list[str],
) -> list[str]:
    """The tasks that count as a benchmark each: no group beside its subtasks."""
    bare = {t for t in chosen if t in subtasks and not _metrics(entries[t])}
    inside: set[str] = set()
    for group in chosen:
        if group not in bare and group not in inside:
            below = [t for t in _within(group, subtasks) if t in chosen]
            inside.update(below)
            if below:
                notes.append(f"{group} counts as one benchmark; its {len(below)} subtasks do not")
    return [t for t in chosen if t not in bare and t not in inside]


def _metrics(entry: Mapping[str, Any]) -> list[str]:
    """Keys of an entry that are metrics with a value."""
    return [key for key in _metric_keys(entry) if entry[key] != "N/A"]


def _metric_keys(entry: Mapping[str, Any]) -> list[str]:
    return [key for key in entry if ("," in key or key in _PREFERRED) and "_stderr" not in key]


def _metric(
    task: str,
    entry: Mapping[str, Any],
    directions: Mapping[str, Any],
    wanted: Sequence[tuple[str, str]],
    what: str,
) -> str | None:
    """The metric that stands for a task; None where no metric says which direction is better."""
    there = _metrics(entry)
    if not there and (unmeasured := _metric_keys(entry)):
        raise UserError(
            f"{what}: {', '.join(unmeasured)} is N/A, no score; measure the task again or leave it "
            "out: --tasks names those to compare"
        )
    known = [k for k in there if directions.get(k.partition(",")[0], _ABSENT) is not None]
    if there and not known:
        return None
    own = [spec for pattern, spec in wanted if pattern and fnmatch.fnmatchcase(task, pattern)]
    for spec in own or [*(spec for pattern, spec in wanted if not pattern), *_PREFERRED]:
        found = [k for k in known if spec in (k, k.partition(",")[0])]
        if len(found) > 1:
            raise UserError(
                f"{what}: {spec} has several filters; choose one of "
                + ", ".join(f"--metric {task}={key}" for key in found)
            )
        if found:
            return found[0]
    if len(known) == 1 and not own:
        return known[0]
    listed = ", ".join(known) or "none"
    if own:
        raise UserError(f"{what}: has no metric {own[0]} (there: {listed})")
    raise UserError(
        f"{what}: cannot tell which metric to compare (there: {listed}); "
        f"name one: --metric {task}=METRIC,FILTER"
    )


def _task_score(
    results: Mapping[str, Any],
    task: str,
    metric: str,
    directions: Mapping[str, Any],
    leaves: Sequence[str],
    where: str,
) -> Score:
    """A task's score without its samples."""
    entry = results["results"][task]
    name, comma, chosen = metric.partition(",")
    value = _score(entry[metric], f"{where}: {metric}")
    error = entry.get(f"{name}_stderr{comma}{chosen}")
    unit = 100 if value > 1 else 1

    def of_leaves(*path: Any) -> list[Any]:
        return [x for leaf in leaves if (x := _lookup(results, path, leaf, where)) is not _ABSENT]

    def documents(key: str) -> int | None:
        counts = [_count(n, f"{where}: n-samples") for n in of_leaves("n-samples", _TASK, key)]
        return sum(counts) if len(counts) == len(leaves) else None

    conditions = {}
    for what, path in _CONDITIONS:
        if values := of_leaves(*path):
            conditions[what] = values[0] if all(v == values[0] for v in values) else values
    kinds = of_leaves("configs", _TASK, "output_type")
    chance = _chance(results, leaves, where) if name in _CHOICE else None
    return Score(
        value,
        metric=metric,
        kind=_kind(metric, directions.get(name, _ABSENT), where),
        stderr=None if error in (None, "N/A") else float(_score(error, f"{where}: {name}_stderr")),
        samples=documents("effective"),
        available=documents("original"),
        unit=unit,
        chance=None if chance is None else chance * unit,
        group=_GROUPS.get(kinds[0]) if kinds and isinstance(kinds[0], str) else None,
        conditions=conditions,
    )


def _lookup(results: Mapping[str, Any], path: Sequence[Any], task: str, where: str) -> Any:
    """What stands at `path`, `_ABSENT` where something on the way is missing."""
    value: Any = results
    for key in path:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {path[0]!r} is {short(value)}, expected an object")
        value = value.get(task if key is _TASK else key, _ABSENT)
        if value is _ABSENT or (value is None and key is not path[-1]):
            return _ABSENT
    return value


# ---- samples ------------------------------------------------------------------------------------


def _samples(results: Mapping[str, Any], task: str, where: str) -> list[dict[str, Any]]:
    rows = object_at(results, "samples", where).get(task, [])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{where}: the samples of {task} are not a list of objects")
    return [slim(row) for row in rows]


def _chance(results: Mapping[str, Any], leaves: Sequence[str], where: str) -> Fraction | None:
    """What guessing among the choices gives: stated, or from the samples."""
    levels: list[Fraction] = []
    for leaf in leaves:
        stated = _lookup(results, ("configs", _TASK, "chance"), leaf, where)
        rows = _samples(results, leaf, where)
        choices = [_choices(row) for row in rows]
        if stated not in (_ABSENT, None):
            levels += [_score(stated, f"{where}: chance")] * max(1, len(rows))
        elif choices and min(choices) > 1:
            levels += [Fraction(1, n) for n in choices]
        else:
            return None
    return sum(levels, Fraction(0)) / len(levels)


def _choices(sample: Mapping[str, Any]) -> int:
    """Among how many choices a model had to choose; 0 where the sample does not tell."""
    scores, count = sample.get("loglikelihoods"), sample.get("choices")
    if isinstance(scores, list):
        return len(scores)
    return count if isinstance(count, int) else 0


def outcomes_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, where: str
) -> Outcomes | None:
    """What the samples of some tasks say; None where one has none, or none of this metric.

    metric: with or without filter. where: opens error messages. Raises UserError for samples that
    are damaged.
    """
    name, _, chosen = metric.partition(",")
    found: dict[Any, tuple[Any, float, float]] = {}
    for leaf, rows in samples.items():
        if not rows:
            return None
        for row in rows:
            if row.get("filter", chosen) != chosen:
                continue
            document = row.get("doc_id")
            what = f"{where}: samples of {leaf}: document {short(document)}"
            if isinstance(document, bool) or not isinstance(document, int | str):
                raise UserError(f"{what} is not a name or number")
            if (leaf, document) in found:
                raise UserError(f"{what} appears twice")
            value = _sample_value(row, name)
            if value is None:
                return None
            if not all(map(math.isfinite, value)) or value[1] < 0:
                raise UserError(f"{what}: {name} is {short(row.get(name))}, expected a number")
            passage = row.get("passage")
            shared = passage if isinstance(passage, str) else document
            found[leaf, document] = ((leaf, shared), *value)
    passages, values, weights = zip(*found.values(), strict=True) if found else ((), (), ())
    if sum(weights) <= 0:
        return None
    return Outcomes(
        documents=tuple(found),
        passages=passages,
        values=np.array(values, dtype=np.float64),
        weights=np.array(weights, dtype=np.float64),
        exponential=name in _EXPONENTIAL,
    )


def _sample_value(sample: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """(value, weight) of a sample under a metric, as `Outcomes` has them; None: not of this one."""
    value: Any = sample.get(name)
    size: Any = 1
    if name == "bits_per_byte" and "loglikelihood" in sample:
        value, size = sample["loglikelihood"], sample.get("bytes")
    elif name in LIKELIHOOD and isinstance(value, list) and len(value) == 2:
        value, size = value
    if not isinstance(value, int | float) or not isinstance(size, int | float):
        return None
    if name not in LIKELIHOOD:
        return float(value), 1.0
    return -float(value) / (math.log(2) if name == "bits_per_byte" else 1.0), float(size)
