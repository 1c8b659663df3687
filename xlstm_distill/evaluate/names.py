"""Names of tasks: request sets with their variants, patterns, and where the sets lie.

A name is a set and, behind a colon, a variant. A set's default variant is the one with the most
worked examples, of those that ask for the answer itself, not for the letter of a choice (mc_), and
whose name has no split or size in front (test_, val_, xl_); or the same of the whole validation
split (val_) where that one is a part of it: the 1,000 documents in rc_5shot of piqa, hellaswag,
boolq and socialiqa are.

Subjects of MMLU (mmlu.py) are tasks like request sets, a group of them, such as "mmlu_stem", stands
for all of its subjects. Of patterns only those that begin with "mmlu" take subjects: others are
over request sets, or needles. Behind "perplexity:" stands a path, which is no pattern.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .. import packages
from ..errors import UserError, check_package
from . import mmlu
from .gsm8k import GSM8K
from .needle import TASKS as NEEDLES
from .needle import check_length, is_needle
from .perplexity import PERPLEXITY

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
_MMLU = dict.fromkeys([*mmlu.SUBJECTS, *mmlu.GROUPS], mmlu.VARIANTS[0])
_DEFAULT_VARIANTS = {**VARIANTS, **_MMLU}
"""Whatever may be named without a variant -> its default variant."""
_LEFT_OUT = {**_SHORT, **_MMLU}
"""The same of names from which it is left out in results."""

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
    """Task names as results have them, each once, text by its path ("perplexity:a.txt"), and groups
    of MMLU's subjects expanded ("mmlu", "mmlu_stem:mc_5shot") as well as `*` patterns: over all
    request sets in their default variants ("mt_mbpp_*"), over the variants that lie in `requests`
    (as for `load_task`; "*:mc_5shot"), over subjects ("mmlu_*", "mmlu_*:mc_5shot") or, with a
    length, over needle.py's tasks ("niah_*:4096").

    Raises UserError for a pattern that matches nothing and, with the nearest names, for one that is
    not known (`check_name`).
    """
    found: dict[str, None] = {}
    for name in names:
        base, colon, variant = name.partition(":")
        needles = [f"{needle}{colon}{variant}" for needle in fnmatch.filter(NEEDLES, base)]
        if is_text(name):
            _check_path(name)
            matches = [name]
        elif is_needle(base) or (needles and variant.isdecimal()):
            matches = needles
        elif base in mmlu.GROUPS and "*" not in variant:
            _check_variant(name)
            matches = [f"{task}{colon}{variant}" for task in mmlu.tasks_in(base)]
        elif "*" not in name:
            check_name(name)
            matches = [name]
        elif name.startswith("mmlu"):
            variants = mmlu.VARIANTS if colon else mmlu.VARIANTS[:1]
            tasks = [f"{task}:{one}" for task in mmlu.SUBJECTS for one in variants]
            matches = fnmatch.filter(tasks, name if colon else f"{name}:*")
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


def groups_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The groups among `names`, and the groups in these: what is in each, all by their names in
    results. For names that `expand_tasks` takes; what patterns match is no group."""
    found = {}
    for name in names:
        base, colon, variant = name.partition(":")
        for group in (base, *mmlu.GROUPS.get(base, ())):
            if group in mmlu.GROUPS:
                inside = [f"{part}{colon}{variant}" for part in mmlu.GROUPS[group]]
                found[short_name(f"{group}{colon}{variant}")] = list(map(short_name, inside))
    return found


def _variants_there(pattern: str, requests: str | Path | None) -> list[str]:
    """The variants of sets in `requests` that a pattern such as "arc_*:mc_5shot" matches."""
    root = requests_root(requests)
    base = pattern.partition(":")[0]
    places = [file.parent for file in sorted(root.glob(f"*/*/{REQUESTS}"))]
    found = fnmatch.filter([f"{place.parent.name}:{place.name}" for place in places], pattern)
    if not found and (root / base).is_dir():
        raise UserError(_not_there(root, base, pattern), usage=True)
    return found


def short_name(name: str) -> str:
    """A task's name in results; also of names that are not known."""
    base, _, variant = name.partition(":")
    variant = variant or _DEFAULT_VARIANTS.get(base, "")
    return f"{base}:{variant}" if variant and variant != _LEFT_OUT.get(base) else base


