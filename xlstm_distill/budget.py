"""What work costs on this machine: measured rates, and from them time, memory and disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .align import alignable_layers
from .config import ModelConfig
from .errors import UserError
from .evaluate.tasks import ReadTokens
from .layerwise import stream_bytes
from .linearize import linearize, student_config
from .lora import Lora, sizes
from .model import Model
from .optim import AdamW, in_mixer, trainable_names
from .recipe import FidelitySection, Recipe, SampledSource
from .sampling import sampler

SAMPLE_BATCH = 64
SAMPLE_FILLED = 0.75
"""Share of `max_new_tokens` that a sampled document has on average: many end by themselves."""
_SHORT_ROWS = 1.7
"""Requests are short rows of different lengths, read after a shared prefix: their tokens cost so
many times those of full rows (1.4 to 1.6 were measured, docs/speed.md; a student's states and
answers that are written cost a little more)."""
_CALIBRATION_ROW = 1024
"""Tokens: the quickstart's windows and packs are as long, and longer rows cost more a token."""
_CALIBRATION_STEPS = 12
_PROCESS_MIB = 600
"""Memory beside models and activations: Python and its libraries, text, the teacher's mapped file,
and what the quickstart's calibration leaves. 380 and 450 were missing in two runs by themselves,
600 in a quickstart."""


@dataclass(frozen=True)
class Rates:
    """What this machine does. Rates are tokens a second; the rest are seconds.

    sample: new tokens of a full batch; align, distill: forward and backward; targets: the teacher's
    top-k; teacher, student: hidden states; head: one model's logits and what is read from them;
    update: one AdamW step on what trains in stage II; save: one model directory; load: one model.
    """

    sample: float
    align: float
    targets: float
    distill: float
    teacher: float
    student: float
    head: float
    update: float
    save: float
    load: float


def _rate(tokens: int, work: Callable[[], Any], repeat: int = 1) -> float:
    """Tokens a second of `work`, after one turn that is not counted."""
    work()
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    return repeat * tokens / (time.perf_counter() - started)


def calibrate(teacher: Model, recipe: Recipe, place: Path, load_seconds: float) -> Rates:
    """Measure short pieces of each kind of work; `place` is a directory on the run's disk."""
    assert teacher.tokenizer is not None
    text = (Path(os.__file__).parent / "argparse.py").read_text(encoding="utf-8")
    ids = np.array(teacher.tokenizer.encode(text, special=False)[:_CALIBRATION_ROW])[None]
    labels = np.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    student = linearize(teacher, **recipe.student.model_dump())
    grads = student.params.zeros_like()
    k, d = min(recipe.targets.k, teacher.config.vocab_size), recipe.distill
    targets = teacher.topk(ids, k)[:2]
    n = ids.size

    def distil() -> None:
        student.loss_and_grad(
            ids,
            labels,
            targets,
            ce_weight=d.ce_weight,
            kl_weight=d.kl_weight,
            kl_form=d.kl_form,
            grads=grads,
            scale=1.0 / n,
        )

    def of_teacher() -> Any:
        if recipe.targets.form == "sampled":
            return teacher.draws(ids, np.sort(np.random.default_rng(0).random((*ids.shape, k))))
        return teacher.topk(ids, k)

    mixer = {name for name in student.params.names() if in_mixer(name)}
    teacher.compute = student.compute = "f32"  # as all is measured
    teacher_rate = _rate(n, lambda: teacher.hidden(ids))
    student_rate = _rate(n, lambda: student.hidden(ids))
    pair = _rate(n, lambda: teacher.divergence([student], ids))
    teacher.compute = student.compute = recipe.compute
    lora = None
    if d.train == "lora":
        lora = Lora(student, **d.lora.model_dump())
        optimiser = AdamW(lora.params, set(lora.params.names()), changed=lora.merge)
    else:
        optimiser = AdamW(student.params, trainable_names(student, d.train))
    own = grads if lora is None else lora.params.zeros_like()

    def update() -> None:
        if lora is not None:
            lora.gradient(grads, own)
        optimiser.norm(own)
        optimiser.step(own, 0.0)

    times: list[float] = []
    sampler(teacher).generate_batch(
        [ids[0, :24].tolist()] * SAMPLE_BATCH,
        _CALIBRATION_STEPS,
        top_p=0.95,
        stop_ids=[],
        on_tokens=lambda _: times.append(time.perf_counter()),
    )
    found = Rates(
        # Later tokens are dearer than these first ones (a longer cache), and a batch thins out.
        sample=0.55 * SAMPLE_BATCH / float(np.median(np.diff(times))),
        align=_rate(n, lambda: student.align_and_grad(ids, grads=grads, trainable=mixer)),
        targets=_rate(n, of_teacher),
        distill=_rate(n, distil),
        teacher=teacher_rate,
        student=student_rate,
        head=2.0 / max(1e-9, 1.0 / pair - 1.0 / teacher_rate - 1.0 / student_rate),
        update=1.0 / _rate(1, update),
        save=_save_seconds(place, 4 * student.params.flat.size),
        load=load_seconds,
    )
    return found


