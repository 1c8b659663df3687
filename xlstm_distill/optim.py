"""AdamW over named tensors; which tensors train, which decay and at what rate; schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import ops
from .errors import UserError
from .model import Model
from .parameters import Entry, Parameters

Train = Literal["all", "mixer"]
Schedule = Literal["cosine", "constant", "linear", "wsd"]
Group = Literal["mixer", "embedding", "norm", "map", "gate", "projection", "mlp", "head", "bias"]
"""Tensors that may have a learning rate of their own: those of a role (parameters.Entry), and those
that a student has beside its teacher's ("mixer": maps, gates and their biases)."""

EPSILON = 1e-8
_NO_DECAY = ("norm", "bias")
"""Roles without weight decay: vectors that scale or shift."""
_FALLING = 0.2
"""Share of the steps in which the rate of "wsd" falls."""


def in_mixer(name: str) -> bool:
    """True for the tensors that a student has beside those of its teacher."""
    return ".mixer." in name


def trainable_names(model: Model, which: Train) -> set[str]:
    """Names of the tensors that train: all, or the mixers' new ones ("mixer").

    The input gate's bias is left out under the `ratio` normaliser, where it cancels: its gradient
    is rounding noise that Adam would scale up to full steps.
    """
    if which not in get_args(Train):
        known = ", ".join(get_args(Train))
        raise UserError(f"train_what is {which!r}, expected {known} or, in stage II, a Lora")
    frozen = {
        f"model.layers.{layer}.mixer.i_proj.bias"
        for layer, mixer in enumerate(model.config.mixers)
        if mixer.normalizer == "ratio"
    }
    names = [n for n in model.params.names() if which == "all" or in_mixer(n)]
    if not names:
        raise UserError("nothing to train: the model has no mixer parameters; linearize it first")
    return set(names) - frozen


def decays(entry: Entry) -> bool:
    """True for matrices: weight decay pulls them towards 0."""
    return entry.role not in _NO_DECAY and len(entry.shape) > 1


def rate_factor(entry: Entry, rates: Mapping[Group, float]) -> float:
    """By what a tensor's learning rate is multiplied: the factors of its groups."""
    groups = {entry.role, "mixer"} if in_mixer(entry.name) else {entry.role}
    return math.prod(factor for group, factor in rates.items() if group in groups)


def learning_rate(
    step: int, steps: int, *, peak: float, schedule: Schedule, warmup: float, floor: float = 0.0
) -> float:
    """The rate of step 1..steps: linear warm-up over the share `warmup` of the steps, then `peak`
    (constant), a line to 0 after the last step (linear), half a cosine to `floor` (cosine), or
    `peak` and over the last fifth of the steps a line to 0 (wsd: warm-up, stable, decay)."""
    rising = round(warmup * steps)
    if step <= rising:
        return peak * step / rising
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (steps + 1 - step) / (steps - rising + (rising > 0))
    if schedule == "wsd":
        falling = min(round(_FALLING * steps), steps - rising)
        return peak * min(1.0, (steps + 1 - step) / (falling + 1))
    share = (step - rising) / max(1, steps - rising)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * share))


