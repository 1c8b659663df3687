"""The last two stages of a run: measure all models, and fill the report.

Every measurement is a piece with a file of its own in `evaluation/parts`, so that a killed run goes
on with the next one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checkpoints, runtime
from .atomic import write_text
from .config import ModelConfig
from .data import Rows, TokenData
from .errors import UserError, validated
from .evaluate import (
    Comparison,
    Fidelity,
    branches,
    compare,
    evaluate,
    fidelity,
    write_results,
)
from .inside import median_gates
from .linearize import linearize
from .model import Model, load
from .recipe import GENERALIST, FidelitySection
from .report import ReportData, report
from .sources import document_end

if TYPE_CHECKING:
    from .run import Run

CONTROL, MERGED = "untrained", "merged"
"""Names of the untrained window + sinks control and of the merged student in every table."""
_FAR = 128
"""Positions from here on are far from the first tokens for a small window."""
_STATE_TOKENS = 8192


class _Models:
    """The models of a run, each made or loaded when it is first needed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._loaded: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        if name == "teacher":
            return self.run.teacher
        if name not in self._loaded:
            self._loaded[name] = self._make(name)
        return self._loaded[name]

    def _make(self, name: str) -> Model:
        if name == CONTROL:
            section = self.run.recipe.student
            # Where the teacher itself was trained, the control is that of other students.
            kept = () if _is_all_attention(self.run.student_config) else section.keep_attention
            # Without a window the control is full attention, the teacher itself.
            return linearize(
                self.run.teacher,
                window=section.window or self.run.teacher.config.max_position_embeddings,
                sinks=section.sinks,
                mixer="window",
                keep_attention=kept,
            )
        return load(self.run.path / MERGED if name == MERGED else self.run.trained_place(name))


def _is_all_attention(config: ModelConfig) -> bool:
    return all(mixer.mixer == "attention" for mixer in config.mixers)


def student_names(run: Run) -> list[str]:
    """The students that are measured on everything: control, generalist if there is one, merged."""
    return [CONTROL, *([GENERALIST] if run.recipe.generalist else []), MERGED]


def expert_names(run: Run) -> list[str]:
    """The experts, where they are not the merged model itself."""
    return list(run.recipe.experts) if len(run.recipe.experts) > 1 else []