def _save_seconds(place: Path, size: int) -> float:
    """Seconds to write `size` bytes so that they are on the disk, from a smaller piece."""
    piece = min(size, 1 << 26)
    file = place / ".calibration"
    content = np.random.default_rng(0).bytes(piece)
    started = time.perf_counter()
    try:
        with file.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot write: {error.strerror}") from None
    finally:
        file.unlink(missing_ok=True)
    # Copying and hashing come on top of the writing.
    return (time.perf_counter() - started) * size / piece + size / 1e9


# ---- the cost of a recipe -----------------------------------------------------------------------


def estimate(
    recipe: Recipe, config: ModelConfig, rates: Rates, reading: Mapping[str, ReadTokens]
) -> dict[str, Any]:
    """Seconds by stage, most memory and disk in MiB. reading: of each request set."""
    length, trained = recipe.data.length, recipe.trained
    sampled = [s for d in recipe.data.domains.values() for s in d.sources]
    new = sum(
        s.documents * s.max_new_tokens * SAMPLE_FILLED
        for s in sampled
        if isinstance(s, SampledSource)
    )
    steps = sum(map(recipe.steps_of, trained))
    stage_two = steps * recipe.distill.rows * length
    stage_one = _stage_one_tokens(recipe, config)
    stored = _target_rows(recipe) * length
    read = 1 + recipe.targets.rows_before  # at most: less where documents are short
    online = stage_two if recipe.distill.kl_weight and recipe.targets.online else 0
    moved = rates.save + rates.load
    seconds = {
        "sample": new / rates.sample,
        "align": stage_one / rates.align + 2 * moved,
        "targets": read * stored / rates.targets,
        "distill": stage_two / rates.distill
        + read * online / rates.targets
        + steps * rates.update
        + len(trained) * moved
        + sum(_validation_seconds(recipe, rates, name) for name in trained),
        "merge": moved,
        "evaluate": evaluation_seconds(recipe, rates, reading),
    }
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        **estimate_room(recipe, config),
    }


def estimate_room(recipe: Recipe, config: ModelConfig) -> dict[str, int]:
    """`memory_mib` and `disk_mib`, the most memory and disk of a recipe, in MiB."""
    length = recipe.data.length
    weights = 4 * config_size(config) / 2**20
    rows = min(recipe.distill.micro_rows, recipe.distill.rows)
    layers = config.num_hidden_layers
    held = layers + 24 if recipe.distill.recompute else 24 * layers  # reals a token, times width
    activations = 4 * rows * length * held * config.hidden_size / 2**20
    hidden = 0.0
    if recipe.align.order == "layer":
        tokens = _stage_one_tokens(recipe, config)
        hidden = stream_bytes(config.hidden_size, tokens, recipe.align.stream) / 2**20
    # ids with float16 or, of draws, with counts: no more tokens than draws, and mostly far fewer
    k = min(recipe.targets.k, config.vocab_size)
    token = k * ((2 if config.vocab_size <= 1 << 16 else 4) + 2) + 4
    stored = _target_rows(recipe) * length
    models = 3 + 2 * len(recipe.trained)
    return {
        "memory_mib": round(_held_numbers(recipe, config) * 4 / 2**20 + activations) + _PROCESS_MIB,
        "disk_mib": round(models * weights + max(hidden, stored * token / 2**20)),
    }


