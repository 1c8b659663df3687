"""Model families: what a checkpoint of each architecture is called and which tensors it holds.

A family is data, not code: names in `config.json` and in GGUF headers, the fixed values the model
code relies on, and the table of tensors. Another family is another `Family` entered in `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MixerConfig, ModelConfig

Shape = tuple[int, ...]

# Mixers whose layers carry feature maps and mLSTM or linear-attention state.
STATEFUL_MIXERS = ("hybrid", "mlstm", "linear", "lolcats")


@dataclass(frozen=True)
class Family:
    """One architecture.

    `fixed` lists keys of `config.json` that change the mathematics and the one value that the
    model code implements: any other value is refused by name. A key that is absent has that value.
    `attention_bias`: q, k and v have biases (o has none). `rms_norm_eps` is what a `config.json`
    without that key means. `post_norm`: the norms stand behind attention and MLP, before the
    addition to the stream, not before them. `qk_norm`: q and k are normalised over all their heads,
    before RoPE. `sliding_layers`: some layers (`layer_types`) see a window and have a RoPE without
    scaling. `gguf_architecture` None: GGUF files are not read. `gguf_pairs_rows`: they store
    the rows of q and k in the order of adjacent pairs.
    """

    name: str
    model_type: str
    architecture: str
    gguf_architecture: str | None = None
    gguf_pairs_rows: bool = False
    attention_bias: bool = False
    post_norm: bool = False
    qk_norm: bool = False
    sliding_layers: bool = False
    rms_norm_eps: float = 1e-6
    fixed: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    gguf_pairs_rows=True,
    # Hugging Face's attention_bias puts biases on all four projections; the core has none for o.
    fixed=MappingProxyType(
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 1.0,
        }
    ),
)
QWEN2 = Family(  # Qwen2 and Qwen2.5
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    attention_bias=True,
    fixed=MappingProxyType(
        {"hidden_act": "silu", "use_sliding_window": False, "partial_rotary_factor": 1.0}
    ),
)
OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    post_norm=True,
    qk_norm=True,
    rms_norm_eps=1e-5,
    fixed=MappingProxyType(
        {"hidden_act": "silu", "attention_bias": False, "partial_rotary_factor": 1.0}
    ),
)
OLMO3 = replace(
    OLMO2,
    name="olmo3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    sliding_layers=True,
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN2, OLMO2, OLMO3)}


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model, name to shape, in the order of the layers.

    Names are Hugging Face's; a student's mixer adds `model.layers.{i}.mixer.*`.
    """
    c = config
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for i, mixer in enumerate(c.mixers):
        shapes.update(_layer_shapes(c, f"model.layers.{i}."))
        shapes.update(mixer_shapes(c, mixer, f"model.layers.{i}.mixer."))
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def _layer_shapes(c: ModelConfig, prefix: str) -> dict[str, Shape]:
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    family = FAMILIES[c.family]
    shapes: dict[str, Shape] = {}
    if not family.post_norm:
        shapes[prefix + "input_layernorm.weight"] = (c.hidden_size,)
    rows = {"q": heads, "k": groups, "v": groups, "o": c.hidden_size}
    for letter, size in rows.items():
        columns = heads if letter == "o" else c.hidden_size
        shapes[f"{prefix}self_attn.{letter}_proj.weight"] = (size, columns)
        if c.attention_bias and letter != "o":
            shapes[f"{prefix}self_attn.{letter}_proj.bias"] = (size,)
    if family.qk_norm:
        shapes[prefix + "self_attn.q_norm.weight"] = (heads,)
        shapes[prefix + "self_attn.k_norm.weight"] = (groups,)
    shapes[prefix + "post_attention_layernorm.weight"] = (c.hidden_size,)
    shapes[prefix + "mlp.gate_proj.weight"] = (c.intermediate_size, c.hidden_size)
    shapes[prefix + "mlp.up_proj.weight"] = (c.intermediate_size, c.hidden_size)
    shapes[prefix + "mlp.down_proj.weight"] = (c.hidden_size, c.intermediate_size)
    if family.post_norm:
        shapes[prefix + "post_feedforward_layernorm.weight"] = (c.hidden_size,)
    return shapes


def mixer_shapes(c: ModelConfig, mixer: MixerConfig, prefix: str) -> dict[str, Shape]:
    """The tensors that a student's mixer adds to a layer; none for `attention` and `window`."""
    if mixer.mixer not in STATEFUL_MIXERS:
        return {}
    h, d, width = c.num_attention_heads, c.head_dim, c.hidden_size
    shapes: dict[str, Shape] = {prefix + "map_q": (h, d, d), prefix + "map_k": (h, d, d)}
    if mixer.mixer == "lolcats":
        shapes[prefix + "window_factor"] = (h,)
    elif mixer.mixer != "linear":
        for gate in ("i_proj", "f_proj"):
            shapes[f"{prefix}{gate}.weight"] = (h, width)
            shapes[f"{prefix}{gate}.bias"] = (h,)
    if mixer.mixer == "hybrid":
        if mixer.gate == "data":
            shapes[prefix + "o_gate.weight"] = (h, 3 * d)
        shapes[prefix + "o_gate.bias"] = (h,)
    return shapes


_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """The name that a GGUF file gives to the tensor `name` (Hugging Face) of a plain model."""
    if name in _GGUF_OUTER_NAMES:
        return _GGUF_OUTER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[part]}.{kind}"
