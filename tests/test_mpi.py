"""Several ranks: the same bits for any number of them, a lost rank, resume with another number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from test_resume import check_the_same, finish, key_of, log_of, results
from tolerances import ORDER_STEPS

import xlstm_distill
from xlstm_distill.model import load
from xlstm_distill.recipe import make_recipe, save_recipe
from xlstm_distill.rundir import RunDirectory

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

HERE = Path(__file__).parent
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
PACKAGE = Path(xlstm_distill.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE), "XLSTM_DISTILL_THREADS": "1"}


def launch(ranks: int, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MPIRUN, "-n", str(ranks), sys.executable, *command],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, output and errors of a job that must end by itself."""
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"the job hangs: {process.communicate()}") from None
    return process.returncode, output, errors


def launch_run(
    ranks: int, recipe: Path, out: Path, *more: str, until: str = "run"
) -> subprocess.Popen[str]:
    return launch(ranks, "-m", "xlstm_distill", until, str(recipe), "--out", str(out), *more)


def deep(ranks: int) -> Any:
    """A number of ranks that `make deep` alone tries."""
    return pytest.param(ranks, marks=pytest.mark.deep)


# ---- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [deep(2), 3, deep(4)])
def test_the_ranks_agree_with_one_process(tmp_path, ranks):
    status, output, errors = ended(launch(ranks, str(HERE / "mpi_ranks.py"), str(tmp_path)))
    assert status == 0, errors
    assert output.count("done") == ranks


# ---- whole runs ---------------------------------------------------------------------------------

