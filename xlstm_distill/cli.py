"""The command `xlstm-distill`.

Results go to stdout, progress and errors to stderr. An error is one line; the exit status is 2 for
wrong use, 1 for failure, 130 after Ctrl-C. `--json` prints one JSON object on stdout and no more.
Of the ranks of a job (communicator.py) the first prints; one that fails ends the job.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from . import commands
from .bench import SUITES
from .communicator import ALONE, Communicator, world
from .errors import UserError

Arguments = argparse.Namespace

_GRACE = 10.0
"""Seconds that a failing rank leaves to the first one: where all fail alike, the first saves what
there is to save, and its message is the only one."""


class _Parser(argparse.ArgumentParser):
    """One line for wrong use; the usage is in --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(prog="xlstm-distill", description="Distil a transformer into a hybrid xLSTM.")
    top.add_argument("--version", action="version", version=f"xlstm-distill {_version()}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, help_: str, work: Callable[[Arguments], Any]) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=help_, description=help_)
        p.set_defaults(work=work)
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return p

    _add_runs(add)
    _add_models(add)
    _add_evaluation(add)
    return top


def _number(kind: type, expected: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """The type of an option: a number for which `holds`, which `expected` says in words."""

    def number(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    number.__name__ = kind.__name__  # in the parser's message where the text is none
    return number


_COUNT = _number(int, "at least 1", lambda n: n >= 1)
_COUNT_OR_NONE = _number(int, "at least 0", lambda n: n >= 0)
_WINDOW = _number(int, "at least 2", lambda n: n >= 2)
_SEED = _number(int, "0 to 2^63 - 1", lambda n: 0 <= n < 1 << 63)
_PORT = _number(int, "0 to 65535", lambda n: 0 <= n < 1 << 16)
_DURATION = _number(float, "more than 0", lambda x: 0 < x < math.inf)
_FROM_ZERO = _number(float, "0 or more", lambda x: 0 <= x < math.inf)
_SHARE = _number(float, "more than 0 and at most 1", lambda x: 0 < x <= 1)

_RECIPE = "a YAML file, or the name of a shipped one (`xlstm-distill recipes`)"
_Add = Callable[[str, str, Callable[[Arguments], Any]], argparse.ArgumentParser]


def _add_runs(add: _Add) -> None:
    p = add("quickstart", "the whole method on SmolLM2-135M, with report", commands.quickstart)
    p.add_argument("--out", default="runs/quickstart", help="run directory (%(default)s)")
    p.add_argument("--minutes", type=_DURATION, help="the budget (30); fixed when the run begins")
    p = add("fetch", "fetch a model or request sets", commands.fetch)
    p.add_argument("name", help="smollm2-135m-instruct, olmes or hf:ORG/REPO")
    p.add_argument("--to", help="directory (default: the cache)")

    def stage(name: str, help_: str) -> None:
        p = add(name, help_, commands.run)
        p.add_argument("recipe", help=_RECIPE)
        p.add_argument("--out", required=True, help="run directory")
        p.add_argument(
            "--from",
            dest="source",
            metavar="RUN",
            help="take over the finished stages of another run whose keys agree",
        )
        p.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key"
        )

    stage("run", "all stages of a recipe; again to continue")
    stage("data", "the stage data of a recipe: sample, read, encode")
    stage("linearize", "a recipe up to student0")
    stage("align", "a recipe up to stage I")
    stage("targets", "a recipe up to the teacher's targets")
    stage("distill", "a recipe up to the experts")
    p = add("sweep", "a grid of recipes, tabled; again to continue", commands.sweep)
    p.add_argument("recipe", help=_RECIPE)
    p.add_argument("--out", required=True, help="directory of the runs and their table")
    p.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key; keys that change together: KEY/OTHER=V1/W1,V2/W2",
    )
    p.add_argument("--seeds", type=_COUNT, default=1, help="runs of each point (%(default)s)")
    p.add_argument(
        "--at-once",
        type=_COUNT,
        default=1,
        metavar="N",
        help="runs at the same time, each with 1/N of the threads (%(default)s)",
    )
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    p = add("recipes", "the recipes that come with the package", commands.recipes)
    p.add_argument("name", nargs="?", help="print this one")
    p = add("report", "write the report of a run again", commands.report)
    p.add_argument("run", help="run directory")
    for name, help_, work in (
        ("validate", "check a recipe", commands.validate),
        ("estimate", "time, memory and disk of a recipe on this machine", commands.estimate),
    ):
        p = add(name, help_, work)
        p.add_argument("recipe", help=_RECIPE)
        p.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key"
        )


