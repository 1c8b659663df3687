"""Contents for the pages that the package writes: a run's report, a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_run

from xlstm_distill.cli import main
from xlstm_distill.evaluate import compare, write_results
from xlstm_distill.linearize import linearize

LAYERS, HEADS = 6, 4


def fidelity_part() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    models = {}
    for name, level in (("teacher", 0.0), ("merged", 0.2), ("control", 0.45)):
        models[name] = {}
        for domain in ("prose", "code"):
            values = level * rng.uniform(0.8, 1.2, size=(3, 10))
            measures = [
                {"kl": v.mean(), "agree": 1 - v.mean() / 2, "nll": 2 + v.mean(), "perplexity": 8.0}
                for v in values
            ]
            everywhere = values.mean(axis=0).tolist()
            by_bucket = values.tolist()
            models[name][domain] = {
                "overall": measures[0],
                "by_position": measures,
                "windows": {"kl": everywhere, "agree": everywhere, "nll": everywhere},
                "windows_by_position": {m: by_bucket for m in ("kl", "agree", "nll")},
            }
    return {
        "context": 256,
        "buckets": [(0, 64), (64, 128), (128, 256)],
        "tokens": {"prose": 2560, "code": 2560},
        "models": models,
    }


def results(acc: float, bits: float) -> dict[str, Any]:
    return {
        "results": {
            "piqa": {"acc_norm,none": 0.6, "acc_norm_stderr,none": 0.01},
            "arc_easy": {"acc_norm,none": acc, "acc_norm_stderr,none": 0.01},
            "squad": {"bits_per_byte,none": bits, "bits_per_byte_stderr,none": 0.02},
        },
        "n-samples": {
            t: {"original": 900, "effective": 900} for t in ("piqa", "arc_easy", "squad")
        },
    }


def report_values() -> dict[str, Any]:
    """Everything that a report can show."""
    comparison = compare(
        results(0.5, 1.0),
        {"merged": results(0.48, 1.2), "control": results(0.4, 2.0)},
        controls=["control"],
    )
    gates: list[list[float | None]] = [
        [float(x) for x in row] for row in np.random.default_rng(1).uniform(size=(LAYERS, HEADS))
    ]
    gates[-1] = [None] * HEADS
    return {
        "title": "Quickstart <SmolLM2>",
        "created": "2030-01-02 03:04",
        "summary": "A transformer became a hybrid xLSTM student.",
        "teacher": {
            "name": "SmolLM2-135M-Instruct",
            "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "form": "Q4_1 GGUF, dequantised",
            "fingerprint": "0123456789abcdef" * 4,
            "parameters": 134515008,
            "layers": LAYERS,
            "hidden_size": 576,
            "heads": HEADS,
        },
        "student": {
            "mixer": "hybrid",
            "window": 64,
            "sinks": 4,
            "gate": "data",
            "normalizer": "ratio",
            "feature_map": "softmax",
            "parameters": 137000000,
            "added": 2484992,
        },
        "main": "merged",
        "control": "control",
        "recipe": {"align": {"steps": 250, "learning_rate": 0.02}},
        "text": [
            {
                "domain": "prose",
                "use": "evaluation",
                "origin": "passages of squad",
                "documents": 20,
                "tokens": 2560,
            }
        ],
        "stages": [
            {
                "name": "align",
                "what": "stage I",
                "steps": 250,
                "tokens": 500000,
                "seconds": 333.3,
                "peak_memory_mib": 2048.0,
            },
            {"name": "merge", "what": "stage III", "seconds": 1.5},
        ],
        "losses": [
            {
                "stage": "Stage I",
                "label": "align",
                "steps": [1, 2, 3],
                "values": [1.0, 0.5, 0.05],
                "unit": "relative error",
            },
            {"stage": "Stage II", "label": "code", "steps": [1, 2], "values": [1.0, 0.9]},
            {"stage": "Stage II", "label": "prose", "steps": [1, 2], "values": [1.1, 0.8]},
        ],
        "layer_errors": {
            "layers": list(range(LAYERS)),
            "before": [0.2] * LAYERS,
            "after": [0.05] * LAYERS,
        },
        "fidelity": fidelity_part(),
        "gates": {"values": gates, "text": "Median over 2,560 tokens."},
        "benchmarks": comparison.model_dump(),
        "samples": [
            {
                "prompt": "Say [bold]hi[/bold] & <script>alert(1)</script>",
                "outputs": {"teacher": "hi\nthere [/]", "merged": "<b>hi</b>"},
            }
        ],
        "claims": [
            {"claim": "KL of merged / control <= 0.85", "found": "0.44", "holds": True},
            {"claim": "merged beats both experts", "found": "no", "holds": False},
        ],
        "machine": {"cpu": "x86-64, 2 cores", "instruction set": "avx512"},
        "notes": ["Text was sampled from the teacher."],
    }


NEEDLES = {"niah_single_1": (512, 1024, 2048), "niah_multikey_1": (512, 1024), "vt": (512,)}


def needle_results(reach: int) -> dict[str, Any]:
    """Results of a model that finds what lies among the last `reach` tokens."""
    out: dict[str, Any] = {"results": {}, "n-samples": {}, "configs": {}, "samples": {}}
    for task, lengths in NEEDLES.items():
        for length in lengths:
            depths = [None] * 10 if task == "vt" else [5 + 10 * n for n in range(10)]
            found = [float((1 - (d or 0) / 100) * length <= reach) for d in depths]
            name = f"{task}:{length}"
            out["samples"][name] = [
                {"doc_id": n, "string_match_all": x, **({} if d is None else {"depth": d})}
                for n, (x, d) in enumerate(zip(found, depths, strict=True))
            ]
            out["results"][name] = {"string_match_all,none": float(np.mean(found))}
            out["n-samples"][name] = {"original": 500, "effective": 10}
            out["configs"][name] = {"output_type": "generate_until"}
    return out


def compare_arguments(folder: Path) -> list[str]:
    """Arguments of `compare` for a teacher and two students, whose results with needles, fidelity
    and models are put into a folder; it writes to folder/out."""
    for name, reach in {"teacher": 1 << 20, "hybrid": 700, "window": 100}.items():
        write_results(needle_results(reach), folder / f"results_{name}.json")
    teacher = tiny_run.teacher()
    teacher.save(folder / "teacher")
    text = str(tiny_run.write_text(folder / "text"))
    arguments = ["compare", "--teacher", str(folder / "results_teacher.json")]
    for name in ("hybrid", "window"):
        model = folder / name
        linearize(teacher, window=8, sinks=2, mixer=name).save(model)
        measure = ["fidelity", str(model), "--teacher", str(folder / "teacher"), "--data", text]
        out = str(folder / f"fidelity_{name}.json")
        assert main([*measure, "--context", "128", "--windows", "4", "--out", out, "--json"]) == 0
        arguments += ["--student", f"{name}={folder / f'results_{name}.json'}"]
        arguments += ["--model", f"{name}={model}"]
    arguments += ["--model", f"teacher={folder / 'teacher'}", "--control", "window"]
    return [*arguments, "--out", str(folder / "out")]


def changed(file: Path, **parts: Any) -> None:
    """Exchange parts of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
