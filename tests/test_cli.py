"""The command: one JSON object, one line for errors, exit statuses."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import yaml

import xlstm_distill.cli
from xlstm_distill.cli import main, parser
from xlstm_distill.errors import UserError

PACKAGE = str(Path(xlstm_distill.cli.__file__).parent.parent)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    tiny_run.teacher().save(place / "teacher")
    text = tiny_run.write_text(place / "text")
    values = tiny_run.recipe(place / "teacher", text)
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place


def call(capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out = capsys.readouterr()
    return status, out.out, out.err


def fails(capsys, status, message, *arguments):
    """The command ends with `status` and one line of stderr that has `message`, and no output."""
    found, out, err = call(capsys, *arguments)
    assert (found, out) == (status, ""), err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("xlstm-distill"), err
    assert message in lines[0]


_PAIR = "s --teacher t --data d"


@pytest.mark.parametrize(
    ("command", "option", "expected"),
    [
        ("quickstart", "--minutes nan", "more than 0"),
        ("sweep r --out o", "--seeds 0", "at least 1"),
        ("sweep r --out o", "--at-once -1", "at least 1"),
        ("generate m --prompt p", "--max-new-tokens 0", "at least 1"),
        ("generate m --prompt p", "--temperature nan", "0 or more"),
        ("generate m --prompt p", "--top-p 1.5", "more than 0 and at most 1"),
        ("generate m --prompt p", "--seed 9223372036854775808", "0 to 2^63 - 1"),
        ("serve m", "--port 65536", "0 to 65535"),
        ("serve m", "--port -1", "0 to 65535"),
        ("serve m", "--max-rows 0", "at least 1"),
        ("perplexity m --data d", "--context 1", "at least 2"),
        ("evaluate m --tasks vt:512 --out o", "--limit 0", "at least 1"),
        ("evaluate m --tasks vt:512 --out o", "--max-length 0", "at least 1"),
        ("evaluate m --tasks vt:512 --out o", "--seed -1", "0 to 2^63 - 1"),
        (f"fidelity {_PAIR}", "--context 1", "at least 2"),
        (f"fidelity {_PAIR}", "--continuations -1", "at least 0"),
        (f"fidelity {_PAIR}", "--prompt-tokens 0", "at least 1"),
        (f"fidelity {_PAIR}", "--new-tokens 0", "at least 1"),
        (f"fidelity {_PAIR}", "--temperature -0.5", "0 or more"),
        (f"fidelity {_PAIR}", "--seed -1", "0 to 2^63 - 1"),
        (f"branches {_PAIR}", "--windows 0", "at least 1"),
        ("compare --teacher t --student s=f --out o", "--seed -1", "0 to 2^63 - 1"),
        ("bench", "--seconds inf", "more than 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_parser(capsys, command, option, expected):
    name, value = option.split()
    fails(
        capsys, 2, f"argument {name}: {value}: expected {expected}", *command.split(), name, value
    )


def test_every_command_has_help(capsys):
    names = parser()._subparsers._group_actions[0].choices
    wanted = (
        "quickstart fetch run sweep recipes linearize data align targets distill merge evaluate "
        "branches fidelity compare report validate estimate inspect doctor generate perplexity "
        "export bench lm-eval serve"
    )
    assert sorted(names) == sorted(wanted.split())
    for name in names:
        status, out, _ = call(capsys, name, "--help")
        assert status == 0 and "--json" in out


def test_wrong_use_is_status_2_and_one_line(capsys, root):
    fails(capsys, 2, "invalid choice", "destill")
    fails(capsys, 2, "required", "merge")
    fails(capsys, 2, "expected DIR=WEIGHT", "merge", "--expert", "a", "--out", "b")
    fails(capsys, 2, "named twice", "merge", "--expert", "a=1", "--expert", "a=0", "--out", "b")
    fails(capsys, 2, "add up to 2", "merge", "--expert", "a=1", "--expert", "b=1", "--out", "c")
    fails(capsys, 2, "NAME=FILE", "compare", "--teacher", "a", "--student", "b", "--out", "c")
    fails(capsys, 2, "no such file or directory", "inspect", root / "nothing")
    fails(capsys, 2, "unknown name", "fetch", "gpt5")
    fails(capsys, 2, "not a run directory", "report", root / "teacher")
    fails(capsys, 2, "needs the suite 'context'", "bench", "gemm", "--chart", root / "c.svg")
    fails(capsys, 2, "c.gif: expected a name in .svg", "bench", "--chart", root / "c.gif")


def test_bad_recipes_are_status_2(capsys, root, tmp_path):
    recipe = root / "recipe.yaml"
    for setting, message in (
        ("algin.steps=3", "algin: unknown key; did you mean align?"),
        ("student.window=0", "student.window"),
        ("align.steps=", "align.steps"),
    ):
        fails(capsys, 2, message, "validate", recipe, "--set", setting)
        fails(capsys, 2, message, "run", recipe, "--out", tmp_path / "r", "--set", setting)
    assert not (tmp_path / "r").exists()


def test_failures_are_status_1_and_one_line(capsys, root, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    fails(
        capsys,
        1,
        "empty.txt: the file is empty",
        *("perplexity", root / "teacher", "--data", empty),
    )
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    fails(capsys, 1, "broken.gguf", "inspect", broken)
    broken.write_bytes(b"nope")
    fails(capsys, 1, "not a GGUF file", "inspect", broken)
    path = ["--set", f"data.domains.notes.sources.0.paths=[{empty}]"]
    fails_after_progress(capsys, "empty.txt: the file is empty", root, tmp_path / "r1", path)
    path = ["--set", "data.length=100000"]
    fails_after_progress(capsys, "fewer than one row of 100000", root, tmp_path / "r2", path)


def fails_after_progress(capsys, message, root, out, more):
    status, stdout, err = call(capsys, "data", root / "recipe.yaml", "--out", out, *more)
    assert status == 1 and stdout == "" and message in err.splitlines()[-1]


def test_nan_in_a_checkpoint(capsys, tmp_path):
    teacher = tiny_run.teacher()
    teacher.params["model.norm.weight"][3] = np.nan
    teacher.save(tmp_path / "m")
    fails(capsys, 1, "model.norm.weight", "generate", tmp_path / "m", "--prompt", "a")


def test_token_id_out_of_range():
    with pytest.raises(UserError, match="token id 259 is outside"):
        tiny_run.teacher().logits([[259]])


def test_disk_full_while_writing(root, tmp_path):
    """A limit on the size of files stands for a full disk: the run ends with one line."""
    command = [sys.executable, "-m", "xlstm_distill", "export", str(root / "teacher")]
    done = subprocess.run(
        [*command, "--to", str(tmp_path / "copy")],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "copy: cannot write: File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_characters_that_stdout_does_not_know_end_no_command(root):
    command = [sys.executable, "-m", "xlstm_distill", "generate", str(root / "teacher")]
    done = subprocess.run(  # a random model: what it writes is hardly ever ASCII
        [*command, "--prompt", "Hi", "--max-new-tokens", "20"],
        env={**os.environ, "PYTHONPATH": PACKAGE, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "?" in done.stdout


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"XLSTM_DISTILL_THREADS": "3", "OMP_NUM_THREADS": "2"}, 3),
        ({"XLSTM_DISTILL_THREADS": "", "OMP_NUM_THREADS": "2,1"}, 2),
    ],
)
def test_threads_of_the_environment(variables, threads):
    """The package's own variable counts before the one of OpenMP, and nothing else before both."""
    program = "from xlstm_distill import runtime; print(runtime.threads(), runtime.threads_by())"
    environment = {**os.environ, "PYTHONPATH": PACKAGE, **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(threads), next(k for k, v in variables.items() if v)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XLSTM_DISTILL_THREADS", "two"),
        ("XLSTM_DISTILL_THREADS", "0"),
        ("OMP_NUM_THREADS", str(10**30)),
        ("XLSTM_DISTILL_ISA", "sse"),
    ],
)
def test_a_wrong_variable_is_one_line(name, value):
    plain = {k: v for k, v in os.environ.items() if k != "XLSTM_DISTILL_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "xlstm_distill", "doctor"],
        env={**plain, "PYTHONPATH": PACKAGE, name: value},
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stderr.splitlines() if line and not line.startswith("libgomp")]
    assert (done.returncode, len(told)) == (2, 1)
    assert told[0].startswith(f"xlstm-distill: error: {name} is '{value}', expected ")


