"""From a teacher to student_0: weights copied, mixers exchanged, new parameters at their start."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from .config import MixerConfig, ModelConfig
from .errors import UserError, validated
from .model import Model
from .parameters import Entry

FORGET_BIAS = 6.0
"""b_f: sigmoid(6) = 0.9975, a memory of some 400 tokens; 5 to 8 trained equally well, 1 worse."""
GATE_BIAS = -3.0
"""b_og: the student begins near window + sinks (o = 0.05); 0 was much worse, -5 slightly."""


def linearize(
    model: Model,
    window: int | None = 64,
    sinks: int = 4,
    mixer: Literal["hybrid", "mlstm", "linear", "window"] = "hybrid",
    gate: Literal["data", "fixed"] = "data",
    normalizer: Literal["ratio", "max"] = "ratio",
    keep_attention: Collection[int] = (),
) -> Model:
    """A student with `model`'s weights in which `mixer` takes the place of softmax attention.

    window counts the current token (None: full), sinks are the first tokens of a document that stay
    visible; both describe the attention branch. Layers in `keep_attention` keep the teacher's
    attention. A layer that had a window of its own gets the smaller of the two. New parameters
    (paper.md 1.2): feature maps are the identity, gate weights 0, b_f = 6, b_og = -3, b_i = 0
    (log D^1.5 under `max`, below which that normaliser's floor silences the branch).

    Raises UserError for a wrong value or for a model whose weights are stored as bf16 or int8.
    """
    config = model.config
    layers = config.num_hidden_layers
    if outside := [i for i in keep_attention if not 0 <= i < layers]:
        raise UserError(f"keep_attention: layer {outside[0]} is outside 0..{layers - 1}")
    if model.params.packed:
        raise UserError(
            f'linearize: the weights are {model.compute}; load the teacher with compute="f32"'
        )
    if config.is_student:
        raise UserError(f"linearize: {model.source or 'the model'} is a student already")
    choice: dict[str, Any] = {
        "mixer": mixer,
        "window": window,
        "sinks": sinks,
        "gate": gate,
        "normalizer": normalizer,
    }
    wanted = validated(MixerConfig, choice, "student", usage=True)
    mixers = [
        old if i in keep_attention else _narrowed(wanted, old.window)
        for i, old in enumerate(config.mixers)
    ]
    student = Model(
        ModelConfig(**{**config.model_dump(), "mixers": mixers}),
        model.tokenizer,
        dtype=model.dtype,
        provenance={
            "teacher": {"source": model.source, "fingerprint": model.fingerprint()},
            "linearize": {**choice, "keep_attention": sorted(keep_attention)},
        },
        source=f"student of {model.source}" if model.source else "",
    )
    for entry in student.params.entries:
        if entry.name in model.params:
            student.params[entry.name] = model.params[entry.name]
        else:
            student.params.view(entry)[...] = _start(entry, config.head_dim, normalizer)
    return student


def _narrowed(wanted: MixerConfig, own: int | None) -> MixerConfig:
    if own is None or (wanted.window is not None and wanted.window <= own):
        return wanted
    return wanted.model_copy(update={"window": own})


def _start(entry: Entry, head_dim: int, normalizer: str) -> Any:
    """The start value of a new parameter."""
    if entry.role == "map":
        return np.eye(entry.shape[-1])
    if entry.name.endswith(".f_proj.bias"):
        return FORGET_BIAS
    if entry.name.endswith(".o_gate.bias"):
        return GATE_BIAS
    if entry.name.endswith(".i_proj.bias") and normalizer == "max":
        return input_bias_for_max(head_dim)
    return 0.0


def input_bias_for_max(head_dim: int) -> float:
    """log D^1.5: the input bias below which the floor of the `max` normaliser is active.

    With softmax features q.n is near 1/D, divided again by sqrt(D) (docs/math/mlstm.md).
    """
    return 1.5 * math.log(head_dim)
