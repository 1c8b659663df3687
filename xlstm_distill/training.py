"""The training loop that both stages share: step, clip, save, and go on after a kill.

A state file holds trained values, moments, step and data cursor; nothing in the loop is random
beyond the batches, which their cursor decides. So a killed run that starts again from the last
state does the same steps and ends with the same bits.
"""

from __future__ import annotations

import json
import math
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import runtime
from .atomic import atomic_file
from .communicator import ALONE, Communicator
from .data import Batch, Batches
from .errors import UserError, check_choice
from .model import Model
from .optim import AdamW
from .parameters import Parameters
from .streams import StreamStates

Metrics = dict[str, Any]

_SAVING_SHARE = 0.02
"""Saving is put off until it costs at most this share of the time."""
_OF_SHARDS = ("values", "m", "v", "mean", "best")
"""Arrays of a state with a number for each that trains; a rank keeps those of its shard."""


class DivergedError(UserError):
    """A step whose gradient is not finite."""


@dataclass
class Saver:
    """Saves the state of a loop in one file, at most every `seconds` and never for long.

    `seconds` 0 saves after every step, whatever it costs.
    `identity` must be the same when the state is read again; a difference is an error that names
    the field. The instruction set is only warned of: results then differ in their last digits.
    Of several ranks the first writes and all read.
    """

    path: Path
    identity: Mapping[str, Any]
    seconds: float = 60.0
    comm: Communicator = ALONE
    _last: float = field(default_factory=time.monotonic)
    _cost: float = 0.0

    def due(self) -> bool:
        """True if enough time has passed since the last save; the first rank decides."""
        waited = time.monotonic() - self._last
        enough = waited >= max(self.seconds, self._cost / _SAVING_SHARE)
        return self.comm.broadcast(self.seconds == 0 or enough)

    def save(
        self,
        optimiser: AdamW,
        cursor: Mapping[str, int],
        best: Best | None = None,
        streams: StreamStates | None = None,
    ) -> None:
        """Write the state (atomic). All ranks come here, and send their shards to the first."""
        started = time.monotonic()
        header = {
            "identity": dict(self.identity),
            "isa": runtime.isa(),
            "step": optimiser.steps,
            "cursor": dict(cursor),
        }
        shards, of_shard = optimiser.shards, optimiser.state()
        if best is not None and best.values is not None:
            header["best"] = {"step": best.step, "loss": best.loss}
            of_shard["best"] = best.values
        if not self.comm.first:
            for own in of_shard.values():
                for _ in shards.gathered(own):
                    pass
            return
        whole = {"header": np.array(json.dumps(header)), **optimiser.history()}
        if streams is not None:
            whole.update(streams.state())
        # What np.savez writes, without an array of all shards in memory.
        with atomic_file(self.path) as handle, zipfile.ZipFile(handle, "w") as archive:
            for name, array in whole.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array)
            for name, own in of_shard.items():
                kind = {"descr": own.dtype.str, "fortran_order": False, "shape": (shards.size,)}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, kind)
                    for piece in shards.gathered(own):
                        member.write(piece.data)
        self._last = time.monotonic()
        self._cost = self._last - started

    def load(
        self,
        optimiser: AdamW,
        batches: Batches,
        best: Best,
        streams: StreamStates | None = None,
    ) -> bool:
        """Take up a saved state if there is one; says whether there was."""
        if found := self.comm.broadcast(self.path.exists()):
            self._load(optimiser, batches, best, streams)
        self.comm.agree(f"{self.path}: the step that the state holds", optimiser.steps)
        return found

    def _load(
        self,
        optimiser: AdamW,
        batches: Batches,
        best: Best,
        streams: StreamStates | None,
    ) -> None:
        shards, dtype = optimiser.shards, optimiser.params.dtype

        def own(name: str, array: NDArray[Any]) -> NDArray[Any]:
            return shards.part(name, array, dtype) if name in _OF_SHARDS else array

        arrays = SavedArrays(self.path, self.identity, own, warn=self.comm.first)
        header = arrays.header
        optimiser.load_state(arrays, int(header["step"]))
        batches.load_state_dict(header["cursor"])
        if "best" in header:
            best.values = arrays["best"]
            best.step, best.loss = int(header["best"]["step"]), float(header["best"]["loss"])
        if streams is not None:
            streams.load_state(arrays)

    def remove(self) -> None:
        """Delete the state, once the result of the stage is safe."""
        self.path.unlink(missing_ok=True)


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


