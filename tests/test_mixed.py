"""Products of operands rounded to bf16: the kernels, and models that compute with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import random_batch, random_model
from tolerances import MIXED_GRADIENT, MIXED_KL, OP_F32

from xlstm_distill.errors import UserError
from xlstm_distill.optim import AdamW, trainable_names
from xlstm_distill.parameters import bf16_round, bf16_widen
from xlstm_distill.runtime import available_isas, core
from xlstm_distill.testing import assert_close, seeded

WITH_PAIRS = ("amx", "avx512bf16")
"""Instruction sets that round; the others compute in float32."""

CROSS_ENTROPY = {"ce_weight": 1.0, "kl_weight": 0.0}

# Rows, columns and sums around the sizes of tiles, slices and blocks.
SHAPES = [
    (17, 1, 1),
    (33, 31, 2),
    (14, 32, 32),
    (28, 33, 31),
    (64, 64, 64),
    (31, 65, 513),
    (300, 200, 577),
    (40, 1700, 65),
    (257, 193, 1056),
    (20, 1700, 384),
]


def product(
    a: Any, b: Any, ta: bool, tb: bool, alpha: float = 1.0, c: Any = None, mixed: bool = True
) -> Any:
    left = np.ascontiguousarray(a.T if ta else a)
    right = np.ascontiguousarray(b.T if tb else b)
    out = np.full((len(a), b.shape[1]), np.nan, np.float32) if c is None else c.copy()
    beta = 0.0 if c is None else 0.5
    core(np.float32).matmul(out, left, right, int(ta), int(tb), alpha, beta, int(mixed))
    return out


def rounded(x: Any) -> Any:
    return bf16_widen(bf16_round(x)).astype(np.float64)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_rounded_operands(shape, isa, runtime):
    m, n, k = shape
    rng = seeded("mixed", *shape)
    a = rng.standard_normal((m, k)).astype(np.float32)
    b = rng.standard_normal((k, n)).astype(np.float32)
    c = rng.standard_normal((m, n)).astype(np.float32)
    runtime.set_isa(isa)
    for ta, tb in ((False, True), (False, False), (True, False)):  # forward, dx, dw
        rounds = isa in WITH_PAIRS and (m > 16 or ta or not tb)  # few rows: dot products
        expected = rounded(a) @ rounded(b) if rounds else a.astype(np.float64) @ b
        where = f"mixed {m}x{n}x{k} {isa} {ta} {tb}"
        assert_close(product(a, b, ta, tb), expected, OP_F32, where)
        found = product(a, b, ta, tb, alpha=0.25, c=c)
        assert_close(found, 0.25 * expected + 0.5 * c, OP_F32, f"{where} added")


def test_rows_and_threads_do_not_change_a_bit(runtime):
    rng = seeded("mixed rows")
    a = rng.standard_normal((300, 577)).astype(np.float32)
    for n in (40, 200, 1700):
        b = rng.standard_normal((577, n)).astype(np.float32)
        for ta, tb in ((False, True), (False, False), (True, False)):
            runtime.set_threads(1)
            whole = product(a, b, ta, tb)
            assert np.array_equal(product(a[100:140], b, ta, tb), whole[100:140])
            for threads in (2, 3):
                runtime.set_threads(threads)
                assert np.array_equal(product(a, b, ta, tb), whole)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    a, b = np.ones((20, 70), np.float32), np.ones((70, 40), np.float32)
    a[3, 5] = bad
    found = product(a, b, False, True)
    assert not np.isfinite(found[3]).any() and np.isfinite(np.delete(found, 3, axis=0)).all()


def test_a_model_computes_almost_the_same():
    model = random_model("hybrid")
    ids, reset, labels = random_batch(model, 2, 40)
    other = model.copy(compute="mixed")
    assert np.array_equal(other.params.flat, model.params.flat)
    kl = model.divergence([other], ids, reset=reset)["kl"]
    assert kl.mean() <= MIXED_KL
    exact, found = model.params.zeros_like(), model.params.zeros_like()
    for one, grads in ((model, exact), (other, found)):
        one.loss_and_grad(ids, labels, reset=reset, grads=grads, **CROSS_ENTROPY)
    for name in trainable_names(model, "all"):
        x, y = exact[name].astype(np.float64), found[name].astype(np.float64)
        assert np.linalg.norm(x - y) <= MIXED_GRADIENT * max(np.linalg.norm(x), 1e-3), name


def test_compute_can_be_set_where_the_weights_allow_it():
    model = random_model("hybrid")
    ids, _, _ = random_batch(model, 2, 40)
    exact = model.logits(ids)
    model.compute = "mixed"
    mixed = model.logits(ids)
    assert model.compute == "mixed"
    model.compute = "f32"
    assert np.array_equal(model.logits(ids), exact)
    assert np.array_equal(model.copy(compute="mixed").logits(ids), mixed)
    with pytest.raises(UserError, match="cannot be set from f32 to bf16"):
        model.compute = "bf16"
    with pytest.raises(UserError, match="compute 'fp8' is not known"):
        model.copy(compute="fp8")


def test_training_follows_float32():
    """The same steps from the same start end at nearly the same loss."""
    last = {}
    for compute in ("f32", "mixed"):
        model = random_model("hybrid").copy(compute=compute)
        ids, reset, labels = random_batch(model, 4, 40)
        optimiser = AdamW(model.params, trainable_names(model, "all"))
        for _ in range(60):
            grads = model.params.zeros_like()
            settings = {"reset": reset, "grads": grads, "scale": 1 / ids.size, **CROSS_ENTROPY}
            last[compute] = model.loss_and_grad(ids, labels, **settings)["ce"]
            optimiser.step(grads, 3e-3)
    assert last["mixed"] == pytest.approx(last["f32"], rel=0.01)
