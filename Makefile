# Set-up, tests, checks and benchmarks. Everything runs in the virtual environment $(VENV), which is
# made on first use and brought up to date only when pyproject.toml, setup.py or csrc/ changed.
#
#   VENV=.venv   PYTHON=python3 (3.11 or newer)   OUT=runs/quickstart   MINUTES=   SUITE=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/quickstart
MINUTES ?=
SUITE ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
C_SOURCES := $(wildcard csrc/*/*.c csrc/*/*.h)
# Formatting and type checks change between versions: these are the ones the code passes.
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5

# Tests of several processes run where Open MPI's mpirun and mpi4py are.
MPI = $(shell mpirun --version 2>/dev/null | grep -q 'Open MPI' && $(PY) -c 'from mpi4py import MPI' 2>/dev/null || echo " and not mpi")
# Pages are opened where Chromium is (apt-get install chromium).
BROWSER = $(shell command -v chromium chromium-browser google-chrome >/dev/null || echo " and not browser")
FAST = not slow and not real and not deep and not data$(MPI)
TEST = not deep and not data$(MPI)$(BROWSER)

.PHONY: help venv setup setup-test demo test fast deep asan isas lint bench bench-rivals clean

help: ## this list
	@echo "xlstm_distill: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@echo "variables: VENV=.venv PYTHON=python3 MINUTES= OUT=runs/quickstart SUITE=gemm|mlstm|attention|train|prefill|decode|context|merge"

# ---- set-up --------------------------------------------------------------------------------------

# What to install is Debian's names for what is missing, all in one line.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is missing or older than 3.11: name a newer one, make PYTHON=python3.12 ..." >&2; exit 1; }
	@python=$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); words=""; packages=""; \
	need() { words="$$words$${words:+, }$$1"; packages="$$packages $$2"; }; \
	cc=$${CC:-cc}; program() { printf '#include <math.h>\n%s\nint main(void) { return 0; }\n' "$$2" | \
	    $$cc $$1 -x c - -o /dev/null 2>/dev/null; }; \
	if ! program "" ""; then need "a C compiler with its library" "gcc libc6-dev"; \
	elif ! program -fopenmp '#include <omp.h>'; then need "OpenMP for $$cc" \
	    "$$($$cc --version | grep -q clang && echo libomp-dev || echo gcc)"; fi; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	    need "Python's headers" "$$python-dev"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv" "$$python-venv"; \
	[ -z "$$words" ] || { echo "missing: $$words (apt-get install$$packages)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "setuptools>=68" "numpy>=2.0"
	@touch $@

# The package is installed in place: tests and commands see the working tree. When only C changed, only
# C is built.
$(VENV)/.built: $(VENV)/.made pyproject.toml setup.py $(C_SOURCES)
	@if [ $@ -nt pyproject.toml ]; then \
	    set -x; $(PY) setup.py --quiet build_ext --inplace --force; \
	else \
	    set -x; $(PY) -m pip install --quiet --no-build-isolation -e .; fi
	@touch $@

# torch first and by its exact version: what depends on it must not bring another build of it.
$(VENV)/.tested: $(VENV)/.made pyproject.toml Makefile
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --no-build-isolation -e '.[test,lint]' $(LINTERS)
	$(PY) -m pip install --quiet "mpi4py>=4" || echo "mpi4py is left out, and the tests that need it" >&2
	@touch $@ $(VENV)/.built

venv: $(VENV)/.made ## an empty virtual environment

setup: $(VENV)/.built ## build and install with what is needed at run time

setup-test: $(VENV)/.tested $(VENV)/.built ## the same with what tests and lint need (torch among it)

# ---- the demonstration ---------------------------------------------------------------------------

demo: setup ## a real transformer becomes a hybrid xLSTM student, with a report (MINUTES=30 OUT=runs/quickstart)
	$(BIN)/xlstm-distill quickstart --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES))

# ---- tests ---------------------------------------------------------------------------------------

test: setup-test ## everything but deep tests; 10 to 20 minutes on 2 cores
	$(PY) -m pytest -m "$(TEST)" --durations=10

fast: setup-test ## the mathematics on small sizes; under a minute
	$(PY) -m pytest -q -m "$(FAST)"

isas: setup-test ## the fast tests with every instruction set of this processor
	for isa in $$($(PY) -c 'from xlstm_distill import runtime; print(*runtime.available_isas())'); do \
	    echo "instruction set $$isa"; XLSTM_DISTILL_ISA=$$isa $(PY) -m pytest -q -m "$(FAST)"; done

# The sanitizers are linked into our modules only, so they are loaded before Python. Leaks are not
# looked for: the interpreter keeps memory on purpose. pytest is called as a script: `python -m`
# would put the working tree, with the ordinary build, before the instrumented one.
ASAN := build/asan
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

$(ASAN)/.built: $(C_SOURCES) pyproject.toml setup.py $(wildcard xlstm_distill/*.py xlstm_distill/*/*.py)
	rm -rf $(ASAN)/lib
	XLSTM_DISTILL_CFLAGS="$(SANITIZE) -O1" XLSTM_DISTILL_LDFLAGS="$(SANITIZE)" \
	    $(PY) setup.py --quiet build --build-base $(ASAN) --build-lib $(ASAN)/lib
	cd $(ASAN) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 \
	    PYTHONPATH=lib $(abspath $(PY)) -c 'from xlstm_distill import runtime as r; assert "asan" in r.__file__, r.__file__'
	@touch $@

asan: setup-test $(ASAN)/.built ## the fast tests under AddressSanitizer and UBSan
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(ASAN)/lib \
	    $(BIN)/pytest -q -m "$(FAST)"

deep: isas asan ## deep tests, more examples of properties, the fast tests on every instruction set and sanitised
	HYPOTHESIS_PROFILE=deep $(PY) -m pytest -m "deep or hypothesis"

# ---- checks --------------------------------------------------------------------------------------

lint: setup-test ## ruff, mypy, clang-format, all C with warnings as errors (gcc and clang)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)
	@command -v clang >/dev/null || { echo "lint needs clang as the second compiler: apt-get install clang libomp-dev" >&2; exit 1; }
	for cc in gcc clang; do \
	    CC=$$cc XLSTM_DISTILL_CFLAGS="-Werror $$([ $$cc = gcc ] || echo -Werror=ignored-attributes)" \
	    $(PY) setup.py --quiet build_ext --build-temp build/lint-$$cc --build-lib build/lint-$$cc/lib; done

# ---- benchmarks ----------------------------------------------------------------------------------

bench: setup ## speed of the core, with shares of this machine's own peaks (SUITE=)
	@mkdir -p runs/bench
	$(BIN)/xlstm-distill bench $(SUITE) --json > runs/bench/core.json
	@$(PY) -c 'import json; from xlstm_distill import bench; \
	    print(*bench.lines(json.load(open("runs/bench/core.json"))), sep="\n")'

# llama-cpp-python is built from source: where that fails, its column is left out.
bench-rivals: setup-test ## the same beside torch, transformers, mlstm-kernels and llama.cpp (SUITE=)
	$(PY) -m pip install --quiet "llama-cpp-python>=0.3" || echo "llama-cpp-python is left out" >&2
	$(PY) benchmarks/bench.py $(SUITE) --out runs/bench

clean: ## remove what was built, not the virtual environment and not runs/
	rm -rf build dist *.egg-info xlstm_distill/*.so
	rm -f $(VENV)/.built $(VENV)/.tested