def _nearest(name: str) -> str:
    base = name.partition(":")[0].replace("*", "")
    near = difflib.get_close_matches(base, _DEFAULT_VARIANTS, n=3)
    there = ", ".join([*VARIANTS, *mmlu.GROUPS])
    return f"did you mean {', '.join(near)}?" if near else f"there are {there}"


def check_name(name: str) -> None:
    """UserError, with the nearest names, unless `name` is one of a request set with a default
    variant or names a variant; whether that is there is seen by `find_task` alone. Of MMLU all is
    known: a subject has its variants, and a group is refused, with its subjects."""
    base, colon, variant = name.partition(":")
    if base in _MMLU:
        _check_variant(name)
    if base in mmlu.GROUPS:
        tasks = ", ".join(f"{task}{colon}{variant}" for task in mmlu.tasks_in(base))
        raise UserError(f"task {name!r} is a group; name its subjects here: {tasks}", usage=True)
    if name not in _DEFAULT_VARIANTS and not colon:
        raise UserError(f"task {name!r} is not known; {_nearest(name)}", usage=True)


def _check_variant(name: str) -> None:
    """UserError unless a subject or a group of MMLU has the variant that `name` names."""
    base, colon, variant = name.partition(":")
    if colon and variant not in mmlu.VARIANTS:
        there = ", ".join(mmlu.VARIANTS)
        raise UserError(f"task {name!r}: {base} has the variants {there}", usage=True)


def _check_path(name: str) -> None:
    """UserError unless a path stands behind the colon."""
    if not name.partition(":")[2]:
        message = f"task {name!r}: expected a file or a directory, as in {PERPLEXITY}:FILE"
        raise UserError(message, usage=True)


def check_task(name: str) -> None:
    """UserError unless a recipe may name the task: as `check_name`, or a needle with its length.
    Text is none of them: a recipe holds its own text back (`held_out_tokens`)."""
    source = source_of(name)
    if source.requests is not None:
        check_name(name)
    elif source.written:
        check_length(name)
    else:
        message = f"task {name!r}: text is no task of a recipe; use `xlstm-distill evaluate`"
        raise UserError(message, usage=True)


class Source(NamedTuple):
    """What a task is made of. requests: the name of the request set that its documents come from,
    None where they are made on the spot (needle.py) or are the user's text (perplexity.py).
    written: whether the model writes answers."""

    requests: str | None
    written: bool


def is_text(name: str) -> bool:
    """Whether a task is the user's text."""
    return name.partition(":")[0] == PERPLEXITY


def source_of(name: str) -> Source:
    """What kind of task a name is; also of names that are not known, taken for request sets."""
    if is_needle(name):
        return Source(None, written=True)
    if is_text(name):
        return Source(None, written=False)
    if name == GSM8K:
        return Source("gsm8k", written=True)
    return Source(name, written=False)


def requests_root(requests: str | Path | None) -> Path:
    """The directory of the request sets, as for `load_task`. UserError if there is none."""
    root = Path(requests) if requests is not None else packages.fetch("olmes")
    if not root.is_dir():
        raise UserError(f"{root}: no such directory of request sets", usage=True)
    return root


def find_task(name: str, requests: str | Path | None = None) -> Path:
    """The directory of a request set, or of a subject of MMLU; errors and `requests` as for
    `load_task`."""
    check_name(name)
    root = requests_root(requests)
    base, _, variant = name.partition(":")
    if base in mmlu.SUBJECTS:
        check_package("pyarrow", "arrow", f"task {name!r}")
        folder = root / "mmlu" / mmlu.SUBJECTS[base]
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such directory; MMLU comes with `xlstm-distill fetch olmes`",
                usage=True,
            )
        return folder
    folder = root / base / (variant or VARIANTS.get(base, ""))
    if not (folder / REQUESTS).is_file():
        raise UserError(_not_there(root, base, name), usage=True)
    return folder


def _not_there(root: Path, base: str, name: str) -> str:
    if (root / base).is_dir() and base:
        variants = sorted(p.parent.name for p in (root / base).glob(f"*/{REQUESTS}"))
        written_set, _, written = GSM8K.partition(":")
        if base == written_set:
            variants.append(written)
        return f"task {name!r}: {base} has the variants {', '.join(variants)}"
    known = sorted(p.name for p in root.iterdir() if p.is_dir())
    near = difflib.get_close_matches(base, [*known, *_MMLU], n=3) or known
    return f"task {name!r}: there is no request set {base!r} in {root}; there are {', '.join(near)}"
