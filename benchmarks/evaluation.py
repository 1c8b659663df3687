"""What `evaluate` finds of the real teacher, against transformers on the same weights.

    python benchmarks/evaluation.py [NAME ...] [--requests N] [--samples N] [--out FILE]

Names are request sets ("arc_easy:rc_5shot"), needle tasks with a length ("niah_single_1:512") and
"reuse"; all of them unless some are given. Prints a line a name and puts its figures into FILE
beside those that are there. The exit status is 1 where a figure misses its bar:

- request sets: our log-likelihood of every request and transformers', in float32 on the whole row
  without a cache of keys and values, differ by at most 1e-3; accuracies and tokens are the same;
- needles: greedy answers have the same score, sample by sample;
- reuse: HellaSwag with what contexts share read once is at least 3 times as fast as with every row
  read from its beginning, and log-likelihoods differ by at most 1e-4 of the largest |logit|.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import about
from numpy.typing import NDArray
from rivals import use_threads
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as Steps
from transformers import AutoModelForCausalLM, AutoTokenizer

import xlstm_distill as xd
from xlstm_distill import bench, packages
from xlstm_distill.evaluate import evaluate, load_task
from xlstm_distill.evaluate.generation import Sample, string_match_all
from xlstm_distill.evaluate.needle import is_needle, needle
from xlstm_distill.evaluate.tasks import Document, ScoringModel, Task, encode_pair
from xlstm_distill.model import Model
from xlstm_distill.scoring import Request

REQUEST_SETS = (
    "arc_easy:rc_5shot",
    "arc_challenge:mc_5shot",
    "hellaswag:rc_5shot",
    "boolq:rc_0shot",
    "csqa:mc_5shot",
    "openbookqa:mc_5shot",
    "piqa:rc_5shot",
    "socialiqa:rc_5shot",
    "winogrande:rc_5shot",
    "coqa:bpb_0shot",
    "gsm8k:gold_bpb_5shot",
    "mt_mbpp_python:gold_bpb_3shot",
    "jeopardy:bpb_5shot",
    "lambada:bpb_0shot",
    "mmlu_anatomy:rc_5shot",
    "mmlu_high_school_geography:mc_5shot",
)
NEEDLES = tuple(
    f"{task}:{length}"
    for length in (512, 1024, 2048)
    for task in ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")
)
REUSE, HELLASWAG = "reuse", "hellaswag:rc_5shot"
NAMES = (*REQUEST_SETS, *NEEDLES, REUSE)
REQUEST_BAR, REUSE_BAR, SPEED_BAR = 1e-3, 1e-4, 3.0

Result = dict[str, Any]
Logp = NDArray[np.float64]


class Rival:
    """transformers' model and tokenizer from the same GGUF file, in float32."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # The conversion leaves out the split at digits that the published tokenizer begins with.
        backend = self.tokenizer.backend_tokenizer
        backend.pre_tokenizer = Steps([Digits(individual_digits=True), backend.pre_tokenizer])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """By the rule of `evaluate`: where the two merge at the border, as Python's "```python" and
        "def" do, the continuation is encoded by itself."""
        kept = context.rstrip()
        first, whole = self.encode(kept), self.encode(context + continuation)
        if whole[: len(first)] == first:
            return first, whole[len(first) :]
        return first, self.encode(context[len(kept) :] + continuation)

    def log_likelihoods(self, rows: Sequence[tuple[list[int], list[int]]]) -> Logp:
        """Of each row's second part behind its first: one pass over both. Rows that differ in the
        last token alone (labels) have one pass, as in lm-evaluation-harness."""
        passes: dict[tuple[int, ...], torch.Tensor] = {}
        found = []
        for context, rest in rows:
            read = (*context, *rest[:-1])
            if read not in passes:
                with torch.inference_mode():
                    out = self.model(
                        torch.tensor([read]), logits_to_keep=len(rest), use_cache=False
                    )
                passes[read] = out.logits[0].log_softmax(-1)
            logp = passes[read][-len(rest) :].gather(1, torch.tensor(rest)[:, None])
            found.append(float(logp.double().sum()))
        return np.array(found)

    def answer(self, prompt: str, new_tokens: int, eos_ids: Sequence[int]) -> str:
        """The greedy continuation."""
        ids = torch.tensor([self.encode(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(eos_ids),
                pad_token_id=eos_ids[0],
            )
        new = out[0, ids.shape[1] :]
        text: str = self.tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class WholeRows:
    """A model for `evaluate` that reads every row from its beginning."""

    def __init__(self, model: Model) -> None:
        self.model, self.tokenizer, self.config = model, model.tokenizer, model.config

    def scorer(
        self, prefix: Sequence[int]
    ) -> Callable[[Sequence[Request]], list[list[NDArray[Any]]]]:
        return self.score

    def score(self, requests: Sequence[Request]) -> list[list[NDArray[Any]]]:
        return [
            [self.model.score_continuations(context, [c])[0] for c in continuations]
            for context, continuations in requests
        ]


def samples_of(model: ScoringModel, name: str, limit: int) -> list[Sample]:
    samples: list[Sample]
    (samples,) = evaluate(model, [name], limit=limit)["samples"].values()
    return samples


def log_likelihoods(sample: Sample) -> Logp:
    """Of a document's requests."""
    found = sample["loglikelihoods"] if "loglikelihoods" in sample else sample["loglikelihood"]
    return np.atleast_1d(found)


def metrics(task: Task, documents: Sequence[Document], logp: Sequence[Logp]) -> dict[str, float]:
    """What log-likelihoods of the documents' requests come to, as in docs/tasks.md."""
    if task.kind == "bpb":
        size = sum(len(document.pairs[0][1].encode()) for document in documents)
        return {"bits_per_byte": -float(np.concatenate(logp).sum()) / (size * math.log(2))}
    both = list(zip(documents, logp, strict=True))
    found = {"acc": float(np.mean([scores.argmax() == d.gold for d, scores in both]))}
    if task.kind == "choice":
        normed = [(d, scores / [len(choice) for choice in d.choices]) for d, scores in both]
        found["acc_norm"] = float(np.mean([scores.argmax() == d.gold for d, scores in normed]))
    return found


def request_set(model: Model, rival: Rival, name: str, requests: int) -> Result:
    """Every request's log-likelihood, and the tokens it is read as."""
    task, tokenizer = load_task(name), model.tokenizer
    assert tokenizer is not None
    limit = math.ceil(requests / len(task.documents[0].pairs))
    found = evaluate(model, [name], limit=limit)
    by_id = {document.doc_id: document for document in task.documents}
    documents = [by_id[sample["doc_id"]] for sample in found["samples"][task.name]]
    ours, theirs = [log_likelihoods(s) for s in found["samples"][task.name]], []
    rows, same_tokens = [], 0
    for document in documents:
        encoded = [encode_pair(tokenizer, *pair) for pair in document.pairs]
        theirs.append(rival.log_likelihoods(encoded))
        for (context, continuation), (first, rest) in zip(document.pairs, encoded, strict=True):
            same_tokens += rival.encode_pair(context, continuation) == (first, rest)
        rows += encoded
    differences = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    reported = found["results"][task.name]
    other = metrics(task, documents, theirs)
    mine = {metric: reported[f"{metric},none"] for metric in other}
    same = task.kind == "bpb" or mine == other
    return {
        "documents": len(documents),
        "requests": len(rows),
        "tokens": sum(len(first) + len(rest) for first, rest in rows),
        "scored_tokens": sum(len(rest) for _, rest in rows),
        "same_tokens": same_tokens,
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "ours": mine,
        "transformers": other,
        "passed": bool(differences.max() <= REQUEST_BAR) and same_tokens == len(rows) and same,
    }


def needles(model: Model, rival: Rival, name: str, count: int) -> Result:
    """Greedy answers and their scores, sample by sample."""
    assert model.tokenizer is not None
    task, eos_ids = needle(name, model.tokenizer, limit=count), model.config.eos_token_ids
    ours, theirs, same_answers = [], [], 0
    for number, sample in enumerate(samples_of(model, name, count)):
        answer = rival.answer(task.question(number).prompt, task.max_new_tokens, eos_ids)
        ours.append(sample[task.metric])
        theirs.append(string_match_all(answer, sample["target"]))
        same_answers += answer == sample["answer"]
    return {
        "samples": count,
        "ours": ours,
        "transformers": theirs,
        "same_answers": same_answers,
        "passed": ours == theirs,
    }


def reuse(model: Model, documents: int) -> Result:
    """HellaSwag with and without state reuse, otherwise the same code."""
    sides: dict[str, ScoringModel] = {"seconds": model, "whole_rows_seconds": WholeRows(model)}
    logp: dict[str, Logp] = {}

    def run(side: str) -> None:
        samples = samples_of(sides[side], HELLASWAG, documents)
        logp[side] = np.concatenate([log_likelihoods(sample) for sample in samples])

    turns = bench.measure({side: partial(run, side) for side in sides}, seconds=0)
    times = {side: float(np.median(t)) for side, t in turns.items()}
    difference = float(np.abs(np.subtract(*logp.values())).max())
    assert model.tokenizer is not None
    context, rest = encode_pair(model.tokenizer, *load_task(HELLASWAG).documents[0].pairs[0])
    logit = float(np.abs(model.logits([*context, *rest])).max())
    ratio = times["whole_rows_seconds"] / times["seconds"]
    return {
        "documents": documents,
        **times,
        "ratio": ratio,
        "largest_difference": difference,
        "largest_logit": logit,
        "passed": ratio >= SPEED_BAR and difference <= REUSE_BAR * logit,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Evaluation against transformers.")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)} (all)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a GGUF file or package")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/evaluation.json"))
    parser.add_argument("--requests", type=int, default=200, help="requests of a set, about")
    parser.add_argument("--samples", type=int, default=10, help="samples of a needle task")
    parser.add_argument("--documents", type=int, default=12, help="documents of a turn of reuse")
    args = parser.parse_args()
    use_threads()
    path = packages.resolve(args.model)
    model, rival = xd.load(path), Rival(path)
    results = json.loads(args.out.read_text())["results"] if args.out.is_file() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine, passed = about(), True
    for name in args.names or NAMES:
        if name == REUSE:
            result = reuse(model, args.documents)
        elif is_needle(name):
            result = needles(model, rival, name, args.samples)
        else:
            result = request_set(model, rival, name, args.requests)
        passed = passed and result["passed"]
        print(name, json.dumps(result), flush=True)
        results[name] = result
        found = {"machine": machine, "results": results}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
