"""How near a student stays to its teacher on text: KL divergence, top-1 agreement, perplexity.

Fidelity is KL(teacher || student) over the whole vocabulary and the share of positions where both
find the same token most probable. Perplexity is shown beside them and proves nothing by itself:
training on in-domain text lowers it below the teacher's, for the teacher as well.

The documents of a domain are laid end to end and cut into windows of `context` tokens without
resets, so that every position beyond the first few has a far context to lose. A window is the unit
of the paired bootstrap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..communicator import ALONE, Communicator
from ..errors import UserError
from .uncertainty import FloatArray, Interval, paired_bootstrap

BUCKETS = ((0, 32), *((32 << n, 64 << n) for n in range(12)))
"""Ranges of the position in the window over which measures are also given, end excluded: each twice
as far as the one before, as many as the window reaches."""
_METRICS = ("kl", "agree", "nll")
TOKENS_AT_ONCE = 4096
"""Tokens of the windows that run together."""

IntArray = NDArray[np.int32]
Values = Mapping[str, FloatArray]
"""kl, agree and nll (0 at a window's last position) of one model, each [windows, T]."""


class FidelityTeacher(Protocol):
    """What fidelity needs of a teacher."""

    def divergence(self, students: Any, ids: Any, /) -> dict[str, NDArray[Any]]:
        """kl, agree and nll [students, B, T], teacher_nll [B, T] of int ids [B, T] (nll 0 at the
        last position)."""


class Measure(BaseModel):
    """Means over positions: kl and nll in nats a token, agree in 0..1, perplexity = exp(nll)."""

    model_config = ConfigDict(extra="forbid")

    kl: float
    agree: float
    nll: float
    perplexity: float


class DomainFidelity(BaseModel):
    """One model on one domain.

    `by_position` has one measure per bucket. `windows` and `windows_by_position` hold the values of
    each window (metric -> [windows] and metric -> [buckets][windows]), aligned between the models:
    they feed the paired bootstrap. A model that was measured on the first windows only has shorter
    lists.
    """

    model_config = ConfigDict(extra="forbid")

    overall: Measure
    by_position: list[Measure]
    windows: dict[str, list[float]]
    windows_by_position: dict[str, list[list[float]]]


class Fidelity(BaseModel):
    """Fidelity of several models to one teacher. `models` includes "teacher" itself (KL 0).

    `tokens` counts the teacher's tokens per domain, windows of `context` tokens each.
    """

    model_config = ConfigDict(extra="forbid")

    context: int
    buckets: list[tuple[int, int]]
    tokens: dict[str, int]
    models: dict[str, dict[str, DomainFidelity]]

    @property
    def domains(self) -> list[str]:
        return list(self.tokens)

    @property
    def complete(self) -> list[str]:
        """The models that were measured on every window of the teacher."""

        def windows(model: str) -> list[int]:
            return [len(of.windows["kl"]) for of in self.models[model].values()]

        return [name for name in self.models if windows(name) == windows("teacher")]

    def mean(self, model: str, bucket: int | None = None) -> Measure:
        """The mean of the domains' measures (perplexity: exp of the mean nll)."""
        per_domain = self._of(model).values()
        parts = [d.overall if bucket is None else d.by_position[bucket] for d in per_domain]
        return _measure({m: float(np.mean([getattr(p, m) for p in parts])) for m in _METRICS})

    def kl_stderr(self, model: str, bucket: int) -> float | None:
        """Standard error of the mean KL in a bucket, over the windows of each domain; None where a
        domain has one window."""
        of = [np.array(d.windows_by_position["kl"][bucket]) for d in self._of(model).values()]
        if min(map(len, of)) < 2:
            return None
        return math.sqrt(sum(float(x.var(ddof=1)) / len(x) for x in of)) / len(of)

    def ratio(
        self,
        model: str,
        control: str,
        metric: str = "kl",
        *,
        domain: str | None = None,
        bucket: int | None = None,
        n: int = 10_000,
        seed: int = 0,
    ) -> Interval | None:
        """`model`'s mean `metric` over `control`'s, with the paired 95 % interval over windows.

        None where a window of the control's has 0: a control that sees all of it is the teacher.
        Without `domain` the mean is that of the domains' means, and windows are drawn anew within
        each domain.
        """
        if metric not in _METRICS:
            raise ValueError(f"metric {metric!r} is not known: {', '.join(_METRICS)}")
        domains = self.domains if domain is None else [domain]
        sides: list[list[list[float]]] = []
        for name in (model, control):
            of = self._of(name)
            sides.append(
                [
                    of[d].windows[metric]
                    if bucket is None
                    else of[d].windows_by_position[metric][bucket]
                    for d in domains
                ]
            )
        if not all(map(all, sides[1])):
            return None
        return paired_bootstrap(sides[0], sides[1], ratio=True, n=n, seed=seed)

    def _of(self, model: str) -> dict[str, DomainFidelity]:
        if model not in self.models:
            raise ValueError(f"no model {model!r}; there are {', '.join(self.models)}")
        return self.models[model]


def _measure(means: Mapping[str, float]) -> Measure:
    return Measure(**means, perplexity=math.exp(min(means["nll"], 700.0)))


def windows_of(
    documents: Sequence[Sequence[int]], context: int, separator: int | None = None
) -> IntArray:
    """Documents laid end to end and cut into windows, int32 [windows, context].

    `separator` (for instance the end-of-text token) is put between two documents. The rest that
    does not fill a window is left out.
    """
    parts: list[Sequence[int]] = []
    for i, document in enumerate(documents):
        if i and separator is not None:
            parts.append([separator])
        parts.append(document)
    stream = np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int32)
    count = len(stream) // context
    return stream[: count * context].reshape(count, context)


