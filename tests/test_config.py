"""Configurations: what is accepted, what is refused and how it is worded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import YARN, of_family
from pydantic import ValidationError

from xlstm_distill.config import MixerConfig, ModelConfig
from xlstm_distill.errors import UserError, first_problem, validated
from xlstm_distill.families import FAMILIES, gguf_name, tensor_shapes
from xlstm_distill.linearize import student_config
from xlstm_distill.recipe import load_recipe

TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
OLMO3_7B: dict[str, Any] = {  # what decides the model in the published config.json
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


mixers = st.builds(
    MixerConfig,
    mixer=st.sampled_from(["attention", "hybrid", "mlstm", "linear", "window"]),
    window=st.integers(1, 500),
    sinks=st.integers(0, 8),
    gate=st.sampled_from(["data", "fixed"]),
    normalizer=st.sampled_from(["ratio", "max"]),
    feature_map=st.sampled_from(["softmax", "elu"]),
)


@given(
    st.lists(mixers, min_size=3, max_size=3) | st.just([]),
    st.booleans(),
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.integers(0, 299), max_size=3, unique=True),
    st.none() | st.integers(0, 299),
    st.sampled_from([None, LLAMA3, YARN, LINEAR]),
    st.floats(1.0, 1e7, exclude_min=True),
)
def test_config_json_round_trip(
    chosen: list[MixerConfig],
    tied: bool,
    family: str,
    eos: list[int],
    pad: int | None,
    scaling: dict[str, Any] | None,
    theta: float,
) -> None:
    config = tiny(
        **{
            **of_family(family, 3),
            "mixers": chosen,
            "tie_word_embeddings": tied,
            "eos_token_ids": eos,
            "pad_token_id": pad,
            "rope_scaling": scaling,
            "rope_theta": theta,
        },
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_plain_model_keeps_its_architecture_and_a_student_does_not() -> None:
    assert tiny().to_hf()["model_type"] == "llama"
    assert "mixers" not in tiny().to_hf()
    hybrid = MixerConfig(mixer="hybrid", window=64, sinks=4)
    student = tiny(mixers=[MixerConfig(), hybrid, MixerConfig(mixer="window", window=64)]).to_hf()
    assert student["model_type"] == "xlstm_distill"
    assert student["layer_types"] == ["full_attention", "hybrid", "sliding_attention"]
    assert student["sliding_window"] == 64
    assert student["mixers"][1]["sinks"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, "'Phi3ForCausalLM'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"model_type": None, "architectures": None}, "supported: LlamaForCausalLM, Olmo2"),
        ({"model_type": "xlstm_distill", "family": "mamba"}, "family 'mamba'"),
        ({"model_type": "xlstm_distill", "family": "llama"}, "mixers: a list"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported; expected False"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "'sliding_attention' is not supported in a llama"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"vocab_size": 0}, "vocab_size: .*found 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": None, "hidden_size": 25}, "give no head_dim"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": 300}, r"eos_token_ids\[0\] 300 is outside the vocabulary of 300"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_scaling type 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling needs a positive original_max_position_embeddings, found None",
        ),
        ({"rope_parameters": {**YARN, "mscale": 0.7}}, "rope_scaling mscale is not supported"),
        (
            {"rope_parameters": {**YARN, "beta_slow": 2.0}},
            "beta_fast must be larger than beta_slow",
        ),
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta above 1, found 1.0"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "llama3"}},
            "rope_scaling needs a positive factor",
        ),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be"),
        ({"rope_parameters": "linear"}, "rope_scaling must be a mapping"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_scaling type"),
        ({"layer_types": 3}, "layer_types: a list"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    values = tiny().to_hf() | change
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf(values, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert "\n" not in str(caught.value)


def test_olmo3_as_published() -> None:
    config = ModelConfig.from_hf(OLMO3_7B)
    assert config.windows == [4096, 4096, 4096, None] * 8 and not config.is_student
    assert [config.scales_rope(layer) for layer in range(4)] == [False, False, False, True]
    assert config.attention_factor == pytest.approx(1 + math.log(8) / 10)
    written = config.to_hf()
    for key in ("layer_types", "sliding_window", "rope_theta", "rope_scaling"):
        assert written[key] == OLMO3_7B[key]
    assert ModelConfig.from_hf(written) == config
    choice = load_recipe("olmo-3-7b").student.model_dump(exclude={"keep_attention"})
    student = student_config(config, "Olmo-3-7B", [31], **choice)
    assert [m.window for m in student.mixers] == [512] * 31 + [None]
    assert {m.mixer for m in student.mixers[:31]} == {"hybrid"}
    assert ModelConfig.from_hf(student.to_hf()) == student
    wide = student_config(config, "Olmo-3-7B", [], **{**choice, "window": None})
    assert [m.window for m in wide.mixers] == config.windows
    # A key that other families do not have stays out of what their fingerprints are made of.
    assert "teacher_windows" in student.model_dump()
    assert "teacher_windows" not in tiny().model_dump()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": None}, "layer_types: a list with one entry per layer is needed"),
        ({"layer_types": ["full_attention"]}, "layer_types: a list with one entry per layer"),
        ({"layer_types": ["chunked_attention"] * 32}, "'chunked_attention' is not supported in a"),
        ({"sliding_window": None}, "sliding_window: missing"),
        ({"sliding_window": 0}, r"one size of at least 1, found \[0\]"),
        (
            {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), YARN)},
            "rope_parameters of sliding_attention are not supported",
        ),
        ({"attention_bias": True}, "attention_bias True is not supported"),
    ],
)
def test_olmo3_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf(OLMO3_7B | change, "config.json")
    assert str(caught.value).startswith("config.json: ")


def test_windows_must_fit() -> None:
    for changes, message in (
        ({"teacher_windows": [4, 4, 4]}, "do not fit family 'llama'"),
        ({**of_family("olmo3", 2)}, "teacher_windows has 2 entries for 3 layers"),
        ({**of_family("olmo3", 3), "teacher_windows": [4, 5, None]}, "needs one size"),
    ):
        with pytest.raises(UserError, match=message):
            validated(ModelConfig, {**TINY, **changes}, "x")
    none = tiny(**{**of_family("olmo3", 3), "teacher_windows": [None] * 3})
    assert none.teacher_windows == [] and ModelConfig.from_hf(none.to_hf()) == none


def test_a_family_decides_its_biases() -> None:
    qwen2 = tiny(**of_family("qwen2")).to_hf()
    assert qwen2["architectures"] == ["Qwen2ForCausalLM"] and "attention_bias" not in qwen2
    with pytest.raises(UserError, match="use_sliding_window True is not supported"):
        ModelConfig.from_hf(qwen2 | {"use_sliding_window": True})
    del qwen2["rms_norm_eps"]
    assert ModelConfig.from_hf(qwen2).rms_norm_eps == 1e-6
    with pytest.raises(UserError, match="attention_bias True does not fit family 'llama'"):
        validated(ModelConfig, {**TINY, "attention_bias": True}, "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"mixer": "window"}, "needs a window"),
        ({"mixer": "lolcats"}, "mixer 'lolcats' needs a window"),
        ({"mixer": "mamba"}, "mixer: "),
        ({"windw": 64}, "windw: unknown key"),
    ],
)
def test_bad_mixers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MixerConfig(**values)
    assert message in first_problem(caught.value)
    with pytest.raises(UserError, match=f"mixers.1.*{message}"):
        validated(ModelConfig, {**TINY, "mixers": [{}, values, {}]}, "config.json")


def test_mixers_must_match_the_layers() -> None:
    with pytest.raises(UserError, match="mixers has 2 entries for 3 layers"):
        validated(ModelConfig, {**TINY, "mixers": [{}, {}]}, "x")
    assert tiny().mixers == [MixerConfig()] * 3


def test_old_spellings_of_rope_and_padding() -> None:
    values = tiny().to_hf()
    del values["rope_parameters"]
    values |= {"rope_theta": 5e5, "rope_scaling": {**LLAMA3}, "pad_token_id": -1}
    config = ModelConfig.from_hf(values)
    assert (config.rope_theta, config.rope_scaling, config.pad_token_id) == (5e5, LLAMA3, None)


QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "scaling", [None, LINEAR, LLAMA3, QWEN_YARN, {**YARN, "attention_factor": 0.9}, "olmo3"]
)
def test_rope_equals_transformers(scaling: Any) -> None:
    scaling = OLMO3_7B["rope_scaling"] if scaling == "olmo3" else scaling
    transformers = pytest.importorskip("transformers")
    config = tiny(head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    theirs = transformers.LlamaConfig(**config.to_hf())
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    assert config.inv_freq().dtype == np.float64
    np.testing.assert_allclose(config.inv_freq(), module.inv_freq.numpy(), rtol=1e-6)
    assert config.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)


def test_tensor_table() -> None:
    hybrid = MixerConfig(mixer="hybrid", window=8)
    fixed = MixerConfig(mixer="hybrid", window=8, gate="fixed")
    linear, lolcats = MixerConfig(mixer="linear"), MixerConfig(mixer="lolcats", window=8)
    mixers = [hybrid, fixed, linear, lolcats]
    shapes = tensor_shapes(tiny(num_hidden_layers=4, mixers=mixers, **of_family("qwen2")))
    assert shapes["lm_head.weight"] == (300, 24)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (24, 24)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (12,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes
    mixer = {
        n.removeprefix("model.layers.0.mixer."): s for n, s in shapes.items() if "s.0.mix" in n
    }
    assert mixer == {
        "map_q": (4, 6, 6),
        "map_k": (4, 6, 6),
        "i_proj.weight": (4, 24),
        "i_proj.bias": (4,),
        "f_proj.weight": (4, 24),
        "f_proj.bias": (4,),
        "o_gate.weight": (4, 18),
        "o_gate.bias": (4,),
    }
    assert "model.layers.1.mixer.o_gate.weight" not in shapes
    assert "model.layers.1.mixer.o_gate.bias" in shapes
    assert [n for n in shapes if "s.2.mixer" in n] == [
        "model.layers.2.mixer.map_q",
        "model.layers.2.mixer.map_k",
    ]
    assert [n.removeprefix("model.layers.3.mixer.") for n in shapes if "s.3.mixer" in n] == [
        "map_q",
        "map_k",
        "window_factor",
    ]
    assert "lm_head.weight" not in tensor_shapes(tiny(tie_word_embeddings=True))
    assert gguf_name("model.layers.12.mlp.down_proj.weight") == "blk.12.ffn_down.weight"


def test_user_error_is_one_line() -> None:
    error = UserError("two\n lines", usage=True)
    assert str(error) == "two lines"
    assert error.usage and not UserError("x").usage
    assert isinstance(error, ValueError)
