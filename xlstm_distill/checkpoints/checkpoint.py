"""What every loader returns: configuration, tensors read on demand, tokenizer, provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..errors import UserError
from ..families import Shape, tensor_shapes
from ..tokenizer import Tokenizer

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor comes from: `read` gives it as float32 of `shape`, `where` names the file.

    `rows` gives some rows (numbers along the first axis) without reading the rest, where it can.
    """

    shape: Shape
    read: Callable[[], Array]
    where: str
    rows: Callable[[NDArray[np.int64]], Array] | None = None


class LazyTensors(Mapping[str, Array]):
    """Tensors by name, each read (and checked for NaN and infinity) when it is asked for.

    Nothing is kept: a second look reads again. Arrays are float32, row-major and may be read-only.
    """

    def __init__(self, sources: Mapping[str, TensorSource]) -> None:
        self._sources = dict(sources)

    def __getitem__(self, name: str) -> Array:
        source = self._sources[name]
        return _finite(source.read(), name, source.where)

    def rows(self, name: str, rows: NDArray[np.int64]) -> Array:
        """Some rows of a tensor; the rest is not read where the file allows it."""
        source = self._sources[name]
        found = source.read()[rows] if source.rows is None else source.rows(rows)
        return _finite(found, name, source.where)

    def exchanged(self, sources: Mapping[str, TensorSource]) -> LazyTensors:
        """These tensors, with `sources` in their places or added."""
        return LazyTensors({**self._sources, **sources})

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without reading it."""
        return self._sources[name].shape


def _finite(values: Array, name: str, where: str) -> Array:
    array = np.require(values, dtype=np.float32, requirements=["C", "A"])
    finite = np.isfinite(array)
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), array.shape)
        value = array[place]
        index = ", ".join(str(int(i)) for i in place)
        raise UserError(f"{where}: tensor {name} holds {value} at [{index}]")
    return array


class Checkpoint:
    """A model as it lies in files.

    `tensors` maps Hugging Face names to float32 arrays (q and k rows in the rotate-half order).
    `source` says where it came from. `tokenizer` is None if the files hold none.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: LazyTensors,
        *,
        tokenizer: Callable[[], Tokenizer | None],
        provenance: Mapping[str, Any],
        source: str,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.provenance = dict(provenance)
        self.source = source
        self._make_tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, built at the first use; `UserError` if it has more ids than the model."""
        tokenizer = self._make_tokenizer()
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{self.source}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the model only {self.config.vocab_size}"
            )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of configuration and tensors (reads them all once)."""
        return fingerprint(self.config, self.tensors)


def fingerprint(config: ModelConfig, tensors: Mapping[str, Array]) -> str:
    """sha256, as hexadecimal digits, of the configuration and of every tensor in name order.

    It depends on contents alone: a GGUF file and the directory it was saved to agree.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode("ascii"))
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(f"\n{name} {array.shape}\n".encode("ascii"))
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_tensors(config: ModelConfig, found: Mapping[str, Shape], where: str) -> None:
    """Account for every tensor: none missing, none extra, each of the shape the model needs.

    Raises `UserError` that names the first offender and how many there are.
    """
    wanted = tensor_shapes(config)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{where}: tensor {_first(missing)} is missing")
    extra = [name for name in found if name not in wanted]
    if extra:
        raise UserError(f"{where}: tensor {_first(extra)} is not part of the model")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(found[name])}, expected {list(shape)}"
            )


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
