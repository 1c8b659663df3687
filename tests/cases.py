"""The registry of op cases: one list drives every test that all ops have in common.

An `Op` says how a family of functions is called, on whichever module has them: `xlstm_distill.ops`
or `xlstm_distill.reference`. A `Case` is an op with arguments: random, never symmetric or constant,
sizes that do not divide each other. To add an op: its Op, its cases, a line in CASES.

Arguments and results are flat dictionaries of arrays. States are compared, and their gradients are
given and taken, in true units (C exp(m), n exp(m)): what m is does not matter then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from xlstm_distill.reference.attention import FEATURE_MAPS
from xlstm_distill.testing import Array, seeded

Args = dict[str, Any]
Values = dict[str, Array]


@dataclass(frozen=True)
class Op:
    """How a family of functions is called.

    forward(module, args) gives all outputs; backward(module, args, d) the gradients by argument
    name for the cotangents d of the outputs named in `cotangents`. `functions` are those it uses.
    """

    functions: tuple[str, ...]
    forward: Callable[[ModuleType, Args], Values]
    backward: Callable[[ModuleType, Args, Values], Values] | None = None
    cotangents: tuple[str, ...] = ("y",)
    cell: bool = False  # has long products of decays: the wider float32 tolerance


@dataclass(frozen=True)
class Case:
    """An op with float64 arguments; wrt: the arguments that have a gradient."""

    name: str
    op: Op
    args: Args
    wrt: tuple[str, ...] = ()

    def cast(self, dtype: Any) -> Args:
        """The arguments with every float64 array rounded to `dtype` (inv_freq stays float64)."""
        return {
            name: a.astype(dtype)
            if isinstance(a, np.ndarray) and a.dtype == np.float64 and name != "inv_freq"
            else a
            for name, a in self.args.items()
        }

    def random_cotangents(self, outputs: Values) -> Values:
        """Random cotangents of the differentiable outputs, in their shapes and dtypes."""
        rng = seeded(self.name, "cotangents")
        return {
            name: rng.standard_normal(outputs[name].shape).astype(outputs[name].dtype)
            for name in self.op.cotangents
            if name in outputs
        }


def resets(rng: np.random.Generator, batch: int, steps: int, share: float = 0.15) -> Array:
    """Random document starts, of different number in each row; the first step may not be one."""
    return rng.random((batch, steps)) < share


# ---- rows ---------------------------------------------------------------------------------------


def _linear_backward(m: ModuleType, a: Args, d: Values) -> Values:
    dx, dw, db = m.linear_backward(d["y"], a["x"], a["w"], bias=a["b"] is not None)
    return {"x": dx, "w": dw} if db is None else {"x": dx, "w": dw, "b": db}


LINEAR = Op(
    ("linear_forward", "linear_backward"),
    lambda m, a: {"y": m.linear_forward(a["x"], a["w"], a["b"])},
    _linear_backward,
)


def linear_cases() -> Iterator[Case]:
    for n, k, m, bias in [
        (1, 1, 1, False),
        (3, 5, 2, True),
        (33, 17, 65, False),
        (70, 131, 101, True),
    ]:
        rng = seeded("linear", n)
        args = {
            "x": rng.standard_normal((n, k)),
            "w": rng.standard_normal((m, k)),
            "b": rng.standard_normal(m) if bias else None,
        }
        yield Case(f"linear {n}x{k}x{m}", LINEAR, args, ("x", "w", "b") if bias else ("x", "w"))


EMBEDDING = Op(
    ("embedding_forward", "embedding_backward"),
    lambda m, a: {"y": m.embedding_forward(a["ids"], a["w"])},
    lambda m, a, d: {"w": m.embedding_backward(d["y"], a["ids"], a["w"].shape[0])},
)


def embedding_cases() -> Iterator[Case]:
    for n, v, d in [(1, 1, 1), (50, 7, 9), (40, 300, 33)]:
        rng = seeded("embedding", n)
        args = {"ids": rng.integers(0, v, n, dtype=np.int32), "w": rng.standard_normal((v, d))}
        yield Case(f"embedding {n} of {v}x{d}", EMBEDDING, args, ("w",))


def _rmsnorm_forward(m: ModuleType, a: Args) -> Values:
    y, rstd = m.rmsnorm_forward(a["x"], a["w"], a["eps"])
    return {"y": y, "rstd": rstd}


def _rmsnorm_backward(m: ModuleType, a: Args, d: Values) -> Values:
    _, rstd = m.rmsnorm_forward(a["x"], a["w"], a["eps"])
    dx, dw = m.rmsnorm_backward(d["y"], a["x"], a["w"], rstd)
    return {"x": dx, "w": dw}


RMSNORM = Op(("rmsnorm_forward", "rmsnorm_backward"), _rmsnorm_forward, _rmsnorm_backward)


def rmsnorm_cases() -> Iterator[Case]:
    for n, d, eps in [(1, 1, 1e-5), (5, 7, 1e-6), (67, 129, 0.3)]:
        rng = seeded("rmsnorm", n)
        args = {"x": rng.standard_normal((n, d)), "w": 1 + rng.standard_normal(d), "eps": eps}
        yield Case(f"rmsnorm {n}x{d}", RMSNORM, args, ("x", "w"))


def _swiglu_backward(m: ModuleType, a: Args, d: Values) -> Values:
    dgate, dup = m.swiglu_backward(d["y"], a["gate"], a["up"])
    return {"gate": dgate, "up": dup}


SWIGLU = Op(
    ("swiglu_forward", "swiglu_backward"),
    lambda m, a: {"y": m.swiglu_forward(a["gate"], a["up"])},
    _swiglu_backward,
)


def swiglu_cases() -> Iterator[Case]:
    for n, f, spread in [(1, 1, 1.0), (9, 37, 2.0), (5, 130, 30.0)]:
        rng = seeded("swiglu", n)
        args = {
            "gate": spread * rng.standard_normal((n, f)),
            "up": rng.standard_normal((n, f)),
        }
        yield Case(f"swiglu {n}x{f} spread {spread:g}", SWIGLU, args, ("gate", "up"))


# ---- optimiser, sums, merge ---------------------------------------------------------------------


def _adamw(m: ModuleType, a: Args) -> Values:
    vectors = {name: a[name].copy() for name in ("p", "g", "m", "v")}
    m.adamw_step(*vectors.values(), **a["rates"])
    return vectors


ADAMW = Op(("adamw_step",), _adamw)


def adamw_cases() -> Iterator[Case]:
    for n, step, scale in [(1, 1, 1.0), (37, 1, 0.3), (20_011, 12, 0.7)]:
        rng = seeded("adamw", n)
        p, g, m = (rng.standard_normal(n) for _ in range(3))
        rates = {"lr": 0.013, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        rates |= {"step": step, "scale": scale}
        args = {"p": p, "g": g, "m": m, "v": rng.random(n), "rates": rates}
        yield Case(f"adamw {n} step {step}", ADAMW, args)


SUMSQ = Op(("sumsq",), lambda m, a: {"y": np.asarray(m.sumsq(a["x"]))})
MERGE = Op(
    ("merge_linear",),
    lambda m, a: {"y": m.merge_linear([a[f"array{i}"] for i in range(4)], a["weights"])},
)


def merge_cases() -> Iterator[Case]:
    rng = seeded("merge")
    for shape in [(1,), (33, 7), (3, 1000, 17)]:
        yield Case(f"sumsq {shape}", SUMSQ, {"x": rng.standard_normal(shape)})
        args = {f"array{i}": rng.standard_normal(shape) for i in range(4)}
        args["array2"][...] = np.nan  # its weight is 0: never read
        yield Case(f"merge {shape}", MERGE, {**args, "weights": [0.35, 0.5, 0.0, 0.15]})


# ---- losses -------------------------------------------------------------------------------------


def _mse_forward(m: ModuleType, a: Args) -> Values:
    err, ref = m.mse_forward(a["h"], a["target"])
    return {"err": np.asarray(err), "ref": np.asarray(ref)}


MSE = Op(
    ("mse_forward", "mse_backward"),
    _mse_forward,
    lambda m, a, d: {"h": m.mse_backward(a["h"], a["target"], float(d["err"]))},
    ("err",),
)


def mse_cases() -> Iterator[Case]:
    for shape in [(1, 1), (31, 47)]:
        rng = seeded("mse", shape)
        args = {"h": rng.standard_normal(shape), "target": rng.standard_normal(shape)}
        yield Case(f"mse {shape}", MSE, args, ("h",))


def _head_loss(m: ModuleType, a: Args, scale: float) -> tuple[Any, ...]:
    return m.head_loss(
        a["x"], a["w"], a["labels"], a["ids"], a["logp"], a["ce"], a["kl"], a["form"], scale
    )


def _head_forward(m: ModuleType, a: Args) -> Values:
    ce, kl, count, _, _ = _head_loss(m, a, 1.0)
    loss = a["ce"] * ce + a["kl"] * kl
    values = {"loss": loss, "ce": ce, "kl": kl, "count": float(count)}
    return {name: np.asarray(value) for name, value in values.items()}


def _head_backward(m: ModuleType, a: Args, d: Values) -> Values:
    _, _, _, dx, dw = _head_loss(m, a, float(d["loss"]))
    return {"x": dx, "w": dw}


HEAD_LOSS = Op(("head_loss",), _head_forward, _head_backward, ("loss",))


def _targets(
    rng: np.random.Generator, rows: int, vocab: int, k: int, form: str, peaked: bool
) -> tuple[Array, Array]:
    """Distinct ids and log-probabilities of a teacher; every third row has padding."""
    ids = np.argsort(rng.random((rows, vocab)), axis=1)[:, :k].astype(np.int32)
    p = rng.dirichlet(np.full(k + 1, 0.05 if peaked else 1.0), rows)[:, :k] + 1e-6
    logp = np.log(p / (1.001 * np.maximum(p.sum(axis=1, keepdims=True), 1 / 1.001)))
    if form == "sampled":
        logp = np.log(rng.integers(1, 5, (rows, k)) / (3.0 * k))
    if k > 1:  # padding repeats an id that is a target
        ids[::3, -1], logp[::3, -1] = ids[::3, 0], -np.inf
    return ids, logp


def head_loss_cases() -> Iterator[Case]:
    """Plain cross-entropy, each form of the KL, and a student that is sure of what it says."""
    kinds = [
        ("", 1, 3, 2, 0, 1.0),
        ("", 37, 19, 101, 0, 1.0),
        ("renormalised", 1, 1, 5, 1, 1.0),
        ("renormalised", 37, 19, 101, 11, 1.0),
        ("tail", 37, 19, 101, 11, 1.0),
        ("tail", 6, 5, 9, 8, 1.0),
        ("tail", 29, 16, 60, 12, 5.0),
        ("sampled", 37, 19, 101, 11, 1.0),
        ("renormalised", 530, 8, 33, 4, 0.3),
    ]
    for form, n, d, v, k, sure in kinds:
        rng = seeded("head", form, n, v)
        labels = rng.integers(-1, v, n, dtype=np.int32)
        labels[0] = v - 1
        labels[-1] = -1 if n > 1 else v - 1
        x, w = rng.standard_normal((n, d)), sure * rng.standard_normal((v, d))
        ids, logp = _targets(rng, n, v, k, form, sure > 1) if k else (None, None)
        args: Args = {"x": x, "w": w, "labels": labels, "ids": ids, "logp": logp}
        args |= {"ce": 0.3, "kl": 0.7 if k else 0.0, "form": form or "renormalised"}
        name = f"head {form or 'ce'} {n}x{d} V{v} k{k}" + (" sure" if sure > 1 else "")
        yield Case(name, HEAD_LOSS, args, ("x", "w"))
    yield _far_targets()


def _far_targets() -> Case:
    """Tail: the student puts all but e^-25 on the teacher's targets, the teacher all but 5 %."""
    rng = seeded("far targets")
    x, w = rng.standard_normal((4, 6)), 0.1 * rng.standard_normal((40, 6))
    x[:, 0], w[:, 0] = 1.0, -25.0
    w[:5, 0] = rng.standard_normal(5)
    ids = np.tile(np.arange(5, dtype=np.int32), (4, 1))
    logp = np.log(0.95 * rng.dirichlet(np.ones(5), 4))
    labels = np.array([0, 3, 4, 1], np.int32)
    args = {"x": x, "w": w, "labels": labels, "ids": ids, "logp": logp}
    return Case(
        "head tail far", HEAD_LOSS, {**args, "ce": 0.1, "kl": 0.9, "form": "tail"}, ("x", "w")
    )