class SavedArrays(Mapping[str, NDArray[Any]]):
    """The arrays of an npz file whose `header` has an `identity`, each read when it is asked for:
    no two of them need be whole in memory. `keep(name, array)` is what is returned of one.

    UserError if the file is damaged, an array that is asked for and not there included, or names
    the field of `identity` that is another one there; another instruction set is only warned of
    (`warn`).
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        keep: Callable[[str, NDArray[Any]], NDArray[Any]] = lambda _, array: array,
        *,
        warn: bool = True,
    ) -> None:
        self.path, self._keep = path, keep
        with self._named():
            self._file = np.load(path, allow_pickle=False)
            self.header: dict[str, Any] = json.loads(str(self._file["header"]))
            _check_identity(path, self.header, identity)
            isa = self.header["isa"]
        self._names = [name for name in self._file.files if name != "header"]
        if isa != runtime.isa() and warn:
            warnings.warn(
                f"the run began with instruction set {isa} and goes on with {runtime.isa()}: "
                "results will differ in their last digits",
                stacklevel=2,
            )

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            text = f"{self.path}: damaged ({error}); delete it to begin the stage again"
            raise UserError(text) from None

    def __getitem__(self, name: str) -> NDArray[Any]:
        with self._named():
            return self._keep(name, self._file[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the array


def _check_identity(path: Path, header: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(identity)))
    for key, value in wanted.items():
        found = header["identity"].get(key)
        if found != value:
            raise UserError(
                f"{path}: saved with {key} {found}, here it is {value}; "
                "delete the file to begin the stage again"
            )


@dataclass
class Validation:
    """A loss on text that is not trained on: `loss` every `every` steps and after the last one, of
    the running mean where one is kept. With `keep_best` the values with the lowest loss are what
    the stage ends with, otherwise the last ones."""

    loss: Callable[[], float]
    every: int
    keep_best: bool = False


def check_validation(
    stage: str, held_out: Batch | None, validate_every: int, keep: Literal["last", "best"]
) -> None:
    """UserError, which the stage's name opens, unless what is kept is also measured."""
    check_choice(f"{stage}: keep", keep, ("last", "best"))
    if validate_every < 0:
        raise UserError(f"{stage}: validate_every is {validate_every}, expected 0 or more")
    if keep == "best" and (held_out is None or not validate_every):
        raise UserError(f'{stage}: keep="best" needs held_out and validate_every')


@dataclass
class Best:
    """The trained values with the lowest validation loss so far."""

    values: NDArray[Any] | None = None
    loss: float = math.inf
    step: int = 0

    def offer(self, optimiser: AdamW, loss: float) -> None:
        """Take the values as they are now, if they are better."""
        if loss < self.loss:
            self.values, self.loss, self.step = optimiser.values(), loss, optimiser.steps


def train(
    optimiser: AdamW,
    grads: Parameters,
    batches: Batches,
    gradient: Callable[[Batch, Parameters], Metrics],
    rate: Callable[[int], float],
    *,
    steps: int,
    clip: float | None = None,
    saver: Saver | None = None,
    validation: Validation | None = None,
    streams: StreamStates | None = None,
) -> Iterator[Metrics]:
    """Steps until `steps` are done; yields the metrics of each, with `validation` those of the
    steps after which it was made. The parameters end as the last values, their running mean or the
    best ones, as the optimiser and `validation` say.

    `gradient` adds the gradient of a batch into `grads` and returns metrics; `rate` gives the
    learning rate of step 1..steps; `streams` are the states that `gradient` goes on from. When the
    generator is closed or interrupted between two steps, the state is saved; of several ranks all
    must close it behind the same step, and where one is interrupted alone nothing is saved.
    DivergedError if the gradient is not finite; the state that was saved last stays as it is.
    """
    if steps < 1:
        raise UserError(f"steps is {steps}, expected at least 1")
    if clip is not None and not clip > 0:
        raise UserError(f"clip is {clip}, expected more than 0")
    best = Best()
    if saver is not None:
        saver.load(optimiser, batches, best, streams)
    cursor = batches.state_dict()
    whole = True  # False while a step changes the parameters and is judged, and at the end
    try:
        while optimiser.steps < steps and not optimiser.finished:
            started = time.perf_counter()
            step = optimiser.steps + 1
            batch = next(batches)
            optimiser.zero(grads)
            metrics = gradient(batch, grads)
            norm = optimiser.norm(grads)
            if not math.isfinite(norm):
                whole = False  # the values led here: the last saved ones may be better
                raise DivergedError(
                    f"step {step}: the gradient is not finite; lower the learning rate"
                )
            scale = min(1.0, clip / norm) if clip is not None and norm > 0 else 1.0
            whole = False
            optimiser.step(grads, rate(step), scale)
            metrics.update(optimiser.measured())
            if validation is not None and (step % validation.every == 0 or step == steps):
                with optimiser.averaged():
                    metrics["validation"] = validation.loss()
                    if validation.keep_best:
                        best.offer(optimiser, metrics["validation"])
            if streams is not None:
                streams.commit()
            cursor, whole = batches.state_dict(), True
            seconds = time.perf_counter() - started
            tokens = batch.ids.size
            yield {
                "step": step,
                "steps": steps,
                **metrics,
                "lr": rate(step),
                "gradient_norm": norm,
                "tokens": tokens,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
            # Only now that the caller has logged the step: a kill in between would leave a gap.
            if saver is not None and step < steps and saver.due():
                saver.save(optimiser, cursor, best, streams)
        whole = False
        if best.values is not None:
            optimiser.put(best.values)
        elif (result := optimiser.result) is not None:
            optimiser.put(result)
    except BaseException as error:
        # Elsewhere than at a yield the other ranks need not be where this one is.
        closed = isinstance(error, GeneratorExit)
        if saver is not None and whole and optimiser.steps > 0 and (closed or saver.comm.size == 1):
            saver.save(optimiser, cursor, best, streams)
        raise
