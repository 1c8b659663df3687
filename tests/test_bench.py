"""What the benchmarks count, and the rival that is written here: the student in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from models import random_batch, random_model

from xlstm_distill import bench, bench_cases, plots
from xlstm_distill.bench_cases import Case, model_flops, visible_keys
from xlstm_distill.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("past", [0, 3, 50])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 0), (4, 2), (40, 3), (1, 1)])
def test_visible_keys_are_those_of_the_mask(window, sinks, past):
    steps, t = 20, np.arange(past + 20)
    behind = t[past:, None] - t[None, :]
    seen = (behind >= 0) & ((behind < (window or 1000)) | (t[None, :] < sinks))
    assert visible_keys(steps, window, sinks, past) == pytest.approx(seen.sum(1).mean())


def test_flops_of_a_plain_model_are_two_a_weight_and_token_and_attention():
    model = random_model("attention")
    c = model.config
    matrices = sum(e.size for e in model.params.entries if len(e.shape) == 2)
    if not c.tie_word_embeddings:
        matrices -= c.vocab_size * c.hidden_size  # a look-up
    scores = 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    assert model_flops(c, 24, 12) == pytest.approx(24 * (2 * matrices + scores * 6.5))
    step = model_flops(c, 24, 12, backward=True)
    assert step == pytest.approx(24 * (6 * matrices + 3.5 * scores * 6.5))


def test_every_suite_yields_cases_of_its_name():
    assert set(bench.SUITES) == {
        "gemm",
        "mlstm",
        "attention",
        "train",
        "prefill",
        "decode",
        "context",
        "merge",
    }
    first = next(bench_cases.CASES["gemm"]())
    assert first.suite == "gemm" and first.flops == 2 * 64 * 1536 * 576
    first.run()


def test_a_result_has_shares_of_what_limits_it(monkeypatch):
    case = Case("gemm", "tiny", lambda: None, 1e6, 5, {}, "f32", 4e6)
    monkeypatch.setitem(bench_cases.CASES, "gemm", lambda: iter([case, case._replace(bytes=0)]))
    about = {
        "cpu": "c",
        "isa": "i",
        "threads": 2,
        "peak_gflops": {"f32": 10.0, "mixed": 20.0, "int8": 40.0},
        "memory_gbytes": 8.0,
    }
    monkeypatch.setattr(bench, "machine", lambda: about)
    limited, other = bench.run(["gemm"], 0.001)["results"]
    assert limited["memory_share"] == pytest.approx(limited["gbytes"] / 8)
    assert limited["peak_share"] == pytest.approx(limited["gflops"] / 10)
    assert other["memory_share"] is None
    assert len(bench.lines({"machine": about, "results": [limited, other]})) == 4
    with pytest.raises(UserError, match="suite 'gem' is not known"):
        bench.run(["gem"])


def test_costs_against_context_become_a_chart(tmp_path):
    sizes = {"context": 4096, "state_bytes": 3 << 20}
    row = {"suite": "context", "sizes": sizes, "tokens_per_second": 7.0}
    names = [f"135M {who} {what} at 4096 bf16" for who in "ab" for what in ("reads", "writes")]
    rows = [{**row, "case": name} for name in names] + [{"suite": "gemm"}]
    costs = bench.context_costs(rows)
    each = {"reads": {4096: 7.0}, "writes": {4096: 7.0}, "memory": {4096: 3.0}}
    assert costs == {"a": each, "b": each}
    figure = plots.context_costs(costs, "title")
    assert plots.save(figure, tmp_path / "chart.svg").stat().st_size > 1000
    assert len(figure.axes) == 3


@pytest.mark.parametrize(("steps", "index"), [(1, 1), (8, 0)])
def test_a_case_of_the_chart_reads_behind_its_context(monkeypatch, steps, index):
    monkeypatch.setitem(bench_cases.SMOLLM2_135M, "num_hidden_layers", 1)
    monkeypatch.setitem(bench_cases.SMOLLM2_135M, "vocab_size", 64)
    monkeypatch.setattr(bench_cases, "CHART_CONTEXTS", (16, 512))
    monkeypatch.setattr(bench_cases, "CHART_STEPS", 8)
    cases = list(bench_cases.context_cases())
    student, teacher = cases[index::2][:2], cases[index::2][2:]
    for case in (*student, *teacher):
        assert case.sizes["steps"] == case.tokens == steps
        case.run()
    assert student[0].sizes["state_bytes"] == student[1].sizes["state_bytes"]
    assert teacher[0].sizes["state_bytes"] < teacher[1].sizes["state_bytes"]
    assert teacher[1].flops > student[1].flops


def test_the_bandwidth_is_measured():
    assert bench.bandwidth(0.01) > 0.1


@pytest.mark.parametrize("mixer", ["hybrid", "hybrid elu"])
def test_the_student_in_plain_torch_is_the_same_model(mixer, monkeypatch):
    """Logits and gradients: an oracle that shares no line with the core or the reference."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from torch_student import TorchStudent

    model = random_model(mixer)
    ids, _, _ = random_batch(model, 2, 48)
    labels = np.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    rival = TorchStudent(model, 48, chunk=16)
    found = rival(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(ids.astype(np.int64)))
    logits = model.logits(ids)
    # float32 on both sides: some hundred roundings on the way
    assert np.abs(found.logits.detach().numpy() - logits).max() <= 1e-4 * np.abs(logits).max()
    found.loss.backward()
    grads, count = model.params.zeros_like(), int((labels >= 0).sum())
    model.loss_and_grad(ids, labels, ce_weight=1, kl_weight=0, grads=grads, scale=1 / count)
    for name in model.params.names():
        mine, theirs = grads[name], rival.weights[name.replace(".", "/")].grad.numpy()
        assert np.linalg.norm(mine - theirs) <= 1e-3 * np.linalg.norm(theirs) + 1e-7, name
