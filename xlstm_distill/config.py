"""What a model is: sizes, switches and the mixer of every layer.

`ModelConfig` is written to and read from Hugging Face's `config.json`. A plain model keeps the keys
of its own architecture. A student is stored under `model_type` "xlstm_distill" with its mixers, so
that no other library mistakes it for the plain transformer that it no longer is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .errors import UserError, validated
from .families import FAMILIES, Family

STUDENT_MODEL_TYPE = "xlstm_distill"
STUDENT_ARCHITECTURE = "XlstmDistillForCausalLM"

# Kinds of RoPE scaling: the keys that each needs, and those that it may have.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow"),
    ),
}
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # YaRN's where a file names none
# Hugging Face's words for kinds of layers, where one fits.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYER_TYPES = {
    "attention": _FULL,
    "window": _SLIDING,
    "hybrid": "hybrid",
    "lolcats": "hybrid",
    "mlstm": "linear_attention",
    "linear": "linear_attention",
}


class MixerConfig(BaseModel):
    """The sequence mixer of one layer.

    `window` counts the current token (None: full attention) and, with `sinks` (the first tokens of
    a document, always visible), describes the attention branch; `mlstm` and `linear` have no such
    branch and ignore both. `gate` and `normalizer` describe the mLSTM side, `feature_map` is the
    form of its maps of q and k. In `lolcats` the keys that softmax attention does not see have
    linear attention, both under one normaliser; it has maps, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixer: Literal["attention", "hybrid", "mlstm", "linear", "window", "lolcats"] = "attention"
    window: int | None = None
    sinks: int = 0
    gate: Literal["data", "fixed"] = "data"
    normalizer: Literal["ratio", "max"] = "ratio"
    feature_map: Literal["softmax", "elu"] = "softmax"

    @model_validator(mode="after")
    def _check(self) -> MixerConfig:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 (or null for full), found {self.window}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, found {self.sinks}")
        if self.mixer in ("window", "lolcats") and self.window is None:
            raise ValueError(f"mixer {self.mixer!r} needs a window of at least 1")
        return self

    def is_pretrained(self, window: int | None) -> bool:
        """True for the attention of a pretrained layer with this window (None: full)."""
        sees_more = window is not None and self.sinks > 0
        return self.mixer == "attention" and self.window == window and not sees_more


