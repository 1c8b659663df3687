"""Model directories in Hugging Face's layout: read strictly, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import atomic_directory
from ..config import ModelConfig
from ..errors import UserError
from ..families import Shape, tensor_shapes
from ..json_files import read_json
from ..tokenizer import Tokenizer
from . import safetensors
from .checkpoint import Array, Checkpoint, LazyTensors, TensorSource, check_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
PROVENANCE = "provenance.json"


def load(folder: Path) -> Checkpoint:
    """Open a model directory: `config.json`, one safetensors file or shards with an index.

    Every tensor is accounted for. Raises `UserError` naming the file and the key or tensor.
    """
    values = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    # The end tokens of generation_config.json are the ones that end a generation.
    if generation.get("eos_token_id") is not None:
        values["eos_token_id"] = generation["eos_token_id"]
    config = ModelConfig.from_hf(values, str(folder / CONFIG))
    sources = _sources(folder)
    _drop_redundant(config, sources)
    check_tensors(config, {name: s.shape for name, s in sources.items()}, str(folder))
    provenance = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    return Checkpoint(
        config,
        LazyTensors({name: sources[name] for name in tensor_shapes(config)}),
        tokenizer=lambda: _tokenizer(folder, config),
        provenance=provenance,
        source=str(folder),
    )


def save(
    directory: Path | str,
    config: ModelConfig,
    tensors: Mapping[str, Array],
    tokenizer: Tokenizer | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model directory; one that is there is replaced as a whole, at once.

    `tensors` are float32 under Hugging Face's names and exactly those of `config`; they are
    written one at a time. Loading gives them back bit for bit. Raises `UserError` if a tensor is
    missing, extra or of the wrong shape, or if the disk is full: then nothing has changed.
    """
    shapes = {name: _shape_of(tensors, name) for name in tensors}
    check_tensors(config, shapes, str(directory))
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    with atomic_directory(directory, CONFIG) as work:
        write_json(work / CONFIG, config.to_hf())
        write_json(work / GENERATION, {k: v for k, v in generation.items() if v is not None})
        write_json(work / PROVENANCE, dict(provenance or {}))
        if tokenizer is not None:
            tokenizer.save(work)
        safetensors.write_file(work / WEIGHTS, tensors, tensor_shapes(config))
    return Path(directory)


def _shape_of(tensors: Mapping[str, Array], name: str) -> Shape:
    if isinstance(tensors, LazyTensors):
        return tensors.shape(name)
    return tuple(np.shape(tensors[name]))


def _sources(folder: Path) -> dict[str, TensorSource]:
    if (folder / WEIGHTS).is_file():
        return safetensors.open_file(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _shards(folder)
    found = next((p.name for p in sorted(folder.glob("*.bin"))), None)
    hint = f"; {found} must be converted to safetensors first" if found else ""
    raise UserError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}{hint}")


def _shards(folder: Path) -> dict[str, TensorSource]:
    """Tensors of all shards; the index and the shards must agree on every name."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensors to files")
    sources: dict[str, TensorSource] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UserError(f"{index}: shard {shard!r} is missing")
        for name, source in safetensors.open_file(folder / shard).items():
            if weight_map.get(name) != shard:
                raise UserError(f"{folder / shard}: tensor {name} is not listed in {INDEX}")
            sources[name] = source
    for name, shard in weight_map.items():
        if name not in sources:
            raise UserError(f"{folder / shard}: tensor {name} is missing, though {INDEX} lists it")
    return sources


def _drop_redundant(config: ModelConfig, sources: dict[str, TensorSource]) -> None:
    """Take out tensors that some files hold though the configuration already gives them.

    They must agree with it: a tied head equal to the embedding, and RoPE's frequencies.
    """
    head, embedding = sources.get("lm_head.weight"), sources.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
            raise UserError(
                f"{head.where}: tensor lm_head.weight differs from model.embed_tokens.weight, "
                "though config.json says tie_word_embeddings"
            )
        del sources["lm_head.weight"]
    for name in [n for n in sources if n.endswith(".self_attn.rotary_emb.inv_freq")]:
        source, expected = sources[name], config.inv_freq()
        # Stored in as little as 8 bits of mantissa.
        if source.shape != expected.shape or not np.allclose(source.read(), expected, rtol=1e-2):
            raise UserError(f"{source.where}: tensor {name} differs from config.json's RoPE")
        del sources[name]


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_directory(folder, config.eos_token_ids or None)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