def _head_topk(m: ModuleType, a: Args) -> Values:
    return dict(zip(("ids", "logp", "mass"), m.head_topk(a["x"], a["w"], a["k"]), strict=True))


def _head_divergence(m: ModuleType, a: Args) -> Values:
    names = ("kl", "agree", "nll", "teacher_nll")
    return dict(zip(names, m.head_divergence(*a.values()), strict=True))


def _head_draws(m: ModuleType, a: Args) -> Values:
    return dict(zip(("ids", "counts"), m.head_draws(a["x"], a["w"], a["uniform"]), strict=True))


TOPK = Op(("head_topk",), _head_topk)
DRAWS = Op(("head_draws",), _head_draws)
DIVERGENCE = Op(("head_divergence",), _head_divergence)


def head_cases() -> Iterator[Case]:
    for n, d, v, k in [(1, 2, 1, 1), (37, 19, 101, 11), (7, 8, 33, 33), (515, 6, 40, 5)]:
        rng = seeded("topk", n, v)
        x, w = rng.standard_normal((n, d)), rng.standard_normal((v, d))
        yield Case(f"topk {n}x{d} V{v} k{k}", TOPK, {"x": x, "w": w, "k": k})
        # multiples of 1/8 have the same logits in both types
        eighths = {"x": np.round(8 * x) / 8, "w": np.round(8 * w) / 8}
        uniform = np.sort(rng.random((n, 3 * k)))
        yield Case(f"draws {n}x{d} V{v} k{3 * k}", DRAWS, {**eighths, "uniform": uniform})
        pair: Args = {"x": x, "w": w, "teacher_x": rng.standard_normal((n, d))}
        pair |= {"teacher_w": rng.standard_normal((v, d)), "labels": rng.integers(-1, v, n)}
        yield Case(f"divergence {n}x{d} V{v}", DIVERGENCE, pair)