class ModelConfig(BaseModel):
    """Sizes and switches of a model; `mixers` has one entry per layer (default: the teacher's
    attention in all).

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
    teacher_windows: list[int | None] = Field(default_factory=list)
    """The window of the pretrained attention of each layer, None: full; empty: full in all."""
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
        _check_rope_scaling(self.rope_scaling, self.rope_theta)
        self._check_teacher_windows()
        named = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        named.update({f"eos_token_ids[{i}]": token for i, token in enumerate(self.eos_token_ids)})
        for key, token in named.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{key} {token} is outside the vocabulary of {self.vocab_size}")
        if not self.mixers:
            self.mixers = [MixerConfig(window=w) for w in self.windows]
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers has {len(self.mixers)} entries for {self.num_hidden_layers} layers"
            )
        return self

    def _check_teacher_windows(self) -> None:
        if not self.teacher_windows:
            return
        if len(self.teacher_windows) != self.num_hidden_layers:
            raise ValueError(
                f"teacher_windows has {len(self.teacher_windows)} entries "
                f"for {self.num_hidden_layers} layers"
            )
        sizes = {window for window in self.teacher_windows if window is not None}
        if not sizes:
            self.teacher_windows = []
        elif not FAMILIES[self.family].sliding_layers:
            raise ValueError(f"teacher_windows do not fit family {self.family!r}")
        elif len(sizes) > 1 or min(sizes) < 1:
            raise ValueError(f"teacher_windows needs one size of at least 1, found {sorted(sizes)}")

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `teacher_windows` where there are none: fingerprints do not know the key."""
        values: dict[str, Any] = handler(self)
        if not self.teacher_windows:
            values.pop("teacher_windows", None)
        return values

    @property
    def windows(self) -> list[int | None]:
        """The window of the pretrained attention of each layer, None: full."""
        return self.teacher_windows or [None] * self.num_hidden_layers

    @property
    def is_student(self) -> bool:
        """True if any layer differs from the pretrained transformer."""
        pairs = zip(self.mixers, self.windows, strict=True)
        return not all(mixer.is_pretrained(window) for mixer, window in pairs)

    @property
    def has_gates(self) -> bool:
        """True if any layer has an output gate."""
        return any(mixer.mixer == "hybrid" for mixer in self.mixers)

    def scales_rope(self, layer: int) -> bool:
        """Whether `rope_scaling` applies to a layer: not where the pretrained attention has a
        window, which meets no distance that it was not trained on (Olmo-3)."""
        return self.rope_scaling is not None and self.windows[layer] is None

    def inv_freq(self, scaled: bool = True) -> NDArray[np.float64]:
        """RoPE's angular frequencies in radians per position, float64 [head_dim / 2], with
        `rope_scaling` or, for layers that it leaves alone, without."""
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        base = self.rope_theta**-exponent
        if self.rope_scaling is None or not scaled:
            return base
        keep = _kept(self.rope_scaling, base, self.rope_theta)
        return base * (keep + (1.0 - keep) / float(self.rope_scaling["factor"]))

    @property
    def attention_factor(self) -> float:
        """By what YaRN multiplies q and k besides, in layers that it scales; else 1."""
        scaling = self.rope_scaling
        if scaling is None or scaling["rope_type"] != "yarn":
            return 1.0
        return float(scaling.get("attention_factor", 0.1 * math.log(max(scaling["factor"], 1)) + 1))

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
            "rope_scaling": self.rope_scaling and dict(self.rope_scaling),
            "rope_parameters": rope,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
            "pad_token_id": self.pad_token_id,
            **family.fixed,
            "dtype": "float32",
        }
        if family.sliding_layers:
            plain = {"rope_type": "default", "rope_theta": self.rope_theta}
            values["rope_parameters"] = {_FULL: rope, _SLIDING: plain}
        if self.is_student:
            values["architectures"] = [STUDENT_ARCHITECTURE]
            values["model_type"] = STUDENT_MODEL_TYPE
            values["family"] = self.family
            values["mixers"] = [mixer.model_dump() for mixer in self.mixers]
            if self.teacher_windows:
                values["teacher_windows"] = list(self.teacher_windows)
        if self.is_student or family.sliding_layers:
            values["layer_types"] = [_layer_type(mixer) for mixer in self.mixers]
            windows = {mixer.window for mixer in self.mixers if mixer.window is not None}
            if len(windows) == 1:
                values["sliding_window"] = windows.pop()
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
        if values.get("model_type") == STUDENT_MODEL_TYPE:
            found["mixers"] = _mixers_of(values, where)
            found["teacher_windows"] = values.get("teacher_windows") or []
        else:
            found["teacher_windows"] = _windows_of(values, family, where)
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
        return _SLIDING
    return _LAYER_TYPES[mixer.mixer]


def _check_rope_scaling(scaling: dict[str, Any] | None, theta: float) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        supported = ", ".join(map(repr, _ROPE_KEYS))
        raise ValueError(f"rope_scaling type {kind!r} is not supported; supported: {supported}")
    needed, allowed = _ROPE_KEYS[kind]
    for key in scaling:
        if key not in ("rope_type", *needed, *allowed):
            raise ValueError(f"rope_scaling {key} is not supported with type {kind!r}")
    for key in (*needed, *(key for key in allowed if key in scaling)):
        value = scaling.get(key)
        if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
            raise ValueError(f"rope_scaling needs a positive {key}, found {value!r}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must be larger than low_freq_factor")
    if kind == "yarn":
        if scaling.get("beta_fast", _BETA_FAST) <= scaling.get("beta_slow", _BETA_SLOW):
            raise ValueError("rope_scaling beta_fast must be larger than beta_slow")
        if theta <= 1:
            raise ValueError(f"rope_scaling type 'yarn' needs a rope_theta above 1, found {theta}")