class _Assessment:
    """The pieces of the evaluation of a run."""

    def __init__(self, run: Run) -> None:
        self.run, self.section = run, run.recipe.evaluate
        self.place = run.path / "evaluation"
        self.models = _Models(run)

    def piece(self, name: str, make: Callable[[], Any], shared: bool = False) -> Any:
        """The contents of a piece, made if its file is not there: by the first rank, or by all
        together (`shared`)."""
        file = self.place / "parts" / f"{name}.json"
        comm = self.run.comm
        if not self.run.stands(file):
            value = make() if shared or comm.first else None
            if comm.first:
                write_text(file, json.dumps(value, indent=1, allow_nan=False) + "\n")
            comm.barrier()
            self.run.check()
        return comm.broadcast(read_piece(file) if comm.first else None)

    @cached_property
    def documents(self) -> dict[str, list[list[int]]]:
        """Evaluation text by domain, without the tokens that end a document."""
        ends = set(document_end(self.run.tokenizer))
        return {
            name: [
                [t for t in data.document(i).tolist() if t not in ends]
                for i in range(data.documents)
            ]
            for name, data in self.run.evaluation_text().items()
        }

    def fidelity(self, section: FidelitySection) -> Any:
        """KL, agreement and perplexity of all students on windows of one length."""
        experts = expert_names(self.run) if section.expert_windows else []
        control, *others = student_names(self.run)
        students: dict[str, Any] = {n: self.models[n] for n in (control, *experts, *others)}
        if self.section.branches:
            students.update(branches(self.models[MERGED], MERGED))
        separator = next(iter(document_end(self.run.tokenizer)), None)
        with self.run.reporter.bar(f"fidelity at {section.context}") as update:

            def progress(done: int, total: int) -> None:
                update({"step": done, "steps": total})
                self.run.check()

            found = fidelity(
                students,
                self.run.teacher,
                self.documents,
                context=section.context,
                max_windows=section.windows,
                fewer=dict.fromkeys(experts, section.expert_windows),
                separator=separator,
                progress=progress,
                comm=self.run.comm,
            )
        return found.model_dump()

    def gates(self) -> list[list[float | None]]:
        """Median output gate [layers][heads] of the merged model on evaluation text."""
        merged = self.models[MERGED]
        length = min(self.run.recipe.data.length, self.section.gate_tokens)
        texts = list(self.run.evaluation_text().values()) or [
            self.run.rows(name).data for name in self.run.recipe.data.domains
        ]
        batches = []
        for text in texts:
            rows = Rows(text, min(length, text.tokens))
            wanted = max(1, self.section.gate_tokens // (length * len(texts)))
            for index in range(min(wanted, len(rows))):
                ids, _, reset = rows.row(index)
                batches.append((ids[None], reset[None]))
        return median_gates(merged, batches)

    def memory(self) -> dict[str, float]:
        """MiB of one row's decode state after many tokens."""
        return {
            name: self.models[name].new_state(1, _STATE_TOKENS).nbytes / 2**20
            for name in ("teacher", MERGED)
        }

    def sample(self, prompt: str, chat: bool) -> dict[str, Any]:
        """What the teacher and all students write after a prompt, greedily."""
        text = prompt
        if chat:
            text = self.run.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        outputs = {
            name: self.models[name].generate(text, self.section.max_new_tokens)
            for name in ("teacher", *student_names(self.run))
        }
        return {"prompt": prompt, "outputs": outputs}

    def task(self, task: str, limit: int, name: str) -> Any:
        """Results of one model on one request set."""
        with self.run.reporter.bar(f"{task}: {name}") as update:

            def progress(_: str, done: int, total: int) -> None:
                update({"step": done, "steps": total})
                self.run.check()

            return evaluate(
                self.models[name],
                [task],
                limit=limit,
                seed=self.run.recipe.seed,
                progress=progress,
                comm=self.run.comm,
            )


def assess(run: Run) -> None:
    """Make every piece that is missing; results of request sets also as `results_NAME.json`."""
    work = _Assessment(run)
    place = work.place
    finished = run.directory.done("evaluate") and (place / "parts").is_dir()
    if run.comm.broadcast(finished):
        return
    section = run.recipe.evaluate
    run.teacher.compute = "f32"  # everything is measured in float32, whatever it was trained in
    with run.timed("evaluate"):
        for one in section.fidelity:
            work.piece(f"fidelity-{one.context}", partial(work.fidelity, one), shared=True)
        work.piece("memory", work.memory)
        if section.gate_tokens and run.student_config.has_gates:
            work.piece("gates", work.gates)
        prompts = [(p, False) for p in section.prompts] + [(p, True) for p in section.chats]
        for number, (prompt, chat) in enumerate(prompts):
            work.piece(f"sample-{number}", partial(work.sample, prompt, chat))
        for name in ("teacher", *student_names(run)):
            parts = [
                work.piece(
                    f"{task.replace(':', '-')}-{name}",
                    partial(work.task, task, limit, name),
                    shared=True,
                )
                for task, limit in section.tasks.items()
            ]
            if parts and run.comm.first:
                write_results(_joined(parts), place / f"results_{name}.json")
        if section.tasks and run.comm.first:
            compare_results(run)


def compare_results(run: Run) -> Comparison:
    """Win-and-Tie of the merged model, the generalist and the control, from their result files."""
    place = run.path / "evaluation"
    students = {name: place / f"results_{name}.json" for name in reversed(student_names(run))}
    return compare(
        place / "results_teacher.json", students, controls=[CONTROL], out=place / "comparison"
    )


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of several tasks as one mapping."""
    joined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key == "config":
                joined[key] = {k: v for k, v in value.items() if k != "limit"}
            else:
                joined.setdefault(key, {}).update(value)
    return joined


def read_piece(file: Path) -> Any:
    """The contents of a piece."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run again") from None


def read_fidelity(file: Path) -> Fidelity:
    """The same of a piece that is a measurement of fidelity."""
    return validated(Fidelity, read_piece(file), f"{file}: damaged, delete it and run again")


# ---- the report ---------------------------------------------------------------------------------


def write_report(run: Run) -> Path:
    """`report/report.html` and `report.json`, from what the stages left behind."""
    return report(report_facts(run), run.path / "report")


