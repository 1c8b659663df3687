"""What work costs on this machine: measured rates, and from them the time of a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import runtime
from .config import ModelConfig
from .errors import UserError
from .evaluate.tasks import ReadTokens
from .layerwise import stream_bytes
from .linearize import linearize
from .lora import Lora
from .model import Model
from .optim import AdamW, in_mixer, trainable_names
from .recipe import FidelitySection, Recipe
from .room import (
    CALIBRATION_ROW,
    SAMPLE_BATCH,
    Room,
    sampled_tokens,
    stage_one_tokens,
    target_rows,
    text_bytes,
)
from .sampling import sampler

_SHORT_ROWS = 1.7
"""Requests are short rows of different lengths, read after a shared prefix: their tokens cost so
many times those of full rows (1.4 to 1.6 were measured, docs/speed.md; a student's states and
answers that are written cost a little more)."""
_CALIBRATION_STEPS = 12


@dataclass(frozen=True)
class Rates:
    """What this machine does. Rates are tokens a second; the rest are seconds.

    sample: new tokens of a full batch; align, distill: forward and backward; targets: the teacher's
    top-k; teacher, student: hidden states; head: one model's logits and what is read from them;
    update: one AdamW step on what trains in stage II; save: one model directory; load: one model;
    encode: bytes of text a second that are read and become tokens.
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
    encode: float = 3e6  # of one core: what a quickstart that began with an earlier version has


def _rate(tokens: int, work: Callable[[], Any], repeat: int = 1) -> float:
    """Tokens a second of `work`, after one turn that is not counted."""
    work()
    started = time.perf_counter()
    for _ in range(repeat):
        work()
    return repeat * tokens / (time.perf_counter() - started)


def calibrate(teacher: Model, recipe: Recipe, place: Path, load_seconds: float) -> Rates:
    """Measure short pieces of each kind of work; `place` is a directory on the run's disk."""
    tokenizer = teacher.tokenizer
    assert tokenizer is not None
    text = (Path(os.__file__).parent / "argparse.py").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text, special=False)[:CALIBRATION_ROW])[None]
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
        # Documents are encoded side by side, nearly as fast as by themselves (docs/recipes.md).
        encode=runtime.threads()
        * _rate(len(text), lambda: tokenizer.encode_batch([text], special=False)),
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
        raise UserError(f"{place}: cannot measure its disk: {error.strerror}") from None
    finally:
        with suppress(OSError):
            file.unlink()
    # Copying and hashing come on top of the writing.
    return (time.perf_counter() - started) * size / piece + size / 1e9


# ---- the cost of a recipe -----------------------------------------------------------------------


def estimate(
    recipe: Recipe, config: ModelConfig, rates: Rates, reading: Mapping[str, ReadTokens]
) -> dict[str, Any]:
    """Seconds by stage. reading: of each request set; config: the teacher's."""
    length, trained = recipe.data.length, recipe.trained
    steps = sum(map(recipe.steps_of, trained))
    stage_two = steps * recipe.distill.rows * length
    stored = target_rows(recipe) * length
    read = 1 + recipe.targets.rows_before  # at most: less where documents are short
    online = stage_two if recipe.distill.kl_weight and recipe.targets.online else 0
    moved = rates.save + rates.load
    validates = bool(recipe.distill.validate_every and recipe.distill.kl_weight)
    seconds = {
        "sample": sampled_tokens(recipe) / rates.sample,
        "read": text_bytes(recipe) / rates.encode,
        "align": _stage_one_seconds(recipe, config, rates) + 2 * moved,
        "targets": read * stored / rates.targets,
        "distill": stage_two / rates.distill
        + read * online / rates.targets
        + steps * rates.update
        + len(trained) * moved
        + (len(trained) - 1) * validates * rates.load  # the teacher again
        + sum(_validation_seconds(recipe, rates, name) for name in trained),
        "merge": moved,
        # The teacher again, which stage II did without, and the students that are measured.
        "evaluate": evaluation_seconds(recipe, rates, reading) + (1 + len(trained)) * rates.load,
    }
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
    }


def _stage_one_seconds(recipe: Recipe, config: ModelConfig, rates: Rates) -> float:
    """Seconds of the steps of stage I. In the order layer the teacher's layers are computed once
    more, and each reads the hidden states twice and writes them once."""
    tokens, section = stage_one_tokens(recipe, config), recipe.align
    seconds = tokens / rates.align
    if tokens and section.validate_every:  # at most: nothing goes back through a mixer
        times = -(-section.steps // section.validate_every)
        rows = section.validate_rows * len(recipe.data.domains)
        seconds += times * rows * recipe.data.length / rates.align
    if section.order == "step":
        return seconds
    once = stream_bytes(config.hidden_size, tokens, section.stream)
    disk = rates.save / Room(recipe, config).student_bytes  # seconds a byte
    return seconds + tokens / rates.teacher + 3 * config.num_hidden_layers * once * disk


def _validation_seconds(recipe: Recipe, rates: Rates, name: str) -> float:
    """Seconds that the validations of an expert, or of the generalist, take."""
    section = recipe.distill
    if not section.validate_every:
        return 0.0
    domains = sum(share > 0 for share in recipe.trained[name].values())
    tokens = -(-recipe.steps_of(name) // section.validate_every) * domains
    tokens *= section.validate_rows * recipe.data.length
    return tokens * (1 / rates.student + 1 / rates.head)


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
