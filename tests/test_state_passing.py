"""State passing: rows that go on from the state behind the row before, with no gradient into it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
from models import MIXERS, random_batch, random_model
from test_model import directional_errors, relative, step_for
from test_targets import identity
from tolerances import DIRECTIONAL_F64, FORMS_F64, OP_F32, PREFILL_STEP_F32

from xlstm_distill.data import Batches, Rows, TokenData
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.linearize import linearize
from xlstm_distill.recipe import make_recipe
from xlstm_distill.run import run
from xlstm_distill.sharing import parts
from xlstm_distill.targets import OnlineTargets, TargetCache, write_targets

LENGTH = 32
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
    errors = directional_errors(model, loss, grads, step=step_for(mixer))
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


def test_put_is_fork_the_other_way():
    model = random_model("hybrid")
    ids, _, _ = random_batch(model, 4, 20)
    _, state = model.prefill(ids, lengths=[20, 3, 11, 7])
    other = model.new_state(4)
    for rows in ([2, 0], [3, 1]):
        other.put(rows, state.fork(model, rows))
    assert np.array_equal(other.tensors.raw, state.tensors.raw)
    assert np.array_equal(other.lengths, state.lengths)


# ---- rows and batches ---------------------------------------------------------------------------


def documents(count, seed=0):
    """Documents of 1 to 90 distinct tokens: a token says where it stands."""
    lengths = np.random.default_rng(seed).integers(1, 91, count)
    ends = np.cumsum(lengths)
    return TokenData.from_documents(
        [range(end - n, end) for n, end in zip(lengths, ends, strict=True)], int(ends[-1]) + 1
    )


@pytest.mark.parametrize("reserve", [0, 5])
def test_rows_of_a_stream_go_on(reserve):
    data = documents(60)
    plain, rows = Rows(data, 16, 3, reserve), Rows(data, 16, 3, reserve, streams=4)
    assert len(rows) == len(plain) // 4 * 4
    first = set(data.offsets[:-1].tolist())
    seen = set()
    for n in range(len(rows)):
        ids, _, reset = rows.row(n)
        before = rows.row(n - 4)[1][-1] if n >= 4 else -1
        # it goes on where the label that the row before ended with stands, or begins anew
        assert reset[0] == (ids[0] in first or ids[0] != before)
        assert set(ids[1:][reset[1:]]) == set(ids[1:]) & first
        seen.update(ids.tolist())
    gaps = sum(bool(rows.row(n)[2][0]) and rows.row(n)[0][0] not in first for n in range(len(rows)))
    assert gaps <= 4 + reserve
    assert len(seen) == 16 * len(rows)
    for n, m in zip(rows.reserved, plain.reserved, strict=True):
        for x, y in zip(rows.row(n), plain.row(m), strict=True):
            assert np.array_equal(x, y)
        assert not seen & set(rows.row(n)[0].tolist())
    assert rows.identity == {**plain.identity, "streams": 4}


def test_what_stands_before_a_row_is_its_document():
    data = documents(60)
    rows = Rows(data, 16, 3, 5, streams=4)
    found = []
    for n in [*range(len(rows)), *rows.reserved]:
        ids, _, reset = rows.row(n)
        before = rows.before(n, 2)
        assert before.dtype == np.int32 and len(rows.before(n, 0)) == 0
        assert np.array_equal(before, rows.before(n, 9)[-32:])
        if reset[0]:
            assert len(before) == 0
            continue
        # tokens are numbered through: those before are the numbers before, in one document
        begin = data.offsets[np.searchsorted(data.offsets, ids[0], side="right") - 1]
        assert np.array_equal(before, np.arange(ids[0] - len(before), ids[0]))
        assert before[0] == begin or (before[0] > begin and len(before) in (16, 32))
        found.append(len(before))
    assert 32 in found and min(found) < 16 and len(set(found)) > 5


def test_a_batch_has_no_two_rows_of_a_stream():
    sources = {
        name: Rows(documents(30 + 9 * n, n), 16, 1, streams=5) for n, name in enumerate("abc")
    }
    batches = Batches(sources, 5, {"a": 0.55, "b": 0.05, "c": 0.4})
    last = {}
    for _ in range(60):
        rows = next(batches).rows
        assert len({(name, n % 5) for name, n in rows}) == 5
        for name, n in rows:  # the next of its stream, or the first one again
            expected = last.get((name, n % 5), n % 5 - 5) + 5
            assert n == (expected if expected < len(sources[name]) else n % 5)
            last[name, n % 5] = n


def test_streams_that_do_not_fit_are_refused():
    data = documents(20)
    with pytest.raises(UserError, match="fewer than two rows for each of 40 streams"):
        Rows(data, 16, streams=40)
    with pytest.raises(UserError, match=r"batches of 3 rows.*\[2\] streams, expected 0 or 3"):
        Batches({"a": Rows(data, 16, streams=2)}, 3)


# ---- stage II -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def text(teacher):
    """Documents that are longer than a row, and shorter ones."""
    texts = [f"{n}: " + tiny_run.TEXT[n % 4] * (1 + n % 3) for n in range(16)]
    return TokenData.from_texts(texts, teacher.tokenizer)


def stage(teacher, text, **changes):
    """A new student and the generator that trains it on rows of two domains."""
    student = linearize(teacher, window=6, sinks=2)
    sources = {name: Rows(text, LENGTH, n, streams=3) for n, name in enumerate("ab")}
    batches = Batches(sources, 3, {"a": 0.7, "b": 0.3})
    settings = {"steps": 7, "k": 8, "lr": 1e-3, "state_passing": True, **changes}
    return student, distill(student, batches, teacher, **settings)


def test_steps_go_on_where_the_last_one_ended(teacher, text):
    """At a rate that moves no weight, the losses of the steps are those of long rows."""
    student = linearize(teacher, window=6, sinks=2)
    settings = {**CE, "lr": 1e-30, "weight_decay": 0.0, "steps": 5, "rows": 3}
    found = list(distill(student, text, length=LENGTH, seed=4, state_passing=True, **settings))
    rows = Rows(text, LENGTH, 4, streams=3)
    ids, labels, reset = (
        np.concatenate([np.stack([rows.row(3 * t + s)[i] for s in range(3)]) for t in range(5)], 1)
        for i in range(3)
    )
    assert not reset[:, ::LENGTH].all()
    whole = student.loss_and_grad(ids, labels, reset=reset, **CE)
    counted = [(labels[:, t : t + LENGTH] >= 0).sum() for t in range(0, 5 * LENGTH, LENGTH)]
    together = sum(m["ce"] * n for m, n in zip(found, counted, strict=True))
    assert abs(together / whole["ce"] - 1) <= PREFILL_STEP_F32
    alone = list(distill(student, Batches({"data": rows}, 3), **{**settings, "rows": 3}))
    assert alone[0]["ce"] == found[0]["ce"] and alone[1]["ce"] != found[1]["ce"]


@pytest.mark.parametrize("stops", [(1,), (3, 2)])
def test_it_continues_bitwise(tmp_path, teacher, text, stops):
    settings = {"micro_rows": 2, "window_dropout": 0.4, "recompute": True}
    whole, generator = stage(teacher, text, **settings)
    expected = [m["loss"] for m in generator]
    seen = []
    for count in (*stops, None):
        student, generator = stage(teacher, text, state=tmp_path / "state.npz", **settings)
        for n, m in enumerate(generator, start=1):
            seen.append(m["loss"])
            if n == count:
                break
        generator.close()
    assert seen == expected
    assert np.array_equal(student.params.flat, whole.params.flat)
    changed = {**settings, "state_passing": False}
    _, generator = stage(teacher, text, state=tmp_path / "state.npz", **changed)
    with pytest.raises(UserError, match="saved with state_passing True"):
        next(generator)


def test_a_step_that_is_broken_off_leaves_no_trace(tmp_path, teacher, text, monkeypatch):
    whole, generator = stage(teacher, text)
    list(generator)
    student, generator = stage(teacher, text, state=tmp_path / "s.npz")
    for _ in range(3):
        next(generator)
    original, calls = type(student).loss_and_grad, iter((True, False))

    def stopped(self, *args, **settings):
        if not next(calls):  # in the second part of the step
            raise KeyboardInterrupt
        return original(self, *args, **settings)

    monkeypatch.setattr(type(student), "loss_and_grad", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(generator)
    monkeypatch.undo()
    student, generator = stage(teacher, text, state=tmp_path / "s.npz")
    assert [m["step"] for m in generator] == [4, 5, 6, 7]
    assert np.array_equal(student.params.flat, whole.params.flat)


def test_parts_and_trees_change_rounding_alone(teacher, text):
    found = []
    for changes in ({}, {"micro_rows": 3}, {"accumulation": "tree"}):
        student, generator = stage(teacher, text, **changes)
        found.append(([m["loss"] for m in generator], student.params.flat))
    for losses, flat in found[1:]:
        assert relative(np.array(losses), np.array(found[0][0])) <= OP_F32
        assert np.abs(flat - found[0][1]).max() <= 1e-4  # the same sums in another order


def test_what_cannot_pass_a_state_is_refused(teacher, text):
    batches = Batches({"data": Rows(text, LENGTH)}, 3)
    settings = {"steps": 2, "rows": 3, "length": LENGTH, "state_passing": True}

    def message(student, data, **changes):
        with pytest.raises(UserError) as error:
            next(distill(student, data, teacher, **{**settings, **changes}))
        return str(error.value)

    student = linearize(teacher, window=6)
    assert "pack them with Rows(..., streams=3)" in message(student, batches)
    assert "start without MPI" in message(student, text, comm=SimpleNamespace(size=2))
    full = linearize(teacher, window=6, keep_attention=[1])
    assert "layer 1 attends without a window" in message(full, text)


# ---- targets with the text before a row ---------------------------------------------------------


def test_targets_behind_rows_are_those_of_the_document(teacher, text):
    rows = Rows(text, LENGTH, 1, streams=3)
    behind, alone = OnlineTargets(teacher, rows, 8, rows_before=2), OnlineTargets(teacher, rows, 8)
    differ = 0
    for n in range(len(rows)):
        ids, _, reset = rows.row(n)
        own, before = np.append(np.flatnonzero(reset[1:]) + 1, LENGTH)[0], rows.before(n, 2)
        tid, logp = (x[0] for x in behind.get([n]))
        wanted = [x[0, len(before) :] for x in teacher.topk([*before, *ids[:own]], 8)[:2]]
        assert np.array_equal(tid[:own], wanted[0])
        # float16: relative error at most 2^-11
        assert (np.abs(logp[:own] / wanted[1] - 1) <= 2.0**-11 + OP_F32).all()
        cut = alone.get([n])[1][0]
        # the same float16 where nothing stands before, or a neighbour
        assert np.abs(logp[own:] / cut[own:] - 1).max(initial=0) <= 2.0**-10
        if len(before):
            differ += np.abs(logp[0] - cut[0]).max() > 0.01
        else:
            assert np.array_equal(logp, cut)
    assert differ > 0.9 * sum(len(rows.before(n, 2)) > 0 for n in range(len(rows)))


@pytest.mark.parametrize("kl_form", ["renormalised", "sampled"])
def test_the_teacher_itself_has_no_loss_only_if_it_reads_as_much(teacher, text, kl_form):
    """The student is the teacher, with a window longer than a document."""
    found = []
    for rows_before in (0, 9):
        student = linearize(teacher, window=300, sinks=0, mixer="window")
        source = {"a": Rows(text, LENGTH, streams=3)}
        settings = {"steps": 6, "k": 200, "lr": 1e-30, "kl_form": kl_form, "state_passing": True}
        more = {"ce_weight": 0.0, "kl_weight": 1.0, "rows_before": rows_before}
        losses = distill(student, Batches(source, 3), teacher, **settings, **more)
        found.append([m["kl"] for m in losses])
    alone, behind = found
    if kl_form == "sampled":  # of which the entropy is left
        assert np.mean(behind[1:]) < np.mean(alone[1:]) - 0.01
        return
    assert max(behind) <= 1e-6  # log-probabilities are rounded to float16, which KL feels squared
    assert abs(alone[0]) <= 1e-6 and min(alone[1:]) > 1e-3


def test_a_cache_holds_what_is_computed_on_the_way(tmp_path, teacher, text):
    rows = Rows(text, LENGTH, 1, streams=3)
    for form in ("topk", "sampled"):
        list(write_targets(teacher, rows, tmp_path / form, k=8, form=form, rows_before=2))
        cache = TargetCache(tmp_path / form, identity(teacher, rows, 8, form, 2))
        online = OnlineTargets(teacher, rows, 8, form, rows_before=2)
        for one, other in zip(cache.get([4, 11]), online.get([4, 11]), strict=True):
            assert np.array_equal(one, other)
    with pytest.raises(UserError, match="made for rows_before 2, here it is 0; delete"):
        TargetCache(tmp_path / "topk", identity(teacher, rows, 8))


def test_rows_before_that_cannot_be_are_refused(tmp_path, teacher, text):
    with pytest.raises(UserError, match="rows_before needs rows of streams"):
        OnlineTargets(teacher, Rows(text, LENGTH), 8, rows_before=1)
    streams = Rows(text, LENGTH, streams=3)  # the teacher was made for 512 tokens
    OnlineTargets(teacher, streams, 8, rows_before=15)
    for wrong in (16, -1):
        with pytest.raises(UserError, match=rf"rows_before is {wrong}, expected 0 to 15: the teac"):
            next(write_targets(teacher, streams, tmp_path / "t", k=8, rows_before=wrong))
    given = values(tmp_path, teacher)
    late = make_recipe({**given, "targets": {"rows_before": 1000}})
    with pytest.raises(UserError, match="rows_before is 1000, expected 0 to"):
        run(late, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()  # before any work
    given["distill"]["state_passing"] = False
    with pytest.raises(UserError, match=r"targets\.rows_before needs distill\.state_passing"):
        make_recipe({**given, "targets": {"rows_before": 1}})


# ---- a run --------------------------------------------------------------------------------------


def values(tmp_path, teacher, **distill_keys):
    teacher.save(tmp_path / "teacher")
    folder = tiny_run.write_text(tmp_path / "text")
    given = tiny_run.recipe(tmp_path / "teacher", folder)
    sources = [{"kind": "files", "paths": [str(folder)]}]
    given["data"]["domains"] = {"notes": {"sources": sources, "held_out_tokens": 700}}
    given["experts"], given["merge"] = {"notes": {"notes": 1}}, {}
    given["distill"].update(state_passing=True, **distill_keys)
    return given


def test_a_run_passes_states(tmp_path, teacher):
    given = values(tmp_path, teacher, validate_every=3, validate_rows=2)
    recipe = make_recipe(given)
    place = run(recipe, tmp_path / "run", until="distill")
    assert (place / "experts" / "notes" / "config.json").is_file()
    cache = TargetCache(place / "targets" / "notes")
    assert cache.manifest["streams"] == 2 and cache.rows == 12
    behind = make_recipe({**given, "targets": {"k": given["targets"]["k"], "rows_before": 1}})
    more = run(behind, tmp_path / "behind", until="distill")
    assert TargetCache(more / "targets" / "notes").manifest["rows_before"] == 1
    # without it, rows are others, and so are their targets
    plain = make_recipe({**given, "distill": {**given["distill"], "state_passing": False}})
    places = [[p.depends for p in parts(r) if p.place == "targets/notes"] for r in (recipe, plain)]
    assert places[0] != places[1]


@pytest.mark.parametrize("student", [{"window": None}, {"keep_attention": [0]}])
def test_full_attention_is_refused_in_a_recipe(tmp_path, teacher, student):
    given = values(tmp_path, teacher)
    with pytest.raises(UserError, match=r"distill\.state_passing needs a student\.window"):
        make_recipe({**given, "student": student})
    make_recipe({**given, "student": {"mixer": "mlstm", "window": None}})
