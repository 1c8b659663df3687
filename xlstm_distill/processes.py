"""Runs in processes of their own, so that several go on at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from . import runtime
from .rundir import RECIPE

_PROGRAM = (
    "import sys; from xlstm_distill import cli, processes; "
    "processes.end_with_parent(); sys.exit(cli.main())"
)
_ERROR = "xlstm-distill: error: "
_STOPPED = (130, -signal.SIGTERM)
"""Exit statuses of a run that was asked to stop; the second before it could listen."""

_LAST_LINES = 5.0
"""Seconds to wait for what a process that has ended still had to say. What it has left behind, a
tracker's service say, may hold the pipe open."""


def end_with_parent() -> None:
    """End this process at once, unsaved, when the one that started it is gone: what the standard
    input comes from is closed then, also by a kill. A sweep that goes on after a kill finds no run
    at work."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class RunProcess:
    """A process that goes on with a run directory that has begun.

    command: "run" or the stage that it ends with; threads: of its core; say: called with each line
    that it says, from a thread of its own. It computes with this process's instruction set.
    """

    def __init__(self, place: Path, command: str, threads: int, say: Callable[[str], None]) -> None:
        self._lines: deque[str] = deque(maxlen=40)
        self._say = say
        chosen = {"XLSTM_DISTILL_THREADS": str(threads), "XLSTM_DISTILL_ISA": runtime.isa()}
        # They would make it draw bars into the pipe.
        terminal = ("FORCE_COLOR", "TTY_COMPATIBLE")
        inherited = {name: v for name, v in os.environ.items() if name not in terminal}
        arguments = [command, str(place / RECIPE), "--out", str(place)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            env={**inherited, **chosen},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C on the terminal is for this process, which passes it on once: two of them
            # would end a run unsaved.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if line.strip():
                    self._lines.append(line.rstrip())
                    self._say(line.strip())

    @property
    def ended(self) -> bool:
        """True once it is over."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to end at the next safe place and to save."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it now if it is not over, and release what it held here."""
        self._process.kill()
        self._process.wait()
        self._reader.join(_LAST_LINES)
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def stopped(self) -> bool:
        """True if it ended because it was asked to."""
        return self._process.returncode in _STOPPED

    @property
    def failure(self) -> str:
        """Why it failed, in a line; empty if it did not, or is not over."""
        status, last = self._process.returncode, self._lines[-1] if self._lines else ""
        if not status:
            return ""
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        return last.removeprefix(_ERROR) or f"exit status {status}"

    @property
    def trace(self) -> str:
        """The last lines that it said, where it ended with a defect and not with an error line."""
        status, lines = self._process.returncode, self._lines
        told = bool(lines) and lines[-1].startswith(_ERROR)
        return "" if told or not status or status < 0 else "\n".join(lines)
