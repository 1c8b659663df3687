"""Names of tasks: request sets with their variants, patterns, and where the sets lie.

A name is a set and, behind a colon, a variant. A set's default variant is the one with the most
worked examples, of those that ask for the answer itself, not for the letter of a choice (mc_), and
whose name has no split or size in front (test_, val_, xl_); or the same of the whole validation
split (val_) where that one is a part of it: the 1,000 documents in rc_5shot of piqa, hellaswag,
boolq and socialiqa are.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import packages
from ..errors import UserError
from .gsm8k import GSM8K
from .needle import TASKS as NEEDLES
from .needle import check_length, is_needle

REQUESTS = "requests.jsonl.gz"
"""The file of a variant's requests, in SET/VARIANT of the directory of request sets."""
_MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_LANGUAGES = (
    "bash",
    "c",
    "cpp",
    "csharp",
    "go",
    "haskell",
    "java",
    "javascript",
    "matlab",
    "php",
    "r",
    "ruby",
    "rust",
    "scala",
    "swift",
    "typescript",
)
_SKILLS = (
    "arithmetic",
    "coding",
    "common_knowledge",
    "logical_reasoning",
    "pattern",
    "string_operations",
)
_SHORT = {
    "arc_easy": "rc_5shot",
    "arc_challenge": "rc_5shot",
    "piqa": "val_rc_5shot",
    "hellaswag": "val_rc_5shot",
    "winogrande": "rc_5shot",
    "boolq": "val_rc_5shot",
    "squad": "bpb_5shot",
    "drop": "bpb_5shot",
    "coqa": "bpb_0shot",
    "gsm8k": "gold_bpb_5shot",
    **{f"minerva_math_{subject}": "gold_bpb_0shot" for subject in _MATH},
    "mt_mbpp_python": "gold_bpb_3shot",
}
"""Sets whose default variant is left out of their names in results; of others it is written, as in
result files from before they had one."""
VARIANTS = {
    **_SHORT,
    **{f"basic_skills_{skill}": "rc_5shot" for skill in _SKILLS},
    "codex_humaneval": "gold_bpb_3shot",
    "codex_mbpp": "gold_bpb_3shot",
    "copycolors": "10way",
    "csqa": "rc_5shot",
    "jeopardy": "bpb_5shot",
    "lab_bench_dbqa": "rc_3shot",
    "lab_bench_protocolqa": "rc_3shot",
    "lambada": "bpb_0shot",
    "medmcqa": "rc_5shot",
    "medqa_en": "rc_5shot",
    "minerva_math_500": "gold_bpb_0shot",
    **{f"mt_mbpp_{language}": "gold_bpb_3shot" for language in _LANGUAGES},
    "naturalqs_open": "bpb_5shot",
    "openbookqa": "rc_5shot",
    "qasper_yesno": "rc_5shot",
    "sciq": "rc_5shot",
    "sciriff_yesno": "rc_5shot",
    "socialiqa": "val_rc_5shot",
}
"""Request set -> its default variant."""
DEFAULT_TASKS = tuple(_SHORT)
"""Tasks that `evaluate` takes unless told otherwise."""

FEEL_THE_WINDOW = (
    "squad",
    "drop",
    "coqa",
    "gsm8k",
    *(f"minerva_math_{subject}" for subject in _MATH),
    "mt_mbpp_python",
)
"""Tasks whose answers lie far back: on them a student that lost its context is told from the
teacher, which on multiple choice it often is not."""


