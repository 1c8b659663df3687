"""Sweeps: the grid and what is refused, shared stages, failures and kills, the results."""

from __future__ import annotations

import io
import json
import math
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
from rich.console import Console

from xlstm_distill import packages, runtime, sharing
from xlstm_distill import sweep as sweeps
from xlstm_distill.cli import main, parser
from xlstm_distill.communicator import Communicator
from xlstm_distill.errors import UserError
from xlstm_distill.processes import RunProcess
from xlstm_distill.progress import Reporter
from xlstm_distill.recipe import load_recipe, shipped_recipes
from xlstm_distill.run import Run, run
from xlstm_distill.rundir import RunDirectory

VARY = "distill.ce_weight/distill.kl_weight=.1/.9,1/0"
LOSSES = ("ce_weight=0.1,kl_weight=0.9", "ce_weight=1,kl_weight=0")
TWO_THREADS = {**os.environ, "XLSTM_DISTILL_THREADS": "2"}
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
    assert list(points[1].values.values()) == [0.01, None, 9]  # 1e-2 is a text in YAML


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
    assert counts == {
        "mixers": 6,
        "teacher": 1,
        "stages": 3,
        "modes": 3,
        "losses": 6,
        "dropout": 2,
        "maps": 2,
    }


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
            patch.setattr(sharing.os, "link", stopped)
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
@pytest.mark.parametrize(
    ("place", "at_once"), [("student0", "1"), ("experts", "1"), ("experts", "2")]
)
def test_a_sweep_that_is_killed_continues(root, swept, tmp_path, place, at_once):
    out, _, expected = swept
    again = tmp_path / "again"
    command = [sys.executable, "-m", "xlstm_distill", "sweep", str(root / "recipe.yaml")]
    command += ["--out", str(again), "--vary", VARY, "--seeds", "2", "--at-once", at_once]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=TWO_THREADS) as child:
        while child.poll() is None and not (again / NAMES[1] / place).exists():
            time.sleep(0.002)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True, env=TWO_THREADS)
    assert json.loads((again / "sweep.json").read_text())["points"] == expected["points"]
    for name in NAMES:
        assert bits(again / name) == bits(out / name)


def test_without_hard_links_files_are_copied(root, swept, tmp_path, monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(sharing.os, "link", refused)
    sharing._link(str(root / "recipe.yaml"), str(tmp_path / "copy"))
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


def test_a_defect_in_a_run_does_not_end_the_sweep(root, tmp_path, monkeypatch, capsys):
    """As in a process of its own: nobody is there in the night to begin the others."""
    real = Run.run_merge

    def defect(self: Run) -> None:
        if self.path.name == NAMES[0]:
            raise ZeroDivisionError("division by zero")
        real(self)

    monkeypatch.setattr(Run, "run_merge", defect)
    found = sweeps.sweep(sweeps.grid(root / "recipe.yaml", [VARY]), tmp_path)
    assert found["failed"] == {NAMES[0]: "ZeroDivisionError: division by zero"}
    assert [len(p["runs"]) for p in found["points"]] == [0] + [1] * (len(found["points"]) - 1)
    assert "in defect" in capsys.readouterr().err  # the trace, to report it


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


# ---- several runs at once -----------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = runtime.threads()
    runtime.set_threads(2)
    yield
    runtime.set_threads(before)


@pytest.fixture(scope="module")
def at_once(root):
    """The runs of `swept`, two at a time."""
    out, stderr = root / "at once", root / "stderr"
    command = [sys.executable, "-m", "xlstm_distill", "sweep", str(root / "recipe.yaml")]
    command += ["--out", str(out), "--vary", VARY, "--seeds", "2", "--at-once", "2"]
    with stderr.open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=file, env=TWO_THREADS)
    return out, stderr.read_text()


@pytest.mark.slow
def test_runs_at_once_are_the_same_bits(swept, at_once):
    out, _, expected = swept
    assert json.loads((at_once[0] / "sweep.json").read_text())["points"] == expected["points"]
    for name in NAMES:
        assert bits(at_once[0] / name) == bits(out / name)


