"""Small random models for the tests: two layers, odd sizes, randomised maps and gates."""

from __future__ import annotations

import numpy as np

from xlstm_distill.config import MixerConfig, ModelConfig
from xlstm_distill.families import FAMILIES
from xlstm_distill.model import Model

TINY = {
    "family": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_ids": [2],
    "pad_token_id": None,
}

MIXERS = {
    "attention": MixerConfig(),
    "window": MixerConfig(mixer="window", window=7, sinks=2),
    "linear": MixerConfig(mixer="linear"),
    "mlstm": MixerConfig(mixer="mlstm"),
    "hybrid": MixerConfig(mixer="hybrid", window=7, sinks=2),
    "hybrid without sinks": MixerConfig(mixer="hybrid", window=7),
    "hybrid fixed gate": MixerConfig(mixer="hybrid", window=7, sinks=2, gate="fixed"),
    "lolcats": MixerConfig(mixer="lolcats", window=7),
    "lolcats with sinks": MixerConfig(mixer="lolcats", window=7, sinks=2),
    "hybrid max": MixerConfig(mixer="hybrid", window=7, sinks=2, normalizer="max"),
    "hybrid elu": MixerConfig(mixer="hybrid", window=7, sinks=2, feature_map="elu"),
    "linear elu": MixerConfig(mixer="linear", feature_map="elu"),
    "lolcats elu": MixerConfig(mixer="lolcats", window=7, feature_map="elu"),
}


# Bounds that cut through the eight pairs of a head of 16: one kept, two between, five divided.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}


def of_family(name: str, layers: int = 2) -> dict:
    """The keys of a configuration that the family decides: every other layer sees a window of 9
    and RoPE is scaled in the rest, where the family has such layers."""
    found = {"family": name, "attention_bias": FAMILIES[name].attention_bias}
    if FAMILIES[name].sliding_layers:
        found["teacher_windows"] = [9 if layer % 2 == 0 else None for layer in range(layers)]
        found["rope_scaling"] = YARN
    return found


def random_model(mixer: str = "attention", seed: int = 0, dtype=np.float32, **changes) -> Model:
    """A model whose every parameter is random: maps are not the identity, gates are not zero.

    `changes` of the configuration may give `mixers`, one a layer; else all layers have `mixer`,
    "attention" being the teacher's.
    """
    layers = changes.get("num_hidden_layers", TINY["num_hidden_layers"])
    mixers = [] if mixer == "attention" else [MIXERS[mixer]] * layers
    config = ModelConfig(**{**TINY, "mixers": mixers, **changes})
    model = Model(config, dtype=dtype)
    random = np.random.default_rng(seed)
    for e in model.params.entries:
        scale = {"norm": 0.1, "map": 0.5, "gate": 0.3, "bias": 0.5}.get(e.role, 0.15)
        value = random.standard_normal(e.shape) * scale
        model.params[e.name] = value + 1.0 if e.role == "norm" else value
    return model


def random_batch(model: Model, rows: int, steps: int, seed: int = 1):
    """Token ids, document starts (bool) and next-token labels of a packed batch."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, model.config.vocab_size, (rows, steps), dtype=np.int32)
    reset = random.random((rows, steps)) < 0.06
    reset[:, 0] = True
    labels = np.full_like(ids, -1)
    labels[:, :-1] = np.where(reset[:, 1:], -1, ids[:, 1:])
    return ids, reset, labels
