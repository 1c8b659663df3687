"""What a model is: sizes, switches and the mixer of every layer.

`ModelConfig` is written to and read from Hugging Face's `config.json`. A plain model keeps the keys
of its own architecture. A student is stored under `model_type` "xlstm_distill" with its mixers, so
that no other library mistakes it for the plain transformer that it no longer is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import UserError, validated
from .families import FAMILIES, Family

STUDENT_MODEL_TYPE = "xlstm_distill"
STUDENT_ARCHITECTURE = "XlstmDistillForCausalLM"

_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# Hugging Face's words for kinds of layers, where one fits.
_LAYER_TYPES = {
    "attention": "full_attention",
    "window": "sliding_attention",
    "hybrid": "hybrid",
    "mlstm": "linear_attention",
    "linear": "linear_attention",
}


class MixerConfig(BaseModel):
    """The sequence mixer of one layer.

    `window` counts the current token (None: full attention) and, with `sinks` (the first tokens of
    a document, always visible), describes the attention branch; `mlstm` and `linear` have no such
    branch and ignore both. `gate` and `normalizer` describe the mLSTM side.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixer: Literal["attention", "hybrid", "mlstm", "linear", "window"] = "attention"
    window: int | None = None
    sinks: int = 0
    gate: Literal["data", "fixed"] = "data"
    normalizer: Literal["ratio", "max"] = "ratio"
    feature_map: Literal["softmax"] = "softmax"

    @model_validator(mode="after")
    def _check(self) -> MixerConfig:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (or null for full), found {self.window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, found {self.sinks}")
        if self.mixer == "window" and self.window is None:
            raise ValueError("mixer 'window' needs a window of at least 1")
        return self

    @property
    def is_plain(self) -> bool:
        """True for the full causal attention of the pretrained transformer."""
        return self.mixer == "attention" and self.window is None


class ModelConfig(BaseModel):
    """Sizes and switches of a model; `mixers` has one entry per layer (default: all attention).

    A wrong value raises pydantic's `ValidationError`; `from_hf` turns it into a one-line
    `UserError` that names the key.
    """

    model_config = ConfigDict(extra="forbid")

    family: str = "llama"
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rms_norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(default=10000.0, gt=0, allow_inf_nan=False)
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = Field(default=2048, ge=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v; what the family has."""
    bos_token_id: int | None = None
    eos_token_ids: list[int] = Field(default_factory=list)
    pad_token_id: int | None = None
    mixers: list[MixerConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.family not in FAMILIES:
            raise ValueError(
                f"family {self.family!r} is unknown; supported: {', '.join(sorted(FAMILIES))}"
            )
        if self.attention_bias != FAMILIES[self.family].attention_bias:
            raise ValueError(
                f"attention_bias {self.attention_bias} does not fit family {self.family!r}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, found {self.head_dim}")
        _check_rope_scaling(self.rope_scaling)
        named = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        named.update({f"eos_token_ids[{i}]": token for i, token in enumerate(self.eos_token_ids)})
        for key, token in named.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{key} {token} is outside the vocabulary of {self.vocab_size}")
        if not self.mixers:
            self.mixers = [MixerConfig() for _ in range(self.num_hidden_layers)]
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers has {len(self.mixers)} entries for {self.num_hidden_layers} layers"
            )
        return self

    @property
    def is_student(self) -> bool:
        """True if any layer differs from the plain transformer."""
        return not all(mixer.is_plain for mixer in self.mixers)

    def inv_freq(self) -> NDArray[np.float64]:
        """RoPE's angular frequencies in radians per position, float64 [head_dim / 2].

        Applies Llama 3's scaling (the "llama3" entry of Hugging Face's rope parameters): long
        wavelengths are divided by `factor`, short ones kept, and those between interpolated.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        base = self.rope_theta**-exponent
        if self.rope_scaling is None:
            return base
        factor, low, high, context = (float(self.rope_scaling[key]) for key in _LLAMA3_KEYS)
        turns = context * base / (2.0 * np.pi)  # full turns within the original context
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (keep + (1.0 - keep) / factor)

    def to_hf(self) -> dict[str, Any]:
        """The contents of `config.json`; `from_hf` gives the same configuration back."""
        family = FAMILIES[self.family]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        rope.update(self.rope_scaling or {})
        eos = self.eos_token_ids
        values: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **{key: getattr(self, key) for key in _SHARED_KEYS},
            # Both spellings: rope_parameters is read by transformers 5, the others by 4.
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rope_parameters": rope,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
            "pad_token_id": self.pad_token_id,
            **family.fixed,
            "dtype": "float32",
        }
        if self.is_student:
            values["architectures"] = [STUDENT_ARCHITECTURE]
            values["model_type"] = STUDENT_MODEL_TYPE
            values["family"] = self.family
            values["layer_types"] = [_layer_type(mixer) for mixer in self.mixers]
            windows = {mixer.window for mixer in self.mixers if mixer.window is not None}
            if len(windows) == 1:
                values["sliding_window"] = windows.pop()
            values["mixers"] = [mixer.model_dump() for mixer in self.mixers]
        return values

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the contents of a `config.json`.

        Raises `UserError`, opened by `where`, for an architecture that is not supported (named),
        for a switch that the model code does not implement, and for a missing or wrong value.
        """
        family = _family_of(values, where)
        for key, expected in family.fixed.items():
            if values.get(key, expected) != expected:
                raise UserError(
                    f"{where}: {key} {values[key]!r} is not supported; expected {expected!r}"
                )
        if values.get("quantization_config") is not None:
            raise UserError(f"{where}: quantization_config is not supported; use full weights")
        found: dict[str, Any] = {
            "family": family.name,
            "attention_bias": family.attention_bias,
            "rms_norm_eps": family.rms_norm_eps,
        }
        found.update({key: values[key] for key in _SHARED_KEYS if values.get(key) is not None})
        if "head_dim" not in found:
            found["head_dim"] = _default_head_dim(found, where)
        found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
        found.update(_rope_of(values, where))
        eos = values.get("eos_token_id")
        found["eos_token_ids"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        found["bos_token_id"] = values.get("bos_token_id")
        found["pad_token_id"] = _pad_of(values)
        found["mixers"] = _mixers_of(values, family, where)
        return validated(cls, found, where)


_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def _layer_type(mixer: MixerConfig) -> str:
    if mixer.mixer == "attention" and mixer.window is not None:
        return "sliding_attention"
    return _LAYER_TYPES[mixer.mixer]


def _check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind != "llama3":
        raise ValueError(f"rope_scaling type {kind!r} is not supported; supported: 'llama3'")
    for key in _LLAMA3_KEYS:
        value = scaling.get(key)
        if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
            raise ValueError(f"rope_scaling needs a positive {key}, found {value!r}")
    if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must be larger than low_freq_factor")


def _family_of(values: Mapping[str, Any], where: str) -> Family:
    model_type = values.get("model_type")
    if model_type == STUDENT_MODEL_TYPE:
        name = values.get("family")
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
        raise UserError(
            f"{where}: family {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    architectures = values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES.values():
        if model_type == family.model_type and named in (None, family.architecture):
            return family
    supported = ", ".join(sorted(family.architecture for family in FAMILIES.values()))
    raise UserError(
        f"{where}: architecture {named!r} (model_type {model_type!r}) is not supported; "
        f"supported: {supported}"
    )


def _default_head_dim(found: Mapping[str, Any], where: str) -> int:
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"{where}: hidden_size {width!r} and num_attention_heads {heads!r} give no head_dim"
        )
    return width // heads


def _rope_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling from either spelling (transformers 5, and 4 before it)."""
    found: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    scaling: Any = values.get("rope_parameters") or values.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, dict):
            raise UserError(f"{where}: rope_scaling must be a mapping, found {scaling!r}")
        scaling = dict(scaling)
        found["rope_theta"] = scaling.pop("rope_theta", found["rope_theta"])
        old_spelling = scaling.pop("type", "default")
        scaling.setdefault("rope_type", old_spelling)
        factor = scaling.pop("partial_rotary_factor", 1.0)
        if factor != 1.0:
            raise UserError(f"{where}: partial_rotary_factor {factor!r} is not supported")
        found["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if found["rope_theta"] is None:
        del found["rope_theta"]
    return found


def _pad_of(values: Mapping[str, Any]) -> int | None:
    """Llama's original files write -1 for "no padding token"."""
    pad = values.get("pad_token_id")
    return None if pad == -1 else pad


def _mixers_of(values: Mapping[str, Any], family: Family, where: str) -> list[Any]:
    if values.get("model_type") == STUDENT_MODEL_TYPE:
        mixers = values.get("mixers")
        if not isinstance(mixers, list) or not mixers:
            raise UserError(f"{where}: mixers: a list with one entry per layer is needed")
        return mixers
    for kind in values.get("layer_types") or []:
        if kind != "full_attention":
            raise UserError(
                f"{where}: layer_types {kind!r} is not supported in a {family.name} model"
            )
    return []
