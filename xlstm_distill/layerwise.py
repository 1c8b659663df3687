"""Stage I out of core: a layer after another through all steps, in little more than its memory.

A mixer needs the teacher's layer input alone, which no mixer changes. So the hidden states of the
rows of all steps are kept in files (`HiddenStream`): a layer is read once, its mixer trains on
them, and then they are exchanged for what the teacher's layer puts out, the inputs of the next one.
With float32 states the mixers are bitwise those of `align`.

    place/mixer-LLL.npz      a mixer that is done
    place/LLL.state.npz      the one that trains
    place/stream/            the hidden states (docs/run_files.md)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import runtime
from .accumulation import Accumulation, Sums
from .align import MixerAdamW, MixerTraining, trained_layers
from .atomic import atomic_file, write_text
from .checkpoints import Checkpoint, TensorSource
from .config import ModelConfig
from .data import Batch, Batches
from .errors import UserError
from .model import Compute, Model
from .parameters import Parameters
from .training import Metrics, SavedArrays, Saver, check_validation, train

Kind = Literal["float32", "bfloat16"]
_BYTES: dict[Kind, int] = {"float32": 4, "bfloat16": 2}
_IDENTITY = "identity.json"
_FILE = re.compile(r"(\d{3})-(\d{6})\.npy")
_EMBEDDING = "model.embed_tokens.weight"


# ---- the hidden states --------------------------------------------------------------------------


class HiddenStream:
    """The teacher's hidden states of numbered batches, each in a file LLL-NNNNNN.npy: what enters
    layer LLL of batch NNNNNN, [rows, length, width], float32 or the upper halves of rounded float32
    (bfloat16) as uint16. A batch is in one layer at a time; a kill leaves it there or in the next.
    """

    def __init__(self, place: Path, kind: Kind, identity: Mapping[str, Any]) -> None:
        self.place, self.kind = place, kind
        self._layers: dict[int, int] = {}
        for file in sorted(place.glob("*.npy")):
            if match := _FILE.fullmatch(file.name):
                layer, number = map(int, match.groups())
                if number in self._layers:  # killed before the old file was removed
                    self._file(self._layers[number], number).unlink()
                self._layers[number] = layer
        self._identify(json.loads(json.dumps({**identity, "stream": kind})))

    def _identify(self, identity: dict[str, Any]) -> None:
        file = self.place / _IDENTITY
        if not file.exists():
            write_text(file, json.dumps(identity, indent=1) + "\n")
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        for key, value in identity.items():
            if found.get(key) != value:
                raise UserError(
                    f"{file}: made with {key} {found.get(key)}, here it is {value}; delete "
                    f"{self.place} to begin the stage again"
                )

    def _file(self, layer: int, number: int) -> Path:
        return self.place / f"{layer:03}-{number:06}.npy"

    def layer_of(self, number: int) -> int:
        """The layer that a batch is about to enter; -1 if it is not there."""
        return self._layers.get(number, -1)

    def read(self, number: int) -> NDArray[np.float32]:
        """What enters the batch's layer, float32 [rows, length, width]."""
        file = self._file(self._layers[number], number)
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it to make it again") from None
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)

    def write(self, layer: int, number: int, hidden: NDArray[np.float32]) -> None:
        """Put a batch before `layer`. UserError if it is not finite or the disk is full."""
        if not np.isfinite(hidden).all():
            raise UserError(f"align: what enters layer {layer} of the teacher is not finite")
        values = _rounded(hidden) if self.kind == "bfloat16" else hidden
        with atomic_file(self._file(layer, number)) as handle:
            np.save(handle, values)
        self.remove(number)
        self._layers[number] = layer

    def remove(self, number: int) -> None:
        """Delete a batch."""
        if number in self._layers:
            self._file(self._layers.pop(number), number).unlink()

    def clear(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.place, ignore_errors=True)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stream_bytes(width: int, tokens: int, kind: Kind) -> int:
    """Bytes of the hidden states of so many tokens."""
    return tokens * width * _BYTES[kind]


