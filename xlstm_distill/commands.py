"""What the commands do. Each takes the parsed arguments and returns what `--json` prints.

Without `--json` a command writes its result to stdout in words.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from . import bench as benchmarks
from . import budget, checkpoints, packages, runtime
from . import sweep as sweeps
from .assess import machine_facts, report_facts, write_report
from .atomic import write_text
from .checkpoints import LazyTensors
from .checks import open_teacher, problems
from .communicator import world
from .data import TokenData
from .durations import duration
from .errors import UserError, check_package
from .evaluate import branches as silenced
from .evaluate import compare as compare_results
from .evaluate import continuations, divergence, needle_grid, passages, write_results
from .evaluate import evaluate as evaluate_model
from .evaluate import fidelity as measure_fidelity
from .evaluate.divergence import Estimate
from .evaluate.evidence import STUDENT, FidelityFile, evidence
from .evaluate.fidelity import windows_of
from .evaluate.names import FEEL_THE_WINDOW, expand_tasks
from .evaluate.needle import LENGTHS, reads_haystack
from .evaluate.needle import TASKS as NEEDLES
from .evaluate.perplexity import PERPLEXITY
from .evaluate.scores import decimals
from .evaluate.tasks import PASSAGE_TASKS, open_task, read_tokens
from .evaluate.unfinished import held
from .inside import median_gates
from .merge import merge as merge_models
from .model import Compute, Model, from_checkpoint, load
from .progress import Reporter
from .quickstart import quickstart as run_quickstart
from .recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from .report import comparison_report, terminal_table
from .room import Room, available_memory, sampled_tokens, text_bytes
from .run import Run
from .run import run as run_recipe
from .rundir import RunDirectory
from .tokenizer import Tokenizer

Arguments = argparse.Namespace
Result = dict[str, Any]

_COMPUTE: dict[str, Compute] = {
    "f32": "f32",
    "float32": "f32",
    "auto": "f32",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "int8": "int8",
}


def _say(arguments: Arguments, text: str) -> None:
    if not arguments.json:
        print(text)


def _facts(arguments: Arguments, facts: Mapping[str, Any]) -> None:
    """Facts as aligned lines."""
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        _say(arguments, f"{key:<{width}}  {value}")


# ---- runs ---------------------------------------------------------------------------------------


def quickstart(arguments: Arguments) -> Result:
    """The whole method on SmolLM2-135M."""
    started = time.perf_counter()
    out = run_quickstart(arguments.out, arguments.minutes, Reporter())
    return _finished(arguments, out, time.perf_counter() - started)


def run(arguments: Arguments) -> Result:
    """All stages of a recipe, or those up to the command's name."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    until = "report" if arguments.command == "run" else arguments.command
    started = time.perf_counter()
    out = run_recipe(recipe, arguments.out, Reporter(), until, arguments.source)
    if not world().first:
        return {}  # the first rank speaks
    if until == "report":
        return _finished(arguments, out, time.perf_counter() - started)
    _say(arguments, f"{arguments.command}: done in {out}")
    return {"run": out, "stage": until}


def _finished(arguments: Arguments, out: Path, seconds: float) -> Result:
    with RunDirectory(out) as directory:
        facts = report_facts(Run(directory, directory.recipe()))
    page = out / "report" / "report.html"
    if not arguments.json:
        terminal_table(facts)
    _say(arguments, f"report: {page} ({duration(seconds)})")
    return {"run": out, "report": page, "seconds": seconds, **facts.model_dump(mode="json")}


def sweep(arguments: Arguments) -> Result:
    """A grid of recipes with a table of what came out."""
    points = sweeps.grid(arguments.recipe, arguments.vary, arguments.seeds, arguments.set)
    found: Result = sweeps.sweep(points, arguments.out, Reporter(), arguments.at_once)
    if not arguments.json:
        Console().print(sweeps.table(found))
    place = Path(arguments.out) / sweeps.RESULTS
    if found["failed"]:
        name, message = next(iter(found["failed"].items()))
        count = f"{len(found['failed'])} of {sum(len(p.runs) for p in points)} runs failed"
        raise UserError(f"{count}; {name}: {message}; the others are in {place}")
    _say(arguments, f"results: {place}, plot: {place.with_name(sweeps.PLOT)}")
    return found


