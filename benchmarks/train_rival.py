"""Training on the real weights: our student's step against transformers + torch, same tokens.

    python benchmarks/train_rival.py [--model smollm2-135m-instruct] [--batch 4x512,1x2048]

Both sides load the same GGUF file in float32 and take whole steps (forward, backward, clipping,
AdamW on every parameter) in turns in one process: ours trains the hybrid student and, for a like
comparison, the plain teacher; theirs trains the teacher, the only model they have.
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
    student = linearize(teacher, window=bench.WINDOW, sinks=bench.SINKS)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    own = {
        "student": bench.TrainingStep(student, ids),
        "teacher": bench.TrainingStep(teacher, ids),
    }
    rival = training_step(theirs, torch.from_numpy(ids.astype(np.int64)))
    losses = {"teacher": own["teacher"](), "transformers": rival()}
    times = bench.measure({**own, "transformers": rival}, seconds)
    tokens = rows * steps
    speed = {side: tokens / float(np.median(t)) for side, t in times.items()}
    gflops = bench.step_flops(student.config, tokens, steps) / float(np.median(times["student"]))
    return {
        "batch": [rows, steps],
        "first_loss": losses,
        "tokens_per_second": speed,
        "student_gflops": gflops / 1e9,
        "ratio_student": speed["student"] / speed["transformers"],
        "ratio_teacher": speed["teacher"] / speed["transformers"],
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
        r["student_peak_share"] = r["student_gflops"] / machine["peak_gflops_f32"]
        results.append(r)
        speed = r["tokens_per_second"]
        print(
            f"{batch}: student {speed['student']:.0f} tokens/s "
            f"({r['student_peak_share']:.0%} of the peak), our teacher {speed['teacher']:.0f}, "
            f"transformers {speed['transformers']:.0f}: ratio {r['ratio_student']:.2f} "
            f"(teacher {r['ratio_teacher']:.2f})",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "results": results}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