class AdamW:
    """AdamW with decoupled decay on matrices; moments exist for the trained tensors alone.

    `rates` multiplies the learning rate of groups of tensors (`rate_factor`). `average`: the share
    that a running mean of the trained values keeps in a step (None: no mean is kept); it keeps less
    in the first steps, (1 + t) / (10 + t) after t, so that the start is soon forgotten. `changed`
    is called whenever the values have changed: what is made of them must follow. UserError names a
    group that does not exist and a factor that is not above 0.
    """

    def __init__(
        self,
        params: Parameters,
        names: set[str],
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        rates: Mapping[Group, float] | None = None,
        average: float | None = None,
        changed: Callable[[], None] | None = None,
    ) -> None:
        self.params, self.changed = params, changed
        self.entries = [e for e in params.entries if e.name in names]
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.rates = dict(rates or {})
        for group, factor in self.rates.items():
            if group not in get_args(Group):
                known = ", ".join(get_args(Group))
                raise UserError(f"rates: there is no group {group!r}; there are: {known}")
            if not (factor > 0 and math.isfinite(factor)):
                raise UserError(f"rates: {group} has {factor}, expected more than 0")
        size = sum(e.size for e in self.entries)
        self.m: NDArray[Any] = np.zeros(size, dtype=params.dtype)
        self.v: NDArray[Any] = np.zeros(size, dtype=params.dtype)
        self.average, self.mean = average, None if average is None else self.values()
        self.steps = 0
        self.scales: Mapping[int, float] | None = None
        """What a step multiplies the gradient of each layer with; a layer that is not there keeps
        its values and moments. None: all of them with 1."""

    @property
    def finished(self) -> bool:
        """True if no further step would change a thing."""
        return False

    def _slices(self) -> Iterator[tuple[Entry, slice, slice]]:
        """(entry, its place among the parameters, its place among the moments)"""
        at = 0
        for e in self.entries:
            first = e.offset // self.params.dtype.itemsize
            yield e, slice(first, first + e.size), slice(at, at + e.size)
            at += e.size

    def zero(self, grads: Parameters) -> None:
        """Set the gradients of the trained tensors to 0 (the others are never touched)."""
        for e in self.entries:
            grads.view(e).fill(0)

    def norm(self, grads: Parameters, layer: int | None = None) -> float:
        """The norm of the gradient over the trained tensors, of all or of one layer; added in
        float64."""
        flat = grads.flat
        found = (place for e, place, _ in self._slices() if layer is None or e.group == layer)
        return math.sqrt(sum(ops.sumsq(flat[place]) for place in found))

    def step(self, grads: Parameters, lr: float, scale: float = 1.0) -> None:
        """One step in place; `scale` multiplies the gradient (clipping)."""
        self.steps += 1
        flat, gradient = self.params.flat, grads.flat
        for e, place, own in self._slices():
            of_layer = 1.0 if self.scales is None else self.scales.get(e.group)
            if of_layer is None:
                continue
            ops.adamw_step(
                flat[place],
                gradient[place],
                self.m[own],
                self.v[own],
                lr=lr * rate_factor(e, self.rates),
                beta1=self.beta1,
                beta2=self.beta2,
                eps=EPSILON,
                weight_decay=self.weight_decay if decays(e) else 0.0,
                step=self.steps,
                scale=scale * of_layer,
            )
        self._follow()
        if self.changed is not None:
            self.changed()

    def _follow(self) -> None:
        """Move the mean towards the values."""
        if self.average is None or self.mean is None:
            return
        keep = min(self.average, (1 + self.steps) / (10 + self.steps))
        for _, place, own in self._slices():
            mean = self.mean[own]
            ops.merge_linear([mean, self.params.flat[place]], [keep, 1 - keep], out=mean)

    def values(self) -> NDArray[Any]:
        """The trained values, flat and in the order of the entries (a copy)."""
        flat = self.params.flat
        return np.concatenate([flat[place] for _, place, _ in self._slices()])

    def put(self, values: NDArray[Any]) -> None:
        """Set the trained values."""
        flat = self.params.flat
        for _, place, own in self._slices():
            flat[place] = values[own]
        if self.changed is not None:
            self.changed()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the parameters are the running mean, where one is kept."""
        if self.mean is None:
            yield
            return
        own = self.values()
        self.put(self.mean)
        try:
            yield
        finally:
            self.put(own)

    def state(self) -> dict[str, NDArray[Any]]:
        """Trained values, moments and the mean, where one is kept: flat and in the order of the
        entries (values are a copy)."""
        mean = {} if self.mean is None else {"mean": self.mean}
        return {"values": self.values(), "m": self.m, "v": self.v, **mean}

    def load_state(self, state: dict[str, NDArray[Any]], steps: int) -> None:
        """Set what `state` gave, after `steps` steps."""
        for name in ("values", "m", "v", *(() if self.mean is None else ("mean",))):
            if state[name].shape != self.m.shape or state[name].dtype != self.m.dtype:
                raise UserError(
                    f"saved state: {name} has shape {state[name].shape} of {state[name].dtype}, "
                    f"expected {self.m.shape} of {self.m.dtype}"
                )
        self.put(state["values"])
        self.m[:], self.v[:] = state["m"], state["v"]
        if self.mean is not None:
            self.mean[:] = state["mean"]
        self.steps = steps
