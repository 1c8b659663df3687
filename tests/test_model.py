"""The model layer: gradients of whole losses, equalities between its ways of running, documents."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from models import MIXERS, random_batch, random_model
from tolerances import (
    DIRECTIONAL_F64,
    DOCUMENT_MOVED,
    GATE_ZERO_IS_TEACHER,
    PREFILL_STEP_F32,
)

from xlstm_distill import runtime
from xlstm_distill.errors import UserError
from xlstm_distill.state import load_state


def relative(actual, expected) -> float:
    """Largest difference as a share of the largest expected value; NaN counts as infinite."""
    error = float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
    return error if np.isfinite(error) else float("inf")


def directional_errors(model, loss, grads, seed=3, step=1e-4):
    """Relative error of <gradient, direction> per tensor against central differences."""
    random = np.random.default_rng(seed)
    errors = {}
    for e in model.params.entries:
        direction = random.standard_normal(e.shape)
        view = model.params.view(e)
        keep = view.copy()
        values = {}
        for n in (-2, -1, 1, 2):
            view[...] = keep + n * step * direction
            values[n] = loss()
        view[...] = keep
        # fourth order: with random maps the third derivative is large
        numeric = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
        exact = float(np.sum(grads.view(e) * direction))
        errors[e.name] = abs(numeric - exact) / max(abs(numeric), abs(exact), 1e-3)
    return errors


def step_for(mixer):
    """A step of finite differences: LoLCATs have kinks where the largest score changes hands, the
    slope of elu + 1 has one at 0."""
    if mixer.endswith(" elu"):
        return 3e-6
    return 1e-5 if mixer.startswith("lolcats") else 1e-4


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("form", ["renormalised", "tail", "sampled"])
def test_stage_two_gradient_of_every_tensor(mixer, form):
    model = random_model(mixer, dtype=np.float64, tie_word_embeddings=form != "tail")
    ids, reset, labels = random_batch(model, 2, 21)
    random = np.random.default_rng(5)
    tid = np.argsort(random.random((2, 21, model.config.vocab_size)), axis=2)[..., :6]
    tlogp = np.log(random.dirichlet(np.ones(7), (2, 21)))[..., :6]

    def loss(grads=None):
        r = model.loss_and_grad(
            ids,
            labels,
            (tid.astype(np.int32), tlogp),
            ce_weight=0.3,
            kl_weight=0.7,
            kl_form=form,
            reset=reset,
            grads=grads,
            scale=0.11,
        )
        return 0.11 * (0.3 * r["ce"] + 0.7 * r["kl"])

    grads = model.params.zeros_like()
    grads.flat[:] = 0.25  # backward adds
    before = grads.copy()
    loss(grads)
    for e in grads.entries:
        grads.view(e)[...] -= before.view(e)
    errors = directional_errors(model, loss, grads, step=step_for(mixer))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m not in ("attention", "window")])
def test_stage_one_gradient_of_every_tensor(mixer):
    model = random_model(mixer, dtype=np.float64)
    ids, reset, _ = random_batch(model, 2, 21)

    def loss(grads=None):
        err, _, _ = model.align_and_grad(ids, reset, grads=grads, scale=0.01)
        return 0.01 * float(err.sum())

    grads = model.params.zeros_like()
    loss(grads)
    new = {n for n in model.params.names() if ".mixer." in n}
    errors = directional_errors(model, loss, grads, step=step_for(mixer))
    errors = {n: e for n, e in errors.items() if n in new}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])
    for e in grads.entries:
        if e.name not in new:
            assert not grads.view(e).any(), f"{e.name} is frozen in stage I"


def test_unwanted_gradients_stay_untouched():
    model = random_model("hybrid")
    ids, reset, labels = random_batch(model, 1, 16)
    wanted = {"model.layers.1.mixer.map_q", "model.norm.weight"}
    grads = model.params.zeros_like()
    model.loss_and_grad(
        ids, labels, ce_weight=1.0, kl_weight=0.0, reset=reset, grads=grads, trainable=wanted
    )
    assert {e.name for e in grads.entries if grads.view(e).any()} == wanted


@pytest.mark.parametrize(
    "kinds", [["hybrid"] * 3, ["mlstm", "attention", "hybrid"], ["lolcats", "hybrid", "window"]]
)
def test_recomputed_activations_give_the_same_bits(kinds):
    model = random_model(mixers=[MIXERS[k] for k in kinds], num_hidden_layers=3)
    ids, reset, labels = random_batch(model, 2, 24)
    found = []
    for recompute in (False, True):
        grads = model.params.zeros_like()
        sums = model.loss_and_grad(
            ids,
            labels,
            ce_weight=1.0,
            kl_weight=0.0,
            reset=reset,
            grads=grads,
            recompute=recompute,
        )
        found.append((sums, grads.flat))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    alone = model.loss_and_grad(ids, labels, ce_weight=1.0, kl_weight=0.0, reset=reset)
    assert alone == found[0][0]


def test_gate_zero_with_a_wide_window_is_the_teacher():
    teacher = random_model("attention")
    student = random_model("hybrid")
    wide = student.config.mixers[0].model_copy(update={"window": 64, "sinks": 0})
    student = type(student)(student.config.model_copy(update={"mixers": [wide] * 2}))
    random = np.random.default_rng(0)
    for e in student.params.entries:
        student.params[e.name] = (
            teacher.params[e.name] if e.name in teacher.params else random.standard_normal(e.shape)
        )
    ids, reset, _ = random_batch(teacher, 2, 40)
    expected = teacher.logits(ids, reset=reset)
    assert relative(student.logits(ids, gate=0.0, reset=reset), expected) <= GATE_ZERO_IS_TEACHER
    assert relative(student.logits(ids, reset=reset), expected) > 100 * GATE_ZERO_IS_TEACHER


@pytest.mark.parametrize("mixer", MIXERS)
def test_prefill_and_step_equal_forward(mixer):
    model = random_model(mixer)
    ids, _, _ = random_batch(model, 3, 40)
    whole = model.logits(ids)
    lengths = np.array([23, 9, 17])
    first, state = model.prefill(ids[:, :23], lengths=lengths)
    rows = np.arange(3)
    assert relative(first, whole[rows, lengths - 1]) <= PREFILL_STEP_F32
    for t in range(12):
        logits, state = model.step(ids[rows, lengths + t], state)
        assert relative(logits, whole[rows, lengths + t]) <= PREFILL_STEP_F32
    # rows of a state can be repeated, reordered and dropped
    forked = model.fork(state, [2, 0, 2])
    logits, _ = model.step(ids[[2, 0, 2], (lengths + 12)[[2, 0, 2]]], forked)
    assert relative(logits, whole[[2, 0, 2], (lengths + 12)[[2, 0, 2]]]) <= PREFILL_STEP_F32


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats", "lolcats with sinks"])
def test_prefill_in_pieces_equals_prefill_at_once(mixer):
    model = random_model(mixer)
    ids, _, _ = random_batch(model, 2, 50)
    at_once, _ = model.prefill(ids)
    _, state = model.prefill(ids[:, :13])
    _, state = model.prefill(ids[:, 13:14], state)
    pieces, _ = model.prefill(ids[:, 14:], state)
    assert relative(pieces, at_once) <= PREFILL_STEP_F32


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats"])
def test_state_survives_saving(mixer, tmp_path):
    model = random_model(mixer)
    ids, _, _ = random_batch(model, 2, 20)
    _, state = model.prefill(ids)
    state.save(tmp_path / "state.npz")
    again = load_state(tmp_path / "state.npz", model)
    assert np.array_equal(
        model.step([3, 4], again)[0], model.step([3, 4], model.fork(state, [0, 1]))[0]
    )


def test_a_damaged_saved_state_is_one_line_that_names_the_file(tmp_path):
    model = random_model("hybrid")
    _, state = model.prefill([[1, 2, 3], [4, 5, 6]])
    path, damaged = tmp_path / "state.npz", tmp_path / "damaged.npz"
    state.save(path)
    saved = dict(np.load(path))
    header = json.loads(str(saved["header"]))
    files = [b"", path.read_bytes()[:500]]
    for change in [
        {"header": np.array("{}")},
        {"header": np.array("[]")},
        {"header": np.array(json.dumps({**header, "capacity": "a"}))},
        {"header": np.array(json.dumps({**header, "capacity": -4}))},
        {"lengths": np.array([-5, 3])},
        {"lengths": np.array([2**31, 3])},
        {"lengths": np.array([1.5, 3])},
        {"lengths": np.array(3)},
        {"layers.0.c": np.zeros(3, np.float32)},
        {"layers.0.c": saved["layers.0.c"] * np.nan},
        {"layers.0.c": saved["layers.0.c"].astype(str)},
    ]:
        np.savez(damaged, **{**saved, **change})
        files.append(damaged.read_bytes())
    for contents in files:
        damaged.write_bytes(contents)
        with pytest.raises(UserError, match=r"damaged\.npz: [^\n]*$"):
            load_state(damaged, model)


@pytest.mark.parametrize("mixer", ["hybrid", "attention"])
def test_a_state_of_another_model_is_refused(mixer):
    model = random_model("hybrid without sinks")
    others = [
        random_model(mixer),
        random_model("hybrid without sinks", hidden_size=32),
        model.copy(dtype=np.float64),
    ]
    ids = [[1, 2, 3], [4, 5, 6]]
    _, own = model.prefill(ids)
    for other in others:
        _, state = other.prefill(ids)
        with pytest.raises(ValueError, match="another configuration or dtype"):
            model.step([1, 2], state)
        with pytest.raises(ValueError, match="another configuration or dtype"):
            model.fork(state, [0])
        with pytest.raises(ValueError, match="another configuration or dtype"):
            own.joined(model, state)
    with pytest.raises(ValueError, match="the state has 2 rows, ids have 1"):
        model.hidden_after([[1]], own)
    model.copy(compute="bf16").step([1, 2], own)  # other weights: such a state it can read


def test_a_state_has_a_row_at_least():
    model = random_model("hybrid")
    _, state = model.prefill([[1, 2, 3]])
    for make in (lambda: model.new_state(0), lambda: model.fork(state, [])):
        with pytest.raises(ValueError, match="a state of 0 rows, expected 1 or more"):
            make()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_tokens_give_empty_results(shape):
    teacher, student = random_model(), random_model("hybrid")
    ids = np.zeros(shape, dtype=np.int32)
    assert student.logits(ids).shape == (*shape, student.config.vocab_size)
    assert student.hidden(ids).shape == (*shape, student.config.hidden_size)
    assert student.topk(ids, 3)[0].shape == (*shape, 3)
    assert teacher.divergence([student], ids)["kl"].shape == (1, *shape)
    assert student.score(ids).shape == (shape[0], max(0, shape[1] - 1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("compute", ["f32", "bf16", "int8"])
def test_models_and_states_survive_pickling_and_deep_copies(duplicate, compute):
    model = random_model("hybrid").copy(compute=compute)
    ids = [[1, 2, 3], [4, 5, 6]]
    logits, state = model.prefill(ids)
    other = duplicate(model)
    assert np.array_equal(other.prefill(ids)[0], logits)
    # Where NumPy puts a copy is chance: each of several must be where the core reads.
    following = [other.step([7, 8], duplicate(state))[0] for _ in range(8)]
    expected, _ = model.step([7, 8], state)
    assert all(np.array_equal(found, expected) for found in following)
    assert (other.compute, other.fingerprint()) == (compute, model.fingerprint())
    other.params["model.norm.weight"][:] = 0
    assert model.params["model.norm.weight"].all()
    assert not other.logits(ids).any()


def test_lengths_are_whole_numbers():
    model = random_model("hybrid")
    for lengths in ([1.5, 2], [1, 2**40]):
        with pytest.raises(ValueError, match="do not fit ids of shape"):
            model.logits([[1, 2, 3], [4, 5, 6]], lengths=lengths)


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_do_not_see_each_other(mixer):
    model = random_model(mixer)
    ids, _, _ = random_batch(model, 1, 48)
    reset = np.zeros((1, 48), dtype=bool)
    reset[0, [0, 11, 30]] = True
    packed = model.logits(ids, reset=reset)
    other = ids.copy()
    other[0, :11] = (ids[0, :11] + 7) % model.config.vocab_size
    other[0, 30:] = (ids[0, 30:] + 5) % model.config.vocab_size
    changed = model.logits(other, reset=reset)
    assert np.array_equal(packed[0, 11:30], changed[0, 11:30])  # bitwise: only contents changed
    alone = model.logits(ids[:, 11:30])
    assert relative(packed[:, 11:30], alone) <= DOCUMENT_MOVED


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats with sinks"])
def test_rows_and_threads_do_not_matter(mixer):
    model = random_model(mixer)
    ids, reset, labels = random_batch(model, 3, 40)
    results = []
    before = runtime.threads()
    try:
        for threads in (1, 2, 3):
            runtime.set_threads(threads)
            grads = model.params.zeros_like()
            model.loss_and_grad(ids, labels, ce_weight=1.0, kl_weight=0.0, reset=reset, grads=grads)
            model.align_and_grad(ids, reset, grads=grads)
            results.append((model.logits(ids, reset=reset), grads.flat.copy()))
    finally:
        runtime.set_threads(before)
    for logits, flat in results[1:]:
        assert np.array_equal(logits, results[0][0])
        assert np.array_equal(flat, results[0][1])


def test_score_and_continuations_agree_with_logits():
    model = random_model("hybrid")
    ids, _, _ = random_batch(model, 1, 30)
    z = model.logits(ids).astype(np.float64)
    logp = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    expected = np.take_along_axis(logp[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
    assert np.max(np.abs(model.score(ids) - expected)) <= 1e-5 * np.max(np.abs(expected))
    row = ids[0].tolist()
    scores = model.score_continuations(row[:20], [row[20:], row[20:23], [5]])
    assert relative(scores[0], expected[0, 19:]) <= PREFILL_STEP_F32
    assert relative(scores[1], expected[0, 19:22]) <= PREFILL_STEP_F32
    assert abs(scores[2][0] - logp[0, 19, 5]) <= 1e-4


def test_divergence_and_topk_agree_with_logits():
    teacher, student = random_model("attention"), random_model("hybrid")
    ids, reset, _ = random_batch(teacher, 2, 25)

    def log_softmax(m):
        z = m.logits(ids, reset=reset).astype(np.float64)
        return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))

    t, s = log_softmax(teacher), log_softmax(student)
    got = teacher.divergence([teacher, student], ids, reset=reset)
    assert got["kl"].shape == (2, *ids.shape) and np.max(got["kl"][0]) <= 1e-6
    assert np.max(np.abs(got["kl"][1] - np.sum(np.exp(t) * (t - s), axis=-1))) <= 1e-5
    assert np.array_equal(got["agree"][1] == 1, t.argmax(-1) == s.argmax(-1))
    assert np.array_equal(got["nll"][0], got["teacher_nll"])
    alone = teacher.divergence([], ids, reset=reset)["teacher_nll"]
    assert np.max(np.abs(alone - got["teacher_nll"])) <= 1e-5
    tid, logp, mass = teacher.topk(ids, 5, reset=reset)
    order = np.argsort(-t, axis=-1, kind="stable")[..., :5]
    assert np.array_equal(tid, order)
    assert np.max(np.abs(logp - np.take_along_axis(t, order, -1))) <= 1e-5
    assert np.max(np.abs(mass - np.exp(logp.astype(np.float64)).sum(-1))) <= 1e-5


@pytest.mark.parametrize("mixer", ["hybrid", "lolcats"])
def test_generation_of_ragged_rows_equals_one_by_one(mixer):
    model = random_model(mixer)
    prompts = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]
    together = model.generate_batch(prompts, 12, temperature=0.0)
    for prompt, new in zip(prompts, together, strict=True):
        assert model.generate_batch([prompt], 12, temperature=0.0) == [new]
    assert model.generate_batch(prompts, 12, seed=3) == model.generate_batch(prompts, 12, seed=3)


def test_bad_calls_are_refused():
    model = random_model("hybrid")
    with pytest.raises(UserError, match="token id 61 is outside"):
        model.logits([[1, 61]])
    with pytest.raises(ValueError, match="gate is 2"):
        model.logits([[1, 2]], gate=2.0)
    with pytest.raises(ValueError, match="lengths"):
        model.logits([[1, 2]], lengths=[3])
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate_batch([[1], []], 4)


def test_bf16_weights_stay_close():
    model = random_model("hybrid")
    ids, _, _ = random_batch(model, 2, 30)
    got = model.copy(compute="bf16").logits(ids)
    exact = model.logits(ids)
    error = relative(got, exact)
    assert 0 < error < 0.05  # 8 bits of mantissa through two layers
