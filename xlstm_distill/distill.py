"""Stage II: the whole student learns from next tokens and from the teacher's top-k targets.

loss_t = ce_weight * CE + kl_weight * KL(teacher's k targets || student's) (paper.md 3, equation 13)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from .accumulation import Accumulation, Order, Sums
from .communicator import ALONE, Communicator
from .data import Batch, Batches, Data, as_batches
from .errors import UserError, check_choice
from .lora import Lora
from .model import KlForm, Model
from .optim import AdamW, Group, Schedule, Train, learning_rate, trainable_names
from .parameters import Parameters
from .state import DecodeState
from .streams import StreamStates
from .targets import Form, OnlineTargets, TargetCache, Targets
from .training import Metrics, Validation, check_validation, saver_of, train

OfRows = TargetCache | OnlineTargets
TargetSource = OfRows | Mapping[str, OfRows] | Model | None


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
    rows_before: int = 0,
    lr: float = 1e-4,
    rates: Mapping[Group, float] | None = None,
    warmup: float = 0.1,
    schedule: Schedule = "linear",
    clip: float | None = 1.0,
    beta2: float = 0.95,
    weight_decay: float = 0.1,
    train_what: Train | Lora = "all",
    average: float | None = None,
    window_dropout: float = 0.0,
    state_passing: bool = False,
    recompute: bool = False,
    held_out: Batch | None = None,
    held_out_targets: Targets | None = None,
    validate_every: int = 0,
    keep: Literal["last", "best"] = "last",
    accumulation: Order = "sequence",
    seed: int = 0,
    state: str | Path | None = None,
    save_seconds: float = 120.0,
    comm: Communicator = ALONE,
) -> Iterator[Metrics]:
    """Train the student in place; yields metrics a step.

    targets: a cache made of the same rows (one, or one per domain of `data`), the teacher itself
    (its `k` targets of a position are then computed on the way, with what stands in `rows_before`
    rows before, the same bits as from a cache), or None for cross-entropy alone. With kl_form
    "sampled" they are draws, else the most probable tokens. A step takes `rows` rows of `length`
    tokens, `micro_rows` at a time. The learning rate rises over the share `warmup` of the steps to
    `lr` and goes on as `schedule` says (`optim.learning_rate`).
    rates: factors of it for groups of tensors (`optim.Group`), {"mixer": 60} say: few steps move
    the mixers too little at a rate that the teacher's weights bear. average: the student ends as
    the running mean of its values, which keeps this share in a step (None: as the last ones).
    window_dropout: the share of the steps, evenly spread, in which every output gate is 1, so that
    the mLSTM alone has to answer. state_passing: a row goes on from the state behind the row before
    it in its stream (`data.Rows`), through which no gradient flows; the teacher reads as much with
    `rows_before`, and held_out rows begin without a state. held_out: rows whose loss is measured
    every `validate_every` steps, with held_out_targets, the teacher's of these rows, where
    kl_weight is not 0; with keep="best" the student ends as it was at the lowest.
    train_what: "all", "mixer" (everything copied from the teacher stays frozen), or an adapter of
    the student, whose factors then train beside the mixers; a running mean is one of the factors.
    recompute: less memory for about a quarter more time, the same bits (Model.loss_and_grad).
    accumulation: how the gradients of the parts of a step are added (`accumulation.py`); the ranks
    of `comm` share them. With `state`, the run can be killed and continued from that file.

    Metrics: loss, ce, kl (nats, mean over counted tokens), lr, gradient_norm, tokens, seconds, and
    validation (a loss) where it was measured.
    """
    if not 0 <= window_dropout < 1:
        raise UserError(f"distill: window_dropout is {window_dropout}, expected 0 or more, below 1")
    if targets is None and kl_weight != 0:
        raise UserError("distill: kl_weight is not 0 but there are no targets; give targets=")
    if not (ce_weight >= 0 and kl_weight >= 0 and ce_weight + kl_weight > 0):
        raise UserError(
            f"distill: ce_weight {ce_weight} and kl_weight {kl_weight}: expected 0 or more, "
            "not both 0"
        )
    check_choice("distill: kl_form", kl_form, get_args(KlForm))
    check_validation("distill", held_out, validate_every, keep)
    if micro_rows < 1:
        raise UserError(f"distill: micro_rows is {micro_rows}, expected at least 1")
    if held_out is not None and validate_every and kl_weight != 0 and held_out_targets is None:
        raise UserError("distill: kl_weight is not 0; give held_out_targets beside held_out")
    if state_passing and comm.size > 1:
        raise UserError("distill: state_passing is for one process; start without MPI")
    lora = train_what if isinstance(train_what, Lora) else None
    if lora is not None and lora.model is not student:
        raise UserError("distill: the adapter belongs to another model than the student")
    batches = as_batches(data, rows, length, seed, streams=rows if state_passing else 0)
    streams = StreamStates(student, batches) if state_passing else None
    of_domains = _of_domains(targets, batches, k, kl_form, rows_before)
    if isinstance(train_what, Lora):
        names, params = train_what.wanted, train_what.params
    else:
        names, params = trainable_names(student, train_what), student.params
    optimiser = AdamW(
        params,
        names if lora is None else set(params.names()),
        beta2=beta2,
        weight_decay=weight_decay,
        rates=rates,
        average=average,
        changed=None if lora is None else lora.merge,
        comm=comm,
    )
    of_student = None if lora is None else student.params.zeros_like()
    settings = {
        "steps": steps,
        "ce_weight": ce_weight,
        "kl_weight": kl_weight,
        "kl_form": kl_form,
        "k": next((source.k for source in (of_domains or {}).values()), None),
        "lr": lr,
        "rates": optimiser.rates,
        "warmup": warmup,
        "schedule": schedule,
        "clip": clip,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "train": train_what if lora is None else lora.settings,
        "micro_rows": micro_rows,
        "average": average,
        "window_dropout": window_dropout,
        "state_passing": state_passing,
        "validate_every": validate_every,
        "keep": keep,
        "accumulation": accumulation,
    }

    accumulate = Accumulation(student.params, names, comm, accumulation)

    def sums_of(
        part: Batch,
        wanted: Targets | None,
        into: Parameters | None,
        scale: float = 1.0,
        gate: float | None = None,
        around: tuple[DecodeState, DecodeState] | None = None,
    ) -> Sums:
        """Sums of a part's losses; adds `scale` times their gradient into `into`."""
        state, state_behind = around or (None, None)
        found = student.loss_and_grad(
            part.ids,
            part.labels,
            wanted,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            kl_form=kl_form,
            reset=part.reset,
            grads=into,
            trainable=names,
            scale=scale,
            recompute=recompute,
            gate=gate,
            state=state,
            state_behind=state_behind,
        )
        return np.array([found["ce"], found["kl"]])

    def means(sums: Sums, batch: Batch) -> Metrics:
        ce, kl = sums / max(1, batch.counted)
        return {"loss": float(ce_weight * ce + kl_weight * kl), "ce": float(ce), "kl": float(kl)}

    def gradient(batch: Batch, grads: Parameters) -> Metrics:
        scale = 1.0 / max(1, batch.counted)
        gate = 1.0 if _falls_on(optimiser.steps + 1, window_dropout) else None

        def one(part: Batch, into: Parameters) -> Sums:
            around = None if streams is None else streams.around(part)
            return sums_of(part, _targets_of(part, of_domains), into, scale, gate, around)

        into = grads if of_student is None else of_student
        sums = accumulate(list(batch.parts(micro_rows)), one, into)
        if lora is not None:
            accumulate.shards.share(into)  # a factor's gradient needs that of the whole matrix
            lora.gradient(into, grads)
        return means(sums, batch)

    def validation_loss(batch: Batch) -> float:
        wanted = _parts_of(held_out_targets, batch, micro_rows)
        parts = list(zip(batch.parts(micro_rows), wanted, strict=True))
        sums = accumulate.sums(parts, lambda part: sums_of(*part, None))
        return float(means(sums, batch)["loss"])

    validation = None
    if held_out is not None and validate_every:
        loss = partial(validation_loss, held_out)
        validation = Validation(loss, validate_every, keep == "best")

    def rate(step: int) -> float:
        return learning_rate(step, steps, peak=lr, schedule=schedule, warmup=warmup)

    yield from train(
        optimiser,
        optimiser.params.zeros_like(),
        batches,
        gradient,
        rate,
        steps=steps,
        clip=clip,
        saver=saver_of("distill", state, save_seconds, student, batches, settings, comm),
        validation=validation,
        streams=streams,
    )


