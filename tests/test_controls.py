"""Students that are controls of others: without stage I, the window alone, the teacher itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from xlstm_distill import checkpoints
from xlstm_distill import sweep as sweeps
from xlstm_distill.assess import CONTROL, MERGED
from xlstm_distill.cli import main
from xlstm_distill.distill import distill
from xlstm_distill.linearize import linearize
from xlstm_distill.model import load
from xlstm_distill.recipe import make_recipe, recipe_text
from xlstm_distill.run import run
from xlstm_distill.rundir import RunDirectory


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("controls")
    tiny_run.teacher().save(place / "teacher")
    tiny_run.write_text(place / "text")
    return place


def values(root: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny run on the text of files alone, with changed sections."""
    found = tiny_run.recipe(root / "teacher", root / "text")
    del found["data"]["domains"]["general"]
    found.update(experts={"notes": {"notes": 1}}, merge={})
    for section, keys in changes.items():
        found[section] = {**found[section], **keys}
    return found


def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "report" / "report.json").read_text())


def weights(place: Path) -> bytes:
    return (place / "model.safetensors").read_bytes()


# ---- a control that sees everything ------------------------------------------------------------


def test_a_full_window_has_no_ratio_to_its_control(root, tmp_path):
    """The control is the teacher then, its KL 0."""
    recipe = make_recipe(values(root, student={"window": None}))
    found = facts(run(recipe, tmp_path / "out"))
    assert found["fidelity"]["models"][CONTROL]["notes"]["overall"]["kl"] == 0
    assert "as it sees all of them, there is no ratio" in found["summary"]
    assert not [c for c in found["claims"] if "control" in c["claim"]]
    recipe = make_recipe(values(root, student={"window": None}, evaluate={"wanted_ratio": 0.5}))
    claims = facts(run(recipe, tmp_path / "wanted"))["claims"]
    assert [c["holds"] for c in claims if "control" in c["claim"]] == [False]


def test_positions_inside_the_window_have_no_ratio_to_its_control(root, tmp_path):
    """Those are many with the paper's window of 512 tokens."""
    sizes = {"fidelity": [{"context": 512, "windows": 2}]}
    changes = {"student": {"window": 256}, "evaluate": sizes}
    given = values(root, **changes)
    given["data"]["domains"]["notes"]["held_out_tokens"] = 2000
    found = facts(run(make_recipe(given), tmp_path / "out"))
    by_position = found["fidelity"]["models"][CONTROL]["notes"]["by_position"]
    kl = {
        low: m["kl"] for (low, _), m in zip(found["fidelity"]["buckets"], by_position, strict=True)
    }
    assert kl[128] == 0 < kl[256]
    claims = [c["claim"] for c in found["claims"]]
    assert "its KL is lower in every position bucket from 256 on" in claims


# ---- without stage I ----------------------------------------------------------------------------


def test_without_stage_one_aligned_is_student0(root, tmp_path):
    out = run(make_recipe(values(root, align={"steps": 0})), tmp_path / "out")
    assert weights(out / "aligned") == weights(out / "student0") != weights(out / "merged")
    found = facts(out)
    assert found["layer_errors"] is None
    assert [c["stage"] for c in found["losses"]] == [
        "stage II, KL to the targets",
        "stage II, cross-entropy",
    ]
    (stage,) = (s for s in found["stages"] if s["name"] == "align")
    assert (stage["steps"], stage["tokens"]) == (0, 0)
    with RunDirectory(out) as directory:
        assert directory.steps("align") == [] and directory.done("align")
    # A run that is done is left alone.
    before = weights(out / "merged")
    run(make_recipe(values(root, align={"steps": 0})), out)
    assert weights(out / "merged") == before


def test_a_sweep_with_and_without_stage_one(root, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_text(make_recipe(values(root))))
    points = sweeps.grid(tmp_path / "recipe.yaml", ["align.steps=0,6"])
    found = sweeps.sweep(points, tmp_path / "out")
    assert found["failed"] == {} and [p["values"] for p in found["points"]] == [
        {"align.steps": 0},
        {"align.steps": 6},
    ]
    without, aligned = (tmp_path / "out" / f"steps={n},seed=3" for n in (0, 6))
    for part in ("student0/model.safetensors", "targets/notes/manifest.json"):
        assert (without / part).samefile(aligned / part)
    assert weights(without / "aligned") != weights(aligned / "aligned")


