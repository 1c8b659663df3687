"""Killed and continued is bitwise the same: stages, whole runs with a real SIGKILL, the lock."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import tiny_run

import xlstm_distill
from xlstm_distill.align import align
from xlstm_distill.atomic import atomic_file, write_text
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.linearize import linearize
from xlstm_distill.optim import AdamW, trainable_names
from xlstm_distill.recipe import load_recipe, make_recipe, save_recipe
from xlstm_distill.run import run
from xlstm_distill.rundir import Interrupt, RunDirectory
from xlstm_distill.sampling import read_documents, sample_documents
from xlstm_distill.training import Best, Saver

ROW = dict(rows=2, length=32)


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def data(teacher):
    return tiny_run.text(teacher)


def stage(name, teacher, data, **changes):
    """A new student and the generator of a stage that trains it."""
    student = linearize(teacher, window=6, sinks=2)
    if name == "align":
        return student, align(student, teacher, data, **{"steps": 9, **ROW, **changes})
    settings = {"steps": 9, "k": 8, "lr": 1e-3, **ROW, **changes}
    return student, distill(student, data, teacher, **settings)


# ---- one stage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["align", "distill"])
@pytest.mark.parametrize("stops", [(1,), (4, 3), (8,)])
def test_stage_continues_bitwise(tmp_path, teacher, data, name, stops):
    whole, generator = stage(name, teacher, data)
    expected = list(generator)
    seen = []
    for count in (*stops, None):
        student, generator = stage(name, teacher, data, state=tmp_path / "state.npz")
        for m in generator:
            seen.append(m)
            if count is not None and m["step"] == count + sum(stops[: stops.index(count)]):
                break
        generator.close()  # saves
    assert np.array_equal(student.params.flat, whole.params.flat)
    assert [m["step"] for m in seen] == [m["step"] for m in expected]
    assert [m["loss"] for m in seen] == [m["loss"] for m in expected]


def test_a_kill_falls_back_to_the_last_saved_step(tmp_path, teacher, data):
    whole, generator = stage("align", teacher, data)
    list(generator)
    state = tmp_path / "state.npz"
    _, generator = stage("align", teacher, data, state=state, save_seconds=0)
    for m in generator:
        if m["step"] == 4:
            content = state.read_bytes()  # of step 3: saved once its metrics were taken
        if m["step"] == 6:
            break
    generator.close()
    state.write_bytes(content)  # as if killed in step 4
    (tmp_path / ".state.npz.tmp").write_bytes(b"half a file")  # and while writing the next state
    student, generator = stage("align", teacher, data, state=state)
    assert [m["step"] for m in generator] == [4, 5, 6, 7, 8, 9]
    assert np.array_equal(student.params.flat, whole.params.flat)


def test_an_interrupt_in_the_middle_of_a_step_saves_the_step_before(
    tmp_path, teacher, data, monkeypatch
):
    whole, generator = stage("distill", teacher, data)
    list(generator)
    student, generator = stage("distill", teacher, data, state=tmp_path / "s.npz")
    for _ in range(4):
        next(generator)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(student), "loss_and_grad", stopped)
    with pytest.raises(KeyboardInterrupt):
        next(generator)
    monkeypatch.undo()
    student, generator = stage("distill", teacher, data, state=tmp_path / "s.npz")
    assert [m["step"] for m in generator] == [5, 6, 7, 8, 9]
    assert np.array_equal(student.params.flat, whole.params.flat)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"lr": 1e-4}, "lr"), ({"steps": 10}, "steps"), ({"seed": 5}, "batches")],
)
def test_state_of_another_run_is_refused_by_name(tmp_path, teacher, data, changes, field):
    state = tmp_path / "state.npz"
    _, generator = stage("align", teacher, data, state=state)
    next(generator)
    generator.close()
    _, generator = stage("align", teacher, data, state=state, **changes)
    with pytest.raises(UserError, match=f"saved with {field} "):
        next(generator)


def test_damaged_state_is_named(tmp_path, teacher, data):
    state = tmp_path / "state.npz"
    state.write_bytes(b"PK\x03\x04 nothing")
    _, generator = stage("align", teacher, data, state=state)
    with pytest.raises(UserError, match=r"state\.npz: damaged"):
        next(generator)


def test_a_state_that_lacks_an_array_is_named(tmp_path, teacher, data):
    state = tmp_path / "state.npz"
    _, generator = stage("distill", teacher, data, state=state)
    next(generator)
    generator.close()
    with np.load(state) as whole:
        rest = {name: whole[name] for name in whole.files if name != "v"}
    np.savez(state, **rest)
    _, generator = stage("distill", teacher, data, state=state)
    with pytest.raises(UserError, match=r"state\.npz: damaged \(.*v"):
        next(generator)


def test_a_state_is_read_one_array_after_the_other(tmp_path):
    """To go on takes no more memory than to go on training did: a copy of one array."""
    student = models.random_model(num_hidden_layers=12, intermediate_size=4096)
    optimisers = [AdamW(student.params, trainable_names(student, "all")) for _ in range(2)]
    saver, batches = Saver(tmp_path / "s.npz", {}), SimpleNamespace(load_state_dict=lambda _: None)
    saver.save(optimisers[0], {})
    tracemalloc.start()
    try:
        saver.load(optimisers[1], batches, Best())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 < peak / optimisers[1].m.nbytes < 1.5


def test_another_instruction_set_is_said(tmp_path, teacher, data, monkeypatch):
    _, generator = stage("align", teacher, data, state=tmp_path / "s.npz")
    next(generator)
    generator.close()
    monkeypatch.setattr("xlstm_distill.training.runtime.isa", lambda: "another")
    _, generator = stage("align", teacher, data, state=tmp_path / "s.npz")
    with pytest.warns(UserWarning, match="goes on with another"):
        next(generator)


def test_what_is_longer_than_the_teachers_context_is_not_sampled(tmp_path, teacher):
    file = tmp_path / "a.txt"
    file.write_text("short\n" + "long " * 100)  # a token a byte, the context is 512
    settings = {"documents": 2, "directory": tmp_path / "s", "prompts_file": file}
    with pytest.raises(UserError, match=r"prompt has 500 tokens and max_new_tokens is 13"):
        next(sample_documents(teacher, "general", max_new_tokens=13, **settings))
    next(sample_documents(teacher, "general", max_new_tokens=12, **settings))


def test_sampling_continues_bitwise(tmp_path, teacher):
    def documents(folder, stop_after=None):
        calls = 0

        def check():
            nonlocal calls
            calls += 1
            if stop_after is not None and calls > stop_after:
                raise KeyboardInterrupt

        settings = dict(documents=7, max_new_tokens=20, directory=folder, batch=3, seed=4)
        list(sample_documents(teacher, "chat", check=check, **settings))
        return read_documents(teacher, folder, "chat")

    expected = documents(tmp_path / "whole")
    assert len(expected) == 7 and all(len(d.ids) > 3 for d in expected)
    with pytest.raises(KeyboardInterrupt):
        documents(tmp_path / "cut", stop_after=30)
    assert 0 < len(list((tmp_path / "cut").iterdir())) < 3
    assert documents(tmp_path / "cut") == expected
    assert len({tuple(d.ids) for d in expected}) == 7


# ---- files and locks ----------------------------------------------------------------------------


def test_atomic_file_keeps_the_old_contents(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(target) as handle:
        handle.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_disk_full_is_one_line_that_names_the_file(tmp_path, teacher, data, monkeypatch):
    real = os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    state = tmp_path / "state.npz"
    _, generator = stage("align", teacher, data, state=state, save_seconds=0)
    with pytest.raises(UserError, match=r"state\.npz: cannot write: No space left on device"):
        list(generator)
    assert list(tmp_path.iterdir()) == []
    for write in (lambda: data.save(tmp_path / "d"), lambda: teacher.save(tmp_path / "m")):
        with pytest.raises(UserError, match="No space left on device"):
            write()
    monkeypatch.setattr(os, "fsync", real)


def test_saving_costs_a_small_share_of_the_time(tmp_path):
    saver = Saver(tmp_path / "s", {}, seconds=10)
    for cost, seconds in ((0.1, 10), (3.0, 150)):  # a fiftieth of the time at most
        saver._cost, saver._last = cost, time.monotonic() - seconds + 5
        assert not saver.due()
        saver._last -= 6
        assert saver.due()


def test_two_runs_in_one_directory_are_refused(tmp_path):
    refused = pytest.raises(UserError, match="another process is working")
    with RunDirectory(tmp_path / "run"), refused, RunDirectory(tmp_path / "run"):
        pass
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_place_that_cannot_be_a_run_directory_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match="file: is not a directory")
    with refused, RunDirectory(tmp_path / "file"):
        pass

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(UserError, match=r"run: no file locks here \(Function not")
    with refused, RunDirectory(tmp_path / "run"):
        pass


def test_a_disk_that_became_read_only_is_one_line(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "temporary name")

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(UserError, match="state: cannot write: Read-only"):
        write_text(tmp_path / "state", "text")


def test_log_survives_a_torn_line(tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.log("align", step=1, loss=2.0)
        directory.log("align", step=2, loss=1.0)
        with (directory.path / "log.jsonl").open("ab") as handle:
            handle.write(b'{"stage": "align", "st')
        directory.log("align", step=2, loss=0.5)
        directory.log("align", event="done", seconds=1.0)
        assert [m["loss"] for m in directory.steps("align")] == [2.0, 0.5]
        assert directory.done("align")["seconds"] == 1.0


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    values = tiny_run.recipe(tmp_path, tmp_path)
    with RunDirectory(tmp_path) as directory, pytest.raises(UserError, match=r"precious\.txt"):
        directory.begin(make_recipe(values))


def test_another_recipe_is_refused_by_key(tmp_path):
    values = tiny_run.recipe(tmp_path, tmp_path)
    with RunDirectory(tmp_path / "run") as directory:
        directory.begin(make_recipe(values))
        directory.begin(make_recipe(values))
        values["align"]["steps"] = 7
        with pytest.raises(UserError, match=r"align\.steps is 6 there and 7 here"):
            directory.begin(make_recipe(values))


def test_first_interrupt_waits_and_second_does_not():
    interrupt = Interrupt()
    with interrupt.listening():
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)


@contextmanager
def hangup(handler: signal.Handlers) -> Iterator[Interrupt]:
    """A listening interrupt in a process whose SIGHUP was left so; the tests may be under nohup."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with Interrupt().listening() as interrupt:
            yield interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_asks_once_and_is_answered_once(capsys):
    with hangup(signal.SIG_DFL) as interrupt:
        for _ in range(3):  # of the kernel and of the shell
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert capsys.readouterr().err.count("stopping as soon as") == 1


