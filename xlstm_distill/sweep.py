"""A grid of recipes, a run directory for each of its points and seeds, and a table of the results.

    DIR/window=64,lr=0.01,seed=0/   a run directory like any other
    DIR/sweep.json  DIR/sweep.svg   the results of the runs that are done, after each of them

Results of stages that do not depend on what is varied are made once: a later run takes the files of
an earlier one as hard links (copies where the file system has none) with their lines of the log, so
that every run directory stays complete by itself.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import statistics
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table
from rich.text import Text

from . import runtime
from .assess import CONTROL, MERGED, read_fidelity
from .atomic import write_text
from .checkpoints import Checkpoint
from .checks import check, open_teacher
from .communicator import world
from .errors import UserError
from .evaluate.scores import decimals
from .processes import RunProcess
from .progress import Reporter
from .recipe import ALL, Recipe, first_difference, get_key, make_recipe, read_values, set_key
from .run import Run
from .rundir import STAGES, Interrupt, RunDirectory
from .sharing import parts, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PLOT = "sweep.json", "sweep.svg"
_METRICS = ("kl", "agree", "perplexity")
_POLL = 0.5
"""Seconds between two looks at the runs that go on at the same time."""
_SAFE = re.compile(r"[A-Za-z0-9._+-]{1,40}")


# ---- the grid -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Keys that change together, and the values that they take: [values][keys]."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Point:
    """A recipe of the grid, once for each seed. `values`: varied key -> value."""

    name: str
    values: dict[str, Any]
    runs: dict[str, Recipe]
    """Name of the run directory -> its recipe."""


def parse_axis(text: str) -> Axis:
    """An axis from "key=v1,v2", or "key/other=v1/w1,v2/w2" for keys that change together.

    Values are YAML. Raises UserError that names the text.
    """
    where = f"--vary {text}"
    left, equals, right = text.partition("=")
    keys = tuple(left.split("/"))
    if not equals or not all(keys):
        raise UserError(f"{where}: expected KEY=VALUE,VALUE,...", usage=True)
    if "seed" in keys:
        raise UserError(f"{where}: give --seeds N instead", usage=True)
    try:
        values = yaml.safe_load(f"[{right}]")
        if len(keys) > 1:
            rows = [tuple(yaml.safe_load(v) for v in str(value).split("/")) for value in values]
        else:
            rows = [(value,) for value in values]
    except yaml.YAMLError:
        raise UserError(f"{where}: the values are not valid YAML", usage=True) from None
    if not rows:
        raise UserError(f"{where}: there are no values", usage=True)
    for row in rows:
        if len(row) != len(keys):
            found = "/".join(map(_word, row))
            raise UserError(f"{where}: {found} is not a value for each of {left}", usage=True)
    return Axis(keys, tuple(rows))


def grid(
    recipe: str | Path, vary: Sequence[str] = (), seeds: int = 1, settings: Sequence[str] = ()
) -> list[Point]:
    """All points of the grid, each recipe checked.

    vary: texts for `parse_axis`; seeds: each point runs with so many seeds, from the recipe's own
    upwards. Raises UserError for the first point whose recipe is not valid, and for two points
    that are the same.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected at least 1", usage=True)
    axes = [parse_axis(text) for text in vary]
    keys = [key for axis in axes for key in axis.keys]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--vary {key}: named twice", usage=True)
    base = read_values(recipe, settings)
    names = _short_names(keys)
    points: list[Point] = []
    for row in itertools.product(*(axis.values for axis in axes)):
        values = dict(zip(keys, (v for part in row for v in part), strict=True))
        name = ", ".join(f"{names[key]} {_word(value)}" for key, value in values.items())
        where = f"{recipe} with {name}" if name else str(recipe)
        changed = copy.deepcopy(base)
        for key, value in values.items():
            set_key(changed, key, value, f"--vary {key}={_word(value)}")
        first = make_recipe(changed, where)
        if not first.evaluate.fidelity:
            raise UserError(f"{where}: a sweep tables evaluate.fidelity; give it", usage=True)
        for other in points:
            if first_difference(first, next(iter(other.runs.values()))) is None:
                raise UserError(f"{where}: the same as with {other.name}", usage=True)
        folder = "".join(f"{names[key]}={_file_word(value)}," for key, value in values.items())
        runs = {
            f"{folder}seed={seed}": make_recipe({**changed, "seed": seed}, where)
            for seed in range(first.seed, first.seed + seeds)
        }
        checked = first.model_dump(mode="json")  # 0.01 where 1e-2 was typed, a text in YAML
        points.append(Point(name or first.title, {k: get_key(checked, k) for k in values}, runs))
    return points


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> the shortest end of its path that no other key has and that is no number."""

    def ends(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[n:]) for n in reversed(range(len(parts)))]

    taken = [end for key in keys for end in ends(key)]
    return {
        key: next((e for e in ends(key) if taken.count(e) == 1 and not e[0].isdigit()), key)
        for key in keys
    }


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _file_word(value: Any) -> str:
    """A value as a part of a file name; where letters had to go, a hash keeps it distinct."""
    text = _word(value)
    if _SAFE.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")[:40] + f"-{digest}"


# ---- the runs -----------------------------------------------------------------------------------


def sweep(
    points: Sequence[Point],
    out: str | Path,
    reporter: Reporter | None = None,
    at_once: int = 1,
) -> Any:
    """Do all runs of a grid in `out` that are not done, and return the results (`results`).

    at_once: so many runs go on at the same time, each in a process of its own with its share of the
    threads, and more while fewer can go on; one goes on in this process. The results are the same,
    bit for bit.

    Seeds come one after the other, so that all points have their first run early. A run that fails
    is noted in the results and the others go on; Ctrl-C ends the sweep. Raises UserError before
    anything starts if `out` holds a run of another recipe, if a teacher, a file or a request
    set of any point is not there, or if there are not as many threads as runs at once.
    """
    reporter = reporter or Reporter()
    _check_at_once(at_once)
    if RunDirectory(out).has_recipe:
        raise UserError(f"{out}: is a run directory; choose another --out", usage=True)
    recipes = {Path(out) / name: recipe for p in points for name, recipe in p.runs.items()}
    _check(recipes)
    with RunDirectory(out) as held:  # its lock alone: one sweep at a time works here
        turns = itertools.chain.from_iterable(zip(*(p.runs for p in points), strict=True))
        left = {
            held.path / name: f"run {number} of {len(recipes)}: {name}"
            for number, name in enumerate(turns, start=1)
            if not _finished(held.path / name)
        }
        failed: dict[str, str] = {}
        if at_once == 1:
            ended = _one_by_one(left, recipes, reporter)
        else:
            ended = _side_by_side(left, recipes, reporter, at_once)
        with closing(ended):
            for place, failure in ended:
                if failure:
                    failed[place.name] = failure
                write_text(held.path / RESULTS, _json(results(points, held.path, failed)))
        found = results(points, held.path, failed)
        write_text(held.path / RESULTS, _json(found))
        _plot(found, held.path / PLOT)
    return found


def _check_at_once(at_once: int) -> None:
    where = f"--at-once {at_once}"
    if at_once < 1:
        raise UserError(f"{where}: expected at least 1", usage=True)
    if at_once > runtime.threads():
        raise UserError(f"{where}: there are {runtime.threads()} threads to share", usage=True)
    if at_once > 1 and world().size > 1:
        raise UserError(f"{where}: start the sweep without mpirun", usage=True)


def _finished(place: Path) -> bool:
    return (place / "report" / "report.json").is_file()


def _check(recipes: dict[Path, Recipe]) -> None:
    """Raise the first problem of a run; a teacher is opened once for all of them."""
    opened: dict[str, Checkpoint] = {}
    for place, recipe in recipes.items():
        teacher = recipe.teacher
        check(recipe, place=place, teacher=opened.get(teacher))
        if teacher not in opened:
            opened[teacher] = open_teacher(recipe)


# Runs that are left, in order, each with the note that it begins with; they become pairs of a run
# and why it failed, empty if it did not.
_Left = dict[Path, str]
_Ended = Generator[tuple[Path, str], None, None]


def _one_by_one(left: _Left, recipes: dict[Path, Recipe], reporter: Reporter) -> _Ended:
    interrupt = Interrupt()
    for place, note in left.items():
        reporter.note(note)
        failure = ""
        try:
            with interrupt.listening(), RunDirectory(place) as directory:
                recipe = _begin(directory, recipes, reporter)
                interrupt.check()
                Run(directory, recipe, reporter, interrupt).execute()
        except Exception as error:  # a defect, too, is one run's alone
            if isinstance(error, UserError | OSError | FloatingPointError | MemoryError):
                failure = " ".join(str(error).split()) or "out of memory"
            else:
                reporter.note(traceback.format_exc())
                failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            reporter.note(f"{place.name} failed: {failure}")
            interrupt.check()  # a run that was asked to stop may fail while it saves
        yield place, failure


def _begin(directory: RunDirectory, recipes: dict[Path, Recipe], reporter: Reporter) -> Recipe:
    """Begin a run, or take it up, and give it what others have for it; its recipe."""
    recipe = directory.begin(recipes[directory.path])
    for part, other in share(directory, recipe, recipes).items():
        reporter.note(f"{directory.path.name}: {part} is that of {other.name}")
    return recipe


# ---- several at once ----------------------------------------------------------------------------


class _Agenda:
    """Which runs can go on, and how far, so that no part is made by two of them."""

    def __init__(self, recipes: dict[Path, Recipe]) -> None:
        self._ahead = {place: list(parts(recipe)) for place, recipe in recipes.items()}
        self._made: set[str] = set()
        for place in recipes:
            self.look(place)

    def look(self, place: Path, until: str | None = None) -> None:
        """Learn from its log what a run has made. until: the stage with which a process of this run
        came to its end; not every stage up to it had something to do."""
        ahead = self._ahead[place]
        if not ahead:
            return
        lines = RunDirectory(place).read_log()
        done = {line["stage"] for line in lines if line.get("event") == "done"}
        own = {line["stage"].split()[0] for line in lines if "taken_from" not in line}
        at = max((STAGES.index(stage) for stage in own if stage in STAGES), default=0)
        if until is not None:
            at = max(at, STAGES.index(until) + 1)
        self._ahead[place] = [p for p in ahead if p.log[-1] not in done and p.stage >= at]
        self._made |= {p.key for p in ahead if p not in self._ahead[place]}

    def until(self, place: Path, active: Mapping[Path, str]) -> str | None:
        """The stage up to which a run can go now: before the first part that it wants and an active
        run (place -> the stage that it goes to) makes, and no further than what the same others
        wait for: then the threads are shared anew. None: it has to wait."""
        busy = {
            part.key
            for other, until in active.items()
            for part in self._ahead[other]
            if part.stage <= STAGES.index(until)
        }
        wanted = [part for part in self._ahead[place] if part.key not in self._made]
        end = min((part.stage for part in wanted if part.key in busy), default=len(STAGES))
        now = [part for part in wanted if part.stage < end]
        if end < len(STAGES) and not now:
            return None
        waiting = {o: {part.key for part in self._ahead[o]} for o in self._ahead if o not in active}
        others = [{o for o in waiting if part.key in waiting[o]} - {place} for part in now]
        if now and others[0]:
            split = (p.stage for p, own in zip(now, others, strict=True) if own != others[0])
            end = min((stage for stage in split if stage > now[0].stage), default=now[-1].stage + 1)
        return STAGES[end - 1]


def _side_by_side(
    left: _Left, recipes: dict[Path, Recipe], reporter: Reporter, at_once: int
) -> _Ended:
    interrupt, agenda = Interrupt(), _Agenda(recipes)
    threads: dict[Path, int] = {}
    notes, waiting = dict(left), set(left)
    active: dict[Path, str] = {}
    processes: dict[Path, RunProcess] = {}

    def start(place: Path, until: str) -> None:
        waiting.discard(place)
        if note := notes.pop(place, ""):
            reporter.note(note)
        with RunDirectory(place) as directory:
            _begin(directory, recipes, reporter)
        command = "run" if until == STAGES[-1] else until
        processes[place] = RunProcess(place, command, threads[place], partial(show, place.name))
        active[place] = until

    def end(place: Path) -> str | None:
        """What came of a run whose process is over: why it failed, or empty if it is done; None if
        it is neither."""
        process, until = processes.pop(place), active.pop(place)
        process.close()
        show(place.name, "")
        agenda.look(place, None if process.failure else until)
        if _finished(place):
            reporter.note(f"{place.name} is done")
            return ""
        if not process.failure:
            waiting.add(place)
        elif not (interrupt.asked and process.stopped):
            if process.trace:
                reporter.note(process.trace)
            reporter.note(f"{place.name} failed: {process.failure}")
            return process.failure
        return None

    with interrupt.listening(), reporter.side_by_side() as show:
        try:
            asked = False
            while active or (waiting and not interrupt.asked):
                begin: dict[Path, str] = {}
                for place in left:  # in the order of the turns
                    if interrupt.asked or len(active) + len(begin) == at_once:
                        break
                    until = agenda.until(place, active | begin) if place in waiting else None
                    if until is not None:
                        begin[place] = until
                free = runtime.threads() - sum(threads[place] for place in active)
                for place, until in begin.items():
                    threads[place] = max(runtime.threads() // at_once, free // len(begin))
                    try:
                        start(place, until)
                    except UserError as error:
                        reporter.note(f"{place.name} failed: {error}")
                        yield place, str(error)
                time.sleep(_POLL)
                for place in [p for p in active if processes[p].ended]:
                    failure = end(place)
                    if failure is not None:
                        yield place, failure
                if interrupt.asked and not asked:
                    asked = True
                    for process in processes.values():
                        process.stop()
                for place in active if waiting else ():
                    agenda.look(place)
        finally:  # after a second Ctrl-C they end where they are
            for process in processes.values():
                process.close()
    interrupt.check()


# ---- the results --------------------------------------------------------------------------------


def results(points: Sequence[Point], out: Path, failed: dict[str, str]) -> dict[str, Any]:
    """What the finished runs measured, as plain values.

    `points`: name, values, `runs` ({name, seed, context, models}) and `models`: model -> domain
    ("all": mean of the domains) -> kl, agree, perplexity -> mean and sd over the seeds (sd null
    with one). Each run's largest context counts. `failed`: run -> message.
    """
    found = []
    for point in points:
        runs = [
            {"name": name, "seed": recipe.seed, **_measured(out / name, recipe)}
            for name, recipe in point.runs.items()
            if (out / name / "report" / "report.json").is_file()
        ]
        models = {}
        if runs:
            models = {
                model: {
                    domain: {m: _spread([r["models"][model][domain][m] for r in runs]) for m in own}
                    for domain, own in domains.items()
                }
                for model, domains in runs[0]["models"].items()
                if all(model in r["models"] for r in runs)  # one may be of an earlier version
            }
        found.append({"name": point.name, "values": point.values, "runs": runs, "models": models})
    return {"out": str(out), "points": found, "failed": failed}


def _measured(place: Path, recipe: Recipe) -> dict[str, Any]:
    context = max(section.context for section in recipe.evaluate.fidelity)
    file = place / "evaluation" / "parts" / f"fidelity-{context}.json"
    fidelity = read_fidelity(file)
    models = {
        name: {
            domain: {m: getattr(measure, m) for m in _METRICS}
            for domain, measure in [
                (ALL, fidelity.mean(name)),
                *((d, of.overall) for d, of in fidelity.models[name].items()),
            ]
        }
        for name in fidelity.complete
    }
    return {"context": context, "models": models}


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, allow_nan=False, default=str) + "\n"


def _spread(values: list[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": values}


def table(found: dict[str, Any]) -> Table:
    """The results as a table: the merged student of every point, what is left of it with a branch
    silenced where that was measured, and the teacher's perplexity.

    The row with a point's name has the mean of the domains; the rows below it are parts of that
    point. Deviations stand below their means, so that 80 columns have room for names.
    """
    shown = Table()
    shown.add_column("point", overflow="fold")
    for name in ("KL", "KL /\ncontrol", "agreement", "perplexity", "of the\nteacher"):
        shown.add_column(name, justify="right", no_wrap=True)
    for point in found["points"]:
        models, count = point["models"], len(point["runs"])
        name = point["name"] if count == 1 else f"{point['name']} ({count} runs)"
        shown.add_section()
        if not models:
            shown.add_row(Text(name))
            continue
        rows = [(MERGED, ALL, name)]
        rows += [(MERGED, domain, f"  {domain}") for domain in _domains(models)[1:]]
        # Its variants with a branch silenced (evaluate.branches), on the mean of the domains.
        silenced = [model for model in models if model.startswith(f"{MERGED}, ")]
        rows += [(model, ALL, model.replace(f"{MERGED},", " ", 1)) for model in silenced]
        for model, domain, label in rows:
            own, control = models[model][domain], models[CONTROL][domain]
            pairs = zip(own["kl"]["values"], control["kl"]["values"], strict=True)
            ratio = [kl / untrained for kl, untrained in pairs if untrained > 0]
            shown.add_row(
                Text(label),
                _figure(own["kl"], 4),
                _figure(_spread(ratio), 3) if ratio else "",
                _figure(own["agree"], 4),
                _figure(own["perplexity"], 3),
                decimals(models["teacher"][domain]["perplexity"]["mean"], 3),
            )
    return shown


def _domains(models: dict[str, Any]) -> list[str]:
    """The mean first; with one domain it is that domain's."""
    names = list(models[MERGED])
    return names if len(names) > 2 else [ALL]


def _figure(value: dict[str, Any], digits: int) -> str:
    text = decimals(value["mean"], digits)
    return text if value["sd"] is None else f"{text}\n±{decimals(value['sd'], digits)}"


def figure(found: dict[str, Any]) -> Figure | None:
    """The results as a figure (`plots.sweep`); None as long as no run is done."""
    from . import plots  # slow to import

    points = [point for point in found["points"] if point["models"]]
    if not points:
        return None
    series: dict[str, dict[str, dict[str, list[float]]]] = {}
    for metric in _METRICS:
        series[metric] = {}
        for label, model, domains in (
            ("{}", MERGED, _domains(points[0]["models"])),
            ("untrained, {}", CONTROL, [ALL]),
        ):
            for domain in domains:
                series[metric][label.format(domain)] = {
                    p["name"]: p["models"][model][domain][metric]["values"]
                    for p in points
                    if domain in p["models"][model]
                }
    return plots.sweep(series)


def _plot(found: dict[str, Any], file: Path) -> None:
    from . import plots  # slow to import

    drawn = figure(found)
    if drawn is not None:
        plots.save(drawn, file)
