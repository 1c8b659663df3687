"""Stage I by layer and out of core: the same bits as in memory, each layer read once."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import tiny_run
from models import MIXERS, of_family, random_batch, random_model
from tolerances import STREAM_BF16

import xlstm_distill
from xlstm_distill import checkpoints
from xlstm_distill.align import MixerTraining, align, has_stopped, relative_errors, trained_layers
from xlstm_distill.checkpoints import LazyTensors
from xlstm_distill.config import ModelConfig
from xlstm_distill.data import Batches, Rows
from xlstm_distill.errors import UserError
from xlstm_distill.layerwise import HiddenStream, align_layers, aligned_student
from xlstm_distill.linearize import linearize
from xlstm_distill.model import Model, fingerprint_of

LENGTH = 32
LAYERS = 4
MIXED = ["hybrid", "mlstm", "hybrid max", "linear"]


def random_teacher(**changes):
    """Four layers, two query heads to a key head."""
    small = tiny_run.teacher()
    sizes = {**small.config.model_dump(), "num_hidden_layers": LAYERS, "mixers": []}
    config = ModelConfig(**{**sizes, **changes})
    model = Model(config, small.tokenizer, source="tiny")
    random = np.random.default_rng(0)
    for e in model.params.entries:
        value = random.standard_normal(e.shape) * 0.2
        model.params[e.name] = (value * 0.3 + 1 if e.role == "norm" else value).astype(np.float32)
    return model


@pytest.fixture(scope="module")
def teacher():
    return random_teacher()


@pytest.fixture(scope="module")
def directory(teacher, tmp_path_factory):
    place = tmp_path_factory.mktemp("teacher") / "teacher"
    teacher.save(place)
    return place


@pytest.fixture(scope="module")
def text(teacher):
    return tiny_run.text(teacher)


def batches(text, rows=3):
    return Batches({"data": Rows(text, LENGTH, 1)}, rows, seed=0)


def in_memory(teacher, text, *, layers=None, compute="f32", keep=(), **settings):
    """(student, metrics) of the order that holds the teacher."""
    student = linearize(teacher, window=6, sinks=2, keep_attention=keep)
    student.compute = compute
    found = list(align(student, teacher, batches(text), layers=layers, **settings))
    return student, found


def by_layer(directory, text, place, *, keep=(), options=None, stop_after=None, **settings):
    """(aligned checkpoint, metrics) of the order that does not; closed after so many steps."""
    source = linearize(checkpoints.load(directory), window=6, sinks=2, keep_attention=keep)
    training = MixerTraining(**settings)
    generator = align_layers(source, batches(text), place, training, **(options or {}))
    found = []
    for m in generator:
        found.append(m)
        if len(found) == stop_after:
            break
    generator.close()
    return aligned_student(source, place), found


def assert_same_mixers(student, aligned):
    different = [
        n for n in student.params if not np.array_equal(student.params[n], aligned.tensors[n])
    ]
    assert different == []


# ---- one model of one layer after another is the model ------------------------------------------


KINDS = [
    (name, "llama")
    for name in ("hybrid", "mlstm", "linear", "window", "hybrid fixed gate", "lolcats")
]
KINDS += [("hybrid", family) for family in ("qwen2", "olmo2", "olmo3")]


@pytest.mark.parametrize(("mixer", "family"), KINDS)
def test_layers_alone_give_the_errors_gradients_and_stream_of_the_model(mixer, family):
    model = random_model(mixer, num_hidden_layers=3, **of_family(family, 3))
    ids, reset, _ = random_batch(model, 2, 37)
    whole = model.params.zeros_like()
    error, reference, _ = model.align_and_grad(ids, reset, whole)
    hidden = model.params["model.embed_tokens.weight"][ids]
    for layer in range(3):
        windows = model.config.teacher_windows[layer : layer + 1]
        alone = ModelConfig(**{**model.config.model_dump(), "num_hidden_layers": 1,
                               "mixers": [MIXERS[mixer]], "teacher_windows": windows})  # fmt: skip
        single = Model(alone)
        for e in single.params.entries:
            single.params[e.name] = model.params[e.name.replace("layers.0", f"layers.{layer}")]
        grads, out = single.params.zeros_like(), np.empty_like(hidden)
        e, r, n = single.align_hidden(hidden, reset, grads, out=out)
        assert (e[0], r[0], n) == (error[layer], reference[layer], ids.size)
        for name in single.params:
            there = name.replace("layers.0", f"layers.{layer}")
            assert np.array_equal(grads[name], whole[there]), there
        hidden = out
    norm = model.params["model.norm.weight"]
    expected = model.copy()
    teacher = Model(ModelConfig(**{**model.config.model_dump(), "mixers": []}))
    teacher.fill({n: expected.params[n] for n in teacher.params})
    scale = np.sqrt((hidden.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
    assert np.abs(teacher.hidden(ids, reset=reset) - hidden / scale * norm).max() < 1e-5


def test_layers_that_are_not_compared_cost_and_change_nothing():
    model = random_model("hybrid", num_hidden_layers=3)
    ids, reset, _ = random_batch(model, 2, 21)
    whole, some = model.params.zeros_like(), model.params.zeros_like()
    error, reference, _ = model.align_and_grad(ids, reset, whole)
    e, r, _ = model.align_and_grad(ids, reset, some, layers=[1])
    assert e.tolist() == [0, error[1], 0] and r.tolist() == [0, reference[1], 0]
    for entry in model.params.entries:
        expected = whole.view(entry) if entry.group == 1 else 0
        assert (some.view(entry) == expected).all(), entry.name
    model.params["model.layers.2.self_attn.q_proj.weight"][:] = np.nan  # never looked at
    assert model.align_and_grad(ids, reset, layers=[1])[0][1] == error[1]


# ---- both orders --------------------------------------------------------------------------------

STOPPING = {"steps": 24, "patience": 3, "lr": 0.3, "warmup": 0.0}
"""One layer stops after 6 steps, the others after 15."""
SETTINGS = [
    {"steps": 7},
    {"steps": 7, "clip": 0.05, "micro_rows": 2, "rates": {"map": 3.0}, "schedule": "linear"},
    STOPPING,
    {"steps": 5, "micro_rows": 1, "accumulation": "tree"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("compute", ["f32", "mixed"])
def test_both_orders_end_with_the_same_bits(tmp_path, teacher, directory, text, settings, compute):
    student, steps = in_memory(teacher, text, compute=compute, **settings)
    options = {"compute": compute}
    aligned, found = by_layer(directory, text, tmp_path / "w", options=options, **settings)
    assert_same_mixers(student, aligned)
    for m in found:
        step = steps[m["layer_step"] - 1]
        assert step["layers"][m["layer"]] == m["relative_error"], m
        assert step["lr"] == m["lr"]
    assert [m["step"] for m in found] == [
        m["layer"] * settings["steps"] + m["layer_step"] for m in found
    ]
    assert not (tmp_path / "w" / "stream").exists()


def test_sliding_layers_train_alike_in_both_orders(tmp_path, text):
    teacher = random_teacher(**of_family("olmo3", LAYERS))
    teacher.save(tmp_path / "teacher")
    student, steps = in_memory(teacher, text, steps=5, keep=[1])
    aligned, found = by_layer(tmp_path / "teacher", text, tmp_path / "w", steps=5, keep=[1])
    assert_same_mixers(student, aligned)
    assert {m["layer"] for m in found} == {0, 2, 3}
    for m in found:
        assert steps[m["layer_step"] - 1]["layers"][m["layer"]] == m["relative_error"], m


def test_every_kind_of_mixer_trains_alike_in_both_orders(tmp_path, teacher, text):
    mixers = [MIXERS[name] for name in MIXED]
    student = linearize(teacher)
    mixed = Model(
        ModelConfig(**{**student.config.model_dump(), "mixers": mixers}), teacher.tokenizer
    )
    random = np.random.default_rng(1)
    for e in mixed.params.entries:
        inherited = e.name in teacher.params
        mixed.params[e.name] = (
            teacher.params[e.name] if inherited else random.standard_normal(e.shape) * 0.3
        )
    mixed.save(tmp_path / "student")
    source = checkpoints.load(tmp_path / "student")
    list(align(mixed, teacher, batches(text), steps=5, clip=0.1))
    training = MixerTraining(steps=5, clip=0.1)
    list(align_layers(source, batches(text), tmp_path / "w", training))
    assert_same_mixers(mixed, aligned_student(source, tmp_path / "w"))


def test_clipping_by_layer_is_by_each_layers_own_norm(teacher, text):
    plain, _ = in_memory(teacher, text, steps=3)
    wide, _ = in_memory(teacher, text, steps=3, clip=1e9)
    narrow, _ = in_memory(teacher, text, steps=3, clip=1e-3)
    assert np.array_equal(plain.params.flat, wide.params.flat)
    assert not np.array_equal(plain.params.flat, narrow.params.flat)


def test_bfloat16_states_are_near(tmp_path, teacher, directory, text):
    student, _ = in_memory(teacher, text, steps=20)
    aligned, _ = by_layer(directory, text, tmp_path / "w", options={"stream": "bfloat16"}, steps=20)
    rounded = Model(student.config).fill(aligned.tensors)
    probe = [Rows(text, LENGTH, 9).batch("data", range(4))]
    expected = np.array(relative_errors(student, probe))
    found = np.array(relative_errors(rounded, probe))
    assert not np.array_equal(rounded.params.flat, student.params.flat)
    assert (np.abs(found - expected) <= STREAM_BF16 * expected).all(), found / expected


def test_rounding_is_to_the_nearest_bfloat16_ties_to_even(tmp_path):
    values = np.array([1.0, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 3e38, 0.0])
    stream = HiddenStream(tmp_path / "s", "bfloat16", {})
    stream.write(0, 0, values.astype(np.float32)[None, None])
    step = 2.0**-7
    expected = [1.0, 1.0, 1.0, 1 + 2 * step, -(1 + step), 3e38, 0.0]
    assert np.allclose(stream.read(0)[0, 0], expected, rtol=2**-9, atol=0)
    assert stream.read(0)[0, 0, :5].tolist() == expected[:5]
    with pytest.raises(UserError, match="enters layer 3 of the teacher is not finite"):
        stream.write(3, 0, np.full((1, 1, 2), np.nan, np.float32))


# ---- some layers, early stop --------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[2], [0, 3], [1, 2]])
def test_a_layer_trains_as_if_it_were_alone(tmp_path, teacher, directory, text, layers):
    everything, _ = in_memory(teacher, text, steps=6)
    start = linearize(teacher, window=6, sinks=2)
    student, steps = in_memory(teacher, text, layers=layers, steps=6)
    for e in student.params.entries:
        expected = everything if e.group in layers else start
        assert np.array_equal(student.params[e.name], expected.params[e.name]), e.name
    assert [x is not None for x in steps[0]["layers"]] == [n in layers for n in range(LAYERS)]
    aligned, found = by_layer(directory, text, tmp_path / "w", options={"layers": layers}, steps=6)
    assert_same_mixers(student, aligned)
    assert sorted({m["layer"] for m in found}) == layers
    assert found[-1]["step"] == found[-1]["steps"] == 6 * len(layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "names no layer"),
        ([4], r"layer 4 is outside 0\.\.3"),
        ([-1], r"layer -1 is outside 0\.\.3"),
        ([1], "layer 1 has nothing to train: it is attention"),
    ],
)
def test_layers_that_cannot_train_are_refused(teacher, text, layers, message):
    with pytest.raises(UserError, match=message):
        in_memory(teacher, text, layers=layers, steps=1, keep=[1])


def test_layers_with_nothing_to_train_are_left_out(tmp_path, teacher, directory, text):
    student, steps = in_memory(teacher, text, steps=3, keep=[1])
    assert steps[0]["layers"][1] is None and steps[0]["training"] == LAYERS - 1
    aligned, _ = by_layer(directory, text, tmp_path / "w", keep=[1], steps=3)
    assert_same_mixers(student, aligned)
    assert trained_layers(student.config) == [0, 2, 3]


def test_the_rule_of_the_early_stop():
    assert not has_stopped(np.array([3.0, 3, 3, 3, 3]), None)
    assert not has_stopped(np.array([3.0, 2]), 2)
    assert not has_stopped(np.array([3.0, 2, 1, 2]), 2)
    assert has_stopped(np.array([3.0, 2, 3, 2]), 2)  # not lower: the same
    assert has_stopped(np.array([3.0, 2, 3, 2, np.nan, np.nan]), 2)
    assert not has_stopped(np.array([3.0, 2, 2, 2, 9, np.nan]), 2)  # judged at the end of a block


def test_layers_stop_by_themselves_and_cost_nothing_then(teacher, text, monkeypatch):
    compared = []
    original = Model.align_and_grad

    def watched(self, ids, reset, grads, trainable, scale, layers):
        compared.append(list(layers))
        return original(self, ids, reset, grads, trainable, scale, layers)

    monkeypatch.setattr(Model, "align_and_grad", watched)
    settings = {"patience": 2, "lr": 0.3, "warmup": 0.0}
    _, steps = in_memory(teacher, text, steps=200, **settings)
    assert len(steps) < 200, "no layer stopped at a learning rate at which errors stop falling"
    assert len({len(layers) for layers in compared}) > 1
    for layer in range(LAYERS):
        own = [s["layers"][layer] for s in steps]
        trained = sum(layer in layers for layers in compared)
        assert has_stopped(np.array(own[:trained]), 2)
        assert set(own[trained:]) <= {own[trained - 1]}
        assert all(layer in layers for layers in compared[:trained])
    assert [s["training"] for s in steps] == [len(layers) for layers in compared]


@pytest.mark.parametrize(
    ("key", "value"), [("clip", 0.0), ("clip", float("nan")), ("patience", 0), ("micro_rows", 0)]
)
def test_bad_numbers_are_named(teacher, text, key, value):
    with pytest.raises(UserError, match=f"{key} is"):
        in_memory(teacher, text, steps=1, **{key: value})


def test_the_best_of_nothing_that_is_measured_is_refused(tmp_path, teacher, directory, text):
    """Without rows to measure on the best values were those of the start."""
    settings, message = {"steps": 2, "validate_every": 1, "keep": "best"}, "needs held_out and"
    student = linearize(teacher, window=6, sinks=2)
    with pytest.raises(UserError, match=message):
        list(align(student, teacher, batches(text), **settings))
    source = linearize(checkpoints.load(directory), window=6, sinks=2)
    with pytest.raises(UserError, match=message):
        list(align_layers(source, batches(text), tmp_path, MixerTraining(**settings)))


# ---- reading ------------------------------------------------------------------------------------


def test_each_layer_is_read_once_however_many_steps(tmp_path, directory, text, monkeypatch):
    source = linearize(checkpoints.load(directory), window=6, sinks=2)
    read, rows = [], []
    whole, some = LazyTensors.__getitem__, LazyTensors.rows
    monkeypatch.setattr(
        LazyTensors, "__getitem__", lambda self, name: (read.append(name), whole(self, name))[1]
    )
    monkeypatch.setattr(
        LazyTensors,
        "rows",
        lambda self, name, wanted: (rows.append(name), some(self, name, wanted))[1],
    )
    list(align_layers(source, batches(text), tmp_path / "w", MixerTraining(steps=20)))
    expected = [n for n in source.tensors if n.startswith("model.layers.")]
    assert sorted(read) == sorted(expected)
    assert rows == ["model.embed_tokens.weight"] * 20
    read.clear()
    training = MixerTraining(steps=20)
    list(align_layers(source, batches(text), tmp_path / "v", training, layers=[1]))
    assert {n.split(".")[2] for n in read} == {"0", "1"}  # nothing behind the last one


def test_rows_of_a_tensor_are_those_of_the_whole(directory, tmp_path, teacher):
    tensors = checkpoints.load(directory).tensors
    name, wanted = "model.embed_tokens.weight", np.array([5, 0, 258, 5])
    assert np.array_equal(tensors.rows(name, wanted), teacher.params[name][wanted])
    assert np.array_equal(tensors.rows(name, wanted), tensors[name][wanted])


def test_a_linearized_checkpoint_is_the_linearized_model(tmp_path, teacher, directory):
    settings = {"window": 6, "sinks": 2, "normalizer": "max", "keep_attention": [1]}
    student = linearize(xlstm_distill.load(directory), **settings)
    lazy = linearize(checkpoints.load(directory), **settings)
    assert lazy.config == student.config and lazy.provenance == student.provenance
    assert set(lazy.tensors) == set(student.params)
    assert all(np.array_equal(lazy.tensors[n], student.params[n]) for n in student.params)
    assert fingerprint_of(lazy) == student.fingerprint()


# ---- kills, disk, other runs --------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(1,), (3, 2), (5,), (6, 5), (14, 9)])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path, teacher, directory, text, stops):
    student, _ = in_memory(teacher, text, steps=5)
    seen = []
    for count in (*stops, None):
        aligned, found = by_layer(directory, text, tmp_path / "w", stop_after=count, steps=5)
        seen += found
    assert_same_mixers(student, aligned)
    assert [(m["layer"], m["layer_step"]) for m in seen] == [
        (layer, step) for layer in range(LAYERS) for step in range(1, 6)
    ]


@pytest.mark.parametrize("order", ["step", "layer"])
def test_layers_that_stopped_stay_stopped_after_a_restart(
    tmp_path, teacher, directory, text, order
):
    settings = STOPPING
    student, steps = in_memory(teacher, text, **settings)
    assert [s["training"] for s in steps] == [LAYERS] * 6 + [LAYERS - 1] * 9
    for stop_after in (4, 3, 5, None):
        if order == "layer":
            aligned, found = by_layer(
                directory, text, tmp_path / "w", stop_after=stop_after, **settings
            )
        else:
            aligned = linearize(teacher, window=6, sinks=2)
            state = {"state": tmp_path / "state.npz"}
            generator = align(aligned, teacher, batches(text), **settings, **state)
            found = list(itertools.islice(generator, stop_after))
            generator.close()
    if order == "layer":
        assert_same_mixers(student, aligned)
    else:
        assert np.array_equal(student.params.flat, aligned.params.flat)
        assert [s["layers"] for s in found] == [s["layers"] for s in steps[-len(found) :]]


@pytest.mark.parametrize("calls", [0, 2, 7, 9, 12, 16])
def test_a_stop_while_batches_move_is_no_loss(tmp_path, teacher, directory, text, calls):
    """The check is called before each batch that is embedded (5) or taken through a layer (5)."""
    student, _ = in_memory(teacher, text, steps=5)
    asked = 0

    def check():
        nonlocal asked
        asked += 1
        if asked > calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_layer(directory, text, tmp_path / "w", options={"check": check}, steps=5)
    moved = sorted((tmp_path / "w" / "stream").glob("*.npy"))
    if calls >= 7:  # and as if killed between the new file and the removal of the old one
        layer, number = moved[-1].stem.split("-")
        shutil.copy(moved[0], moved[0].with_name(f"{int(layer) - 1:03}-{number}.npy"))
    aligned, _ = by_layer(directory, text, tmp_path / "w", steps=5)
    assert_same_mixers(student, aligned)


def test_lost_states_are_made_again(tmp_path, teacher, directory, text):
    student, _ = in_memory(teacher, text, steps=5)
    by_layer(directory, text, tmp_path / "w", stop_after=12, steps=5)
    files = sorted((tmp_path / "w" / "stream").glob("*.npy"))
    assert [f.name[:3] for f in files] == ["002"] * 5
    files[1].unlink()
    files[3].unlink()
    (tmp_path / "w" / "mixer-001.npz").unlink()  # its inputs are gone: all begin again
    aligned, found = by_layer(directory, text, tmp_path / "w", steps=5)
    assert_same_mixers(student, aligned)
    assert [m["layer"] for m in found] == [1] * 5 + [2] * 3 + [3] * 5


@pytest.mark.parametrize(
    ("changes", "field"), [({"lr": 0.1}, "lr"), ({"steps": 6}, "steps"), ({"clip": 1.0}, "clip")]
)
def test_another_run_is_refused_by_name(tmp_path, directory, text, changes, field):
    for stop_after in (2, 7):
        place = tmp_path / str(stop_after)
        by_layer(directory, text, place, stop_after=stop_after, steps=5)
        with pytest.raises(UserError, match=f"with {field} "):
            by_layer(directory, text, place, **{"steps": 5, **changes})


def test_another_layers_weights_are_refused(tmp_path, teacher, directory, text):
    by_layer(directory, text, tmp_path / "w", stop_after=2, steps=5)
    other = teacher.copy()
    other.params["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    other.save(tmp_path / "teacher")
    with pytest.raises(UserError, match="made with student"):
        by_layer(tmp_path / "teacher", text, tmp_path / "w", steps=5)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_read(
    tmp_path, directory, text, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    needed = {"float32": 4 * 3 * LENGTH * 5 * 64, "bfloat16": 2 * 3 * LENGTH * 5 * 64}
    for kind, size in needed.items():
        options = {"stream": kind}
        monkeypatch.setattr(shutil, "disk_usage", lambda _, s=size: usage._replace(free=s - 1))
        with pytest.raises(UserError, match=r"hidden states need .* in .*stream, .* are free"):
            by_layer(directory, text, tmp_path / kind, options=options, steps=5)
        assert not (tmp_path / kind).exists()
        monkeypatch.setattr(shutil, "disk_usage", lambda _, s=size: usage._replace(free=s))
        by_layer(directory, text, tmp_path / kind, options=options, steps=5, stop_after=6)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
        by_layer(directory, text, tmp_path / kind, options=options, steps=5)  # they are there


def test_states_may_lie_elsewhere(tmp_path, teacher, directory, text):
    student, _ = in_memory(teacher, text, steps=5)
    options = {"stream_place": tmp_path / "memory"}
    by_layer(directory, text, tmp_path / "w", options=options, stop_after=7, steps=5)
    assert len(list((tmp_path / "memory").glob("stream-*/*.npy"))) == 5
    assert not (tmp_path / "w" / "stream").exists()
    aligned, _ = by_layer(directory, text, tmp_path / "w", options=options, steps=5)
    assert_same_mixers(student, aligned)
    assert list((tmp_path / "memory").iterdir()) == []


def test_a_damaged_batch_is_named(tmp_path, directory, text):
    by_layer(directory, text, tmp_path / "w", stop_after=2, steps=5)
    file = tmp_path / "w" / "stream" / "000-000003.npy"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"000-000003\.npy: damaged"):
        by_layer(directory, text, tmp_path / "w", steps=5)
