"""The generalist: its text and budget, resume, the report; the validation loss beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from rich.console import Console
from test_recipe import READING, SLOW, TINY_CONFIG

from xlstm_distill import progress
from xlstm_distill.assess import report_facts
from xlstm_distill.budget import estimate
from xlstm_distill.errors import UserError
from xlstm_distill.progress import Reporter
from xlstm_distill.quickstart import plan
from xlstm_distill.recipe import make_recipe
from xlstm_distill.report import terminal_table
from xlstm_distill.run import Run, run
from xlstm_distill.rundir import Interrupt, RunDirectory

VALIDATED = {"steps": 6, "rows": 2, "lr": 1e-3, "validate_every": 4, "validate_rows": 1}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    root = tmp_path_factory.mktemp("generalist")
    tiny_run.teacher().save(root / "teacher")
    text = tiny_run.write_text(root / "text")
    return tiny_run.recipe(root / "teacher", text, distill=VALIDATED)


@pytest.fixture(scope="module")
def whole(values, tmp_path_factory):
    """A run with a generalist."""
    recipe = make_recipe({**values, "generalist": {}})
    return run(recipe, tmp_path_factory.mktemp("whole") / "out")


def weights(out: Path, name: str) -> bytes:
    return (out / name / "model.safetensors").read_bytes()


def test_it_sees_what_the_experts_see_together_for_as_many_steps(values, whole):
    recipe = make_recipe({**values, "generalist": {}})
    # general: all of one expert's tokens and a quarter of the other's.
    assert recipe.trained["generalist"] == {"general": 1.25, "notes": 0.75}
    with RunDirectory(whole) as directory:
        lines = {name: directory.steps(f"distill {name}") for name in recipe.trained}
        done = directory.done("distill generalist")
    tokens = {name: sum(m["tokens"] for m in steps) for name, steps in lines.items()}
    assert len(lines["generalist"]) == 12 == recipe.steps_of("generalist")
    assert tokens["generalist"] == done["tokens"] == tokens["general"] + tokens["notes"]
    own = make_recipe({**values, "generalist": {"weights": {"notes": 2}}})
    assert own.trained["generalist"] == {"notes": 2}


def test_a_domain_of_which_nobody_has_a_share_is_not_trained_on(values, tmp_path):
    """Its text may be there for the evaluation alone."""
    alone = {"notes": 1, "general": 0}
    changes = {"align": {**values["align"], "weights": alone}, "experts": {"one": alone}}
    recipe = make_recipe({**values, **changes, "merge": {}, "generalist": {}})
    out = run(recipe, tmp_path / "out", until="distill")
    assert {p.name for p in (out / "targets").iterdir()} == {"notes"}
    # So the generalist is the one expert.
    assert weights(out, "generalist") == weights(out, "experts/one") != weights(out, "aligned")


def test_it_changes_nothing_of_the_others(values, whole, tmp_path):
    out = run(make_recipe(values), tmp_path / "out", until="merge")
    for name in ("aligned", "experts/general", "experts/notes", "merged"):
        assert weights(out, name) == weights(whole, name)
    assert weights(whole, "generalist") not in (weights(whole, "merged"), weights(whole, "aligned"))


def test_it_continues_where_it_stopped(values, whole, tmp_path):
    recipe, out = make_recipe({**values, "generalist": {}}), tmp_path / "out"
    interrupt = Interrupt()

    class Stops(Reporter):
        def follow(self, lines: Any, titles: Any) -> Any:
            for stage, m in super().follow(lines, titles):
                interrupt.asked = stage == "distill generalist" and m.get("step") == 5
                yield stage, m

    with RunDirectory(out) as directory, pytest.raises(KeyboardInterrupt):
        Run(directory, directory.begin(recipe), Stops(quiet=True), interrupt).execute()
    assert (out / "generalist.state" / "state.npz").is_file()
    run(recipe, out)
    assert weights(out, "generalist") == weights(whole, "generalist")
    assert not (out / "generalist.state").exists()
    pieces = [sorted((o / "evaluation" / "parts").iterdir()) for o in (whole, out)]
    for a, b in zip(*pieces, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_report_has_it_beside_the_merged_student(values, whole):
    with RunDirectory(whole) as directory:
        facts = report_facts(Run(directory, directory.recipe()))
    assert facts.fidelity.complete == ["teacher", "untrained", "generalist", "merged"]
    assert set(facts.samples[0].outputs) == {"teacher", "untrained", "generalist", "merged"}
    assert any("The generalist had 12 steps" in note for note in facts.notes)
    assert "generalist" in [c.label for c in facts.losses if c.stage == "stage II, cross-entropy"]


def test_its_adapter_names_the_aligned_student(values, tmp_path):
    lora = {**VALIDATED, "train": "lora", "lora": {"rank": 2}}
    recipe = make_recipe({**values, "generalist": {}, "distill": lora})
    out = run(recipe, tmp_path / "out", until="distill")
    for adapter in (out / "generalist.adapter", out / "experts" / "notes.adapter"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        base = adapter / config["base_model_name_or_path"]
        assert base.resolve() == (out / "aligned").resolve()


# ---- the loss of rows that are not trained on ---------------------------------------------------


def test_the_report_shows_the_validation_loss(values, whole):
    with RunDirectory(whole) as directory:
        facts = report_facts(Run(directory, directory.recipe()))
        logged = {n: directory.steps(f"distill {n}") for n in ("general", "notes", "generalist")}
    curves = {c.label: c for c in facts.losses if c.stage == "stage II, loss"}
    for name, steps in logged.items():
        losses = {m["step"]: m["validation"] for m in steps if "validation" in m}
        assert list(losses) == ([4, 6] if name != "generalist" else [4, 8, 12])
        curve = curves[f"{name}, not trained on"]
        assert dict(zip(curve.steps, curve.values, strict=True)) == losses
        assert curves[name].values == [m["loss"] for m in steps]
        (note,) = [n for n in facts.notes if n.startswith(f"Stage II, {name}: ")]
        best, last = min(losses, key=losses.get), list(losses)[-1]
        assert f"{losses[last]:.4f} after the last step" in note
        assert f"{losses[best]:.4f} after step {best}; kept: step {last}" in note
    out = io.StringIO()
    terminal_table(facts, Console(file=out, width=160))
    assert "kept: step 12" in " ".join(out.getvalue().split())


def test_the_step_that_was_kept_is_the_best_one(values, whole, tmp_path):
    with RunDirectory(whole) as directory:
        recipe = directory.recipe()
        distill = recipe.distill.model_copy(update={"keep": "best"})
        work = Run(directory, recipe.model_copy(update={"distill": distill}))
        for name in recipe.trained:
            steps = [m for m in directory.steps(f"distill {name}") if "validation" in m]
            best = min(steps, key=lambda m: m["validation"])["step"]
            notes = " ".join(report_facts(work).notes)
            assert f"after step {best}; kept: step {best}." in notes


def test_progress_shows_the_last_validation(monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    stream = io.StringIO()
    metrics = [{"step": n, "steps": 4, "loss": 2.0} for n in (1, 2, 3, 4)]
    metrics[1]["validation"] = 1.25
    lines = [("distill", m) for m in metrics]
    passed = list(Reporter(stream=stream).follow(lines, {"distill": "stage II"}))
    assert passed == lines
    shown = stream.getvalue().splitlines()
    assert ["validation" in line for line in shown] == [False, True, True, True]
    assert "loss 2, validation 1.25 (step 2)" in shown[2]


# ---- recipes and budgets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generalist": {"weights": {"poems": 1}}}, "generalist.weights: 'poems' is not one of"),
        ({"generalist": {"weights": {"notes": 0}}}, "generalist.weights: the shares add up to 0"),
        ({"generalist": {"steps": 5}}, "generalist.steps: unknown key; keys there: weights"),
        ({"experts": {"merged": {"notes": 1}}, "merge": {}}, "experts: 'merged' is a name of the"),
    ],
)
def test_bad_keys_are_named(values, changes, message):
    with pytest.raises(UserError) as error:
        make_recipe({**values, **changes})
    assert message in str(error.value)


def test_an_estimate_counts_it():
    plain = plan(SLOW, 60, READING).model_dump()
    changed = {"generalist": {}}, {}, {"generalist": {}, "experts": {"one": {"code": 1}}}
    found, before, alone = (
        estimate(make_recipe({**plain, "merge": {}, **c}), TINY_CONFIG, SLOW, READING)["seconds"]
        for c in changed
    )
    # As many steps of stage II again, of rows that the experts have targets of.
    moved = SLOW.save + SLOW.load
    steps = before["distill"] - 2 * moved
    assert found["distill"] == pytest.approx(2 * steps + 3 * moved, abs=0.2)
    assert found["targets"] == before["targets"] == pytest.approx(2 * alone["targets"], abs=0.1)
    # Three students are measured where two were.
    assert 1.2 * before["evaluate"] < found["evaluate"] < 1.5 * before["evaluate"]