def check_room(place: Path, needed: int) -> None:
    """Refuse hidden states without room for them; those that are there already count as room."""
    room = place
    while not room.exists():
        room = room.parent
    held = sum(f.stat().st_size for f in place.glob("*.npy")) if place.is_dir() else 0
    free = shutil.disk_usage(room).free + held
    if needed > free:
        raise UserError(
            f"align: the hidden states need {_gib(needed)} in {place}, {_gib(free)} are free; "
            "lower align.steps or align.rows, choose align.stream: bfloat16 or another "
            "align.stream_place"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


# ---- the stage ----------------------------------------------------------------------------------


def align_layers(
    student: Checkpoint,
    batches: Batches,
    place: str | Path,
    training: MixerTraining,
    *,
    layers: Collection[int] | None = None,
    stream: Kind = "float32",
    stream_place: str | Path | None = None,
    compute: Compute = "f32",
    probe: Sequence[Batch] = (),
    held_out: Batch | None = None,
    save_seconds: float = 60.0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Metrics]:
    """Train mixers layer by layer; they end in `place` (`aligned_student` reads them).

    student: straight from `linearize`; its layers are read one at a time, each once. `batches` are
    taken from their beginning. `layers`: train these alone (None: all); nothing behind the last of
    them is read. `stream` and `stream_place` (None: in `place`): in which type and directory the
    hidden states are kept; bfloat16 is half the disk, and what enters a layer is then rounded to 8
    bits of mantissa. `probe`: batches on which the error is measured before and after; `held_out`:
    the rows for `validate_every`. `check` is called where stopping is safe. A killed run continues
    from `place` with the same bits.

    Metrics a step: those of `align` for one layer, with `layer` and its own `layer_step`; `step`
    counts on from layer to layer. Raises UserError before it begins if the disk has no room.
    """
    check_validation("align", held_out, training.validate_every, training.keep)
    work = _Work(
        student,
        batches,
        Path(place),
        training,
        trained_layers(student.config, layers),
        stream,
        None if stream_place is None else Path(stream_place),
        compute,
        list(probe),
        held_out if training.validate_every else None,
        save_seconds,
        check,
    )
    yield from work.run()


@dataclass
class _Work:
    student: Checkpoint
    batches: Batches
    place: Path
    training: MixerTraining
    layers: list[int]
    kind: Kind
    stream_place: Path | None
    compute: Compute
    probe: list[Batch]
    held_out: Batch | None
    save_seconds: float
    check: Callable[[], None]
    start: dict[str, int] = field(init=False)
    stream: HiddenStream = field(init=False)

    def __post_init__(self) -> None:
        if self.training.steps < 1:
            raise UserError(f"steps is {self.training.steps}, expected at least 1")
        self.start = dict.fromkeys(self.batches.state_dict(), 0)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the mixers, but for the weights of the layer."""
        student = self.student.config.model_dump_json() + json.dumps(self.student.provenance)
        return {
            "stage": "align by layer",
            "student": hashlib.sha256(student.encode()).hexdigest(),
            "compute": self.compute,
            **self.training.identity,
            "batches": self.batches.identity,
            "probe": [list(map(list, batch.rows)) for batch in self.probe],
            "stream": self.kind,
            **({} if self.held_out is None else {"held_out": list(map(list, self.held_out.rows))}),
        }

    @property
    def _measured(self) -> list[Batch]:
        """The batches behind those of the steps: of the probe, then what is held out."""
        return [*self.probe, *([] if self.held_out is None else [self.held_out])]

    def run(self) -> Iterator[Metrics]:
        """Train all layers that are not done."""
        done = {layer for layer in self.layers if self._is_done(layer)}
        left = [layer for layer in self.layers if layer not in done]
        place = stream_directory(self.place, self.stream_place, self.identity)
        if not left:
            shutil.rmtree(place, ignore_errors=True)  # killed after the last mixer was written
            return
        rows = self.training.steps * self.batches.rows
        tokens = rows * self.batches.length + sum(batch.ids.size for batch in self._measured)
        check_room(place, stream_bytes(self.student.config.hidden_size, tokens, self.kind))
        self.stream = HiddenStream(place, self.kind, self.identity)
        self._embed(left[0])
        for layer in range(left[-1] + 1):
            yield from self._layer(layer, layer in left, layer == left[-1])
        self.stream.clear()

    def _is_done(self, layer: int) -> bool:
        file = mixer_file(self.place, layer)
        if file.exists():
            dict(SavedArrays(file, self.identity))  # all of it, to find damage now
        return file.exists()

    def _numbered(self) -> Iterator[tuple[int, Batch]]:
        """All batches: those of the steps, then those that are measured on."""
        self.batches.load_state_dict(self.start)
        for number in range(self.training.steps):
            yield number, next(self.batches)
        yield from enumerate(self._measured, start=self.training.steps)

    def _embed(self, layer: int) -> None:
        """Put the batches that are not there, or beyond a layer that is not done, at the start."""
        for number, batch in self._numbered():
            if 0 <= self.stream.layer_of(number) <= layer:
                continue
            self.check()
            self.stream.remove(number)
            ids, places = np.unique(batch.ids, return_inverse=True)
            rows = self.student.tensors.rows(_EMBEDDING, ids.astype(np.int64))
            self.stream.write(0, number, rows[places.reshape(batch.ids.shape)])

    def _layer(self, layer: int, trains: bool, last: bool) -> Iterator[Metrics]:
        """One layer: train its mixer, then take the batches through it."""
        batches = self.training.steps + len(self._measured)
        here = [n for n in range(batches) if self.stream.layer_of(n) == layer]
        if not here:
            return  # done before a kill: not read
        model = layer_model(self.student, layer, self.compute)
        if trains:
            yield from self._train(model, layer)
        if not last:
            for number, batch in self._numbered():
                if number in here:
                    self.check()
                    self._advance(model, layer, number, batch)

    def _advance(self, model: Model, layer: int, number: int, batch: Batch) -> None:
        hidden = self.stream.read(number)
        out = np.empty_like(hidden)
        for s, part in self._parts(batch):
            model.align_hidden(hidden[s], part.reset, layers=(), out=out[s])
        self.stream.write(layer + 1, number, out)

    def _parts(self, batch: Batch) -> Iterator[tuple[slice, Batch]]:
        rows = self.training.micro_rows or len(batch.ids)
        for n, part in enumerate(batch.parts(rows)):
            yield slice(n * rows, (n + 1) * rows), part

    def _train(self, model: Model, layer: int) -> Iterator[Metrics]:
        training, number = self.training, self.layers.index(layer)
        optimiser = MixerAdamW(model, [0], training)
        if self.held_out is not None:
            optimiser.held_out_errors = partial(self._held_out_error, model, self.held_out)
        before = self._error(model)
        identity = {**self.identity, "layer": layer, "weights": model.fingerprint()}
        saver = Saver(self.place / f"{layer:03}.state.npz", identity, self.save_seconds)
        self.batches.load_state_dict(self.start)

        accumulate = Accumulation(model.params, optimiser.names, order=training.accumulation)

        def gradient(batch: Batch, grads: Parameters) -> Metrics:
            hidden = self.stream.read(optimiser.steps)

            def one(part: tuple[slice, Batch], into: Parameters) -> Sums:
                states, reset = hidden[part[0]], part[1].reset
                scale = 1.0 / batch.ids.size
                return np.stack(model.align_hidden(states, reset, into, optimiser.names, scale)[:2])

            sums = accumulate(list(self._parts(batch)), one, grads)
            return optimiser.record(sums, batch.ids.size)

        for m in train(
            optimiser,
            model.params.zeros_like(),
            self.batches,
            gradient,
            training.rate,
            steps=training.steps,
            saver=saver,
        ):
            del m["layers"], m["training"]
            counted = {"layer": layer, "layer_step": m["step"]}
            steps = {"step": number * training.steps + m["step"]}
            steps["steps"] = len(self.layers) * training.steps
            yield {**m, **counted, **steps}
        self._finish(model, optimiser, layer, before)
        saver.remove()

    def _error(self, model: Model) -> float | None:
        """The layer's relative error on the probe."""
        if not self.probe:
            return None
        numbered = enumerate(self.probe, start=self.training.steps)
        sums = np.zeros((2, 1))
        for number, batch in numbered:
            sums += model.align_hidden(self.stream.read(number), batch.reset)[:2]
        return float(sums[0, 0] / sums[1, 0])

    def _held_out_error(self, model: Model, batch: Batch, _: Sequence[int]) -> NDArray[np.float64]:
        """The layer's relative error on what is held out, in the parts of `align`."""
        hidden = self.stream.read(self.training.steps + len(self.probe))
        parts = self._parts(batch)
        sums = [np.stack(model.align_hidden(hidden[s], p.reset)[:2]) for s, p in parts]
        error, reference = reduce(np.add, sums)
        return np.array([error[0] / reference[0]])

    def _finish(
        self, model: Model, optimiser: MixerAdamW, layer: int, before: float | None
    ) -> None:
        header = {
            "identity": self.identity,
            "isa": runtime.isa(),
            "steps": optimiser.steps,
            "before": before,
            "after": self._error(model),
        }
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
        for name in sorted(optimiser.names):
            arrays[_global(name, layer)] = model.params[name]
        with atomic_file(mixer_file(self.place, layer)) as handle:
            np.savez(handle, **arrays)


def stream_directory(place: Path, wanted: Path | None, identity: Mapping[str, Any]) -> Path:
    """Where the hidden states lie: in `place`, or under a name of their own in a shared place."""
    if wanted is None:
        return place / "stream"
    text = json.dumps({**identity, "place": os.path.realpath(place)}, sort_keys=True)
    return wanted / f"stream-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def mixer_file(place: Path, layer: int) -> Path:
    """The file of a mixer that is done."""
    return place / f"mixer-{layer:03}.npz"


def layer_config(c: ModelConfig, layer: int) -> ModelConfig:
    """The configuration of one layer of a student as a model of its own; its embedding is empty."""
    alone = {
        "num_hidden_layers": 1,
        "mixers": [c.mixers[layer]],
        "teacher_windows": c.teacher_windows[layer : layer + 1],
        "vocab_size": 1,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_ids": [],
        "pad_token_id": None,
    }
    return ModelConfig(**{**c.model_dump(), **alone})


def layer_model(student: Checkpoint, layer: int, compute: Compute = "f32") -> Model:
    """One layer of a student as a model of its own, for hidden states."""
    config = layer_config(student.config, layer)
    model = Model(config, compute=compute, source=f"layer {layer} of {student.source}")
    for entry in model.params.entries:
        if entry.group == 0:
            model.params[entry.name] = student.tensors[_global(entry.name, layer)]
    return model


def _global(name: str, layer: int) -> str:
    """What the whole model calls a tensor of a model of one layer."""
    return name.replace("model.layers.0.", f"model.layers.{layer}.")


# ---- its result ---------------------------------------------------------------------------------


def aligned_student(student: Checkpoint, place: str | Path) -> Checkpoint:
    """The student with the mixers that `align_layers` left in `place`; tensors are read when they
    are asked for. Its provenance has `relative_error` where a probe was measured."""
    layers = range(student.config.num_hidden_layers)
    files = {layer: file for layer in layers if (file := mixer_file(Path(place), layer)).exists()}
    errors: dict[str, list[Any]] = {"layers": [], "before": [], "after": []}
    sources: dict[str, TensorSource] = {}
    for layer, file in files.items():
        arrays = SavedArrays(file, {})
        header = arrays.header
        for name, value in arrays.items():
            sources[name] = TensorSource(value.shape, partial(_mixer_tensor, file, name), str(file))
        for key, value in zip(errors, (layer, header["before"], header["after"]), strict=True):
            errors[key].append(value)
    measured = bool(files) and None not in errors["before"]
    return Checkpoint(
        student.config,
        student.tensors.exchanged(sources),
        tokenizer=lambda: student.tokenizer,
        provenance={**student.provenance, **({"relative_error": errors} if measured else {})},
        source=f"{student.source}, aligned",
    )


def _mixer_tensor(file: Path, name: str) -> NDArray[np.float32]:
    return SavedArrays(file, {})[name]