def report(arguments: Arguments) -> Result:
    """Write the report of a finished run again."""
    if not (Path(arguments.run) / "recipe.yaml").is_file():
        raise UserError(f"{arguments.run}: holds no recipe.yaml: not a run directory", usage=True)
    with RunDirectory(arguments.run) as directory:
        work = Run(directory, directory.recipe())
        page = write_report(work)
        facts = report_facts(work)
    if not arguments.json:
        terminal_table(facts)
    _say(arguments, f"report: {page}")
    return {"report": page}


def fetch(arguments: Arguments) -> Result:
    """Fetch a model or request sets."""
    place = packages.fetch(arguments.name, arguments.to)
    _say(arguments, str(place))
    return {"name": arguments.name, "path": place}


def recipes(arguments: Arguments) -> Result:
    """The shipped recipes, or the text of one, to begin an own one from."""
    texts = shipped_recipes()
    if arguments.name is None:
        titles = {name: parse_recipe(text, name).title for name, text in texts.items()}
        _facts(arguments, titles)
        return {"recipes": titles}
    if arguments.name not in texts:
        raise UserError(f"{arguments.name}: not one of {', '.join(texts)}", usage=True)
    _say(arguments, texts[arguments.name].rstrip())
    return {"name": arguments.name, "text": texts[arguments.name]}


def validate(arguments: Arguments) -> Result:
    """Check a recipe, and what it names: all that a run would look for before it begins."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    found = list(problems(recipe))
    if len(found) == 1:
        raise UserError(f"{arguments.recipe}: {found[0]}", usage=True)
    for problem in found:
        print(f"{arguments.recipe}: {problem}", file=sys.stderr)
    if found:
        raise UserError(f"{arguments.recipe}: {len(found)} problems", usage=True)
    _say(arguments, f"{arguments.recipe}: a valid recipe")
    return {"recipe": arguments.recipe, "valid": True, "keys": recipe.model_dump(mode="json")}


def estimate(arguments: Arguments) -> Result:
    """Memory and disk of a recipe, from its teacher's sizes, and its time, from a short calibration
    with the teacher, where there is memory for that."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    checkpoint = open_teacher(recipe)
    room = Room(recipe, checkpoint.config)
    largest = max(room.memory, key=lambda stage: room.memory[stage])
    found: Result = {
        "seconds": None,
        "total_seconds": None,
        "memory_mib": room.memory[largest],
        "memory_mib_by_stage": room.memory,
        "disk_mib": room.disk_mib,
    }
    facts = {
        "memory": f"{found['memory_mib']:,} MiB (stage {largest})",
        "disk": f"{found['disk_mib']:,} MiB",
    }
    needed, free = room.calibration, available_memory()
    if needed > free:
        found["time"] = (
            f"not measured: the calibration needs {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are available"
        )
        _facts(arguments, {"time": found["time"], **facts})
        return found
    if not arguments.json:
        print("measuring this machine, and the disk of this directory", file=sys.stderr)
    found.update(_measured_time(recipe, checkpoint))
    _facts(arguments, {f"{stage}, s": f"{s:,.0f}" for stage, s in found["seconds"].items()})
    _facts(arguments, {"together": duration(found["total_seconds"]), **facts})
    return found


def _measured_time(recipe: Recipe, checkpoint: checkpoints.Checkpoint) -> Result:
    """Seconds of the stages that a recipe has."""
    started = time.perf_counter()
    teacher = from_checkpoint(checkpoint)
    if teacher.tokenizer is None:
        raise UserError(f"{recipe.teacher}: holds no tokenizer; a run needs one")
    rates = budget.calibrate(teacher, recipe, Path.cwd(), time.perf_counter() - started)
    reading = {
        task: read_tokens(teacher.tokenizer, open_task(task, teacher.tokenizer))
        for task in recipe.evaluate.tasks
    }
    found = budget.estimate(recipe, teacher.config, rates, reading)
    for what, asked in (("sample", sampled_tokens(recipe)), ("read", text_bytes(recipe))):
        if not asked:
            found["seconds"].pop(what)
    return found


