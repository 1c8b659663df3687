"""Directories and files that appear whole or not at all, and the lock of what one process holds.

The new contents are written under a temporary name beside the target, synced to disk and put in
place by one rename. A kill or a full disk at any moment leaves the old directory as it was; what a
killed writer left under its temporary name is removed by the next writer of the same target.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_directory(target: Path | str, marker: str) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` when the block ends without an exception.

    An existing `target` is replaced as a whole, but only if it is empty or holds the file
    `marker`, which shows that it is of the same kind: nobody's other files are deleted. An OSError
    inside the block (a full disk) or in putting it in place becomes a `UserError`; the temporary
    directory is removed and `target` is untouched.
    """
    place = Path(os.path.realpath(target))
    _refuse_foreign(place, marker)
    work = place.with_name(f".{place.name}.tmp-{secrets.token_hex(8)}")
    lock = -1
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        work.mkdir()
        # Held while this process lives: tells work in progress from leftovers.
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield work
        _sync_tree(work)
        _put_in_place(work, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{target}: cannot write: {reason}; nothing was changed") from error
    finally:
        # After an exchange this name holds the old contents, after a failure the unfinished ones.
        shutil.rmtree(work, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _remove_leftovers(place: Path) -> None:
    """Remove what killed writers of `place` left: temporary directories that nobody holds."""
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.tmp-*"):
        # A name without contents may be a writer that is just starting; it costs nothing.
        if not leftover.is_dir() or not any(leftover.iterdir()):
            continue
        handle = os.open(leftover, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(handle)


def _refuse_foreign(place: Path, marker: str) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        raise UserError(f"{place}: exists and is not a directory; choose another place")
    if any(place.iterdir()) and not (place / marker).is_file():
        raise UserError(
            f"{place}: exists and holds other files (no {marker}); choose another place"
        )


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(work: Path, place: Path) -> None:
    if not place.exists():
        os.rename(work, place)
    elif not _exchange(work, place):
        # No atomic exchange on this file system: keep the old contents until the new ones stand.
        old = place.with_name(f".{place.name}.old-{secrets.token_hex(8)}")
        os.rename(place, old)
        try:
            os.rename(work, place)
        except OSError:
            os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(place.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where that is not available."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    status: int = rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return status == 0


@contextmanager
def atomic_file(target: Path | str) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `target` when the block ends without an exception.

    A reader sees the old contents or the new ones, never a part. An OSError inside the block or in
    putting the file in place (a full disk) becomes a `UserError` that names `target`, which is then
    untouched. One writer per target at a time: the temporary name is fixed, so that what a killed
    writer left is simply written over.
    """
    place = Path(os.path.realpath(target))
    work = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with work.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(work, place)
        _sync(place.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{target}: cannot write: {reason}; nothing was changed") from error
    finally:
        with suppress(OSError):  # a disk that became read-only; the first error says so
            work.unlink()


def lock(handle: int, place: Path) -> None:
    """Keep the file or directory that `handle` is open on to this process until the handle is
    closed, which a kill does as well.

    Raises UserError, which names `place`, and closes the handle, if another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        # Some network file systems have none.
        reason = f"no file locks here ({error.strerror}); choose another --out"
        if isinstance(error, BlockingIOError):
            reason = "another process is working here; wait for it or choose another --out"
        raise UserError(f"{place}: {reason}") from None


def write_text(target: Path | str, text: str) -> None:
    """Write a UTF-8 text file with `atomic_file`."""
    with atomic_file(target) as handle:
        handle.write(text.encode("utf-8"))


def sha256_of(path: Path | str) -> str:
    """sha256 of a file's bytes as hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
