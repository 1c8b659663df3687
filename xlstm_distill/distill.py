"""Stage II: the whole student learns from next tokens and from the teacher's top-k targets.

loss_t = ce_weight * CE + kl_weight * KL(teacher's k targets || student's) (paper.md 3, equation 13)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from .align import saver_of
from .data import Batch, Data, as_batches
from .errors import UserError
from .model import KlForm, Model
from .optim import AdamW, Schedule, Train, learning_rate, trainable_names
from .parameters import Parameters
from .targets import TargetCache, Targets
from .training import Metrics, train

TargetSource = TargetCache | Mapping[str, TargetCache] | Model | None


def distill(
    student: Model,
    data: Data,
    targets: TargetSource = None,
    *,
    steps: int,
    rows: int = 4,
    micro_rows: int = 1,
    length: int = 1024,
    ce_weight: float = 0.1,
    kl_weight: float = 0.9,
    kl_form: KlForm = "renormalised",
    k: int = 256,
    lr: float = 1e-4,
    mixer_lr: float | None = None,
    warmup: float = 0.1,
    schedule: Schedule = "linear",
    clip: float = 1.0,
    beta2: float = 0.95,
    weight_decay: float = 0.1,
    train_what: Train = "all",
    recompute: bool = False,
    seed: int = 0,
    state: str | Path | None = None,
    save_seconds: float = 120.0,
) -> Iterator[Metrics]:
    """Train the student in place; yields metrics a step.

    targets: a cache made of the same rows (one, or one per domain of `data`), the teacher itself
    (its `k` best tokens are then computed on the way), or None for cross-entropy alone. A step
    takes `rows` rows of `length` tokens, `micro_rows` at a time. The learning rate rises over the
    share `warmup` of the steps to `lr`, then stays ("constant") or falls to 0 ("linear"). mixer_lr:
    that of the mixers' own tensors, with the same schedule (None: lr). Few steps move the mixers
    too little at a rate that the teacher's weights bear.
    train_what: "all" or "mixer" (everything copied from the teacher stays frozen). recompute: less
    memory for about a quarter more time, the same bits (Model.loss_and_grad). With `state`, the run
    can be killed and continued from that file.

    Metrics: loss, ce, kl (nats, mean over counted tokens), lr, gradient_norm, tokens, seconds.
    """
    if targets is None and kl_weight != 0:
        raise UserError("distill: kl_weight is not 0 but there are no targets; give targets=")
    if not (ce_weight >= 0 and kl_weight >= 0 and ce_weight + kl_weight > 0):
        raise UserError(
            f"distill: ce_weight {ce_weight} and kl_weight {kl_weight}: expected 0 or more, "
            "not both 0"
        )
    batches = as_batches(data, rows, length, seed)
    names = trainable_names(student, train_what)
    mixer_rate = 1.0 if mixer_lr is None else mixer_lr / lr
    optimiser = AdamW(
        student.params, names, beta2=beta2, weight_decay=weight_decay, mixer_rate=mixer_rate
    )
    settings = {
        "steps": steps,
        "ce_weight": ce_weight,
        "kl_weight": kl_weight,
        "kl_form": kl_form,
        "k": _k_of(targets, k),
        "lr": lr,
        "mixer_lr": mixer_lr,
        "warmup": warmup,
        "schedule": schedule,
        "clip": clip,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "train": train_what,
        "micro_rows": micro_rows,
    }

    def gradient(batch: Batch, grads: Parameters) -> Metrics:
        count = batch.counted
        sums = np.zeros(2)
        for part in batch.parts(micro_rows):
            found = student.loss_and_grad(
                part.ids,
                part.labels,
                _targets_of(part, targets, k),
                ce_weight=ce_weight,
                kl_weight=kl_weight,
                kl_form=kl_form,
                reset=part.reset,
                grads=grads,
                trainable=names,
                scale=1.0 / max(1, count),
                recompute=recompute,
            )
            sums += found["ce"], found["kl"]
        ce, kl = sums / max(1, count)
        return {"loss": ce_weight * ce + kl_weight * kl, "ce": float(ce), "kl": float(kl)}

    def rate(step: int) -> float:
        return learning_rate(step, steps, peak=lr, schedule=schedule, warmup=warmup)

    yield from train(
        optimiser,
        student.params.zeros_like(),
        batches,
        gradient,
        rate,
        steps=steps,
        clip=clip,
        saver=saver_of("distill", state, save_seconds, student, batches, settings),
    )


def _k_of(targets: TargetSource, k: int) -> int | None:
    if isinstance(targets, TargetCache):
        return targets.k
    if isinstance(targets, Mapping):
        return next(iter(targets.values())).k
    return None if targets is None else k


def _targets_of(batch: Batch, targets: TargetSource, k: int) -> Targets | None:
    if targets is None:
        return None
    if isinstance(targets, Model):
        ids, logp, _ = targets.topk(batch.ids, k, reset=batch.reset)
        return ids, np.asarray(logp, dtype=np.float32)
    parts = []
    for domain, row in batch.rows:
        if isinstance(targets, Mapping) and domain not in targets:
            raise UserError(f"distill: there are no targets of domain {domain!r}")
        cache = targets if isinstance(targets, TargetCache) else targets[domain]
        parts.append(cache.get([row]))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
