"""How fast the core is on this machine: time, GFLOP/s and share of the machine's own peak.

Suites: "gemm" (matrix products of the model), "mlstm" and "attention" (the sequence ops), "train"
(a training step of a student of SmolLM2-135M's shape with random weights). Nothing is downloaded.
Ratios to other libraries are made by `benchmarks/bench.py` of the source tree, which adds rivals to
the cases defined here.

Floating-point operations count the products that the method needs (causal halves once), not what an
implementation happens to do, so a share of the peak can be compared between implementations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xlstm_distill import ops, runtime
from xlstm_distill.config import MixerConfig, ModelConfig
from xlstm_distill.errors import UserError
from xlstm_distill.model import Compute, Model
from xlstm_distill.runtime import core

SUITES = ("gemm", "mlstm", "attention", "train")
COMPUTE: tuple[Compute, ...] = ("f32", "mixed")
CHUNK = 64
WINDOW, SINKS = 64, 4

SMOLLM2_135M: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_ids": [2],
    "pad_token_id": 2,
}


class Case(NamedTuple):
    """One thing to measure. `run` does it once; `sizes` lets a rival do the same; `compute` says
    which peak its share is of."""

    suite: str
    name: str
    run: Callable[[], Any]
    flops: float
    tokens: int
    sizes: Mapping[str, int]
    compute: Compute = "f32"


# ---- measuring ----------------------------------------------------------------------------------


def measure(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each run, the runs taken in turns so that a slow spell of the machine hits all.

    One unmeasured turn warms up; then turns until `seconds` have gone by, at least three.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while min(map(len, times.values())) < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def peak(compute: Compute = "f32", seconds: float = 0.3) -> float:
    """GFLOP/s of multiply-adds in registers on all threads, this instruction set, best of many."""
    module, rounds, best, mixed = core(), 200_000, 0.0, int(compute != "f32")
    module.peak(rounds, mixed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        flops = module.peak(rounds, mixed)
        best = max(best, flops / (time.perf_counter() - start))
    return best / 1e9


def machine() -> dict[str, Any]:
    """Processor, instruction set, threads and measured peaks (GFLOP/s) of float32 and of bf16
    operands."""
    return {
        "cpu": runtime.cpu_name(),
        "isa": runtime.isa(),
        "threads": runtime.threads(),
        "peak_gflops": {compute: round(peak(compute), 1) for compute in COMPUTE},
    }


# ---- cases --------------------------------------------------------------------------------------


def _random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def gemm_cases() -> Iterator[Case]:
    """Products of SmolLM2-135M: projections, MLP and head for 2,048, 256 and 1 rows."""
    for m, n, k in (
        (2048, 576, 576),
        (2048, 1536, 576),
        (2048, 576, 1536),
        (512, 49152, 576),
        (256, 1536, 576),
        (1, 49152, 576),
        (1024, 1024, 1024),
    ):
        a, b, c = _random(m, k), _random(n, k), np.empty((m, n), np.float32)
        for compute in COMPUTE:

            def run(c: Any = c, a: Any = a, b: Any = b, mixed: bool = compute == "mixed") -> None:
                core().matmul(c, a, b, 0, 1, 1.0, 0.0, int(mixed))

            sizes, name = {"m": m, "n": n, "k": k}, f"{m}x{n}x{k} {compute}"
            yield Case("gemm", name, run, 2.0 * m * n * k, m, sizes, compute)


def mlstm_flops(tokens: float, heads: int, d: int, chunk: int, *, backward: bool) -> float:
    """Products of the chunkwise mLSTM: within chunks (causal half) and through the state."""
    inside = chunk * d  # 2 D for each of chunk / 2 keys
    if backward:
        return tokens * heads * (5.0 * inside + 10.0 * d * d)
    return tokens * heads * (2.0 * inside + 4.0 * d * d)


def attention_flops(tokens: float, heads: int, d: int, visible: float, *, backward: bool) -> float:
    """Products of attention over `visible` keys a query."""
    return tokens * heads * visible * d * (10.0 if backward else 4.0)


def _visible(steps: int, window: int | None, sinks: int) -> float:
    """Mean number of keys that a query sees."""
    reach = steps if window is None else window
    t = np.arange(steps)
    return float(np.mean(np.minimum(t + 1, reach) + np.clip(t + 1 - reach, 0, sinks)))


def mlstm_cases() -> Iterator[Case]:
    """The mLSTM at SmolLM2's 9 heads of 64 and at 8 heads of 128, forward and backward."""
    for heads, steps, d in ((9, 2048, 64), (8, 1024, 128)):
        q, k, v = (np.abs(_random(1, heads, steps, d)) for _ in range(3))
        i, f = _random(1, heads, steps), _random(1, heads, steps) + 6
        dh = _random(1, heads, steps, d)
        sizes = {"heads": heads, "steps": steps, "d": d, "chunk": CHUNK}

        def forward(q: Any = q, k: Any = k, v: Any = v, i: Any = i, f: Any = f) -> None:
            ops.mlstm_forward(q, k, v, i, f, chunk=CHUNK)

        def both(dh: Any = dh, q: Any = q, k: Any = k, v: Any = v, i: Any = i, f: Any = f) -> None:
            ops.mlstm_forward(q, k, v, i, f, chunk=CHUNK)
            ops.mlstm_backward(dh, q, k, v, i, f, chunk=CHUNK)

        name, flops = f"H{heads} T{steps} D{d}", mlstm_flops(steps, heads, d, CHUNK, backward=False)
        yield Case("mlstm", f"{name} forward", forward, flops, steps, sizes)
        flops += mlstm_flops(steps, heads, d, CHUNK, backward=True)
        yield Case("mlstm", f"{name} forward+backward", both, flops, steps, sizes)


