"""Samples of an evaluation that goes on after a kill: a file per task, a line per batch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..atomic import lock
from ..errors import UserError
from .generation import Sample


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep `folder` to this process inside the block: two that append to one file would leave
    documents twice and others out, which nobody sees after a kill. In the end the
    folder is removed if nothing is in it.

    Raises UserError if it cannot be made, or if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot write: {error.strerror}") from None
    lock(handle, folder)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty: samples that a later command goes on from
            folder.rmdir()
        os.close(handle)


class Unfinished:
    """A directory with the samples found so far, kept under the settings they were found with."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = Path(folder), dict(settings)
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, task: str, config: Mapping[str, Any]) -> list[Sample]:
        """The samples of a task's whole batches; what a kill left of the last one is cut off.

        Raises UserError where they were found with other settings, or a whole line is damaged.
        """
        file = self._file(task)
        header = {"task": task, **self.settings, **config}
        lines = file.read_bytes().split(b"\n") if file.is_file() else []
        if len(lines) < 2:  # not even the settings were written whole
            file.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return []
        try:
            found, *batches = [json.loads(line) for line in lines[:-1]]
            samples = [sample for batch in batches for sample in batch]
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it") from None
        for key, value in header.items():
            if found.get(key) != value:
                raise UserError(
                    f"{file}: holds samples found with {key} {found.get(key)!r}, now it is "
                    f"{value!r}; delete it or go on as before"
                )
        os.truncate(file, file.stat().st_size - len(lines[-1]))
        return samples

    def add(self, task: str, batch: list[Sample]) -> None:
        """Append a batch."""
        with self._file(task).open("a", encoding="utf-8") as out:
            out.write(json.dumps(batch, allow_nan=False) + "\n")

    def _file(self, task: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl"