def test_nohup_outlives_its_terminal():
    with hangup(signal.SIG_IGN) as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        interrupt.check()


# ---- whole runs ---------------------------------------------------------------------------------

TRAINING = {
    "steps": 40,
    "rows": 2,
    "lr": 1e-3,
    "rates": {"mixer": 5.0},
    "average": 0.9,
    "window_dropout": 0.3,
    "validate_every": 3,
    "validate_rows": 1,
    "keep": "best",
}


def prepare(root: Path, teacher, save_seconds: float, **distill_keys: Any) -> Path:
    """A teacher directory and a recipe file beside it, with all that a state may hold."""
    teacher.save(root / "teacher")
    text = tiny_run.write_text(root / "text")
    training = {**TRAINING, **distill_keys}
    values = tiny_run.recipe(root / "teacher", text, save_seconds=save_seconds, distill=training)
    values["align"].update(steps=40, micro_rows=1)
    save_recipe(make_recipe(values), root / "recipe.yaml")
    return root / "recipe.yaml"


def start(recipe: Path, out: Path, until: str = "run") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "xlstm_distill", until, str(recipe), "--out", str(out)]
    package = Path(xlstm_distill.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(package), "XLSTM_DISTILL_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(recipe: Path, out: Path, until: str = "run") -> None:
    process = start(recipe, out, until)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


Key = tuple[str, Any]
"""(stage, step or event): one line of the log"""


def key_of(line: dict[str, Any]) -> Key:
    return line["stage"], line.get("step", line.get("event"))


def log_of(out: Path, behind: int = 0) -> list[dict[str, Any]]:
    """The whole lines of the log behind so many bytes."""
    try:
        lines = (out / "log.jsonl").read_bytes()[behind:].splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def stop(
    recipe: Path,
    out: Path,
    keys: set[Key],
    delay: float,
    how: signal.Signals,
    until: str = "run",
) -> bool:
    """Start a run, wait until it logs one of the lines and then so many seconds, and stop it. False
    if it ended first."""
    log = out / "log.jsonl"
    behind = log.stat().st_size if log.exists() else 0
    process = start(recipe, out, until)
    end = time.monotonic() + 60
    while not keys.intersection(key_of(line) for line in log_of(out, behind)):
        if time.monotonic() > end or process.poll() is not None:
            process.kill()
            raise AssertionError(f"none of {keys} was reached: {process.communicate()}")
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        return False
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1].startswith("xlstm-distill: error: stopped")
    else:
        assert process.returncode == -signal.SIGKILL, errors
    return True


