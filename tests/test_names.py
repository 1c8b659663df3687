"""Names of tasks: variants of request sets, patterns, and what cannot be meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_tasks import Bigram, request, write_task

from xlstm_distill import packages
from xlstm_distill.errors import UserError
from xlstm_distill.evaluate import DEFAULT_TASKS, evaluate, load_task
from xlstm_distill.evaluate.mmlu import GROUPS, SUBJECTS
from xlstm_distill.evaluate.names import (
    REQUESTS,
    VARIANTS,
    check_task,
    expand_tasks,
    find_task,
    groups_of,
    source_of,
)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    rows = [request(n, 0, f"What is {n}? Answer:", f" {n}", None) for n in range(3)]
    for name in ("squad/bpb_5shot", "jeopardy/bpb_5shot", "csqa/mc_5shot", "own/mc_5shot"):
        write_task(tmp_path, name, rows)
    return tmp_path


def test_a_bare_name_is_the_default_variant_and_names_in_results_stay(requests):
    assert find_task("jeopardy", requests) == requests / "jeopardy/bpb_5shot"
    # As in result files from before jeopardy had a default variant.
    for name in ("jeopardy", "jeopardy:bpb_5shot"):
        assert load_task(name, requests).name == "jeopardy:bpb_5shot"
        out = evaluate(Bigram(1), [name], requests=requests)
        assert list(out["results"]) == ["jeopardy:bpb_5shot"]
    assert load_task("squad:bpb_5shot", requests).name == "squad"
    assert load_task("own:mc_5shot", requests).name == "own:mc_5shot"


def test_patterns_match_over_all_sets_and_variants(requests):
    assert expand_tasks(["squad", "squad:bpb_5shot", "own:x"]) == ["squad", "own:x"]
    assert expand_tasks(["jeop*", "jeopardy"]) == ["jeopardy:bpb_5shot"]
    skills = expand_tasks(["basic_skills_*"])
    assert len(skills) == 6 and all(name.endswith(":rc_5shot") for name in skills)
    assert "minerva_math_500:gold_bpb_0shot" in expand_tasks(["minerva_math_*"])
    assert "minerva_math_algebra" in expand_tasks(["minerva_math_*"])
    assert len(expand_tasks(["*"])) == len(VARIANTS) > len(DEFAULT_TASKS)
    assert expand_tasks(["*:mc_5shot"], requests) == ["csqa:mc_5shot", "own:mc_5shot"]
    assert expand_tasks(["s*:*"], requests) == ["squad"]
    assert expand_tasks(["*:512"])[-1] == "vt:512"
    assert expand_tasks(["niah_single_*:512"]) == [f"niah_single_{n}:512" for n in (1, 2, 3)]


def test_subjects_of_mmlu_and_groups_of_them():
    assert expand_tasks(["mmlu_anatomy", "mmlu_anatomy:rc_5shot"]) == ["mmlu_anatomy"]
    assert expand_tasks(["mmlu_anatomy:mc_0shot"]) == ["mmlu_anatomy:mc_0shot"]
    assert expand_tasks(["mmlu"]) == expand_tasks(["mmlu_*"]) == list(SUBJECTS)
    letters = [f"{task}:mc_5shot" for task in SUBJECTS]
    assert expand_tasks(["mmlu:mc_5shot"]) == expand_tasks(["mmlu_*:mc_5shot"]) == letters
    assert expand_tasks(["mmlu_stem:rc_5shot"]) == list(GROUPS["mmlu_stem"])
    assert len(expand_tasks(["mmlu*:*"])) == 4 * 57
    assert expand_tasks(["mmlu_other", "mmlu_virology"]) == list(GROUPS["mmlu_other"])
    # Patterns that do not begin with mmlu are over request sets, as before there were subjects.
    assert not any(name.startswith("mmlu") for name in expand_tasks(["*", "m*"]))
    assert groups_of(["mmlu_*", "mmlu_anatomy", "squad"]) == {}
    assert groups_of(["mmlu_stem:rc_5shot"]) == {"mmlu_stem": list(GROUPS["mmlu_stem"])}
    found = groups_of(["mmlu:mc_5shot"])
    assert found["mmlu:mc_5shot"] == [f"{category}:mc_5shot" for category in GROUPS["mmlu"]]
    assert len(found) == 5 and found["mmlu_stem:mc_5shot"][0] == "mmlu_abstract_algebra:mc_5shot"


def test_what_is_not_known_of_mmlu_is_refused(requests):
    with pytest.raises(UserError, match="'mmlu_anatmy' is not known; did you mean mmlu_anatomy"):
        expand_tasks(["mmlu_anatmy"])
    with pytest.raises(UserError, match=r"'mmlu_anatmy:rc_5shot': .* there are mmlu_anatomy"):
        find_task("mmlu_anatmy:rc_5shot", requests)
    with pytest.raises(UserError, match=r"'mmlu_anatmy\*' matches nothing; did you mean mmlu_an"):
        expand_tasks(["mmlu_anatmy*"])
    for name in ("mmlu_stem:mc", "mmlu_anatomy:mc"):
        with pytest.raises(UserError, match="has the variants rc_5shot, mc_5shot, rc_0shot, mc_0"):
            expand_tasks([name])
    check_task("mmlu_anatomy:mc_5shot")
    for one in (check_task, find_task):  # where a single task is wanted
        with pytest.raises(UserError, match=r"'mmlu_stem' is a group; name .* mmlu_astronomy, "):
            one("mmlu_stem")


def test_a_name_says_what_its_task_is_made_of():
    for name, source in (
        ("squad", ("squad", False)),
        ("arc_easy:rc_0shot", ("arc_easy:rc_0shot", False)),
        ("gsm8k", ("gsm8k", False)),
        ("gsm8k:generate", ("gsm8k", True)),
        ("mmlu_anatomy", ("mmlu_anatomy", False)),
        ("vt:512", (None, True)),
        ("niah_single_1:long", (None, True)),  # its length is checked elsewhere
    ):
        assert source_of(name) == source


def test_what_is_not_known_is_refused_with_the_nearest(requests):
    with pytest.raises(UserError, match="'jeopady' is not known; did you mean jeopardy"):
        expand_tasks(["jeopady"])
    with pytest.raises(UserError, match=r"'xyz\*' matches nothing; there are arc_easy, .*, mmlu,"):
        expand_tasks(["xyz*"])
    with pytest.raises(UserError, match=r"'jeopady\*' matches nothing; did you mean jeopardy"):
        expand_tasks(["jeopady*"])
    with pytest.raises(UserError, match=r"'squad:mc_\*': squad has the variants bpb_5shot"):
        expand_tasks(["squad:mc_*"], requests)
    with pytest.raises(
        UserError, match=r"'niah_\*': expected a length in tokens, as in niah_\*:4096"
    ):
        expand_tasks(["niah_*"])
    with pytest.raises(UserError, match="no such directory of request sets"):
        expand_tasks(["*:mc_5shot"], requests / "none")
    with pytest.raises(UserError, match=r"csqa has the variants mc_5shot$"):
        find_task("csqa", requests)
    write_task(requests, "gsm8k/gold_bpb_5shot", [request(0, 0, "1 + 1 =", " 2", None)])
    for name in ("gsm8k:gen", "gsm8k:x*"):
        with pytest.raises(UserError, match=r"gsm8k has the variants gold_bpb_5shot, generate$"):
            load_task(expand_tasks([name], requests)[0], requests)


@pytest.mark.real
def test_default_variants_follow_the_rule():
    root = packages.fetch("olmes")
    found = {}
    for folder in sorted({file.parents[1] for file in root.glob(f"*/*/{REQUESTS}")}):
        shots = {}
        variants = [p.parent.name for p in folder.glob(f"*/{REQUESTS}")]
        for variant in variants:
            # test_, val_ and xl_ stand in front of what would be a name by itself, mc_ is letters.
            if m := re.fullmatch(r"(?:(?:rc|bpb|gold_bpb)_(\d+)shot|10way)", variant):
                shots[variant] = int(m[1] or 0)
        found[folder.name] = plain = max(shots, key=shots.__getitem__)
        if f"val_{plain}" in variants:
            part, whole = (
                {d.pairs for d in load_task(f"{folder.name}:{variant}").documents}
                for variant in (plain, f"val_{plain}")
            )
            if part < whole:
                found[folder.name] = f"val_{plain}"
    assert found == VARIANTS
