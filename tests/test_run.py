"""The keys of a recipe file do in a run what docs/recipes.md says."""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import time
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import yaml
from test_tasks import request, write_task
from tiny_run import TEXT

from xlstm_distill import checkpoints, cleaning, packages, progress, runtime, sources, texts
from xlstm_distill.align import MixerAdamW, relative_errors
from xlstm_distill.assess import read_fidelity, stage_one_errors, stage_one_validations
from xlstm_distill.cli import main
from xlstm_distill.data import Rows, TokenData
from xlstm_distill.errors import UserError
from xlstm_distill.model import Model, load
from xlstm_distill.optim import learning_rate
from xlstm_distill.progress import Reporter
from xlstm_distill.recipe import derived_seed, make_recipe
from xlstm_distill.run import Run
from xlstm_distill.run import run as run_recipe
from xlstm_distill.rundir import RunDirectory

run_module = import_module("xlstm_distill.run")  # the package has its function by this name
QUESTION = "Which of the four gases in the flask would turn limewater cloudy after a minute or two?"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    tiny_run.teacher().save(place / "teacher")
    tiny_run.write_text(place / "text")
    return place


def run(root: Path, out: Path, until: str, changes: dict[str, dict[str, Any]]) -> int:
    """Exit status of the command on a recipe file of the tiny run with changed sections."""
    values = tiny_run.recipe(root / "teacher", root / "text")
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    recipe = out.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(values))
    return main([until, str(recipe), "--out", str(out)])


def steps(out: Path, stage: str) -> list[dict[str, Any]]:
    with RunDirectory(out) as directory:
        return directory.steps(stage)


# ---- data ---------------------------------------------------------------------------------------


