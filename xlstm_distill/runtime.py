"""Which core runs, on how many threads, with which instruction set.

The C sources are built twice (csrc/base/real.h): `_core_f32` does the work, `_core_f64` exists for
sharp gradient checks. Everything else in the package asks `core(dtype)` and never names a module.

Environment: ``XLSTM_DISTILL_THREADS``, or else ``OMP_NUM_THREADS``, and ``XLSTM_DISTILL_ISA``
override what is chosen; ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` how threads wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from .errors import UserError


@contextmanager
def _short_spins() -> Iterator[None]:
    """Let threads that wait for others spin for about a quarter of a millisecond, then sleep.

    libgomp's own value is thirty times that where there are as many threads as processors, and
    then two programs like this one spin each other's time slices away: side by side on two cores a
    forward pass of 128 tokens took 0.9 to 3.9 s, with this value 0.6 to 0.8, and alone 0.27 either
    way (docs/speed.md). libgomp reads the variable once, when it is loaded with the core; then it
    is taken back, so that programs that are started from here and other OpenMP runtimes of the
    process keep their own.
    """
    if any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


with _short_spins():
    import xlstm_distill._core_f32 as _core_f32
    import xlstm_distill._core_f64 as _core_f64

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "generic")


@cache
def _modules() -> tuple[ModuleType, ...]:
    """Both modules, set up by the environment at the first use: a wrong value there is an error of
    that use, which a command tells in a line, not one of the import."""
    modules = (_core_f32, _core_f64)
    number, kernels = threads_by(), os.environ.get("XLSTM_DISTILL_ISA")
    for module in modules:
        if number is None:
            module.set_threads(len(os.sched_getaffinity(0)))
        else:
            value = os.environ[number]
            try:
                module.set_threads(int(value.split(",")[0]))
            except (ValueError, OverflowError):
                wanted = "expected a number of threads, 1 to 4096"
                raise UserError(f"{number} is {value!r}, {wanted}", usage=True) from None
        try:
            if kernels:
                module.set_isa(kernels)
        except ValueError:
            wanted = f"expected one of {', '.join(ISAS)} that this processor has"
            raise UserError(f"XLSTM_DISTILL_ISA is {kernels!r}, {wanted}", usage=True) from None
    return modules


def core(dtype: Any = np.float32) -> Any:
    """The extension module for a dtype: float64 → `_core_f64`, float32 → `_core_f32`."""
    _modules()
    kind = np.dtype(dtype)
    if kind == np.float32:
        return _core_f32
    if kind == np.float64:
        return _core_f64
    raise TypeError(f"dtype {kind} is not supported: float32 or float64")


def set_threads(n: int) -> None:
    """Number of threads of every later call (results do not depend on it, bit for bit)."""
    for module in _modules():
        module.set_threads(n)


def threads() -> int:
    """Number of threads in use."""
    return int(_modules()[0].threads())


def set_isa(name: str) -> None:
    """Choose the kernels, one of `ISAS`; ValueError if the CPU lacks the instructions."""
    for module in _modules():
        module.set_isa(name)


def isa() -> str:
    """Instruction set in use."""
    return str(_modules()[0].isa())


def available_isas() -> list[str]:
    """Instruction sets that this processor can run, best first."""
    before, found = isa(), []
    for name in ISAS:
        try:
            set_isa(name)
        except ValueError:
            continue
        found.append(name)
    set_isa(before)
    return found


def cpu_name() -> str:
    """Model name of the processor as the operating system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def threads_by() -> str | None:
    """The variable of the environment that sets the number of threads; None: the processors that
    this process may use. Of nested numbers in OMP_NUM_THREADS ("8,2") the first counts."""
    names = ("XLSTM_DISTILL_THREADS", "OMP_NUM_THREADS")
    return next((name for name in names if os.environ.get(name)), None)


# libgomp's threads do not survive a fork: a child that used them would hang.
os.register_at_fork(after_in_child=lambda: set_threads(1))