# ---- models -------------------------------------------------------------------------------------


def inspect(arguments: Arguments) -> Result:
    """What a model is: sizes, mixers, parameters by role, provenance."""
    checkpoint = checkpoints.load(arguments.model)
    c = checkpoint.config
    shapes = {
        name: checkpoint.tensors.shape(name)
        if isinstance(checkpoint.tensors, LazyTensors)
        else checkpoint.tensors[name].shape
        for name in checkpoint.tensors
    }
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    mixers: dict[str, int] = {}
    for m in c.mixers:
        window = "full" if m.window is None else str(m.window)
        plain = m.mixer == "attention" and m.window is None
        text = m.mixer if plain else f"{m.mixer}, window {window}, {m.sinks} sinks"
        mixers[text] = mixers.get(text, 0) + 1
    tokenizer = checkpoint.tokenizer
    found: Result = {
        "source": checkpoint.source,
        "family": c.family,
        "student": c.is_student,
        "layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "heads": f"{c.num_attention_heads} of {c.head_dim}, {c.num_key_value_heads} for keys",
        "vocabulary": c.vocab_size,
        "parameters": sum(sizes.values()),
        "mixer_parameters": sum(n for name, n in sizes.items() if ".mixer." in name),
        "tensors": len(sizes),
        "mixers": mixers,
        "chat_template": tokenizer is not None and tokenizer.chat_template is not None,
        "fingerprint": checkpoint.fingerprint,
    }
    _facts(arguments, found)
    return {**found, "config": c.model_dump(mode="json"), "provenance": checkpoint.provenance}


def doctor(arguments: Arguments) -> Result:
    """What this machine can do, and what was chosen."""
    disk = shutil.disk_usage(Path.cwd())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts: Result = {
        **machine_facts(),
        "instruction sets": ", ".join(runtime.available_isas()),
        "chosen by": "XLSTM_DISTILL_ISA"
        if os.environ.get("XLSTM_DISTILL_ISA")
        else "the processor",
        "threads by": runtime.threads_by() or "the processors this process may use",
        "memory": f"{memory / 2**30:.1f} GiB",
        "disk free here": f"{disk.free / 2**30:.1f} GiB",
        "cache": str(packages.cache_root()),
    }
    _facts(arguments, facts)
    return facts


def _load(arguments: Arguments) -> Model:
    return load(arguments.model, compute=_COMPUTE[arguments.dtype])


def generate(arguments: Arguments) -> Result:
    """Continue a prompt; the text appears as it is made."""
    model = _load(arguments)
    if model.tokenizer is None:
        raise UserError(f"{arguments.model}: holds no tokenizer")
    prompt = arguments.prompt
    if arguments.chat:
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    started = time.perf_counter()
    ids = model.tokenizer.encode(prompt, special=arguments.chat)
    if model.tokenizer.adds_bos and model.tokenizer.bos_id is not None and not arguments.chat:
        ids = [model.tokenizer.bos_id, *ids]
    text = model.generate(
        ids,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stream=None if arguments.json else show,
    )
    _say(arguments, "")
    return {
        "prompt": arguments.prompt,
        "text": text,
        "prompt_tokens": len(ids),
        "seed": arguments.seed,
        "seconds": time.perf_counter() - started,
    }


