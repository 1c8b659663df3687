"""The loop beyond its steps: running mean, validation, best values, window dropout, wsd, parts."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
from models import random_batch, random_model
from test_model import directional_errors
from tolerances import DIRECTIONAL_F64

from xlstm_distill.align import align
from xlstm_distill.data import Batches, Rows, joined
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.linearize import linearize
from xlstm_distill.optim import learning_rate

LENGTH = 32


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def text(teacher):
    return tiny_run.text(teacher)


def stage(teacher, text, **changes):
    """A new student and the generator that trains it."""
    student = linearize(teacher, window=6, sinks=2)
    rows = Rows(text, LENGTH, 1, reserve=3)
    held_out = rows.batch("data", rows.reserved)
    ids, logp, _ = teacher.topk(held_out.ids, 8, reset=held_out.reset)
    settings = {
        "steps": 9,
        "k": 8,
        "lr": 1e-3,
        "held_out": held_out,
        "held_out_targets": (ids, logp),
        "validate_every": 2,
        **changes,
    }
    return student, distill(student, Batches({"data": rows}, 2, seed=0), teacher, **settings)


# ---- running mean and validation ----------------------------------------------------------------


def test_the_student_ends_as_the_running_mean(teacher, text):
    last, generator = stage(teacher, text)
    start = last.params.flat.copy()
    seen = []
    for _ in generator:
        seen.append(last.params.flat.copy())
    mean = start
    for t, values in enumerate(seen, start=1):
        keep = min(0.8, (1 + t) / (10 + t))
        mean = (keep * mean.astype(np.float64) + (1 - keep) * values).astype(np.float32)
    student, generator = stage(teacher, text, average=0.8)
    list(generator)
    # float32 sums of as many rounded terms as there are steps
    assert np.abs(student.params.flat - mean).max() <= 1e-6
    assert np.abs(student.params.flat - last.params.flat).max() > 1e-4


def test_validation_is_the_loss_of_rows_that_are_not_trained_on(teacher, text):
    student, generator = stage(teacher, text)
    metrics = list(generator)
    assert [m["step"] for m in metrics if "validation" in m] == [2, 4, 6, 8, 9]
    rows = Rows(text, LENGTH, 1, reserve=3)
    batch = rows.batch("data", rows.reserved)
    ids, logp, _ = teacher.topk(batch.ids, 8, reset=batch.reset)
    weights = {"ce_weight": 0.1, "kl_weight": 0.9}
    sums = student.loss_and_grad(batch.ids, batch.labels, (ids, logp), reset=batch.reset, **weights)
    expected = (0.1 * sums["ce"] + 0.9 * sums["kl"]) / batch.counted
    assert metrics[-1]["validation"] == pytest.approx(expected, rel=1e-5)


def test_reserved_rows_are_never_drawn(text):
    whole, some = Rows(text, LENGTH, 1), Rows(text, LENGTH, 1, reserve=3)
    assert len(some) == len(whole) - 3
    assert list(some.reserved) == [*range(len(some), len(whole))]
    assert all(np.array_equal(whole.row(n)[0], some.row(n)[0]) for n in range(len(whole)))
    drawn = Batches({"data": some}, 2, seed=0)
    keys = {key for _ in range(3 * len(some)) for key in next(drawn).rows}
    assert keys == {("data", n) for n in range(len(some))}
    with pytest.raises(UserError, match="reserved for validation"):
        Rows(text, LENGTH, 1, reserve=len(whole))


def test_keep_best_ends_with_the_lowest_validation_loss(teacher, text):
    # It rises to a hundred times what is bearable, so that the last is not the best whatever the
    # instruction set's rounding.
    settings = {"lr": 3.0, "schedule": "constant", "warmup": 1.0}
    last, generator = stage(teacher, text, **settings)
    by_step = {
        m["step"]: (m["validation"], last.params.flat.copy())
        for m in generator
        if "validation" in m
    }
    best = min(by_step.values(), key=lambda pair: pair[0])
    assert best[0] < by_step[9][0]
    student, generator = stage(teacher, text, keep="best", **settings)
    list(generator)
    assert np.array_equal(student.params.flat, best[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "best", "validate_every": 0}, "needs held_out and validate_every"),
        ({"keep": "best", "held_out": None}, "needs held_out and validate_every"),
        ({"held_out_targets": None}, "give held_out_targets"),
    ],
)
def test_validation_without_its_rows_or_targets_is_refused(teacher, text, changes, message):
    _, generator = stage(teacher, text, **changes)
    with pytest.raises(UserError, match=message):
        next(generator)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule", "cosin", "schedule is 'cosin', expected one of cosine, constant, linear, wsd"),
        ("kl_form", "tails", "kl_form is 'tails', expected one of renormalised, tail, sampled"),
        ("keep", "lowest", "keep is 'lowest', expected one of last, best"),
        ("accumulation", "trees", "accumulation is 'trees', expected one of sequence, tree"),
        ("micro_rows", 0, "micro_rows is 0"),
        ("clip", 0.0, "clip is 0.0"),
        ("warmup", 1.5, "warmup is 1.5"),
        ("lr", -1e-3, "lr -0.001"),
        ("beta2", 1.0, "beta2 is 1.0"),
        ("average", 1.0, "average is 1.0"),
        ("validate_every", -1, "validate_every is -1"),
    ],
)
def test_a_wrong_setting_is_named_and_not_taken_for_another(teacher, text, key, value, message):
    _, generator = stage(teacher, text, **{key: value})
    with pytest.raises(UserError, match=message):
        list(generator)


@pytest.mark.parametrize("stops", [(1,), (4, 3), (8,)])
def test_it_all_continues_bitwise(tmp_path, teacher, text, stops):
    settings = {"average": 0.9, "keep": "best", "window_dropout": 0.4, "micro_rows": 1}
    whole, generator = stage(teacher, text, **settings)
    expected = [(m["step"], m["loss"], m.get("validation")) for m in generator]
    seen = []
    for count in (*stops, None):
        student, generator = stage(teacher, text, state=tmp_path / "state.npz", **settings)
        for n, m in enumerate(generator, start=1):
            seen.append((m["step"], m["loss"], m.get("validation")))
            if n == count:
                break
        generator.close()
    assert seen == expected
    assert np.array_equal(student.params.flat, whole.params.flat)


# ---- window dropout -----------------------------------------------------------------------------


def test_a_forced_gate_has_exact_gradients():
    model = random_model("hybrid", dtype=np.float64)
    ids, reset, labels = random_batch(model, 2, 21)

    def loss(grads=None):
        settings = {"ce_weight": 1.0, "kl_weight": 0.0, "reset": reset, "gate": 1.0}
        return model.loss_and_grad(ids, labels, grads=grads, **settings)["ce"]

    grads = model.params.zeros_like()
    loss(grads)
    errors = directional_errors(model, loss, grads)
    assert max(errors.values()) <= DIRECTIONAL_F64
    for name in model.params.names():
        if "i_proj.bias" not in name:  # cancels under the ratio: its gradient is rounding noise
            assert grads[name].any() == ("o_gate" not in name), name


def test_window_dropout_hides_the_window_in_its_share_of_the_steps(teacher, text, monkeypatch):
    student, generator = stage(teacher, text, window_dropout=0.25, steps=8, validate_every=0)
    gates = []
    original = type(student).loss_and_grad

    def watched(self, *args, **settings):
        gates.append(settings["gate"])
        return original(self, *args, **settings)

    monkeypatch.setattr(type(student), "loss_and_grad", watched)
    list(generator)
    assert gates == [gate for gate in (None, None, None, 1.0) * 2 for _ in range(2)]
    _, generator = stage(teacher, text, window_dropout=1.0)
    with pytest.raises(UserError, match="window_dropout"):
        next(generator)


# ---- the rest -----------------------------------------------------------------------------------


def test_parts_of_a_batch_give_its_gradient_in_stage_one(teacher, text):
    found = []
    for micro_rows in (None, 1):
        student = linearize(teacher, window=6, sinks=2)
        list(align(student, teacher, text, steps=3, rows=3, length=LENGTH, micro_rows=micro_rows))
        found.append(student.params.flat.copy())
    # the same sums in another order
    assert np.abs(found[0] - found[1]).max() <= 1e-4


def test_warm_up_stable_decay():
    rates = [
        learning_rate(step, 20, peak=2.0, schedule="wsd", warmup=0.25) for step in range(1, 21)
    ]
    assert np.allclose(rates[:5], np.arange(1, 6) * 0.4)
    assert np.allclose(rates[5:16], 2.0)
    assert np.allclose(rates[16:], 2.0 * np.arange(4, 0, -1) / 5)


def test_joined_batches(text):
    rows = Rows(text, LENGTH, 1)
    one, two = rows.batch("a", [0, 1]), rows.batch("b", [2])
    both = joined([one, two])
    assert both.rows == [("a", 0), ("a", 1), ("b", 2)]
    assert np.array_equal(both.ids[2], two.ids[0])
    assert both.counted == one.counted + two.counted