def report_facts(run: Run) -> ReportData:
    """Everything that the report shows, read from the run directory.

    Raises UserError if the run has not got as far as the end of its evaluation.
    """
    if run.directory.done("evaluate") is None:
        raise UserError(
            f"{run.path}: the run is not finished; continue it with `xlstm-distill run`"
        )
    parts = run.path / "evaluation" / "parts"
    sections = sorted(run.recipe.evaluate.fidelity, key=lambda s: -s.context)
    measured = [read_fidelity(parts / f"fidelity-{s.context}.json") for s in sections]
    main = measured[0] if measured else None
    gates = parts / "gates.json"
    samples = [read_piece(file) for file in sorted(parts.glob("sample-*.json"))]
    errors = checkpoints.load(run.path / "aligned").provenance.get("relative_error")
    if errors is not None:  # those of an earlier version are of all layers
        errors = {"layers": list(range(len(errors["before"]))), **errors}
    facts: dict[str, Any] = {
        "title": run.recipe.title,
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "summary": _summary(run, main),
        "main": MERGED,
        "control": CONTROL,
        "recipe": run.recipe.model_dump(exclude_none=True),
        **_model_facts(run),
        "text": _text_facts(run),
        "stages": _stage_facts(run),
        "losses": _loss_curves(run),
        "layer_errors": errors,
        "fidelity": main,
        "gates": None,
        "benchmarks": compare_results(run) if run.recipe.evaluate.tasks else None,
        "samples": samples,
        "claims": _claims(run, main, errors),
        "machine": machine_facts(),
        "notes": _notes(run, main, measured[1:]),
    }
    if gates.is_file():
        text = "o near 0: the head reads the window, near 1: the mLSTM."
        facts["gates"] = {"values": read_piece(gates), "text": text}
    return ReportData(**facts)


def _summary(run: Run, main: Fidelity | None) -> str:
    if main is None:
        return ""
    ratio = main.ratio(MERGED, CONTROL)
    over = (
        "as it sees all of them, there is no ratio"
        if ratio is None
        else f"a ratio of {ratio.value:.3f} (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
    )
    return (
        f"The merged student's KL to the teacher on human text at {main.context} tokens is "
        f"{main.mean(MERGED).kl:.3f}, that of the untrained window + sinks student "
        f"{main.mean(CONTROL).kl:.3f}: {over}. It finds the teacher's most probable token at "
        f"{100 * main.mean(MERGED).agree:.1f} % of positions, the control at "
        f"{100 * main.mean(CONTROL).agree:.1f} %."
    )


def _model_facts(run: Run) -> dict[str, Any]:
    student = checkpoints.load(run.path / "student0")
    teacher = student.provenance.get("teacher", {})
    c, section = student.config, run.recipe.student
    sizes = {name: int(np.prod(_shape(student, name))) for name in student.tensors}
    added = sum(size for name, size in sizes.items() if ".mixer." in name)
    source = str(teacher.get("source", run.recipe.teacher))
    return {
        "teacher": {
            "name": run.recipe.teacher,
            "file": Path(source).name,
            "form": checkpoints.weights_form(source),
            "fingerprint": str(teacher.get("fingerprint", "")),
            "parameters": sum(sizes.values()) - added,
            "layers": c.num_hidden_layers,
            "hidden_size": c.hidden_size,
            "heads": c.num_attention_heads,
        },
        "student": {
            "mixer": "attention" if _is_all_attention(c) else section.mixer,
            "window": section.window,
            "sinks": section.sinks,
            "gate": section.gate,
            "normalizer": section.normalizer,
            "feature_map": section.feature_map,
            "parameters": sum(sizes.values()),
            "added": added,
        },
    }


def _shape(checkpoint: checkpoints.Checkpoint, name: str) -> tuple[int, ...]:
    tensors = checkpoint.tensors
    if isinstance(tensors, checkpoints.LazyTensors):
        return tensors.shape(name)
    return tuple(tensors[name].shape)


