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
from xlstm_distill.testing import seeded


def hadamard(x):
    """Each 64 entries of a row, filled up with zeros, by the Hadamard matrix over its root."""
    rows, cols = x.shape
    x = np.pad(x, ((0, 0), (0, -cols % 64)))
    h = np.ones((1, 1))
    for _ in range(6):
        h = np.kron([[1, 1], [1, -1]], h)
    return (x.reshape(rows, -1, 64) @ (h / 8)).reshape(x.shape)


def int8_round(x):
    """Whole numbers up to 127 and a scale for each row of x, rotated."""
    turned = hadamard(x.astype("f8"))
    scale = np.abs(turned).max(axis=1, initial=0) / 127
    return np.rint(turned / np.where(scale > 0, scale, 1)[:, None]), scale


def packed(x, int8):
    """What is left of a matrix that was packed."""
    c = core(np.float32)
    stored, back = aligned_bytes(c.packed_size(*x.shape, int8)), np.empty_like(x)
    c.pack_weights(stored, x, int8)
    c.unpack_weights(back, stored, int8)
    return back


def wide(rng, shape):
    """Rows of very different sizes, the last one zero."""
    x = (rng.standard_normal(shape) * np.exp(4 * rng.standard_normal((shape[0], 1)))).astype("f4")
    x[-1] = 0
    return x


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 64), (40, 77), (97, 33)])
def test_packed_weights_come_back_rounded(shape):
    x = wide(seeded("packed", *shape), shape)
    whole, scale = int8_round(x)
    expected = hadamard(whole * scale[:, None])[:, : shape[1]]
    size = np.sqrt(64) * 127 * scale[:, None]  # of what is added up
    assert np.all(np.abs(packed(x, 1) - expected) <= OP_F32 * size)
    assert np.all(np.abs(x - packed(x, 1)) <= 8 * 0.501 * scale[:, None])
    bits = x.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    assert np.array_equal(packed(x, 0), (bits & np.uint32(0xFFFF0000)).view("f4"))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 40, 77), (16, 97, 33), (50, 70, 64), (300, 130, 200)]
)
def test_products_are_sums_of_whole_numbers(shape, runtime):
    """Against NumPy, and the same bits with every instruction set and any number of rows."""
    m, n, k = shape
    rng = seeded("int8 product", *shape)
    x, w = wide(rng, (m, k)), rng.standard_normal((n, k)).astype("f4")
    found = {isa: product(x, w, isa, runtime) for isa in available_isas()}
    (xs, x_scale), (ws, w_scale) = int8_round(x), int8_round(w)
    expected = (xs @ ws.T) * x_scale[:, None] * w_scale
    # an entry on the border between two whole numbers may go either way, rarely
    off = np.abs(found["generic"] - expected) / np.maximum(x_scale[:, None] * w_scale, 1e-30)
    assert np.quantile(off, 0.9) <= 0.5 and off.max() <= 2 * 127
    for isa, y in found.items():
        assert np.array_equal(y, found["generic"]), isa
        assert np.array_equal(product(x[-1:], w, isa, runtime), y[-1:]), isa


def product(x, w, isa, runtime):
    runtime.set_isa(isa)
    c = core(np.float32)
    stored, y = aligned_bytes(c.packed_size(*w.shape, 1)), np.empty((len(x), len(w)), np.float32)
    c.pack_weights(stored, w, 1)
    c.packed_matmul(y, x, stored, 1, 1)
    return y


def test_rows_that_are_not_finite_give_no_number(runtime):
    rng = seeded("int8 not finite")
    x, w = rng.standard_normal((20, 70)).astype("f4"), rng.standard_normal((9, 70)).astype("f4")
    good = product(x, w, "generic", runtime)
    x[3, 5], x[7, 69] = np.nan, np.inf
    y = product(x, w, "generic", runtime)
    assert np.isnan(y[[3, 7]]).all()
    rest = np.delete(np.arange(20), [3, 7])
    assert np.array_equal(y[rest], good[rest])


def test_an_entry_far_above_its_neighbours_does_not_set_the_step():
    """As transformers have them: without rotation the others would be rounded to nothing."""
    rng = seeded("outlier")
    x = rng.standard_normal((8, 640)).astype("f4")
    x[:, 17] = 200
    assert np.linalg.norm(packed(x, 1) - x) <= 0.15 * np.linalg.norm(np.delete(x, 17, axis=1))
    plain = np.rint(x / (200 / 127)) * np.float32(200 / 127)
    assert np.linalg.norm(plain - x) >= 0.4 * np.linalg.norm(np.delete(x, 17, axis=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_does_not_become_finite(bad):
    x = np.ones((3, 40), np.float32)
    x[1, 7] = bad
    whole = packed(x, 1)
    assert np.isnan(whole[1]).all()
    assert np.array_equal(whole[[0, 2]], packed(x[[0, 2]], 1)) and np.isfinite(whole[[0, 2]]).all()


def test_storage_is_a_byte_a_weight_and_a_scale_a_row():
    model = random_model("hybrid", hidden_size=64, intermediate_size=160, vocab_size=320)
    small = model.copy(compute="int8")
    for e in small.params.entries:
        matrix = e.role in ("embedding", "projection", "mlp", "head")
        assert e.storage == ("int8" if matrix else "real"), e.name
        if matrix:
            rows, cols = -(-e.shape[0] // 32) * 32, -(-e.shape[1] // 64) * 64
            assert e.nbytes == rows * (cols + 4)
            assert np.array_equal(small.params[e.name], packed(model.params[e.name], 1))
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
def test_whole_models_compute_with_bytes(mixer, tied, isa, runtime):
    """Close to the same weights in float32; one step of a row does not depend on the others."""
    runtime.set_isa(isa)
    model = random_model(
        mixer, tie_word_embeddings=tied, hidden_size=48, intermediate_size=100, vocab_size=211
    )
    small = model.copy(compute="int8")
    ids, reset, _ = random_batch(model, 3, 30)
    widened = small.copy(compute="f32")
    assert 0 < widened.divergence([small], ids, reset)["kl"].mean() <= INT8_KL
    step, _ = small.step(ids[:, 0], small.new_state(3))
    alone, _ = small.step(ids[-1:, 0], small.new_state(1))
    assert np.array_equal(alone[0], step[-1])


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
