"""Stage I: every layer's mixer learns to put out what the teacher's attention puts out.

Only the new parameters train. In one pass of the teacher each layer's mixer gets the teacher's own
layer input, so layers do not depend on each other (paper.md 2, equation 12): each clips, is judged
and may stop by itself. What is compared are the outputs of the heads, before o_proj and before the
norm that stands behind it in some families. `align` takes all layers through a step after another;
`align_layers` (layerwise.py) takes a layer after another through all steps and ends with the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .accumulation import Accumulation, Order, Sums
from .communicator import ALONE, Communicator
from .config import ModelConfig
from .data import Batch, Data, as_batches
from .errors import UserError
from .families import STATEFUL_MIXERS
from .model import Model
from .optim import AdamW, Group, Schedule, learning_rate, trainable_names
from .parameters import Parameters
from .training import Metrics, check_validation, saver_of, train


@dataclass(frozen=True)
class MixerTraining:
    """How the mixer of a layer trains, in either order.

    The learning rate rises over the share `warmup` of the steps to `lr` and goes on as `schedule`
    says (`optim.learning_rate`), a cosine to `floor`; `rates` multiplies it for groups of tensors
    (`optim.Group`). `micro_rows` rows of a batch are taken at once (None: all). `clip`: the largest
    norm of a layer's gradient (None: any). `patience`: after every so many steps a layer stops for
    good unless the mean of its relative error over them is lower than over as many before.
    `average`: a mixer ends as the running mean of its values, which keeps this share in a step
    (None: as the last ones). `validate_every`: after so many steps, and a layer's last one, its
    relative error on rows that are not trained on is measured (0: never); with `keep` "best" a
    mixer ends as it was at its lowest.
    `accumulation`: how the gradients of the parts of a step are added (`accumulation.py`).
    """

    steps: int
    micro_rows: int | None = None
    lr: float = 2e-2
    warmup: float = 0.1
    rates: Mapping[Group, float] = field(default_factory=dict)
    schedule: Schedule = "cosine"
    floor: float = 1e-5
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float | None = None
    patience: int | None = None
    average: float | None = None
    validate_every: int = 0
    keep: Literal["last", "best"] = "last"
    accumulation: Order = "sequence"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result; keys that are not used are left out."""
        found = asdict(self)
        if self.average is None:
            del found["average"]
        if not self.validate_every:
            del found["validate_every"], found["keep"]
        return found

    def rate(self, step: int) -> float:
        """The learning rate of step 1..steps."""
        return learning_rate(
            step,
            self.steps,
            peak=self.lr,
            schedule=self.schedule,
            warmup=self.warmup,
            floor=self.floor,
        )