TRAINING = {
    "steps": 12,
    "rows": 5,
    "lr": 1e-3,
    "rates": {"mixer": 5.0},
    "average": 0.9,
    "validate_every": 4,
    "keep": "best",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("mpi")
    tiny_run.teacher().save(place / "teacher")
    tiny_run.write_text(place / "text")
    for name in ("tree", "sequence", "lora", "at_once"):
        values = tiny_run.recipe(place / "teacher", place / "text", save_seconds=0)
        values["distill"] = TRAINING
        values["align"].update(steps=12, rows=6, micro_rows=1, clip=0.05, patience=5)
        values["align"].update(average=0.8, validate_every=5, validate_rows=1, keep="best")
        values["accumulation"] = "sequence" if name == "sequence" else "tree"
        if name in ("lora", "at_once"):
            values["align"] = {"steps": 0, "rows": 1}
        if name == "lora":
            values["distill"] = {**TRAINING, "steps": 4, "train": "lora"}
        if name == "at_once":
            experts = {**values["experts"], "mixed": {"general": 1, "notes": 1}}
            values.update(experts=experts, experts_at_once=2, generalist={}, merge={})
            values["targets"] = {"form": "sampled", "k": 12, "online": True}
            values["distill"] = {**TRAINING, "kl_form": "sampled"}
        save_recipe(make_recipe(values), place / f"{name}.yaml")
    return place


@pytest.fixture(scope="module")
def alone(root):
    """A run of one process without mpirun, added over the tree."""
    finish(root / "tree.yaml", root / "alone")
    return root / "alone"


@pytest.mark.parametrize("ranks", [deep(1), deep(2), 4])
def test_any_number_of_ranks_ends_with_the_same_bits(root, alone, tmp_path, ranks):
    status, output, errors = ended(launch_run(ranks, root / "tree.yaml", tmp_path / "out"))
    assert status == 0, errors
    check_the_same(alone, tmp_path / "out")
    assert output.count("report: ") == 1
    assert (f"ranks: {ranks}, machines: 1, threads in all: {ranks}" in errors) == (ranks > 1)
    keys = [key_of(line) for line in log_of(tmp_path / "out")]
    assert len(keys) == len(set(keys))


def test_adapters_end_with_the_same_bits(root, tmp_path):
    finish(root / "lora.yaml", tmp_path / "one", "distill")
    status, _, errors = ended(launch_run(2, root / "lora.yaml", tmp_path / "two", until="distill"))
    assert status == 0, errors
    check_the_same(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "experts" / "notes.adapter").is_dir()


def test_in_sequence_one_rank_differs_by_rounding(root, alone, tmp_path):
    """And several ranks have the tree's bits, whatever the recipe says of one."""
    finish(root / "sequence.yaml", tmp_path / "one", "distill")
    job = launch_run(2, root / "sequence.yaml", tmp_path / "two", until="distill")
    status, _, errors = ended(job)
    assert status == 0, errors
    for name in ("aligned/model.safetensors", "experts/notes/model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (alone / name).read_bytes()
    start = load(alone / "student0")
    one, two = (load(tmp_path / name / "experts" / "notes") for name in ("one", "two"))
    apart = np.linalg.norm(one.params.flat - two.params.flat)
    assert 0 < apart <= ORDER_STEPS * np.linalg.norm(one.params.flat - start.params.flat)
    for stage, field in (("align", "loss"), ("distill notes", "loss")):
        losses = []
        for place in (tmp_path / "one", tmp_path / "two"):
            with RunDirectory(place) as directory:
                losses.append([line[field] for line in directory.steps(stage)])
        assert losses[0] == pytest.approx(losses[1], rel=ORDER_STEPS)


# ---- experts at once ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_by_one(root):
    """Three experts and a generalist, trained by one process: without stage I, by draws that the
    teacher makes on the way."""
    finish(root / "at_once.yaml", root / "one_by_one", "distill")
    return root / "one_by_one"


EXPERTS = ("general", "notes")
"""Those that are trained together; "mixed" comes after them."""


def steps_of(out: Path) -> dict[str, list[int]]:
    """The steps of each expert, and of the generalist, as the log has them."""
    found: dict[str, list[int]] = {}
    for line in log_of(out):
        if line["stage"].startswith("distill") and "step" in line:
            found.setdefault(line["stage"], []).append(line["step"])
    return found


@pytest.mark.parametrize("ranks", [deep(2), 3, deep(4)])
def test_experts_at_once_end_with_the_same_bits(root, one_by_one, tmp_path, ranks):
    out = tmp_path / "out"
    status, _, errors = ended(launch_run(ranks, root / "at_once.yaml", out, until="distill"))
    assert status == 0, errors
    check_the_same(one_by_one, out)
    assert steps_of(out) == steps_of(one_by_one)
    lines = [line for line in log_of(out) if line["stage"].startswith("distill")]
    order = [line["stage"].split()[1] for line in lines]
    both = order[: order.index("mixed")]
    assert both[:4] == [*EXPERTS, *EXPERTS] and len(both) == 2 * (12 + 1)
    done = [line["stage"] for line in lines if line.get("event") == "done"]
    assert done == [f"distill {name}" for name in ("general", "notes", "mixed", "generalist")]
    assert "stage II: expert general: 12/12" in errors and "stage II: expert notes: 12/12" in errors


def test_experts_at_once_are_killed_and_go_on_with_another_number(root, one_by_one, tmp_path):
    recipe, out = root / "at_once.yaml", tmp_path / "out"
    errors = stop(4, recipe, out, ("distill notes", 5), 3, signal.SIGKILL, until="distill")
    assert "rank 3" in errors and "signal 9" in errors
    general, notes = (out / "experts" / f"{name}.state" / "state.npz" for name in EXPERTS)
    assert general.is_file()
    notes.unlink()  # so that one is ahead of the other, and ends before it
    stop(3, recipe, out, ("distill notes", 11), 0, signal.SIGTERM, until="distill")
    assert (out / "experts" / "general" / "config.json").is_file() and notes.is_file()
    status, _, errors = ended(launch_run(2, recipe, out, until="distill"))
    assert status == 0, errors
    check_the_same(one_by_one, out)
    assert {stage: sorted(set(steps)) for stage, steps in steps_of(out).items()} == steps_of(
        one_by_one
    )


def test_an_expert_that_fails_ends_the_job(root, tmp_path):
    changed = ["--set", "distill.lr=1e30", "--set", "distill.clip=1e30"]
    job = launch_run(2, root / "at_once.yaml", tmp_path / "out", *changed, until="distill")
    status, _, errors = ended(job)
    assert status == 1
    assert "the gradient is not finite; lower the learning rate" in errors


# ---- what ends a job ----------------------------------------------------------------------------


def pid_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank, a child of mpirun's."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if f"OMPI_COMM_WORLD_RANK={rank}".encode() in environment:
                return int(child)
    raise AssertionError(f"mpirun has no child of rank {rank}")


def stop(
    ranks: int,
    recipe: Path,
    out: Path,
    key: tuple,
    rank: int,
    how: signal.Signals,
    until: str = "run",
) -> str:
    """Start a job, wait for a line of its log and send a signal to one rank; what it says."""
    log = out / "log.jsonl"
    behind = log.stat().st_size if log.exists() else 0
    process = launch_run(ranks, recipe, out, until=until)
    end = time.monotonic() + 60
    while key not in [key_of(line) for line in log_of(out, behind)]:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(pid_of(process, rank), how)
    status, _, errors = ended(process)
    assert status != 0
    return errors


def test_a_lost_rank_ends_the_job_and_another_number_goes_on(root, alone, tmp_path):
    recipe, out = root / "tree.yaml", tmp_path / "out"
    errors = stop(2, recipe, out, ("align", 4), 0, signal.SIGKILL)
    assert "rank 0" in errors and "signal 9" in errors
    # Asked kindly on any rank, all stop behind the same step and the first one saves.
    errors = stop(3, recipe, out, ("distill notes", 5), 2, signal.SIGTERM)
    said = [line for line in errors.splitlines() if line.startswith("xlstm-distill: error: ")]
    assert said == [
        "xlstm-distill: error: stopped; the same command continues what can be continued"
    ]
    assert (out / "experts" / "notes.state" / "state.npz").is_file()
    finish(recipe, out)
    check_the_same(alone, out)


def launch_failing(how: str, rank: int, recipe: Path, out: Path) -> subprocess.Popen[str]:
    """A run of three ranks in which one fails (mpi_ranks.py)."""
    script = [str(HERE / "mpi_ranks.py"), "failing", how, str(rank)]
    return launch(3, *script, "run", str(recipe), "--out", str(out))


def test_a_defect_of_one_rank_ends_the_job(root, tmp_path):
    job = launch_failing("training", 1, root / "tree.yaml", tmp_path / "out")
    status, _, errors = ended(job)
    assert status == 1
    assert "Traceback" in errors
    assert "xlstm-distill: error: rank 1 on " in errors and "a defect of one rank" in errors
    assert (tmp_path / "out" / "student0").is_dir() and not (tmp_path / "out" / "aligned").exists()


def test_a_defect_of_one_rank_ends_the_experts_of_all_groups(root, tmp_path):
    """The third rank is a group by itself; the other group waits for its step."""
    job = launch_failing("training", 2, root / "at_once.yaml", tmp_path / "out")
    status, _, errors = ended(job)
    assert status == 1 and "Traceback" in errors
    assert "xlstm-distill: error: rank 2 on " in errors and "a defect of one rank" in errors
    assert (tmp_path / "out" / "aligned").is_dir()
    assert not (tmp_path / "out" / "experts" / "notes").exists()


@pytest.fixture
def unmeasured(alone, tmp_path):
    """A finished run without its evaluation."""
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "evaluation")
    return out


def test_a_defect_of_one_rank_ends_the_evaluation(root, unmeasured):
    status, _, errors = ended(launch_failing("defect", 1, root / "tree.yaml", unmeasured))
    assert status == 1
    # The first rank tells it, with the other's traceback.
    assert "rank 1 on " in errors and "in trouble" in errors and "a defect of one rank" in errors
    assert not list((unmeasured / "evaluation").glob("parts/*"))


def test_all_ranks_stop_evaluating_when_one_is_asked_to(root, alone, unmeasured):
    status, _, errors = ended(launch_failing("asked", 1, root / "tree.yaml", unmeasured))
    said = [line for line in errors.splitlines() if line.startswith("xlstm-distill: error: ")]
    assert status != 0 and said == [
        "xlstm-distill: error: stopped; the same command continues what can be continued"
    ]
    finish(root / "tree.yaml", unmeasured)
    check_the_same(alone, unmeasured)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("model", "a model that fails"),
        ("disk", "OSError: a full disk"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
def test_what_ends_the_script_of_one_rank_ends_all(tmp_path, where, message):
    job = launch(3, str(HERE / "mpi_ranks.py"), "script", where, str(tmp_path))
    status, _, errors = ended(job)
    assert status != 0 and message in errors


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "command", "status", "message"),
    [
        (
            3,
            ["run", "tree.yaml", "--out", "out", "--set", "distill.rows=2"],
            1,
            "distill: a step has 2 parts",
        ),
        (
            2,
            ["run", "tree.yaml", "--out", "out", "--set", "distill.state_passing=true"],
            1,
            "distill.state_passing is for one rank",
        ),
        (2, ["run", "none.yaml", "--out", "out"], 2, "none.yaml: cannot read"),
        (2, ["quickstart", "--out", "out"], 2, "quickstart runs in one process, here are 2"),
    ],
)
def test_trouble_is_one_line_of_the_first_rank(
    root, tmp_path, monkeypatch, ranks, command, status, message
):
    for recipe in root.glob("*.yaml"):
        (tmp_path / recipe.name).write_bytes(recipe.read_bytes())
    monkeypatch.chdir(tmp_path)
    found, _, errors = ended(launch(ranks, "-m", "xlstm_distill", *command))
    said = [line for line in errors.splitlines() if line.startswith("xlstm-distill: error: ")]
    assert found == status and len(said) == 1 and message in said[0]