@pytest.mark.slow
def test_runs_at_once_make_what_they_share_once(at_once):
    out, _ = at_once
    made: list[tuple[str, str]] = []
    for name in NAMES:
        with RunDirectory(out / name) as directory:
            made += [
                (line["stage"], name.split(",")[-1])
                for line in directory.read_log()
                if line.get("event") == "done" and "taken_from" not in line
            ]
    for stage in ("data notes", "data general", "linearize", "align", "targets notes"):
        seeds = [seed for own, seed in made if own == stage]
        if stage == "linearize":  # the same for all: of whichever seed has its text first
            assert len(seeds) == 1
        else:
            assert seeds == ["seed=3", "seed=4"]


@pytest.mark.slow
def test_runs_at_once_say_which_one_speaks(at_once):
    _, said = at_once
    lines = said.splitlines()
    for number, name in enumerate(NAMES, start=1):
        assert f"run {number} of 4: {name}" in lines and f"{name} is done" in lines
        assert any(re.match(f"{re.escape(name)}: fidelity at 64: 6/6", line) for line in lines)


def wait_for(what, child: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not what():
        assert child.poll() is None and time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_at_once_are_saved_when_the_sweep_is_stopped(root, tmp_path, number):
    command = [sys.executable, "-m", "xlstm_distill", "sweep", str(root / "recipe.yaml")]
    command += ["--out", str(tmp_path), "--vary", VARY, "--at-once", "2"]
    command += ["--set", "distill.steps=100000", "--set", "targets.online=true"]

    def steps() -> list[int]:
        logs = [RunDirectory(tmp_path / name).steps("distill general") for name in NAMES[:2]]
        return [log[-1]["step"] if log else 0 for log in logs]

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, env=TWO_THREADS, start_new_session=True
    ) as child:
        wait_for(lambda: min(steps()) > 3, child)
        os.killpg(child.pid, number)  # as a terminal does
        _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error.splitlines()[-1].startswith(b"xlstm-distill: error: stopped; the same command")
    assert b"failed" not in error and not (tmp_path / "sweep.json").exists()
    for name in NAMES[:2]:
        with RunDirectory(tmp_path / name):  # nobody works there any more
            assert (tmp_path / name / "experts" / "general.state").is_dir()


@pytest.mark.slow
def test_a_run_at_once_that_fails_does_not_end_the_others(root, tmp_path, capsys, two_threads):
    arguments = ["sweep", str(root / "recipe.yaml"), "--out", str(tmp_path), "--at-once", "2"]
    arguments += ["--set", "distill.steps=2", "--vary", "align.lr=1e30,0.02,0.01"]
    assert main(arguments) == 1
    found = capsys.readouterr()
    assert "1 of 3 runs failed; lr=1e30,seed=3: " in found.err.splitlines()[-1]
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert list(values["failed"]) == ["lr=1e30,seed=3"]
    assert not values["failed"]["lr=1e30,seed=3"].startswith("xlstm-distill")
    assert [len(p["runs"]) for p in values["points"]] == [0, 1, 1]
    # The teacher's targets do not depend on the rate, and are made once.
    assert same_file(tmp_path, "targets/notes/manifest.json", "lr=0.02,seed=3", "lr=0.01,seed=3")


@pytest.mark.slow
def test_why_a_process_failed(tmp_path):
    said: list[str] = []
    process = RunProcess(tmp_path / "none", "run", 1, said.append)
    while not process.ended:
        time.sleep(0.02)
    process.close()
    assert said == [f"xlstm-distill: error: {process.failure}"] and not process.trace
    assert "none/recipe.yaml: cannot read" in process.failure
    process = RunProcess(tmp_path / "none", "run", 1, said.append)
    process.close()
    assert process.failure == "ended by SIGKILL" and not process.stopped


def test_how_many_runs_at_once_are_refused(root, tmp_path, capsys, two_threads):
    out = tmp_path / "out"
    arguments = ["sweep", str(root / "recipe.yaml"), "--out", str(out), "--at-once", "3"]
    assert main(arguments) == 2 and not out.exists()
    assert "--at-once 3: there are 2 threads to share" in capsys.readouterr().err
    with pytest.raises(UserError, match="--at-once 0: expected at least 1"):
        sweeps.sweep([], out, at_once=0)


