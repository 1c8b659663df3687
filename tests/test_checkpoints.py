"""Checkpoints: GGUF and directories in, directories out; every tensor and every damage named."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
from models import of_family
from numpy.typing import NDArray

from xlstm_distill import checkpoints
from xlstm_distill.checkpoints.gguf import rotate_half_rows
from xlstm_distill.config import MixerConfig, ModelConfig
from xlstm_distill.errors import UserError
from xlstm_distill.families import FAMILIES, gguf_name, tensor_shapes
from xlstm_distill.tokenizer import Tokenizer

Tensors = dict[str, NDArray[np.float32]]

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 256,
    "eos_token_ids": [257],
}
IN_GGUF = [name for name, family in FAMILIES.items() if family.gguf_architecture]


def make_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SIZES, **changes})


def make_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s, dtype=np.float32) for n, s in tensor_shapes(config).items()}


def adjacent_pairs(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The order in which GGUF files store q and k: row j + s D/2 of a head goes to 2j + s."""
    stored = np.empty_like(weight)
    size = weight.shape[0] // heads
    for row in range(weight.shape[0]):
        head, place = divmod(row, size)
        half, j = divmod(place, size // 2)
        stored[head * size + 2 * j + half] = weight[row]
    return stored


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Tensors,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    extra: Tensors | None = None,
    architecture: str = "",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture or config.family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    letters = [chr(b) if chr(b).isprintable() and b != 32 else chr(256 + b) for b in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, "<s>", "</s>", "ab", "<u>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 4])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for key, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        stored = tensor
        if config.family == "llama" and ".q_proj." in name:
            stored = adjacent_pairs(tensor, config.num_attention_heads)
        elif config.family == "llama" and ".k_proj." in name:
            stored = adjacent_pairs(tensor, config.num_key_value_heads)
        if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, message: str) -> None:
    """Loading (and reading every tensor) gives one line that starts with a path."""
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load(path).fingerprint  # noqa: B018 (reads every tensor)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path))


# ---------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", IN_GGUF)
def test_gguf_gives_the_tensors_back(tmp_path: Path, tied: bool, family: str) -> None:
    config = make_config(tie_word_embeddings=tied, **of_family(family))
    tensors = make_tensors(config)
    loaded = checkpoints.load(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert loaded.config == config
    assert list(loaded.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == np.float32
        assert np.array_equal(loaded.tensors[name], tensor), name
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.vocab_size == 260
    assert loaded.tokenizer.encode("cab<s><u>") == [ord("c"), 258, 256, 259]
    assert loaded.tokenizer.decode([99, 258, 256, 259], skip_special=True) == "cab<u>"
    assert loaded.fingerprint == checkpoints.fingerprint(config, tensors)
    assert checkpoints.load(tmp_path).fingerprint == loaded.fingerprint


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_types(tmp_path: Path, kind: str) -> None:
    config = make_config()
    tensors = make_tensors(config)
    sort = gguf.GGMLQuantizationType[kind]
    loaded = checkpoints.load(write_gguf(tmp_path / "m.gguf", config, tensors, kind=sort))
    # A step of a 4-bit block of 32 normal values is about 4/15; others are finer.
    bound = {"F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}.get(kind, 0.35)
    for name, tensor in tensors.items():
        assert np.abs(loaded.tensors[name] - tensor).max() <= bound, name


def test_rotate_half_rows_undoes_the_stored_order() -> None:
    weight = np.arange(4 * 6 * 3, dtype=np.float32).reshape(24, 3)
    assert np.array_equal(rotate_half_rows(adjacent_pairs(weight, 4), 4), weight)
    assert np.array_equal(rotate_half_rows(adjacent_pairs(weight[:, 0], 4), 4), weight[:, 0])


def test_gguf_rope_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = make_config(rope_theta=5e5, rope_scaling=scaling)
    plain = make_config(rope_theta=5e5)
    tensors = make_tensors(config)
    factors = (plain.inv_freq() / config.inv_freq()).astype(np.float32)
    cases = {"llama3": factors, "ones": np.ones_like(factors), "odd": factors[::-1].copy()}
    for name, values in cases.items():
        write_gguf(tmp_path / name, config, tensors, extra={"rope_freqs.weight": values})
    found = checkpoints.load(tmp_path / "llama3").config
    assert np.allclose(found.inv_freq(), config.inv_freq(), rtol=1e-6)
    assert checkpoints.load(tmp_path / "ones").config == plain
    refused(tmp_path / "odd", "rope_freqs.weight is not Llama 3's scaling")


def test_gguf_refusals(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)

    def case(message: str, **options: Any) -> None:
        values = options.pop("tensors", tensors)
        refused(write_gguf(tmp_path / "m.gguf", config, values, **options), message)

    case("architecture 'olmo2' is not supported", architecture="olmo2")
    case("architecture 'phi3' is not supported; supported: llama, qwen2", architecture="phi3")
    bias = {"blk.0.attn_q.bias": np.ones(64, "f4")}
    case("tensor blk.0.attn_q.bias is not part of the model", extra=bias)
    missing = dict(tensors)
    del missing["model.layers.1.mlp.up_proj.weight"]
    case("tensor model.layers.1.mlp.up_proj.weight is missing", tensors=missing)
    case("tensor blk.0.odd.weight is not part", extra={"blk.0.odd.weight": np.ones(4, "f4")})
    name = "model.layers.0.self_attn.v_proj.weight"
    wrong = {**tensors, name: np.ones((32, 32), "f4")}
    case(rf"tensor {name} has shape \[32, 32\], expected \[32, 64\]", tensors=wrong)
    for value in (np.nan, np.inf):
        bad = tensors[name].copy()
        bad[3, 5] = value
        case(rf"tensor {name} holds {value} at \[3, 5\]", tensors={**tensors, name: bad})
    case("mixture of experts", fields={"llama.expert_count": 4})
    case("rope.scaling.type 'yarn'", fields={"llama.rope.scaling.type": "yarn"})
    case("rope.dimension_count 8 differs", fields={"llama.rope.dimension_count": 8})
    case("one part of a split model", fields={"split.count": 2})
    case("eom_token_id 260 is outside", fields={"tokenizer.ggml.eom_token_id": 260})
    case("vocab_size.*|embed_tokens.*", fields={"llama.vocab_size": 259})


def test_gguf_of_the_wrong_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    refused(path, "not a GGUF file .*b'GGML'")
    path.write_bytes(b"")
    refused(path, "not a GGUF file")
    path.write_bytes(b"GGUF" + bytes(2))
    refused(path, "truncated or damaged")
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load(tmp_path / "nothing.gguf")


def test_an_unknown_quantisation_names_the_tensor(tmp_path: Path) -> None:
    config = make_config()
    path = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    reader = gguf.GGUFReader(path)
    kind = reader.tensors[2].field.parts[4]
    at = kind.ctypes.data - reader.data.ctypes.data
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 4] = (200).to_bytes(4, "little")
    path.write_bytes(damaged)
    refused(path, f"tensor {reader.tensors[2].name} has the unknown type 200")


def test_truncated_gguf_names_the_tensor(tmp_path: Path) -> None:
    config = make_config()
    path = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    reader = gguf.GGUFReader(path)
    third = reader.tensors[2]
    start = reader.data_offset
    whole = path.read_bytes()
    path.write_bytes(whole[: third.data_offset + 100])
    refused(path, f"cut off in tensor {third.name}")
    for size in random.Random(1).sample(range(4, start), 60):
        path.write_bytes(whole[:size])
        refused(path, "truncated or damaged|cut off")


def test_damaged_gguf_header_is_a_user_error(tmp_path: Path) -> None:
    """Random bytes in the header either do not matter or give one line."""
    config = make_config()
    path = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    whole = path.read_bytes()
    start = gguf.GGUFReader(path).data_offset
    rng = random.Random(2)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(8, start)] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            loaded = checkpoints.load(path)
            loaded.fingerprint  # noqa: B018 (reads every tensor)
            loaded.tokenizer  # noqa: B018 (builds it)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)


# ---------------------------------------------------------------------- directories


def student_config() -> ModelConfig:
    return make_config(
        num_hidden_layers=6,
        eos_token_ids=[257, 3],
        pad_token_id=0,
        mixers=[
            MixerConfig(mixer="hybrid", window=8, sinks=2),
            MixerConfig(mixer="hybrid", window=16, gate="fixed", normalizer="max"),
            MixerConfig(mixer="mlstm"),
            MixerConfig(mixer="linear", feature_map="elu"),
            MixerConfig(mixer="window", window=8, sinks=1),
            MixerConfig(mixer="lolcats", window=8),
        ],
    )


@pytest.mark.parametrize("config", [make_config(tie_word_embeddings=True), student_config()])
def test_round_trip_is_bitwise(tmp_path: Path, config: ModelConfig) -> None:
    tensors = make_tensors(config)
    name = "model.norm.weight"
    tensors[name][:4] = [-0.0, 1e-45, 3.4028235e38, np.nextafter(np.float32(1), np.float32(2))]
    provenance = {"recipe": {"window": 8}, "text": "naïve"}
    checkpoints.save(tmp_path / "a", config, tensors, None, provenance)
    first = checkpoints.load(tmp_path / "a")
    checkpoints.save(tmp_path / "b", first.config, first.tensors, first.tokenizer, first.provenance)
    second = checkpoints.load(tmp_path / "b")
    assert second.config == config
    assert second.provenance == provenance
    assert second.tokenizer is None
    assert list(second.tensors) == list(tensors)
    for key, tensor in tensors.items():
        assert second.tensors[key].tobytes() == tensor.tobytes(), key
    assert second.fingerprint == first.fingerprint == checkpoints.fingerprint(config, tensors)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    plain = safetensors.numpy.load_file(tmp_path / "a" / "model.safetensors")
    assert all(np.array_equal(plain[key], tensors[key]) for key in tensors)


def test_fingerprint_sees_every_part() -> None:
    config = make_config()
    tensors = make_tensors(config)
    base = checkpoints.fingerprint(config, tensors)
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"].copy()}
    changed["model.norm.weight"][5] += 1e-6
    assert checkpoints.fingerprint(config, changed) != base
    assert checkpoints.fingerprint(make_config(rope_theta=2.0), tensors) != base
    assert checkpoints.fingerprint(config, dict(reversed(tensors.items()))) == base


def test_saving_over_its_own_source(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    checkpoints.save(tmp_path / "m", config, tensors)
    loaded = checkpoints.load(tmp_path / "m")
    checkpoints.save(tmp_path / "m", config, loaded.tensors, provenance={"round": 2})
    assert checkpoints.load(tmp_path / "m").fingerprint == loaded.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_directories(tmp_path: Path, family: str, dtype: str, tied: bool) -> None:
    """What transformers writes, single or in shards, and what it reads of ours."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = make_config(tie_word_embeddings=tied, **of_family(family))
    values = transformers.AutoConfig.for_model(**config.to_hf())
    theirs = transformers.AutoModelForCausalLM.from_config(values, dtype=getattr(torch, dtype))
    for shard_size, files in (("5GB", 1), ("100KB", 2)):
        folder = tmp_path / shard_size
        theirs.save_pretrained(folder, max_shard_size=shard_size)
        assert len(list(folder.glob("*.safetensors"))) >= files
        loaded = checkpoints.load(folder)
        assert loaded.config == config
        state = theirs.state_dict()
        for name in loaded.tensors:
            assert np.array_equal(loaded.tensors[name], state[name].float().numpy()), name
    checkpoints.save(tmp_path / "ours", loaded.config, loaded.tensors)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name].float()), name


def test_redundant_tensors_must_agree(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    tensors = make_tensors(config)
    checkpoints.save(tmp_path / "m", config, tensors)
    weights = tmp_path / "m" / "model.safetensors"
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = {
        **tensors,
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        frequencies: config.inv_freq().astype(np.float32),
    }
    safetensors.numpy.save_file(more, weights)
    assert list(checkpoints.load(tmp_path / "m").tensors) == list(tensors)
    safetensors.numpy.save_file({**more, "lm_head.weight": -more["lm_head.weight"]}, weights)
    refused(tmp_path / "m", "lm_head.weight differs from model.embed_tokens.weight")
    safetensors.numpy.save_file({**more, frequencies: np.ones(8, "f4")}, weights)
    refused(tmp_path / "m", "inv_freq differs from config.json's RoPE")


def test_directory_refusals(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    folder = tmp_path / "m"
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"

    def case(message: str, change: Callable[[], object]) -> None:
        checkpoints.save(folder, config, tensors)
        change()
        refused(folder, message)
        shutil.rmtree(folder)

    def with_tensors(**changes: Any) -> Callable[[], None]:
        values = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        return lambda: safetensors.numpy.save_file(values, weights)

    def edit_config(**changes: Any) -> Callable[[], object]:
        text = json.dumps(config.to_hf() | changes)
        return lambda: (folder / "config.json").write_text(text)

    name = "model.norm.weight"
    nan = tensors[name].copy()
    nan[7] = np.nan
    case(f"tensor {name} is missing", with_tensors(**{name: None}))
    case("tensor odd is not part of the model", with_tensors(odd=nan))
    case(rf"{name} has shape \[3\], expected \[64\]", with_tensors(**{name: np.ones(3, "f4")}))
    case(f"{name} has type I32", with_tensors(**{name: np.ones(64, "i4")}))
    case(rf"model.safetensors: tensor {name} holds nan at \[7\]", with_tensors(**{name: nan}))
    case("config.json: architecture 'GPT2LMHead'", edit_config(architectures=["GPT2LMHead"]))
    case("config.json: not valid JSON", lambda: (folder / "config.json").write_text("{"))
    case("config.json: a JSON object", lambda: (folder / "config.json").write_text("[]"))
    case("config.json: not valid JSON", lambda: (folder / "config.json").write_text("[" * 100_000))
    case("config.json: not UTF-8", lambda: (folder / "config.json").write_bytes(b"\xff"))
    case("config.json: has 100 MiB", lambda: os.truncate(folder / "config.json", 100 << 20))
    case("holds neither config.json nor", (folder / "config.json").unlink)
    case("holds neither model.safetensors nor", weights.unlink)
    case("x.bin must be converted", lambda: weights.rename(folder / "x.bin"))
    size = 8 * 1024
    case("cut off in tensor model", lambda: os.truncate(weights, size))
    case("not a valid safetensors file", lambda: os.truncate(weights, 20))
    case("not a valid safetensors file", lambda: weights.write_bytes(b"\xff" * 64))

    def shards(**weight_map: str) -> Callable[[], None]:
        def write() -> None:
            weights.rename(folder / "one.safetensors")
            full = dict.fromkeys(tensors, "one.safetensors") | weight_map
            index.write_text(json.dumps({"weight_map": {k: v for k, v in full.items() if v}}))

        return write

    case(r"shard '../one.safetensors' is missing", shards(odd="../one.safetensors"))
    case("tensor odd is missing, though", shards(odd="one.safetensors"))
    case(f"tensor {name} is not listed in", shards(**{name: ""}))


def test_tokenizer_must_fit(tmp_path: Path) -> None:
    config = make_config()
    path = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    tokenizer = checkpoints.load(path).tokenizer
    assert isinstance(tokenizer, Tokenizer)
    small = make_config(vocab_size=259)
    checkpoints.save(tmp_path / "m", small, make_tensors(small), tokenizer)
    with pytest.raises(UserError, match="the tokenizer has 260 tokens, the model only 259"):
        checkpoints.load(tmp_path / "m").tokenizer  # noqa: B018 (built at the first use)


def test_end_tokens_of_generation_config_count(tmp_path: Path) -> None:
    config = make_config()
    checkpoints.save(tmp_path / "m", config, make_tensors(config))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert checkpoints.load(tmp_path / "m").config.eos_token_ids == [3, 4]


# ---------------------------------------------------------------------- writing


def test_save_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    with pytest.raises(UserError, match="tensor odd is not part of the model"):
        checkpoints.save(tmp_path / "m", config, {**tensors, "odd": np.ones(2, "f4")})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        checkpoints.save(tmp_path, config, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_write_that_fails_half_way_loses_nothing(tmp_path: Path) -> None:
    config = make_config()
    checkpoints.save(tmp_path / "m", config, make_tensors(config))
    before = checkpoints.load(tmp_path / "m").fingerprint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"m: cannot write: .*; nothing was changed"):
            checkpoints.save(tmp_path / "m", config, make_tensors(config, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.load(tmp_path / "m").fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_full_disk_at_sync_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    checkpoints.save(tmp_path / "m", config, make_tensors(config))
    before = checkpoints.load(tmp_path / "m").fingerprint

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        checkpoints.save(tmp_path / "m", config, make_tensors(config, seed=1))
    assert checkpoints.load(tmp_path / "m").fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
