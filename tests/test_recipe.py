"""Recipes: what is accepted, what is refused and in which words, and what a budget becomes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import tiny_run
import yaml

from xlstm_distill import packages
from xlstm_distill.budget import (
    Rates,
    calibrate,
    estimate,
    evaluation_seconds,
    fidelity_seconds,
)
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import DEFAULT_TASKS
from xlstm_distill.evaluate.tasks import ReadTokens
from xlstm_distill.families import tensor_shapes
from xlstm_distill.layerwise import stream_bytes
from xlstm_distill.quickstart import TASKS, base_recipe, describe, plan, quickstart, replan
from xlstm_distill.recipe import (
    first_difference,
    load_recipe,
    make_recipe,
    parse_recipe,
    recipe_text,
    save_recipe,
    shipped_recipes,
)
from xlstm_distill.room import Room, text_bytes
from xlstm_distill.rundir import RunDirectory


def values(**changes):
    return tiny_run.recipe(Path("teacher"), Path("text"), **changes)


def text_of(value) -> str:
    return yaml.safe_dump(value)


def test_round_trip(tmp_path):
    recipe = make_recipe(values())
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert "warmup: 0.1" in recipe_text(recipe)  # defaults are written out


def changed(path: str, value) -> dict:
    found = values()
    place = found
    *keys, last = path.split(".")
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("algin", {}, "algin: unknown key; did you mean align?"),
        ("student.windwo", 3, "student.windwo: unknown key; did you mean window?"),
        ("align.step", 3, "align.step: unknown key; did you mean steps?"),
        ("distill.zzz", 3, "distill.zzz: unknown key; keys there: steps, rows"),
        ("data.domains.notes.held_out", 3, "did you mean held_out_tokens?"),
        ("data.domains.notes.sources.0.path", "a", "did you mean paths?"),
        ("evaluate.fidelity.0.window", 3, "did you mean windows?"),
        ("data.contamination", {"tasks": ["squad"], "wrds": 3}, "wrds: unknown key; did you mean"),
        (
            "student.window",
            0,
            "student.window: Input should be greater than or equal to 1, found 0",
        ),
        ("student.sinks", -1, "student.sinks"),
        ("student.mixer", "magic", "student.mixer"),
        ("student.feature_map", "relu", "student.feature_map: Input should be 'softmax' or 'elu'"),
        ("student", {"mixer": "lolcats", "window": None}, "student: mixer lolcats needs a window"),
        ("student.keep_attention", "none", "student.keep_attention: expected a list of layers, or"),
        ("student.keep_attention", [0, "1"], "student.keep_attention: expected a list of layers"),
        ("align.steps", -1, "align.steps"),
        ("align.steps", "many", "align.steps"),
        ("align.lr", float("nan"), "align.lr"),
        ("align.lr", float("inf"), "align.lr: Input should be a finite number"),
        ("align.rates", {"gate": float("inf")}, "align.rates.gate: Input should be a finite"),
        ("distill.weight_decay", float("inf"), "distill.weight_decay: Input should be a finite"),
        ("distill.rates", {"mixr": 2}, "distill.rates.mixr"),
        ("distill.lora", {"rnak": 4}, "distill.lora.rnak: unknown key; did you mean rank?"),
        ("distill.lora", {"rank": 0}, "distill.lora.rank"),
        ("distill.lora", {"targets": []}, "distill.lora.targets"),
        ("distill.lora", {"targets": ["lm_head"]}, "distill.lora.targets.0"),
        ("align.rates", {"gate": 0}, "align.rates.gate"),
        ("align.weights", {"poems": 1}, "align.weights: 'poems' is not one of general, notes"),
        ("experts.notes", {"poems": 1}, "experts.notes: 'poems' is not one of"),
        ("experts.notes", {}, "experts.notes: the shares add up to 0"),
        ("experts.notes", {"notes": -1}, "experts.notes: notes has -1"),
        ("experts.notes", {"notes": float("inf")}, "experts.notes.notes: Input should be a finite"),
        ("experts", {"a": {"notes": 1}, "a.state": {"notes": 1}}, "experts: 'a.state' ends as"),
        ("experts", {"a.adapter": {"notes": 1}}, "experts: 'a.adapter' ends as what lies beside"),
        (
            "merge.weights",
            {"general": 0.3, "notes": 0.3},
            "merge.weights: the weights add up to 0.6",
        ),
        ("merge.weights", {"general": 1}, "merge.weights: the expert 'notes' is missing"),
        ("merge.weights", {"poems": 1}, "merge.weights: 'poems' is not one of general, notes"),
        ("data.domains.all", {"sources": [{"kind": "stdlib"}]}, "data.domains: 'all' is the mean"),
        ("data.domains.notes.sources", [], "data.domains.notes.sources"),
        ("data.domains.notes.sources.0.kind", "web", "data.domains.notes.sources.0"),
        ("data.domains.general.held_out_tokens", 9, "held_out_tokens needs passages"),
        ("data.domains.general.passages", ["squad"], "passages need held_out_tokens"),
        ("data.domains.notes.held_out_tokens", 0, "evaluate.fidelity needs held_out_tokens"),
        ("evaluate.fidelity.0.expert_windows", 99, "expert_windows must be at most windows"),
        ("evaluate.tasks", {"squad": 0}, "evaluate.tasks.squad"),
        ("evaluate.tasks", {"squda": 9}, "evaluate.tasks: task 'squda' is not known; did you mean"),
        ("evaluate.tasks", {"riddles": 9}, "task 'riddles' is not known; there are arc_easy, arc_"),
        (
            "evaluate.tasks",
            {"niah_single_1": 9},
            "'niah_single_1': expected a length in tokens",
        ),
        ("evaluate.tasks", {"vt:x": 9}, "task 'vt:x': expected a length in tokens, as in vt:4096"),
        (
            "evaluate.tasks",
            {"squad": 1, "squad:bpb_5shot": 1},
            "squad and squad:bpb_5shot are the",
        ),
        ("data.contamination", {"tasks": ["arc_eazy"]}, "contamination.tasks: task 'arc_eazy' is"),
        ("seed", -1, "seed"),
    ],
)
def test_bad_values_are_named(path, value, message):
    with pytest.raises(UserError) as error:
        parse_recipe(text_of(changed(path, value)), "r.yaml")
    text = str(error.value)
    assert message in text and text.startswith("r.yaml: ") and "\n" not in text
    assert error.value.usage


def test_missing_and_unreadable(tmp_path):
    found = values()
    del found["teacher"]
    for text, message in (
        (text_of(found), "teacher: missing"),
        ("a: [", "not valid YAML"),
        ("- a", "a mapping of keys is expected"),
        ("", "a mapping of keys is expected"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe(text, "r.yaml")
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "meant"),
    {
        "distill.stpes": "steps",
        "distill.lrr": "lr",
        "distill.microrows": "micro_rows",
        "distill.kl_wieght": "kl_weight",
        "distill.dropout": "window_dropout",
        "distill.lora": {"lora_alpha": "alpha"},
        "align.layer": "layers",
        "experst": "experts",
        "distill.color": None,
        "distill.epochs": None,
        "distill.batch_size": None,
        "distill.optimizer": None,
        "align.momentum": None,
        "device": None,
        "output": None,
        "student.heads": None,
    }.items(),
)
def test_a_key_is_suggested_for_a_misspelt_one_alone(key, meant):
    value = 3
    if isinstance(meant, dict):
        ((word, meant),) = meant.items()
        value = {word: 3}
    with pytest.raises(UserError) as error:
        make_recipe(changed(key, value))
    (hint,) = re.findall(r"unknown key; (.*)", str(error.value))
    assert hint.startswith("keys there: ") if meant is None else hint == f"did you mean {meant}?"


def test_names_that_are_no_directories():
    with pytest.raises(UserError, match=r"'\.\./x' must be letters"):
        make_recipe(values(experts={"../x": {"notes": 1}}, merge={}))


def test_settings_change_keys():
    text = text_of(values())
    recipe = parse_recipe(
        text,
        "r.yaml",
        [
            "align.steps=9",
            "student.window=null",
            "data.domains.notes.sources.0.max_tokens=500",
            "experts.notes={notes: 1}",
            "evaluate.prompts.0=Once",
            "minutes=2.5",
        ],
    )
    assert recipe.align.steps == 9 and recipe.student.window is None and recipe.minutes == 2.5
    assert recipe.data.domains["notes"].sources[0].max_tokens == 500
    assert recipe.experts["notes"] == {"notes": 1} and recipe.evaluate.prompts == ["Once"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("align.steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("align.stepz=3", "did you mean steps?"),
        ("teacher.name=3", "teacher holds a value, not keys"),
        ("data.domains.notes.sources.7.max_tokens=3", "7 is not one of the 1 entries"),
        ("align.steps=[", "not valid YAML"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        parse_recipe(text_of(values()), "r.yaml", [setting])
    assert error.value.usage


def test_first_difference_names_the_key():
    a = make_recipe(values())
    assert first_difference(a, a) is None
    b = make_recipe(changed("data.domains.notes.sources.0.paths", ["other"]))
    assert first_difference(a, b).startswith("data.domains.notes.sources is [")
    c = make_recipe(values(experts={"general": {"general": 1}}, merge={}))
    assert first_difference(a, c).startswith("experts.notes is ")


# ---- the budget ---------------------------------------------------------------------------------

SLOW = Rates(
    sample=220.0,
    align=380.0,
    targets=420.0,
    distill=150.0,
    teacher=570.0,
    student=600.0,
    head=2600.0,
    update=0.5,
    save=3.0,
    load=5.0,
)
READING = dict.fromkeys(TASKS, ReadTokens(shared=700.0, each=200.0))


def faster(rates: Rates, by: float) -> Rates:
    work = ("sample", "align", "targets", "distill", "teacher", "student", "head")
    return replace(rates, **{name: by * getattr(rates, name) for name in work})


def cost(recipe, rates):
    """Seconds of sampling, stage I, stage II with targets, evaluation, as planned."""
    found = estimate(recipe, TINY_CONFIG, rates, READING)["seconds"]
    moved = rates.save + rates.load
    return (
        found["sample"],
        found["align"] - 2 * moved,
        found["targets"] + found["distill"] - 2 * moved,
        found["evaluate"],
    )


TINY_CONFIG = tiny_run.teacher().config


def memory(recipe):
    return max(Room(recipe, TINY_CONFIG).memory.values())


@pytest.mark.parametrize("speed", [1.0, 4.0])
@pytest.mark.parametrize("minutes", [10.0, 30.0, 90.0])
def test_a_plan_fits_its_budget(minutes, speed):
    rates = faster(SLOW, speed)
    recipe = plan(rates, minutes, READING, spent=40.0)
    sampling, first, second, evaluation = cost(recipe, rates)
    budget = 60 * minutes
    assert sampling <= 0.15 * budget
    assert sampling + first + second + evaluation + 40 <= budget
    if (minutes, speed) != (30.0, 1.0):  # on a slow machine the 20,000 tokens cost what they cost
        assert evaluation <= 0.15 * budget
    # Nothing much is left unused.
    assert sampling + first + second + evaluation >= 0.6 * budget
    if minutes >= 30:
        assert 0.35 <= first / (first + second) <= 0.65
    assert recipe.minutes == minutes


def test_a_plan_measures_enough_text_and_fixes_its_claim():
    for minutes, wanted in ((10, None), (30, 0.85), (90, 0.75)):
        recipe = plan(SLOW, minutes, READING)
        (main, *_) = recipe.evaluate.fidelity
        assert recipe.evaluate.wanted_ratio == wanted
        if minutes >= 30:
            assert main.windows * main.context >= 20_000
            assert list(recipe.evaluate.tasks)[:2] == ["squad", "arc_easy"]
        for name in recipe.data.domains:
            assert recipe.data.domains[name].held_out_tokens >= main.windows * main.context
    assert describe(recipe, 89.9 * 60).endswith("; about 89.9 minutes")


def test_more_time_goes_to_every_part():
    small, large = plan(SLOW, 30, READING), plan(SLOW, 120, READING)
    assert large.align.steps * large.align.rows > 3 * small.align.steps * small.align.rows
    assert large.distill.steps * large.distill.rows > 3 * small.distill.steps * small.distill.rows
    assert list(large.evaluate.tasks) == list(TASKS[: len(large.evaluate.tasks)])
    assert len(large.evaluate.tasks) >= len(small.evaluate.tasks)
    assert large.align.steps >= 250


@pytest.mark.parametrize("minutes", [30.0, 90.0])
def test_stage_two_takes_the_time_that_stage_one_left(minutes):
    first = plan(SLOW, minutes, READING, spent=40.0)
    budget = 60 * minutes
    sampling, aligning, _, evaluation = cost(first, SLOW)
    planned = 40 + sampling + aligning
    tokens = []
    for spent in (0.7 * planned, planned, 1.3 * planned):
        second = replan(first, SLOW, spent)
        assert second.model_copy(update={"distill": first.distill}) == first
        assert spent + cost(second, SLOW)[2] + evaluation <= budget
        tokens.append(second.distill.steps * second.distill.rows)
    assert tokens[0] > tokens[1] > tokens[2] > 0
    assert replan(first, SLOW, 2 * budget).distill.steps == 2  # late, but a run to its end


def test_the_smallest_budget_is_still_a_recipe():
    recipe = plan(SLOW, 0.1, READING, spent=60)
    assert recipe.align.steps == 16  # in fewer, a layer's error may rise
    assert recipe.distill.steps == 2
    assert not recipe.evaluate.tasks
    assert describe(recipe, 300).endswith(
        "; about 5.0 minutes; nothing smaller than this is planned"
    )


@pytest.fixture
def on_tiny(tmp_path, monkeypatch):
    """The quickstart with a tiny teacher, which is never measured."""
    tiny_run.teacher().save(tmp_path / "teacher")
    module = import_module("xlstm_distill.quickstart")  # the package has its function by this name
    monkeypatch.setattr(module, "TEACHER", str(tmp_path / "teacher"))
    monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(packages, "fetch", lambda _: None)


def test_a_quickstart_without_room_is_refused_before_anything_is_measured(
    on_tiny, tmp_path, monkeypatch
):
    room = Room(make_recipe(base_recipe()), TINY_CONFIG)
    usage, real = shutil.disk_usage(tmp_path), os.sysconf
    with monkeypatch.context() as patch:
        free = room.disk_mib * 2**20 - 1
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        with pytest.raises(UserError, match=r"needs 0\.0 GiB of disk in .*run; there are 0\.0 GiB"):
            quickstart(tmp_path / "run")
    pages = max(room.memory.values()) * 2**20 // real("SC_PAGE_SIZE") - 1
    monkeypatch.setattr(os, "sysconf", lambda n: pages if n == "SC_PHYS_PAGES" else real(n))
    with pytest.raises(UserError, match=r"needs 0\.3 GiB of memory; there are"):
        quickstart(tmp_path / "run")


def test_another_budget_is_refused_with_a_way_out(on_tiny, tmp_path):
    with RunDirectory(tmp_path / "run") as directory:
        directory.begin(plan(SLOW, 30, READING))
    message = r"began with --minutes 30, here it is 10; choose another --out \(OUT= of make demo\)"
    with pytest.raises(UserError, match=message):
        quickstart(tmp_path / "run", 10)


def test_evaluation_is_counted_as_it_is_done():
    recipe = plan(faster(SLOW, 4), 60, READING)
    total = sum(fidelity_seconds(SLOW, 2, s, experts=2) for s in recipe.evaluate.fidelity)
    (main, *_) = recipe.evaluate.fidelity
    alone = main.model_copy(update={"expert_windows": 0})
    experts = 2 * 2 * main.expert_windows * main.context * (1 / SLOW.student + 1 / SLOW.head)
    found = fidelity_seconds(SLOW, 2, main, 2) - fidelity_seconds(SLOW, 2, alone, 2)
    assert found == pytest.approx(experts)
    assert evaluation_seconds(recipe, SLOW, READING) > total > 0


def test_validation_and_copies_of_the_weights_are_counted():
    recipe = plan(SLOW, 60, READING)
    settings = {"validate_every": 10, "validate_rows": 2, "keep": "best", "average": 0.99}
    more = make_recipe(
        {**recipe.model_dump(), "distill": {**recipe.distill.model_dump(), **settings}}
    )
    found, before = (estimate(r, TINY_CONFIG, SLOW, READING) for r in (more, recipe))
    times = -(-recipe.distill.steps // 10)
    tokens = 2 * times * 2 * recipe.data.length  # of two experts, one domain each
    # The teacher is loaded again for the rows of the second expert.
    expected = tokens * (1 / SLOW.student + 1 / SLOW.head) + SLOW.load
    taken = found["seconds"]["distill"] - before["seconds"]["distill"]
    assert taken == pytest.approx(expected, abs=0.1)
    assert memory(more) >= memory(recipe)


@pytest.mark.parametrize("stage", ["targets", "distill"])
def test_rows_that_the_teacher_reads_before_a_row_are_counted(stage):
    recipe = plan(SLOW, 60, READING).model_dump()
    recipe["distill"]["state_passing"] = True
    found = []
    for rows_before in (0, 2):
        recipe["targets"].update(rows_before=rows_before, online=stage == "distill")
        found.append(estimate(make_recipe(recipe), TINY_CONFIG, SLOW, READING)["seconds"][stage])
    steps = 2 * recipe["distill"]["steps"]  # of two experts, one domain each
    tokens = steps * recipe["distill"]["rows"] * recipe["data"]["length"]
    assert found[1] - found[0] == pytest.approx(2 * tokens / SLOW.targets, abs=0.2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("align.steps", 0), ("student.mixer", "window"), ("student.keep_attention", "all")],
)
def test_no_stage_one_takes_no_time(key, value):
    with_it, without = make_recipe(values()), make_recipe(changed(key, value))
    found = [estimate(r, TINY_CONFIG, SLOW, READING)["seconds"] for r in (with_it, without)]
    tokens = with_it.align.steps * with_it.align.rows * with_it.data.length
    assert found[0]["align"] - found[1]["align"] == pytest.approx(tokens / SLOW.align, abs=0.1)
    assert found[0]["distill"] == found[1]["distill"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"distill": {"train": train}} for train in ("all", "mixer", "lora")),
        {"student": {"mixer": "window"}},
        {"student": {"keep_attention": "all"}},
        {"targets": {"k": 999}},
        {"targets": {"form": "sampled"}, "distill": {"kl_form": "sampled"}},
    ],
    ids=str,
)
def test_every_kind_of_work_is_measured(tmp_path, changes):
    recipe = values()
    recipe.update({section: {**recipe[section], **keys} for section, keys in changes.items()})
    found = calibrate(tiny_run.teacher(), make_recipe(recipe), tmp_path, 1)
    assert all(0 < value < float("inf") for value in asdict(found).values())
    assert list(tmp_path.iterdir()) == []


def test_online_targets_take_time_in_every_step_and_no_disk():
    shared = make_recipe(values())  # two experts: stored targets of a row serve both
    online = make_recipe(changed("targets", {"k": 12, "online": True}))
    found = [estimate(r, TINY_CONFIG, SLOW, READING) for r in (shared, online)]
    tokens = 2 * shared.distill.steps * shared.distill.rows * shared.data.length
    more = found[1]["seconds"]["distill"] - found[0]["seconds"]["distill"]
    assert more == pytest.approx(tokens / SLOW.targets, abs=0.1)
    assert found[1]["seconds"]["targets"] == 0 < found[0]["seconds"]["targets"]
    assert Room(online, TINY_CONFIG).disk_mib <= Room(shared, TINY_CONFIG).disk_mib


def test_stage_one_by_layer_takes_the_teacher_once_more_and_moves_its_hidden_states():
    found = []
    for order in ("step", "layer"):
        recipe = make_recipe(changed("align.order", order))
        found.append(estimate(recipe, TINY_CONFIG, SLOW, READING)["seconds"]["align"])
    tokens = recipe.align.steps * recipe.align.rows * recipe.data.length
    moved = 3 * 2 * stream_bytes(64, tokens, "float32") / Room(recipe, TINY_CONFIG).student_bytes
    expected = tokens / SLOW.teacher + moved * SLOW.save
    assert found[1] - found[0] == pytest.approx(expected, abs=0.2)


def test_means_best_values_and_validations_of_stage_one_are_counted():
    large = TINY_CONFIG.model_copy(update={"head_dim": 512})
    plain = make_recipe(values())
    more = {"average": 0.9, "validate_every": 4, "validate_rows": 3, "keep": "best"}
    recipe = make_recipe(values(align={**values()["align"], **more}))
    assert recipe.reserved_rows == 3 and plain.reserved_rows == 0
    rooms = [Room(r, large) for r in (recipe, plain)]
    mixers = sum(math.prod(s) for n, s in tensor_shapes(rooms[0].student).items() if ".mixer." in n)
    held = [room.memory["align"] for room in rooms]
    assert held[0] - held[1] == pytest.approx(2 * 4 * mixers / 2**20, abs=1.5)
    found = [estimate(r, TINY_CONFIG, SLOW, READING)["seconds"]["align"] for r in (recipe, plain)]
    tokens = 2 * 2 * 3 * recipe.data.length  # after steps 4 and 6, of two domains
    assert found[0] - found[1] == pytest.approx(tokens / SLOW.align, abs=0.2)


def test_text_takes_time_to_encode(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcd" * 2500)
    sources = [{"kind": "files", "paths": [str(file)]}, {"kind": "stdlib", "max_tokens": 500}]
    recipe = make_recipe(changed("data.domains.notes.sources", sources))
    assert text_bytes(recipe) == 10_000 + 4 * 500
    rates = replace(SLOW, encode=1000.0)
    assert estimate(recipe, TINY_CONFIG, rates, READING)["seconds"]["read"] == 12.0


def test_memory_is_that_of_the_largest_stage():
    large = TINY_CONFIG.model_copy(update={"hidden_size": 2048, "intermediate_size": 8192})

    def room(**changes):
        return Room(make_recipe({**values(), **changes}), large)

    base, teacher = room(), 4 * sum(math.prod(s) for s in tensor_shapes(large).values()) / 2**20
    sections = values()
    evaluate = {**sections["evaluate"], "fidelity": [{"context": 64, "windows": 6}]}
    fewer = base.memory["evaluate"] - room(evaluate=evaluate).memory["evaluate"]
    assert 2 * teacher < fewer < 2.4 * teacher  # two experts that are not loaded
    targets = {**sections["targets"], "online": True}
    more = room(targets=targets).memory["distill"] - base.memory["distill"]
    assert teacher < more < 1.2 * teacher
    for key, less in (("recompute", True), ("train", "mixer")):
        distill = {**sections["distill"], key: less}
        assert room(distill=distill).memory["distill"] < base.memory["distill"]
    by_layer = room(align={**sections["align"], "order": "layer"}).memory["align"]
    assert by_layer < base.memory["align"] - teacher


def test_an_estimate_without_room_for_the_calibration_has_no_time(
    on_tiny, tmp_path, monkeypatch, capsys
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text_of(values(teacher=str(tmp_path / "teacher"))))
    monkeypatch.setattr("xlstm_distill.commands.available_memory", lambda: 2**20)
    monkeypatch.setattr("xlstm_distill.commands.from_checkpoint", lambda _: pytest.fail("loaded"))
    assert main(["estimate", str(recipe)]) == 0
    (time, memory, disk) = capsys.readouterr().out.splitlines()
    assert re.match(r"time +not measured: the calibration needs 0\.. GiB of memory, 0\.0 GiB", time)
    assert re.match(r"memory  \d+ MiB \(stage \w+\)", memory) and disk.startswith("disk")
    assert main(["estimate", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] is None and found["memory_mib"] == max(
        found["memory_mib_by_stage"].values()
    )


def test_the_most_disk_has_a_state_beside_the_one_that_it_replaces():
    sections = values()
    base, large = make_recipe(values()), TINY_CONFIG.model_copy(update={"hidden_size": 2048})
    student = Room(base, large).student_bytes / 2**20
    # student0, aligned, an expert; values, moments and mean of the second, twice.
    distill = {**sections["distill"], "average": 0.9}
    found = Room(make_recipe({**sections, "distill": distill}), large).disk_mib
    assert found == pytest.approx((3 + 2 * 4) * student, rel=0.02)
    mixers = {**sections["distill"], "train": "mixer"}
    assert Room(make_recipe({**sections, "distill": mixers}), large).disk_mib < 5.5 * student


@pytest.mark.parametrize("extra", [{}, {"keep": "best", "validate_every": 5, "average": 0.9}])
def test_memory_depends_on_what_trains(extra):
    def held(**distill):
        recipe = make_recipe(values())
        settings = {**recipe.distill.model_dump(), **extra, **distill}
        large = TINY_CONFIG.model_copy(update={"hidden_size": 2048, "intermediate_size": 8192})
        changed = make_recipe({**recipe.model_dump(), "distill": settings})
        return Room(changed, large).memory["distill"]

    one = held(train="lora", lora={"rank": 1, "targets": ["q_proj"]})
    more = held(train="lora", lora={"rank": 64})
    assert held(train="mixer") < one < more < held(train="all")


def test_the_shipped_recipe_is_valid():
    recipe = make_recipe(base_recipe())
    assert recipe.distill.ce_weight == 0.1 and recipe.distill.kl_weight == 0.9
    assert recipe.student.window == 64 and recipe.student.sinks == 4


# ---- shipped recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name, tmp_path, monkeypatch):
    recipe = load_recipe(name, ["seed=4"])
    assert recipe.seed == 4 and "hybrid xLSTM" in recipe.title
    longest = max(section.context * section.windows for section in recipe.evaluate.fidelity)
    for domain in recipe.data.domains.values():
        # The last windows must not be short of text.
        assert domain.held_out_tokens >= longest
    assert set(recipe.evaluate.tasks) <= set(DEFAULT_TASKS)
    # A file of that name comes first.
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text_of(values(title="mine")))
    assert load_recipe(name).title == "mine"


PAPER = {
    "llama-3.1-8b": (1e-5, 5e9, {"math": 0.35, "code": 0.35, "stem": 0.2, "chat": 0.1}),
    "qwen2.5-7b": (7e-7, 5e9, {"math": 0.2, "code": 0.4, "stem": 0.15, "chat": 0.25}),
    "olmo-3-7b": (1e-5, 20e9, {}),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_large_models_have_the_settings_of_the_paper(name):
    lr, tokens, weights = PAPER[name]
    r = load_recipe(name)
    assert (r.student.mixer, r.student.window, r.student.sinks) == ("hybrid", 512, 4)
    a, d, length = r.align, r.distill, r.data.length
    assert (length, a.rows, a.lr, a.schedule, a.floor, a.weight_decay) == (
        *(4096, 64, 1e-2, "cosine", 1e-5, 0.1),
    )
    assert a.steps * a.rows * length == pytest.approx(655e6, rel=1e-3)
    assert (d.ce_weight, d.kl_weight, r.targets.k, d.train) == (0.9, 0.1, 256, "all")
    assert (d.lr, d.schedule, d.clip, d.weight_decay) == (lr, "constant", 1.0, 0.1)
    assert d.steps * d.rows * length == pytest.approx(tokens, rel=1e-3)
    assert r.merge.weights == weights and r.compute == "mixed"


def test_a_name_that_is_no_recipe(capsys, tmp_path):
    with pytest.raises(UserError, match=r"shipped recipes: llama-3\.1-8b, "):
        load_recipe("lama")
    assert main(["recipes", "lama"]) == 2
    assert "lama: not one of llama-3.1-8b, " in capsys.readouterr().err
    assert main(["recipes"]) == 0
    assert re.search("smollm2-135m-night +SmolLM2", capsys.readouterr().out)
    for name in shipped_recipes():
        assert main(["recipes", name]) == 0
        text = capsys.readouterr().out
        assert parse_recipe(text, "copy") == load_recipe(name) and text.startswith("#")
    assert main(["validate", "qwen2.5-7b", "--set", "align.stepz=3"]) == 2
    assert "qwen2.5-7b: align.stepz: unknown key" in capsys.readouterr().err
