"""Trackers: every step of log.jsonl once, whatever was stopped; nothing where a package is missing.

TensorBoard's event files and the files of offline runs of Weights & Biases are read back. Where
wandb would go online a small module stands in its place.
"""

from __future__ import annotations

import errno
import importlib.machinery
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from xlstm_distill import trackers
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.progress import Reporter
from xlstm_distill.recipe import Recipe, make_recipe
from xlstm_distill.run import Run, run
from xlstm_distill.rundir import Interrupt, RunDirectory
from xlstm_distill.trackers import TensorBoard, scalars

STAGES = ("sample general 0", "sample general 1", "align", "targets general", "targets notes")
STAGES += ("distill general", "distill notes")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    tiny_run.teacher().save(root / "teacher")
    text = tiny_run.write_text(root / "text")
    return tiny_run.recipe(root / "teacher", text)


def stopped_and_continued(recipe: Recipe, out: Path) -> None:
    """A run up to stage II that stops twice, the first time as a kill would leave it."""
    for title, step in (("stage I: align", 4), ("stage II: expert notes", 3)):
        interrupt = Interrupt()

        class Stops(Reporter):
            def follow(self, lines: Any, titles: Any) -> Any:
                for stage, m in super().follow(lines, titles):
                    interrupt.asked = (titles[stage], m.get("step")) == self.moment  # noqa: B023
                    yield stage, m

        reporter = Stops(quiet=True)
        reporter.moment = (title, step)
        with RunDirectory(out) as directory, pytest.raises(KeyboardInterrupt):
            Run(directory, directory.begin(recipe), reporter, interrupt).execute("distill")
        if title == "stage I: align":  # without its state: all steps are done again
            (out / "aligned.state" / "state.npz").unlink()
    run(recipe, out, until="distill")


# ---- TensorBoard --------------------------------------------------------------------------------


def events(folder: Path) -> list[Any]:
    """The events of the one file in a folder: records of length, checksum, bytes, checksum."""
    pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = folder.glob("events.out.tfevents.*")
    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        found.append(pb2.Event.FromString(content[at + 12 : at + 12 + size]))
        at += 12 + size + 4
    return [e for e in found if e.HasField("summary")]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) in the order of the file."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_each_step_of_the_log_once(values, tmp_path):
    out = tmp_path / "out"
    stopped_and_continued(make_recipe({**values, "trackers": ["tensorboard"]}), out)
    with RunDirectory(out) as directory:
        lines = [x for x in directory.read_log() if x["stage"] == "align" and "step" in x]
        assert len(lines) == 4 + 6  # four were done twice
        for stage in STAGES:
            steps = directory.steps(stage)
            found = shown(out.joinpath("tensorboard", *stage.split()))
            expected: dict[str, list[tuple[int, float]]] = {}
            for m in steps:
                for key, value in scalars(m):
                    expected.setdefault(key, []).append((m["step"], value))
            assert set(found) == set(expected) and steps
            for key, own in expected.items():
                assert [s for s, _ in found[key]] == [s for s, _ in own]
                if key not in ("seconds", "tokens_per_second"):
                    # Event files hold float32: half a unit in the last of 24 bits.
                    assert [v for _, v in found[key]] == pytest.approx(
                        [v for _, v in own], rel=2**-24, abs=0
                    )
    assert {"loss", "lr", "layers/00", "layers/01"} <= set(shown(out / "tensorboard" / "align"))
    again = {f: f.read_bytes() for f in (out / "tensorboard").rglob("events*")}
    run(make_recipe({**values, "trackers": ["tensorboard"]}), out, until="distill")
    assert again == {f: f.read_bytes() for f in (out / "tensorboard").rglob("events*")}


def test_half_an_event_file_is_replaced(tmp_path):
    folder = tmp_path / "tensorboard" / "align"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    logged = [
        {"step": n, "loss": float(n), "time": 100.0 + n, "stage": "align"} for n in range(1, 6)
    ]
    board = TensorBoard(tmp_path)
    board.begin("align", logged, 4)  # steps 4 and 5 are done again
    for n in (4, 5, 6):
        board.step("align", {"step": n, "steps": 6, "loss": float(n)})
    board.end("align")
    assert shown(folder) == {"loss": [(n, float(n)) for n in range(1, 7)]}
    assert [e.wall_time for e in events(folder)][:3] == [101.0, 102.0, 103.0]
    assert (folder / "notes.txt").exists()


def test_a_full_disk_ends_a_run_that_has_event_files(values, tmp_path, monkeypatch):
    def full(handle):
        if "tensorboard" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    sync = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    recipe = make_recipe({**values, "trackers": ["tensorboard"]})
    with pytest.raises(UserError, match=r"trackers: tensorboard: .*cannot write: No space left"):
        run(recipe, tmp_path / "out", until="data")


def test_tensorboard_does_not_bring_torch():
    code = (
        "import sys; from pathlib import Path; from xlstm_distill.trackers import TensorBoard\n"
        "board = TensorBoard(Path(sys.argv[1])); board.begin('align', [], 1)\n"
        "board.end('align'); assert 'torch' not in sys.modules and 'tensorboardX' in sys.modules"
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, folder], check=True)


def test_trackers_change_no_bit_of_a_result(values, tmp_path):
    for name in ("with", "without"):
        chosen = ["tensorboard"] if name == "with" else []
        recipe = make_recipe({**values, "trackers": chosen})
        run(recipe, tmp_path / name, until="align")
    a, b = (tmp_path / n / "aligned" / "model.safetensors" for n in ("with", "without"))
    assert a.read_bytes() == b.read_bytes()
    assert not (tmp_path / "without" / "tensorboard").exists()


