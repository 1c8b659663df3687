"""Products of operands rounded to bf16: the kernels, and models that compute with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import random_batch, random_model
from tolerances import MIXED_GRADIENT, MIXED_KL, MIXED_OP, OP_F32

from xlstm_distill import ops
from xlstm_distill.errors import UserError
from xlstm_distill.optim import AdamW, trainable_names
from xlstm_distill.parameters import aligned_bytes
from xlstm_distill.reference.attention import FEATURE_MAPS
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
    """To bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


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


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("m", [1, 3, 4, 8, 16, 20])
def test_weights_in_bf16(m, isa, runtime):
    """As a model with compute="bf16" multiplies: few rows by dot products, which round as well."""
    runtime.set_isa(isa)
    for n, k in ((1, 5), (33, 31), (70, 577), (130, 64)):
        rng = seeded("bf16 weights", m, n, k)
        a = rng.standard_normal((m, k)).astype(np.float32)
        b = rng.standard_normal((n, k)).astype(np.float32)
        packed = aligned_bytes(core(np.float32).packed_size(n, k, 0))
        core(np.float32).pack_weights(packed, b, 0)
        for mixed in (0, 1):
            out = np.full((m, n), np.nan, np.float32)
            core(np.float32).packed_matmul(out, a, packed, 0, mixed)
            left = rounded(a) if mixed and isa in WITH_PAIRS else a.astype(np.float64)
            expected = left @ rounded(b).T
            assert_close(out, expected, OP_F32, f"bf16 weights {m}x{n}x{k} {isa}")
            if m <= 16:  # a row does not depend on the others
                one = np.empty((1, n), np.float32)
                core(np.float32).packed_matmul(one, a[-1:], packed, 0, mixed)
                assert np.array_equal(one[0], out[-1])


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


def tensors(*shape: int, seed: str) -> list[Any]:
    rng = seeded("mixed ops", seed, *shape)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]


def relative(found: Any, exact: Any) -> float:
    """Norm of the difference over the norm; NaN counts as infinite."""
    error = np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact)
    return float(error) if np.isfinite(error) else float("inf")


def mlstm_of(steps: int, width: int, feature_map: str, mixed: bool) -> list[Any]:
    """Outputs, last state and gradients of an mLSTM on features, with documents."""
    q, k, v, dh = tensors(2, 3, steps, width, seed="mlstm")
    gates = tensors(2, 3, steps, seed="gates")
    maps = tensors(3, width, width, seed="maps")
    reset = seeded("mixed documents", steps).random((2, steps)) < 0.03
    how = {"feature_map": feature_map, "mixed": mixed}
    q, k = (ops.feature_map_forward(x, w, **how) for x, w in zip((q, k), maps, strict=False))
    x = (q, k, v, gates[0], gates[1] + 4)
    h, (c, n, _) = ops.mlstm_forward(*x, scale=1.0, reset=reset, mixed=mixed)
    dq, dk, dv, di, df, _ = ops.mlstm_backward(dh, *x, scale=1.0, reset=reset, mixed=mixed)
    dx, dw = ops.feature_map_backward(
        dq, tensors(2, 3, steps, width, seed="mlstm")[0], maps[0], **how
    )
    return [h, c, n, dq, dk, dv, di, df, dx, dw]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("steps", "width"), [(1, 16), (65, 64), (300, 40), (200, 130)])
def test_the_mlstm_rounds_operands_only(steps, width, feature_map, runtime):
    """Each output is within the rounding of a few products; threads and rows change no bit."""
    exact = [x.astype(np.float64) for x in mlstm_of(steps, width, feature_map, False)]
    found = mlstm_of(steps, width, feature_map, True)
    names = ("h", "C", "n", "dq", "dk", "dv", "di", "df", "dx", "dw")
    for name, x, y in zip(names, found, exact, strict=True):
        if steps > 1 or name in ("h", "C", "n"):  # of one step h = v: the rest has no gradient
            assert relative(x, y) <= MIXED_OP, f"{name}: {relative(x, y):.4f}"
    for threads in (1, 3):
        runtime.set_threads(threads)
        for x, y in zip(mlstm_of(steps, width, feature_map, True), found, strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (16, 4), (300, 2)])
@pytest.mark.parametrize(("steps", "width"), [(1, 16), (100, 64), (700, 40), (60, 400)])
def test_attention_rounds_operands_only(steps, width, window, sinks, runtime):
    q, k, v, do = tensors(2, 4, steps, width, seed="attention")
    k, v = k[:, :2].copy(), v[:, :2].copy()
    reset = seeded("mixed attention", steps).random((2, steps)) < 0.01

    def run(mixed: bool, rows: slice = slice(None)) -> list[Any]:
        x, options = (q[rows], k[rows], v[rows], window, sinks, reset[rows]), {"mixed": mixed}
        o = ops.attention_forward(*x, **options)
        return [o, *ops.attention_backward(do[rows], *x, **options)]

    exact, found = run(False), run(True)
    for name, x, y in zip(("o", "dq", "dk", "dv"), found, exact, strict=True):
        if steps > 1 or name in ("o", "dv"):  # one key: the softmax has no gradient
            assert relative(x, y.astype(np.float64)) <= MIXED_OP, f"{name}: {relative(x, y):.4f}"
    for threads in (1, 3):
        runtime.set_threads(threads)
        for x, y in zip(run(True), found, strict=True):
            assert np.array_equal(x, y)
    for x, y in zip(run(True, slice(1, 2)), found, strict=True):
        assert np.array_equal(x, y[1:2])


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