def fidelity(
    models: Mapping[str, Any],
    teacher: FidelityTeacher,
    documents: Mapping[str, Sequence[Sequence[int]]],
    *,
    context: int = 1024,
    buckets: Sequence[tuple[int, int]] = BUCKETS,
    max_windows: int | None = None,
    fewer: Mapping[str, int] | None = None,
    separator: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_values: Callable[[str, IntArray, Mapping[str, Values]], None] | None = None,
    comm: Communicator = ALONE,
) -> Fidelity:
    """Compare `models` with `teacher` on documents (token ids) per domain.

    The teacher runs once per batch of windows for all models. `max_windows` bounds the windows of
    a domain (the first ones), `fewer` those of single models: {name: windows, at least 1}.
    `progress(done, total)` counts windows; `on_values(domain, windows, values)` hears what each
    model has at every position, on its windows. The ranks of `comm` take batches in turns, with
    the same result. Buckets that begin beyond `context` are dropped. Raises UserError where a
    domain is shorter than one window.
    """
    if "teacher" in models:
        raise UserError("fidelity: the name 'teacher' is the teacher's own", usage=True)
    if not documents:
        raise UserError("fidelity: no documents", usage=True)
    if context < 2:
        raise UserError(f"fidelity: context is {context}, expected at least 2", usage=True)
    inside = [(lo, min(hi, context)) for lo, hi in buckets if lo < context]
    packed = {name: windows_of(texts, context, separator) for name, texts in documents.items()}
    for name, windows in packed.items():
        if len(windows) == 0:
            raise UserError(
                f"fidelity: domain {name!r} has fewer than {context} tokens; "
                "add text or shorten the context"
            )
        packed[name] = windows[:max_windows]
    fewer = fewer or {}
    for name, count in fewer.items():
        if name not in models or count < 1:
            raise UserError(
                f"fidelity: fewer: {name!r}: {count} is not a known model with at least 1 window",
                usage=True,
            )
    total, done = sum(len(w) for w in packed.values()), 0
    found: dict[str, dict[str, DomainFidelity]] = {name: {} for name in ("teacher", *models)}
    for domain, windows in packed.items():
        values: dict[str, list[dict[str, FloatArray]]] = {name: [] for name in found}
        batches = [
            (windows[start:stop], [name for name in models if start < fewer.get(name, stop)])
            for start, stop in _batches(len(windows), context, set(fewer.values()))
        ]
        outs = comm.map(lambda b: teacher.divergence([models[n] for n in b[1]], b[0]), batches)
        for (batch, names), out in zip(batches, outs, strict=True):
            for i, name in enumerate(names):
                values[name].append({m: np.asarray(out[m][i], np.float64) for m in _METRICS})
            values["teacher"].append(
                {
                    "kl": np.zeros(batch.shape),
                    "agree": np.ones(batch.shape),
                    "nll": np.asarray(out["teacher_nll"], np.float64),
                }
            )
            done += len(batch)
            if progress is not None:
                progress(done, total)
        joined = {
            name: {m: np.concatenate([p[m] for p in parts]) for m in _METRICS}
            for name, parts in values.items()
        }
        for name, of in joined.items():
            found[name][domain] = _summarise(of, inside, f"{name} on {domain}")
        if on_values is not None:
            on_values(domain, windows, joined)
    return Fidelity(
        context=context,
        buckets=inside,
        tokens={name: windows.size for name, windows in packed.items()},
        models=found,
    )


def _batches(windows: int, context: int, ends: set[int]) -> Iterator[tuple[int, int]]:
    """Ranges of windows that run together; none goes on beyond one of `ends`."""
    rows = max(1, TOKENS_AT_ONCE // context)
    starts = sorted({0, *(end for end in ends if end < windows), windows})
    for begin, end in itertools.pairwise(starts):
        for start in range(begin, end, rows):
            yield start, min(start + rows, end)


def _summarise(
    values: Mapping[str, FloatArray], buckets: Sequence[tuple[int, int]], where: str
) -> DomainFidelity:
    """Means of [windows, T] arrays overall, by bucket and by window.

    A window's last position has no next token, hence no nll: it is left out of that mean.
    """
    for metric, array in values.items():
        if not np.isfinite(array).all():
            raise UserError(f"fidelity: {metric} of {where} is not finite; the model is damaged")

    def part(metric: str, lo: int, hi: int) -> FloatArray:
        array = values[metric]
        end = min(hi, array.shape[1] - 1) if metric == "nll" else hi
        if end <= lo:
            raise UserError(f"fidelity: the bucket {lo} to {hi} holds no next token")
        mean: FloatArray = array[:, lo:end].mean(axis=1)
        return mean

    length = values["kl"].shape[1]
    windows = {m: part(m, 0, length) for m in _METRICS}
    by_bucket = {m: [part(m, lo, hi) for lo, hi in buckets] for m in _METRICS}
    return DomainFidelity(
        overall=_measure({m: float(w.mean()) for m, w in windows.items()}),
        by_position=[
            _measure({m: float(by_bucket[m][i].mean()) for m in _METRICS})
            for i in range(len(buckets))
        ],
        windows={m: w.tolist() for m, w in windows.items()},
        windows_by_position={m: [w.tolist() for w in rows] for m, rows in by_bucket.items()},
    )