# ---- Weights & Biases ---------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real wandb as one finds it who set nothing."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    wandb = importlib.import_module("wandb")
    yield
    wandb.teardown()  # its service, and the settings of the process


def sent(part: Path) -> Iterator[Any]:
    """The records that wandb keeps of an offline run: LevelDB's log format behind 7 bytes, in
    blocks of 32 KiB; a record may come in several parts."""
    pb2 = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = part.glob("run-*.wandb")
    content, record, at = file.read_bytes(), b"", 7
    while at < len(content):
        if (rest := -at % (1 << 15)) < 7:
            at += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record, at = record + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield pb2.Record.FromString(record)
            record = b""


def test_wandb_has_each_step_of_the_log_once(values, tmp_path, offline, monkeypatch):
    out = tmp_path / "out"
    close = trackers.Wandb.close

    def closed(tracker: trackers.Wandb) -> None:
        close(tracker)
        time.sleep(1)  # parts are named by the second; a command takes longer to start

    monkeypatch.setattr(trackers.Wandb, "close", closed)
    stopped_and_continued(make_recipe({**values, "trackers": ["wandb"]}), out)
    parts = sorted(out.glob("wandb/offline-run-*"))
    records = [record for part in parts for record in sent(part)]
    runs = [r.run for r in records if r.HasField("run")]
    assert len(parts) == 3 and {r.run_id for r in runs} == {(out / "wandb/run-id").read_text()}
    for r in runs:
        assert (r.project, r.display_name) == ("xlstm_distill", "tiny: out")
        assert {c.key: c.value_json for c in r.config.update}["seed"] == "3"
    lines = []
    for r in (r.history for r in records if r.HasField("history")):
        line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.item}
        lines.append({key: value for key, value in line.items() if key[0] != "_"})  # not its own
    with RunDirectory(out) as directory:
        for stage in STAGES:
            group = "/".join(stage.split())
            expected = [
                {f"{group}/{key}": value for key, value in [("step", m["step"]), *scalars(m)]}
                for m in directory.steps(stage)
            ]
            found = [line for line in lines if f"{group}/step" in line]
            for line in [*expected, *found]:  # steps that were done twice took other times
                for key in ("seconds", "tokens_per_second"):
                    line.pop(f"{group}/{key}", None)
            assert found == expected and expected, stage
    assert any("align/layers/01" in line and "align/loss" in line for line in lines)
    defined = {(m.name or m.glob_name, m.step_metric) for m in (r.metric for r in records)}
    assert {("align/step", ""), ("distill/notes/*", "distill/notes/step")} <= defined
    run(make_recipe({**values, "trackers": ["wandb"]}), out, until="distill")
    assert len([*out.glob("wandb/offline-run-*")]) == 3  # nothing was left to show


def test_wandb_asks_for_no_host(tmp_path, offline):
    """Nor does the package's own telemetry, which goes by other settings than the run's."""
    code = (
        "import socket, sys; from pathlib import Path\n"
        "socket.getaddrinfo = lambda host, *_, **__: print('asked for', host, flush=True)\n"
        "from xlstm_distill.trackers import Wandb\n"
        "tracker = Wandb(Path(sys.argv[1]), 'title', {}); tracker.begin('align', [], 1)\n"
        "tracker.step('align', {'step': 1, 'loss': 2.0}); tracker.end('align'); tracker.close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "asked for" not in done.stdout and [*tmp_path.glob("wandb/offline-run-*")]


def test_what_is_no_mode_of_wandb_is_one_line(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match=r"trackers: wandb: .*'onlin'"):
        trackers.Wandb(tmp_path, "title", {})


@pytest.fixture
def wandb(monkeypatch):
    """What a module in wandb's place is asked to open."""
    asked: list[dict[str, Any]] = []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Error = type("Error", (Exception,), {})
    module.Settings = dict
    module.setup = lambda settings: None
    module.init = lambda **settings: asked.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "online")
    return asked


def test_wandb_goes_online_where_it_is_told_to(tmp_path, wandb):
    trackers.Wandb(tmp_path, "title", {})
    assert wandb[0]["mode"] == "online" and wandb[0]["resume"] == "allow"


def test_wandb_that_does_not_open_is_one_line(tmp_path, wandb, monkeypatch):
    def refuses(**_: Any) -> None:
        raise sys.modules["wandb"].Error("no network\n  at all")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    with pytest.raises(UserError, match="trackers: wandb: no network at all"):
        trackers.Wandb(tmp_path, "title", {})


# ---- packages that are missing ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
@pytest.mark.parametrize("command", [["run"], ["sweep", "--vary", "align.lr=0.1,0.2"]])
def test_a_missing_package_is_named_before_work_starts(
    values, tmp_path, capsys, monkeypatch, name, module, command
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == module else find(n))
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump({**values, "trackers": [name]}))
    assert main([*command, str(recipe), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install 'xlstm_distill[{name}]'" in line and "trackers: " in line
    assert not out.exists()


def test_an_unknown_tracker_is_named(values):
    with pytest.raises(UserError, match=r"trackers\.0: .*found 'mlflow'"):
        make_recipe({**values, "trackers": ["mlflow"]})


def test_layers_that_do_not_train_have_no_curve():
    metrics = {"step": 3, "loss": 2, "layers": [None, 0.5, None, 0.25]}
    assert [*scalars(metrics)] == [("loss", 2.0), ("layers/01", 0.5), ("layers/03", 0.25)]
