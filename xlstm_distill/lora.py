"""LoRA: matrices that stay frozen but for a low-rank difference, W = W0 + (alpha / rank) B A.

The model always holds the merged W, so that a step, a validation and a saved model see what is
trained and nothing else need know of adapters. The gradient dW is made as for full training, and
the factors' follow from it: dB = s dW Aᵀ, dA = s Bᵀ dW. Source: arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from . import ops
from .checkpoints import Adapter, load_adapter, save_adapter
from .config import ModelConfig
from .errors import UserError
from .families import tensor_shapes
from .model import Model
from .optim import in_mixer, trainable_names
from .parameters import Entry, Parameters

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""Matrices of a layer that may be adapted, as PEFT calls them: all linear ones (`all-linear`)."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Lora:
    """Factors beside the matrices `targets` of every layer; the mixers' own tensors train in full.

    rank, alpha: PEFT's `r` and `lora_alpha`, and as there alpha / rank multiplies the product.
    A [rank, inputs] begins uniform within ±inputs^(-1/2) (`seed`), B [outputs, rank] at 0, so that
    the model begins as it is. A copy of the adapted matrices is kept. Give it to
    `distill(train_what=)`; afterwards the model is the merged one, and `save` writes the adapter.
    Raises UserError for a wrong value and for a model whose weights are bf16 or int8.
    """

    def __init__(
        self,
        model: Model,
        *,
        rank: int = 8,
        alpha: float = 8,
        targets: Sequence[Target] = TARGETS,
        seed: int = 0,
    ) -> None:
        if rank < 1 or not 0 < alpha < math.inf:
            raise UserError(f"lora: rank {rank}, alpha {alpha}: expected at least 1 and above 0")
        if unknown := [t for t in targets if t not in TARGETS]:
            raise UserError(f"lora: target {unknown[0]!r} is not one of {', '.join(TARGETS)}")
        if not targets:
            raise UserError("lora: targets is empty; name at least one matrix")
        _check_trains(model)
        self.model, self.rank, self.alpha, self.seed = model, rank, alpha, seed
        self.targets = [t for t in TARGETS if t in targets]
        adapted = [e for e in model.params.entries if _is_adapted(e.name, self.targets)]
        self._base = {e: model.params.view(e).copy() for e in adapted}
        whole = trainable_names(model, "all")
        self._whole = [e for e in model.params.entries if e.name in whole and in_mixer(e.name)]
        self.params = Parameters.of(self._tensors(), model.dtype)
        """What trains: the factors, and the mixers' tensors once more."""
        random = np.random.default_rng(seed)
        for e in self._base:
            start = random.uniform(-1, 1, (rank, e.shape[1])) / math.sqrt(e.shape[1])
            self.params[_module(e) + _A] = start.astype(model.dtype)
        for e in self._whole:
            self.params[e.name] = model.params.view(e)

    def _tensors(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        found = []
        for e in self._base:
            outputs, inputs = e.shape
            found.append((_module(e) + _A, (self.rank, inputs), e.role, e.group))
            found.append((_module(e) + _B, (outputs, self.rank), e.role, e.group))
        return found + [(e.name, e.shape, e.role, e.group) for e in self._whole]

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the start of the factors and their weight."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": self.targets,
            "seed": self.seed,
        }

    @property
    def wanted(self) -> set[str]:
        """Names of the model's tensors whose gradients `gradient` needs."""
        return {e.name for e in (*self._base, *self._whole)}

    def merge(self) -> None:
        """Set the model's tensors by what trains."""
        params = self.model.params
        for e, base in self._base.items():
            a, b = self.params[_module(e) + _A], self.params[_module(e) + _B]
            _merge(base, a, b, self.alpha / self.rank, out=params.view(e))
        for e in self._whole:
            params.view(e)[...] = self.params[e.name]

    def gradient(self, grads: Parameters, own: Parameters) -> None:
        """Add to `own`, of the plan of `params`, the gradient that follows from the model's, and
        set the latter back to 0."""
        scale = self.alpha / self.rank
        for e in self._base:
            a, b = _module(e) + _A, _module(e) + _B
            # the op whose output is B A, with dW as the gradient of that
            db, da, _ = ops.linear_backward(grads.view(e), self.params[b], self.params[a].T)
            own[a] += scale * da.T
            own[b] += scale * db
        for e in self._whole:
            own[e.name] += grads.view(e)
        grads.zero([*self._base, *self._whole])

    def adapter(self) -> Adapter:
        """The factors, and the mixers whole, tensors that do not train included."""
        factors = {n: self.params[n] for n in self.params if n.endswith((_A, _B))}
        mixers = {n: self.model.params[n] for n in self.model.params if in_mixer(n)}
        return Adapter(self.rank, self.alpha, {**factors, **mixers})

    def save(
        self,
        directory: str | Path,
        base: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the adapter as PEFT does, float32 (atomic): the factors, and the mixers as modules
        that were trained whole. base: where the base model is (None: where it was loaded from)."""
        return save_adapter(
            directory,
            self.adapter(),
            targets=self.targets,
            whole=["mixer"] if self._whole else [],
            base=self.model.source if base is None else base,
            provenance=provenance or {},
        )


def merge_adapter(base: Model, directory: str | Path) -> Model:
    """A copy of `base` with an adapter merged in, whether this package or PEFT wrote it.

    Of the model that the adapter was trained on this makes the merged one, bit for bit. Raises
    UserError, naming the tensor, where the adapter does not fit: every tensor must be used.
    """
    _check_trains(base)
    adapter = load_adapter(directory)
    tensors, rank = adapter.tensors, adapter.rank
    matrices = [e for e in base.params.entries if e.name.endswith(".weight") and len(e.shape) == 2]
    expected = {e.name: e.shape for e in base.params.entries if in_mixer(e.name)}
    for e in matrices:
        expected[_module(e) + _A] = (rank, e.shape[1])
        expected[_module(e) + _B] = (e.shape[0], rank)
    for name in tensors:
        if name not in expected:
            raise UserError(f"{directory}: the base model has nothing that takes tensor {name}")
        if (found := np.shape(tensors[name])) != expected[name]:
            raise UserError(
                f"{directory}: tensor {name} has shape {list(found)}, "
                f"expected {list(expected[name])}"
            )
    merged = base.copy()
    merged.source = f"{base.source} with {directory}" if base.source else str(directory)
    for name in tensors:
        if in_mixer(name) and name in merged.params:
            merged.params[name] = tensors[name]
    for e in matrices:
        a, b = _module(e) + _A, _module(e) + _B
        if a in tensors and b in tensors:
            scale = adapter.alpha / rank
            merged.params[e.name] = _merge(base.params[e.name], tensors[a], tensors[b], scale)
        elif a in tensors or b in tensors:
            raise UserError(f"{directory}: tensor {b if a in tensors else a} is missing")
    return merged


def sizes(config: ModelConfig, rank: int, targets: Sequence[Target]) -> tuple[int, int]:
    """How many numbers the adapted matrices of a model hold, and how many their factors."""
    found = [s for name, s in tensor_shapes(config).items() if _is_adapted(name, targets)]
    return sum(math.prod(s) for s in found), rank * sum(sum(s) for s in found)


def _is_adapted(name: str, targets: Sequence[Target]) -> bool:
    return name.endswith(tuple(f".{target}.weight" for target in targets))


def _module(entry: Entry) -> str:
    """The name of a tensor without its last part: that of the module it belongs to."""
    return entry.name.rpartition(".")[0]


def _merge(
    base: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    scale: float,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """W0 + scale B A: the product in the dtype of the factors, the sum rounded once."""
    return ops.merge_linear([base, ops.linear_forward(b, a.T)], [1.0, scale], out=out)


def _check_trains(model: Model) -> None:
    if model.params.packed:
        raise UserError(f'lora: the weights are {model.compute}; load the model with compute="f32"')
