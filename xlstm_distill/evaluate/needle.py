"""Needle in a haystack: RULER's niah_single_1..3, niah_multikey_1..3 and vt, made on the spot.

A task is named with its length, `niah_single_1:4096`: tokens of the prompt and of the answer
together, counted by the model's own tokenizer. Templates, numbers of needles and the score are
RULER's (Hsieh et al., 2024, arXiv:2404.06654), the answer's beginning is part of the prompt. What
differs, because nothing is downloaded:

- Haystacks of single_2, single_3 and multikey_1 are the Python language reference that the standard
  library's pydoc_data carries, or a text of the user's, in place of essays; cut into sentences
  where white space follows a full stop, a question or an exclamation mark.
- Keys are an adjective and a noun of the lists below.
- The depths of the needle that is asked for, 40 as there, are gone through in turn instead of
  drawn, so that even few samples cover all. Sample i has the same needles at every length.
- vt's worked example has two lines of noise instead of 500 tokens, so that 512 tokens are enough.
"""

from __future__ import annotations

import hashlib
import math
import pydoc_data.topics
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UserError
from .generation import Question, Questions, Sample, ScoringTokenizer, string_match_all

LENGTHS = tuple(512 << n for n in range(8))
"""Lengths that are asked for unless told otherwise: 512 to 64K tokens."""
SAMPLES = 500
"""Samples of a task, as in RULER."""

_NIAH_TOKENS, _VT_TOKENS = 128, 30
"""Tokens of an answer, as in RULER."""
_DEPTHS = [round(100 * n / 39) for n in range(40)]
_STRIDE = 17
"""Step through the depths: prime to 40, and the first five lie in five fifths."""
_HOPS = 4
_METRIC = "string_match_all"
_FIFTHS = 5
_EXAMPLE_LINES = 2

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {values} for {key} is: {value}."
_NIAH = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n{context}\nWhat is the special magic {value} "
    "for {key} mentioned in the provided text? "
    "The special magic {value} for {key} mentioned in the provided text is"
)
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text "
    "above. Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {value}, they are:"  # RULER's own spelling
)
_ADJECTIVES, _NOUNS = (
    words.split()
    for words in (
        "amber ancient bashful bitter bold brave breezy bright brisk calm careful cheerful "
        "clever cloudy copper cosmic crisp curious dapper dusty eager early elegant faint "
        "famous fearless fierce fluffy frosty gentle giddy golden graceful humble hungry icy "
        "jolly keen lively lonely lucky mellow mighty misty modest narrow nimble noble patient "
        "playful polite proud quiet rapid rustic shiny silent sleepy smooth sturdy sunny timid "
        "vivid witty ",
        "anchor apron arrow badge banjo barrel basket beacon bridge bucket button cabin camel "
        "candle canyon carpet castle cherry circus clover compass cradle dolphin engine falcon "
        "feather fiddle forest garden glacier hammer harbor helmet island jacket kettle ladder "
        "lantern lemon magnet marble meadow mirror needle orchard otter paddle pepper piano "
        "pillow planet pocket rabbit ribbon river saddle shovel spider teapot temple tunnel "
        "violin walnut window ",
    )
)


@dataclass(frozen=True)
class _Kind:
    """haystack: "repeat", "essay" or "needle"; keys, values: "words", "numbers" or "uuids"."""

    haystack: str
    keys: str
    values: str
    needles: int = 1


_NIAHS = {
    "niah_single_1": _Kind("repeat", "words", "numbers"),
    "niah_single_2": _Kind("essay", "words", "numbers"),
    "niah_single_3": _Kind("essay", "words", "uuids"),
    "niah_multikey_1": _Kind("essay", "words", "numbers", needles=4),
    "niah_multikey_2": _Kind("needle", "words", "numbers"),
    "niah_multikey_3": _Kind("needle", "uuids", "uuids"),
}
TASKS = (*_NIAHS, "vt")


def is_needle(name: str) -> bool:
    """Whether a task's name, with or without a length, is one of ours."""
    return name.partition(":")[0] in TASKS


def check_length(name: str) -> int:
    """The length in a task's name; UserError unless there is one of a token or more."""
    base, _, text = name.partition(":")
    if not text.isdecimal() or int(text) < 1:
        message = f"task {name!r}: expected a length in tokens, as in {base}:4096"
        raise UserError(message, usage=True)
    return int(text)


def needle(
    name: str,
    tokenizer: ScoringTokenizer,
    *,
    limit: int | None = None,
    seed: int = 0,
    haystack: str | Path | None = None,
) -> Questions:
    """A task such as "niah_single_1:4096", at most its first `limit` samples, fixed by `seed`.

    haystack: a text file in place of the language reference. Raises UserError for an unknown length
    and where the length is too short for the task or the haystack too short for the length.
    """
    base, length = name.partition(":")[0], check_length(name)
    essay = _sentences(haystack)
    new = _VT_TOKENS if base == "vt" else _NIAH_TOKENS
    most = len(essay) if reads_haystack(base) else length

    def question(index: int) -> Question:
        rng = random.Random(f"{base} {seed} {index}")
        made = _vt(rng) if base == "vt" else _niah(_NIAHS[base], index, rng, essay)
        text, tokens = _fill(made.prompt, name, tokenizer, length - new, most)
        return Question(index, text, made.targets, {**made.facts, "prompt_tokens": tokens})

    question(0)  # what cannot be made is refused before any work
    return Questions(
        name=name,
        count=SAMPLES if limit is None else min(limit, SAMPLES),
        question=question,
        original=SAMPLES,
        max_new_tokens=new,
        metric=_METRIC,
        score=string_match_all,
        shots=1 if base == "vt" else 0,
        config={"length": length, "request_set": _sha(essay) if reads_haystack(base) else None},
    )


