"""Results files of lm-evaluation-harness's form, which is also ours: read and written.

Beside a results file lie the samples of its tasks, one JSON object a document and line. Whatever is
damaged is a `UserError` in one line that names the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..errors import UserError, short
from ..json_files import read_json

_PASSAGE = ("passage", "story", "context", "article", "abstract")
"""Fields of a document that hold the text which several questions may ask about. An abstract stands
for its paper: qasper's questions are about papers, and show a paragraph or two of them."""
_CATEGORY = re.compile("Category:[^\n]*")
"""What stands before a question of jeopardy: its subject, no text that it asks about."""


def write_results(results: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Write results as `path` (JSON), and beside it the samples of each task as
    `samples_NAME_TASK.jsonl`, NAME being the file's name without "results_" and ".json"."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    plain = {key: value for key, value in results.items() if key != "samples"}
    texts = {target: json.dumps(plain, indent=1, allow_nan=False)}
    for task, samples in results.get("samples", {}).items():
        lines = [json.dumps(sample, allow_nan=False) for sample in samples]
        texts[_samples_files(target, task)[0]] = "\n".join(lines)
    for file, text in texts.items():
        write_text(file, text + "\n")
    return list(texts)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read what `write_results` or lm-evaluation-harness wrote, with the samples that lie beside
    the file (of the latter's without prompts and answers). Raises UserError for other files."""
    source = Path(path)
    results = read_json(source, unique=True)
    samples = dict(object_at(results, "samples", str(source)))
    for task in object_at(results, "results", str(source), needed=True):
        for file in _samples_files(source, task):
            if task not in samples and file.is_file():
                samples[task] = list(_read_samples(file))
    return {**results, "samples": samples}


def _samples_files(results: Path, task: str) -> tuple[Path, Path]:
    """Where the samples of a task may lie: our name, lm-evaluation-harness's name."""
    name = results.stem.removeprefix("results_")
    ours = f"samples_{name}_{re.sub(r'[^A-Za-z0-9_.-]', '_', task)}.jsonl"
    theirs = f"samples_{task.replace('/', '_')}_{name}.jsonl"
    return results.with_name(ours), results.with_name(theirs)


# ---- samples ------------------------------------------------------------------------------------


def _read_samples(file: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (named in the error)
                sample = json.loads(line)
                if not isinstance(sample, dict):
                    raise ValueError("an object is expected")
                yield slim(sample)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {max(1, number)} is not a sample ({error})") from None


def slim(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample without prompts and answers, which fill lm-evaluation-harness's files; what they
    tell is kept: the `passage` asked about and the number of `choices`."""
    bulky = ("doc", "arguments", "resps", "filtered_resps")
    kept = {key: value for key, value in sample.items() if key not in bulky}
    document, answers = sample.get("doc"), sample.get("resps")
    if isinstance(document, Mapping) and (passage := passage_of(document)) is not None:
        kept.setdefault("passage", passage)
    if isinstance(answers, list) and len(answers) > 1:
        # With acc_mutual_info the choices are scored a second time, without the question.
        kept.setdefault("choices", len(answers) // (2 if "acc_mutual_info" in sample else 1))
    return kept


def passage_of(document: Mapping[str, Any]) -> str | None:
    """A short name (the beginning of a sha256) of the text that a document asks about: a field of
    it, or what stands before the question; None where there is no such text."""
    texts = [document.get(key) for key in _PASSAGE]
    if isinstance(query := document.get("query"), str):
        before = query.rpartition("\nQuestion:")[0]
        texts.append("" if _CATEGORY.fullmatch(before) else before)
    for text in texts:
        if isinstance(text, str) and text.strip():
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return None


def object_at(
    of: Mapping[str, Any], key: str, where: str, needed: bool = False
) -> Mapping[str, Any]:
    """The object under a key, empty where there is none; a UserError for other types, and where it
    is `needed` and missing."""
    value = of.get(key)
    if value is None and not needed:
        return {}
    if value is None:
        raise UserError(f"{where}: has no {key!r}")
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {key!r} is {short(value)}, expected an object")
    return value
