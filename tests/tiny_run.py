"""A tiny random teacher with a byte-level tokenizer, and a recipe that runs on it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from xlstm_distill.config import ModelConfig
from xlstm_distill.data import TokenData
from xlstm_distill.model import Model
from xlstm_distill.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 259

TEXT = (
    "The river rises in the hills and runs through three towns before it meets the sea. ",
    "A lighthouse keeper counts ships by day and stars by night, and writes both numbers down. ",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n",
    "Bread needs flour, water, salt, yeast and more patience than most people have. ",
)


def tokenizer() -> Tokenizer:
    """One token a byte, three control tokens, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*SPECIAL, *alphabet])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    return Tokenizer(core, bos_id=1, eos_ids=[2], chat_template=CHAT)


def text(model: Model) -> TokenData:
    """A dozen short documents."""
    return TokenData.from_texts([f"{n}: " + TEXT[n % 4] * 2 for n in range(12)], model.tokenizer)


def teacher(seed: int = 0) -> Model:
    """A random model of two layers, width 64, four heads of 16."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=[2],
    )
    model = Model(config, tokenizer(), source="tiny")
    random = np.random.default_rng(seed)
    for e in model.params.entries:
        value = random.standard_normal(e.shape) * 0.2
        model.params[e.name] = (value * 0.3 + 1 if e.role == "norm" else value).astype(np.float32)
    return model


def write_text(folder: Path, documents: int = 24) -> Path:
    """A directory of varied text files."""
    folder.mkdir(parents=True)
    for n in range(documents):
        body = "".join(TEXT[(n + i) % len(TEXT)] for i in range(3 + n % 4))
        (folder / f"text{n:02}.txt").write_text(f"Note {n}. {body}", encoding="utf-8")
    return folder


def recipe(teacher_dir: Path, text: Path, **changes: Any) -> dict[str, Any]:
    """All stages: a sampled and a read domain, two experts, a merge, fidelity."""
    sampled = [
        {"kind": "sampled", "style": style, "documents": 6, "max_new_tokens": 40, "batch": 3}
        for style in ("general", "chat")
    ]
    files = [{"kind": "files", "paths": [str(text)]}]
    values = {
        "title": "tiny",
        "teacher": str(teacher_dir),
        "seed": 3,
        "student": {"window": 8, "sinks": 2},
        "data": {
            "length": 64,
            "domains": {
                "general": {"sources": sampled},
                "notes": {"sources": files, "held_out_tokens": 700},
            },
        },
        "align": {"steps": 6, "rows": 2},
        "targets": {"k": 12},
        "distill": {"steps": 6, "rows": 2, "lr": 1e-3},
        "experts": {"general": {"general": 1}, "notes": {"notes": 3, "general": 1}},
        "merge": {"weights": {"general": 0.5, "notes": 0.5}},
        "evaluate": {
            "fidelity": [{"context": 64, "windows": 6, "expert_windows": 3}],
            "gate_tokens": 128,
            "prompts": ["The river"],
            "chats": ["Hello?"],
            "max_new_tokens": 6,
        },
    }
    return {**values, **changes}