def _add_models(add: _Add) -> None:
    model = "model directory, .gguf file or fetched name"
    p = add("inspect", "what a model is", commands.inspect)
    p.add_argument("model", help=model)
    add("doctor", "what this machine can do", commands.doctor)
    p = add("generate", "continue a prompt", commands.generate)
    p.add_argument("model", help=model)
    p.add_argument("--prompt", required=True, metavar="TEXT", help="what is to be continued")
    p.add_argument("--chat", action="store_true", help="put the prompt in the model's chat format")
    p.add_argument("--max-new-tokens", type=_COUNT, default=128, metavar="N", help="(%(default)s)")
    p.add_argument("--temperature", type=_FROM_ZERO, default=0.0, help="0 is greedy (%(default)s)")
    p.add_argument(
        "--top-p",
        type=_SHARE,
        default=1.0,
        help="the share that is drawn from (%(default)s)",
    )
    p.add_argument("--seed", type=_SEED, default=0, help="of the draws (%(default)s)")
    _dtype(p)
    p = add("serve", "an OpenAI-compatible server on loopback", commands.serve)
    p.add_argument("model", help=model)
    p.add_argument("--port", type=_PORT, default=8000, help="0: a free one (%(default)s)")
    p.add_argument(
        "--max-rows", type=_COUNT, default=64, help="prompts continued at once (%(default)s)"
    )
    _dtype(p)
    p = add("perplexity", "perplexity of text files", commands.perplexity)
    p.add_argument("model", help=model)
    p.add_argument("--data", nargs="+", required=True, metavar="FILE")
    p.add_argument("--context", type=_WINDOW, default=1024, help="tokens of a window (%(default)s)")
    _dtype(p)
    p = add("merge", "a weighted sum of experts", commands.merge)
    p.add_argument("--expert", action="append", required=True, metavar="DIR=WEIGHT")
    p.add_argument("--method", default="linear", choices=["linear"])
    p.add_argument("--out", required=True, help="model directory to write")
    p = add("export", "write a model in Hugging Face's layout", commands.export)
    p.add_argument("model", help=model)
    p.add_argument("--to", required=True, help="directory to write")


