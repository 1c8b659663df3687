"""Sweeps: the grid and what is refused, shared stages, failures and kills, the results."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from xlstm_distill import packages
from xlstm_distill import sweep as sweeps
from xlstm_distill.cli import main, parser
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import load_recipe, shipped_recipes
from xlstm_distill.run import run
from xlstm_distill.rundir import RunDirectory

VARY = "distill.ce_weight/distill.kl_weight=.1/.9,1/0"
LOSSES = ("ce_weight=0.1,kl_weight=0.9", "ce_weight=1,kl_weight=0")
NAMES = [f"{loss},seed={seed}" for seed in (3, 4) for loss in LOSSES]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    tiny_run.teacher().save(place / "teacher")
    text = tiny_run.write_text(place / "text")
    values = tiny_run.recipe(place / "teacher", text)
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place


@pytest.fixture(scope="module")
def swept(root):
    """Two loss weights, two seeds."""
    out = root / "out"
    points = sweeps.grid(root / "recipe.yaml", [VARY], seeds=2)
    return out, points, sweeps.sweep(points, out)


# ---- the grid -----------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed(root):
    vary = [
        "align.lr=1e-2,0.02",
        "student.window=8,null",
        "data.domains.notes.sources.0.max_tokens=9",
    ]
    points = sweeps.grid(root / "recipe.yaml", vary, seeds=2, settings=["title=x"])
    assert [p.name for p in points] == [
        f"lr {lr}, window {w}, max_tokens 9" for lr in ("1e-2", "0.02") for w in ("8", "null")
    ]
    assert list(points[1].runs) == [f"lr=1e-2,window=null,max_tokens=9,seed={s}" for s in (3, 4)]
    recipe = points[1].runs["lr=1e-2,window=null,max_tokens=9,seed=4"]
    assert (recipe.align.lr, recipe.student.window, recipe.seed) == (0.01, None, 4)
    assert recipe.title == "x" and recipe.data.domains["notes"].sources[0].max_tokens == 9


def test_names_of_directories(root):
    def names(*vary: str) -> list[str]:
        return [n for p in sweeps.grid(root / "recipe.yaml", vary) for n in p.runs]

    assert names() == ["seed=3"]
    assert names("align.lr=1,2", "distill.lr=1")[0] == "align.lr=1,distill.lr=1,seed=3"
    found = names('evaluate.prompts=["a/b"],["a:b"],[]', "distill.rates={mixer: 60}")
    assert len(set(found)) == 3 and not any(set(n) & set('/":{}[] ') for n in found)
    assert found[0].startswith("prompts=a_b-")


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["align.lr"], "--vary align.lr: expected KEY=VALUE,VALUE"),
        (["=3"], "expected KEY=VALUE"),
        (["align.lr="], "there are no values"),
        (["align.lr=[1"], "not valid YAML"),
        (["align.lr=1", "align.lr=2"], "--vary align.lr: named twice"),
        (["align.lr/align.rows=1/2,3"], "3 is not a value for each of align.lr/align.rows"),
        (["seed=1,2"], "give --seeds N instead"),
        (["align.stepz=1,2"], "stepz 1: align.stepz: unknown key; did you mean steps?"),
        (["align.lr=0.1,0.2", "student.window=8,0"], "lr 0.1, window 0: student.window"),
        (["teacher.name=1"], "--vary teacher.name=1: teacher holds a value"),
        (["align.lr=.1,0.1"], "lr 0.1: the same as with lr 0.1"),
        (["evaluate.fidelity=[]"], "a sweep tables evaluate.fidelity"),
        (["student.keep_attention=[0],[2]"], "keep_attention: layer 2 is outside 0..1"),
        (["teacher=nowhere"], "nowhere"),
        (["data.domains.notes.sources.0.paths=[none.txt]"], "none.txt: no such file"),
        (["data.domains.general.sources.0.prompts=null,p.txt"], "p.txt: no such file"),
        (["evaluate.tasks={},{riddles: 3}"], "riddles"),
    ],
)
def test_bad_points_are_refused_before_anything_starts(
    root, tmp_path, capsys, monkeypatch, vary, message
):
    out, requests = tmp_path / "out", tmp_path / "requests"
    requests.mkdir()
    monkeypatch.setattr(packages, "fetch", lambda _: requests)
    arguments = [x for text in vary for x in ("--vary", text)]
    status = main(["sweep", str(root / "recipe.yaml"), "--out", str(out), *arguments])
    found = capsys.readouterr()
    assert status == 2 and found.out == "" and not out.exists()
    (line,) = found.err.splitlines()
    assert message in line


def test_the_commands_in_the_ablations_recipe_are_grids():
    name = "smollm2-135m-ablations"
    text = re.sub(r"\\\n#", "", shipped_recipes()[name])
    commands = [shlex.split(c) for c in re.findall(r"# +xlstm-distill (.*)", text)]
    counts = {}
    for command in commands:
        found = parser().parse_args(command)
        assert (found.command, found.recipe) == ("sweep", name)
        points = sweeps.grid(found.recipe, found.vary, found.seeds, found.set)
        assert {len(point.runs) for point in points} == {3}
        counts[Path(found.out).name] = len(points)
    assert counts == {"mixers": 6, "stages": 3, "modes": 3, "losses": 6, "dropout": 2}


def test_no_seeds(root):
    with pytest.raises(UserError, match="--seeds 0: expected at least 1"):
        sweeps.grid(root / "recipe.yaml", [], seeds=0)


# ---- runs and what they share -------------------------------------------------------------------


def same_file(out: Path, inside: str, *runs: str) -> bool:
    return len({(out / name / inside).stat().st_ino for name in runs}) == 1


def test_what_does_not_depend_on_the_keys_is_made_once(swept):
    out, _, _ = swept
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(NAMES)
    weights = "model.safetensors"
    for place in ("data/general/train/ids.bin", "data/notes/evaluation/ids.bin"):
        assert same_file(out, place, *NAMES[:2])
        assert not same_file(out, place, *NAMES[1:3])  # text sampled with another seed
    assert same_file(out, f"student0/{weights}", *NAMES)  # no seed decides it
    assert same_file(out, f"aligned/{weights}", *NAMES[:2])
    for place in (f"aligned/{weights}", f"experts/notes/{weights}"):
        assert not same_file(out, place, *NAMES[1:3])
    assert not same_file(out, f"merged/{weights}", *NAMES[:2])
    with RunDirectory(out / NAMES[1]) as directory:
        assert len(directory.steps("align")) == 6 and directory.done("align")["taken_from"]
        assert "taken_from" not in directory.done("distill notes")


def test_stage_one_is_made_anew_where_its_sums_have_another_order(root, tmp_path):
    settings = ["align.micro_rows=1", "align.steps=2", "distill.steps=1"]
    points = sweeps.grid(root / "recipe.yaml", ["accumulation=sequence,tree"], settings=settings)
    sweeps.sweep(points, tmp_path)
    names = [name for point in points for name in point.runs]
    assert same_file(tmp_path, "student0/model.safetensors", *names)
    assert not same_file(tmp_path, "aligned/model.safetensors", *names)


def bits(place: Path) -> dict[str, bytes]:
    """What decides that two runs are the same."""
    wanted = ("aligned", "experts/general", "experts/notes", "merged")
    files = [place / w / "model.safetensors" for w in wanted]
    files += sorted((place / "evaluation" / "parts").iterdir())
    return {str(f.relative_to(place)): f.read_bytes() for f in files}


def test_a_run_of_a_sweep_is_that_of_its_recipe_alone(swept, tmp_path):
    out, points, _ = swept
    recipe = points[1].runs[NAMES[1]]
    assert load_recipe(out / NAMES[1] / "recipe.yaml") == recipe
    assert bits(run(recipe, tmp_path / "alone")) == bits(out / NAMES[1])


@pytest.mark.parametrize("moment", ["files", "lines"])
def test_a_sweep_that_is_stopped_while_sharing_continues(
    root, swept, tmp_path, monkeypatch, moment
):
    out, points, expected = swept
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / NAMES[1])

    def stopped(*_: Any, **values: Any) -> None:
        if moment == "files" or (values.get("taken_from") and values.get("event") == "done"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "files":
            patch.setattr(sweeps.os, "link", stopped)
        else:
            patch.setattr(RunDirectory, "log", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweeps.sweep(points, again)
    assert not (again / NAMES[1] / "experts").exists()
    assert sweeps.sweep(points, again)["points"] == expected["points"]
    assert bits(again / NAMES[1]) == bits(out / NAMES[1])
    with RunDirectory(again / NAMES[1]) as directory:
        assert len(directory.steps("align")) == 6 and directory.done("data general")
    assert not list(again.rglob("*.tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["student0", "experts"])
def test_a_sweep_that_is_killed_continues(root, swept, tmp_path, place):
    out, _, expected = swept
    again = tmp_path / "again"
    command = [sys.executable, "-m", "xlstm_distill", "sweep", str(root / "recipe.yaml")]
    command += ["--out", str(again), "--vary", VARY, "--seeds", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not (again / NAMES[1] / place).exists():
            time.sleep(0.002)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((again / "sweep.json").read_text())["points"] == expected["points"]
    for name in NAMES:
        assert bits(again / name) == bits(out / name)


def test_without_hard_links_files_are_copied(root, swept, tmp_path, monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(sweeps.os, "link", refused)
    sweeps._link(str(root / "recipe.yaml"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == (root / "recipe.yaml").read_bytes()


def test_a_run_of_another_recipe_is_refused_before_anything_starts(root, swept, tmp_path):
    out, points, _ = swept
    place = tmp_path / "other"
    shutil.copytree(out / NAMES[1], place / NAMES[1])
    other = sweeps.grid(root / "recipe.yaml", [VARY], settings=["align.lr=0.5"])
    with pytest.raises(UserError, match=r"align.lr is 0.02 there and 0.5 here"):
        sweeps.sweep(other, place)
    assert [p.name for p in place.iterdir()] == [NAMES[1]]
    with pytest.raises(UserError, match="is a run directory"):
        sweeps.sweep(points, out / NAMES[0])


def test_a_run_that_fails_does_not_end_the_sweep(root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["sweep", str(root / "recipe.yaml"), "--out", str(out), "--set", "distill.steps=2"]
    status = main([*arguments, "--vary", "align.lr=1e30,0.02"])
    found = capsys.readouterr()
    assert status == 1
    assert "1 of 2 runs failed; lr=1e30,seed=3: " in found.err.splitlines()[-1]
    assert "lr 0.02" in found.out
    values = json.loads((out / "sweep.json").read_text())
    assert list(values["failed"]) == ["lr=1e30,seed=3"]
    assert [len(p["runs"]) for p in values["points"]] == [0, 1]


def test_a_run_that_fails_when_it_was_asked_to_stop_ends_the_sweep(root, tmp_path, monkeypatch):
    """Who stops a sweep and fills the disk with the state that is saved gets no further run."""

    def full(*_: Any, **values: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("log.jsonl: cannot write: No space left on device")

    monkeypatch.setattr(RunDirectory, "log", full)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(sweeps.grid(root / "recipe.yaml", [VARY]), out)
    assert (out / NAMES[0]).is_dir() and not (out / NAMES[1]).exists()


# ---- the results --------------------------------------------------------------------------------


def test_results_are_means_and_spreads_over_the_seeds(root, swept, capsys):
    out, _, found = swept
    assert json.loads((out / "sweep.json").read_text()) == found
    assert found["failed"] == {}
    for point, loss in zip(found["points"], LOSSES, strict=True):
        kl = []
        for seed in (3, 4):
            file = out / f"{loss},seed={seed}" / "evaluation" / "parts" / "fidelity-64.json"
            kl.append(json.loads(file.read_text())["models"]["merged"]["notes"]["overall"]["kl"])
        assert point["models"]["merged"]["notes"]["kl"] == {
            "mean": pytest.approx(statistics.fmean(kl), rel=1e-12),
            "sd": pytest.approx(statistics.stdev(kl), rel=1e-12),
            "values": kl,
        }
    assert (out / "sweep.svg").read_bytes().startswith(b"<?xml")
    # The command finds everything done, and prints the same.
    command = ["sweep", str(root / "recipe.yaml"), "--out", str(out), "--vary", VARY]
    assert main([*command, "--seeds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main([*command, "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    mean = found["points"][0]["models"]["merged"]["all"]["kl"]["mean"]
    assert f"{mean:.4f} ±" in " ".join(text.split())


def test_the_table_shows_what_each_branch_carries(root, tmp_path):
    settings = ["evaluate.branches=true", "distill.steps=2"]
    points = sweeps.grid(root / "recipe.yaml", ["distill.window_dropout=0,0.9"], settings=settings)
    found = sweeps.sweep(points, tmp_path)
    _, domain, _, kl, *_ = ([str(cell) for cell in c.cells] for c in sweeps.table(found).columns)
    assert domain == 2 * ["all", "all, gate 0", "all, gate 1", "all, mLSTM emptied"]
    names = ["merged", "merged, gate 0", "merged, gate 1", "merged, mLSTM emptied"]
    means = [p["models"][name]["all"]["kl"]["mean"] for p in found["points"] for name in names]
    assert kl == [f"{mean:.4f}" for mean in means] and len(set(means)) == 8