SAMPLE = Op(
    ("sample",),
    lambda m, a: {"ids": m.sample(a["logits"], a["temperature"], a["top_p"], a["uniform"])},
)


def sample_cases() -> Iterator[Case]:
    """Equal logits among them, a vocabulary of one, nuclei of one entry and of nearly all."""
    for temperature, top_p in itertools.product((0.0, 0.7, 1.0), (0.05, 0.5, 0.95, 0.9999, 1.0)):
        for n, v, spread in [(1, 1, 1.0), (40, 7, 3.0), (300, 1500, 3.0), (64, 257, 0.0)]:
            rng = seeded("sample", n, v)
            # multiples of 1/8 are the same in both types, and some are equal
            logits = np.round(8 * spread * rng.standard_normal((n, v))) / 8
            args = {"logits": logits, "temperature": temperature, "top_p": top_p}
            name = f"sample {n} V{v} temperature {temperature} top_p {top_p}"
            yield Case(name, SAMPLE, {**args, "uniform": rng.random(n)})


# ---- attention ----------------------------------------------------------------------------------

ROPE = Op(
    ("rope_forward",),
    lambda m, a: {"y": m.rope_forward(a["x"], a["positions"], a["inv_freq"], scale=a["scale"])},
    lambda m, a, d: {
        "x": m.rope_forward(d["y"], a["positions"], a["inv_freq"], inverse=True, scale=a["scale"])
    },
)


