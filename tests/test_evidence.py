"""What a comparison shows beside scores: needles, fidelity, gates and costs, from files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import changed, needle_results

from xlstm_distill.bench import counted_costs
from xlstm_distill.bench_cases import model_flops
from xlstm_distill.cli import main
from xlstm_distill.data import TokenData
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import write_results
from xlstm_distill.evaluate.evidence import Evidence, evidence, read_fidelity
from xlstm_distill.evaluate.fidelity import windows_of
from xlstm_distill.model import load


@pytest.fixture
def files(compared, tmp_path) -> Path:
    """A copy of what lies beside the results."""
    for name in ("teacher", "hybrid", "window"):
        for file in compared.glob(f"*_{name}*.json*"):
            shutil.copy(file, tmp_path)
    return tmp_path


def found_in(folder: Path, **options) -> Evidence:
    names = ("teacher", "hybrid", "window")
    return evidence({name: str(folder / f"results_{name}.json") for name in names}, **options)


def test_the_page_shows_what_the_files_tell(compared):
    out = compared / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    figures = {
        *("win_and_tie_accuracy", "win_and_tie_accuracy_separating", "recovery"),
        *("needle_teacher", "needle_hybrid", "needle_window"),
        *("kl_by_position", "kl_by_distance", "perplexity_by_distance"),
        *("gates_hybrid", "context_costs"),
    }
    assert page.count("<svg") == len(figures)
    pictures = {f"{name}.{ending}" for name in figures for ending in ("svg", "png")}
    written = {p.name for p in out.iterdir()}
    assert written == pictures | {"report.html", "comparison.json", "comparison.csv"}
    assert all((out / p).read_bytes().startswith((b"<?xml", b"\x89PNG")) for p in pictures)
    # Every table names the weights that are the measure.
    titles = page.count("teacher (safetensors, as float32)")
    assert titles == 1 + page.count("<table")


def test_no_student_takes_the_file_of_another(files):
    """Names that are one when signs and capitals are left out, in file names and in ids of the
    page."""
    names = {"a b": "hybrid", "a_b": "window", "A-b": "hybrid"}
    out = files / "out"
    arguments = ["compare", "--teacher", str(files / "results_teacher.json"), "--out", str(out)]
    for name, student in names.items():
        arguments += ["--student", f"{name}={files / f'results_{student}.json'}"]
        arguments += ["--fidelity", f"{name}={files / f'fidelity_{student}.json'}"]
    assert main(arguments) == 0
    written = {p.stem.lower() for p in out.glob("*.svg")}
    assert {f"needle_a_b{more}" for more in ("", "_2", "_3")} < written
    assert {"gates_a_b", "gates_a_b_2"} < written
    assert (out / "needle_a_b.svg").read_bytes() != (out / "needle_a_b_2.svg").read_bytes()
    page = (out / "report.html").read_text(encoding="utf-8")
    ids = [set(re.findall(r'\bid="([^"]*)"', figure)) for figure in page.split("<svg")[1:]]
    assert len(ids) == len(written) and sum(map(len, ids)) == len(set().union(*ids))


def test_figures_and_tables_agree_with_the_files(compared):
    folder = compared
    found = found_in(folder, models={"hybrid": str(folder / "hybrid")})
    for student in ("hybrid", "window"):
        own = read_fidelity(folder / f"fidelity_{student}.json")
        assert found.fidelity.models[student] == own.fidelity.models["student"]
        (domain,) = own.divergence.values()
        assert found.by_distance[student] == domain.by_distance
    assert found.needles["window"]["niah_single_1"][512] == [0, 0, 0, 0, 1]
    assert found.needles["hybrid"]["vt"] == {512: [1]}
    by_position, by_distance, costs = found.listings()
    assert by_position.columns == ["position", "hybrid", "detectable", "window", "detectable"]
    assert by_position.rows[0][1] == f"{found.fidelity.mean('hybrid', 0).kl:.4f}"
    windows = np.array(found.fidelity.models["hybrid"]["text"].windows_by_position["kl"][0])
    error = windows.std(ddof=1) / np.sqrt(len(windows))
    assert float(by_position.rows[0][2]) == pytest.approx(2.8016 * error, abs=6e-5)
    assert by_distance.rows[-1][0] == "new"
    # Of each student what it costs to have lost the far context, in both measures.
    row = dict(zip(by_distance.columns[:8], by_distance.rows[-1], strict=False))
    new, other = (found.by_distance[name][-1] for name in ("hybrid", "window"))
    assert row["hybrid: KL"] == f"{new.kl:.4f}" and row["NLL - teacher's"] == (
        f"{new.nll - new.teacher_nll:.4f}"
    )
    assert row["hybrid: perplexity"] == f"{np.exp(new.nll):.3f}"
    assert row["teacher: perplexity"] == f"{np.exp(other.teacher_nll):.3f}"
    assert float(by_distance.rows[-1][7]) == pytest.approx(2.8016 * new.kl_stderr, abs=6e-5)
    for listing in (by_position, by_distance):
        assert "that so many windows show in 8 of 10 cases" in listing.title
    assert "nothing is sampled" in costs.title
    assert [row[0] for row in costs.rows] == ["1,024", "4,096", "16,384", "65,536"]


def test_gates_are_the_medians_over_the_windows(compared):
    folder = compared
    model = load(folder / "hybrid")
    text = TokenData.from_files([folder / "text"], model.tokenizer)
    windows = windows_of([text.document(i).tolist() for i in range(text.documents)], 128)[:4]
    medians = np.median(model.gate_values(windows), axis=2)
    assert read_fidelity(folder / "fidelity_hybrid.json").gates == medians.tolist()
    assert read_fidelity(folder / "fidelity_window.json").gates is None


def test_counted_costs_are_those_of_the_state_and_of_the_products(compared):
    for name in ("teacher", "hybrid"):
        model = load(compared / name)
        costs = counted_costs(model.config)
        for context, memory in costs["memory"].items():
            assert memory * 2**20 == model.new_state(1, context).nbytes
            work = model_flops(model.config, 1, 1, past=context - 1)
            assert 2 * costs["work"][context] == work
        grows = len(set(costs["memory"].values())) > 1, len(set(costs["work"].values())) > 1
        assert grows == (name == "teacher", name == "teacher")


def test_domains_are_pooled_by_positions(files):
    own = json.loads((files / "fidelity_hybrid.json").read_text())
    (text,) = own["divergence"].values()
    less = {**text, "by_distance": [{**m, "kl": 2 * m["kl"]} for m in text["by_distance"][1:]]}
    changed(files / "fidelity_hybrid.json", divergence={"a": text, "b": less})
    first, second, *_ = found_in(files).by_distance["hybrid"]
    assert first.kl == text["by_distance"][0]["kl"]
    assert second.kl == pytest.approx(1.5 * text["by_distance"][1]["kl"])
    assert second.positions == 2 * text["by_distance"][1]["positions"]
    assert first.kl_stderr == text["by_distance"][0]["kl_stderr"]
    errors = [text["by_distance"][1]["kl_stderr"]] * 2
    assert second.kl_stderr == pytest.approx(np.hypot(*errors) / 2)
    # Files from before there were standard errors.
    del less["by_distance"][0]["kl_stderr"]
    changed(files / "fidelity_hybrid.json", divergence={"a": text, "b": less})
    found = found_in(files)
    assert found.by_distance["hybrid"][1].kl_stderr is None
    assert found.listings()[1].rows[1][7] == "unknown"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(context=64), "context of {w} is 64, of {h} 128"),
        (lambda f: f["tokens"].update(text=99), "tokens of {w} is"),
        (
            lambda f: f["models"]["teacher"]["text"]["overall"].update(nll=1.0),
            "the teacher's NLL on text in {w} is 1.0000, in {h} ",
        ),
    ],
)
def test_other_text_and_other_teachers_are_left_out(files, capsys, change, message):
    place = files / "fidelity_window.json"
    fidelity = json.loads(place.read_text())["fidelity"]
    change(fidelity)
    changed(place, fidelity=fidelity)
    found = found_in(files)
    assert found.students == ["hybrid"]
    (line,) = found.warnings
    assert line.startswith(message.format(w=place, h=files / "fidelity_hybrid.json"))
    assert line.endswith("fidelity of window is left out")
    arguments = ["compare", "--teacher", str(files / "results_teacher.json"), "--strict"]
    for name in ("hybrid", "window"):
        arguments += ["--student", f"{name}={files / f'results_{name}.json'}"]
    assert main([*arguments, "--out", str(files / "out")]) == 1
    assert f"not comparable: {line}" in capsys.readouterr().err


def test_other_weights_than_those_that_were_scored_are_told_of(files, capsys):
    place, out = files / "results_teacher.json", files / "out"
    results = json.loads(place.read_text())
    arguments = ["compare", "--teacher", str(place), "--out", str(out)]
    arguments += ["--student", f"hybrid={files / 'results_hybrid.json'}"]
    for weights, told in (
        ("other.gguf (GGUF)", True),
        ("teacher (safetensors, as float32)", False),
    ):
        changed(place, config={**results.get("config", {}), "weights": weights})
        assert main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["weights"] == weights
        text = f"scores are of {weights}, its evidence of teacher (safetensors, as float32)"
        assert any(text in line for line in found["warnings"]) == told
        assert f"scores of {weights}" in (out / "report.html").read_text(encoding="utf-8")
        assert (main([*arguments, "--strict"]) == 1) == told
        capsys.readouterr()


def test_nothing_is_asked_of_tables_and_of_tasks_without_lengths(tmp_path):
    other = needle_results(100)
    other["results"] = {"niah_single_1": {"acc,none": 0.5}, "vt:512": {"acc,none": 0.5}}
    other["samples"] = {"niah_single_1": [{"doc_id": 0, "4096": 1.0}], "vt:512": [{"doc_id": 0}]}
    write_results(other, tmp_path / "results_s.json")
    found = evidence({"teacher": "scores.csv:t", "s": str(tmp_path / "results_s.json")})
    assert found == Evidence() and found.figures() == {} and found.listings() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "fidelity_hybrid.json: not valid JSON"),
        ("[]", "fidelity_hybrid.json: a JSON object is expected"),
        ("{}", "fidelity_hybrid.json: fidelity: missing"),
        ('{"x": 1}', "fidelity_hybrid.json: fidelity: missing"),
    ],
)
def test_damaged_files_are_one_line(files, text, message):
    (files / "fidelity_hybrid.json").write_text(text)
    with pytest.raises(UserError, match=message):
        found_in(files)


def test_what_is_no_fidelity_of_a_student_is_refused(files):
    place = files / "fidelity_hybrid.json"
    own = json.loads(place.read_text())
    changed(place, divergence={}, x=1)
    with pytest.raises(UserError, match=r"fidelity_hybrid.json: x: unknown key"):
        found_in(files)
    models = own["fidelity"]["models"]
    for name in models:
        rest = {n: m for n, m in models.items() if n != name}
        place.write_text(json.dumps({**own, "fidelity": {**own["fidelity"], "models": rest}}))
        with pytest.raises(UserError, match=r"models: expected 'teacher' and 'student'"):
            found_in(files)
    models["student"]["text"]["overall"]["kl"] = float("nan")
    place.write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"fidelity_hybrid.json: holds NaN or infinity"):
        found_in(files)
    with pytest.raises(UserError, match="--fidelity teacher: expected one of hybrid, window"):
        found_in(files, fidelity={"teacher": "x"})
    with pytest.raises(UserError, match="--model x: expected one of teacher, hybrid, window"):
        found_in(files, models={"x": "y"})
    with pytest.raises(UserError, match=r"nowhere\.json: cannot read: No such file"):
        found_in(files, fidelity={"hybrid": "nowhere.json"})