def attention_cases() -> Iterator[Case]:
    """Attention at SmolLM2's 9 heads of 64 (3 for keys): full and window + sinks."""
    heads, groups, steps, d = 9, 3, 2048, 64
    q, do = _random(1, heads, steps, d), _random(1, heads, steps, d)
    k, v = _random(1, groups, steps, d), _random(1, groups, steps, d)
    for window, sinks in ((None, 0), (WINDOW, SINKS)):
        visible = _visible(steps, window, sinks)
        sizes = {"heads": heads, "groups": groups, "steps": steps, "d": d}
        if window is not None:
            sizes |= {"window": window, "sinks": sinks}

        def forward(window: int | None = window, sinks: int = sinks) -> None:
            ops.attention_forward(q, k, v, window=window, sinks=sinks)

        def backward(window: int | None = window, sinks: int = sinks) -> None:
            ops.attention_backward(do, q, k, v, window=window, sinks=sinks)

        kind = "full" if window is None else f"window {window}+{sinks}"
        name = f"H{heads}/{groups} T{steps} D{d} {kind}"
        flops = attention_flops(steps, heads, d, visible, backward=False)
        yield Case("attention", f"{name} forward", forward, flops, steps, sizes)
        # the backward has its own forward: it needs the logsumexp of every row
        flops += attention_flops(steps, heads, d, visible, backward=True)
        yield Case("attention", f"{name} forward+backward", backward, flops, steps, sizes)


def random_student() -> Model:
    """A hybrid student of SmolLM2-135M's shape with random weights and nearly open forget gates."""
    layers = SMOLLM2_135M["num_hidden_layers"]
    mixer = MixerConfig(mixer="hybrid", window=WINDOW, sinks=SINKS)
    model = Model(ModelConfig(**{**SMOLLM2_135M, "mixers": [mixer] * layers}))
    random = np.random.default_rng(0)
    for e in model.params.entries:
        view = model.params.view(e)
        if e.role == "norm":
            view[...] = 1
        elif e.role == "map":
            view[...] = np.eye(e.shape[-1], dtype=np.float32)
        elif e.role == "gate":
            view[...] = 6 if e.name.endswith("f_proj.bias") else 0
        else:
            view[...] = random.standard_normal(e.shape, dtype=np.float32)
            view *= 0.02
    return model


def step_flops(config: ModelConfig, tokens: int, steps: int) -> float:
    """Products of a training step: 6 for each weight of a matrix and token, and the mixers'."""
    c = config
    heads, d = c.num_attention_heads, c.head_dim
    projections = c.hidden_size * d * (2 * heads + 2 * c.num_key_value_heads)
    layer = 6.0 * tokens * (projections + 3 * c.hidden_size * c.intermediate_size)
    total = 6.0 * tokens * c.vocab_size * c.hidden_size
    for mixer in c.mixers:
        total += layer
        if mixer.mixer in ("attention", "window", "hybrid"):
            visible = _visible(steps, mixer.window, mixer.sinks)
            for backward in (False, True):
                total += attention_flops(tokens, heads, d, visible, backward=backward)
        if mixer.mixer in ("mlstm", "linear", "hybrid"):
            total += 6.0 * tokens * 2 * heads * d * d  # feature maps of q and k
            for backward in (False, True):
                total += mlstm_flops(tokens, heads, d, CHUNK, backward=backward)
    return total


