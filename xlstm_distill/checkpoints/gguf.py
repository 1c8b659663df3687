"""GGUF files: header to configuration, tensors dequantised on demand.

The `gguf` library reads the file and dequantises. What is done here: every tensor is accounted for,
and rows of q and k that a family's files store in the adjacent-pair order are put back to the
rotate-half order of Hugging Face (and of this package).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..errors import UserError, validated
from ..families import FAMILIES, Family, Shape, gguf_name, tensor_shapes
from ..tokenizer import Tokenizer, gguf_eos_ids
from .checkpoint import Array, Checkpoint, LazyTensors, TensorSource, check_tensors

_MAGIC = b"GGUF"
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's RoPE scaling as its converters write it; only `factor` differs between models.
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Reader(gguf.GGUFReader):
    """The library's reader, which names the tensor at which a truncated file ends."""

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            _, name, _, sizes, kind, offset = field.parts
            text = bytes(name).decode("utf-8", errors="replace")
            try:
                block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            except ValueError:
                raise ValueError(f"tensor {text} has the unknown type {kind[0]}") from None
            count = 1
            for size in sizes.tolist():
                count *= size
            end = start_offs + int(offset[0]) + count // block * block_bytes
            if end > self.data.size:
                raise ValueError(
                    f"cut off in tensor {text}: it ends at byte {end}, the file at {self.data.size}"
                )
        super()._build_tensors(start_offs, fields)


def load(path: Path) -> Checkpoint:
    """Open a GGUF file.

    Raises `UserError`, one line that names the file and the tensor or key: no GGUF file, truncated
    or damaged, unknown architecture or tokenizer, tensor missing, extra or of the wrong shape. NaN
    and infinity are found when a tensor is read.
    """
    reader = _open(path)
    where = str(path)
    fields = _fields(reader, where)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    family = _family(fields, where)
    config = _config(fields, tensors, family, where)
    tensors.pop(_ROPE_FACTORS, None)
    names = {gguf_name(name): name for name in tensor_shapes(config)}
    shapes = {names.get(name, name): _shape(tensor) for name, tensor in tensors.items()}
    check_tensors(config, shapes, where)
    sources = {
        name: _source(tensors[gguf_name(name)], _heads_to_restore(config, name), where)
        for name in tensor_shapes(config)
    }
    return Checkpoint(
        config,
        LazyTensors(sources),
        tokenizer=lambda: Tokenizer.from_gguf_fields(fields, where),
        provenance={},
        source=where,
    )


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if magic != _MAGIC:
        raise UserError(
            f"{path}: not a GGUF file (it starts with {magic!r}, expected {_MAGIC!r}); of other "
            "models name the directory that holds config.json"
        )
    try:
        # Hostile lengths overflow in NumPy scalars; the reader then fails on what it finds.
        with np.errstate(over="ignore"):
            return _Reader(path)
    except Exception as error:  # the library fails in whatever way the damage leads to
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: truncated or damaged GGUF file ({reason})") from None


def _fields(reader: gguf.GGUFReader, where: str) -> dict[str, Any]:
    """The header as plain Python values."""
    found: dict[str, Any] = {}
    for key, field in reader.fields.items():
        try:
            found[key] = field.contents()
        except Exception as error:  # as above
            raise UserError(f"{where}: key {key} is damaged ({error})") from None
    return found


def _family(fields: Mapping[str, Any], where: str) -> Family:
    name = fields.get("general.architecture")
    known = {f.gguf_architecture: f for f in FAMILIES.values() if f.gguf_architecture}
    if name in known:
        if fields.get("split.count", 1) > 1:
            raise UserError(f"{where}: is one part of a split model; merge the parts first")
        return known[name]
    supported = ", ".join(sorted(known))
    raise UserError(f"{where}: architecture {name!r} is not supported; supported: {supported}")


