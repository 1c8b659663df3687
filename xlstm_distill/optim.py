"""AdamW over named tensors; which tensors train, which decay and at what rate; schedules."""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import ops
from .communicator import ALONE, Communicator
from .errors import UserError, check_choice
from .model import Model
from .parameters import Entry, Parameters
from .shards import BLOCK, Shards

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
    check_choice("schedule", schedule, get_args(Schedule))
    if not (0 <= warmup <= 1 and 0 <= peak < math.inf):
        raise UserError(f"warmup is {warmup}, expected 0 to 1; lr {peak}, expected 0 or more")
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

    Each rank of `comm` makes the step of its shard (shards.py) and holds moments and running mean
    of that alone; then all have the new values. What `norm`, `step` and `put` are given must be
    right for this rank's shard, and all ranks call them together. The bits are those of one rank.

    `rates` multiplies the learning rate of groups of tensors (`rate_factor`). `average`: the share
    that a running mean of the trained values keeps in a step (None: no mean is kept); it keeps less
    in the first steps, (1 + t) / (10 + t) after t, so that the start is soon forgotten. `changed`
    is called whenever the values have changed: what is made of them must follow. UserError names a
    group that does not exist and a number that is out of its range.
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
        comm: Communicator = ALONE,
    ) -> None:
        self.params, self.changed = params, changed
        self.shards = Shards(params, names, comm)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.rates = dict(rates or {})
        for group, factor in self.rates.items():
            if group not in get_args(Group):
                known = ", ".join(get_args(Group))
                raise UserError(f"rates: there is no group {group!r}; there are: {known}")
            if not (factor > 0 and math.isfinite(factor)):
                raise UserError(f"rates: {group} has {factor}, expected more than 0")
        if not 0 <= beta2 < 1:
            raise UserError(f"beta2 is {beta2}, expected 0 or more, below 1")
        if average is not None and not 0 < average < 1:
            raise UserError(f"average is {average}, expected between 0 and 1")
        size = self.shards.high - self.shards.low
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

    @property
    def entries(self) -> list[Entry]:
        """The trained tensors."""
        return self.shards.entries

    def zero(self, grads: Parameters) -> None:
        """Set the gradients of the trained tensors to 0 (the others are never touched)."""
        grads.zero(self.entries)

    def norm(self, grads: Parameters) -> float:
        """The norm of the gradient over the trained tensors, added in float64."""
        return math.sqrt(sum(self.squares(grads).values()))

    def squares(self, grads: Parameters) -> dict[str, float]:
        """The sum of squares of the gradient of each trained tensor in order, on every rank.

        Tensors that are cut are added block by block, as the core does with whole ones.
        """
        flat, sums = grads.flat, []
        for e, place, own in self.shards.own:
            cut = own.stop - own.start < e.size
            starts = range(place.start, place.stop, BLOCK if cut else e.size)
            stops = [*starts[1:], place.stop]
            blocks = map(slice, starts, stops)
            sums.append((e.name, [ops.sumsq(flat[block]) for block in blocks]))
        parts: defaultdict[str, list[float]] = defaultdict(list)
        for name, found in itertools.chain.from_iterable(self.shards.comm.gather(sums)):
            parts[name] += found
        return {name: reduce(operator.add, found) for name, found in parts.items()}

    def step(self, grads: Parameters, lr: float, scale: float = 1.0) -> None:
        """One step in place; `scale` multiplies the gradient (clipping)."""
        self.steps += 1
        flat, gradient = self.params.flat, grads.flat
        for e, place, own in self.shards.own:
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
        self._share()

    def _share(self) -> None:
        """All ranks take the values of all shards, and what is made of the values follows."""
        self.shards.share(self.params)
        if self.changed is not None:
            self.changed()

    def _follow(self) -> None:
        """Move the mean towards the values."""
        if self.average is None or self.mean is None:
            return
        keep = min(self.average, (1 + self.steps) / (10 + self.steps))
        for e, place, own in self.shards.own:
            if self.scales is not None and e.group not in self.scales:
                continue  # the mean of a layer that has stopped stays as well
            mean = self.mean[own]
            ops.merge_linear([mean, self.params.flat[place]], [keep, 1 - keep], out=mean)

    @property
    def result(self) -> NDArray[Any] | None:
        """What training ends with, as `values`: the mean where one is kept. None: the last ones."""
        return self.mean

    def measured(self) -> dict[str, Any]:
        """Metrics that the last step itself has measured."""
        return {}

    def values(self) -> NDArray[Any]:
        """The trained values of this rank's shard, flat, in the order of the entries (a copy)."""
        return self.shards.read(self.params.flat, self.shards.low, self.shards.high)

    def put(self, values: NDArray[Any]) -> None:
        """Set the trained values; each rank gives those of its shard."""
        self.shards.write(self.params.flat, self.shards.low, values)
        self._share()

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
        """Trained values, moments and the mean, where one is kept: of this rank's shard, flat and
        in the order of the entries (values are a copy)."""
        mean = {} if self.mean is None else {"mean": self.mean}
        return {"values": self.values(), "m": self.m, "v": self.v, **mean}

    def history(self) -> dict[str, NDArray[Any]]:
        """What else decides later steps, the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, NDArray[Any]], steps: int) -> None:
        """Set what `state` and `history` gave, after `steps` steps; one array after the other."""
        self.put(state["values"])
        self.m[:] = state["m"]
        self.v[:] = state["v"]
        if self.mean is not None:
            self.mean[:] = state["mean"]
        self.steps = steps