def results(out: Path) -> dict[str, bytes]:
    """All files of a run but those that tell the time."""
    skip = {"log.jsonl", "report.html", "report.json", ".lock"}
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in skip]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def check_the_same(whole: Path, stopped: Path) -> None:
    expected, found = results(whole), results(stopped)
    assert list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    with RunDirectory(whole) as a, RunDirectory(stopped) as b:
        for stage in ("align", "distill general", "distill notes"):
            for field in ("loss", "validation"):
                losses = [[m.get(field) for m in run.steps(stage)] for run in (a, b)]
                assert losses[0] == losses[1], stage


STOPS = [
    ("align", 20, signal.SIGINT),
    ("distill general", 5, signal.SIGKILL),
    ("distill general", 23, signal.SIGKILL),
    ("distill notes", 11, signal.SIGINT),
]


@pytest.mark.slow
@pytest.mark.parametrize("state_passing", [False, True])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, teacher, state_passing):
    recipe = prepare(tmp_path, teacher, 0, state_passing=state_passing)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(recipe, whole)
    for stage, step, how in STOPS:
        assert stop(recipe, stopped, {(stage, step)}, 0.0, how)
    finish(recipe, stopped)
    check_the_same(whole, stopped)
    # A finished run has nothing left to do, and keeps its results.
    expected = results(stopped)
    run(load_recipe(recipe), stopped)
    assert results(stopped) == expected
    report = json.loads((stopped / "report" / "report.json").read_text())
    assert report["layer_errors"]["before"] != report["layer_errors"]["after"]


