"""lm-evaluation-harness on the real teacher: our adapter, its own `hf` model and our server.

    python benchmarks/harness.py [--model NAME] [--documents N] [--out FILE]

(Not called lm_eval.py: a script hides the package of its own name.) Makes three tasks of documents
that are here, in lm_eval's own files: multiple choice of ARC-Easy's requests with five examples,
log-likelihoods of whole texts (CoQA's stories) and written answers to ARC-Easy's questions. lm_eval
scores them with `xlstm-distill`, with `hf` on the same GGUF file in float32, and through
`xlstm-distill serve` with `local-completions`. Prints the metrics of each and, for the latter two,
the largest difference of a request's log-likelihood to the first, and puts them into FILE. The exit
status is 1 where that is above 1e-3, or a metric, a greedy flag or a written answer is another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when datasets is imported

from bench import about
from evaluation import Rival
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rivals import use_threads

import xlstm_distill
from xlstm_distill import packages
from xlstm_distill.evaluate import load_task, passages
from xlstm_distill.lm_eval_adapter import XlstmDistillLM

BAR = 1e-3
LONGEST = 2048
"""Tokens of a context and what follows it; no document here is longer."""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
OURS = "xlstm-distill"

Result = dict[str, Any]


def write_tasks(place: Path, documents: int) -> None:
    """The tasks and their documents, as lm_eval reads them."""
    choices = load_task("arc_easy:rc_5shot").documents[:documents]
    asked = load_task("arc_easy:rc_0shot").documents[: documents // 4]
    stories = passages("coqa")[: documents // 4]
    rows: dict[str, list[Result]] = {
        "choice": [
            {"context": d.pairs[0][0], "choices": d.choices, "gold": d.gold} for d in choices
        ],
        "texts": [{"text": text} for text in stories],
        "answers": [{"question": d.pairs[0][0], "answer": d.choices[d.gold]} for d in asked],
    }
    for name, text in TASKS.items():
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        (place / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + text)


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of a server of the model."""
    command = [sys.executable, "-m", "xlstm_distill", "serve", model, "--port", "0"]
    package = str(Path(xlstm_distill.__file__).parent.parent)
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": package}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" at ")[1].split(";")[0]
        finally:
            process.terminate()


def scored(model: LM, place: Path) -> Result:
    """lm_eval's results and samples of all tasks, and how long they took."""
    began = time.perf_counter()
    manager = TaskManager(include_path=str(place), include_defaults=False)
    found: Result = simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    return {**found, "seconds": time.perf_counter() - began}


def metrics(found: Result, task: str) -> dict[str, float]:
    """A task's scores, without their errors."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][task].items()
        if isinstance(value, float) and "_stderr" not in name
    }


def answers(found: Result, task: str) -> list[Any]:
    """What the model gave to every request, in order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer[0] for sample in samples for answer in sample["resps"]]


def compared(ours: Result, other: Result, task: str) -> Result:
    """Another model's answers beside ours: the largest difference, and whether all is the same."""
    pairs = list(zip(answers(ours, task), answers(other, task), strict=True))
    mine, theirs = metrics(ours, task), metrics(other, task)
    result: Result = {"requests": len(pairs), "ours": mine, "other": theirs}
    if task == "answers":
        same = [a == b for a, b in pairs]
        return {**result, "same": sum(same), "passed": all(same) and mine == theirs}
    alone = task == "texts"  # no flag beside the log-likelihood
    values = [(float(a), float(b)) if alone else (float(a[0]), float(b[0])) for a, b in pairs]
    flags = alone or all(str(a[1]) == str(b[1]) for a, b in pairs)
    largest = max(abs(a - b) for a, b in values)
    near = all(math.isclose(mine[name], theirs[name], rel_tol=1e-6) for name in mine)
    return {
        **result,
        "largest_difference": largest,
        "largest_logp": max(abs(a) for a, _ in values),
        "same_flags": flags,
        "passed": largest <= BAR and flags and near and mine.keys() == theirs.keys(),
    }


def rival_model(path: Path) -> LM:
    """lm_eval's `hf` with the weights and the tokenizer of the GGUF file."""
    rival = Rival(path)
    return HFLM(rival.model, tokenizer=rival.tokenizer, max_length=LONGEST, batch_size=8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="lm-evaluation-harness on the real teacher.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a GGUF file or package")
    parser.add_argument("--documents", type=int, default=40, help="of choices; texts a fourth")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/harness.json"))
    args = parser.parse_args(arguments)
    use_threads()
    path = packages.resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_tasks(place, args.documents)
        model = XlstmDistillLM(str(path), max_length=LONGEST)
        ours = scored(model, place)
        print(OURS, f"{ours['seconds']:.0f} s", {task: metrics(ours, task) for task in TASKS})
        tokenizer = place / "tokenizer"
        tokenizer.mkdir()
        model.tokenizer.save(tokenizer)

        def through_the_server() -> Result:
            with served(str(path)) as address:
                client = get_model("local-completions")(
                    model=str(path),
                    tokenizer=str(tokenizer),
                    base_url=f"{address}/completions",
                    num_concurrent=8,
                    max_length=LONGEST,
                )
                return scored(client, place)

        others: dict[str, Callable[[], Result]] = {
            "hf": lambda: scored(rival_model(path), place),
            "local-completions": through_the_server,
        }
        results: dict[str, Any] = {OURS: {"seconds": ours["seconds"]}}
        passed = True
        for name, run in others.items():
            other = run()
            by_task = {task: compared(ours, other, task) for task in TASKS}
            results[name] = {"seconds": other["seconds"], **by_task}
            print(name, f"{other['seconds']:.0f} s", json.dumps(by_task), flush=True)
            passed = passed and all(result["passed"] for result in by_task.values())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": about(), "lm_eval": version("lm_eval"), "results": results}
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
