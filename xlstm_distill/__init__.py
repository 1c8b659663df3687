"""Distil a pretrained transformer into a hybrid xLSTM student, on CPUs, with exact gradients.

    import xlstm_distill as xd

    teacher = xd.load("smollm2-135m-instruct")
    student = xd.linearize(teacher, window=64, sinks=4)
    data = xd.TokenData.from_files(["texts/"], teacher.tokenizer)
    for metrics in xd.align(student, teacher, data, steps=200): ...

README.md has the way through the stages, docs/architecture.md the map of the modules.
"""

from . import ops, reference
from .align import MixerTraining, align
from .config import MixerConfig, ModelConfig
from .data import Batches, Rows, TokenData
from .distill import distill
from .errors import UserError
from .evaluate import compare, evaluate, fidelity, win_and_tie
from .layerwise import align_layers, aligned_student
from .linearize import linearize
from .lora import Lora, merge_adapter
from .merge import merge
from .model import Model, load
from .packages import fetch
from .quickstart import quickstart
from .recipe import load_recipe
from .report import report
from .run import run
from .state import load_state
from .targets import TargetCache, write_targets
from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Lora",
    "MixerConfig",
    "MixerTraining",
    "Model",
    "ModelConfig",
    "Rows",
    "TargetCache",
    "TokenData",
    "Tokenizer",
    "UserError",
    "align",
    "align_layers",
    "aligned_student",
    "compare",
    "distill",
    "evaluate",
    "fetch",
    "fidelity",
    "linearize",
    "load",
    "load_recipe",
    "load_state",
    "merge",
    "merge_adapter",
    "ops",
    "quickstart",
    "reference",
    "report",
    "run",
    "win_and_tie",
    "write_targets",
]