def _text_facts(run: Run) -> list[dict[str, Any]]:
    found = []
    held_out = run.evaluation_text()
    ends = [run.directory.done(f"distill {name}") or {} for name in run.recipe.trained]
    for name, domain in run.recipe.data.domains.items():
        kinds = []
        for source in domain.sources:
            if source.kind == "sampled":
                kinds.append(f"sampled from the teacher ({source.style})")
            elif source.kind == "stdlib":
                kinds.append("the Python standard library's sources")
            else:
                kinds.append(", ".join(source.paths))
        train = run.rows(name).data
        passes = max((end.get("passes", {}).get(name, 0.0) for end in ends), default=0.0)
        texts = [("training", "; ".join(kinds), train)]
        if name in held_out:
            human = f"passages of {', '.join(domain.passages)}" if domain.passages else ""
            texts.append(("evaluation", human or "held-out documents of the same", held_out[name]))
        for use, origin, data in texts:
            found.append(
                {
                    "domain": name,
                    "use": use,
                    "origin": origin,
                    "documents": data.documents,
                    "tokens": data.tokens,
                    "passes": passes if use == "training" else 0.0,
                    "left_out": _left_out(run, data) if use == "training" else {},
                }
            )
    return found


def _left_out(run: Run, data: TokenData) -> dict[str, int]:
    """Documents of a domain that are not in its text, by why, as its manifest counts them."""
    facts, contamination = data.manifest, run.recipe.data.contamination
    found = {"repeated": int(facts.get("repeated", 0))}
    for kind, count in facts.get("malformed", {}).items():
        found[f"malformed ({kind})"] = int(count)
    kept = contamination is not None and contamination.action == "report"
    found["contaminated (counted, kept)" if kept else "contaminated"] = int(
        facts.get("contaminated", 0)
    )
    return {why: count for why, count in found.items() if count}


def _stage_facts(run: Run) -> list[dict[str, Any]]:
    words = {
        "data": "text sampled, read and encoded",
        "linearize": "weights copied, mixers exchanged",
        "align": "stage I: each mixer learns its layer's attention",
        "targets": "the teacher's targets of every position",
        "distill": "stage II: next tokens and the teacher's targets",
        "merge": "stage III: weighted sum of the experts",
        "evaluate": "fidelity, benchmarks, samples",
    }
    found = []
    for line in run.directory.read_log():
        if line.get("event") == "done":
            fact = {key: line.get(key) for key in ("steps", "tokens", "seconds", "peak_memory_mib")}
            what = words.get(line["stage"].split()[0], "")
            found.append({"name": line["stage"], "what": what, **fact})
    latest = {fact["name"]: fact for fact in found}
    return list(latest.values())


def _loss_curves(run: Run) -> list[dict[str, Any]]:
    curves: list[dict[str, Any]] = []

    def curve(stage: str, label: str, steps: list[dict[str, Any]], key: str, **unit: str) -> None:
        if steps:
            numbers, values = [s["step"] for s in steps], [float(s[key]) for s in steps]
            curves.append(
                {"stage": stage, "label": label, "steps": numbers, "values": values, **unit}
            )

    what, unit = "mean relative error of the layers", "relative squared error"
    errors = stage_one_errors(run.directory.steps("align"))
    of_steps = [{"step": n, "relative_error": error} for n, error in enumerate(errors, start=1)]
    curve("stage I", what, of_steps, "relative_error", unit=unit)
    held_out = stage_one_validations(run.directory.steps("align"))
    of_steps = [{"step": n, "validation": error} for n, error in held_out.items()]
    curve("stage I", "the same, not trained on", of_steps, "validation", unit=unit)
    for name in run.recipe.trained:
        steps, validations = run.directory.steps(f"distill {name}"), _validations(run, name)
        curve("stage II, KL to the targets", name, steps, "kl")
        curve("stage II, cross-entropy", name, steps, "ce")
        if validations:
            curve("stage II, loss", name, steps, "loss")
            curve("stage II, loss", f"{name}, not trained on", validations, "validation")
    return curves


def _validations(run: Run, name: str) -> list[dict[str, Any]]:
    """The steps of stage II after which the loss of rows that are not trained on was measured."""
    return [s for s in run.directory.steps(f"distill {name}") if "validation" in s]


def _validation_notes(run: Run) -> list[str]:
    notes = []
    for name in run.recipe.trained:
        measured = _validations(run, name)
        if measured:
            best, last = min(measured, key=lambda s: float(s["validation"])), measured[-1]
            kept = best if run.recipe.distill.keep == "best" else last
            notes.append(
                f"Stage II, {name}: the loss of rows that are not trained on is "
                f"{last['validation']:.4f} after the last step, at its lowest "
                f"{best['validation']:.4f} after step {best['step']}; kept: step {kept['step']}."
            )
    return notes