def align(
    student: Model,
    teacher: Model,
    data: Data,
    *,
    steps: int,
    rows: int = 2,
    micro_rows: int | None = None,
    length: int = 1024,
    lr: float = MixerTraining.lr,
    warmup: float = MixerTraining.warmup,
    rates: Mapping[Group, float] | None = None,
    schedule: Schedule = MixerTraining.schedule,
    floor: float = MixerTraining.floor,
    beta2: float = MixerTraining.beta2,
    weight_decay: float = MixerTraining.weight_decay,
    clip: float | None = None,
    patience: int | None = None,
    average: float | None = None,
    held_out: Batch | None = None,
    validate_every: int = 0,
    keep: Literal["last", "best"] = "last",
    layers: Collection[int] | None = None,
    accumulation: Order = MixerTraining.accumulation,
    seed: int = 0,
    state: str | Path | None = None,
    save_seconds: float = 60.0,
    comm: Communicator = ALONE,
) -> Iterator[Metrics]:
    """Train the student's mixers in place; yields metrics a step.

    data: token data (packed into rows of `length` tokens, `rows` a step, `micro_rows` of them at
    once, None: all that a rank has) or batches. `MixerTraining` explains the numbers; the ranks of
    `comm` share the parts of a step. `layers`: train these alone (None: all that have something to
    train); the others cost nothing. `held_out`: the rows for `validate_every`.
    With `state`, the run can be killed and continued from that file.

    Metrics: loss (sum over layers of the squared error of a token, mean over tokens), layers
    (relative error of each layer, sum ||h - h^||^2 / sum ||h||^2; None: does not train),
    relative_error (their mean), training (number of layers that have not stopped; those that have
    count with their last errors), lr, gradient_norm, tokens, seconds, and validation (mean relative
    error on `held_out` of the layers that were measured) where it was. The student's shared weights
    must be the teacher's.
    """
    check_shared_weights(student, teacher)
    check_validation("align", held_out, validate_every, keep)
    batches = as_batches(data, rows, length, seed)
    training = MixerTraining(
        steps=steps,
        micro_rows=micro_rows,
        lr=lr,
        warmup=warmup,
        rates=dict(rates or {}),
        schedule=schedule,
        floor=floor,
        beta2=beta2,
        weight_decay=weight_decay,
        clip=clip,
        patience=patience,
        average=average,
        validate_every=validate_every,
        keep=keep,
        accumulation=accumulation,
    )
    optimiser = MixerAdamW(student, trained_layers(student.config, layers), training, comm)
    settings = {**training.identity, "layers": optimiser.layers}

    accumulate = Accumulation(student.params, optimiser.names, comm, accumulation)
    if held_out is not None and validate_every:
        parts = list(held_out.parts(micro_rows or len(held_out.ids)))
        settings["held_out"] = [list(row) for row in held_out.rows]

        def errors(wanted: Sequence[int]) -> NDArray[np.float64]:
            sums = accumulate.sums(
                parts, lambda p: np.stack(student.align_and_grad(p.ids, p.reset, layers=wanted)[:2])
            )
            return np.array([sums[0, layer] / sums[1, layer] for layer in wanted])

        optimiser.held_out_errors = errors

    def gradient(batch: Batch, grads: Parameters) -> Metrics:
        active = optimiser.active

        def one(part: Batch, into: Parameters) -> Sums:
            scale = 1.0 / batch.ids.size
            names = optimiser.names
            return np.stack(
                student.align_and_grad(part.ids, part.reset, into, names, scale, active)[:2]
            )

        at_once = micro_rows or max(1, len(batch.ids) // comm.size)
        sums = accumulate(list(batch.parts(at_once)), one, grads)
        return optimiser.record(sums, batch.ids.size)

    yield from train(
        optimiser,
        student.params.zeros_like(),
        batches,
        gradient,
        training.rate,
        steps=steps,
        saver=saver_of("align", state, save_seconds, student, batches, settings, comm),
    )


def alignable_layers(config: ModelConfig) -> list[int]:
    """The layers whose mixers have tensors of their own, which stage I can train."""
    return [i for i, mixer in enumerate(config.mixers) if mixer.mixer in STATEFUL_MIXERS]


def trained_layers(config: ModelConfig, layers: Collection[int] | None = None) -> list[int]:
    """The layers that stage I trains: all whose mixers have parameters, or some of them.

    UserError for a layer that does not exist or has nothing to train.
    """
    able = alignable_layers(config)
    if layers is None:
        if not able:
            raise UserError(
                "nothing to train: the model has no mixer parameters; linearize it first"
            )
        return able
    if not layers:
        raise UserError("align.layers: names no layer; null means all")
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise UserError(
                f"align.layers: layer {layer} is outside 0..{config.num_hidden_layers - 1}"
            )
        if layer not in able:
            mixer = config.mixers[layer].mixer
            raise UserError(f"align.layers: layer {layer} has nothing to train: it is {mixer}")
    return sorted(set(layers))


class MixerAdamW(AdamW):
    """AdamW over the mixers of some layers, each of which clips and stops by itself.

    losses, errors: float64 [layers, steps]: a layer's squared error of a token and its relative
    error in each step; NaN where it did not train. They decide when it stops, so that they are part
    of the state. `held_out_errors`: a function that gives the relative error of some layers on rows
    that are not trained on, with the values as they are; `validations`, like errors, has what came
    of it, and `best` the values of each layer at its lowest.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[int],
        training: MixerTraining,
        comm: Communicator = ALONE,
    ) -> None:
        all_names = trainable_names(model, "mixer")
        entries = (e for e in model.params.entries if e.group in set(layers))
        self.names = {e.name for e in entries if e.name in all_names}
        super().__init__(
            model.params,
            self.names,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            rates=training.rates,
            average=training.average,
            comm=comm,
        )
        sizes = {"clip": training.clip, "patience": training.patience}
        for key, value in {**sizes, "micro_rows": training.micro_rows}.items():
            if value is not None and not value > 0:
                raise UserError(f"{key} is {value}, expected more than 0")
        self.layers, self.training = list(layers), training
        self._model_layers = model.config.num_hidden_layers
        self.losses = np.full((len(self.layers), max(0, training.steps)), np.nan)
        self.errors = self.losses.copy()
        self.validations = self.losses.copy()
        self.held_out_errors: Callable[[Sequence[int]], NDArray[np.float64]] | None = None
        self.best = self.values() if training.keep == "best" else None

    @property
    def active(self) -> list[int]:
        """The layers that train in the next step."""
        past = self.errors[:, : self.steps]
        return [
            layer
            for layer, own in zip(self.layers, past, strict=True)
            if not has_stopped(own, self.training.patience)
        ]

    @property
    def finished(self) -> bool:
        """True if all layers have stopped."""
        return not self.active

    def record(self, sums: Sums, tokens: int) -> Metrics:
        """Keep the errors of the step that begins; its metrics. sums [2, layers of the model]:
        squared errors, and squares of what they are relative to."""
        active, (error, reference) = self.active, sums
        for n, layer in enumerate(self.layers):
            if layer in active:
                self.losses[n, self.steps] = error[layer] / tokens
                self.errors[n, self.steps] = error[layer] / reference[layer]
        latest = [_latest(own) for own in self.errors]
        by_layer = dict(zip(self.layers, latest, strict=True))
        return {
            "loss": sum(_latest(own) for own in self.losses),
            "relative_error": float(np.mean(latest)),
            "layers": [by_layer.get(layer) for layer in range(self._model_layers)],
            "training": len(active),
        }

    def step(self, grads: Parameters, lr: float, scale: float = 1.0) -> None:
        """One step of the layers that have not stopped, each clipped by its own norm."""
        self.scales = dict.fromkeys(self.active, 1.0)
        if self.training.clip is not None:
            squares = self.squares(grads)
            for layer in self.scales:
                own = sum(squares[e.name] for e in self.entries if e.group == layer)
                if (norm := math.sqrt(own)) > self.training.clip:
                    self.scales[layer] = self.training.clip / norm
        trained = list(self.scales)
        super().step(grads, lr, scale)
        self._validate(trained)

    def _validate(self, trained: Sequence[int]) -> None:
        """Measure the layers whose turn it is: by the number of steps, or because they end."""
        every, steps = self.training.validate_every, self.training.steps
        if not every or self.held_out_errors is None:
            return
        if self.steps % every == 0 or self.steps == steps:
            due = list(trained)
        else:
            due = [layer for layer in trained if layer not in self.active]
        if not due:
            return
        before = np.where(np.isnan(self.validations), np.inf, self.validations).min(axis=1)
        with self.averaged():
            found = dict(zip(due, self.held_out_errors(due), strict=True))
            better = set()
            for n, layer in enumerate(self.layers):
                if layer in found:
                    self.validations[n, self.steps - 1] = found[layer]
                    if found[layer] < before[n]:
                        better.add(layer)
            if self.best is not None:
                for e, place, own in self.shards.own:
                    if e.group in better:
                        self.best[own] = self.params.flat[place]

    @property
    def result(self) -> NDArray[Any] | None:
        """Each layer's values at its lowest validation, where these are kept."""
        return self.mean if self.best is None else self.best

    def measured(self) -> dict[str, Any]:
        """The mean of the layers' errors that were measured after the last step."""
        last = self.validations[:, self.steps - 1]
        found = last[~np.isnan(last)]
        return {"validation": float(found.mean())} if len(found) else {}

    def state(self) -> dict[str, NDArray[Any]]:
        """As of AdamW, with the best values where they are kept."""
        best = {} if self.best is None else {"best": self.best}
        return {**super().state(), **best}

    def history(self) -> dict[str, NDArray[Any]]:
        """The errors."""
        found = {"losses": self.losses, "errors": self.errors}
        return {**found, "validations": self.validations} if self.training.validate_every else found

    def load_state(self, state: Mapping[str, NDArray[Any]], steps: int) -> None:
        """Set what `state` and `history` gave, after `steps` steps."""
        if self.best is not None:
            self.best[:] = state["best"]
        for name, own in self.history().items():
            if name not in state or (saved := state[name]).shape != own.shape:
                raise UserError(f"saved state: {name} of {own.shape} are missing")
            own[:] = saved
        super().load_state(state, steps)


def _latest(values: NDArray[np.float64]) -> float:
    """The last number of a layer's history."""
    return float(values[np.flatnonzero(~np.isnan(values))[-1]])


def has_stopped(errors: NDArray[np.float64], patience: int | None) -> bool:
    """True if a layer with these relative errors, NaN once it has stopped, trains no more."""
    if patience is None:
        return False
    own = errors[~np.isnan(errors)]
    blocks = len(own) // patience
    if blocks < 2:
        return False
    means = own[: blocks * patience].reshape(blocks, patience).mean(axis=1)
    return not means[-1] < means[-2]


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
    student: Model,
    batches: Sequence[Batch],
    layers: Collection[int] | None = None,
    comm: Communicator = ALONE,
) -> list[float]:
    """Stage I's relative error of every layer, or of `layers`, on batches, without training."""
    wanted = range(student.config.num_hidden_layers) if layers is None else sorted(layers)
    sums = np.zeros((2, student.config.num_hidden_layers))
    found = comm.map(lambda b: student.align_and_grad(b.ids, b.reset, layers=wanted)[:2], batches)
    for pair in found:
        sums += pair
    return [float(sums[0, layer] / sums[1, layer]) for layer in wanted]
