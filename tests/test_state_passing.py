"""State passing: rows that go on from the state behind the row before, with no gradient into it."""

from __future__ import annotations

import numpy as np
import pytest
from models import MIXERS, random_batch, random_model
from test_model import directional_errors
from tolerances import DIRECTIONAL_F64, FORMS_F64, PREFILL_STEP_F32

CE = {"ce_weight": 1.0, "kl_weight": 0.0}
by_mixer = pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "attention"])


def pieces(model, ids, reset, labels, *cuts, **settings):
    """Sums of the losses of the pieces of rows, one after the other, and the states behind them."""
    state, found = model.new_state(len(ids)), []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        behind, part = model.new_state(len(ids)), np.s_[:, start:end]
        around = {"state": state, "state_behind": behind}
        given = {**CE, **around, **settings}
        found.append(model.loss_and_grad(ids[part], labels[part], reset=reset[part], **given))
        state = behind
    return found, state


# ---- the model ----------------------------------------------------------------------------------


@by_mixer
def test_pieces_have_the_loss_of_the_whole(mixer):
    model = random_model(mixer, dtype=np.float64)
    ids, reset, labels = random_batch(model, 3, 90)
    reset[0, 1:] = False  # a row of one document
    whole = model.loss_and_grad(ids, labels, reset=reset, **CE)
    for cuts in [(1, 2, 37, 89), (45,)]:
        found, _ = pieces(model, ids, reset, labels, *cuts)
        assert sum(f["tokens"] for f in found) == whole["tokens"]
        assert abs(sum(f["ce"] for f in found) / whole["ce"] - 1) <= FORMS_F64
    alone = model.loss_and_grad(ids[:, 45:], labels[:, 45:], reset=reset[:, 45:], **CE)
    assert abs(alone["ce"] / found[-1]["ce"] - 1) > 1e5 * FORMS_F64  # the state matters


@by_mixer
def test_pieces_equal_prefill_and_scores(mixer):
    model = random_model(mixer)
    ids, _, labels = random_batch(model, 1, 60)
    labels[:, :-1] = ids[:, 1:]
    found, last = pieces(model, ids, np.zeros_like(ids, bool), labels, 25)
    _, state = model.prefill(ids[:, :25])
    _, state = model.prefill(ids[:, 25:], state)
    assert np.array_equal(last.tensors.raw, state.tensors.raw)
    assert np.array_equal(last.lengths, state.lengths)
    scores = model.score_continuations(ids[0, :25].tolist(), [ids[0, 25:].tolist()])[0]
    assert abs(found[1]["ce"] / -scores[1:].sum() - 1) <= PREFILL_STEP_F32


@by_mixer
@pytest.mark.parametrize("steps", [1, 21])
def test_gradient_with_the_state_held_fixed(mixer, steps):
    model = random_model(mixer, dtype=np.float64)
    ids, reset, labels = random_batch(model, 2, 19 + steps)
    reset[0, 1:] = False
    reset[1, 19:] = steps > 1 and np.arange(steps) == 6
    labels[:, 19:] = np.where(np.arange(steps) % 5 == 4, -1, ids[:, 19:])  # any labels will do
    _, state = pieces(model, ids[:, :19], reset[:, :19], labels[:, :19])
    before = state.tensors.raw.copy()
    random = np.random.default_rng(5)
    tid = np.argsort(random.random((2, steps, model.config.vocab_size)), axis=2)[..., :6]
    tlogp = np.log(random.dirichlet(np.ones(7), (2, steps)))[..., :6]

    def loss(grads=None):
        found = model.loss_and_grad(
            ids[:, 19:],
            labels[:, 19:],
            (tid.astype(np.int32), tlogp),
            ce_weight=0.3,
            kl_weight=0.7,
            reset=reset[:, 19:],
            grads=grads,
            scale=0.11,
            state=state,
            state_behind=model.new_state(2),
        )
        return 0.11 * (0.3 * found["ce"] + 0.7 * found["kl"])

    grads = model.params.zeros_like()
    loss(grads)
    errors = directional_errors(model, loss, grads)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])
    assert np.array_equal(state.tensors.raw, before)


@by_mixer
def test_a_document_start_forgets_the_state(mixer):
    model = random_model(mixer)
    ids, reset, labels = random_batch(model, 2, 80)
    reset[:, 40] = True
    _, state = pieces(model, ids[:, :40], reset[:, :40], labels[:, :40])
    found = []
    for around in ({}, {"state": state, "state_behind": model.new_state(2)}):
        grads = model.params.zeros_like()
        sums = model.loss_and_grad(
            ids[:, 40:], labels[:, 40:], reset=reset[:, 40:], grads=grads, **CE, **around
        )
        found.append((sums, grads.flat))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


def test_threads_and_recomputation_do_not_change_a_bit(runtime):
    model = random_model(mixers=[MIXERS["hybrid"], MIXERS["mlstm"]])
    ids, reset, labels = random_batch(model, 2, 300)
    found = []
    for threads, recompute in [(1, False), (2, False), (3, False), (2, True)]:
        runtime.set_threads(threads)
        grads = model.params.zeros_like()
        sums, state = pieces(model, ids, reset, labels, 130, grads=grads, recompute=recompute)
        found.append((sums, state.tensors.raw, grads.flat))
    for sums, state, flat in found[1:]:
        assert sums == found[0][0]
        assert np.array_equal(state, found[0][1])
        assert np.array_equal(flat, found[0][2])
    alone, _ = pieces(model, ids, reset, labels, 130)  # the loss without a gradient
    assert alone == found[0][0]


def test_states_that_do_not_fit_are_refused():
    model = random_model("hybrid")
    ids, reset, labels = random_batch(model, 2, 10)

    def around(state, behind):
        given = {"state": state, "state_behind": behind, "reset": reset, **CE}
        return model.loss_and_grad(ids, labels, **given)

    state = model.new_state(2)
    for pair in [(state, None), (None, state), (state, state)]:
        with pytest.raises(ValueError, match="must be two states"):
            around(*pair)
    with pytest.raises(ValueError, match="the state has 3 rows, ids have 2"):
        around(state, model.new_state(3))
    full = random_model("attention")
    model, state = full, full.new_state(2)
    state.lengths[:] = 250
    with pytest.raises(ValueError, match="room for 256 and 256 tokens"):
        around(state, full.new_state(2))
