"""LoRA: exact gradients, merged is applied, what is frozen, PEFT's files, resume, whole runs."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import tiny_run
import yaml
from models import of_family, random_batch, random_model
from safetensors.numpy import load_file, save_file
from test_model import directional_errors
from test_resume import check_the_same, finish, prepare, stop
from tolerances import DIRECTIONAL_F64, OP_F32, OP_F64

from xlstm_distill import reference, runtime
from xlstm_distill.cli import main
from xlstm_distill.data import Batches, Rows
from xlstm_distill.distill import distill
from xlstm_distill.errors import UserError
from xlstm_distill.families import FAMILIES
from xlstm_distill.linearize import linearize
from xlstm_distill.lora import TARGETS, Lora, merge_adapter
from xlstm_distill.model import load
from xlstm_distill.optim import in_mixer
from xlstm_distill.testing import assert_close

LENGTH = 32


@pytest.fixture(scope="module")
def teacher():
    return tiny_run.teacher()


@pytest.fixture(scope="module")
def text(teacher):
    return tiny_run.text(teacher)


def with_random_factors(model, **settings) -> Lora:
    """An adapter in the middle of training: no factor is 0."""
    lora = Lora(model, **settings)
    random = np.random.default_rng(7)
    for name in lora.params:
        lora.params[name] += 0.1 * random.standard_normal(lora.params[name].shape)
    lora.merge()
    return lora


def matrices(lora):
    """(name, A, B) of every adapted matrix."""
    for name in lora.params:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            yield module + ".weight", lora.params[name], lora.params[module + ".lora_B.weight"]


def stage(teacher, text, lora=None, mixer="hybrid", **changes):
    """A new student, its adapter and the generator that trains it."""
    student = linearize(teacher, mixer=mixer, window=6, sinks=2)
    adapter = Lora(student, **{"rank": 3, "alpha": 6, "seed": 5, **(lora or {})})
    rows = Rows(text, LENGTH, 1, reserve=3)
    held_out = rows.batch("data", rows.reserved)
    ids, logp, _ = teacher.topk(held_out.ids, 8, reset=held_out.reset)
    settings = {
        "steps": 9,
        "k": 8,
        "lr": 1e-2,
        "held_out": held_out,
        "held_out_targets": (ids, logp),
        "validate_every": 2,
        **changes,
    }
    batches = Batches({"data": rows}, 2, seed=0)
    return student, adapter, distill(student, batches, teacher, train_what=adapter, **settings)


# ---- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["hybrid", "window", "mlstm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_every_factor(mixer, family):
    model = random_model(mixer, dtype=np.float64, **of_family(family))
    lora = with_random_factors(model, rank=3, alpha=5)
    ids, reset, labels = random_batch(model, 2, 21)

    def loss(grads=None):
        lora.merge()
        return model.loss_and_grad(
            ids,
            labels,
            ce_weight=1.0,
            kl_weight=0.0,
            reset=reset,
            grads=grads,
            trainable=lora.wanted,
        )["ce"]

    of_model, grads = model.params.zeros_like(), lora.params.zeros_like()
    loss(of_model)
    lora.gradient(of_model, grads)
    assert not of_model.flat.any()  # ready for the next batch
    errors = directional_errors(lora, loss, grads)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])
    once = grads.flat.copy()
    loss(of_model)
    lora.gradient(of_model, grads)
    assert_close(grads.flat, 2 * once, OP_F64, "lora gradient")  # it is added


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, OP_F64), (np.float32, OP_F32)])
def test_merged_is_applied(dtype, tolerance):
    model = random_model("hybrid", dtype=dtype)
    before = model.copy()
    lora = with_random_factors(model, rank=5, alpha=7)
    random = np.random.default_rng(1)
    names = [name for name, _, _ in matrices(lora)]
    assert len(names) == 2 * len(TARGETS)
    for name, a, b in matrices(lora):
        x = random.standard_normal((11, a.shape[1]))
        a, b, base = (np.asarray(v, np.float64) for v in (a, b, before.params[name]))
        low = reference.linear_forward(reference.linear_forward(x, a), b)
        applied = reference.linear_forward(x, base) + 7 / 5 * low
        assert_close(reference.linear_forward(x, model.params[name]), applied, tolerance, "lora")


def test_it_begins_as_the_model_is_and_as_peft_begins(teacher):
    student = linearize(teacher, window=6, sinks=2)
    before = student.params.flat.copy()
    lora = Lora(student, rank=64, seed=1)
    lora.merge()
    assert np.array_equal(student.params.flat, before)
    for _, a, b in matrices(lora):
        bound = a.shape[1] ** -0.5  # kaiming_uniform_ with a = 5^(1/2)
        assert np.abs(a).max() <= bound and not b.any()
        # a uniform number's deviation is bound / 3^(1/2), that of 4,096 and more is off by 1 %
        assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.05)
    same, other = Lora(student, rank=64, seed=1), Lora(student, rank=64, seed=2)
    assert np.array_equal(same.params.flat, lora.params.flat)
    assert not np.array_equal(other.params.flat, lora.params.flat)


def test_factors_do_not_depend_on_the_number_of_threads():
    found, before = [], runtime.threads()
    try:
        for threads in (1, 2, 3):
            runtime.set_threads(threads)
            lora = with_random_factors(random_model("hybrid", hidden_size=112), rank=5)
            own = lora.params.zeros_like()
            lora.gradient(lora.model.params.copy(), own)
            found.append((lora.model.params.flat.tobytes(), own.flat.tobytes()))
    finally:
        runtime.set_threads(before)
    assert found[0] == found[1] == found[2]


# ---- training -----------------------------------------------------------------------------------


def test_the_loss_falls_and_what_is_frozen_stays(teacher, text):
    student, lora, generator = stage(teacher, text, steps=40, validate_every=0)
    before = student.copy()
    losses = [m["loss"] for m in generator]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    for name in student.params:
        same = np.array_equal(student.params[name], before.params[name])
        assert same == (name not in lora.wanted), name
    for name, a, _ in matrices(lora):
        change = student.params[name].astype(np.float64) - before.params[name]
        values = np.linalg.svd(change, compute_uv=False)
        # of rank 3 but for the rounding of W, 6e-8 of numbers near 1
        assert values[len(a)] <= 1e-5 * values[0]


def test_only_the_targets_are_adapted(teacher, text):
    student, lora, generator = stage(teacher, text, lora={"targets": ["v_proj", "q_proj"]})
    before = student.copy()
    list(generator)
    changed = {n for n in student.params if (student.params[n] != before.params[n]).any()}
    assert changed == lora.wanted
    adapted = {n for n in changed if not in_mixer(n)}
    assert len(adapted) == 4 and all("q_proj" in n or "v_proj" in n for n in adapted)


def test_it_trains_where_there_are_no_mixers(teacher, text):
    _, lora, generator = stage(teacher, text, mixer="window", steps=20)
    losses = [m["loss"] for m in generator]
    assert losses[-1] < losses[0]
    assert len(list(lora.params)) == 2 * len(lora.wanted)


def test_rates_of_a_role_are_those_of_its_factors(teacher, text):
    settings = {"rates": {"mlp": 1e-9}, "weight_decay": 0.0, "steps": 3, "validate_every": 0}
    _, lora, generator = stage(teacher, text, **settings)
    start = {n: lora.params[n].copy() for n in lora.params}
    list(generator)
    for name in lora.params:
        moved = np.abs(lora.params[name] - start[name]).max()
        assert (moved < 1e-7) == (".mlp." in name), name


@pytest.mark.parametrize("mean", [None, 0.8])
def test_it_ends_as_the_factors_say(teacher, text, mean):
    """Last, mean or best: the student is the merged one."""
    for keep in ("last", "best"):
        student, lora, generator = stage(teacher, text, average=mean, keep=keep)
        list(generator)
        ended = student.params.flat.copy()
        lora.merge()
        assert np.array_equal(student.params.flat, ended)


@pytest.mark.parametrize("stops", [(1,), (4, 3), (8,)])
def test_it_continues_bitwise(tmp_path, teacher, text, stops):
    settings = {
        "average": 0.9,
        "keep": "best",
        "window_dropout": 0.4,
        "rates": {"mixer": 2.0, "mlp": 0.5},
        "clip": 0.3,
    }
    whole, _, generator = stage(teacher, text, **settings)
    expected = [(m["step"], m["loss"], m.get("validation")) for m in generator]
    seen = []
    for count in (*stops, None):
        student, lora, generator = stage(teacher, text, state=tmp_path / "state.npz", **settings)
        for n, m in enumerate(generator, start=1):
            seen.append((m["step"], m["loss"], m.get("validation")))
            if n == count:
                break
        generator.close()
    assert seen == expected
    assert np.array_equal(student.params.flat, whole.params.flat)
    with np.load(tmp_path / "state.npz") as saved:  # of the factors alone
        assert saved["m"].size == sum(e.size for e in lora.params.entries)


def test_a_state_of_another_adapter_is_refused(tmp_path, teacher, text):
    state = tmp_path / "state.npz"
    _, _, generator = stage(teacher, text, state=state)
    next(generator)
    generator.close()
    _, _, generator = stage(teacher, text, lora={"alpha": 7}, state=state)
    with pytest.raises(UserError, match=r"saved with train .*'alpha': 6"):
        next(generator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0}, "alpha 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["q_proj", "embed_tokens"]}, "'embed_tokens' is not one of q_proj"),
    ],
)
def test_wrong_values_are_named(teacher, settings, message):
    with pytest.raises(UserError, match=message):
        Lora(teacher, **settings)


def test_weights_in_bf16_and_other_models_are_refused(teacher, text):
    with pytest.raises(UserError, match='weights are bf16; load the model with compute="f32"'):
        Lora(teacher.copy(compute="bf16"))
    student = linearize(teacher, window=6, sinks=2)
    with pytest.raises(UserError, match="another model"):
        next(distill(student, text, teacher, steps=1, train_what=Lora(teacher)))
    with pytest.raises(UserError, match="train_what is 'lora', expected all, mixer or"):
        next(distill(student, text, teacher, steps=1, train_what="lora"))


# ---- PEFT's files -------------------------------------------------------------------------------


def test_the_files_are_those_of_peft(tmp_path, teacher, text):
    """Names and shapes by PEFT's description of its checkpoint files."""
    student, lora, generator = stage(teacher, text, lora={"targets": ["q_proj", "down_proj"]})
    list(generator)
    place = lora.save(tmp_path / "adapter", base="base", provenance={"a": 1})
    names = ["adapter_config.json", "adapter_model.safetensors", "provenance.json"]
    assert sorted(p.name for p in place.iterdir()) == names
    assert json.loads((place / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["mixer"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    found = load_file(place / "adapter_model.safetensors")
    layers = "base_model.model.model.layers."
    expected = {}
    for n in range(2):
        expected[f"{layers}{n}.self_attn.q_proj.lora_A.weight"] = (3, 64)
        expected[f"{layers}{n}.self_attn.q_proj.lora_B.weight"] = (64, 3)
        expected[f"{layers}{n}.mlp.down_proj.lora_A.weight"] = (3, 96)
        expected[f"{layers}{n}.mlp.down_proj.lora_B.weight"] = (64, 3)
        # of a module in modules_to_save all tensors, also those that do not train
        for name in student.params:
            if f".{n}.mixer." in name:
                expected["base_model.model." + name] = student.params[name].shape
    assert {name: value.shape for name, value in found.items()} == expected
    assert all(value.dtype == np.float32 for value in found.values())


def test_an_adapter_makes_the_merged_model_of_its_base(tmp_path, teacher, text):
    student, lora, generator = stage(teacher, text)
    base = student.copy()
    list(generator)
    merged = merge_adapter(base, lora.save(tmp_path / "adapter"))
    assert np.array_equal(merged.params.flat, student.params.flat)
    assert not np.array_equal(merged.params.flat, base.params.flat)
    lora.save(tmp_path / "adapter")  # is replaced
    # A plain transformer takes the factors of its window student: that has no mixers.
    student, lora, generator = stage(teacher, text, mixer="window")
    list(generator)
    plain = merge_adapter(teacher, lora.save(tmp_path / "plain"))
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert np.array_equal(plain.params.flat, student.params.flat)


def write_adapter(place, tensors, **changes):
    """An adapter as others save it: half precision, keys that this package does not write."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.05,
        "rank_pattern": {},
        "use_dora": False,
        "layer_replication": None,
        **changes,
    }
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {n: np.asarray(v, np.float16) for n, v in tensors.items()},
        place / "adapter_model.safetensors",
    )
    return place


Q = "base_model.model.model.layers.0.self_attn.q_proj."


def factors(**changes):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 64)), random.standard_normal((64, 2))
    return {Q + "lora_A.weight": a, Q + "lora_B.weight": b, **changes}


def test_an_adapter_of_others_is_merged(tmp_path, teacher):
    tensors = factors()
    merged = merge_adapter(teacher, write_adapter(tmp_path / "a", tensors))
    a, b = (np.asarray(v, np.float16).astype(np.float64) for v in tensors.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_close(merged.params[name], teacher.params[name] + 8 * b @ a, OP_F32, "lora")
    for other in teacher.params:
        assert (other == name) != np.array_equal(merged.params[other], teacher.params[other])


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {"peft_type": "IA3"}, "peft_type 'IA3' is not supported; expected LORA"),
        ({}, {"peft_type": None}, "peft_type is missing"),
        ({}, {"use_dora": True}, "use_dora True is not supported"),
        ({}, {"use_rslora": True}, "use_rslora True is not supported"),
        ({}, {"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\] is not supported"),
        ({}, {"kasa_config": {}}, "kasa_config {} is not supported"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not"),
        ({}, {"bias": "all"}, "bias 'all' is not supported"),
        ({}, {"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({}, {"r": 0}, "r is 0"),
        ({}, {"r": "2"}, "r is '2'"),
        ({}, {"lora_alpha": None}, "lora_alpha is None"),
        ({}, {"r": 4}, r"lora_A.weight has shape \[2, 64\], expected \[4, 64\]"),
        ({Q + "lora_B.weight": np.ones((63, 2))}, {}, r"\[63, 2\], expected \[64, 2\]"),
        ({Q + "lora_C.weight": np.ones(2)}, {}, "nothing that takes tensor .*lora_C"),
        ({"base_model.model.model.layers.0.mixer.map_q": np.ones(2)}, {}, "nothing that takes"),
        (
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((2, 64))},
            {},
            "nothing that takes tensor model.layers.9",
        ),
        (
            {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight": np.ones((2, 64))},
            {},
            "tensor model.layers.1.self_attn.q_proj.lora_B.weight is missing",
        ),
        ({"model.lora": np.ones(2)}, {}, "model.lora has no base_model.model. before it"),
        ({Q + "lora_A.weight": np.full((2, 64), np.nan)}, {}, r"lora_A\.weight holds nan"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, teacher, tensors, changes, message):
    place = write_adapter(tmp_path / "a", factors(**tensors), **changes)
    before = teacher.params.flat.copy()
    with pytest.raises(UserError, match=message) as error:
        merge_adapter(teacher, place)
    assert "\n" not in str(error.value) and str(place) in str(error.value)
    assert np.array_equal(teacher.params.flat, before)


def test_a_directory_without_an_adapter_is_named(tmp_path, teacher):
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot read"):
        merge_adapter(teacher, tmp_path)
    with pytest.raises(UserError, match="weights are int8"):
        merge_adapter(teacher.copy(compute="int8"), tmp_path)


# ---- whole runs ---------------------------------------------------------------------------------

ADAPTED = {"steps": 12, "rows": 2, "lr": 1e-2, "train": "lora", "lora": {"rank": 4, "alpha": 8}}


def test_a_recipe_trains_adapters(tmp_path, teacher):
    teacher.save(tmp_path / "teacher")
    text = tiny_run.write_text(tmp_path / "text")
    values = tiny_run.recipe(tmp_path / "teacher", text, distill=ADAPTED)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(out)]) == 0
    assert (out / "report" / "report.html").is_file()
    written = yaml.safe_load((out / "recipe.yaml").read_text())["distill"]["lora"]
    assert written == {"rank": 4, "alpha": 8, "targets": list(TARGETS)}
    aligned = load(out / "aligned")
    for name in ("general", "notes"):
        adapter, expert = out / "experts" / f"{name}.adapter", load(out / "experts" / name)
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (adapter / config["base_model_name_or_path"]).resolve() == (out / "aligned")
        assert np.array_equal(merge_adapter(aligned, adapter).params.flat, expert.params.flat)
        for frozen in ("model.embed_tokens.weight", "model.norm.weight"):
            assert np.array_equal(expert.params[frozen], aligned.params[frozen])
    assert load(out / "merged").provenance["merge"]["experts"][0]["weight"] == 0.5


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, teacher):
    recipe, whole, killed = prepare(tmp_path, teacher, 0), tmp_path / "whole", tmp_path / "killed"
    values = yaml.safe_load(recipe.read_text())
    values["distill"].update(train="lora", lora={"rank": 4})
    recipe.write_text(yaml.safe_dump(values))
    finish(recipe, whole)
    for stage_, step in (("distill general", 23), ("distill notes", 40)):
        stop(recipe, killed, {(stage_, step)}, 0.0, signal.SIGKILL)
    finish(recipe, killed)
    check_the_same(whole, killed)
    assert (whole / "experts" / "notes.adapter" / "adapter_model.safetensors").is_file()
