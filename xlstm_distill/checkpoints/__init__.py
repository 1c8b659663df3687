"""Model checkpoints: GGUF files and Hugging Face directories in, directories out.

`load` opens what a user names; `save` writes a model directory. Both account for every tensor.
`load_adapter` and `save_adapter` do the same for LoRA adapters in PEFT's layout.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..packages import resolve
from . import directory, gguf
from .adapter import ADAPTER_CONFIG, Adapter, load_adapter, save_adapter
from .checkpoint import Checkpoint, LazyTensors, TensorSource, check_tensors, fingerprint
from .directory import save

__all__ = [
    "ADAPTER_CONFIG",
    "Adapter",
    "Checkpoint",
    "LazyTensors",
    "TensorSource",
    "check_tensors",
    "fingerprint",
    "load",
    "load_adapter",
    "save",
    "save_adapter",
    "weights_file",
    "weights_form",
]


def load(path_or_name: str | Path) -> Checkpoint:
    """Open a model directory, a GGUF file or a name that `xlstm-distill fetch` knows.

    Tensors are read when they are asked for. Raises `UserError` for anything that is not a
    complete, supported model.
    """
    path = resolve(path_or_name)
    if not path.is_dir():
        return gguf.load(path)
    if (path / directory.CONFIG).is_file():
        return directory.load(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return gguf.load(files[0])
    what = "several .gguf files: name one" if files else "neither config.json nor a .gguf file"
    raise UserError(f"{path}: holds {what}")


def weights_form(source: str) -> str:
    """What the weights of a checkpoint's `source` were and are computed as."""
    gguf_file = source.endswith(".gguf")
    return "GGUF, dequantised to float32" if gguf_file else "safetensors, as float32"


def weights_file(source: str) -> str:
    """The name of the file or directory of a checkpoint's `source`, and what its weights are."""
    return f"{Path(source).name} ({weights_form(source)})"
