"""LoRA adapters as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

Source: PEFT's description of its checkpoint files,
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..atomic import atomic_directory
from ..errors import UserError
from ..json_files import read_json
from . import safetensors
from .checkpoint import Array, LazyTensors
from .directory import PROVENANCE, write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What PEFT's wrappers put before the names of the model."""
_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
}
"""Keys that change the mathematics, with the one value that is implemented (and is PEFT's where a
key is absent, `peft_type` excepted)."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of `init_lora_weights` that decide the start of the factors alone; with others ("pissa",
"olora" ...) the base is another one, too, which PEFT makes whenever it loads the adapter."""


class Adapter(NamedTuple):
    """An adapter as it lies in files.

    `tensors`: float32 under the model's names: `MODULE.lora_A.weight` [rank, inputs] and
    `MODULE.lora_B.weight` [outputs, rank] of every adapted module, and the tensors of modules that
    were trained whole (PEFT's `modules_to_save`), as they are called in the model.
    """

    rank: int
    alpha: float
    tensors: Mapping[str, Array]


def save_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    targets: Sequence[str],
    whole: Sequence[str],
    base: str,
    provenance: Mapping[str, Any],
) -> Path:
    """Write an adapter (atomic). By `targets` and `whole`, last parts of names, PEFT finds the
    modules that are adapted and those that were trained whole; `base` says where the base model is.
    """
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    config = {
        "peft_type": _FIXED["peft_type"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "modules_to_save": list(whole) or None,
        "lora_dropout": 0.0,
        "bias": _FIXED["bias"],
        "fan_in_fan_out": _FIXED["fan_in_fan_out"],
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {_PREFIX + name: value for name, value in adapter.tensors.items()}
    shapes = {name: tuple(np.shape(value)) for name, value in tensors.items()}
    with atomic_directory(directory, ADAPTER_CONFIG) as work:
        write_json(work / ADAPTER_CONFIG, config)
        write_json(work / PROVENANCE, provenance)
        safetensors.write_file(work / ADAPTER_WEIGHTS, tensors, shapes)
    return Path(directory)


def load_adapter(directory: str | Path) -> Adapter:
    """Open an adapter; tensors are read when they are asked for.

    Raises UserError, naming file and key or tensor: not LoRA, or a variant of it that is not
    implemented (DoRA, rank-stabilised scale, trained biases, ranks by pattern, a start that changes
    the base, ...); a wrong value.
    """
    folder = Path(directory)
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    if config.get("peft_type") is None:
        raise UserError(f"{file}: peft_type is missing: not an adapter of PEFT")
    for key, expected in _FIXED.items():
        if config.get(key, expected) not in (expected, None):
            raise UserError(f"{file}: {key} {config[key]!r} is not supported; expected {expected}")
    if (start := config.get("init_lora_weights")) not in _STARTS:
        raise UserError(
            f"{file}: init_lora_weights {start!r} is not supported: it changes the base; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{file}: r is {rank!r}, expected an integer of at least 1")
    if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise UserError(f"{file}: lora_alpha is {alpha!r}, expected a number above 0")
    sources = safetensors.open_file(folder / ADAPTER_WEIGHTS)
    for name in sources:
        if not name.startswith(_PREFIX):
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: tensor {name} has no {_PREFIX} before it")
    tensors = {name.removeprefix(_PREFIX): source for name, source in sources.items()}
    return Adapter(rank, alpha, LazyTensors(tensors))
