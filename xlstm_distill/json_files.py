"""JSON objects of files, which users may have written, cut off or mistaken for others.

Whatever is wrong is a `UserError` in one line that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError, short

_LARGEST = 64 << 20
"""Bytes of a file; results of lm-evaluation-harness and indices of shards have at most a few
million."""


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object of a file. unique: a key that appears twice in one object is an error, where
    it is not clear which value counts (else the last one counts, as in other readers).

    Raises UserError for a file that cannot be read, is too large, or holds something else.
    """
    text = text_of(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_twins if unique else None)
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return value


def text_of(path: Path) -> str:
    """The text of a file of bounded size, a byte order mark left out. Raises UserError for other
    files."""
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise UserError(
                f"{path}: has {size >> 20} MiB, more than the {_LARGEST >> 20} MiB of any JSON "
                "file or table; samples belong in files of their own beside their results"
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {short(twice)} appears twice in one object")
    return found