def _falls_on(step: int, share: float) -> bool:
    """True for the share of the steps 1, 2 ... , evenly spread."""
    return math.floor(step * share) > math.floor((step - 1) * share)


def _parts_of(targets: Targets | None, batch: Batch, rows: int) -> Iterator[Targets | None]:
    """Targets of a whole batch, cut as `batch.parts(rows)` cuts it."""
    for start in range(0, len(batch.ids), rows):
        s = slice(start, start + rows)
        yield None if targets is None else (targets[0][s], targets[1][s])


def _of_domains(
    targets: TargetSource, batches: Batches, k: int, kl_form: KlForm, rows_before: int
) -> Mapping[str, OfRows] | None:
    """The targets of each domain, of the form that `kl_form` needs; None without targets."""
    if targets is None:
        return None
    form: Form = "sampled" if kl_form == "sampled" else "topk"
    if isinstance(targets, Model):
        rows = batches.sources.items()
        return {name: OnlineTargets(targets, own, k, form, rows_before) for name, own in rows}
    if not isinstance(targets, Mapping):
        targets = dict.fromkeys(batches.sources, targets)
    for source in targets.values():
        if source.form != form:
            raise UserError(
                f"distill: kl_form {kl_form} needs targets of the form {form}, these are "
                f"{source.form}"
            )
    return targets


def _targets_of(batch: Batch, targets: Mapping[str, OfRows] | None) -> Targets | None:
    if targets is None:
        return None
    for domain, _ in batch.rows:
        if domain not in targets:
            raise UserError(f"distill: there are no targets of domain {domain!r}")
    parts = [targets[domain].get([row]) for domain, row in batch.rows]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