def _config(
    fields: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
    family: Family,
    where: str,
) -> ModelConfig:
    prefix = str(family.gguf_architecture)

    def number(key: str, default: Any = None) -> Any:
        value = fields.get(f"{prefix}.{key}", default)
        if not isinstance(value, int | float):
            raise UserError(f"{where}: key {prefix}.{key} is {value!r}, a number is expected")
        return value

    if number("expert_count", 0) > 0:
        raise UserError(f"{where}: mixture of experts is not supported")
    if fields.get(f"{prefix}.rope.scaling.type", "none") != "none":
        kind = fields[f"{prefix}.rope.scaling.type"]
        raise UserError(f"{where}: {prefix}.rope.scaling.type {kind!r} is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{where}: tensor token_embd.weight is missing")
    heads, width = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", width // heads if heads else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise UserError(
                f"{where}: {prefix}.{key} {number(key)} differs from the head size {head_dim}"
            )
    vocab_size = number("vocab_size", _shape(embedding)[0])
    values: dict[str, Any] = {
        "family": family.name,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _decimal(number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(number("rope.freq_base", 10000.0)),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": family.attention_bias,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_ids": gguf_eos_ids(fields, vocab_size, where),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    config = validated(ModelConfig, values, where)
    if _ROPE_FACTORS not in tensors:
        return config
    scaling = _rope_scaling(config, tensors[_ROPE_FACTORS], where)
    return validated(ModelConfig, {**values, "rope_scaling": scaling}, where)


def _decimal(value: float) -> float:
    """The shortest decimal of a number stored as float32: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(
    config: ModelConfig, tensor: gguf.ReaderTensor, where: str
) -> dict[str, Any] | None:
    """The scaling that `rope_freqs.weight` (divisors of the frequencies, [D/2]) stands for."""
    if _shape(tensor) != (config.head_dim // 2,):
        raise UserError(
            f"{where}: tensor {_ROPE_FACTORS} has shape {list(_shape(tensor))}, "
            f"expected [{config.head_dim // 2}]"
        )
    divisors = _dequantised(tensor, where)().astype(np.float64)
    if np.array_equal(divisors, np.ones_like(divisors)):
        return None
    largest = float(divisors.max())
    if np.isfinite(largest) and largest > 1:
        scaling = {**_LLAMA3_SCALING, "factor": largest}
        scaled = config.model_copy(update={"rope_scaling": scaling})
        if np.allclose(config.inv_freq() / scaled.inv_freq(), divisors, rtol=1e-4, atol=0):
            return scaling
    raise UserError(f"{where}: tensor {_ROPE_FACTORS} is not Llama 3's scaling: not supported")


def _shape(tensor: gguf.ReaderTensor) -> Shape:
    """Row-major shape; the file lists the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _heads_to_restore(config: ModelConfig, name: str) -> int:
    """The number of heads whose rows are stored in the adjacent-pair order; 0 for other tensors."""
    if not FAMILIES[config.family].gguf_pairs_rows:
        return 0
    if ".self_attn.q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".self_attn.k_proj." in name else 0


def _source(tensor: gguf.ReaderTensor, heads: int, where: str) -> TensorSource:
    read = _dequantised(tensor, where)
    if heads:
        return TensorSource(_shape(tensor), lambda: rotate_half_rows(read(), heads), where)
    some = partial(_values, tensor, where)
    return TensorSource(_shape(tensor), read, where, lambda rows: some(tensor.data[rows]))


def _dequantised(tensor: gguf.ReaderTensor, where: str) -> Callable[[], Array]:
    return lambda: _values(tensor, where, tensor.data).reshape(_shape(tensor))


def _values(tensor: gguf.ReaderTensor, where: str, data: NDArray[Any]) -> Array:
    """What stored rows of a tensor stand for."""
    try:
        values: NDArray[Any] = gguf.dequantize(data, tensor.tensor_type)
    except (NotImplementedError, KeyError):
        raise UserError(
            f"{where}: tensor {tensor.name} has type {tensor.tensor_type.name}, "
            "which cannot be dequantised"
        ) from None
    return np.asarray(values, dtype=np.float32)


def rotate_half_rows(weight: Array, heads: int) -> Array:
    """Rows [heads * D, ...] from the adjacent-pair order to the rotate-half order of RoPE.

    Within a head, row 2j becomes row j and row 2j + 1 becomes row j + D/2.
    """
    paired = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)