def test_commands_that_draw_nothing_do_not_wait_for_matplotlib():
    program = "import sys, xlstm_distill.cli; print('matplotlib' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("variables", [{}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_threads_wait_is_the_users(variables):
    """The core is loaded with short spins where nobody asked for others, and the environment, which
    programs inherit that are started from here, is as before."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    program = (
        "import os, xlstm_distill.runtime\n"
        f"print({{n: os.environ[n] for n in {names} if n in os.environ}})"
    )
    plain = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**plain, "PYTHONPATH": PACKAGE, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(variables)
    if "GOMP_SPINCOUNT = " in done.stderr:  # libgomp says what it read; other runtimes do not
        wanted = variables.get("GOMP_SPINCOUNT", "10000")
        assert ("OMP_WAIT_POLICY" in variables) or f"GOMP_SPINCOUNT = '{wanted}'" in done.stderr


def json_of(capsys, *arguments):
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_of_small_commands(capsys, root, tmp_path):
    teacher = root / "teacher"
    found = json_of(capsys, "inspect", teacher)
    assert found["layers"] == 2 and found["mixers"] == {"attention": 2} and not found["student"]
    assert json_of(capsys, "doctor")["threads"]
    found = json_of(capsys, "generate", teacher, "--prompt", "The river", "--max-new-tokens", "4")
    assert isinstance(found["text"], str) and found["prompt_tokens"] == 9
    arguments = ["--prompt", "a", "--chat", "--temperature", "1", "--seed", "5"]
    arguments += ["--max-new-tokens", "8"]
    twice = [json_of(capsys, "generate", teacher, *arguments)["text"] for _ in range(2)]
    assert twice[0] == twice[1]
    assert json_of(capsys, "validate", root / "recipe.yaml")["valid"]
    out = json_of(capsys, "export", teacher, "--to", tmp_path / "copy")
    assert Path(out["out"], "model.safetensors").is_file()
    weights = f"{teacher}=0.25", f"{tmp_path / 'copy'}=0.75"
    merged = json_of(
        capsys, *("merge", "--expert", weights[0], "--expert", weights[1]), "--out", tmp_path / "m"
    )
    same = json_of(capsys, "inspect", merged["out"])["fingerprint"]
    assert same == json_of(capsys, "inspect", teacher)["fingerprint"]


def test_perplexity_is_that_of_the_scores(capsys, root, tmp_path):
    teacher = tiny_run.teacher()
    file = tmp_path / "a.txt"
    text = "".join(tiny_run.TEXT)
    file.write_text(text)
    ids = [teacher.tokenizer.start_id, *teacher.tokenizer.encode(text)]
    total = 0.0
    for begin in range(0, len(ids) - 1, 50):
        end = min(begin + 50, len(ids) - 1)
        window = ids[max(0, end - 50) : end + 1]
        total -= float(teacher.score([window])[0, begin - end :].sum())
    arguments = ["perplexity", root / "teacher", "--data", file, "--context", 50]
    found = json_of(capsys, *arguments)
    assert found["tokens"] == len(ids) - 1 > 100 and found["documents"] == 1
    assert found["perplexity"] == pytest.approx(np.exp(total / (len(ids) - 1)), rel=1e-4)
    size = len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / size, rel=1e-4)
    status, out, _ = call(capsys, *arguments)
    assert status == 0 and "perplexity" in out


def test_single_stages_build_on_each_other(capsys, root, tmp_path):
    recipe, out = root / "recipe.yaml", tmp_path / "run"
    assert json_of(capsys, "linearize", recipe, "--out", out)["stage"] == "linearize"
    assert (out / "student0" / "config.json").is_file() and not (out / "aligned").exists()
    before = (out / "student0" / "model.safetensors").stat().st_mtime_ns
    json_of(capsys, "align", recipe, "--out", out)
    assert (out / "student0" / "model.safetensors").stat().st_mtime_ns == before
    fails(capsys, 1, "the run is not finished", "report", out)
    status, _, err = call(capsys, "align", recipe, "--out", out, "--set", "align.lr=0.1")
    assert status == 1 and "align.lr is 0.02 there and 0.1 here" in err
    found = json_of(capsys, "run", recipe, "--out", out)
    assert Path(found["report"]).is_file()
    assert found["main"] == "merged" and found["fidelity"]["models"]["untrained"]
    assert {c["claim"].split()[0] for c in found["claims"]} == {"KL", "on", "stage"}
    status, text, _ = call(capsys, "report", out)
    assert status == 0 and "report.html" in text
    found = json_of(capsys, "inspect", out / "merged")
    assert found["provenance"]["merge"]["experts"]


def test_interrupt_is_one_line(capsys, monkeypatch):
    def stopped(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(xlstm_distill.cli.commands, "doctor", stopped)
    status, out, err = call(capsys, "doctor")
    assert status == 130 and out == "" and len(err.splitlines()) == 1
