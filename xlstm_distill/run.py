"""All stages of a recipe in a run directory, in order, each restartable.

A stage is done when its result stands under its own name: results appear whole or not at all
(atomic.py). What a stage does is decided by the recipe and the results before it, so a run that was
killed and started again ends with the same bits.
"""

from __future__ import annotations

import io
import os
import platform
import resource
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoints, runtime
from .align import MixerTraining, align, relative_errors, trained_layers
from .checkpoints import Checkpoint
from .checks import PROBE_ROWS, aligned_layers, check, open_teacher, tokenizer_of
from .communicator import Communicator, world
from .config import ModelConfig
from .data import Batch, Batches, Rows, TokenData, joined
from .distill import OfRows, distill
from .errors import UserError
from .layerwise import align_layers, aligned_student
from .linearize import linearize, student_config
from .lora import Lora
from .merge import merge
from .model import Model, fingerprint_of, from_checkpoint, load
from .progress import Reporter
from .recipe import (
    ADAPTER_END,
    GENERALIST,
    STATE_END,
    AlignSection,
    DistillSection,
    Recipe,
    derived_seed,
)
from .rundir import RECIPE, STAGES, Interrupt, RunDirectory
from .sharing import share
from .targets import (
    OnlineTargets,
    TargetCache,
    Targets,
    holds,
    identity_of,
    write_targets,
)
from .tokenizer import Tokenizer
from .trackers import Trackers
from .training import DivergedError, Metrics

_SHARED = ("data", "align", "targets", "distill", "evaluate")
"""Stages of which every rank does a part."""
_STATE = "state.npz"


def stages_up_to(until: str) -> tuple[str, ...]:
    """The stages of a run that ends with `until`."""
    if until not in STAGES:
        raise UserError(f"stage {until!r} is not known: {', '.join(STAGES)}", usage=True)
    return STAGES[: STAGES.index(until) + 1]