class TrainingStep:
    """A stage II step with cross-entropy alone, gradient clipping and AdamW on every parameter."""

    def __init__(self, model: Model, ids: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self.model, self.ids = model, ids
        self.labels = np.full_like(ids, -1)
        self.labels[:, :-1] = ids[:, 1:]
        self.grads = model.params.zeros_like()
        self.m, self.v = (np.zeros_like(model.params.flat) for _ in range(2))
        self.steps = 0

    def computing(self, compute: Compute) -> Callable[[], float]:
        """The step with the model's products computed so."""

        def run() -> float:
            self.model.compute = compute
            return self()

        return run

    def __call__(self) -> float:
        """Takes one step; returns the mean cross-entropy in nats."""
        self.grads.flat.fill(0)
        count = int((self.labels >= 0).sum())
        sums = self.model.loss_and_grad(
            self.ids, self.labels, ce_weight=1, kl_weight=0, grads=self.grads, scale=1 / count
        )
        self.steps += 1
        norm = ops.sumsq(self.grads.flat) ** 0.5
        ops.adamw_step(
            self.model.params.flat,
            self.grads.flat,
            self.m,
            self.v,
            lr=1e-6,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            step=self.steps,
            scale=min(1.0, 1.0 / max(norm, 1e-12)),
        )
        return sums["ce"] / count


def train_cases() -> Iterator[Case]:
    """A training step of the student on 1 x 512 tokens."""
    rows, steps = 1, 512
    model = random_student()
    vocab = model.config.vocab_size
    ids = np.random.default_rng(1).integers(0, vocab, (rows, steps), dtype=np.int32)
    flops = step_flops(model.config, rows * steps, steps)
    sizes = {"rows": rows, "steps": steps}
    step = TrainingStep(model, ids)
    for compute in COMPUTE:
        name = f"135M {rows}x{steps} step {compute}"
        yield Case("train", name, step.computing(compute), flops, rows * steps, sizes, compute)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "gemm": gemm_cases,
    "mlstm": mlstm_cases,
    "attention": attention_cases,
    "train": train_cases,
}


# ---- results ------------------------------------------------------------------------------------


def row(case: Case, times: Sequence[float], about: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a case: median and best seconds, GFLOP/s, share of the peak, tokens/s.

    about: `machine()`.
    """
    median = float(np.median(times))
    gflops = case.flops / median / 1e9
    return {
        "suite": case.suite,
        "case": case.name,
        "runs": len(times),
        "seconds": median,
        "seconds_best": float(min(times)),
        "gflops": gflops,
        "peak_share": gflops / about["peak_gflops"][case.compute],
        "tokens_per_second": case.tokens / median,
    }


def run(suites: Sequence[str] = SUITES, seconds: float = 1.0) -> dict[str, Any]:
    """Run suites, `seconds` a case: {"machine": ..., "results": [row, ...]}, ready for JSON."""
    for suite in suites:
        if suite not in CASES:
            raise UserError(f"suite {suite!r} is not known: {', '.join(SUITES)}", usage=True)
    about = machine()
    results = [
        row(case, measure({"own": case.run}, seconds)["own"], about)
        for suite in suites
        for case in CASES[suite]()
    ]
    return {"machine": about, "results": results}


def describe(about: Mapping[str, Any]) -> str:
    """A machine as a line."""
    peaks = about["peak_gflops"]
    return (
        f"{about['cpu']}, {about['isa']}, {about['threads']} threads, peak {peaks['f32']:.0f} "
        f"GFLOP/s in float32, {peaks['mixed']:.0f} with operands in bf16"
    )


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result of `run` as a table in plain lines."""
    about = result["machine"]
    text = [
        describe(about),
        f"{'suite':<10} {'case':<42} {'ms':>9} {'GFLOP/s':>8} {'peak':>5} {'tokens/s':>10}",
    ]
    for r in result["results"]:
        text.append(
            f"{r['suite']:<10} {r['case']:<42} {1e3 * r['seconds']:>9.2f} {r['gflops']:>8.1f} "
            f"{r['peak_share']:>5.0%} {r['tokens_per_second']:>10.0f}"
        )
    return text