def reads_haystack(name: str) -> bool:
    """Whether a task, with or without its length, hides needles in the text of a haystack."""
    base = name.partition(":")[0]
    return base in _NIAHS and _NIAHS[base].haystack == "essay"


@cache
def _sentences(file: str | Path | None) -> tuple[str, ...]:
    if file is None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None
    # Lines without a letter are underlines and rulers.
    words = " ".join(line for line in text.splitlines() if re.search("[a-zA-Z]", line)).split()
    return tuple(re.split(r"(?<=[.!?]) ", " ".join(words)))


def _sha(sentences: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(sentences).encode()).hexdigest()


def needle_grid(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[int, list[float]]]:
    """Task -> length -> mean score by fifth of the depth (NaN where there is no sample), of the
    tasks among `samples` (task -> samples); vt, whose needles lie everywhere, has one mean."""
    grid: dict[str, dict[int, list[float]]] = {}
    for name in filter(is_needle, samples):
        base, _, length = name.partition(":")
        rows: list[list[float]] = [[] for _ in range(1 if base == "vt" else _FIFTHS)]
        for sample in samples[name]:
            row = min(sample.get("depth", 0) * _FIFTHS // 100, _FIFTHS - 1)
            rows[row].append(sample[_METRIC])
        means = [sum(row) / len(row) if row else math.nan for row in rows]
        grid.setdefault(base, {})[int(length)] = means
    return grid


# ---- needles ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """A question of any length: its prompt with so many units of hay."""

    prompt: Callable[[int], str]
    targets: tuple[str, ...]
    facts: Mapping[str, object]


def _niah(kind: _Kind, index: int, rng: random.Random, essay: Sequence[str]) -> _Made:
    depth = _DEPTHS[_STRIDE * index % len(_DEPTHS)]
    key, value = _draw(rng, kind.keys), _draw(rng, kind.values)
    others = rng.sample([d for d in _DEPTHS if d != depth], kind.needles - 1)
    needles = dict(zip(others, _distractors(rng, kind, key, len(others)), strict=True))
    needles[depth] = _sentence(kind, key, value)
    hay_seed = rng.getrandbits(64)

    def prompt(units: int) -> str:
        if kind.haystack == "essay":
            hay, space = list(essay[:units]), " "
        elif kind.haystack == "repeat":
            hay, space = [_NOISE] * units, "\n"
        else:
            # The same seed for any number: longer haystacks go on from shorter ones.
            hay, space = _distractors(random.Random(hay_seed), kind, key, units), "\n"
        for at in sorted(needles, reverse=True):
            hay.insert(units * at // 100, needles[at])
        return _NIAH.format(value=kind.values.removesuffix("s"), key=key, context=space.join(hay))

    return _Made(prompt, (value,), {"depth": depth, "key": key})


def _sentence(kind: _Kind, key: str, value: str) -> str:
    return _NEEDLE.format(values=kind.values, key=key, value=value)


def _distractors(rng: random.Random, kind: _Kind, key: str, count: int) -> list[str]:
    """Needles with other keys than the one that is asked for."""
    found: list[str] = []
    while len(found) < count:
        other = _draw(rng, kind.keys)
        if other != key:
            found.append(_sentence(kind, other, _draw(rng, kind.values)))
    return found


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "words":
        return f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


# ---- variable tracking --------------------------------------------------------------------------


def _vt(rng: random.Random) -> _Made:
    own, example = _chain(rng, letters=5), _chain(rng, letters=3)
    noise = [f"{s}." for s in _NOISE.removesuffix(".").split(". ")] * _EXAMPLE_LINES
    shown = _track(example, noise, [rng.random() for _ in example.lines])
    shown = f"{shown} {' '.join(example.names)}\n\n\n"
    places = [rng.random() for _ in own.lines]

    def prompt(units: int) -> str:
        return shown + _track(own, [f"{_NOISE}\n"] * units, places)

    return _Made(prompt, own.names, {})


@dataclass(frozen=True)
class _Chain:
    value: str
    names: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        values = [self.value, *(f"VAR {name} " for name in self.names)]
        return [f"VAR {name} = {v}" for name, v in zip(self.names, values, strict=False)]


def _chain(rng: random.Random, letters: int) -> _Chain:
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return _Chain(str(rng.randint(10_000, 99_999)), tuple(names))


def _track(chain: _Chain, noise: Sequence[str], places: Sequence[float]) -> str:
    """The question about a chain whose lines lie, in order, at `places` (0..1) of the noise."""
    lines = list(noise)
    for place, line in zip(sorted(places, reverse=True), reversed(chain.lines), strict=True):
        lines.insert(int(place * len(noise)), line)
    context = " ".join(lines).replace("\n ", "\n")
    return _VT.format(context=context, value=chain.value, count=len(chain.names))


# ---- length -------------------------------------------------------------------------------------


def _fill(
    prompt: Callable[[int], str],
    name: str,
    tokenizer: ScoringTokenizer,
    room: int,
    most: int,
) -> tuple[str, int]:
    """The longest prompt(units) of at most `room` tokens, and its tokens."""

    def tokens(units: int) -> int:
        return len(tokenizer.encode(prompt(units), special=False)) + tokenizer.adds_bos

    units, step = 0, 1
    while units + step <= most and tokens(units + step) <= room:
        units, step = units + step, 2 * step
    while step := step // 2:
        if units + step <= most and tokens(units + step) <= room:
            units += step
    if units == 0:
        raise UserError(f"task {name}: too short; the smallest prompt has {tokens(1)} tokens")
    if units == most:
        raise UserError(f"task {name}: the haystack is too short; give a longer one")
    return prompt(units), tokens(units)
