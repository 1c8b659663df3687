"""The core against other libraries, in turns in one process, with the share of the machine's peak.

    python benchmarks/bench.py [SUITE ...] [--out DIR] [--seconds S]

Prints a line a case (ours, the rival's, the ratio: above 1 we are faster) and writes
DIR/SUITE.json. A speed claim anywhere in this project names such a file. `train_rival.py` does the
same for training on the real weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rivals import RIVALS, use_threads

from xlstm_distill import bench
from xlstm_distill.bench_cases import CASES


def about() -> dict[str, Any]:
    """The machine and the versions of everything that was measured."""
    names = ("numpy", "torch", "transformers", "mlstm-kernels")
    return {**bench.machine(), "versions": {name: version(name) for name in names}}


def run_suite(suite: str, machine: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Every case of a suite beside its rivals; prints as it goes."""
    rows = []
    for case in CASES[suite]():
        times = bench.measure({"own": case.run, **RIVALS[suite](case)}, seconds)
        row = bench.row(case, times.pop("own"), machine)
        row["rivals"] = {
            name: {
                "seconds": float(np.median(t)),
                "gflops": case.flops / float(np.median(t)) / 1e9,
                "ratio": float(np.median(t)) / row["seconds"],
            }
            for name, t in times.items()
        }
        rows.append(row)
        print(describe(row), flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """A row as one line."""
    line = bench.figures(row)
    for name, rival in row["rivals"].items():
        line += f" | {name} {1e3 * rival['seconds']:.2f} ms, ratio {rival['ratio']:.2f}"
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description="The core against other libraries.")
    parser.add_argument("suites", nargs="*", help=f"any of {', '.join(bench.SUITES)} (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=2.0, help="time a case (at least 3 turns)")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(bench.SUITES):
        parser.error(f"suite {min(unknown)!r} is not known: {', '.join(bench.SUITES)}")
    use_threads()
    machine = about()
    print(bench.describe(machine), bench.TITLES, sep="\n")
    args.out.mkdir(parents=True, exist_ok=True)
    for suite in args.suites or bench.SUITES:
        result = {"machine": machine, "results": run_suite(suite, machine, args.seconds)}
        path = args.out / f"{suite}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
