"""Tails of the KL, distances, and text that students write, against direct computation."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import tiny_run
from models import random_model
from test_tasks import request, write_task

from xlstm_distill import packages
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import continuations, divergence, fidelity
from xlstm_distill.evaluate.divergence import induction_distances
from xlstm_distill.evaluate.fidelity import windows_of
from xlstm_distill.evaluate.names import VARIANTS
from xlstm_distill.evaluate.needle import TASKS as NEEDLES
from xlstm_distill.linearize import linearize

CONTEXT = 48
PASSAGE = " ".join(tiny_run.TEXT) * 12
QUERY = f"Title: T\nBackground: {PASSAGE}\nQuestion: why?\nAnswer:"
MATH = [
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
]


@pytest.fixture(scope="module")
def teacher():
    return random_model(seed=1, dtype=np.float64)


@pytest.fixture(scope="module")
def student():
    return random_model("hybrid", seed=2, dtype=np.float64)


@pytest.fixture(scope="module")
def documents():
    # Few different tokens: triples come again at many distances.
    return {"text": np.random.default_rng(3).integers(3, 9, (4, 150)).tolist()}


def log_p(model, ids):
    z = model.logits(ids)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_details_against_a_direct_computation(teacher, student, documents):
    means, found = divergence({"student": student}, teacher, documents, context=CONTEXT)
    assert means == fidelity({"student": student}, teacher, documents, context=CONTEXT)
    ids = windows_of(documents["text"], CONTEXT)
    p, q = log_p(teacher, ids), log_p(student, ids)
    kl = (np.exp(p) * (p - q)).sum(-1)
    got = found["student"]["text"]
    exact = {"rel": 1e-9, "abs": 1e-12}  # float64, sums of 61 and of 576 terms
    assert got.kl.value == pytest.approx(kl.mean(), **exact)
    assert got.kl.stderr == pytest.approx(kl.mean(1).std(ddof=1) / math.sqrt(len(ids)), **exact)
    ordered = np.sort(kl, axis=None)
    for percent, value in got.kl_percentiles.items():
        at = percent / 100 * (ordered.size - 1)
        low, share = int(at), at % 1
        high = min(low + 1, ordered.size - 1)
        assert value == pytest.approx((1 - share) * ordered[low] + share * ordered[high], **exact)
    assert list(got.kl_percentiles) == [50, 90, 95, 99, 99.9]
    assert got.kl_max == pytest.approx(kl.max(), **exact)
    true = [np.take_along_axis(x[:, :-1], ids[:, 1:, None], -1)[..., 0] for x in (p, q)]
    difference = np.exp(true[1]) - np.exp(true[0])
    assert got.probability_rms.value == pytest.approx(np.sqrt((difference**2).mean()), **exact)
    # The root's standard error, by leaving out one window at a time (to second order in 1/12).
    squares = (difference**2).mean(1)
    n = len(squares)
    left = np.array([math.sqrt(np.delete(squares, i).mean()) for i in range(n)])
    jackknife = math.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
    assert got.probability_rms.stderr == pytest.approx(jackknife, rel=0.1)
    same = p.argmax(-1) == q.argmax(-1)
    assert got.same_top.value == pytest.approx(same.mean(), **exact)
    assert got.nll_difference.value == pytest.approx((true[0] - true[1]).mean(), **exact)
    distances = induction_distances(ids)
    for part in got.by_distance:
        inside = distances == 0
        if part.low is not None:
            inside = (part.low <= distances) & (distances < part.high)
        assert part.positions == inside.sum() > 0
        assert part.kl == pytest.approx(kl[:, :-1][inside].mean(), **exact)
        assert part.nll == pytest.approx(-true[1][inside].mean(), **exact)
        assert part.teacher_nll == pytest.approx(-true[0][inside].mean(), **exact)
        # Standard errors over windows: of sums over counts, linearised.
        for values, stderr in (
            (kl[:, :-1], part.kl_stderr),
            (true[0] - true[1], part.nll_difference_stderr),
        ):
            rest = np.where(inside, values - values[inside].mean(), 0.0).sum(axis=1)
            expected = math.sqrt(n / (n - 1) * (rest**2).sum()) / inside.sum()
            assert stderr == pytest.approx(expected, **exact)
    assert sum(part.positions for part in got.by_distance) == ids[:, 1:].size


def test_the_teacher_itself_and_a_single_window(teacher, documents):
    _, found = divergence({"same": teacher}, teacher, documents, context=CONTEXT, max_windows=1)
    same = found["same"]["text"]
    assert same.kl_max == 0 and same.kl == (0, None) and same.same_top == (1, None)
    assert same.probability_rms == (0, None) and same.nll_difference == (0, None)


def test_distances_against_a_search():
    windows = np.random.default_rng(0).integers(0, 4, (5, 70))
    for row, got in zip(windows.tolist(), induction_distances(windows), strict=True):
        for t in range(69):
            places = [s for s in range(1, t) if row[s - 1 : s + 2] == row[t - 1 : t + 2] and t > 0]
            assert got[t] == (t - places[-1] if places else 0)
    assert induction_distances(np.array([[1, 2]])).tolist() == [[0]]


PROMPTS = np.random.default_rng(5).integers(3, 61, (7, 9))


def test_what_is_written_is_scored_by_the_teacher(teacher, student):
    found = continuations({"student": student}, teacher, PROMPTS, tokens=40, temperature=0)
    assert found.buckets == [(0, 32), (32, 40)]
    for name, model in (("teacher", teacher), ("student", student)):
        ids = PROMPTS
        for _ in range(40):
            ids = np.concatenate([ids, model.logits(ids)[:, -1].argmax(-1)[:, None]], axis=1)
        logp = np.take_along_axis(log_p(teacher, ids)[:, :-1], ids[:, 1:, None], -1)[:, -40:, 0]
        np.testing.assert_allclose(found.nll[name][1], -logp[:, 32:].mean(1), rtol=1e-9)
        assert found.mean(name) == pytest.approx(-logp.mean(), rel=1e-9)
    excess = found.excess("student", 1)
    assert excess.low < excess.value < excess.high
    assert excess.value == pytest.approx(found.mean("student", 1) - found.mean("teacher", 1))


def test_the_teacher_exceeds_itself_by_nothing(teacher, student, monkeypatch):
    models = {"same": teacher, "student": student}
    found = continuations(models, teacher, PROMPTS, tokens=20, seed=4)
    assert found.excess("same") == (0, 0, 0)
    assert found.excess("student").low > 0
    assert found == continuations(models, teacher, PROMPTS, tokens=20, seed=4)
    assert found.nll != continuations(models, teacher, PROMPTS, tokens=20, seed=5).nll
    # Batches of two rows: rows of different batches draw different numbers.
    monkeypatch.setattr(sys.modules[continuations.__module__], "_TOKENS_AT_ONCE", 58)
    twins = np.repeat(PROMPTS[:1], 4, axis=0)
    nll = continuations({}, teacher, twins, tokens=20).nll["teacher"][0]
    assert len(set(nll)) == 4


def test_continuations_refuse_what_does_not_fit(teacher):
    with pytest.raises(UserError, match="the name 'teacher'"):
        continuations({"teacher": teacher}, teacher, PROMPTS)
    with pytest.raises(UserError, match=r"0 tokens after prompts of shape \[7, 9\]"):
        continuations({}, teacher, PROMPTS, tokens=0)
    with pytest.raises(ValueError, match="no model 'x'; there are teacher"):
        continuations({}, teacher, PROMPTS, tokens=2).mean("x")


def test_the_command(capsys, tmp_path):
    tiny_run.teacher().save(tmp_path / "teacher")
    text = tiny_run.write_text(tmp_path / "text")
    options = ["--data", str(text), "--context", "64", "--windows", "3"]
    written = ["--continuations", "2", "--prompt-tokens", "16", "--new-tokens", "8"]
    pair = ["fidelity", str(tmp_path / "teacher"), "--teacher", str(tmp_path / "teacher")]
    out = tmp_path / "fidelity.json"
    assert main([*pair, *options, *written, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "max 0.0000" in printed and "written 0-8" in printed and "distance 1-32" in printed
    found = json.loads(out.read_text())
    assert set(found) == {"teacher", "fidelity", "divergence", "gates", "continuations"}
    assert found["teacher"] == "teacher (safetensors, as float32)" and found["gates"] is None
    assert found["divergence"]["text"]["kl"] == [0, 0] and found["continuations"]["prompts"] == 2
    assert main([*pair, *options, *written, "--continuations", "1"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert "excess 0.0000" in shown and "inf" not in shown  # one prompt has no interval
    assert main([*pair, *options, "--continuations", "1", "--prompt-tokens", "65"]) == 2
    assert "--prompt-tokens 65: more than --context 64" in capsys.readouterr().err


def test_the_window_suite(capsys, tmp_path, monkeypatch):
    root = tmp_path / "requests"
    for task, variant in VARIANTS.items():
        rows = [
            request(
                n,
                0,
                f"{task} {n}? Answer:",
                f" {n}.",
                None,
                passage=PASSAGE,
                story=PASSAGE,
                query=QUERY,
            )
            for n in range(3)
        ]
        write_task(root, f"{task}/{variant}", rows)
    monkeypatch.setattr(packages, "fetch", lambda name: root)
    tiny_run.teacher().save(tmp_path / "teacher")
    linearize(tiny_run.teacher(), window=8, sinks=2, mixer="window").save(tmp_path / "student")
    out = tmp_path / "results_student.json"
    suite = ["evaluate", str(tmp_path / "student"), "--suite", "window", "--lengths", "2048"]
    near = ["--teacher", str(tmp_path / "teacher")]
    assert main([*suite, *near, "--limit", "1", "--out", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    math = [f"minerva_math_{part}" for part in MATH]
    assert set(results) == {
        *("squad", "drop", "coqa", "gsm8k", "mt_mbpp_python", *math),
        *(f"{needle}:2048" for needle in NEEDLES),
    }
    found = json.loads((tmp_path / "fidelity_student.json").read_text())
    assert set(found["divergence"]) == {"squad", "drop", "coqa"}
    assert found["divergence"]["coqa"]["kl"][0] > 0
    few = ["--limit", "1", "--out", str(tmp_path / "results_few.json")]
    assert main([*suite[:2], "--suite", "window", "--lengths", "2048", *few]) == 0
    assert "hint: with --teacher MODEL also KL and perplexity" in capsys.readouterr().out