# ---- the window alone ---------------------------------------------------------------------------


def test_the_window_alone_goes_through_stage_two(root, tmp_path, capsys):
    out = run(make_recipe(values(root, student={"mixer": "window"})), tmp_path / "out")
    assert "stage I: none, no layer has tensors of its own to align" in capsys.readouterr().err
    assert weights(out / "aligned") == weights(out / "student0")
    found = facts(out)
    assert found["gates"] is None and found["student"]["added"] == 0
    # Before it is trained it is the untrained control.
    window = linearize(load(root / "teacher"), mixer="window", window=8, sinks=2)
    assert np.array_equal(load(out / "student0").params.flat, window.params.flat)
    ratio = found["fidelity"]["models"]
    assert ratio[MERGED]["notes"]["windows"]["kl"] != ratio[CONTROL]["notes"]["windows"]["kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": {"layers": [0]}}, "align.layers: layer 0 has nothing to train: it is window"),
        ({"distill": {"train": "mixer"}}, "distill.train: mixer has nothing to train"),
    ],
)
def test_what_a_window_cannot_do_is_named_before_any_work(root, tmp_path, capsys, changes, message):
    recipe = make_recipe(values(root, student={"mixer": "window"}, **changes))
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "data").exists()


# ---- the teacher, trained on the same text ------------------------------------------------------


@pytest.mark.parametrize("kept", ["all", [0, 1]])
def test_the_teacher_itself_is_trained(root, tmp_path, kept):
    changes = values(root, student={"keep_attention": kept}, align={"steps": 0})
    out = run(make_recipe(changes), tmp_path / "out")
    teacher, start, end = (load(p) for p in (root / "teacher", out / "aligned", out / "merged"))
    assert np.array_equal(start.params.flat, teacher.params.flat)
    assert not end.config.is_student and not np.array_equal(end.params.flat, teacher.params.flat)
    found = facts(out)
    assert found["student"]["mixer"] == "attention" and found["gates"] is None
    assert found["student"]["added"] == 0
    # It is nearer to the teacher than the untrained control, which is that of other students.
    models = found["fidelity"]["models"]
    kl = {name: np.mean(models[name]["notes"]["windows"]["kl"]) for name in (MERGED, CONTROL)}
    assert 0 < kl[MERGED] < kl[CONTROL]
    page = (out / "report" / "report.html").read_text()
    assert "the teacher&#39;s attention in every layer" in page


@pytest.mark.parametrize("kl_weight", [0.0, 0.9])
def test_its_expert_is_what_distill_makes_of_the_teacher(root, tmp_path, kl_weight):
    keys = {"ce_weight": 1.0, "kl_weight": kl_weight}
    changes = values(root, student={"keep_attention": "all"}, distill=keys)
    out = run(make_recipe(changes), tmp_path / "out", until="distill")
    with RunDirectory(out) as directory:
        steps = directory.steps("distill notes")
    # Its own targets, to the rounding of what is stored: relative error 2^-11 of a log-probability.
    assert steps[0]["kl"] == 0 if not kl_weight else 0 <= steps[0]["kl"] < 1e-3
    assert (out / "targets").is_dir() == bool(kl_weight)
    assert checkpoints.load(out / "experts" / "notes").config == load(root / "teacher").config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"branches": True}}, "evaluate.branches needs a hybrid layer"),
        ({"distill": {"window_dropout": 0.5}}, "distill.window_dropout needs a hybrid layer"),
        ({"distill": {"train": "mixer"}}, "distill.train: mixer has nothing to train"),
    ],
)
def test_what_the_teacher_cannot_do_is_named_before_any_work(
    root, tmp_path, capsys, changes, message
):
    recipe = make_recipe(values(root, student={"keep_attention": "all"}, **changes))
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "data").exists()


def test_a_copy_of_the_teacher_trains_by_the_stage_alone(root):
    teacher = load(root / "teacher")
    student = linearize(teacher, keep_attention="all")
    text = tiny_run.text(teacher)
    metrics = list(distill(student, text, teacher, steps=2, rows=2, length=32, k=8))
    assert len(metrics) == 2 and student.config == teacher.config
    assert not np.array_equal(student.params.flat, teacher.params.flat)
