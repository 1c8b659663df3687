"""Training on the real weights: our student's step against transformers + torch, same tokens.

    python benchmarks/train_rival.py [--model smollm2-135m-instruct] [--batch 4x512,1x2048]

All sides load the same GGUF file and take whole steps (forward, backward, clipping, AdamW on every
parameter) in turns in one process. Ours: the hybrid student and, for a like comparison, the plain
teacher, each with products in float32 and with operands in bf16 ("mixed"). Theirs: the teacher, the
only model they have, in float32, under bf16 autocast and with bf16 weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import about
from rivals import training_step, use_threads
from transformers import AutoModelForCausalLM

import xlstm_distill as xd
from xlstm_distill import bench, packages
from xlstm_distill.bench_cases import COMPUTE, SINKS, WINDOW, TrainingStep, model_flops
from xlstm_distill.linearize import linearize
from xlstm_distill.model import Model


def text_tokens(model: Model, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Tokens of real text: sources of the standard library."""
    assert model.tokenizer is not None
    ids: list[int] = []
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        ids += model.tokenizer.encode(path.read_text(encoding="utf-8"))
    return np.resize(np.array(ids, np.int32), count)


def compare(name: str, rows: int, steps: int, seconds: float) -> dict[str, Any]:
    """Tokens per second of each side for batches of rows x steps."""
    path = packages.resolve(name)
    teacher = xd.load(path)
    ids = text_tokens(teacher, rows * steps).reshape(rows, steps)
    student = linearize(teacher, window=WINDOW, sinks=SINKS)
    sides = {}
    for side, model in (("student", student), ("teacher", teacher)):
        step = TrainingStep(model, ids)
        for compute in COMPUTE:
            sides[f"{side} {compute}"] = step.computing(compute)
    theirs, long = {}, torch.from_numpy(ids.astype(np.int64))
    for dtype in (torch.float32, torch.bfloat16):
        theirs[dtype] = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype
        )
    sides["transformers f32"] = training_step(theirs[torch.float32], long)
    sides["transformers autocast"] = training_step(theirs[torch.float32], long, autocast=True)
    sides["transformers bf16"] = training_step(theirs[torch.bfloat16], long)
    losses = {side: step() for side, step in sides.items()}
    times = bench.measure(sides, seconds)
    tokens = rows * steps
    speed = {side: tokens / float(np.median(t)) for side, t in times.items()}
    best = max(v for side, v in speed.items() if side.startswith("transformers"))
    flops = model_flops(student.config, tokens, steps, backward=True) / tokens
    return {
        "batch": [rows, steps],
        "first_loss": losses,
        "tokens_per_second": speed,
        "student_gflops": {c: flops * speed[f"student {c}"] / 1e9 for c in COMPUTE},
        "ratio_f32": speed["student f32"] / speed["transformers f32"],
        "ratio_best": speed["student mixed"] / best,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Training speed against transformers + torch.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/train_rival.json"))
    parser.add_argument("--seconds", type=float, default=20.0, help="time a batch shape")
    parser.add_argument("--batch", default="4x512,1x2048", help="rows x steps, by commas")
    args = parser.parse_args()
    use_threads()
    machine, results = about(), []
    for batch in args.batch.split(","):
        rows, steps = map(int, batch.split("x"))
        r = compare(args.model, rows, steps, args.seconds)
        r["student_peak_share"] = {
            c: r["student_gflops"][c] / machine["peak_gflops"][c] for c in COMPUTE
        }
        results.append(r)
        print(f"{batch}: tokens/s")
        for side, speed in r["tokens_per_second"].items():
            print(f"  {side:<22} {speed:>7.0f}   first loss {r['first_loss'][side]:.4f}")
        shares = ", ".join(f"{c} {share:.0%}" for c, share in r["student_peak_share"].items())
        print(f"  student, share of the peak: {shares}")
        print(
            f"  student / transformers: float32 {r['ratio_f32']:.2f}, mixed / their best "
            f"{r['ratio_best']:.2f}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "results": results}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
