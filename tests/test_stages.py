"""linearize, align, distill, merge, optimiser and schedules on a tiny model."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
import tiny_run

from xlstm_distill import checkpoints, reference
from xlstm_distill.align import align, relative_errors
from xlstm_distill.data import Batches, Rows
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.linearize import linearize
from xlstm_distill.merge import merge
from xlstm_distill.optim import AdamW, Group, decays, learning_rate, trainable_names

ROW = dict(rows=2, length=32)


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def data(teacher):
    return tiny_run.text(teacher)


def student_of(teacher, **changes):
    return linearize(teacher, **{"window": 6, "sinks": 2, **changes})


# ---- linearize ----------------------------------------------------------------------------------


def test_linearize_copies_and_starts_where_it_should(teacher):
    student = student_of(teacher)
    assert all(np.array_equal(student.params[n], teacher.params[n]) for n in teacher.params)
    p = "model.layers.1.mixer."
    assert np.array_equal(student.params[p + "map_q"], np.broadcast_to(np.eye(16), (4, 16, 16)))
    assert (student.params[p + "f_proj.bias"] == 6).all()
    assert (student.params[p + "o_gate.bias"] == -3).all()
    for name in ("i_proj.weight", "i_proj.bias", "f_proj.weight", "o_gate.weight"):
        assert not student.params[p + name].any()
    assert student.provenance["teacher"]["fingerprint"] == teacher.fingerprint()


def test_a_student_computes_as_its_teacher_does(teacher):
    assert linearize(teacher.copy(compute="mixed"), window=4).compute == "mixed"
    assert linearize(teacher, window=4).compute == "f32"


def test_linearize_with_a_full_window_and_closed_gate_is_the_teacher(teacher):
    ids = np.random.default_rng(0).integers(0, tiny_run.VOCAB, (2, 40))
    student = student_of(teacher, window=None, sinks=0)
    expected = teacher.logits(ids)
    assert np.abs(student.logits(ids, gate=0.0) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_linearize_to_lolcats(teacher):
    ids = np.random.default_rng(0).integers(0, tiny_run.VOCAB, (2, 40))
    student = student_of(teacher, mixer="lolcats")
    p = "model.layers.1.mixer."
    assert [n for n in student.params if n.startswith(p)] == [
        p + name for name in ("map_q", "map_k", "window_factor")
    ]
    assert np.allclose(1 / (1 + np.exp(-student.params[p + "window_factor"])), 0.1)
    wide = student_of(teacher, mixer="lolcats", window=40, sinks=0)
    expected = teacher.logits(ids)
    assert np.abs(wide.logits(ids) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_linearize_keeps_layers(teacher):
    student = student_of(teacher, keep_attention=[1])
    assert [m.mixer for m in student.config.mixers] == ["hybrid", "attention"]
    assert not any(".1.mixer." in name for name in student.params)


def test_linearize_starts_max_above_its_floor(teacher):
    student = student_of(teacher, normalizer="max")
    bias = student.params["model.layers.0.mixer.i_proj.bias"]
    assert np.allclose(bias, 1.5 * np.log(16))
    student = student_of(teacher, normalizer="max", feature_map="elu")  # q.n is not small there
    assert not student.params["model.layers.0.mixer.i_proj.bias"].any()
    assert {m.feature_map for m in student.config.mixers} == {"elu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"mixer": "magic"}, "student: mixer"),
        ({"feature_map": "relu"}, "student: feature_map"),
        ({"keep_attention": [2]}, "layer 2 is outside 0..1"),
    ],
)
def test_linearize_bad_values(teacher, changes, message):
    with pytest.raises(UserError, match=message):
        student_of(teacher, **changes)


def test_linearize_refuses_students_and_bf16(teacher):
    with pytest.raises(UserError, match="a student already"):
        linearize(student_of(teacher))
    with pytest.raises(UserError, match="bf16"):
        linearize(teacher.copy(compute="bf16"))


# ---- optimiser ----------------------------------------------------------------------------------


def test_what_trains_and_what_decays(teacher):
    student = student_of(teacher)
    mixer = trainable_names(student, "mixer")
    assert all(".mixer." in name for name in mixer)
    frozen = {n for n in student.params if n.endswith("i_proj.bias")}
    assert len(frozen) == 2 and not frozen & trainable_names(student, "all")
    assert trainable_names(student, "all") == set(student.params) - frozen
    assert "model.layers.0.mixer.i_proj.bias" in trainable_names(
        student_of(teacher, normalizer="max"), "all"
    )
    for entry in student.params.entries:
        assert decays(entry) == (len(entry.shape) > 1), entry
    with pytest.raises(UserError, match="linearize it first"):
        trainable_names(teacher, "mixer")


RATES = [({}, {}), ({"mixer": 3.0}, {"map": 3.0, "gate": 3.0})]
RATES.append(({"mixer": 3.0, "gate": 0.5, "mlp": 0.1}, {"map": 3.0, "gate": 1.5, "mlp": 0.1}))


@pytest.mark.parametrize(("rates", "by_role"), RATES)
def test_adamw_is_the_reference_tensor_by_tensor(teacher, rates, by_role):
    student = student_of(teacher)
    names = trainable_names(student, "all")
    optimiser = AdamW(student.params, names, weight_decay=0.1, rates=rates)
    factor = {e.name: by_role.get(e.role, 1.0) for e in optimiser.entries}
    factor.update({n: rates.get("mixer", 1.0) for n in names if ".mixer." in n and "bias" in n})
    start = {n: student.params[n].copy() for n in student.params}
    random = np.random.default_rng(0)
    grads = student.params.zeros_like()
    expected = {n: start[n].astype(np.float64) for n in names}
    moments = {n: (np.zeros(v.shape), np.zeros(v.shape)) for n, v in expected.items()}
    for step in (1, 2):
        for e in optimiser.entries:
            grads.view(e)[...] = random.standard_normal(e.shape)
            p, (m, v) = expected[e.name].reshape(-1), moments[e.name]
            reference.adamw_step(
                p,
                grads[e.name].astype(np.float64).reshape(-1),
                m.reshape(-1),
                v.reshape(-1),
                lr=1e-2 * factor[e.name],
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                weight_decay=0.1 if len(e.shape) > 1 else 0.0,
                step=step,
                scale=0.5,
            )
        total = sum(float((grads.view(e).astype(np.float64) ** 2).sum()) for e in optimiser.entries)
        assert optimiser.norm(grads) == pytest.approx(total**0.5, rel=1e-9)
        optimiser.step(grads, 1e-2, scale=0.5)
    for name in student.params:
        if name in names:
            assert np.abs(student.params[name] - expected[name]).max() < 1e-5
        else:
            assert np.array_equal(student.params[name], start[name])


@pytest.mark.parametrize(
    ("rates", "message"),
    [({"mixr": 2.0}, "no group 'mixr'; there are: mixer, "), ({"norm": 0.0}, "norm has 0.0")],
)
def test_bad_rates_are_named(teacher, rates, message):
    with pytest.raises(UserError, match=message):
        AdamW(teacher.params, set(teacher.params), rates=rates)


def test_every_role_is_a_group(teacher):
    roles = {e.role for e in student_of(teacher).params.entries}
    assert roles | {"mixer", "head", "bias"} == set(get_args(Group))


def test_schedules():
    def rates(schedule, steps=20, **more):
        given = dict(peak=1.0, schedule=schedule, warmup=0.25, **more)
        return [learning_rate(s, steps, **given) for s in range(1, steps + 1)]

    for schedule in ("constant", "linear", "cosine"):
        values = rates(schedule)
        assert np.allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(rates("constant")[5:]) == {1.0}
    linear = rates("linear")[4:]
    assert np.allclose(np.diff(linear), -1 / 16) and linear[-1] == pytest.approx(1 / 16)
    cosine = rates("cosine", floor=0.1)
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[12] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 8 / 15)))
    assert learning_rate(1, 1, peak=1.0, schedule="linear", warmup=0.0) == 1.0


# ---- stage I ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats"])
def test_align_lowers_the_error_of_every_layer_and_leaves_the_rest_alone(teacher, data, mixer):
    student = student_of(teacher, mixer=mixer)
    probe = [Rows(data, 32, 9).batch("data", range(4))]
    before = relative_errors(student, probe)
    metrics = list(align(student, teacher, data, steps=30, **ROW))
    after = relative_errors(student, probe)
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert [m["step"] for m in metrics] == list(range(1, 31))
    assert metrics[-1]["relative_error"] == pytest.approx(np.mean(metrics[-1]["layers"]))
    assert all(np.array_equal(student.params[n], teacher.params[n]) for n in teacher.params)
    if mixer == "hybrid":
        assert not student.params["model.layers.0.mixer.i_proj.bias"].any()


def test_align_needs_the_teachers_weights(teacher, data):
    student = student_of(teacher)
    student.params["model.norm.weight"][0] += 1
    with pytest.raises(UserError, match=r"model\.norm\.weight differs"):
        next(align(student, teacher, data, steps=1, **ROW))


# ---- stage II -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats"])
def test_distill_lowers_the_kl_with_the_teacher_as_source(teacher, data, mixer):
    student = student_of(teacher, mixer=mixer)
    ids = Rows(data, 32, 9).batch("data", range(4))

    def kl():
        return float(teacher.divergence([student], ids.ids, reset=ids.reset)["kl"].mean())

    before = kl()
    settings = dict(kl_weight=1.0, ce_weight=0.0, kl_form="tail", k=60, lr=3e-3)
    metrics = list(distill(student, data, teacher, steps=150, **settings, **ROW))
    assert kl() < 0.7 * before
    assert np.mean([m["kl"] for m in metrics[-5:]]) < np.mean([m["kl"] for m in metrics[:5]])


def test_gradient_accumulation_changes_rounding_only(teacher, data):
    ends = []
    for micro_rows in (1, 2, 4):
        student = student_of(teacher)
        settings = dict(rows=4, length=32, micro_rows=micro_rows, k=8)
        (only,) = distill(student, data, teacher, steps=1, **settings)
        ends.append((only["loss"], only["gradient_norm"]))
    assert np.allclose(ends, ends[0], rtol=1e-5)


def test_mixer_only_training_freezes_the_rest(teacher, data):
    student = student_of(teacher)
    list(distill(student, data, teacher, steps=2, train_what="mixer", k=8, **ROW))
    assert all(np.array_equal(student.params[n], teacher.params[n]) for n in teacher.params)
    assert student.params["model.layers.0.mixer.map_q"].std() > 0


def test_cross_entropy_alone_needs_no_targets(teacher, data):
    student = student_of(teacher)
    (m,) = distill(student, data, None, steps=1, ce_weight=1.0, kl_weight=0.0, **ROW)
    assert m["loss"] == pytest.approx(m["ce"]) and m["kl"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no targets"),
        ({"kl_weight": 0.0, "ce_weight": 0.0}, "not both 0"),
        ({"kl_weight": 0.0, "ce_weight": -1.0}, "ce_weight -1.0"),
        ({"kl_weight": 0.0, "steps": 0}, "steps is 0"),
        ({"kl_weight": 0.0, "rows": 0}, "rows is 0"),
        ({"kl_weight": 0.0, "length": 10**6}, "fewer than one row"),
    ],
)
def test_distill_bad_values(teacher, data, changes, message):
    with pytest.raises(UserError, match=message):
        next(distill(student_of(teacher), data, None, **{"steps": 1, **ROW, **changes}))


def test_divergence_is_one_line(teacher, data):
    student = student_of(teacher)
    student.params["model.norm.weight"][0] = np.nan
    with pytest.raises(UserError, match="step 1: the gradient is not finite"):
        next(distill(student, data, None, steps=1, ce_weight=1.0, kl_weight=0.0, **ROW))


def test_divergence_leaves_the_last_saved_state(teacher, data, tmp_path, monkeypatch):
    student, state = student_of(teacher), tmp_path / "s.npz"
    settings = {"steps": 9, "ce_weight": 1.0, "kl_weight": 0.0, "state": state, "save_seconds": 0.0}
    steps = distill(student, data, None, **settings, **ROW)
    next(steps), next(steps)
    whole, saved = student.loss_and_grad, []

    def diverging(*batch, grads, **options):
        saved.append(state.stat().st_mtime_ns)
        found = whole(*batch, grads=grads, **options)
        grads.flat[:] = np.inf
        return found

    monkeypatch.setattr(student, "loss_and_grad", diverging)
    with pytest.raises(UserError, match="step 3: the gradient is not finite"):
        list(steps)
    assert {*saved} == {state.stat().st_mtime_ns}


# ---- merge --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(teacher):
    found = {}
    for n, name in enumerate("abc"):
        student = student_of(teacher)
        random = np.random.default_rng(n)
        for e in student.params.entries:
            student.params.view(e)[...] += 0.1 * random.standard_normal(e.shape).astype(np.float32)
        found[name] = student
    return found


def test_merge_is_the_weighted_sum_rounded_once(experts):
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    merged = merge(experts, weights)
    for name in merged.params:
        exact = sum(weights[e] * experts[e].params[name].astype(np.float64) for e in "abc")
        assert np.abs(merged.params[name] - exact).max() <= 2.0**-24 * np.abs(exact).max()


def test_merge_does_not_depend_on_order_or_on_where_experts_are(experts, tmp_path):
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    first = merge(experts, weights)
    for order in itertools.permutations("abc"):
        again = merge({n: experts[n] for n in order}, {n: weights[n] for n in order})
        assert np.array_equal(again.params.flat, first.params.flat)
    places = {}
    for name, expert in experts.items():
        places[name] = tmp_path / name
        expert.save(places[name])
    out = merge(places, weights, out=tmp_path / "merged")
    loaded = checkpoints.load(out)
    assert all(np.array_equal(loaded.tensors[n], first.params[n]) for n in first.params)
    names = [e["name"] for e in loaded.provenance["merge"]["experts"]]
    assert sorted(names) == ["a", "b", "c"]
    assert loaded.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_merge_skips_weight_zero(experts, teacher):
    alone = merge(experts, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert np.array_equal(alone.params.flat, experts["a"].params.flat)
    broken = student_of(teacher)
    broken.params["model.norm.weight"][:] = np.nan
    kept = merge({"a": experts["a"], "broken": broken}, {"a": 1.0, "broken": 0.0})
    assert np.array_equal(kept.params.flat, experts["a"].params.flat)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.4, "c": 0.2}, "add up to 1.1"),
        ({"a": 1.5, "b": -0.5, "c": 0.0}, "weight of b is -0.5"),
        ({"a": float("nan"), "b": 0.5, "c": 0.5}, "weight of a is nan"),
        ({"a": 0.5, "b": 0.5}, "disagree on 'c'"),
    ],
)
def test_merge_bad_weights(experts, weights, message):
    with pytest.raises(UserError, match=message):
        merge(experts, weights)


def test_merge_names_what_differs(experts, teacher):
    with pytest.raises(UserError, match="a and other differ in mixers"):
        merge({"a": experts["a"], "other": student_of(teacher, window=7)})
    with pytest.raises(UserError, match="no experts"):
        merge({})


# ---- batches made by hand -----------------------------------------------------------------------


def test_stages_take_domains_rows_and_batches(teacher, data):
    rows = Rows(data, 32)
    for source in (rows, {"x": data, "y": data}, Batches({"x": rows}, 2)):
        (m,) = align(student_of(teacher), teacher, source, steps=1, **ROW)
        assert m["tokens"] == 64
