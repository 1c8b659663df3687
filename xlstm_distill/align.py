"""Stage I: every layer's mixer learns to put out what the teacher's attention puts out.

Only the new parameters train. In one pass of the teacher each layer's mixer gets the teacher's own
layer input, so layers do not depend on each other (paper.md 2, equation 12). What is compared are
the outputs of the heads, before o_proj and before the norm that stands behind it in some families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .accumulation import Accumulation, Order, Sums
from .communicator import ALONE, Communicator
from .data import Batch, Batches, Data, as_batches
from .errors import UserError
from .model import Model
from .optim import AdamW, Group, Schedule, learning_rate, trainable_names
from .parameters import Parameters
from .training import Metrics, Saver, train


def align(
    student: Model,
    teacher: Model,
    data: Data,
    *,
    steps: int,
    rows: int = 2,
    micro_rows: int | None = None,
    length: int = 1024,
    lr: float = 2e-2,
    warmup: float = 0.1,
    rates: Mapping[Group, float] | None = None,
    schedule: Schedule = "cosine",
    floor: float = 1e-5,
    beta2: float = 0.99,
    weight_decay: float = 0.1,
    accumulation: Order = "sequence",
    seed: int = 0,
    state: str | Path | None = None,
    save_seconds: float = 60.0,
    comm: Communicator = ALONE,
) -> Iterator[Metrics]:
    """Train the student's mixers in place; yields metrics a step.

    data: token data (packed into rows of `length` tokens, `rows` a step, `micro_rows` of them at
    once, None: all that a rank has) or batches. The learning rate rises over the share `warmup` of
    the steps to `lr` and goes on as `schedule` says (`optim.learning_rate`), a cosine to `floor`;
    `rates` multiplies it for groups of tensors (`optim.Group`).
    accumulation: how the gradients of the parts of a step are added (`accumulation.py`); the ranks
    of `comm` share them. With `state`, the run can be killed and continued from that file.

    Metrics: loss (sum over layers of the squared error of a token, mean over tokens), layers
    (relative error of each layer, sum ||h - h^||^2 / sum ||h||^2), relative_error (their mean),
    lr, gradient_norm, tokens, seconds. The student's shared weights must be the teacher's.
    """
    check_shared_weights(student, teacher)
    batches = as_batches(data, rows, length, seed)
    names = trainable_names(student, "mixer")
    optimiser = AdamW(student.params, names, beta2=beta2, weight_decay=weight_decay, rates=rates)
    settings = {
        "steps": steps,
        "lr": lr,
        "rates": optimiser.rates,
        "warmup": warmup,
        "schedule": schedule,
        "floor": floor,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "micro_rows": micro_rows,
        "accumulation": accumulation,
    }
    accumulate = Accumulation(student.params, names, comm, accumulation)

    def gradient(batch: Batch, grads: Parameters) -> Metrics:
        def one(part: Batch, into: Parameters) -> Sums:
            scale = 1.0 / batch.ids.size
            return np.stack(
                student.align_and_grad(part.ids, part.reset, into, names, scale=scale)[:2]
            )

        at_once = micro_rows or max(1, len(batch.ids) // comm.size)
        error, reference = accumulate(list(batch.parts(at_once)), one, grads)
        layers = error / reference
        return {
            "loss": float(error.sum() / batch.ids.size),
            "relative_error": float(layers.mean()),
            "layers": [float(x) for x in layers],
        }

    def rate(step: int) -> float:
        return learning_rate(step, steps, peak=lr, schedule=schedule, warmup=warmup, floor=floor)

    yield from train(
        optimiser,
        student.params.zeros_like(),
        batches,
        gradient,
        rate,
        steps=steps,
        saver=saver_of("align", state, save_seconds, student, batches, settings, comm),
    )


def saver_of(
    stage: str,
    state: str | Path | None,
    seconds: float,
    student: Model,
    batches: Batches,
    settings: dict[str, Any],
    comm: Communicator,
) -> Saver | None:
    """The saver of a stage; its identity holds all that decides the result."""
    if state is None:
        return None
    identity = {
        "stage": stage,
        "student": student.fingerprint(),
        "compute": student.compute,
        **settings,
        "batches": batches.identity,
    }
    return Saver(Path(state), identity, seconds, comm)


def check_shared_weights(student: Model, teacher: Model) -> None:
    """Refuse a student whose copied weights are no longer the teacher's."""
    for name in teacher.params.names():
        if name not in student.params:
            raise UserError(f"align: the student has no tensor {name} of the teacher")
        if not np.array_equal(student.params[name], teacher.params[name]):
            raise UserError(
                f"align: tensor {name} differs between student and teacher; "
                "stage I needs a student straight from linearize"
            )


def relative_errors(
    student: Model, batches: Sequence[Batch], comm: Communicator = ALONE
) -> list[float]:
    """Stage I's relative error of every layer on given batches, without training."""
    layers = student.config.num_hidden_layers
    error, reference = np.zeros(layers), np.zeros(layers)
    for e, r, _ in comm.map(lambda b: student.align_and_grad(b.ids, b.reset), batches):
        error += e
        reference += r
    return [float(x) for x in error / reference]
