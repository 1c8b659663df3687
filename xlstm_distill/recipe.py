"""Recipes: everything that decides a run, as a YAML file that is checked before anything starts.

Unknown keys are errors that name the key and the nearest valid one. docs/recipes.md explains the
keys; the defaults are those that worked for models of about 100 million parameters.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .accumulation import Order
from .atomic import write_text
from .errors import UserError, first_problem
from .evaluate.names import check_name, check_task, short_name
from .lora import TARGETS, Target
from .merge import check_total
from .model import KlForm
from .optim import Group, Schedule
from .targets import Form
from .trackers import Name as TrackerName

GENERALIST = "generalist"
ALL = "all"
"""What tables call the mean of the domains."""
RESERVED = ("teacher", "untrained", "merged", GENERALIST)
"""Names of the report's own models, which no expert may have."""
BESIDE_EXPERT = STATE_END, ADAPTER_END = (".state", ".adapter")
"""Ends of the names of the directories that a run has beside an expert's, where no other may be."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StudentSection(_Section):
    """The mixer that takes the place of attention (see linearize). `keep_attention`: layers that
    keep the teacher's, or all of them: then the student is the teacher, a control."""

    mixer: Literal["hybrid", "mlstm", "linear", "window", "lolcats"] = "hybrid"
    window: int | None = Field(default=64, ge=1)
    sinks: int = Field(default=4, ge=0)
    gate: Literal["data", "fixed"] = "data"
    normalizer: Literal["ratio", "max"] = "ratio"
    feature_map: Literal["softmax", "elu"] = "softmax"
    keep_attention: list[int] | Literal["all"] = Field(default_factory=list)

    @field_validator("keep_attention", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> Any:
        if value != "all" and not (
            isinstance(value, list) and all(type(layer) is int for layer in value)
        ):
            raise ValueError(f"expected a list of layers, or all; found {value!r}")
        return value

    @model_validator(mode="after")
    def _check(self) -> StudentSection:
        if self.mixer in ("window", "lolcats") and self.window is None:
            raise ValueError(f"mixer {self.mixer} needs a window of at least 1, found null")
        return self


class SampledSource(_Section):
    """Text that the teacher writes: continued openings or answered instructions, its own or those
    of a file (`prompts`)."""

    kind: Literal["sampled"]
    style: Literal["general", "chat"] = "general"
    prompts: str | None = None
    documents: int = Field(ge=1)
    max_new_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch: int = Field(default=32, ge=1)


class StdlibSource(_Section):
    """Sources of the running Python's standard library, with their docstrings."""

    kind: Literal["stdlib"]
    max_tokens: int | None = Field(default=None, ge=1)


class FilesSource(_Section):
    """The user's files: txt, jsonl, Parquet, Arrow, directories of these. `malformed`: what happens
    to documents that cannot be used; among them lines and rows whose text is longer than
    `max_document_bytes`: such a line is rarely one document."""

    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    malformed: Literal["refuse", "skip"] = "refuse"
    max_document_bytes: int = Field(default=8_000_000, ge=1)


Source = Annotated[SampledSource | StdlibSource | FilesSource, Field(discriminator="kind")]


class DomainSection(_Section):
    """One kind of text. Evaluation text is never trained on.

    It consists of `held_out_tokens` tokens of documents taken out of the sources (not out of
    sampled text), or of human `passages` of request sets (squad, coqa, drop) where those are named.
    `loss`: what is learnt of chats and of prompts with completions: all of it or the answers.
    """

    sources: list[Source] = Field(min_length=1)
    loss: Literal["all", "answers"] = "all"
    held_out_tokens: int = Field(default=0, ge=0)
    passages: list[str] = Field(default_factory=list)

    @property
    def parts(self) -> list[str]:
        """The token data that it becomes."""
        return ["train", "evaluation"] if self.held_out_tokens else ["train"]

    @model_validator(mode="after")
    def _check(self) -> DomainSection:
        only_sampled = all(source.kind == "sampled" for source in self.sources)
        if self.held_out_tokens and only_sampled and not self.passages:
            raise ValueError("held_out_tokens needs passages where all text is sampled")
        if self.passages and not self.held_out_tokens:
            raise ValueError("passages need held_out_tokens, the number of tokens to take of them")
        return self


class ContaminationSection(_Section):
    """Training documents that share a run of `words` words with a question of one of the request
    sets `tasks` are dropped, or only counted."""

    tasks: list[str] = Field(min_length=1)
    words: int = Field(default=13, ge=1)
    action: Literal["drop", "report"] = "drop"

    @field_validator("tasks")
    @classmethod
    def _known_sets(cls, names: list[str]) -> list[str]:
        for name in names:
            check_name(name)
        return names


class DataSection(_Section):
    """Domains and the length of packed rows. `deduplicate`: a document that occurred before, in
    this domain or an earlier one, is left out."""

    length: int = Field(default=1024, ge=2)
    deduplicate: bool = True
    contamination: ContaminationSection | None = None
    domains: dict[str, DomainSection] = Field(min_length=1)


GroupRates = dict[Group, Annotated[float, Field(gt=0)]]
"""Factors of the learning rate."""


class AlignSection(_Section):
    """Stage I; without `steps` there is none. `weights`: share of each domain (default: all alike).
    `order` step holds the whole teacher, layer reads a layer at a time and keeps the hidden states
    of all rows in type `stream` in `stream_place`. `validate_rows` rows a domain are never trained
    on where `validate_every` is not 0."""

    steps: int = Field(ge=0)
    rows: int = Field(default=8, ge=1)
    micro_rows: int | None = Field(default=None, ge=1)
    lr: float = Field(default=2e-2, gt=0)
    rates: GroupRates = Field(default_factory=dict)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Schedule = "cosine"
    floor: float = Field(default=1e-5, ge=0)
    beta2: float = Field(default=0.99, gt=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, ge=1)
    average: float | None = Field(default=None, gt=0, lt=1)
    validate_every: int = Field(default=0, ge=0)
    validate_rows: int = Field(default=4, ge=1)
    keep: Literal["last", "best"] = "last"
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    weights: dict[str, float] = Field(default_factory=dict)
    order: Literal["step", "layer"] = "step"
    stream: Literal["float32", "bfloat16"] = "float32"
    stream_place: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AlignSection:
        if self.order == "step" and (self.stream != "float32" or self.stream_place is not None):
            raise ValueError("stream and stream_place need order: layer")
        if self.keep == "best" and not self.validate_every:
            raise ValueError("keep: best needs validate_every")
        return self


class TargetsSection(_Section):
    """The teacher's targets of a position: its k most probable tokens, or k draws. `online`: they
    are computed when stage II asks for them, and not stored. `rows_before`: so many rows of its
    stream that the teacher reads before a row."""

    form: Form = "topk"
    k: int = Field(default=256, ge=1)
    online: bool = False
    rows_before: int = Field(default=0, ge=0)


class LoraSection(_Section):
    """Adapters of stage II with `train: lora`: PEFT's `r`, `lora_alpha` and `target_modules`."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=8, gt=0)
    targets: list[Target] = Field(default_factory=lambda: list(TARGETS), min_length=1)


class DistillSection(_Section):
    """Stage II, the same for every expert. `recompute`: activations are made again on the way back,
    so that long rows fit into memory. `state_passing`: a row goes on from the state behind the row
    before it in its stream. `validate_rows` rows a domain are never trained on where
    `validate_every` is not 0."""

    steps: int = Field(ge=1)
    rows: int = Field(default=16, ge=1)
    micro_rows: int = Field(default=1, ge=1)
    ce_weight: float = Field(default=0.1, ge=0)
    kl_weight: float = Field(default=0.9, ge=0)
    kl_form: KlForm = "renormalised"
    lr: float = Field(default=1e-4, gt=0)
    rates: GroupRates = Field(default_factory=dict)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Schedule = "linear"
    clip: float | None = Field(default=1.0, gt=0)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    train: Literal["all", "mixer", "lora"] = "all"
    lora: LoraSection = Field(default_factory=LoraSection)
    average: float | None = Field(default=None, gt=0, lt=1)
    window_dropout: float = Field(default=0.0, ge=0, lt=1)
    state_passing: bool = False
    validate_every: int = Field(default=0, ge=0)
    validate_rows: int = Field(default=4, ge=1)
    keep: Literal["last", "best"] = "last"
    recompute: bool = False

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        if self.keep == "best" and not self.validate_every:
            raise ValueError("keep: best needs validate_every")
        if not self.ce_weight and not self.kl_weight:
            raise ValueError("ce_weight and kl_weight are both 0: nothing to learn from")
        return self


class MergeSection(_Section):
    """Stage III. `weights`: of each expert, adding up to 1 (default: all alike)."""

    method: Literal["linear"] = "linear"
    weights: dict[str, float] = Field(default_factory=dict)


class GeneralistSection(_Section):
    """A control: one student trained from the same aligned one for as many steps as the experts
    together. `weights`: share of each domain (default: as the experts together have them)."""

    weights: dict[str, float] = Field(default_factory=dict)


class FidelitySection(_Section):
    """`windows` windows of `context` tokens a domain; experts on the first `expert_windows`."""

    context: int = Field(ge=2)
    windows: int = Field(ge=1)
    expert_windows: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> FidelitySection:
        if self.expert_windows > self.windows:
            raise ValueError(f"expert_windows must be at most windows, {self.windows}")
        return self


class EvaluateSection(_Section):
    """What is measured at the end.

    `branches`: fidelity also of the merged model with a branch silenced (evaluate/branches.py).
    `tasks`: name of a task (evaluate/names.py, without patterns) -> largest number of documents or,
    of needles ("niah_single_1:1024"), of samples. `prompts` are continued as they are,
    `chats` are answered. `wanted_ratio`: the merged model's KL over the control's that the run must
    reach, at the upper end of its interval; the report says whether it does.
    """

    fidelity: list[FidelitySection] = Field(default_factory=list)
    branches: bool = False
    tasks: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    gate_tokens: int = Field(default=4096, ge=0)
    prompts: list[str] = Field(default_factory=list)
    chats: list[str] = Field(default_factory=list)
    max_new_tokens: int = Field(default=64, ge=1)
    wanted_ratio: float | None = Field(default=None, gt=0)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: dict[str, int]) -> dict[str, int]:
        seen: dict[str, str] = {}
        for name in tasks:
            check_task(name)
            if (other := seen.setdefault(short_name(name), name)) != name:
                raise ValueError(f"{other} and {name} are the same task; drop one")
        return tasks


class Recipe(_Section):
    """A whole run. `experts`: name -> share of each domain in its text; `experts_at_once` of them
    train at the same time where there are as many ranks."""

    title: str = "xLSTM distillation"
    teacher: str
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    minutes: float | None = Field(default=None, gt=0)
    save_seconds: float = Field(default=60.0, ge=0)
    compute: Literal["f32", "mixed"] = "f32"
    accumulation: Order = "sequence"
    trackers: list[TrackerName] = Field(default_factory=list)
    student: StudentSection = Field(default_factory=StudentSection)
    data: DataSection
    align: AlignSection
    targets: TargetsSection = Field(default_factory=TargetsSection)
    distill: DistillSection
    experts: dict[str, dict[str, float]] = Field(min_length=1)
    experts_at_once: int = Field(default=1, ge=1)
    generalist: GeneralistSection | None = None
    merge: MergeSection = Field(default_factory=MergeSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        domains = self.data.domains
        for name in [*domains, *self.experts]:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} must be letters, digits, '_', '.' or '-'")
        if ALL in domains and len(domains) > 1:
            raise ValueError(f"data.domains: {ALL!r} is the mean of the domains; choose another")
        if taken := [name for name in self.experts if name in RESERVED]:
            raise ValueError(f"experts: {taken[0]!r} is a name of the report; choose another")
        if beside := [name for name in self.experts if name.endswith(BESIDE_EXPERT)]:
            raise ValueError(
                f"experts: {beside[0]!r} ends as what lies beside an expert does; choose another"
            )
        shares = {"align.weights": self.align.weights}
        shares.update({f"experts.{name}": share for name, share in self.experts.items()})
        for where, weights in shares.items():
            _check_shares(where, weights, domains, empty=where == "align.weights")
        if self.generalist:
            _check_shares("generalist.weights", self.generalist.weights, domains, empty=True)
        _check_shares("merge.weights", self.merge.weights, self.experts, empty=True)
        if self.merge.weights and set(self.merge.weights) != set(self.experts):
            missing = sorted(set(self.experts) - set(self.merge.weights))[0]
            raise ValueError(f"merge.weights: the expert {missing!r} is missing")
        if self.merge.weights:
            check_total(self.merge.weights, "merge.weights")
        aligns = self.align.steps > 0
        if aligns and self.accumulation == "tree" and self.align.micro_rows is None:
            raise ValueError(
                "accumulation: tree needs align.micro_rows: the tree is one of parts of a step"
            )
        if self.distill.window_dropout and self.student.mixer != "hybrid":
            raise ValueError(
                "distill.window_dropout needs student.mixer hybrid: the others have no output gate"
            )
        full = self.student.mixer == "hybrid" and self.student.window is None
        if self.distill.state_passing and (full or self.student.keep_attention):
            raise ValueError(
                "distill.state_passing needs a student.window and no student.keep_attention: full "
                "attention would keep the keys of whole documents"
            )
        if (self.distill.kl_form == "sampled") != (self.targets.form == "sampled"):
            raise ValueError(
                f"distill.kl_form {self.distill.kl_form} does not fit targets.form "
                f"{self.targets.form}: sampled is for sampled, the others for topk"
            )
        if self.targets.rows_before and not self.distill.state_passing:
            raise ValueError(
                "targets.rows_before needs distill.state_passing: else no row goes on from another"
            )
        hybrid = self.student.mixer == "hybrid" and self.student.window is not None
        if self.evaluate.branches and not hybrid:
            raise ValueError("evaluate.branches needs student.mixer hybrid with a window")
        if self.evaluate.fidelity and not any(d.held_out_tokens for d in domains.values()):
            raise ValueError("evaluate.fidelity needs held_out_tokens in a domain")
        return self

    @property
    def trained(self) -> dict[str, dict[str, float]]:
        """Who is trained in stage II, name -> share of each domain: the experts, the generalist."""
        found = dict(self.experts)
        if self.generalist:
            found[GENERALIST] = self.generalist.weights or self._shares_together()
        return found

    @property
    def reserved_rows(self) -> int:
        """Rows of each domain that no stage trains on: the more of what the stages validate on."""
        stages = (self.align, self.distill)
        return max(s.validate_rows if s.validate_every else 0 for s in stages)

    def _shares_together(self) -> dict[str, float]:
        """Share of each domain in the text of all experts, which have equally many tokens."""
        return {
            domain: sum(own.get(domain, 0.0) / sum(own.values()) for own in self.experts.values())
            for domain in self.data.domains
        }

    def steps_of(self, name: str) -> int:
        """Steps of stage II of an expert, or of the generalist."""
        return self.distill.steps * (len(self.experts) if name == GENERALIST else 1)


def _check_shares(
    where: str, weights: Mapping[str, float], known: Iterable[str], *, empty: bool
) -> None:
    for name, share in weights.items():
        if name not in set(known):
            raise ValueError(f"{where}: {name!r} is not one of {', '.join(known)}")
        if not share >= 0:
            raise ValueError(f"{where}: {name} has {share}, expected 0 or more")
    if not (empty and not weights) and not sum(weights.values()) > 0:
        raise ValueError(f"{where}: the shares add up to 0")


def derived_seed(seed: int, *names: object) -> int:
    """A seed of its own for each use, 31 bits."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


# ---- reading and writing ------------------------------------------------------------------------


def shipped_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that come with the package.

    The quickstart's is not among them: a budget has to fill it in first.
    """
    folder = files("xlstm_distill") / "recipes"
    texts = {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in folder.iterdir()}
    return {name: texts[name] for name in sorted(texts) if name != "quickstart"}


def load_recipe(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe, a file or the name of a shipped one; `settings` are changes such as
    "align.steps=200".

    Raises UserError, one line that names the file, the key and what is wrong.
    """
    return make_recipe(read_values(path, settings), str(path))


def read_values(path: str | Path, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The keys that a recipe (as for `load_recipe`) gives, with `settings` made; not checked."""
    file, shipped = Path(path), shipped_recipes()
    if str(path) in shipped and not file.is_file():
        return _parsed(shipped[str(path)], str(path), settings)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not file.suffix:
            reason += f"; shipped recipes: {', '.join(shipped)}"
        raise UserError(f"{file}: cannot read: {reason}", usage=True) from None
    return _parsed(text, str(file), settings)


def parse_recipe(text: str, where: str, settings: Iterable[str] = ()) -> Recipe:
    """A recipe from YAML text; `where` opens the error messages."""
    return make_recipe(_parsed(text, where, settings), where)


def _parsed(text: str, where: str, settings: Iterable[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}", usage=True) from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a mapping of keys is expected", usage=True)
    for setting in settings:
        _set(values, setting)
    return values


def make_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, checked."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        hint = _nearest(error, values)
        raise UserError(f"{where}: {first_problem(error)}{hint}", usage=True) from None


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML with all its keys (atomic)."""
    write_text(path, recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as YAML with all its keys."""
    text: str = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    return text


def first_difference(a: Recipe, b: Recipe) -> str | None:
    """The first key in which two recipes differ, with both values; None if they agree."""
    return _difference(a.model_dump(), b.model_dump(), "")


def _difference(a: Any, b: Any, path: str) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            where = f"{path}.{key}" if path else str(key)
            found = _difference(a.get(key), b.get(key), where)
            if found:
                return found
        return None
    return None if a == b else f"{path} is {a!r} there and {b!r} here"


def _set(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise UserError(f"--set {setting}: expected KEY=VALUE", usage=True)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {setting}: the value is not valid YAML", usage=True) from None
    set_key(values, key, value, f"--set {setting}")


def set_key(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Change the key "align.steps", say, in plain values; `where` opens the error messages."""
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        place = _inside(place, part, where, make=True)
    if isinstance(place, list):
        _inside(place, last, where, make=False)
        place[int(last)] = value
    else:
        place[last] = value


def get_key(values: Any, key: str) -> Any:
    """What the key "align.steps", say, holds in plain values that have it."""
    for part in key.split("."):
        values = values[int(part) if isinstance(values, list) else part]
    return values


def _inside(place: Any, part: str, where: str, *, make: bool) -> Any:
    if isinstance(place, list):
        if not part.isdigit() or int(part) >= len(place):
            raise UserError(f"{where}: {part} is not one of the {len(place)} entries", usage=True)
        return place[int(part)]
    if make and part not in place:
        place[part] = {}
    inner = place.get(part)
    if make and not isinstance(inner, dict | list):
        raise UserError(f"{where}: {part} holds a value, not keys", usage=True)
    return inner


# ---- the nearest valid key ----------------------------------------------------------------------

_ALIKE = 0.75
"""difflib's ratio from which a word is taken for a misspelt key: two letters exchanged in a word of
four have it; words that share some letters (color and lora: .67) do not."""


def _nearest(error: ValidationError, values: Mapping[str, Any]) -> str:
    """ "; did you mean X?" for a misspelt key."""
    problem = error.errors(include_url=False)[0]
    if problem["type"] != "extra_forbidden":
        return ""
    *path, last = problem["loc"]
    section = _section_at(Recipe, list(path))
    if section is None:
        return ""
    close = _meant(str(last), section.model_fields)
    if close is not None:
        return f"; did you mean {close}?"
    return f"; keys there: {', '.join(section.model_fields)}"


def _meant(word: str, keys: Iterable[str]) -> str | None:
    """The key that a word stands for: one with a slip of the fingers in it, or else the only one
    that is part of it or has it as a part (held_out: held_out_tokens)."""
    known = list(keys)
    if close := difflib.get_close_matches(word, known, n=1, cutoff=_ALIKE):
        return close[0]
    own = set(word.split("_"))
    parts = [key for key in known if own <= set(key.split("_")) or own >= set(key.split("_"))]
    return parts[0] if len(parts) == 1 else None


def _section_at(kind: Any, path: list[str | int]) -> type[BaseModel] | None:
    """The model class at a path of an error, through dicts, lists and tagged unions."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _section_at(typing.get_args(kind)[0], path)
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(kind):
            tag = _tag(choice)
            if tag is not None and (not path or tag != path[0]):
                continue
            found = _section_at(choice, path if tag is None else path[1:])
            if found is not None:
                return found
        return None
    if origin in (dict, list):
        return _section_at(typing.get_args(kind)[-1], path[1:]) if path else None
    if not isinstance(kind, type) or not issubclass(kind, BaseModel):
        return None
    if not path:
        return kind
    field = kind.model_fields.get(str(path[0]))
    return None if field is None else _section_at(field.annotation, path[1:])


def _tag(choice: Any) -> Any:
    field = getattr(choice, "model_fields", {}).get("kind")
    return None if field is None else typing.get_args(field.annotation)[0]