def serve(arguments: Arguments) -> Result:
    """Serve a model on loopback until Ctrl-C."""
    for package in ("starlette", "uvicorn"):
        check_package(package, extra="serve", who="serve")
    from .serve import listen
    from .serve import serve as serve_model

    def ready(address: str) -> None:
        say = f"serving {arguments.model} at {address}; Ctrl-C stops"
        print(say, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    with listen(arguments.port) as listening:  # before the model, which may take minutes
        model = _load(arguments)
        address = serve_model(model, arguments.model, listening, arguments.max_rows, ready)
    return {"model": arguments.model, "address": address}


def perplexity(arguments: Arguments) -> Result:
    """What `evaluate` finds of files, a token and over all of them; nothing is written."""
    names = expand_tasks([f"{PERPLEXITY}:{file}" for file in arguments.data])
    model = _load(arguments)
    with Reporter(quiet=arguments.json).in_turn(names) as progress:
        results = evaluate_model(model, names, max_length=arguments.context, progress=progress)
    samples = [sample for of in results["samples"].values() for sample in of]
    totals = {what: sum(s[what] for s in samples) for what in ("loglikelihood", "tokens", "bytes")}
    nll = -totals["loglikelihood"] / totals["tokens"]
    found = {
        "perplexity": math.exp(nll),
        "nll": nll,
        "bits_per_byte": -totals["loglikelihood"] / (totals["bytes"] * math.log(2)),
        "tokens": totals["tokens"],
        "documents": len(samples),
        "context": arguments.context,
    }
    _facts(arguments, found)
    return found


def merge(arguments: Arguments) -> Result:
    """A weighted sum of experts, written tensor by tensor."""
    experts: dict[str, str] = {}
    weights: dict[str, float] = {}
    for text in arguments.expert:
        folder, equals, weight = text.rpartition("=")
        try:
            weights[folder] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not folder:
            raise UserError(f"--expert {text}: expected DIR=WEIGHT", usage=True)
        if folder in experts:
            raise UserError(f"--expert {folder}: named twice", usage=True)
        experts[folder] = folder
    place = merge_models(experts, weights, arguments.method, out=arguments.out)
    _say(arguments, f"merged {len(experts)} experts into {place}")
    return {"out": place, "weights": weights, "method": arguments.method}


def export(arguments: Arguments) -> Result:
    """Write a model in Hugging Face's layout."""
    checkpoint = checkpoints.load(arguments.model)
    place = checkpoints.save(
        arguments.to,
        checkpoint.config,
        checkpoint.tensors,
        checkpoint.tokenizer,
        {**checkpoint.provenance, "exported_from": checkpoint.source},
    )
    _say(arguments, str(place))
    return {"out": place, "student": checkpoint.config.is_student}


# ---- evaluation ---------------------------------------------------------------------------------


class _Suite(NamedTuple):
    """Tasks that go together; `*` for a length stands for all of `lengths`."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]


_NEEDLES = tuple(f"{task}:*" for task in NEEDLES)
SUITES = {
    "needle": _Suite(_NEEDLES, LENGTHS),
    "window": _Suite((*FEEL_THE_WINDOW, *_NEEDLES), (512, 1024, 2048)),
}
_SUITE_CONTEXT, _SUITE_WINDOWS = 1024, 8
"""Windows of passages on which a suite measures fidelity: tokens, and how many of each task."""


def evaluate(arguments: Arguments) -> Result:
    """Score a model on tasks and write the results, and a grid of needles if there are some."""
    started = time.time()
    named = _tasks(arguments)
    out = Path(arguments.out)
    if out.is_dir():
        raise UserError(f"--out {out}: is a directory, name a file", usage=True)
    tasks = expand_tasks(named)
    if arguments.haystack is not None and not any(map(reads_haystack, tasks)):
        raise UserError(f"--haystack {arguments.haystack}: no task here reads it", usage=True)
    model = _load(arguments)
    teacher = tokenizer = None
    if arguments.teacher:
        teacher = load(arguments.teacher)
        tokenizer = _check_pair(teacher, model, arguments)
    unfinished = out.with_suffix(".unfinished")
    with held(unfinished):
        with Reporter(quiet=arguments.json).in_turn(tasks) as progress:
            results = evaluate_model(
                model,
                named,
                limit=arguments.limit,
                seed=arguments.seed,
                max_length=arguments.max_length,
                haystack=arguments.haystack,
                unfinished=unfinished,
                progress=progress,
            )
        results["config"]["model"] = arguments.model
        written = write_results({**results, "date": started}, out)
        _say_scores(arguments, results)
        name = out.stem.removeprefix("results_")
        if grid := needle_grid(results["samples"]):
            from . import plots  # slow to import

            place = plots.save(plots.needle_grid(grid, name), out.with_name(f"needle_{name}.svg"))
            _say(arguments, f"grid: {place}")
        found = {"out": out, "results": results["results"]}
        if arguments.suite == "window" and teacher is None:
            _say(arguments, "hint: with --teacher MODEL also KL and perplexity by distance")
        if teacher is not None and tokenizer is not None:
            documents = {task: _encoded_passages(task, tokenizer) for task in PASSAGE_TASKS}
            near = _divergence(arguments, teacher, model, documents, _SUITE_CONTEXT, _SUITE_WINDOWS)
            place = out.with_name(f"fidelity_{name}.json")
            write_text(place, json.dumps(near, indent=1, allow_nan=False) + "\n")
            found.update(near)
        # Only now: what is killed before goes on from the samples. Those of other tasks stay.
        for file in written[1:]:
            (unfinished / file.name.removeprefix(f"samples_{name}_")).unlink(missing_ok=True)
    return found


def _say_scores(arguments: Arguments, results: Mapping[str, Any]) -> None:
    for depth, task in _indented(results):
        figures = ", ".join(
            f"{name} {decimals(value, 4)}"
            for name, value in results["results"][task].items()
            if isinstance(value, float)
        )
        _say(arguments, f"{'  ' * depth}{task}: {figures}")


def _indented(results: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Tasks of results, each with how many groups it is in; what is in a group follows it."""
    groups = results["group_subtasks"]
    inside = {task for tasks in groups.values() for task in tasks}
    waiting = [(0, task) for task in results["results"] if task not in inside]
    while waiting:
        depth, task = waiting.pop(0)
        yield depth, task
        waiting = [*((depth + 1, part) for part in groups.get(task, ())), *waiting]


def _encoded_passages(task: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Enough of a task's passages for the windows of a suite."""
    found: list[list[int]] = []
    for text in passages(task):
        if sum(map(len, found)) >= _SUITE_CONTEXT * _SUITE_WINDOWS:
            break
        found.append(tokenizer.encode(text, special=False))
    return found


def _tasks(arguments: Arguments) -> list[str]:
    """The tasks that `--tasks` or `--suite` name."""
    if arguments.suite is None:
        if arguments.lengths is not None:
            raise UserError("--lengths goes with --suite; in --tasks write niah_*:4096", usage=True)
        if not arguments.tasks:
            raise UserError("--tasks names no task", usage=True)
        return list(arguments.tasks)
    suite = SUITES[arguments.suite]
    lengths = [str(n) for n in suite.lengths]
    if arguments.lengths is not None:  # "" is an error: it must not mean the long defaults
        lengths = arguments.lengths.split(",")
    fixed = [task for task in suite.tasks if not task.endswith(":*")]
    return fixed + [
        task.replace(":*", f":{length}")
        for length in lengths
        for task in suite.tasks
        if task not in fixed
    ]


def fidelity(arguments: Arguments) -> Result:
    """A student's fidelity: KL with its tails, by position and by distance, and free-running."""
    if arguments.continuations and arguments.prompt_tokens > arguments.context:
        raise UserError(
            f"--prompt-tokens {arguments.prompt_tokens}: more than --context {arguments.context}",
            usage=True,
        )
    teacher, student, documents = _pair(arguments)
    found = _divergence(
        arguments, teacher, student, {"text": documents}, arguments.context, arguments.windows
    )
    if arguments.continuations:
        windows = windows_of(documents, arguments.context)[: arguments.continuations]
        found["continuations"] = _continuations(arguments, teacher, student, windows)
    if arguments.out:
        write_text(arguments.out, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _divergence(
    arguments: Arguments,
    teacher: Model,
    student: Model,
    documents: Mapping[str, list[list[int]]],
    context: int,
    windows: int,
) -> Result:
    """Fidelity and its details by domain of text, printed."""
    with Reporter(quiet=arguments.json).bar("fidelity") as update:
        means, details = divergence(
            {STUDENT: student},
            teacher,
            documents,
            context=context,
            max_windows=windows,
            progress=lambda done, total: update({"step": done, "steps": total}),
        )
        gates = None
        if student.config.has_gates:
            texts = [windows_of(d, context)[:windows] for d in documents.values()]
            gates = median_gates(student, [(row[None], None) for of in texts for row in of])
    for domain, of in details[STUDENT].items():
        tails = ", ".join(f"{percent:g} % {kl:.4f}" for percent, kl in of.kl_percentiles.items())
        facts = {
            "KL": f"{_with_error(of.kl)}; {tails}, max {of.kl_max:.4f}",
            "same top-1": _with_error(of.same_top),
            "RMS of p - p_teacher": _with_error(of.probability_rms),
            "NLL - NLL_teacher": _with_error(of.nll_difference),
        }
        by_position = means.models[STUDENT][domain].by_position
        for (low, high), m in zip(means.buckets, by_position, strict=True):
            facts[f"position {low}-{high}"] = f"KL {m.kl:.4f}, same top-1 {m.agree:.4f}"
        for d in of.by_distance:
            where = "new" if d.low is None else f"distance {d.low}-{d.high}"
            facts[where] = (
                f"KL {_with_error(Estimate(d.kl, d.kl_stderr))}, same top-1 {d.agree:.4f}, "
                f"NLL {d.nll:.4f} ({d.teacher_nll:.4f}), "
                f"perplexity {decimals(d.perplexity, 3)} ({decimals(d.teacher_perplexity, 3)}), "
                f"{d.positions} positions"
            )
        _say(arguments, f"{domain}: {means.tokens[domain]} tokens")
        _facts(arguments, facts)
    return FidelityFile(
        teacher=checkpoints.weights_file(teacher.source),
        fidelity=means,
        divergence=details[STUDENT],
        gates=gates,
    ).model_dump()


def _continuations(
    arguments: Arguments, teacher: Model, student: Model, windows: NDArray[np.int32]
) -> Result:
    """What both write after the beginnings of windows, as the teacher sees it, printed."""
    with Reporter(quiet=arguments.json).bar("continuations") as update:
        found = continuations(
            {"student": student},
            teacher,
            windows[:, : arguments.prompt_tokens],
            tokens=arguments.new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            progress=lambda done, total: update({"step": done, "steps": total}),
        )
    facts = {}
    for bucket in (None, *range(len(found.buckets))):
        low, high = (0, found.tokens) if bucket is None else found.buckets[bucket]
        e = found.excess("student", bucket)
        interval = f" ({e.low:.4f} to {e.high:.4f})" if found.prompts > 1 else ""
        facts[f"written {low}-{high}"] = (
            f"teacher's NLL {found.mean('student', bucket):.4f}, of its own "
            f"{found.mean('teacher', bucket):.4f}, excess {e.value:.4f}{interval}"
        )
    _facts(arguments, facts)
    return found.model_dump()


def _with_error(estimate: Estimate) -> str:
    value, stderr = estimate
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def lm_eval(arguments: Arguments) -> Result:
    """lm_eval's own command with a model of ours; what it prints is not ours to put into JSON."""
    check_package("lm_eval", extra="lm-eval", who="lm-eval")
    from .lm_eval_adapter import NAME, run_cli

    model = [f"pretrained={arguments.model}", f"dtype={_COMPUTE[arguments.dtype]}"]
    own = ["run", "--model", NAME, "--model_args", *model, *arguments.arguments]
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        run_cli(own)
    return {"model": arguments.model, "arguments": own}


def branches(arguments: Arguments) -> Result:
    """Fidelity of a hybrid student, and of the same with one branch silenced or cut."""
    teacher, student, documents = _pair(arguments)
    models = {"student": student, **silenced(student, "student", arguments.model)}
    with Reporter(quiet=arguments.json).bar("branches") as update:
        found = measure_fidelity(
            models,
            teacher,
            {"text": documents},
            context=arguments.context,
            max_windows=arguments.windows,
            progress=lambda done, total: update({"step": done, "steps": total}),
        )
    for name in ("teacher", *models):
        m = found.mean(name)
        _say(
            arguments,
            f"{name:<22}  KL {m.kl:.4f}  agreement {m.agree:.4f}  "
            f"perplexity {decimals(m.perplexity, 3)}",
        )
    return {
        "context": found.context,
        "tokens": found.tokens["text"],
        "models": {name: found.mean(name).model_dump() for name in found.models},
    }


def _pair(arguments: Arguments) -> tuple[Model, Model, list[list[int]]]:
    """Teacher, student and the documents of `--data`."""
    teacher, student = load(arguments.teacher), load(arguments.model)
    tokenizer = _check_pair(teacher, student, arguments)
    data = TokenData.from_files(arguments.data, tokenizer)
    return teacher, student, [data.document(i).tolist() for i in range(data.documents)]


def _check_pair(teacher: Model, student: Model, arguments: Arguments) -> Tokenizer:
    """The teacher's tokenizer; UserError where it has none or the student is not one of its."""
    if teacher.tokenizer is None:
        raise UserError(f"{arguments.teacher}: holds no tokenizer")
    if student.config.hidden_size != teacher.config.hidden_size:
        raise UserError(
            f"{arguments.model}: is not a student of {arguments.teacher}: widths differ"
        )
    return teacher.tokenizer


def compare(arguments: Arguments) -> Result:
    """Win-and-Tie, recovery and plots of scores."""
    groups = {
        name: tasks.split(",") for name, tasks in _named(arguments.group, "--group", "NAME=A,B")
    }
    students = dict(_named(arguments.student, "--student", "NAME=FILE"))
    found = compare_results(
        arguments.teacher,
        students,
        controls=arguments.control,
        tasks=arguments.tasks or None,
        metrics=arguments.metric,
        groups=groups or None,
        chance=dict(_named(arguments.chance, "--chance", "TASK=LEVEL")),
        drop_chance=arguments.drop_chance,
        margin=arguments.margin,
        strict=arguments.strict,
        seed=arguments.seed,
    )
    known = evidence(
        {"teacher": arguments.teacher, **students},
        fidelity=dict(_named(arguments.fidelity, "--fidelity", "NAME=FILE")),
        models=dict(_named(arguments.model, "--model", "NAME=MODEL")),
    )
    if known.teacher and found.weights and known.teacher != found.weights:
        known.warnings.append(
            f"the teacher's scores are of {found.weights}, its evidence of {known.teacher}"
        )
    if arguments.strict and known.warnings:
        raise UserError(f"not comparable: {known.warnings[0]}")
    found.warnings += known.warnings
    if known.teacher and not found.weights:  # scores that do not say of what they are
        found.teacher += f", evidence of {known.teacher}"
    comparison_report(found, arguments.out, known)
    _say(arguments, found.table())
    return {"out": arguments.out, **found.model_dump(mode="json")}


def _named(texts: Sequence[str], option: str, form: str) -> list[tuple[str, str]]:
    """Pairs of `NAME=VALUE` arguments."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise UserError(f"{option} {text}: expected {form}", usage=True)
        if name in found:
            raise UserError(f"{option} {text}: {name} is named twice", usage=True)
        found[name] = value
    return list(found.items())


def bench(arguments: Arguments) -> Result:
    """Speed of the core on this machine."""
    suites = arguments.suite or benchmarks.SUITES
    if arguments.chart:
        if "context" not in suites:
            raise UserError("--chart needs the suite 'context'; name it, or no suite", usage=True)
        from . import plots  # slow to import

        if Path(arguments.chart).suffix not in plots.FORMATS:
            expected = ", ".join(plots.FORMATS)
            raise UserError(f"--chart {arguments.chart}: expected a name in {expected}", usage=True)
    found = benchmarks.run(suites, arguments.seconds)
    for line in benchmarks.lines(found):
        _say(arguments, line)
    if arguments.chart:
        costs = benchmarks.context_costs(found["results"])
        title = benchmarks.describe(found["machine"])
        plots.save(plots.context_costs(costs, title), arguments.chart)
    return found
