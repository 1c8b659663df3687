"""How fast the core is on this machine: time, GFLOP/s, GB/s, and shares of the machine's own peaks.

Suites: "gemm" (matrix products of the model), "mlstm" and "attention" (the sequence ops), "train"
(training steps), "prefill" and "decode" (inference), "context" (what a token costs at the end of
contexts from 1K to 64K) and "merge"; `bench_cases.py` defines them.
Ratios to other libraries are made by `benchmarks/bench.py` of the source tree, which adds rivals to
the same cases.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import runtime
from .bench_cases import CASES, CHART_CONTEXTS, PEAKS, Case, model_flops
from .config import ModelConfig
from .errors import UserError
from .model import Compute, state_nbytes
from .runtime import core

SUITES = tuple(CASES)
_STREAM_BYTES = 512 << 20


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


def peak(compute: Compute = "f32", seconds: float = 1.0) -> float:
    """GFLOP/s of multiply-adds in registers on all threads, this instruction set, best of many.

    compute: one of `PEAKS`, what the operands are."""
    module, rounds, best, operands = core(), 200_000, 0.0, PEAKS.index(compute)
    module.peak(rounds, operands)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        flops = module.peak(rounds, operands)
        best = max(best, flops / (time.perf_counter() - start))
    return best / 1e9


def bandwidth(seconds: float = 0.5) -> float:
    """GB/s of reading half a GiB from memory with all threads, best of many."""
    x, best = np.ones(_STREAM_BYTES // 4, np.float32), 0.0
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        core().stream(x)
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best / 1e9


def machine() -> dict[str, Any]:
    """Processor, instruction set, threads, measured peaks (GFLOP/s) of float32, bf16 and
    int8 operands, and the measured rate of reading memory (GB/s)."""
    return {
        "cpu": runtime.cpu_name(),
        "isa": runtime.isa(),
        "threads": runtime.threads(),
        "peak_gflops": {compute: round(peak(compute), 1) for compute in PEAKS},
        "memory_gbytes": round(bandwidth(), 1),
    }


# ---- results ------------------------------------------------------------------------------------


def row(case: Case, times: Sequence[float], about: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a case: median and best seconds, GFLOP/s, tokens/s, shares of the peak and,
    where memory limits, of the rate of reading (else None), and the peak memory of the process
    so far.

    about: `machine()`.
    """
    median = float(np.median(times))
    gflops = case.flops / median / 1e9
    gbytes = case.bytes / median / 1e9
    return {
        "suite": case.suite,
        "case": case.name,
        "sizes": dict(case.sizes),
        "runs": len(times),
        "seconds": median,
        "seconds_best": float(min(times)),
        "gflops": gflops,
        "peak_share": gflops / about["peak_gflops"][case.compute],
        "gbytes": gbytes,
        "memory_share": gbytes / about["memory_gbytes"] if case.bytes else None,
        "tokens_per_second": case.tokens / median,
        "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
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
        f"GFLOP/s in float32, {peaks['mixed']:.0f} with operands in bf16, "
        f"{peaks['int8']:.0f} in int8, memory {about['memory_gbytes']:.0f} GB/s"
    )


def figures(r: Mapping[str, Any]) -> str:
    """A row of `row` as a line under the titles of `TITLES`."""
    memory = "" if r["memory_share"] is None else f"{r['memory_share']:.0%}"
    return (
        f"{r['suite']:<10} {r['case']:<42} {1e3 * r['seconds']:>9.2f} {r['gflops']:>8.1f} "
        f"{r['peak_share']:>5.0%} {memory:>6} {r['tokens_per_second']:>10.0f}"
    )


TITLES = (
    f"{'suite':<10} {'case':<42} {'ms':>9} {'GFLOP/s':>8} {'peak':>5} {'memory':>6} "
    f"{'tokens/s':>10}"
)


def context_costs(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """The rows of the suite "context" by model: {"reads": {context: tokens/s}, "writes": the same,
    "memory": {context: MiB of the state}}."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for r in results:
        if r["suite"] == "context":
            _, who, what, *_ = r["case"].split()
            context, mib = r["sizes"]["context"], r["sizes"]["state_bytes"] / 2**20
            of = found.setdefault(who, {"reads": {}, "writes": {}, "memory": {}})
            of[what][context] = r["tokens_per_second"]
            of["memory"][context] = mib
    return found


def counted_costs(config: ModelConfig) -> dict[str, dict[int, float]]:
    """What one more token costs a model at the end of the same contexts, counted from its sizes:
    {"work": {context: multiply-adds}, "memory": {context: MiB of the state of one row}}."""
    return {
        "work": {c: model_flops(config, 1, 1, past=c - 1) / 2 for c in CHART_CONTEXTS},
        "memory": {c: state_nbytes(config, c) / 2**20 for c in CHART_CONTEXTS},
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result of `run` as a table in plain lines."""
    return [describe(result["machine"]), TITLES, *map(figures, result["results"])]
