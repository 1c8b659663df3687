"""Weights as signed bytes with a scale for each row: rounding, storage, products, whole models."""

from __future__ import annotations

import numpy as np
import pytest
from models import random_batch, random_model
from tolerances import INT8_KL, OP_F32

from xlstm_distill import linearize
from xlstm_distill.errors import UserError
from xlstm_distill.parameters import aligned_bytes
from xlstm_distill.runtime import available_isas, core
from xlstm_distill.testing import assert_close, seeded


def int8_round(x):
    """Rows of x as whole numbers up to 127 and a scale each."""
    scale = np.abs(x).max(axis=1, initial=0) / np.float32(127)
    whole = np.rint(x / np.where(scale > 0, scale, np.float32(1))[:, None])
    return whole * scale[:, None], scale


def packed(x, int8):
    """What is left of a matrix that was packed."""
    c = core(np.float32)
    stored, back = aligned_bytes(c.packed_size(*x.shape, int8)), np.empty_like(x)
    c.pack_weights(stored, x, int8)
    c.unpack_weights(back, stored, int8)
    return back


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 64), (40, 77), (97, 33)])
def test_packed_weights_come_back_rounded(shape):
    rng = seeded("packed", *shape)
    x = (rng.standard_normal(shape) * np.exp(4 * rng.standard_normal((shape[0], 1)))).astype("f4")
    x[-1] = 0
    expected, scale = int8_round(x)
    whole = packed(x, 1)
    assert np.array_equal(whole, expected)
    assert np.all(np.abs(x - whole) <= 0.5001 * scale[:, None])
    assert np.array_equal(packed(whole, 1), whole)  # what was rounded once stays
    bits = x.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    assert np.array_equal(packed(x, 0), (bits & np.uint32(0xFFFF0000)).view("f4"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_does_not_become_finite(bad):
    x = np.ones((3, 40), np.float32)
    x[1, 7] = bad
    whole = packed(x, 1)
    assert np.isnan(whole[1]).all() and np.array_equal(whole[[0, 2]], x[[0, 2]])


def test_storage_is_a_byte_a_weight_and_a_scale_a_row():
    model = random_model("hybrid", hidden_size=64, intermediate_size=160, vocab_size=320)
    small = model.copy(compute="int8")
    for e in small.params.entries:
        matrix = e.role in ("embedding", "projection", "mlp", "head")
        assert e.storage == ("int8" if matrix else "real"), e.name
        if matrix:
            rows = -(-e.shape[0] // 32) * 32
            assert e.nbytes == rows * (e.shape[1] + 4)
            assert np.array_equal(small.params[e.name], int8_round(model.params[e.name])[0])
            with pytest.raises(TypeError, match="stored as int8"):
                small.params.view(e)
        else:
            assert np.array_equal(small.params[e.name], model.params[e.name])
    other = small.copy()
    assert other.fingerprint() == small.fingerprint()
    first = next(e for e in other.params.entries if e.storage == "int8")
    other.params[first.name] = 2 * other.params[first.name]
    assert other.fingerprint() != small.fingerprint()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("mixer", ["attention", "hybrid"])
@pytest.mark.parametrize("tied", [True, False])
def test_many_rows_are_computed_as_with_the_widened_weights(mixer, tied, isa, runtime):
    """Bit by bit: packing widens and, where the others round, rounds the same numbers."""
    runtime.set_isa(isa)
    model = random_model(
        mixer, tie_word_embeddings=tied, hidden_size=48, intermediate_size=100, vocab_size=211
    )
    small = model.copy(compute="int8")
    ids, reset, _ = random_batch(model, 3, 30)
    expected = small.copy(compute="mixed").logits(ids, reset=reset)
    assert np.array_equal(small.logits(ids, reset=reset), expected)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_few_rows_are_dot_products_in_float32(rows, isa, runtime):
    runtime.set_isa(isa)
    small = random_model("hybrid", hidden_size=50, intermediate_size=90).copy(compute="int8")
    exact = small.copy(compute="f32")
    ids, _, _ = random_batch(small, rows, 1)
    found, _ = small.step(ids[:, 0], small.new_state(rows))
    expected, _ = exact.step(ids[:, 0], exact.new_state(rows))
    assert_close(found, expected, OP_F32, f"int8 step {rows} {isa}")
    alone, _ = small.step(ids[-1:, 0], small.new_state(1))
    assert np.array_equal(alone[0], found[-1])  # a row does not depend on the others


def test_threads_do_not_change_a_bit(runtime):
    small = random_model("hybrid").copy(compute="int8")
    ids, reset, _ = random_batch(small, 2, 40)
    found = []
    for threads in (1, 2, 3):
        runtime.set_threads(threads)
        step, _ = small.step(ids[:, 0], small.new_state(2))
        found.append((small.logits(ids, reset=reset), step))
    for logits, step in found[1:]:
        assert np.array_equal(logits, found[0][0]) and np.array_equal(step, found[0][1])


def test_the_model_stays_close():
    model = random_model("hybrid")
    ids, reset, _ = random_batch(model, 2, 40)
    found = model.divergence([model.copy(compute="int8")], ids, reset)
    assert 0 < found["kl"].mean() <= INT8_KL


def test_what_int8_cannot_do_is_said():
    model = random_model("attention")
    small = model.copy(compute="int8")
    with pytest.raises(UserError, match="cannot be set from int8 to f32"):
        small.compute = "f32"
    with pytest.raises(UserError, match="cannot be set from mixed to int8"):
        model.compute = "mixed"
        model.compute = "int8"
    with pytest.raises(UserError, match="the weights are int8"):
        linearize(small)
    with pytest.raises(TypeError, match="no flat float32"):
        _ = small.params.flat
    ids, _, labels = random_batch(model, 1, 8)
    with pytest.raises(ValueError, match="bf16 or int8 cannot be trained"):
        small.loss_and_grad(ids, labels, ce_weight=1.0, kl_weight=0.0)
