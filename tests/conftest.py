"""Shared by all tests: hypothesis profiles, the option --errors, a clean runtime for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from xlstm_distill import testing

# The examples of `make test` are the same in each run: it fails for what was changed. `make deep`
# looks for new ones. A busy machine is no fault of a test.
_ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=50, derandomize=True, **_ANY_SPEED)
settings.register_profile("deep", max_examples=2000, **_ANY_SPEED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--errors",
        action="store_true",
        help="show the 40 largest measured errors as shares of their tolerances",
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--errors"):
        return
    terminalreporter.section("measured errors, per cent of the tolerance")
    for what, share in sorted(testing.shares.items(), key=lambda x: -x[1])[:40]:
        terminalreporter.write_line(f"{100 * share:8.2f} %  {what}")


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """A folder with results, fidelity and models that `compare` has been through, into `out`."""
    from pages import compare_arguments

    from xlstm_distill.cli import main

    folder = tmp_path_factory.mktemp("compared")
    assert main(compare_arguments(folder)) == 0
    return folder


@pytest.fixture
def runtime() -> Iterator[object]:
    """`xlstm_distill.runtime`, with threads and instruction set restored afterwards."""
    from xlstm_distill import runtime as module

    threads, isa = module.threads(), module.isa()
    yield module
    module.set_threads(threads)
    module.set_isa(isa)