def test_a_stage_that_is_not_reached_refuses_nobody(root, tmp_path):
    """Stage I with two ranks, although stage II is for one."""
    out, changes = tmp_path / "out", ("distill.rows=1", "distill.state_passing=true")
    more = [word for change in changes for word in ("--set", change)]
    found, _, errors = ended(launch_run(2, root / "tree.yaml", out, *more, until="align"))
    assert found == 0 and (out / "aligned" / "config.json").is_file(), errors


def test_a_job_that_mpi4py_knows_nothing_of_is_refused():
    """As where mpirun is of another MPI than mpi4py: every process would take itself for all."""
    process = subprocess.run(
        [sys.executable, "-m", "xlstm_distill", "run", "a.yaml", "--out", "out"],
        env={**ENVIRONMENT, "PMI_SIZE": "2"},
        text=True,
        capture_output=True,
    )
    assert process.returncode == 1
    assert "2 processes were started together, but mpi4py uses another MPI" in process.stderr


def test_a_job_without_mpi4py_is_refused(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('none here')")
    path = f"{tmp_path}:{PACKAGE}"
    process = subprocess.run(
        [sys.executable, "-m", "xlstm_distill", "run", "a.yaml", "--out", "out"],
        env={**ENVIRONMENT, "PMI_SIZE": "2", "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    assert process.returncode == 1 and "pip install 'xlstm_distill[mpi]'" in process.stderr


def test_one_process_never_imports_mpi4py(alone, root):
    """Also where it is installed; a finished run goes through all stages."""
    code = (
        "import sys; from xlstm_distill.cli import main; "
        f"assert main(['run', {str(root / 'tree.yaml')!r}, '--out', {str(alone)!r}]) == 0; "
        "assert 'mpi4py' not in sys.modules"
    )
    before = results(alone)
    process = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert results(alone) == before