def rope_cases() -> Iterator[Case]:
    for b, h, t, d, scale in [(1, 1, 1, 2, 1.0), (2, 3, 7, 10, 1.2), (1, 2, 40, 64, 1.0)]:
        rng = seeded("rope", t)
        args = {
            "x": rng.standard_normal((b, h, t, d)),
            "positions": rng.integers(0, 9000, (b, t), dtype=np.int32),
            "inv_freq": 10000.0 ** (-np.arange(d // 2) / (d // 2)),
            "scale": scale,
        }
        yield Case(f"rope {b}x{h}x{t}x{d}", ROPE, args, ("x",))


def _attention_args(a: Args) -> tuple[Any, ...]:
    return a["q"], a["k"], a["v"], a["window"], a["sinks"], a["reset"]


def _attention_backward(m: ModuleType, a: Args, d: Values) -> Values:
    gradients = m.attention_backward(d["y"], *_attention_args(a))
    return dict(zip(("q", "k", "v"), gradients, strict=True))


ATTENTION = Op(
    ("attention_forward", "attention_backward"),
    lambda m, a: {"y": m.attention_forward(*_attention_args(a))},
    _attention_backward,
)


def attention_cases() -> Iterator[Case]:
    for b, h, g, t, d, window, sinks, packed in [
        (1, 1, 1, 1, 2, None, 0, False),
        (2, 4, 2, 37, 9, None, 0, True),
        (1, 3, 3, 37, 8, 1, 0, False),
        (2, 4, 2, 37, 8, 7, 0, True),
        (2, 6, 2, 41, 8, 7, 3, True),
        (1, 3, 1, 130, 16, 16, 4, False),
        (1, 2, 1, 70, 10, 64, 4, True),
        (1, 2, 2, 20, 5, 50, 4, False),
        (2, 2, 1, 300, 12, 64, 4, True),
        (1, 2, 1, 9, 4, 2, 40, True),
    ]:
        rng = seeded("attention", t, window, sinks)
        args = {
            "q": 2 * rng.standard_normal((b, h, t, d)),
            "k": rng.standard_normal((b, g, t, d)),
            "v": rng.standard_normal((b, g, t, d)),
            "window": window,
            "sinks": sinks,
            "reset": resets(rng, b, t, 0.05) if packed else None,
        }
        name = f"attention {b}x{h}/{g}x{t}x{d} W{window} S{sinks}" + (" packed" if packed else "")
        yield Case(name, ATTENTION, args, ("q", "k", "v"))


def _feature_map_backward(m: ModuleType, a: Args, d: Values) -> Values:
    dx, dw = m.feature_map_backward(d["y"], a["x"], a["w"], a["feature_map"])
    return {"x": dx, "w": dw}


FEATURE_MAP = Op(
    ("feature_map_forward", "feature_map_backward"),
    lambda m, a: {"y": m.feature_map_forward(a["x"], a["w"], a["feature_map"])},
    _feature_map_backward,
)


def _named(feature_map: str) -> str:
    """In the name of a case, where it is not the default."""
    return "" if feature_map == "softmax" else f" {feature_map}"


def off_the_kink(args: Args, inputs: str, maps: str) -> None:
    """Arguments with features below 0 and above, none near it: there the slope of elu + 1 has a
    kink, and a finite difference must not step over one."""
    for name in inputs.split():
        args[name] = np.abs(args[name])
    for name in maps.split():
        args[name] = np.abs(args[name]) * (-1.0) ** np.arange(args[name].shape[-1])


def feature_map_cases() -> Iterator[Case]:
    sizes = [
        (1, 1, 1, 1, 1, 1.0),
        (2, 6, 2, 13, 7, 0.5),
        (1, 2, 1, 150, 16, 0.3),
        (1, 2, 2, 5, 8, 12.0),
    ]
    for feature_map, (b, h, g, t, d, spread) in itertools.product(FEATURE_MAPS, sizes):
        rng = seeded("feature map", t)
        args = {
            "x": rng.standard_normal((b, g, t, d)),
            "w": spread * rng.standard_normal((h, d, d)),
            "feature_map": feature_map,
        }
        if feature_map == "elu":
            off_the_kink(args, "x", "w")
        name = f"feature map {b}x{h}/{g}x{t}x{d} spread {spread:g}" + _named(feature_map)
        yield Case(name, FEATURE_MAP, args, ("x", "w"))


# ---- gates --------------------------------------------------------------------------------------


def _output_gate_backward(m: ModuleType, a: Args, d: Values) -> Values:
    gradients = m.output_gate_backward(d["y"], a["q"], a["k"], a["v"], a["w"])
    return dict(zip(("q", "k", "v", "w", "b"), gradients, strict=True))


OUTPUT_GATE = Op(
    ("output_gate_forward", "output_gate_backward"),
    lambda m, a: {"y": m.output_gate_forward(a["q"], a["k"], a["v"], a["w"], a["b"])},
    _output_gate_backward,
)


def _mix_backward(m: ModuleType, a: Args, d: Values) -> Values:
    gradients = m.mix_backward(d["y"], a["hm"], a["hs"], a["a"])
    return dict(zip(("hm", "hs", "a"), gradients, strict=True))


MIX = Op(
    ("mix_forward", "mix_backward"),
    lambda m, a: {"y": m.mix_forward(a["hm"], a["hs"], a["a"])},
    _mix_backward,
)


def _fold(m: ModuleType, a: Args) -> Values:
    w, b = m.fold_output_gate(**a)
    return {"w": w, "b": b}


FOLD = Op(("fold_output_gate",), _fold)


def gate_cases() -> Iterator[Case]:
    for b, h, g, t, d, width in [(1, 1, 1, 1, 1, 1), (2, 6, 2, 13, 5, 11), (1, 3, 1, 70, 16, 48)]:
        rng = seeded("gates", t)
        shape = f"{b}x{h}/{g}x{t}x{d}"
        args = {
            "q": rng.standard_normal((b, h, t, d)),
            "k": rng.standard_normal((b, g, t, d)),
            "v": rng.standard_normal((b, g, t, d)),
            "w": rng.standard_normal((h, 3 * d)),
            "b": rng.standard_normal(h),
        }
        yield Case(f"output gate {shape}", OUTPUT_GATE, args, ("q", "k", "v", "w", "b"))
        hm, hs = (rng.standard_normal((b, h, t, d)) for _ in range(2))
        mix = {"hm": hm, "hs": hs, "a": 3 * rng.standard_normal((b, h, t))}
        yield Case(f"mix {shape}", MIX, mix, ("hm", "hs", "a"))
        fold = {
            "wq": rng.standard_normal((h * d, width)),
            "wk": rng.standard_normal((g * d, width)),
            "wv": rng.standard_normal((g * d, width)),
            "w": args["w"],
            "b": args["b"],
        }
        yield Case(f"fold {shape}", FOLD, fold)
        biases = {"bq": h * d, "bk": g * d, "bv": g * d}
        fold |= {name: rng.standard_normal(size) for name, size in biases.items()}
        yield Case(f"fold with biases {shape}", FOLD, fold)


# ---- LoLCATs ------------------------------------------------------------------------------------

LOLCATS_INPUTS = ("q", "k", "v", "w_q", "w_k", "factor")


def _lolcats_args(a: Args) -> tuple[Any, ...]:
    options = ("window", "sinks", "reset", "chunk", "feature_map")
    return tuple(a[name] for name in (*LOLCATS_INPUTS, *options))


def _lolcats_backward(m: ModuleType, a: Args, d: Values) -> Values:
    gradients = m.lolcats_backward(d["y"], *_lolcats_args(a))
    return dict(zip(LOLCATS_INPUTS, gradients, strict=True))


LOLCATS = Op(
    ("lolcats_forward", "lolcats_backward"),
    lambda m, a: {"y": m.lolcats_forward(*_lolcats_args(a))},
    _lolcats_backward,
)


def lolcats_cases() -> Iterator[Case]:
    """Windows of one and over the row, sinks, documents, columns in more than one chunk (300).

    No query has its two largest scores within a step of a finite difference: there y has a kink.
    """
    sizes = [
        (1, 1, 1, 1, 2, 1, 0, 64, False),
        (2, 4, 2, 37, 9, None, 0, 16, True),
        (1, 3, 3, 37, 8, 1, 0, 16, False),
        (2, 4, 2, 61, 8, 7, 0, 16, True),
        (2, 6, 2, 61, 8, 7, 3, 8, True),
        (1, 2, 1, 9, 4, 2, 40, 4, True),
        (1, 2, 1, 100, 16, 64, 4, 64, False),
        (1, 2, 1, 330, 6, 300, 2, 64, False),
    ]
    for feature_map, size in itertools.product(FEATURE_MAPS, sizes):
        b, h, g, t, d, window, sinks, chunk, packed = size
        rng = seeded("lolcats", t, window, sinks)
        args = {
            "q": 2 * rng.standard_normal((b, h, t, d)),
            "k": rng.standard_normal((b, g, t, d)),
            "v": rng.standard_normal((b, g, t, d)),
            "w_q": 0.5 * rng.standard_normal((h, d, d)),
            "w_k": 0.5 * rng.standard_normal((h, d, d)),
            "factor": rng.standard_normal(h) - 1,
            "window": window,
            "sinks": sinks,
            "reset": resets(rng, b, t, 0.05) if packed else None,
            "chunk": chunk,
            "feature_map": feature_map,
        }
        if feature_map == "elu":
            off_the_kink(args, "q k", "w_q w_k")
        name = f"lolcats {b}x{h}/{g}x{t}x{d} W{window} S{sinks}" + " packed" * packed
        name += _named(feature_map)
        yield Case(name, LOLCATS, args, LOLCATS_INPUTS)


# ---- mLSTM --------------------------------------------------------------------------------------


def _mlstm_call(a: Args) -> tuple[tuple[Array, ...], Args]:
    state = (a["c0"], a["n0"], a["m0"]) if "c0" in a else None
    options = {"state": state, "normalizer": a["normalizer"], "scale": a["scale"]}
    options |= {"chunk": a["chunk"], "reset": a["reset"]}
    return tuple(a[name] for name in "qkvif"), options


def _mlstm_forward(m: ModuleType, a: Args) -> Values:
    arrays, options = _mlstm_call(a)
    h, (c, n, stabiliser) = m.mlstm_forward(*arrays, **options, form=a["form"])
    if not a["last"]:
        return {"h": h}
    size = np.exp(stabiliser)
    return {"h": h, "c": c * size[..., None, None], "n": n * size[..., None]}


def _mlstm_backward(m: ModuleType, a: Args, d: Values) -> Values:
    arrays, options = _mlstm_call(a)
    dstate = None
    if a["last"]:  # L as a function of C is <d, C exp(m)>
        _, (_, _, stabiliser) = m.mlstm_forward(*arrays, **options, form=a["form"])
        size = np.exp(stabiliser)
        dstate = (d["c"] * size[..., None, None], d["n"] * size[..., None], np.zeros_like(size))
    *gradients, dfirst = m.mlstm_backward(d["h"], *arrays, **options, dstate=dstate)
    named = dict(zip("qkvif", gradients, strict=True))
    return named if "c0" not in a else {**named, "c0": dfirst[0], "n0": dfirst[1]}


MLSTM = Op(
    ("mlstm_forward", "mlstm_backward"),
    _mlstm_forward,
    _mlstm_backward,
    ("h", "c", "n"),
    cell=True,
)


def mlstm_case(
    steps: int,
    normalizer: str = "ratio",
    form: str = "chunkwise",
    chunk: int = 16,
    start: bool = False,
    packed: bool = False,
    heads: tuple[int, int] = (2, 3),
    widths: tuple[int, int] = (6, 5),
    scale: float | None = None,
    last: bool = True,
    gates: str = "",
) -> Case:
    """Ratio with positive q, k (features are), max with signed ones; see `gates` below."""
    rng = seeded("mlstm", steps, normalizer, start, packed)
    (b, h), (d, e) = heads, widths
    q, k = (rng.standard_normal((b, h, steps, d)) for _ in range(2))
    if normalizer == "ratio":
        q, k = rng.dirichlet(np.ones(d), (2, b, h, steps))
    i, f = rng.standard_normal((b, h, steps)), 2 + 2 * rng.standard_normal((b, h, steps))
    if gates == "tiny i":
        i -= 110.0
    elif gates == "open f":
        f += 30.0
    elif gates == "closed f":
        f -= 60.0
    elif gates == "zero q":  # 0/0 is 0 under ratio, and so are the gradients of those steps
        q[:, :, ::3] = 0
    args: Args = {"q": q, "k": k, "v": rng.standard_normal((b, h, steps, e)), "i": i, "f": f}
    args |= {"normalizer": normalizer, "form": form, "chunk": chunk, "scale": scale, "last": last}
    args["reset"] = resets(rng, b, steps, 0.08) if packed else None
    wrt = ["q", "k", "v", "i", "f"]
    if start:
        c0, n0 = rng.standard_normal((b, h, d, e)), rng.random((b, h, d)) + 0.1
        args |= {"c0": c0, "n0": n0, "m0": rng.standard_normal((b, h))}
        wrt += ["c0", "n0"]
    name = f"mlstm {normalizer} {form} T{steps} chunk{chunk}"
    for flag, word in ((start, " state"), (packed, " packed"), (gates, f" {gates}")):
        name += word if flag else ""
    return Case(name, MLSTM, args, () if gates == "zero q" else tuple(wrt))


def mlstm_cases() -> Iterator[Case]:
    for normalizer in ("ratio", "max"):
        for form in ("recurrent", "parallel", "chunkwise"):
            yield mlstm_case(1, normalizer, form)
            yield mlstm_case(37, normalizer, form, 16, start=True, packed=True)
        yield mlstm_case(1, normalizer, start=True, chunk=64)
        yield mlstm_case(7, normalizer, packed=True, scale=0.7)
        yield mlstm_case(64, normalizer, chunk=64, start=True)
        yield mlstm_case(65, normalizer, chunk=64)
        yield mlstm_case(130, normalizer, chunk=32, packed=True, heads=(1, 2), widths=(16, 16))
        yield mlstm_case(33, normalizer, chunk=1, start=True, packed=True)
        yield mlstm_case(50, normalizer, gates="open f", heads=(1, 2))
        yield mlstm_case(50, normalizer, gates="closed f", heads=(1, 2))
    yield mlstm_case(20, "ratio", gates="zero q", start=True)
    yield mlstm_case(40, "ratio", gates="tiny i", heads=(1, 2), last=False)
    yield mlstm_case(40, "ratio", "recurrent", gates="tiny i", heads=(1, 2), last=False)


def _mapped_forward(m: ModuleType, a: Args) -> Values:
    arrays = [a[name] for name in ("q", "k", "v", "i", "f", "w_q", "w_k")]
    options = {name: a[name] for name in ("reset", "feature_map")}
    h, (c, n, stabiliser) = m.mapped_mlstm_forward(*arrays, chunk=16, **options)
    size = np.exp(stabiliser)
    return {"h": h, "c": c * size[..., None, None], "n": n * size[..., None]}


MAPPED_MLSTM = Op(("mapped_mlstm_forward",), _mapped_forward, cell=True)


def mapped_mlstm_cases() -> Iterator[Case]:
    for (h, g), packed, feature_map in itertools.product(
        ((2, 2), (6, 2)), (False, True), FEATURE_MAPS
    ):
        rng = seeded("mapped mlstm", h, packed)
        b, t, d, e = 2, 37, 6, 5
        args = {
            "q": rng.standard_normal((b, h, t, d)),
            "k": rng.standard_normal((b, g, t, d)),
            "v": rng.standard_normal((b, h, t, e)),
            "i": rng.standard_normal((b, h, t)),
            "f": 2 + 2 * rng.standard_normal((b, h, t)),
            "w_q": rng.standard_normal((h, d, d)),
            "w_k": rng.standard_normal((h, d, d)),
            "reset": resets(rng, b, t, 0.08) if packed else None,
            "feature_map": feature_map,
        }
        name = f"mapped mlstm {h}/{g}" + " packed" * packed + _named(feature_map)
        yield Case(name, MAPPED_MLSTM, args)


# ---- sLSTM --------------------------------------------------------------------------------------


def _slstm_call(a: Args) -> Args:
    state = (a["y0"], a["c0"], a["n0"], a["m0"]) if "c0" in a else None
    return {"x": a["x"], "r": a["r"], "state": state, "reset": a["reset"]}


def _slstm_forward(m: ModuleType, a: Args) -> Values:
    y, (last, c, n, stabiliser) = m.slstm_forward(**_slstm_call(a))
    size = np.exp(stabiliser)
    return {"y": y, "last": last, "c": c * size, "n": n * size}


def _slstm_backward(m: ModuleType, a: Args, d: Values) -> Values:
    _, (_, _, _, stabiliser) = m.slstm_forward(**_slstm_call(a))
    size = np.exp(stabiliser)
    dstate = (d["last"], d["c"] * size, d["n"] * size, np.zeros_like(size))
    dx, dr, dfirst = m.slstm_backward(d["y"], **_slstm_call(a), dstate=dstate)
    named = {"x": dx, "r": dr}
    return (
        named if "c0" not in a else {**named, **dict(zip(("y0", "c0", "n0"), dfirst, strict=False))}
    )


SLSTM = Op(
    ("slstm_forward", "slstm_backward"),
    _slstm_forward,
    _slstm_backward,
    ("y", "last", "c", "n"),
    cell=True,
)


def slstm_cases() -> Iterator[Case]:
    for b, h, t, d, start, packed in [
        (1, 1, 1, 1, False, False),
        (2, 3, 1, 5, True, False),
        (2, 3, 23, 5, False, True),
        (3, 2, 40, 4, True, True),
        (1, 2, 30, 17, True, False),
    ]:
        rng = seeded("slstm", t, d)
        r = 0.5 * rng.standard_normal((h, 4, d, d))
        args: Args = {"x": rng.standard_normal((b, h, t, 4, d)), "r": r}
        args["reset"] = resets(rng, b, t) if packed else None
        wrt = ["x", "r"]
        if start:
            y0, c0, m0 = (rng.standard_normal((b, h, d)) for _ in range(3))
            args |= {"y0": y0, "c0": c0, "n0": rng.random((b, h, d)) + 0.2, "m0": m0}
            wrt += ["y0", "c0", "n0"]
        name = f"slstm {b}x{h}x{t}x{d}" + " state" * start + " packed" * packed
        yield Case(name, SLSTM, args, tuple(wrt))


CASES: list[Case] = [
    *linear_cases(),
    *embedding_cases(),
    *rmsnorm_cases(),
    *swiglu_cases(),
    *adamw_cases(),
    *merge_cases(),
    *mse_cases(),
    *head_loss_cases(),
    *head_cases(),
    *sample_cases(),
    *rope_cases(),
    *attention_cases(),
    *feature_map_cases(),
    *gate_cases(),
    *lolcats_cases(),
    *mlstm_cases(),
    *mapped_mlstm_cases(),
    *slstm_cases(),
]
