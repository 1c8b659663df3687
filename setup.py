"""Builds the two extension modules from one source list (see csrc/base/real.h)."""

import copy
import os
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(p) for p in Path("csrc").rglob("*.c"))
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h"))

# gnu11: -std=c11 turns fused multiply-add off in gcc. -fno-trapping-math lets gcc vectorise clamps.
# No -march, no -ffast-math: kernels name their targets, infinities and NaNs keep their meaning.
COMPILE = [
    "-std=gnu11",
    "-O3",
    "-g1",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    *os.environ.get("XLSTM_DISTILL_CFLAGS", "").split(),
]
LINK = ["-fopenmp", *os.environ.get("XLSTM_DISTILL_LDFLAGS", "").split()]


class BuildExt(build_ext):
    """Builds the modules side by side, each with its own folder for objects of the same sources."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        one = copy.copy(self)  # modules are built in threads: self is shared between them
        one.build_temp = os.path.join(self.build_temp, ext.name.rsplit(".", 1)[-1])
        super(BuildExt, one).build_extension(ext)


def core(name: str, *flags: str) -> Extension:
    return Extension(
        f"xlstm_distill.{name}",
        SOURCES,
        depends=HEADERS,
        include_dirs=["csrc", numpy.get_include()],
        extra_compile_args=[*COMPILE, *flags],
        extra_link_args=LINK,
    )


setup(
    ext_modules=[core("_core_f32"), core("_core_f64", "-DXL_REAL_F64")],
    cmdclass={"build_ext": BuildExt},
)