def test_ranks_do_not_do_several_runs_at_once(root, tmp_path, monkeypatch, two_threads):
    ranks = Communicator()
    ranks.size = 2
    monkeypatch.setattr(sweeps, "world", lambda: ranks)
    with pytest.raises(UserError, match="--at-once 2: start the sweep without mpirun"):
        sweeps.sweep(sweeps.grid(root / "recipe.yaml", [VARY]), tmp_path / "out", at_once=2)


def agenda_of(root: Path, out: Path, vary: list[str]) -> tuple[list[Path], sweeps._Agenda]:
    points = sweeps.grid(root / "recipe.yaml", vary)
    recipes = {out / name: recipe for p in points for name, recipe in p.runs.items()}
    return list(recipes), sweeps._Agenda(recipes)


def log(place: Path, stage: str, **values: Any) -> None:
    with RunDirectory(place) as directory:
        directory.log(stage, **values)


def test_a_run_goes_as_far_as_no_other_makes_what_it_wants(root, tmp_path):
    """Stage I is another one for each rate, the teacher's targets are those of all."""
    (a, b), agenda = agenda_of(root, tmp_path, ["align.lr=1,2"])
    assert agenda.until(a, {}) == "linearize"  # then b goes on beside it
    assert agenda.until(b, {a: "linearize"}) is None  # it waits for the text
    for stage in ("data general", "data notes", "linearize"):
        log(a, stage, event="done")
    agenda.look(a)
    assert agenda.until(a, {}) == "report"
    assert agenda.until(b, {a: "report"}) == "align"
    agenda.look(b, "align")
    assert agenda.until(b, {a: "report"}) is None
    assert agenda.until(b, {a: "align"}) == "report"
    assert agenda.until(b, {}) == "targets"  # that of both


def test_nobody_waits_for_what_a_run_has_nothing_to_do_for(root, tmp_path):
    """Targets of a domain that no row is drawn from are never made."""
    (a, b), agenda = agenda_of(root, tmp_path, ["distill.lr=1,2"])
    for stage in ("data general", "data notes", "linearize", "align", "targets general"):
        log(a, stage, event="done")
    agenda.look(a)
    assert agenda.until(b, {a: "report"}) is None
    log(a, "distill general", step=1)
    agenda.look(a)
    assert agenda.until(b, {a: "report"}) == "report"


def test_what_a_run_has_nothing_to_do_for_is_not_tried_again(root, tmp_path):
    (a, b), agenda = agenda_of(root, tmp_path, ["distill.lr=1,2"])
    assert agenda.until(a, {}) == "targets"
    for stage in ("data general", "data notes", "linearize", "align", "targets general"):
        log(a, stage, event="done")
    agenda.look(a, "targets")
    assert agenda.until(a, {}) == agenda.until(b, {}) == "report"


def test_fewer_runs_have_more_threads(root, tmp_path, monkeypatch):
    """What all have in common is made with all threads, what runs of a seed have with a third, and
    four runs have a quarter each, the last two half. Here each seed has sampled text of its own."""
    begun = []

    class Done:
        """A process that does at once what it is for."""

        ended, stopped, failure, trace = True, False, "", ""

        def __init__(self, place, command, threads, say):
            begun.append((place.name, command, threads))
            recipe, last = recipes[place], sweeps.STAGES.index(command) if command != "run" else 9
            with RunDirectory(place) as directory:
                for part in sharing.parts(recipe):
                    if part.stage <= last and not directory.done(part.log[-1]):
                        (place / part.place).mkdir(parents=True, exist_ok=True)
                        (place / part.place / "config.json").touch()
                        directory.log(part.log[-1], event="done")
            if command == "run":
                (place / "report").mkdir()
                (place / "report" / "report.json").touch()

        def close(self):
            pass

    points = sweeps.grid(root / "recipe.yaml", ["distill.lr=1,2"], seeds=3)
    recipes = {tmp_path / name: recipe for point in points for name, recipe in point.runs.items()}
    monkeypatch.setattr(sweeps, "RunProcess", Done)
    monkeypatch.setattr(sweeps, "_POLL", 0.0)
    monkeypatch.setattr(runtime, "threads", lambda: 12)
    left = {place: "" for place in sorted(recipes, key=lambda place: place.name[::-1])}
    ended = list(sweeps._side_by_side(left, recipes, Reporter(quiet=True), 4))
    assert sorted(ended) == sorted((place, "") for place in recipes)
    first = [f"lr=1,seed={seed}" for seed in (3, 4, 5)]
    assert begun[:3] == [(name, "data", 4) for name in first]
    assert begun[3] == (first[0], "linearize", 12)
    assert begun[4:7] == [(name, "targets", 4) for name in first]
    assert sorted(name for name, _, _ in begun[7:]) == sorted(place.name for place in recipes)
    assert [how for _, *how in begun[7:]] == [["run", 3]] * 4 + [["run", 6]] * 2


