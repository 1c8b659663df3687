"""Every family against transformers on tiny random checkpoints, and through the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import YARN, of_family, random_batch, random_model
from test_checkpoints import IN_GGUF, make_config, make_tensors, write_gguf
from test_model import directional_errors, relative
from tolerances import DIRECTIONAL_F64, GATE_ZERO_IS_TEACHER, PREFILL_STEP_F32, PUBLIC_F32

from xlstm_distill import checkpoints
from xlstm_distill.align import align
from xlstm_distill.data import TokenData
from xlstm_distill.distill import distill
from xlstm_distill.families import FAMILIES
from xlstm_distill.linearize import linearize
from xlstm_distill.model import from_checkpoint, load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

T = 40  # beyond the window and YaRN's original context of `of_family`


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def tiny_checkpoint(folder: Path, family: str, **changes: Any):
    """A model of transformers with random parameters everywhere, written to `folder`."""
    config = make_config(vocab_size=61, bos_token_id=1, eos_token_ids=[2], **of_family(family))
    values = config.model_copy(update=changes).to_hf()
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(
                torch.randn(p.shape) * (0.1 if "norm" in name else 0.5 if p.ndim == 1 else 0.15)
            )
            if "norm" in name:
                p.add_(1.0)
    theirs.save_pretrained(folder)
    return theirs


def their_logits(theirs, ids) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.from_numpy(ids).long()).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path, family, tied):
    theirs = tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied, rope_theta=1e6)
    ours = load(tmp_path)
    ids, _, _ = random_batch(ours, 3, T)
    assert relative(ours.logits(ids), their_logits(theirs, ids)) <= PUBLIC_F32


@pytest.mark.parametrize("scaling", [YARN, {"rope_type": "linear", "factor": 4.0}])
def test_scaled_rope_equals_transformers(tmp_path, scaling):
    """In a family whose layers all scale it."""
    theirs = tiny_checkpoint(tmp_path, "qwen2", rope_scaling=scaling)
    ours = load(tmp_path)
    assert ours.config.rope_scaling == scaling
    ids, _, _ = random_batch(ours, 3, T)
    assert relative(ours.logits(ids), their_logits(theirs, ids)) <= PUBLIC_F32


def test_gradients_equal_transformers(tmp_path, family):
    """Of the mean cross-entropy, for every tensor."""
    theirs = tiny_checkpoint(tmp_path, family)
    ours = load(tmp_path)
    ids, _, _ = random_batch(ours, 3, T)
    labels = np.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    tokens = torch.from_numpy(ids).long()
    theirs(tokens, labels=tokens).loss.backward()
    grads = ours.params.zeros_like()
    ours.loss_and_grad(
        ids, labels, ce_weight=1.0, kl_weight=0.0, grads=grads, scale=1 / (3 * (T - 1))
    )
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert set(expected) == set(grads.names())
    for name, gradient in expected.items():
        assert relative(grads[name], gradient) <= PUBLIC_F32, name


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_gradients_of_a_model(family, mixer):
    """Float64 finite differences, mixers and shared weights together."""
    model = random_model(mixer, dtype=np.float64, **of_family(family))
    ids, reset, labels = random_batch(model, 2, 21)

    def loss(grads=None):
        r = model.loss_and_grad(
            ids, labels, ce_weight=1.0, kl_weight=0.0, reset=reset, grads=grads, scale=0.1
        )
        return 0.1 * r["ce"]

    grads = model.params.zeros_like()
    loss(grads)
    errors = directional_errors(model, loss, grads)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])


@pytest.mark.parametrize("mixer", ["linear", "hybrid"])
def test_stage_one_gradients(family, mixer):
    model = random_model(mixer, dtype=np.float64, **of_family(family))
    ids, reset, _ = random_batch(model, 2, 21)

    def loss(grads=None):
        err, _, _ = model.align_and_grad(ids, reset, grads=grads, scale=0.01)
        return 0.01 * float(err.sum())

    grads = model.params.zeros_like()
    loss(grads)
    errors = {n: e for n, e in directional_errors(model, loss, grads).items() if ".mixer." in n}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= DIRECTIONAL_F64, (worst, errors[worst])


def test_stage_one_measures_what_the_teacher_puts_out(family):
    """With gates closed and a wide window nothing is left of the error."""
    teacher = random_model("attention", **of_family(family))
    student = linearize(teacher, window=T, sinks=0)
    for name in student.params.names():
        if name.endswith("o_gate.bias"):
            student.params[name] = np.full(student.params[name].shape, -40.0)
    ids, reset, _ = random_batch(teacher, 2, T)
    error, reference, _ = student.align_and_grad(ids, reset)
    assert np.all(np.sqrt(error / reference) <= GATE_ZERO_IS_TEACHER)


def test_recomputed_activations_give_the_same_bits(family):
    model = random_model("hybrid", **of_family(family))
    ids, reset, labels = random_batch(model, 2, 24)
    found = []
    for recompute in (False, True):
        grads = model.params.zeros_like()
        model.loss_and_grad(
            ids,
            labels,
            ce_weight=1.0,
            kl_weight=0.0,
            reset=reset,
            grads=grads,
            recompute=recompute,
        )
        found.append(grads.flat)
    assert np.array_equal(*found)


def test_closed_gates_and_a_wide_window_are_the_teacher(tmp_path, family):
    theirs = tiny_checkpoint(tmp_path, family)
    student = linearize(load(tmp_path), window=T, sinks=0)
    ids, _, _ = random_batch(student, 2, T)
    assert relative(student.logits(ids, gate=0.0), their_logits(theirs, ids)) <= max(
        PUBLIC_F32, GATE_ZERO_IS_TEACHER
    )


@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
def test_prefill_and_step_equal_forward(family, mixer):
    model = random_model(mixer, **of_family(family))
    ids, _, _ = random_batch(model, 2, T)
    whole = model.logits(ids)
    _, state = model.prefill(ids[:, :20])
    for t in range(20, T):
        logits, state = model.step(ids[:, t], state)
        assert relative(logits, whole[:, t]) <= PREFILL_STEP_F32


def test_stages_and_files(tmp_path, family):
    """Linearize, stage I, stage II; what is saved comes back, the teacher for transformers too."""
    tiny_checkpoint(tmp_path / "teacher", family)
    teacher = load(tmp_path / "teacher")
    student = linearize(teacher, window=5, sinks=1)
    assert student.config.family == family
    ids = np.random.default_rng(0).integers(0, 61, 300, dtype=np.uint16)
    data = TokenData(ids, np.array([0, 70, 110, 300]))
    row = {"rows": 2, "length": 24}
    found = [m["relative_error"] for m in align(student, teacher, data, steps=12, **row)]
    assert found[-1] < found[0]
    trained = [m["loss"] for m in distill(student, data, teacher, steps=12, k=10, lr=1e-3, **row)]
    assert trained[-1] < trained[0]
    checkpoints.save(tmp_path / "student", student.config, student.tensors())
    again = load(tmp_path / "student")
    assert again.config == student.config
    assert np.array_equal(again.params.flat, student.params.flat)
    checkpoints.save(tmp_path / "copy", teacher.config, teacher.tensors())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    ids, _, _ = random_batch(teacher, 1, T)
    assert relative(teacher.logits(ids), their_logits(theirs, ids)) <= PUBLIC_F32


def test_what_a_sliding_layer_becomes(tmp_path):
    """Mixers get the smaller window, kept layers their own; stage I compares with the teacher's own
    attention, whose RoPE every layer keeps."""
    theirs = tiny_checkpoint(tmp_path / "teacher", "olmo3")
    teacher = load(tmp_path / "teacher")
    assert not teacher.config.is_student
    kept = linearize(teacher, window=12, sinks=1, keep_attention=[0])
    assert [(m.mixer, m.window) for m in kept.config.mixers] == [("attention", 9), ("hybrid", 12)]
    student = linearize(teacher, window=12, sinks=1)
    assert [(m.mixer, m.window) for m in student.config.mixers] == [("hybrid", 9), ("hybrid", 12)]
    assert student.config.teacher_windows == [9, None]
    # The teacher's heads, which transformers gives before o_proj, are what stage I measures by.
    found: list[np.ndarray] = []
    for layer in theirs.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[0].detach().numpy())
        )
    ids, _, _ = random_batch(teacher, 2, T)
    their_logits(theirs, ids)
    _, reference, _ = student.align_and_grad(ids)
    expected = [float((heads.astype(np.float64) ** 2).sum()) for heads in found]
    assert relative(reference, expected) <= PUBLIC_F32


def test_a_state_grows_beyond_a_window():
    """A window wider than the first room of a state: slots in order, then a ring."""
    model = random_model(
        **{**of_family("olmo3"), "teacher_windows": [300, None], "num_attention_heads": 2}
    )
    ids, _, _ = random_batch(model, 1, 620)
    whole, state = model.logits(ids), model.new_state(1)
    for start, end in ((0, 200), (200, 290), (290, 291), (291, 520), (520, 619), (619, 620)):
        logits, state = model.prefill(ids[:, start:end], state)
        assert relative(logits, whole[:, end - 1]) <= PREFILL_STEP_F32, end


@pytest.mark.parametrize("family", IN_GGUF)
def test_gguf_equals_transformers(tmp_path, family):
    """transformers' own reading of a GGUF file says which rows are stored permuted."""
    config = make_config(**of_family(family))
    path = write_gguf(tmp_path / "m.gguf", config, make_tensors(config))
    ours = from_checkpoint(checkpoints.load(path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for name, tensor in theirs.state_dict().items():
        assert np.array_equal(ours.params[name], tensor.numpy()), name