def _stage_one_tokens(recipe: Recipe, config: ModelConfig) -> int:
    student = student_config(config, recipe.teacher, **recipe.student.model_dump())
    steps = recipe.align.steps if alignable_layers(student) else 0
    return steps * recipe.align.rows * recipe.data.length


def _held_numbers(recipe: Recipe, config: ModelConfig) -> int:
    """Numbers held while stage II runs, but for activations and mixers: teacher and student; of
    what trains gradients, two moments, a copy while the state is written or read, the running mean,
    the best values; a buffer of gradients for every level of a tree."""
    section, size = recipe.distill, config_size(config)
    levels = 0
    if recipe.accumulation == "tree":
        levels = (-(-section.rows // section.micro_rows) - 1).bit_length()
    of_trained = 4 + (section.average is not None) + (section.keep == "best")
    if section.train == "lora":
        matrices, factors = sizes(config, section.lora.rank, section.lora.targets)
        # the matrices as they were, and their gradients; the factors themselves
        return 2 * size + (2 + levels) * matrices + (1 + of_trained) * factors
    return 2 * size + ((of_trained + levels) * size if section.train == "all" else 0)


def _target_rows(recipe: Recipe) -> float:
    """Rows of which targets are stored; experts and the generalist share those of a domain."""
    wanted = dict.fromkeys(recipe.data.domains, 0.0)
    for name, shares in recipe.trained.items():
        rows = recipe.steps_of(name) * recipe.distill.rows / sum(shares.values())
        for domain, share in shares.items():
            wanted[domain] = max(wanted[domain], rows * share)
    stored = recipe.distill.kl_weight > 0 and not recipe.targets.online
    return sum(wanted.values()) if stored else 0.0


def _validation_seconds(recipe: Recipe, rates: Rates, name: str) -> float:
    """Seconds that the validations of an expert, or of the generalist, take."""
    section = recipe.distill
    if not section.validate_every:
        return 0.0
    domains = sum(share > 0 for share in recipe.trained[name].values())
    tokens = -(-recipe.steps_of(name) // section.validate_every) * domains
    tokens *= section.validate_rows * recipe.data.length
    return tokens * (1 / rates.student + 1 / rates.head)


def config_size(config: ModelConfig) -> int:
    """Number of parameters of a model of Llama's shape, without mixers."""
    c = config
    attention = c.head_dim * c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    heads = 1 if c.tie_word_embeddings else 2
    return c.num_hidden_layers * layer + heads * c.vocab_size * c.hidden_size + c.hidden_size


def fidelity_seconds(
    rates: Rates, domains: int, section: FidelitySection, experts: int, students: int = 2
) -> float:
    """Seconds to compare the students (control and merged one) and the experts with the teacher, on
    all domains."""
    one, teacher = 1 / rates.student + 1 / rates.head, 1 / rates.teacher + 1 / rates.head
    each = section.windows * (teacher + students * one) + section.expert_windows * experts * one
    return domains * section.context * each


def task_seconds(rates: Rates, tokens: float, students: int = 2) -> float:
    """Seconds for the teacher and the students to read `tokens` tokens of requests."""
    each = 1 / rates.teacher + students / rates.student + (students + 1) / rates.head
    return _SHORT_ROWS * tokens * each


def evaluation_seconds(recipe: Recipe, rates: Rates, reading: Mapping[str, ReadTokens]) -> float:
    """Seconds of the evaluation of a recipe."""
    domains = sum(1 for d in recipe.data.domains.values() if d.held_out_tokens)
    experts = len(recipe.experts) if len(recipe.experts) > 1 else 0
    students = 3 if recipe.generalist else 2
    variants = 4 if recipe.evaluate.branches else 0
    total = sum(
        fidelity_seconds(rates, domains, s, experts, students + variants)
        for s in recipe.evaluate.fidelity
    )
    for task, limit in recipe.evaluate.tasks.items():
        total += task_seconds(rates, reading[task].of(limit), students)
    return total