def stage_one_errors(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean relative error of the trained layers after step 1, 2, ... from the log's lines of stage
    I, in either order; a layer that stopped counts with its last one."""
    layers: dict[int, list[float]] = {}
    for line in lines:
        layers.setdefault(line.get("layer", -1), []).append(float(line["relative_error"]))
    steps = max(map(len, layers.values()), default=0)
    return [
        float(np.mean([own[min(n, len(own) - 1)] for own in layers.values()])) for n in range(steps)
    ]


def stage_one_validations(lines: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Step of stage I -> mean relative error, on rows that are not trained on, of the layers that
    were measured after it, from the log's lines in either order."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if "validation" in line:
            found.setdefault(line.get("layer_step", line["step"]), []).append(line["validation"])
    return {step: float(np.mean(found[step])) for step in sorted(found)}


def _claims(
    run: Run, main: Fidelity | None, errors: Mapping[str, list[Any]] | None
) -> list[dict[str, Any]]:
    claims: list[dict[str, Any]] = []

    def claim(text: str, found: str, holds: bool) -> None:
        claims.append({"claim": text, "found": found, "holds": bool(holds)})

    if main is not None:
        ratio = main.ratio(MERGED, CONTROL)
        wanted = run.recipe.evaluate.wanted_ratio
        if ratio is not None or wanted is not None:
            text = f"KL of the merged student is at most {wanted or 1:g} of the untrained control's"
            found = "0 is the control's"
            if ratio is not None:
                found = f"{ratio.value:.3f}, upper end {ratio.high:.3f}"
            claim(text, found, ratio is not None and ratio.high <= (wanted or 1))
        # Where its window still shows everything the control is the teacher.
        far = {
            low: main.mean(MERGED, i).kl / main.mean(CONTROL, i).kl
            for i, (low, _) in enumerate(main.buckets)
            if low >= _FAR and main.mean(CONTROL, i).kl > 0
        }
        if far:
            largest = max(far.values())
            text = f"its KL is lower in every position bucket from {min(far)} on"
            claim(text, f"largest ratio {largest:.3f}", largest < 1)
        experts = [name for name in expert_names(run) if name in main.models]
        for domain in main.domains if experts else []:
            of_experts = [main.models[name][domain].windows["kl"] for name in experts]
            worse = max(float(np.mean(windows)) for windows in of_experts)
            same = main.models[MERGED][domain].windows["kl"][: len(of_experts[0])]
            merged = float(np.mean(same))  # on the windows that the experts were measured on
            text = f"on {domain} the merged student is not worse than the worse expert (KL)"
            claim(text, f"{merged:.4f} against {worse:.4f}", merged <= worse)
    if errors:
        pairs = list(zip(errors["before"], errors["after"], strict=True))
        fallen = sum(after < before for before, after in pairs)
        text = "stage I's relative error falls in every layer that it trains"
        claim(text, f"in {fallen} of {len(pairs)} layers", fallen == len(pairs))
    return claims


def _notes(run: Run, main: Fidelity | None, shorter: list[Fidelity]) -> list[str]:
    notes = _validation_notes(run)
    if main is not None and run.recipe.generalist:
        ratio = main.ratio(MERGED, GENERALIST)
        of_it = (
            f"{main.mean(MERGED).kl:.4f}"
            if ratio is None
            else f"{ratio.value:.3f} of it (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
        )
        notes.append(
            f"The generalist had {run.recipe.steps_of(GENERALIST):,} steps on the text of all "
            f"experts, as many as they together: KL {main.mean(GENERALIST).kl:.4f}, the merged "
            f"student's is {of_it}."
        )
    for measured in shorter:
        words = [
            f"{name} {measured.mean(name).kl:.4f}"
            for name in measured.complete
            if name != "teacher"
        ]
        notes.append(f"KL to the teacher at a context of {measured.context}: {', '.join(words)}.")
    memory = run.path / "evaluation" / "parts" / "memory.json"
    if memory.is_file():
        sizes = read_piece(memory)
        notes.append(
            f"Memory of one row after {_STATE_TOKENS:,} tokens: teacher {sizes['teacher']:.1f} "
            f"MiB, student {sizes[MERGED]:.1f} MiB."
        )
    return notes


def machine_facts() -> dict[str, str]:
    """Processor, threads, instruction set and versions."""
    packages = {}
    for name in ("xlstm_distill", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": runtime.cpu_name(),
        "threads": str(runtime.threads()),
        "instruction set": runtime.isa(),
        "Python": platform.python_version(),
        **packages,
    }