@pytest.mark.parametrize("terminal", [True, False])
def test_each_of_several_runs_has_its_line(terminal):
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.console._force_terminal = terminal
    with reporter.side_by_side() as show:
        for name in ("a", "b"):
            show(name, "stage I: 1/6")
        show("a", "stage I: 2/6")
        show("a", "")
        show("b", "stage I: 3/6")
    text = re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", stream.getvalue())
    assert ("a: stage I: 2/6" in text.splitlines()) != terminal
    assert "stage I: 3/6" in text.strip().splitlines()[-1]


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
    assert re.search(rf"{mean:.4f}.*\n.*±", text)


def test_the_table_shows_what_each_branch_carries(root, tmp_path):
    settings = ["evaluate.branches=true", "distill.steps=2"]
    points = sweeps.grid(root / "recipe.yaml", ["distill.window_dropout=0,0.9"], settings=settings)
    found = sweeps.sweep(points, tmp_path)
    label, kl, *_ = ([str(cell) for cell in c.cells] for c in sweeps.table(found).columns)
    parts = ["  gate 0", "  gate 1", "  mLSTM emptied", "  window cut"]
    assert label == [points[0].name, *parts, points[1].name, *parts]
    variants = ("gate 0", "gate 1", "mLSTM emptied", "window cut")
    names = ["merged", *(f"merged, {variant}" for variant in variants)]
    means = [p["models"][name]["all"]["kl"]["mean"] for p in found["points"] for name in names]
    assert kl == [f"{mean:.4f}" for mean in means] and len(set(means)) == 10


def test_the_table_is_readable_on_80_columns():
    def spread(value):
        return {"mean": value, "sd": 0.0123, "values": [value] * 3}

    domains = {
        domain: {"kl": spread(0.2267), "agree": spread(0.8031), "perplexity": spread(17.129)}
        for domain in ("all", "docs", "handbook")
    }
    name = "mixer hybrid, ce_weight 0.1, kl_weight 0.9, lora.rank 64"
    point = {"name": name, "runs": [{}] * 3, "models": {}}
    full = {**point, "models": dict.fromkeys(("teacher", "untrained", "merged"), domains)}
    console = Console(width=80, file=io.StringIO())
    console.print(sweeps.table({"points": [full, {**point, "name": "not yet", "runs": []}]}))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    rows = (line.split("│")[1:7] for line in text.splitlines() if "│" in line)
    first, *figures = (" ".join(column).split() for column in zip(*rows, strict=True))
    assert f"{name} (3 runs) docs handbook not yet (0 runs)" in " ".join(first)
    expected = (["0.2267", "±0.0123"], ["1.000", "±0.000"], ["0.8031", "±0.0123"])
    for column, cell in zip(figures[:3], expected, strict=True):
        assert column == 3 * cell


def test_a_point_that_diverged_leaves_room_for_the_others():
    def point(name, kl, perplexity):
        values = {"kl": kl, "agree": 0.5, "perplexity": perplexity}
        own = {m: {"mean": x, "sd": None, "values": [x]} for m, x in values.items()}
        models = {model: {"all": own} for model in ("teacher", "untrained", "merged")}
        return {"name": name, "runs": [{}], "models": models}

    points = [point("lr 1e-3", 1.25, 20.0), point("lr 1e3", 21449640.2, math.exp(700))]
    cells = [list(column.cells) for column in sweeps.table({"points": points}).columns]
    assert cells[1] == ["1.2500", "2.145e+07"] and cells[4] == ["20.000", "1.014e+304"]