def _listed(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _add_evaluation(add: _Add) -> None:
    p = add("evaluate", "score a model on tasks; again to continue", commands.evaluate)
    p.add_argument("model", help="model directory, .gguf file or fetched name")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tasks",
        type=_listed,
        action="extend",
        help="comma-separated: squad, arc_easy:rc_0shot, mt_mbpp_*, *:mc_5shot, mmlu_stem, vt:512, "
        "perplexity:FILE",
    )
    which.add_argument("--suite", choices=list(commands.SUITES), help="tasks that go together")
    p.add_argument("--lengths", metavar="N,N", help="lengths of the suite's needle tasks, tokens")
    p.add_argument(
        "--teacher", metavar="MODEL", help="also measure fidelity to it, on passages of the tasks"
    )
    p.add_argument("--haystack", metavar="FILE", help="text to hide needles in")
    p.add_argument(
        "--max-length",
        type=_COUNT,
        metavar="N",
        help="longest input of request sets, windows of text, tokens (default: the model's)",
    )
    p.add_argument("--out", required=True, help="results file (JSON)")
    p.add_argument("--limit", type=_COUNT, help="at most so many documents a task")
    p.add_argument("--seed", type=_SEED, default=0, help="chooses the documents")
    _dtype(p)
    p = add("fidelity", "how near a student stays to its teacher", commands.fidelity)
    p.add_argument("model", help="model directory of the student")
    p.add_argument("--teacher", required=True, help="model directory, .gguf file or fetched name")
    p.add_argument("--data", nargs="+", required=True, metavar="FILE")
    p.add_argument("--context", type=_WINDOW, default=1024, help="tokens of a window (%(default)s)")
    p.add_argument("--windows", type=_COUNT, default=20, help="at most so many (%(default)s)")
    p.add_argument(
        "--continuations",
        type=_COUNT_OR_NONE,
        default=0,
        help="also let both continue the first so many windows (%(default)s)",
    )
    p.add_argument("--prompt-tokens", type=_COUNT, default=128, help="of a window (%(default)s)")
    p.add_argument("--new-tokens", type=_COUNT, default=128, help="written by both (%(default)s)")
    p.add_argument("--temperature", type=_FROM_ZERO, default=1.0, help="0 is greedy (%(default)s)")
    p.add_argument("--seed", type=_SEED, default=0, help="of what is written")
    p.add_argument("--out", help="file to write (JSON)")
    p = add("branches", "what each branch of a hybrid student carries", commands.branches)
    p.add_argument("model", help="model directory of the student")
    p.add_argument("--teacher", required=True, help="model directory, .gguf file or fetched name")
    p.add_argument("--data", nargs="+", required=True, metavar="FILE")
    p.add_argument("--context", type=_WINDOW, default=1024, help="tokens of a window (%(default)s)")
    p.add_argument("--windows", type=_COUNT, default=20, help="at most so many (%(default)s)")
    p = add("compare", "Win-and-Tie, recovery and plots of scores", commands.compare)
    file = "results file (JSON) or table (FILE.csv, FILE.csv:COLUMN)"
    p.add_argument("--teacher", required=True, metavar="FILE", help=file)
    p.add_argument(
        "--student", action="append", required=True, metavar="NAME=FILE", help="one or several"
    )

    def several(option: str, metavar: str, help_: str) -> None:
        p.add_argument(option, action="append", default=[], metavar=metavar, help=help_)

    several("--control", "NAME", "a student that is a control; the first decides what separates")
    of_tasks = "only these; comma-separated, patterns with *"
    p.add_argument("--tasks", type=_listed, action="extend", help=of_tasks)
    several("--metric", "[TASK=]METRIC[,FILTER]", "which of several metrics counts")
    several("--group", "NAME=A,B", "benchmarks with an alpha* of their own")
    several("--chance", "TASK=LEVEL", "score of guessing, in the unit of the scores")
    p.add_argument(
        "--drop-chance", action="store_true", help="leave out where the teacher is at chance"
    )
    several("--fidelity", "NAME=FILE", "a student's fidelity, where it is not beside its results")
    several("--model", "NAME=MODEL", "a student's or the teacher's, for the cost of a token")
    p.add_argument("--margin", help="tolerance of non-inferiority, chosen before looking")
    p.add_argument(
        "--strict", action="store_true", help="fail where something was measured otherwise"
    )
    p.add_argument("--seed", type=_SEED, default=0, help="of the bootstrap (%(default)s)")
    p.add_argument("--out", required=True, help="directory to write")
    p = add("lm-eval", "lm-evaluation-harness with a model of ours", commands.lm_eval)
    _dtype(p)
    p.add_argument("model", help="model directory, .gguf file or fetched name")
    p.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="those of `lm-eval run`, such as --tasks arc_easy --limit 100",
    )
    p = add("bench", "speed of the core on this machine", commands.bench)
    p.add_argument("suite", nargs="*", help="any of " + ", ".join(SUITES) + " (all)")
    p.add_argument("--seconds", type=_DURATION, default=1.0, help="seconds a case")
    p.add_argument(
        "--chart", metavar="FILE", help="cost against context: a plot (.svg, .png, .pdf)"
    )


def _dtype(p: argparse.ArgumentParser) -> None:
    names = ["f32", "bf16", "int8", "float32", "bfloat16", "auto"]
    p.add_argument(
        "--dtype", default="f32", choices=names, help="format of the weights (auto: f32)"
    )


def _version() -> str:
    try:
        return version("xlstm_distill")
    except PackageNotFoundError:
        return "(not installed)"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value)} is not JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character it does not know ends no command
        sys.stdout.reconfigure(errors="replace")
    arguments = parser().parse_args(argv)
    comm = ALONE
    try:
        comm = world()
        if comm.size > 1 and arguments.work is not commands.run:
            message = f"{arguments.command} runs in one process, here are {comm.size}"
            raise UserError(f"{message}; start it without mpirun", usage=True)
        result = arguments.work(arguments)
        if arguments.json and comm.first:
            print(json.dumps(result, default=_plain))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(comm, str(error), 2 if error.usage else 1)
    except KeyboardInterrupt:
        return _fail(comm, "stopped; the same command continues what can be continued", 130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(comm, f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except MemoryError as error:
        return _fail(comm, f"out of memory: {error}" if str(error) else "out of memory", 1)
    except FloatingPointError as error:
        return _fail(comm, str(error), 1)
    except Exception as error:
        if comm.size == 1:
            raise
        return _fail(comm, repr(error), 1, traceback.format_exc())


def _fail(comm: Communicator, message: str, status: int, trace: str = "") -> int:
    if not comm.first:
        time.sleep(_GRACE)
        message = f"{comm.name}: {message}"
    line = " ".join(message.split())
    print(trace, end="", file=sys.stderr)
    print(f"xlstm-distill: error: {line}", file=sys.stderr, flush=True)
    comm.abort(status)
    return status
