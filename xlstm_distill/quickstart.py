"""The whole method on SmolLM2-135M within a budget of minutes.

How much fits is measured once, on this machine, before the run begins: a short calibration gives
the rate of each kind of work, `plan` turns the budget into numbers of documents, steps and windows,
and these are written to the run's recipe. When stage I is done, `replan` sets stage II's steps by
the time that is really left. From then on it is a run like any other: a run that is continued
does neither again.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import checkpoints, packages
from .budget import (
    Rates,
    calibrate,
    estimate,
    fidelity_seconds,
    task_seconds,
)
from .checks import check
from .errors import UserError
from .evaluate.tasks import ReadTokens, load_task, read_tokens
from .model import load
from .progress import Reporter
from .recipe import FidelitySection, Recipe, make_recipe
from .room import SAMPLE_BATCH, SAMPLE_FILLED, Room
from .run import Run
from .rundir import Interrupt, RunDirectory

TEACHER = "smollm2-135m-instruct"
DEFAULT_MINUTES = 30.0
SAMPLING_SHARE, EVALUATION_SHARE = 0.15, 0.15
"""At most so much of the budget goes to sampling text and to evaluation."""
_SAMPLING_CAUTION = 0.7
"""Share of its part of the budget that is planned for. Sampling waits for memory, whose rate on a
shared machine differs by a half from one minute to another: 243 planned seconds took 328."""
_TRAINING_CAUTION = 0.95
"""The same for training. Its packs hold several documents, whose attention is shorter than that of
the calibration's row: it is 10 to 16 % faster than its calibrated rate, which is a reserve too."""
_REPLAN_CAUTION = 0.9
"""The same for stage II once stage I is done. Nothing after it can make up for lost time."""
_EVALUATION_CAUTION = 0.88
"""The same for the evaluation, most of which is fixed: what is saved here is taken from the request
sets."""
_ALIGN_SHARE = 0.5
"""Stage I's share of the training time; the rest is stage II with its targets."""
_FEWEST_ALIGN_STEPS, _FEWEST_DISTILL_STEPS = 16, 2
"""Steps of the stages however small the budget. The error of every layer falls by a tenth and more
in 16 steps of stage I; in two it falls by a few hundredths, and once rose in two layers of 30."""
_MIN_TOKENS = 20_000
"""Tokens a domain on which the main claims are measured."""
# Request sets in the order in which the time that is left goes to them: some that need the far
# context and one of multiple choice first, so that a small budget shows both kinds.
TASKS = (
    "squad",
    "arc_easy",
    "mt_mbpp_python",
    "coqa",
    "gsm8k",
    "minerva_math_algebra",
    "drop",
    "arc_challenge",
    "piqa",
    "hellaswag",
    "winogrande",
    "boolq",
)
_ALWAYS = TASKS[:2]
"""Measured even where the windows leave no time for it: a report without benchmarks shows nothing
of Win-and-Tie."""
_FEWEST, _MOST = 8, 200
"""Documents of a request set: below the first it is left out, beyond the second time is better
spent elsewhere."""
_FEWEST_WINDOWS = 3
"""Windows a domain that are measured at least, however small the budget."""
_OTHER_WORK = 25.0
"""Seconds for reading and encoding text, the merge and the report."""
_OTHER_EVALUATION = 13.0
"""Seconds for samples, gates and loading models."""


# ---- from a budget to a recipe ------------------------------------------------------------------