def expand_tasks(names: Sequence[str], requests: str | Path | None = None) -> list[str]:
    """Task names as results have them, each once, and `*` patterns expanded: over all
    request sets in their default variants ("mt_mbpp_*"), over the variants that lie in `requests`
    (as for `load_task`; "*:mc_5shot") or, with a length, over needle.py's tasks ("niah_*:4096").

    Raises UserError for a pattern that matches nothing and, with the nearest names, for one that is
    not known (`check_name`).
    """
    found: dict[str, None] = {}
    for name in names:
        base, colon, variant = name.partition(":")
        needles = [f"{needle}{colon}{variant}" for needle in fnmatch.filter(NEEDLES, base)]
        if is_needle(base) or (needles and variant.isdecimal()):
            matches = needles
        elif "*" not in name:
            check_name(name)
            matches = [name]
        elif colon:
            matches = _variants_there(name, requests) or needles
        else:
            matches = fnmatch.filter(VARIANTS, name)
        if needles and not matches:
            check_length(name)
        if not matches:
            raise UserError(f"task {name!r} matches nothing; {_nearest(name)}", usage=True)
        found |= dict.fromkeys(map(short_name, matches))
    return list(found)


def _variants_there(pattern: str, requests: str | Path | None) -> list[str]:
    """The variants of sets in `requests` that a pattern such as "arc_*:mc_5shot" matches."""
    root = _requests_root(requests)
    base = pattern.partition(":")[0]
    places = [file.parent for file in sorted(root.glob(f"*/*/{REQUESTS}"))]
    found = fnmatch.filter([f"{place.parent.name}:{place.name}" for place in places], pattern)
    if not found and (root / base).is_dir():
        raise UserError(_not_there(root, base, pattern), usage=True)
    return found


def short_name(name: str) -> str:
    """A task's name in results; also of names that are not known."""
    base, _, variant = name.partition(":")
    variant = variant or VARIANTS.get(base, "")
    return f"{base}:{variant}" if variant and variant != _SHORT.get(base) else base


def _nearest(name: str) -> str:
    base = name.partition(":")[0].replace("*", "")
    near = difflib.get_close_matches(base, VARIANTS, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(VARIANTS)}"


def check_name(name: str) -> None:
    """UserError, with the nearest names, unless `name` is one of a request set with a default
    variant or names a variant; whether that is there is seen by `find_task` alone."""
    if name not in VARIANTS and ":" not in name:
        raise UserError(f"task {name!r} is not known; {_nearest(name)}", usage=True)


def check_task(name: str) -> None:
    """UserError unless `evaluate` may know `name`: as `check_name`, or a needle with its length."""
    if source_of(name).requests is None:
        check_length(name)
    else:
        check_name(name)


class Source(NamedTuple):
    """What a task is made of. requests: the name of the request set that its documents come from,
    None where they are made on the spot (needle.py). written: whether the model writes answers."""

    requests: str | None
    written: bool


def source_of(name: str) -> Source:
    """What kind of task a name is; also of names that are not known, taken for request sets."""
    if is_needle(name):
        return Source(None, written=True)
    if name == GSM8K:
        return Source("gsm8k", written=True)
    return Source(name, written=False)


def _requests_root(requests: str | Path | None) -> Path:
    root = Path(requests) if requests is not None else packages.fetch("olmes")
    if not root.is_dir():
        raise UserError(f"{root}: no such directory of request sets", usage=True)
    return root


def find_task(name: str, requests: str | Path | None = None) -> Path:
    """The directory of a request set; errors and `requests` as for `load_task`."""
    check_name(name)
    root = _requests_root(requests)
    base, _, variant = name.partition(":")
    folder = root / base / (variant or VARIANTS.get(base, ""))
    if not (folder / REQUESTS).is_file():
        raise UserError(_not_there(root, base, name), usage=True)
    return folder


def _not_there(root: Path, base: str, name: str) -> str:
    if (root / base).is_dir() and base:
        variants = sorted(p.parent.name for p in (root / base).glob(f"*/{REQUESTS}"))
        return f"task {name!r}: {base} has the variants {', '.join(variants)}"
    known = sorted(p.name for p in root.iterdir() if p.is_dir())
    near = difflib.get_close_matches(base, known, n=3) or known
    return f"task {name!r}: there is no request set {base!r} in {root}; there are {', '.join(near)}"