@pytest.fixture
def collected(root, tmp_path, monkeypatch):
    """The section `data` of a recipe with every kind of trouble in its text."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "A."}]}
        for n in range(8)
    ]
    lines = [json.dumps(r) for r in [*records, records[0], {"txt": ""}, {"text": "x" * 400}]]
    (tmp_path / "chats.jsonl").write_text("\n".join([*lines, "{", ""]))
    pairs = [{"prompt": f"{n} and {n}: ", "completion": f"{2 * n}"} for n in range(8)]
    parquet.write_table(arrow.Table.from_pylist(pairs), tmp_path / "pairs.parquet")
    (tmp_path / "asked.txt").write_text("The river\nBread\n")
    text = tmp_path / "text"
    text.mkdir()
    for file in (root / "text").iterdir():
        (text / file.name).write_bytes(file.read_bytes())
    (text / "exercise.md").write_text(f"Exercise. {QUESTION}")
    task = [request(0, 0, "Q", " a", 0, q=QUESTION), request(0, 1, "Q", " b", 0, q=QUESTION)]
    write_task(tmp_path / "requests", "arc_easy/rc_5shot", task)
    monkeypatch.setattr(packages, "fetch", lambda _: tmp_path / "requests")
    sampled = {"kind": "sampled", "documents": 6, "max_new_tokens": 30}
    files = {"kind": "files", "paths": [str(tmp_path / "chats.jsonl")]}
    files["paths"].append(str(tmp_path / "pairs.parquet"))
    return {
        "contamination": {"tasks": ["arc_easy"]},
        "domains": {
            "general": {"sources": [{**sampled, "prompts": str(tmp_path / "asked.txt")}]},
            "chats": {
                "loss": "answers",
                "sources": [{**files, "malformed": "skip", "max_document_bytes": 300}],
            },
            "notes": {
                "sources": [{"kind": "files", "paths": [str(text)]}],
                "held_out_tokens": 700,
            },
            "again": {
                "sources": [{"kind": "files", "paths": [str(text / "text00.txt"), str(text)]}]
            },
        },
    }


def test_the_report_says_what_was_left_out(root, tmp_path, collected):
    out = tmp_path / "out"
    del collected["domains"]["again"]
    collected["domains"]["notes"]["held_out_tokens"] = 0
    changes = {"data": {"deduplicate": True, **collected}, "align": {"steps": 0}}
    changes |= {"distill": {"steps": 1}, "evaluate": {"fidelity": [], "prompts": [], "chats": []}}
    assert run(root, out, "run", changes) == 0
    facts = json.loads((out / "report" / "report.json").read_text())
    found = {text["domain"]: text["left_out"] for text in facts["text"]}
    kinds = {f"malformed ({kind})": 1 for kind in ("no text field", "not JSON", "too long")}
    assert found["chats"] == {"repeated": 1, **kinds}
    assert found["notes"] == {"contaminated": 1}
    passes = {text["domain"]: text["passes"] for text in facts["text"]}
    with RunDirectory(out) as directory:
        ends = [directory.done(f"distill {name}")["passes"] for name in ("general", "notes")]
    assert passes == {name: max(end.get(name, 0) for end in ends) for name in passes}
    assert 0 < passes["notes"] < 1
    page = (out / "report" / "report.html").read_text()
    assert "<td>1 contaminated</td>" in page and "1 malformed (too long)" in page


def manifests(out: Path) -> dict[str, TokenData]:
    return {p.parent.name: TokenData.open(p) for p in sorted((out / "data").glob("*/train"))}


def test_the_keys_of_data(root, tmp_path, collected):
    out, tokenizer = tmp_path / "out", tiny_run.tokenizer()
    del collected["domains"]["again"]
    assert run(root, out, "data", {"data": collected}) == 0
    found = manifests(out)
    asked = [tokenizer.decode(found["general"].document(n)) for n in range(6)]
    assert [text.startswith("The river") for text in asked] == [True, False] * 3
    assert [text.startswith("Bread") for text in asked] == [False, True] * 3

    chats = found["chats"]
    kinds = {"no text field": 1, "not JSON": 1, "too long": 1}
    assert chats.manifest["malformed"] == kinds and chats.manifest["repeated"] == 1
    places = " ".join(chats.manifest["malformed_first"])
    assert all(f"chats.jsonl:{line}: " in places for line in (10, 11, 12))
    assert chats.documents == 8 + 8
    learnt = tokenizer.decode(chats.ids[chats.counted])
    assert learnt.count("A.<|im_end|>") == 8 and "?" not in learnt and "and" not in learnt

    notes = found["notes"]
    assert notes.manifest["contaminated_first"] == ["exercise.md"]
    assert QUESTION not in "".join(
        tokenizer.decode(notes.document(n)) for n in range(notes.documents)
    )
    assert "contaminated" in chats.manifest and chats.manifest["contaminated"] == 0


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_document_of_an_earlier_domain_is_a_repeat(
    root, tmp_path, collected, capsys, deduplicate
):
    changes = {**collected, "deduplicate": deduplicate}
    changes["contamination"] = {"tasks": ["arc_easy"], "words": 9, "action": "report"}
    changes["domains"] = {k: collected["domains"][k] for k in ("general", "notes")}
    changes["domains"]["general"] = collected["domains"]["again"]
    out = tmp_path / "out"
    status = run(root, out, "data", {"data": changes})
    if deduplicate:  # nothing is left of the second domain
        assert status == 1
        message = "domain notes: no document is left (repeated: 25); add other text"
        assert message in capsys.readouterr().err.splitlines()[-1]
        return
    assert status == 0
    first, second = manifests(out).values()
    assert first.documents == 26 and "repeated" not in first.manifest
    assert first.manifest["contaminated"] == second.manifest["contaminated"] == 1
    assert not list((out / "data").rglob("hashes.npy"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "chats.jsonl:10: needs the field text"),
        ({"max_document_bytes": 30}, "chats.jsonl:1: "),
        ({"kind": "sampled", "documents": 1, "prompts": "none.txt"}, "none.txt: no such file"),
    ],
)
def test_trouble_is_one_line(root, tmp_path, collected, capsys, source, message):
    files = {"kind": "files", "paths": [str(tmp_path / "chats.jsonl")]}
    own = source if "kind" in source else {**files, **source}
    collected["domains"]["general"] = {"sources": [own]}
    status = 2 if "no such file" in message else 1
    assert run(root, tmp_path / "out", "data", {"data": collected}) == status
    assert message in capsys.readouterr().err.splitlines()[-1]


MOMENTS = {"a text is encoded": 10, "a text is read": 30, "repeats are looked for": 150}
"""When a run is asked to stop -> the most documents that may be encoded then."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_reading_stops_between_documents_and_is_begun_anew(root, tmp_path, monkeypatch, moment):
    lines = [json.dumps({"text": f"{n} lines, {TEXT[n % 4]}"}) for n in range(150)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    files = {"kind": "files", "paths": [str(tmp_path / "text.jsonl")]}
    values = tiny_run.recipe(root / "teacher", root / "text")
    values["data"]["domains"] = {"notes": {"sources": [files], "held_out_tokens": 900}}
    recipe = make_recipe({**values, "experts": {"notes": {"notes": 1}}, "merge": {}})

    def read(name: str) -> Path:
        return run_recipe(recipe, tmp_path / name, Reporter(quiet=True), "data") / "data" / "notes"

    whole, encoded, calls = read("whole"), [], []
    module, function = {
        "a text is encoded": (sources, "_document"),
        "a text is read": (texts, "_text_of"),
        "repeats are looked for": (cleaning, "document_hash"),
    }[moment]
    real, real_document = getattr(module, function), sources._document

    def asking(*arguments):
        calls.append(arguments)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the main thread, which may not be this one, takes the signal
        return real(*arguments)

    def counted(*arguments):
        encoded.append(arguments)
        return real_document(*arguments) if function != "_document" else asking(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "threads", lambda: 1)
        patch.setattr(sources, "_AT_ONCE", 5)
        patch.setattr(module, function, asking)
        patch.setattr(sources, "_document", counted)
        with pytest.raises(KeyboardInterrupt):
            read("cut")
    assert len(encoded) <= MOMENTS[moment] and len(calls) < 150
    assert not (tmp_path / "cut" / "data" / "notes" / "train").exists()
    again = read("cut")
    for part in ("train/ids.bin", "train/offsets.npy", "evaluation/ids.bin", "hashes.npy"):
        assert (again / part).read_bytes() == (whole / part).read_bytes()


def test_reading_shows_documents_and_bytes(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    assert run(root, tmp_path / "out", "data", {}) == 0
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("reading ")]
    assert said[-1] == "reading notes: 24 documents, 0.0 MB" and "general" not in "".join(said)


# ---- training -----------------------------------------------------------------------------------

PLAIN = {"steps": 8, "warmup": 0.25, "validate_every": 3, "validate_rows": 1}


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    assert run(root, out, "distill", {"distill": PLAIN}) == 0
    return out


def test_schedules_and_parts_of_stage_one(root, tmp_path, plain):
    out = tmp_path / "out"
    align = {"steps": 10, "rows": 3, "micro_rows": 1, "schedule": "wsd", "lr": 0.01}
    assert run(root, out, "align", {"align": align}) == 0
    rates = [m["lr"] for m in steps(out, "align")]
    expected = dict(peak=0.01, schedule="wsd", warmup=0.1, floor=1e-5)
    assert rates == [learning_rate(n, 10, **expected) for n in range(1, 11)]


ORDERS = ("step", "layer")


def test_stage_one_by_layer_is_stage_one_by_step(root, tmp_path):
    align = {"steps": 9, "rows": 3, "micro_rows": 2, "clip": 0.1, "patience": 2, "lr": 0.1}
    for order in ORDERS:
        assert run(root, tmp_path / order, "align", {"align": {**align, "order": order}}) == 0
    weights = [(tmp_path / o / "aligned" / "model.safetensors").read_bytes() for o in ORDERS]
    assert weights[0] == weights[1]
    logs = [steps(tmp_path / order, "align") for order in ORDERS]
    curves = [stage_one_errors(log) for log in logs]
    assert curves[0] == curves[1] and 3 < len(curves[0]) < 9
    assert {m["layer"] for m in logs[1]} == {0, 1}
    for order in ORDERS:  # what was done, not what it might have been
        with RunDirectory(tmp_path / order) as directory:
            done = directory.done("align")
        assert (done["steps"], done["tokens"]) == (len(curves[0]), len(curves[0]) * 3 * 64)
    errors = [
        checkpoints.load(tmp_path / order / "aligned").provenance["relative_error"]
        for order in ORDERS
    ]
    assert errors[0]["layers"] == errors[1]["layers"] == [0, 1]
    for when in ("before", "after"):  # the probe in one call or in two: rounding
        assert np.allclose(errors[0][when], errors[1][when], rtol=1e-6)
    assert not (tmp_path / "layer" / "aligned.state").exists()


VALIDATED = {
    "best": {"validate_every": 3, "validate_rows": 2, "keep": "best"},
    "mean": {"average": 0.8, "validate_every": 4, "validate_rows": 1},
    "best mean": {"average": 0.5, "validate_every": 2, "keep": "best", "validate_rows": 1},
}


@pytest.mark.parametrize("kind", VALIDATED)
def test_stage_one_keeps_means_and_best_values_in_either_order_and_when_stopped(
    root, tmp_path, monkeypatch, kind
):
    settings = {"steps": 9, "rows": 3, "micro_rows": 2, "patience": 2, "lr": 0.3, "floor": 0.3}
    align = {**settings, **VALIDATED[kind]}
    for order in ORDERS:
        assert run(root, tmp_path / order, "align", {"align": {**align, "order": order}}) == 0
    weights = [(tmp_path / o / "aligned" / "model.safetensors").read_bytes() for o in ORDERS]
    assert weights[0] == weights[1]
    validated = [stage_one_validations(steps(tmp_path / order, "align")) for order in ORDERS]
    assert validated[0] == validated[1]
    assert set(range(align["validate_every"], 3, align["validate_every"])) <= set(validated[0])
    plain = tmp_path / "plain"  # without the keys other rows are drawn
    assert run(root, plain, "align", {"align": settings}) == 0
    assert (plain / "aligned" / "model.safetensors").read_bytes() != weights[0]

    real, calls = MixerAdamW.step, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    for order in ORDERS:
        out, changes = tmp_path / f"stopped {order}", {"align": {**align, "order": order}}
        with monkeypatch.context() as patch:
            patch.setattr(MixerAdamW, "step", stopped)
            statuses = [run(root, out, "align", changes) for _ in range(2)]
        assert statuses == [130, 130] and run(root, out, "align", changes) == 0
        assert (out / "aligned" / "model.safetensors").read_bytes() == weights[0]


def test_a_mixer_ends_with_its_lowest_error(root, tmp_path):
    """With a rate that rises until it is far too high, so does the error in the end."""
    align = {"steps": 8, "rows": 2, "micro_rows": 2, "lr": 2.0, "warmup": 1.0}
    keys = {"validate_every": 1, "validate_rows": 2, "order": "layer"}
    errors = {}
    for keep in ("last", "best"):
        out = tmp_path / keep
        assert run(root, out, "align", {"align": {**align, **keys, "keep": keep}}) == 0
        student, found = load(out / "aligned"), {}
        for m in steps(out, "align"):
            found.setdefault(m["layer"], []).append(m["validation"])
        held_out = []
        for domain in ("general", "notes"):
            data = TokenData.open(out / "data" / domain / "train")
            rows = Rows(data, 64, derived_seed(3, "rows", domain), 2)
            held_out += [rows.batch(domain, [n]) for n in rows.reserved]
        measured = relative_errors(student, held_out)
        chosen = [min(own) if keep == "best" else own[-1] for own in found.values()]
        assert measured == pytest.approx(chosen, rel=1e-5)
        errors[keep] = measured
    assert sum(errors["best"]) < sum(errors["last"])


def test_stage_one_by_layer_does_not_hold_the_teacher(root, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "teacher", property(lambda self: pytest.fail("the teacher is loaded")))
    monkeypatch.setattr(Model, "fill", lambda *_: pytest.fail("a model is loaded"))
    data = {"domains": tiny_run.recipe(root / "teacher", root / "text")["data"]["domains"]}
    del data["domains"]["general"]  # which the teacher writes
    changes = {
        "data": data,
        "align": {"order": "layer", "stream": "bfloat16", "layers": [1]},
        "experts": {"general": {"notes": 1}, "notes": {"notes": 1}},
    }
    assert run(root, tmp_path / "out", "align", changes) == 0
    monkeypatch.undo()
    before, after = load(tmp_path / "out" / "student0"), load(tmp_path / "out" / "aligned")
    for e in before.params.entries:
        same = np.array_equal(before.params[e.name], after.params[e.name])
        assert same or (e.group == 1 and ".mixer." in e.name), e.name
    assert not np.array_equal(before.params.flat, after.params.flat)
    assert after.provenance["relative_error"]["layers"] == [1]


def test_a_disk_that_is_too_small_for_stage_one_ends_a_run_before_it_begins(
    root, tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    align = {"align": {"order": "layer"}}
    assert run(root, tmp_path / "out", "align", align) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "hidden states need" in message and "align.stream: bfloat16" in message
    assert not (tmp_path / "out" / "data").exists()


def validation_loss(out: Path, expert: str) -> float:
    """The loss of an expert on the rows that are set aside, computed anew."""
    teacher, student = load(out.parent / "teacher"), load(out / "experts" / expert)
    total = count = 0.0
    for domain in ("notes", "general") if expert == "notes" else ("general",):
        data = TokenData.open(out / "data" / domain / "train")
        batch = Rows(data, 64, derived_seed(3, "rows", domain), 1).batch(domain, [-1])
        ids, logp, _ = teacher.topk(batch.ids, 12, reset=batch.reset)
        weights = dict(ce_weight=0.1, kl_weight=0.9)
        sums = student.loss_and_grad(
            batch.ids, batch.labels, (ids, logp), reset=batch.reset, **weights
        )
        total += 0.1 * sums["ce"] + 0.9 * sums["kl"]
        count += batch.counted
    return total / count


@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_expert_has_the_loss_that_its_log_says(root, tmp_path, keep):
    (tmp_path / "teacher").symlink_to(root / "teacher")
    # Far too high a rate: the first validation is the best.
    bad = {"lr": 0.5, "schedule": "constant"}
    out = tmp_path / "out"
    assert run(root, out, "distill", {"distill": {**PLAIN, **bad, "keep": keep}}) == 0
    for expert in ("general", "notes"):
        losses = {
            m["step"]: m["validation"] for m in steps(out, f"distill {expert}") if "validation" in m
        }
        assert list(losses) == [3, 6, 8]
        chosen = min(losses.values()) if keep == "best" else losses[8]
        assert validation_loss(out, expert) == pytest.approx(chosen, rel=1e-5)
        assert min(losses.values()) < losses[8]


CHANGES = [{"average": 0.9}, {"window_dropout": 0.25}, {"rates": {"mixer": 20.0, "norm": 0.1}}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_each_key_changes_the_experts(root, tmp_path, plain, changes):
    out = tmp_path / "out"
    assert run(root, out, "distill", {"distill": {**PLAIN, **changes}}) == 0
    for expert in ("general", "notes"):
        losses = [[m["loss"] for m in steps(o, f"distill {expert}")] for o in (plain, out)]
        # The mean is only looked at; a hidden window is another loss from the fourth step on, other
        # rates from the second.
        same = {"average": 8, "window_dropout": 3, "rates": 1}[next(iter(changes))]
        assert losses[0][:same] == losses[1][:same] and (losses[0] == losses[1]) == (same == 8)
        weights = [
            (o / "experts" / expert / "model.safetensors").read_bytes() for o in (plain, out)
        ]
        assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("distill", {"keep": "best"}, "keep: best needs validate_every"),
        ("distill", {"ce_weight": 0, "kl_weight": 0}, "both 0: nothing to learn from"),
        ("distill", {"window_dropout": 1}, "distill.window_dropout"),
        ("distill", {"average": 1}, "distill.average"),
        ("distill", {"validate_every": 2, "validate_rows": 999}, "999 reserved for validation"),
        ("align", {"micro_rows": 0}, "align.micro_rows"),
        ("align", {"clip": 0}, "align.clip"),
        ("align", {"patience": 0}, "align.patience"),
        ("align", {"average": 1}, "align.average"),
        ("align", {"keep": "best"}, "align: keep: best needs validate_every"),
        ("align", {"layers": []}, "align.layers"),
        ("align", {"layers": [2]}, "align.layers: layer 2 is outside 0..1"),
        ("align", {"order": "layers"}, "align.order"),
        ("align", {"stream": "bfloat16"}, "align: stream and stream_place need order: layer"),
        ("student", {"mixer": "mlstm"}, "window_dropout needs student.mixer hybrid"),
    ],
)
def test_bad_keys_are_named(root, tmp_path, capsys, section, keys, message):
    changes = {section: keys}
    if section == "student":
        changes["distill"] = {"window_dropout": 0.1}
    until = "align" if section == "align" else "data"
    assert run(root, tmp_path / "out", until, changes) in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_request_sets_that_are_not_there_are_named_before_any_work(
    root, tmp_path, capsys, monkeypatch
):
    task = [request(0, 0, "Q", " a", 0), request(0, 1, "Q", " b", 0)]
    write_task(tmp_path / "requests", "arc_easy/rc_5shot", task)
    monkeypatch.setattr(packages, "fetch", lambda _: tmp_path / "requests")
    for name, message in (
        ("arc_eezy", "evaluate.tasks: task 'arc_eezy' is not known; did you mean arc_easy?"),
        ("arc_easy:rc_9", "evaluate.tasks: task 'arc_easy:rc_9': arc_easy has the variants rc_5s"),
        ("arc_eezy:rc_5shot", "there is no request set 'arc_eezy' in"),
        ("gsm8k:generate", "evaluate.tasks: task 'gsm8k': there is no request set 'gsm8k' in"),
        ("niah_single_1:130", "evaluate.tasks: task niah_single_1:130: too short; the smallest pr"),
        ("niah_single_2:9000000", "niah_single_2:9000000: the haystack is too short"),
    ):
        changes = {"evaluate": {"tasks": {"arc_easy": 1, name: 1}}}
        status = 1 if "too short" in message else 2
        assert run(root, tmp_path / "out", "run", changes) == status
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    # Stages before the evaluation do not ask.
    monkeypatch.setattr(packages, "fetch", lambda _: pytest.fail("request sets are fetched"))
    changes = {"evaluate": {"tasks": {"arc_easy": 1}}}
    assert run(root, tmp_path / "early", "linearize", changes) == 0


def test_validate_names_every_problem_and_run_the_first_of_them(
    root, tmp_path, capsys, monkeypatch
):
    (tmp_path / "requests").mkdir()
    monkeypatch.setattr(packages, "fetch", lambda _: tmp_path / "requests")
    monkeypatch.setattr(Model, "__init__", lambda *_, **__: pytest.fail("a model is made"))
    values = tiny_run.recipe(root / "teacher", root / "text")
    recipe = tmp_path / "recipe.yaml"

    def problems(command: str = "validate") -> list[str]:
        recipe.write_text(yaml.safe_dump(values))
        more = ["--out", str(tmp_path / "out")] if command == "run" else []
        assert main([command, str(recipe), *more]) == 2 or command == "run"
        return capsys.readouterr().err.splitlines()

    recipe.write_text(yaml.safe_dump(values))
    assert main(["validate", str(recipe)]) == 0 and "a valid recipe" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    values["data"]["domains"]["general"]["sources"][0]["prompts"] = "asked.txt"
    files = ["none.txt", str(tmp_path / "empty")]
    values["data"]["domains"]["notes"]["sources"][0]["paths"] = files
    values["data"]["domains"]["notes"]["passages"] = ["squad"]
    values["data"]["contamination"] = {"tasks": ["piqa"]}
    values["align"]["layers"] = [0, 9]
    values["distill"]["state_passing"] = True
    values["targets"]["rows_before"] = 99
    values["evaluate"]["tasks"] = {"csqa": 1, "niah_single_1:130": 1}
    expected = [
        "data.domains.general.sources.0.prompts: asked.txt: no such file or directory",
        "data.domains.notes.sources.0.paths: none.txt: no such file or directory",
        "data.domains.notes.sources.0.paths: " + files[1] + ": holds no .txt, ",
        "data.domains.notes.passages: ",
        "data.contamination.tasks: ",
        "align.layers: layer 9 is outside 0..1",
        "targets: rows_before is 99, expected 0 to 7",
        "evaluate.tasks: task 'csqa': ",
        "evaluate.tasks: task niah_single_1:130: too short",
    ]
    found = problems()
    assert found[-1].endswith(f"{recipe}: 9 problems")
    for line, start in zip(found, expected, strict=False):
        assert line.startswith(f"{recipe}: {start}")
    assert expected[0] in problems("run")[-1] and not (tmp_path / "out").exists()
    values["teacher"] = str(tmp_path / "nothing")
    missing = f"teacher: {values['teacher']}: no such file or directory"
    assert any(missing in line for line in problems())
    assert main(["estimate", str(recipe)]) == 2 and missing in capsys.readouterr().err


def test_chats_need_a_template(root, tmp_path, capsys):
    model = tiny_run.teacher()
    model.tokenizer.chat_template = None
    model.save(tmp_path / "teacher")
    values = tiny_run.recipe(tmp_path / "teacher", root / "text")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = ("data.domains.general.sources.1.style: chat", "evaluate.chats")
    for line, key in zip(lines, keys, strict=False):
        assert f"{key} needs a chat template, which the teacher lacks; leave it out" in line


@pytest.mark.parametrize(
    ("damaged", "deleted"),
    [
        ("targets/notes/shard-00000.npz", "targets/notes/shard-00000.npz"),
        ("targets/notes/shard-00000.npz", "targets"),
        ("data/notes/train/ids.bin", "data/notes/train"),
        ("data/notes/evaluation/ids.bin", "data/notes/evaluation"),
    ],
)
def test_what_is_damaged_is_named_and_made_again_when_deleted(
    root, tmp_path, capsys, damaged, deleted
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(root, whole, "distill", {}) == run(root, out, "targets", {}) == 0
    content = bytearray((out / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (out / damaged).write_bytes(content)
    capsys.readouterr()
    assert run(root, out, "run" if "evaluation" in damaged else "distill", {}) == 1
    assert f"{out / Path(damaged).parent}" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "damaged" in line and "delete" in line
    place = out / deleted
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert run(root, out, "distill", {}) == 0
    assert (out / damaged).read_bytes() == (whole / damaged).read_bytes()
    weights = "experts/notes/model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_text_that_has_changed_since_it_was_read_is_said(root, tmp_path, capsys):
    text, prompts = tmp_path / "text", tmp_path / "prompts.txt"
    shutil.copytree(root / "text", text)
    prompts.write_text("The river\n")
    domains = tiny_run.recipe(root / "teacher", text)["data"]["domains"]
    domains["general"]["sources"][0]["prompts"] = str(prompts)
    changes = {"data": {"domains": domains}}
    assert run(root, tmp_path / "out", "data", changes) == 0
    kept = (tmp_path / "out/data/notes/train/ids.bin").read_bytes()
    assert run(root, tmp_path / "out", "data", changes) == 0
    assert "has changed" not in capsys.readouterr().err
    (text / "text00.txt").rename(text / "another.txt")
    prompts.write_text("The bridge\n")
    assert run(root, tmp_path / "out", "data", changes) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"data.domains.notes: {text} has changed; the run goes on with the text" in said
    assert f"data.domains.general: {prompts} has changed" in said
    assert (tmp_path / "out/data/notes/train/ids.bin").read_bytes() == kept


def test_files_of_a_domain_that_is_done_may_be_gone(root, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text"
    shutil.copytree(root / "text", text)
    domains = tiny_run.recipe(root / "teacher", text)["data"]["domains"]
    assert run(root, out, "data", {"data": {"domains": domains}}) == 0
    shutil.rmtree(text)
    assert run(root, out, "linearize", {"data": {"domains": domains}}) == 0


def test_needles_are_measured_and_reported_as_other_tasks(root, tmp_path, monkeypatch):
    rows = [request(n, j, f"{n}?", f" {n + j}", 0) for n in range(5) for j in range(2)]
    write_task(tmp_path / "requests", "csqa/rc_5shot", rows)
    monkeypatch.setattr(packages, "fetch", lambda _: tmp_path / "requests")
    changes = {"evaluate": {"tasks": {"niah_single_1:1024": 2, "csqa": 5, "vt:1536": 1}}}
    out = tmp_path / "out"
    assert run(root, out, "run", changes) == 0
    facts = json.loads((out / "report/report.json").read_text())
    found = {b["task"]: b for b in facts["benchmarks"]["benchmarks"]}
    assert set(found) == {"niah_single_1:1024", "csqa:rc_5shot", "vt:1536"}
    assert found["niah_single_1:1024"]["metric"] == "string_match_all,none"
    results = json.loads((out / "evaluation/results_merged.json").read_text())
    assert results["n-samples"]["niah_single_1:1024"] == {"original": 500, "effective": 2}
    assert "niah_single_1:1024" in (out / "report/report.html").read_text()


def test_after_a_divergence_a_lower_rate_takes_over_what_is_done(
    root, tmp_path, monkeypatch, capsys
):
    old, real, calls = tmp_path / "old", Model.loss_and_grad, []

    def diverging(self, *arguments, grads=None, **settings):
        found = real(self, *arguments, grads=grads, **settings)
        calls.append(1)
        if len(calls) == 7:  # the fourth step of the first expert
            grads.flat[:] = np.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Model, "loss_and_grad", diverging)
        assert run(root, old, "distill", {}) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "distill general: step 4: the gradient is not finite" in message
    command = shlex.split(message.partition(": xlstm-distill ")[2])
    assert command[:2] == ["run", str(old / "recipe.yaml")] and "distill.lr=0.0005" in command
    new = Path(command[-1])
    assert main(["distill", *command[1:]]) == 0
    assert "taken from" in (err := capsys.readouterr().err) and "targets/notes" in err
    for part in ("data/notes/train/ids.bin", "student0/model.safetensors"):
        assert (old / part).stat().st_ino == (new / part).stat().st_ino
    with RunDirectory(new) as directory:
        for stage in ("align", "targets general", "targets notes"):
            assert directory.done(stage)["taken_from"] == "old"
        assert directory.recipe().distill.lr == 0.0005
        assert "taken_from" not in directory.done("distill general")
    # The same as a run with that rate from its beginning.
    assert run(root, tmp_path / "alone", "distill", {"distill": {"lr": 0.0005}}) == 0
    for expert in ("general", "notes"):
        places = [
            out / "experts" / expert / "model.safetensors" for out in (new, tmp_path / "alone")
        ]
        assert places[0].read_bytes() == places[1].read_bytes()
    assert main(["distill", *command[1:4], "--from", str(root), "--out", str(tmp_path / "x")]) == 2
    assert "holds no recipe.yaml" in capsys.readouterr().err and not (tmp_path / "x").exists()


# ---- the teacher's memory -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [
        ({}, 1),  # for all that comes before stage II
        ({"targets": {"online": True}}, 1),
        (
            {"distill": {"validate_every": 3, "validate_rows": 1}},
            2,
        ),  # and for validation
        ({"align": {"order": "layer"}}, 2),  # for what it writes, and for the targets
    ],
    ids=str,
)
def test_the_teacher_is_held_only_where_it_is_needed(root, tmp_path, monkeypatch, changes, loaded):
    held: list[weakref.ref[Any]] = []
    in_stage_two: list[int] = []
    real_load, real_step = run_module.from_checkpoint, Model.loss_and_grad

    def load_teacher(*arguments):
        model = real_load(*arguments)
        held.append(weakref.ref(model.params))
        return model

    def step(self, *arguments, **settings):
        in_stage_two.append(sum(params() is not None for params in held))
        return real_step(self, *arguments, **settings)

    monkeypatch.setattr(run_module, "from_checkpoint", load_teacher)
    monkeypatch.setattr(Model, "loss_and_grad", step)
    gc.disable()  # it must not take a collection of cycles
    try:
        assert run(root, tmp_path / "out", "distill", changes) == 0
    finally:
        gc.enable()
    assert len(held) == loaded
    online = "targets" in changes
    assert set(in_stage_two) == {int(online)}


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_online_targets_train_the_same_experts_and_store_nothing(root, tmp_path, form):
    distill = {**PLAIN, "kl_form": {"topk": "tail", "sampled": "sampled"}[form]}
    found = []
    for online in (False, True):
        out = tmp_path / f"online-{online}"
        targets = {"form": form, "online": online}
        assert run(root, out, "distill", {"distill": distill, "targets": targets}) == 0
        assert (out / "targets").is_dir() != online
        experts = [out / "experts" / name / "model.safetensors" for name in ("general", "notes")]
        keys = ("loss", "kl", "validation")
        lines = [[m.get(key) for key in keys] for m in steps(out, "distill notes")]
        found.append(([file.read_bytes() for file in experts], lines))
    assert found[0] == found[1]
    statistic = {"topk": "mass", "sampled": "distinct"}[form]
    assert all(m[statistic] > 0 for m in steps(tmp_path / "online-False", "targets notes"))


@pytest.mark.parametrize("contents", ["{", "{}"])
def test_a_damaged_measurement_is_one_line_with_what_to_do(tmp_path, contents):
    file = tmp_path / "fidelity-64.json"
    file.write_text(contents)
    with pytest.raises(UserError, match=r"fidelity-64\.json: damaged.*delete it and run again"):
        read_fidelity(file)


def test_a_form_of_targets_that_the_loss_does_not_take_is_named(root, tmp_path, capsys):
    for changes in ({"targets": {"form": "sampled"}}, {"distill": {"kl_form": "sampled"}}):
        assert run(root, tmp_path / "out", "data", changes) == 2
        assert "does not fit targets.form" in capsys.readouterr().err.splitlines()[-1]