def base_recipe() -> dict[str, Any]:
    """The quickstart's recipe as plain values, with steps and sizes still to be filled in."""
    text = (files("xlstm_distill") / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def plan(
    rates: Rates, minutes: float, reading: Mapping[str, ReadTokens], spent: float = 0.0
) -> Recipe:
    """The recipe that fits into `minutes`, of which `spent` seconds are gone already; on a machine
    that is too slow for them the smallest that shows what it should.

    reading: tokens that each of TASKS takes.
    """
    values = base_recipe()
    budget = 60.0 * minutes
    length = values["data"]["length"]
    values["minutes"] = minutes

    sampling = SAMPLING_SHARE * budget * _SAMPLING_CAUTION
    sampled = values["data"]["domains"]["general"]["sources"]
    new = SAMPLE_FILLED * float(np.mean([source["max_new_tokens"] for source in sampled]))
    # At least a row can be packed from what is sampled.
    each = max(4, round(sampling * rates.sample / new / len(sampled)))
    for source in sampled:
        source.update(documents=each, batch=-(-each // -(-each // SAMPLE_BATCH)))
    sampling = len(sampled) * each * new / rates.sample

    share = EVALUATION_SHARE * budget * _EVALUATION_CAUTION
    measures, evaluation = _evaluation(rates, share, reading, length, minutes)
    values["evaluate"].update(measures)

    experts = len(values["experts"])
    # student0, aligned, experts, merged are written and read; states are written on the way.
    fixed = spent + (experts + 3) * (rates.save + rates.load) + _OTHER_WORK + 0.02 * budget
    training = max(0.0, (budget - sampling - evaluation - fixed) * _TRAINING_CAUTION)

    row = length / rates.align
    seconds = _ALIGN_SHARE * training
    rows, steps = _steps(seconds, lambda r: r * row, _FEWEST_ALIGN_STEPS, enough=250, most=8)
    values["align"].update(steps=steps, rows=rows)
    rows, steps = _stage_two((1 - _ALIGN_SHARE) * training / experts, rates, length)
    values["distill"].update(steps=steps, rows=rows)
    tokens = length * (values["align"]["steps"] * values["align"]["rows"] + steps * rows)
    values["data"]["domains"]["code"]["sources"][0]["max_tokens"] = max(150_000, tokens)
    return make_recipe(values)


def replan(recipe: Recipe, rates: Rates, spent: float) -> Recipe:
    """The recipe with as many steps of stage II as fit after stage I and `spent` seconds."""
    assert recipe.minutes is not None
    values = recipe.model_dump()
    budget, experts = 60.0 * recipe.minutes, len(recipe.experts)
    fixed = (experts + 1) * (rates.save + rates.load) + 15 + 0.02 * budget
    left = (1 - EVALUATION_SHARE) * budget - spent - fixed
    rows, steps = _stage_two(_REPLAN_CAUTION * left / experts, rates, recipe.data.length)
    values["distill"].update(steps=steps, rows=rows)
    return make_recipe(values)


def _stage_two(seconds: float, rates: Rates, length: int) -> tuple[int, int]:
    """(rows a step, steps) of one expert with its targets."""
    row = length * (1 / rates.distill + 1 / rates.targets)
    update = rates.update
    return _steps(seconds, lambda r: r * row + update, _FEWEST_DISTILL_STEPS, enough=60, most=16)


def _steps(
    seconds: float, cost: Callable[[int], float], fewest: int, *, enough: int, most: int
) -> tuple[int, int]:
    """(rows a step, steps): as many rows as leave `enough` steps, else one row; never fewer steps
    than `fewest`, whatever they take."""
    rows = 1
    while rows < most and seconds / cost(2 * rows) >= enough:
        rows *= 2
    return rows, max(fewest, int(seconds / cost(rows)))


def _evaluation(
    rates: Rates,
    seconds: float,
    reading: Mapping[str, ReadTokens],
    length: int,
    minutes: float,
) -> tuple[dict[str, Any], float]:
    """What of the evaluation fits into `seconds`, and what it takes.

    The windows for the main claims always have their size; what is left goes to the experts, to a
    shorter context and to request sets.
    """
    domains = experts = 2

    def cost(section: FidelitySection) -> float:
        return fidelity_seconds(rates, domains, section, experts)

    other = min(_OTHER_EVALUATION, 0.2 * seconds)
    windows = -(-_MIN_TOKENS // length)
    if minutes < DEFAULT_MINUTES:  # a small budget measures on less text
        one = FidelitySection(context=length, windows=1, expert_windows=1)
        fit = int(0.7 * (seconds - other) / cost(one))
        windows = min(windows, max(_FEWEST_WINDOWS, fit))
    alone = FidelitySection(context=length, windows=windows)
    left = seconds - cost(alone) - other
    main = FidelitySection(context=length, windows=windows, expert_windows=windows)
    while main.expert_windows > _FEWEST_WINDOWS and cost(main) - cost(alone) > 0.7 * left:
        main = main.model_copy(update={"expert_windows": main.expert_windows // 2})
    left -= cost(main) - cost(alone)
    fidelity = [main]
    short = FidelitySection(context=256, windows=16)
    if left > 3 * cost(short):
        fidelity.append(short)
        left -= cost(short)

    def tasks_cost(limits: Mapping[str, int]) -> float:
        return sum(task_seconds(rates, reading[name].of(n)) for name, n in limits.items())

    tasks: dict[str, int] = {}
    for name in TASKS:
        always = minutes >= DEFAULT_MINUTES and name in _ALWAYS
        if not always and tasks_cost({**tasks, name: _FEWEST}) > left:
            break
        tasks[name] = _FEWEST
    for limit in range(_FEWEST, _MOST + 1):  # the same for all
        if tasks and tasks_cost(dict.fromkeys(tasks, limit)) <= left:
            tasks = dict.fromkeys(tasks, limit)
    wanted = 0.75 if minutes >= 90 else 0.85 if minutes >= 30 else None
    measures = {
        "fidelity": [section.model_dump() for section in fidelity],
        "tasks": tasks,
        "wanted_ratio": wanted,
    }
    return measures, seconds - left + tasks_cost(tasks)


def quickstart(
    out: str | Path, minutes: float | None = None, reporter: Reporter | None = None
) -> Path:
    """Run the quickstart in `out`, or continue the one that began there; returns `out`.

    Set-up (fetching the teacher and the request sets) does not count. UserError if `minutes` is
    given and the run there began with another number, or if disk or memory are too small.
    """
    reporter = reporter or Reporter()
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"--minutes {minutes}: expected more than 0", usage=True)
    packages.fetch(TEACHER)
    packages.fetch("olmes")
    started = time.perf_counter()
    interrupt = Interrupt()
    with interrupt.listening(), RunDirectory(out) as directory:
        teacher = None
        if directory.has_recipe:
            recipe = directory.recipe()
            if minutes is not None and recipe.minutes != minutes:
                raise UserError(
                    f"{out}: the run began with --minutes {recipe.minutes:g}, here it is "
                    f"{minutes:g}; choose another --out (OUT= of make demo)",
                    usage=True,
                )
            reporter.note(f"continuing the run in {out}")
        else:
            wanted = DEFAULT_MINUTES if minutes is None else minutes
            draft = make_recipe(base_recipe())
            _check_room(directory.path, draft)
            reporter.note(f"measuring this machine, then {wanted:g} minutes of work in {out}")
            loading = time.perf_counter()
            teacher = load(TEACHER)
            load_seconds = time.perf_counter() - loading
            rates = calibrate(teacher, draft, directory.path, load_seconds)
            interrupt.check()
            assert teacher.tokenizer is not None
            reading = {t: read_tokens(teacher.tokenizer, load_task(t)) for t in TASKS}
            recipe = plan(rates, wanted, reading, spent=time.perf_counter() - started)
            directory.begin(recipe)
            spent = time.perf_counter() - started
            directory.log("calibrate", event="done", seconds=spent, rates=asdict(rates))
            work_seconds = estimate(recipe, teacher.config, rates, reading)["total_seconds"]
            reporter.note(describe(recipe, spent + work_seconds + _OTHER_WORK))
        work = Run(directory, recipe, reporter, interrupt)
        if teacher is not None:
            work.__dict__["teacher"] = teacher  # the cached property: it is loaded already
            teacher = None  # so that the run can free it
        check(recipe, place=out)
        work.execute(until="align")
        work.recipe = _replanned(directory, recipe, reporter)
        work.execute()
    return Path(out)


def _check_room(place: Path, draft: Recipe) -> None:
    """UserError if the disk or this machine's memory is too small for any quickstart: most of what
    it needs are models, whatever the budget."""
    room = Room(draft, checkpoints.load(TEACHER).config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for need, found, what in (
        (room.disk_mib, shutil.disk_usage(place).free, f"disk in {place}"),
        (max(room.memory.values()), memory, "memory"),
    ):
        if need * 2**20 > found:
            raise UserError(
                f"the quickstart needs {need / 2**10:.1f} GiB of {what}; there are "
                f"{found / 2**30:.1f} GiB"
            )


def _replanned(directory: RunDirectory, recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe that the rest of the run follows: `replan`, before stage II has begun.

    It reads the log alone, so that a run which is killed here plans the same again.
    """
    calibrated = directory.done("calibrate")
    if calibrated is None or (directory.path / "targets").is_dir():
        return recipe
    spent = sum(x["seconds"] for x in directory.read_log() if x.get("event") == "done")
    recipe = replan(recipe, Rates(**calibrated["rates"]), spent)
    directory.change(recipe)
    directory.log("distill", event="planned", steps=recipe.distill.steps, rows=recipe.distill.rows)
    reporter.note(f"{spent / 60:.1f} minutes so far; stage II: {_stage_two_of(recipe)}")
    return recipe


def describe(recipe: Recipe, seconds: float) -> str:
    """What a budget came to, in a line; `seconds`: what all of it takes."""
    assert recipe.minutes is not None
    a, e = recipe.align, recipe.evaluate
    length = recipe.data.length
    documents = sum(
        source.documents
        for domain in recipe.data.domains.values()
        for source in domain.sources
        if source.kind == "sampled"
    )
    sets = f"{len(e.tasks)} request sets" + (f" of {max(e.tasks.values())}" if e.tasks else "")
    late = "" if seconds <= 60 * recipe.minutes else "; nothing smaller than this is planned"
    return (
        f"plan: sample {documents} documents; stage I: {a.steps} steps of {a.rows * length:,} "
        f"tokens; stage II: {_stage_two_of(recipe)}; fidelity on "
        f"{e.fidelity[0].windows * length:,} tokens a domain, {sets}; about {seconds / 60:.1f} "
        f"minutes{late}"
    )


def _stage_two_of(recipe: Recipe) -> str:
    steps, tokens = recipe.distill.steps, recipe.distill.rows * recipe.data.length
    return f"{steps} steps of {tokens:,} tokens for each of {len(recipe.experts)} experts"
