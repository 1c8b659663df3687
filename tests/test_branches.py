"""A student with a branch silenced or cut: what the parts are, and that a needless one shows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run
from models import random_batch, random_model
from tolerances import GATE_ZERO_IS_TEACHER, PREFILL_STEP_F32

from xlstm_distill.assess import report_facts
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import branches
from xlstm_distill.evaluate.branches import Branch
from xlstm_distill.linearize import linearize
from xlstm_distill.recipe import make_recipe
from xlstm_distill.run import Run, run
from xlstm_distill.rundir import RunDirectory
from xlstm_distill.testing import assert_close

STEPS = 40


def batch(model):
    return random_batch(model, 3, STEPS)[0]


@pytest.mark.parametrize(
    ("mixer", "forget"),
    [("hybrid", STEPS), ("mlstm", STEPS), ("window", 3), ("window", 16), ("attention", 5)],
)
def test_what_is_never_emptied_or_never_used_changes_nothing(mixer, forget):
    model = random_model(mixer)
    ids = batch(model)
    found = Branch(model, forget=forget).hidden(ids)
    assert_close(found, model.hidden(ids), PREFILL_STEP_F32, f"{mixer}, emptied every {forget}")


@pytest.mark.parametrize("mixer", ["mlstm", "linear"])
def test_nothing_passes_an_emptied_state(mixer):
    model = random_model(mixer)
    ids = batch(model)
    other = ids.copy()
    other[:, :16] = ids[::-1, :16]
    assert not np.array_equal(other, ids)
    found, changed = (Branch(model, forget=16).hidden(x) for x in (ids, other))
    assert np.array_equal(found[:, 16:], changed[:, 16:])
    assert not np.array_equal(found[:, :16], changed[:, :16])
    found, changed = (model.hidden(x) for x in (ids, other))
    assert not np.allclose(found[:, 16:], changed[:, 16:])


def test_a_window_still_sees_over_an_emptied_state():
    model = random_model("hybrid")
    ids = batch(model)
    other = ids.copy()
    other[0, 15] = (ids[0, 15] + 1) % model.config.vocab_size
    found, changed = (Branch(model, forget=16).hidden(x)[0] for x in (ids, other))
    assert not np.allclose(found[16], changed[16])  # a window of 7
    assert np.array_equal(found[:15], changed[:15])


def test_forced_gates_are_those_of_the_model():
    model = random_model("hybrid")
    ids = batch(model)
    parts = branches(model, "x")
    assert list(parts) == branches_of("x")
    assert np.array_equal(parts["x, gate 0"].hidden(ids), model.hidden(ids, 0.0))
    assert np.array_equal(parts["x, gate 1"].hidden(ids), model.hidden(ids, 1.0))
    assert parts["x, mLSTM emptied"].forget == 7
    with pytest.raises(ValueError, match="neither resets nor a gate"):
        parts["x, mLSTM emptied"].hidden(ids, reset=ids == 0)
    for mixer in ("window", "mlstm", "attention"):
        with pytest.raises(UserError, match="x: has no hybrid layer with a window"):
            branches(random_model(mixer), "x")


@pytest.mark.parametrize("compute", ["f32", "int8"])
def test_a_cut_window_is_half_as_wide_with_the_same_weights(compute):
    teacher = tiny_run.teacher()
    student = linearize(teacher, window=7, sinks=2, keep_attention=[0])
    for name in student.params.names():
        if name.endswith("o_gate.bias"):
            student.params[name][...] = -1.0
    narrow = linearize(teacher, window=3, sinks=2, keep_attention=[0]).fill(student.tensors())
    student, narrow = student.copy(compute=compute), narrow.copy(compute=compute)
    ids = np.random.default_rng(2).integers(3, tiny_run.VOCAB, (2, STEPS))
    whole = student.hidden(ids)
    cut = branches(student, "x")["x, window cut"]
    assert cut.params is student.params and cut.model.config == narrow.config
    assert np.array_equal(cut.hidden(ids), narrow.hidden(ids))
    # What both windows and the sinks see is the same: positions 0 to 4 with sinks 0 and 1.
    assert_close(cut.hidden(ids)[:, :5], whole[:, :5], PREFILL_STEP_F32, "within both windows")
    assert not np.allclose(cut.hidden(ids), whole, atol=1e-4)
    assert np.array_equal(student.hidden(ids), whole) and student.config != narrow.config


def test_what_has_no_smaller_window_is_not_cut():
    teacher = tiny_run.teacher()
    student = linearize(teacher, window=1, sinks=2)
    assert branches(student, "x")["x, window cut"].model.config == student.config


@pytest.mark.parametrize("bias", [-60.0, -1.0])
def test_a_branch_that_is_not_used_is_found_out(bias):
    teacher = tiny_run.teacher()
    student = linearize(teacher, window=6, sinks=2)
    for name in student.params.names():
        if name.endswith("o_gate.bias"):
            student.params[name][...] = bias  # sigmoid(-60) is 0 in float32 beside 1
    ids = np.random.default_rng(2).integers(3, tiny_run.VOCAB, (2, STEPS))
    parts = {"whole": student, **branches(student, "part")}
    kl = dict(zip(parts, teacher.divergence(list(parts.values()), ids)["kl"], strict=True))
    for name in ("part, gate 0", "part, mLSTM emptied"):
        near = np.max(np.abs(kl[name] - kl["whole"])) <= PREFILL_STEP_F32
        assert near == (bias == -60.0), name
    for name, mixer in (("part, gate 0", "window"), ("part, gate 1", "mlstm")):
        alone = linearize(teacher, window=6, sinks=2, mixer=mixer).hidden(ids)
        assert_close(parts[name].hidden(ids), alone, GATE_ZERO_IS_TEACHER, name)


def test_a_run_measures_them(tmp_path):
    tiny_run.teacher().save(tmp_path / "teacher")
    text = tiny_run.write_text(tmp_path / "text")
    values = tiny_run.recipe(tmp_path / "teacher", text)
    values["evaluate"] = {**values["evaluate"], "branches": True}
    out = run(make_recipe(values), tmp_path / "out")
    with RunDirectory(out) as directory:
        facts = report_facts(Run(directory, directory.recipe()))
    names = branches_of("merged")
    assert facts.fidelity.complete == ["teacher", "untrained", "merged", *names]
    assert len({facts.fidelity.mean(name).kl for name in ("merged", *names)}) == 5
    page = (out / "report" / "report.html").read_text()
    assert all(name in page for name in names)
    # A run that was measured before the last variant was known has the others.
    (part,) = (out / "evaluation" / "parts").glob("fidelity-*.json")
    older = json.loads(part.read_text())
    del older["models"][names[-1]]
    part.write_text(json.dumps(older))
    with RunDirectory(out) as directory:
        facts = report_facts(Run(directory, directory.recipe()))
    assert facts.fidelity.complete == ["teacher", "untrained", "merged", *names[:-1]]
    values["student"] = {"mixer": "mlstm"}
    with pytest.raises(UserError, match=r"evaluate\.branches needs student\.mixer hybrid"):
        make_recipe(values)


def test_the_command(tmp_path, capsys):
    teacher = tiny_run.teacher()
    teacher.save(tmp_path / "teacher")
    linearize(teacher, window=6, sinks=2).save(tmp_path / "student")
    text = tiny_run.write_text(tmp_path / "text")
    models = ["branches", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    command = [*models, "--data", str(text), "--context", "48"]
    assert main([*command, "--windows", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["context"], found["tokens"]) == (48, 144)
    assert list(found["models"]) == ["teacher", "student", *branches_of("student")]
    assert found["models"]["teacher"]["kl"] == 0 < found["models"]["student"]["kl"]
    assert main(command) == 0
    assert "student, gate 1" in capsys.readouterr().out
    assert main([models[0], models[3], *command[2:]]) in (1, 2)
    assert f"{models[3]}: has no hybrid layer" in capsys.readouterr().err.splitlines()[-1]


def branches_of(name: str) -> list[str]:
    return [f"{name}, {part}" for part in ("gate 0", "gate 1", "mLSTM emptied", "window cut")]