def _kept(
    scaling: Mapping[str, Any], base: NDArray[np.float64], theta: float
) -> NDArray[np.float64]:
    """How much of each frequency of `base` a scaling keeps: 1 all, 0 divided by its factor.

    linear: none. llama3: by how often a pair turns within the original context, none where that is
    `low_freq_factor` times or less, all from `high_freq_factor` times on. yarn (arXiv:2309.00071;
    bounds are whole numbers, as in public implementations): by the number of the pair, all up to
    the one that turns `beta_fast` times, none from the one that turns `beta_slow` times on.
    """
    if scaling["rope_type"] == "linear":
        return np.zeros_like(base)
    context = float(scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = context * base / (2.0 * np.pi)
        return np.clip((turns - low) / (high - low), 0.0, 1.0)

    def pair(turns: float) -> float:
        return len(base) * math.log(context / (turns * 2.0 * math.pi)) / math.log(theta)

    first = max(math.floor(pair(scaling.get("beta_fast", _BETA_FAST))), 0)
    last = min(math.ceil(pair(scaling.get("beta_slow", _BETA_SLOW))), 2 * len(base) - 1)
    return 1.0 - np.clip((np.arange(len(base)) - first) / max(last - first, 1e-3), 0.0, 1.0)


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
    """rope_theta and rope_scaling from either spelling (transformers 5, and 4 before it).

    Parameters by kind of layer are taken where those of sliding layers lack the scaling alone.
    """
    theta = values.get("rope_theta")
    parameters: Any = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or _FULL not in parameters:
        return _rope_entry(parameters, theta, where)
    found = _rope_entry(parameters[_FULL], theta, where)
    sliding = _rope_entry(parameters.get(_SLIDING) or {}, found.get("rope_theta"), where)
    if sliding != {**found, "rope_scaling": None}:
        raise UserError(
            f"{where}: rope_parameters of {_SLIDING} are not supported; expected those of {_FULL} "
            "without a scaling"
        )
    return found


def _rope_entry(entry: Any, theta: float | None, where: str) -> dict[str, Any]:
    """What one mapping says; `theta` where it names none. A theta that nobody names is left out."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: rope_scaling must be a mapping, found {entry!r}")
    scaling = {key: value for key, value in entry.items() if value is not None}
    theta = scaling.pop("rope_theta", theta)
    old_spelling = scaling.pop("type", "default")
    scaling.setdefault("rope_type", old_spelling)
    factor = scaling.pop("partial_rotary_factor", 1.0)
    if factor != 1.0:
        raise UserError(f"{where}: partial_rotary_factor {factor!r} is not supported")
    found: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    return {**found, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def _pad_of(values: Mapping[str, Any]) -> int | None:
    """Llama's original files write -1 for "no padding token"."""
    pad = values.get("pad_token_id")
    return None if pad == -1 else pad


def _mixers_of(values: Mapping[str, Any], where: str) -> list[Any]:
    mixers = values.get("mixers")
    if not isinstance(mixers, list) or not mixers:
        raise UserError(f"{where}: mixers: a list with one entry per layer is needed")
    return mixers


def _windows_of(values: Mapping[str, Any], family: Family, where: str) -> list[Any]:
    """`teacher_windows` from the kinds of a pretrained model's layers."""
    kinds = values.get("layer_types") or []
    layers = values.get("num_hidden_layers") if family.sliding_layers else None
    if not isinstance(kinds, list) or layers not in (None, len(kinds)):
        raise UserError(f"{where}: layer_types: a list with one entry per layer is needed")
    supported = (_FULL, _SLIDING) if family.sliding_layers else (_FULL,)
    for kind in kinds:
        if kind not in supported:
            raise UserError(
                f"{where}: layer_types {kind!r} is not supported in a {family.name} model"
            )
    if _SLIDING not in kinds:
        return []
    if values.get("sliding_window") is None:
        raise UserError(f"{where}: sliding_window: missing, layers of {_SLIDING} need it")
    return [values["sliding_window"] if kind == _SLIDING else None for kind in kinds]
