"""From a teacher to student_0: weights copied, mixers exchanged, new parameters at their start."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .checkpoints import Checkpoint, TensorSource
from .config import MixerConfig, ModelConfig
from .errors import UserError, validated
from .families import Shape, tensor_shapes
from .model import Model, fingerprint_of

FORGET_BIAS = 6.0
"""b_f: sigmoid(6) = 0.9975, a memory of some 400 tokens; 5 to 8 trained equally well, 1 worse."""
GATE_BIAS = -3.0
"""b_og: the student begins near window + sinks (o = 0.05); 0 was much worse, -5 slightly."""
WINDOW_FACTOR = math.log(0.1 / 0.9)
"""LoLCATs: sigmoid of it, 0.1, is what the window's weights begin with, as published."""


Source = TypeVar("Source", Model, Checkpoint)
KeptLayers = Collection[int] | Literal["all"]


def linearize(
    model: Source,
    window: int | None = 64,
    sinks: int = 4,
    mixer: Literal["hybrid", "mlstm", "linear", "window", "lolcats"] = "hybrid",
    gate: Literal["data", "fixed"] = "data",
    normalizer: Literal["ratio", "max"] = "ratio",
    feature_map: Literal["softmax", "elu"] = "softmax",
    keep_attention: KeptLayers = (),
) -> Source:
    """A student with `model`'s weights in which `mixer` takes the place of softmax attention; it
    computes as `model` does.

    window counts the current token (None: full), sinks are the first tokens of a document that stay
    visible; both describe the attention branch. Layers in `keep_attention` keep the teacher's
    attention; with "all" the student is a copy of the teacher, a control that can be trained as
    students are. A layer that had a window of its own gets the smaller of the two. New parameters
    (paper.md 1.2): feature maps are the identity, gate weights 0, b_f = 6, b_og = -3, b_i = 0
    (log D^1.5 under `max` with softmax features, below which that normaliser's floor silences the
    branch). `lolcats` needs a window; as published it has no sinks and a window's factor of 0.1 at
    the start.

    A checkpoint gives a checkpoint, whose tensors are read or made when they are asked for: memory
    for one tensor, where a model is held whole.

    Raises UserError for a wrong value or for a model whose weights are stored as bf16 or int8.
    """
    choice: dict[str, Any] = {
        "mixer": mixer,
        "window": window,
        "sinks": sinks,
        "gate": gate,
        "normalizer": normalizer,
        "feature_map": feature_map,
    }
    if isinstance(model, Model) and model.params.packed:
        raise UserError(
            f'linearize: the weights are {model.compute}; load the teacher with compute="f32"'
        )
    config = student_config(model.config, model.source, keep_attention, **choice)
    fingerprint = model.fingerprint() if isinstance(model, Model) else fingerprint_of(model)
    provenance = {
        "teacher": {"source": model.source, "fingerprint": fingerprint},
        "linearize": {**choice, "keep_attention": _kept(model.config, keep_attention)},
    }
    source = f"student of {model.source}" if model.source else ""
    bias = input_bias(config.head_dim, normalizer, feature_map)
    start = partial(_start, input_bias=bias)
    if isinstance(model, Checkpoint):
        made = {
            name: TensorSource(shape, partial(start, name, shape), source)
            for name, shape in tensor_shapes(config).items()
            if name not in model.tensors
        }
        return Checkpoint(
            config,
            model.tensors.exchanged(made),
            tokenizer=lambda: model.tokenizer,
            provenance=provenance,
            source=source,
        )
    student = Model(
        config,
        model.tokenizer,
        dtype=model.dtype,
        compute=model.compute,
        provenance=provenance,
        source=source,
    )
    for entry in student.params.entries:
        if entry.name in model.params:
            student.params[entry.name] = model.params[entry.name]
        else:
            student.params[entry.name] = start(entry.name, entry.shape)
    return student


def student_config(
    config: ModelConfig, source: str, keep_attention: KeptLayers, **choice: Any
) -> ModelConfig:
    """The configuration of a student: `choice` has the keys of `MixerConfig`, `source` names the
    model in errors."""
    kept = _kept(config, keep_attention)
    if config.is_student:
        raise UserError(f"linearize: {source or 'the model'} is a student already")
    wanted = validated(MixerConfig, choice, "student", usage=True)
    mixers = [
        old if i in kept else _narrowed(wanted, old.window) for i, old in enumerate(config.mixers)
    ]
    return ModelConfig(**{**config.model_dump(), "mixers": mixers})


def _kept(config: ModelConfig, keep_attention: KeptLayers) -> list[int]:
    layers = config.num_hidden_layers
    if keep_attention == "all":
        return list(range(layers))
    if outside := [i for i in keep_attention if not 0 <= i < layers]:
        raise UserError(
            f"student.keep_attention: layer {outside[0]} is outside 0..{layers - 1}", usage=True
        )
    return sorted(keep_attention)


def _narrowed(wanted: MixerConfig, own: int | None) -> MixerConfig:
    if own is None or (wanted.window is not None and wanted.window <= own):
        return wanted
    return wanted.model_copy(update={"window": own})


def _start(name: str, shape: Shape, input_bias: float) -> NDArray[Any]:
    """The start value of a new parameter; feature maps are [heads, head_dim, head_dim]."""
    value: Any = 0.0
    if name.endswith((".map_q", ".map_k")):
        value = np.eye(shape[-1])
    elif name.endswith(".f_proj.bias"):
        value = FORGET_BIAS
    elif name.endswith(".o_gate.bias"):
        value = GATE_BIAS
    elif name.endswith(".window_factor"):
        value = WINDOW_FACTOR
    elif name.endswith(".i_proj.bias"):
        value = input_bias
    return np.full(shape, value)


def input_bias(head_dim: int, normalizer: str, feature_map: str) -> float:
    """b_i at the start: log D^1.5 under `max` with softmax features, else 0.

    It is the bias below which the floor of that normaliser is active: with softmax features q.n is
    near 1/D, divided again by sqrt(D) (docs/math/mlstm.md). Features of elu are near 1 each: there
    q.n is sqrt(D) after a token, above the floor.
    """
    return 1.5 * math.log(head_dim) if (normalizer, feature_map) == ("max", "softmax") else 0.0