class Run:
    """Stages of a run. Open the directory first; `execute` does what is not done yet.

    All ranks of a job (`world`) go through the stages together: they share the work of text that is
    sampled, of training, targets and measurements, and the first does all the rest. It alone writes
    and looks what is there, so that all decide alike.
    """

    def __init__(
        self,
        directory: RunDirectory,
        recipe: Recipe,
        reporter: Reporter | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.directory, self.recipe = directory, recipe
        self.path = directory.path
        self.reporter = reporter or Reporter(quiet=True)
        self.interrupt = interrupt or Interrupt()
        self.comm: Communicator = world()
        self.trackers = Trackers(
            recipe.trackers if self.comm.first else [],
            self.path,
            recipe.title,
            recipe.model_dump(mode="json"),
        )

    def execute(self, until: str = "report") -> None:
        """Run all stages up to `until` that are not done."""
        stages = stages_up_to(until)
        self._check_ranks(stages)
        with closing(self.trackers):
            for stage in stages:
                if self.comm.first or stage in _SHARED:
                    getattr(self, f"run_{stage}")()
                self.comm.barrier()
                self.check()

    def _check_ranks(self, stages: Sequence[str]) -> None:
        """Refuse ranks that would not compute alike, or have nothing to do in one of `stages`; say
        what they are."""
        size = self.comm.size
        if size == 1:
            return
        align, distill = self.recipe.align, self.recipe.distill
        aligns, distils = "align" in stages and bool(self._aligned_layers()), "distill" in stages
        if aligns and align.order == "layer":
            raise UserError("align.order: layer is for one rank; choose step, or start without MPI")
        if distils and distill.state_passing:
            raise UserError("distill.state_passing is for one rank; start without MPI")
        self.comm.agree("the instruction set (XLSTM_DISTILL_ISA sets it)", runtime.isa())
        fewest = min(map(len, self._at_once(list(self.recipe.trained))))
        trains = {"align": aligns, "distill": distils}
        for stage, section, groups in (("align", align, 1), ("distill", distill, fewest)):
            if not trains[stage]:
                continue
            parts, ranks = -(-section.rows // (section.micro_rows or 1)), -(-size // groups)
            if parts < ranks:
                raise UserError(
                    f"{stage}: a step has {parts} parts (rows {section.rows}, micro_rows "
                    f"{section.micro_rows}) for {ranks} ranks; start at most {parts * groups} ranks"
                )
        machines = len(set(self.comm.gather(platform.node())))
        threads = sum(self.comm.gather(runtime.threads()))
        self.reporter.note(f"ranks: {size}, machines: {machines}, threads in all: {threads}")

    def check(self) -> None:
        """Stop here, all ranks alike, if one was asked to."""
        if self.comm.any(self.interrupt.asked):
            raise KeyboardInterrupt

    def stands(self, file: Path) -> bool:
        """True if a result is there."""
        return self.comm.broadcast(self.comm.first and file.is_file())

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The teacher's files: sizes and tokenizer, and tensors that are read when asked for."""
        return open_teacher(self.recipe)

    @cached_property
    def teacher(self) -> Model:
        """The teacher in memory, loaded when a stage needs it; `release_teacher` frees it."""
        return from_checkpoint(self.checkpoint, self.recipe.compute)

    def release_teacher(self) -> None:
        """Free the teacher's memory, for work that is done without it."""
        self.__dict__.pop("teacher", None)  # the cached property: loaded again when it is asked for

    @cached_property
    def teacher_fingerprint(self) -> str:
        """`Model.fingerprint` of the teacher, without holding it."""
        return fingerprint_of(self.checkpoint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The teacher's tokenizer."""
        return tokenizer_of(self.checkpoint, self.recipe.teacher)

    # ---- shared by stages ---------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Log the end of a stage with time and memory; `facts` and what the block adds go along."""
        _reset_peak_memory()
        started = time.perf_counter()
        yield facts
        self.directory.log(stage, **self._done(stage, started, **facts))

    def _done(self, stage: str, started: float, **facts: Any) -> dict[str, Any]:
        """The line of the log that ends a stage."""
        seconds = time.perf_counter() - started
        # After a restart this attempt did not do all steps: count those of the log.
        seconds = max(seconds, sum(s["seconds"] for s in self.directory.steps(stage)))
        memory = _peak_memory_mib()
        return {"event": "done", "seconds": seconds, "peak_memory_mib": memory, **facts}

    def follow(self, lines: Iterable[Metrics], stage: str, title: str) -> None:
        """Exhaust the generator of a stage, which gives lines of the log: show and log them, and
        stop between steps if asked to."""
        self._follow(lines, stage, {stage: title})

    def _follow(self, lines: Iterable[Metrics], own: str, titles: Mapping[str, str]) -> None:
        """The same where groups of ranks each have a stage of their `own`, all of them in `titles`.

        They go on step by step together: so the first rank logs the steps of all before a group
        saves them, and all stop alike.
        """
        generator = iter(lines)
        stop = agreed = False

        def together() -> Iterator[tuple[str, Metrics]]:
            nonlocal stop
            while not stop:
                found: dict[str, Metrics] = {}
                for stage, line in self.comm.gather((own, next(generator, {}))):
                    found.setdefault(stage, line)  # of a group's first rank
                if not any(found.values()):
                    return
                yield from ((stage, line) for stage, line in found.items() if line)
                stop = self.comm.any(self.interrupt.asked)

        try:
            with ExitStack() as stack:
                show = {
                    stage: stack.enter_context(
                        self.trackers.stage(stage, partial(self.directory.steps, stage))
                    )
                    for stage in titles
                }
                for stage, line in self.reporter.follow(together(), titles):
                    self.directory.log(stage, **line)
                    if "step" in line:
                        show[stage](line)
            agreed = True
        except DivergedError as error:
            raise UserError(f"{own}: {error}: {self._with_lower_rate(own)}") from None
        finally:
            # Saves the state of a stage that is not finished. That needs all ranks of a stage, and
            # where one has met an error by itself the others do not come.
            close = getattr(generator, "close", None)
            if close is not None and (agreed or self.comm.size == 1):
                close()
        if stop:
            self.comm.barrier()  # all states are saved
            raise KeyboardInterrupt

    def _with_lower_rate(self, stage: str) -> str:
        """The command for a run with half the learning rate, which has what is done up to here."""
        section = stage.split()[0]
        rate = {"align": self.recipe.align.lr, "distill": self.recipe.distill.lr}[section] / 2
        words = [self.path / RECIPE, "--set", f"{section}.lr={rate:g}", "--from", self.path]
        words += ["--out", f"{self.path}-{section}.lr={rate:g}"]
        return f"xlstm-distill run {shlex.join(map(str, words))}"

    def rows(self, domain: str, streams: int = 0) -> Rows:
        """The packed training text of a domain."""
        data = TokenData.open(self.path / "data" / domain / "train")
        return self.packed(domain, data, streams)

    def packed(self, domain: str, data: TokenData, streams: int = 0) -> Rows:
        """Text of a domain, packed as training packs it."""
        seed = derived_seed(self.recipe.seed, "rows", domain)
        return Rows(data, self.recipe.data.length, seed, self.recipe.reserved_rows, streams)

    def _batches_of(
        self, weights: Mapping[str, float], rows: int, seed: int, streams: int = 0
    ) -> Batches:
        """Batches of a stage; a domain whose share is 0 needs no text."""
        used = {domain: share for domain, share in weights.items() if share > 0}
        packed = {domain: self.rows(domain, streams) for domain in used}
        return Batches(packed, rows, used, seed)

    @property
    def streams(self) -> int:
        """Streams of the rows of stage II, 0 for none."""
        return self.recipe.distill.rows if self.recipe.distill.state_passing else 0

    def evaluation_text(self) -> dict[str, TokenData]:
        """Evaluation text by domain, where there is some."""
        return {
            name: TokenData.open(self.path / "data" / name / "evaluation")
            for name, domain in self.recipe.data.domains.items()
            if domain.held_out_tokens
        }

    # ---- text ---------------------------------------------------------------------------------

    def run_data(self) -> None:
        """Sample, read and encode the text of every domain; set evaluation text aside
        (domains.py)."""
        from .domains import collect_text

        collect_text(self)

    # ---- the student and stage I --------------------------------------------------------------

    def run_linearize(self) -> None:
        """Write student0."""
        place = self.path / "student0"
        if (place / "config.json").is_file():
            return
        with self.timed("linearize"):
            student = linearize(self.checkpoint, **self.recipe.student.model_dump())
            checkpoints.save(
                place, student.config, student.tensors, student.tokenizer, student.provenance
            )

    def run_align(self) -> None:
        """Stage I: student0 becomes aligned."""
        place, state = self.path / "aligned", self.path / "aligned.state"
        section = self.recipe.align
        if self.stands(place / "config.json"):
            self._remove(state)
            return
        if not self._aligned_layers():
            self._skip_align(place)
            return
        weights = section.weights or dict.fromkeys(self.recipe.data.domains, 1.0)
        seed = derived_seed(self.recipe.seed, "align")
        batches = self._batches_of(weights, section.rows, seed)
        provenance = {"align": section.model_dump(), "data": batches.identity}
        with self.timed("align") as facts:
            by_order = self._align_by_step if section.order == "step" else self._align_by_layer
            errors = by_order(batches, self._probe(batches.sources), state, provenance)
            steps = self._steps_aligned()
            tokens = steps * section.rows * self.recipe.data.length
            facts.update(errors, steps=steps, tokens=tokens)
        if self.comm.first and steps < section.steps:
            self.reporter.note(
                f"stage I: all layers stopped within {steps} of {section.steps} steps"
            )
        self._remove(state)

    def _steps_aligned(self) -> int:
        """Steps of the layer that trained longest; with `patience` it may have stopped."""
        lines = self.directory.steps("align")
        return max((line.get("layer_step", line["step"]) for line in lines), default=0)

    def _aligned_layers(self) -> list[int]:
        """The layers that stage I trains; none: there is no stage I."""
        return aligned_layers(self.recipe, self.student_config)

    def _skip_align(self, place: Path) -> None:
        """Without stage I aligned is student0."""
        if self.comm.first:
            steps = self.recipe.align.steps
            why = "no layer has tensors of its own to align" if steps else "align.steps is 0"
            self.reporter.note(f"stage I: none, {why}")
            with self.timed("align", steps=0, tokens=0):
                student = checkpoints.load(self.path / "student0")
                provenance = {**student.provenance, "align": {"steps": 0}}
                checkpoints.save(
                    place, student.config, student.tensors, student.tokenizer, provenance
                )
        self.comm.barrier()

    def _mixer_training(self) -> dict[str, Any]:
        outside = {"rows", "weights", "layers", "order", "stream", "stream_place", "validate_rows"}
        settings = self.recipe.align.model_dump(exclude=outside)
        return {**settings, "accumulation": self.recipe.accumulation}

    def _align_by_step(
        self, batches: Batches, probe: list[Batch], state: Path, provenance: dict[str, Any]
    ) -> dict[str, Any]:
        """All layers at once, teacher and student in memory; the errors of the probe."""
        student = load(self.path / "student0", self.recipe.compute)
        layers = trained_layers(student.config, self.recipe.align.layers)
        before = relative_errors(student, probe, layers, self.comm)
        metrics = align(
            student,
            self.teacher,
            batches,
            layers=layers,
            held_out=self._held_out(batches, self.recipe.align),
            state=state / _STATE,
            save_seconds=self.recipe.save_seconds,
            comm=self.comm,
            **self._mixer_training(),
        )
        self.follow(metrics, "align", "stage I: align")
        after = relative_errors(student, probe, layers, self.comm)
        errors = {"layers": layers, "before": before, "after": after}
        if self.comm.first:
            student.save(self.path / "aligned", {**provenance, "relative_error": errors})
        return errors

    def _align_by_layer(
        self, batches: Batches, probe: list[Batch], state: Path, provenance: dict[str, Any]
    ) -> dict[str, Any]:
        """One layer after another, one of them in memory; the errors of the probe."""
        self.release_teacher()  # which may have written text
        section = self.recipe.align
        student = checkpoints.load(self.path / "student0")
        metrics = align_layers(
            student,
            batches,
            state,
            MixerTraining(**self._mixer_training()),
            layers=section.layers,
            stream=section.stream,
            stream_place=section.stream_place,
            compute=self.recipe.compute,
            probe=probe,
            held_out=self._held_out(batches, section),
            save_seconds=self.recipe.save_seconds,
            check=self.interrupt.check,
        )
        self.follow(metrics, "align", "stage I: align by layer")
        aligned = aligned_student(student, state)
        checkpoints.save(
            self.path / "aligned",
            aligned.config,
            aligned.tensors,
            aligned.tokenizer,
            {**aligned.provenance, **provenance},
        )
        errors: dict[str, Any] = aligned.provenance["relative_error"]
        return errors

    @property
    def student_config(self) -> ModelConfig:
        """The configuration of the student that the recipe asks for."""
        teacher = self.checkpoint
        return student_config(teacher.config, teacher.source, **self.recipe.student.model_dump())

    def _held_out(self, batches: Batches, section: AlignSection | DistillSection) -> Batch | None:
        """The rows that are set aside for the validation of a stage, if it has one."""
        if not section.validate_every:
            return None
        wanted = section.validate_rows
        return joined([r.batch(n, r.reserved[:wanted]) for n, r in batches.sources.items()])

    def _probe(self, packed: Mapping[str, Rows]) -> list[Any]:
        """A few rows a domain, of evaluation text where it is long enough."""
        length = self.recipe.data.length
        held_out = self.evaluation_text()
        found = []
        for name, rows in packed.items():
            text = held_out.get(name)
            chosen = Rows(text, length) if text is not None and text.tokens >= length else rows
            found += [chosen.batch(name, [i]) for i in range(min(PROBE_ROWS, len(chosen)))]
        return found

    # ---- stage II -----------------------------------------------------------------------------

    def _batches(self, name: str) -> Batches:
        weights, rows = self.recipe.trained[name], self.recipe.distill.rows
        seed = derived_seed(self.recipe.seed, "distill", name)
        return self._batches_of(weights, rows, seed, self.streams)

    @property
    def _kind(self) -> dict[str, Any]:
        """What targets are: those of the recipe; of most probable tokens all there are."""
        kind = self.recipe.targets.model_dump(include={"form", "k", "rows_before"})
        if kind["form"] == "topk":
            kind["k"] = min(kind["k"], self.checkpoint.config.vocab_size)
        return kind

    def run_targets(self) -> None:
        """The teacher's targets of every row that stage II will see, unless they are online."""
        wanted_here = self.recipe.distill.kl_weight > 0 and not self.recipe.targets.online
        if not wanted_here or not self._untrained():
            return
        wanted: dict[str, int] = {}
        for student in self.recipe.trained:
            steps = self.recipe.steps_of(student)
            for name, n in self._batches(student).first_rows(steps).items():
                wanted[name] = max(n, wanted.get(name, 0))
        for name, count in wanted.items():
            if count == 0:
                continue
            stage, place = f"targets {name}", self.path / "targets" / name
            # A shard that was found damaged and deleted is made again.
            if self.comm.broadcast(
                self.comm.first and self.directory.done(stage) and holds(place, count)
            ):
                continue
            with self.timed(stage, tokens=count * self.recipe.data.length):
                packed = self.rows(name, self.streams)
                metrics = write_targets(
                    self.teacher, packed, place, count=count, comm=self.comm, **self._kind
                )
                self.follow(metrics, stage, f"targets: {name}")

    def trained_place(self, name: str) -> Path:
        """Where an expert, or the generalist, stands after stage II."""
        return self.path / name if name == GENERALIST else self.path / "experts" / name

    def _untrained(self) -> list[str]:
        """Experts that do not stand yet, and the generalist, on every rank alike."""
        places = {name: self.trained_place(name) for name in self.recipe.trained}
        left = [name for name, place in places.items() if not (place / "config.json").is_file()]
        return self.comm.broadcast(left)

    def _at_once(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Who is trained at the same time: experts. The generalist is by itself, because it takes
        as long as all of them."""
        count = min(self.recipe.experts_at_once, self.comm.size)
        experts = [name for name in names if name != GENERALIST]
        for start in range(0, len(experts), count):
            yield experts[start : start + count]
        if GENERALIST in names:
            yield [GENERALIST]

    def run_distill(self) -> None:
        """Stage II: each expert, and the generalist, from aligned."""
        untrained = self._untrained()
        for name in self.recipe.trained:
            if name not in untrained:
                self._remove(self._state(name))
        for names in self._at_once(untrained):
            number, comm = self.comm.split(len(names))
            titles = {
                f"distill {name}": f"stage II: {name if name == GENERALIST else f'expert {name}'}"
                for name in names
            }
            name = names[number]
            self._follow(self._distill(name, comm), f"distill {name}", titles)

    def _state(self, name: str) -> Path:
        return self.trained_place(name).with_name(name + STATE_END)

    def _distill(self, name: str, comm: Communicator) -> Iterator[Metrics]:
        """Train an expert, or the generalist, with the ranks of `comm`; lines of the log."""
        _reset_peak_memory()
        started = time.perf_counter()
        place, state = self.trained_place(name), self._state(name)
        section, steps = self.recipe.distill, self.recipe.steps_of(name)
        batches = self._batches(name)
        held_out, held_out_targets = self._validation(batches, comm)
        if not self.recipe.targets.online:  # the largest stage has room for the student alone
            self.release_teacher()
        student = load(self.path / "aligned", self.recipe.compute)
        targets = None if section.kl_weight == 0 else self._targets(batches, steps)
        settings = section.model_dump(exclude={"steps", "rows", "train", "lora", "validate_rows"})
        train = self._adapter(student) if section.train == "lora" else section.train
        yield from distill(
            student,
            batches,
            targets,
            steps=steps,
            train_what=train,
            held_out=held_out,
            held_out_targets=held_out_targets,
            accumulation=self.recipe.accumulation,
            state=state / _STATE,
            save_seconds=self.recipe.save_seconds,
            comm=comm,
            **settings,
        )
        if comm.first:
            provenance = {"distill": section.model_dump(), "data": batches.identity}
            if isinstance(train, Lora):  # before the expert, with which the stage is done
                adapter = place.with_name(name + ADAPTER_END)
                base = os.path.relpath(self.path / "aligned", adapter)
                train.save(adapter, base, provenance)
            student.save(place, provenance)
        tokens = steps * section.rows * self.recipe.data.length
        passes = {domain: round(n, 2) for domain, n in batches.passes(steps).items()}
        yield self._done(f"distill {name}", started, steps=steps, tokens=tokens, passes=passes)
        if comm.first:
            shutil.rmtree(state, ignore_errors=True)

    def _adapter(self, student: Model) -> Lora:
        """New factors of the student, which begin alike for every expert."""
        settings = self.recipe.distill.lora.model_dump()
        return Lora(student, **settings, seed=derived_seed(self.recipe.seed, "lora"))

    def _validation(
        self, batches: Batches, comm: Communicator
    ) -> tuple[Batch | None, Targets | None]:
        """The rows that are set aside for validation, and the teacher's targets of them."""
        batch = self._held_out(batches, self.recipe.distill)
        if batch is None or self.recipe.distill.kl_weight == 0:
            return batch, None

        def of_row(p: Batch) -> Targets:
            if self.recipe.targets.form == "topk":  # exact, not rounded as those that are stored
                return self.teacher.topk(p.ids, self._kind["k"], reset=p.reset)[:2]
            ((domain, row),) = p.rows
            return self._online(batches.sources[domain]).get([row])

        found = comm.map(of_row, batch.parts(1))
        ids, logp = (np.concatenate(x) for x in zip(*found, strict=True))
        return batch, (ids, logp)

    def _online(self, rows: Rows) -> OnlineTargets:
        return OnlineTargets(self.teacher, rows, **self._kind)

    def _targets(self, batches: Batches, steps: int) -> dict[str, OfRows]:
        """Targets of each domain that the steps reach."""
        found: dict[str, OfRows] = {}
        for name, rows in batches.sources.items():
            if not batches.first_rows(steps)[name]:
                continue
            if self.recipe.targets.online:
                found[name] = self._online(rows)
            else:
                expect = identity_of(self.teacher_fingerprint, self.tokenizer, rows, **self._kind)
                found[name] = TargetCache(self.path / "targets" / name, expect)
        return found

    # ---- stage III, evaluation, report --------------------------------------------------------

    def run_merge(self) -> None:
        """Stage III: the experts become merged."""
        place = self.path / "merged"
        if (place / "config.json").is_file():
            return
        experts = {name: self.path / "experts" / name for name in self.recipe.experts}
        with self.timed("merge"):
            merge(experts, self.recipe.merge.weights or None, self.recipe.merge.method, out=place)

    def run_evaluate(self) -> None:
        """Measure teacher, control, experts and merged model (assess.py)."""
        from .assess import assess

        assess(self)

    def run_report(self) -> None:
        """Write the report (assess.py); cheap, and so always done again."""
        from .assess import write_report

        write_report(self)

    # ---- files of the first rank --------------------------------------------------------------

    def _remove(self, state: Path) -> None:
        """Delete the directory of the state of a stage whose result stands."""
        if self.comm.first:
            shutil.rmtree(state, ignore_errors=True)


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is that of the process, an upper bound


def _peak_memory_mib() -> float:
    """Largest resident memory since the last reset, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(
    recipe: Recipe,
    out: str | Path,
    reporter: Reporter | None = None,
    until: str = "report",
    source: str | Path | None = None,
) -> Path:
    """Run a recipe in the directory `out` up to the stage `until`; again to continue.

    source: the directory of another run; its finished stages are taken over if the keys agree on
    which they depend (sharing.py).
    A first Ctrl-C stops at the next safe place and saves; KeyboardInterrupt is raised then. All
    processes that mpirun started together do the run together.
    """
    comm = world()
    interrupt = Interrupt(speaks=comm.first)
    if comm.first:
        check(recipe, stages_up_to(until), out)
        if source is not None and not RunDirectory(source).has_recipe:
            message = f"--from {source}: holds no {RECIPE}: not a run directory"
            raise UserError(message, usage=True)
    with interrupt.listening(), RunDirectory(out, writes=comm.first) as directory:
        if comm.first:
            recipe = directory.begin(recipe)
            if source is not None:
                others = {Path(source): RunDirectory(source).recipe()}
                taken = ", ".join(share(directory, recipe, others)) or "nothing"
                (reporter or Reporter()).note(f"taken from {source}: {taken}")
        else:
            reporter = Reporter(quiet=True, stream=io.StringIO())
        Run(directory, comm.broadcast(recipe), reporter, interrupt).execute(until)
    return Path(out)