@pytest.mark.slow
@pytest.mark.parametrize("save_seconds", [0.0, 0.02])
def test_stage_one_by_layer_killed_ends_with_the_bits_of_stage_one_by_step(
    tmp_path, teacher, save_seconds
):
    """In the middle of a layer, after its last step, while batches move to the next layer."""
    recipe = prepare(tmp_path, teacher, save_seconds)
    finish(recipe, tmp_path / "step", "align")
    values = load_recipe(recipe, ["align.order=layer"])
    save_recipe(values, recipe)
    killed = tmp_path / "layer"
    for step, delay in ((3, 0.0), (20, 0.0), (40, 0.0), (40, 0.01), (41, 0.0), (63, 0.0)):
        keys = {("align", n) for n in range(step, 81)}
        assert stop(recipe, killed, keys, delay, signal.SIGKILL, "align")
    finish(recipe, killed, "align")
    weights = [p / "aligned" / "model.safetensors" for p in (tmp_path / "step", killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (killed / "aligned.state").exists()
    with RunDirectory(killed) as directory:
        assert [m["step"] for m in directory.steps("align")] == [*range(1, 81)]


def moments(log: list[dict[str, Any]], count: int) -> list[tuple[set[Key], float]]:
    """Moments of a run: so many lines of its log, of every stage in turn, and for each the lines of
    which one must stand before and the seconds to wait then, so that the kill comes somewhere in
    the work that ends with the line."""
    random = np.random.default_rng(count)
    chosen: set[int] = set()
    stages = [line["stage"] for line in log]
    order = random.permutation(list(dict.fromkeys(stages)))
    for stage in itertools.islice(itertools.cycle(order), 10 * count):
        own = [n for n, s in enumerate(stages) if n > 0 and s == stage and n not in chosen]
        if own and len(chosen) < count:
            chosen.add(int(random.choice(own)))
    found = []
    for n in sorted(chosen):
        # A run that had gone on for longer before its last kill begins behind the line before.
        before = {key_of(line) for line in log[n - 1 :]}
        found.append((before, random.uniform() * (log[n]["time"] - log[n - 1]["time"])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "save_seconds"), [(4, 0.0), pytest.param(20, 0.05, marks=pytest.mark.deep)]
)
def test_kills_at_random_moments(tmp_path, teacher, count, save_seconds):
    recipe = prepare(tmp_path, teacher, save_seconds)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(recipe, whole)
    kills = moments(log_of(whole), count)
    assert len(kills) == count
    done = [stop(recipe, killed, keys, delay, signal.SIGKILL) for keys, delay in kills]
    assert all(done[:-1])  # the last one may come too late: in the milliseconds of the report
    finish(recipe, killed)
    check_the_same(whole, killed)
