"""Feature maps, output gate, its folding and the mix against torch and finite differences.

The registry (cases.py) compares them with the reference at small sizes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import off_the_kink
from tolerances import GRADIENT_F64, OP_F32, OP_F64

from xlstm_distill import ops
from xlstm_distill.reference.attention import FEATURE_MAPS
from xlstm_distill.runtime import core
from xlstm_distill.testing import assert_close, directional_derivative, inner, seeded

both_types = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
by_map = pytest.mark.parametrize("feature_map", FEATURE_MAPS)
B, H, G, T, D = 2, 6, 3, 300, 16  # several blocks of steps, the last one short


def tolerance(dtype):
    return OP_F64 if dtype == np.float64 else OP_F32


def normal(name, *shape, dtype=np.float64):
    return seeded("gates", name, shape).standard_normal(shape).astype(dtype)


def double(*arrays):
    return [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in arrays]


def gradients(output, cotangent, inputs):
    output.backward(torch.from_numpy(cotangent.astype(np.float64)))
    return [x.grad.numpy() for x in inputs]


def check(found, expected, tolerance, what):
    for n, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert_close(x, y, tolerance, f"{what} {n}")


def check_derivative(forward, backward, arguments, output_shape):
    """A directional derivative over all arguments of forward against backward(cotangent)."""
    d = normal("cotangent", *output_shape)
    direction = {name: normal(f"direction {name}", *x.shape) for name, x in arguments.items()}
    found = directional_derivative(lambda a: inner(d, forward(*a.values())), arguments, direction)
    exact = zip(backward(d), direction.values(), strict=True)
    assert_close(sum(inner(g, x) for g, x in exact), found, GRADIENT_F64, "directional derivative")


def gate_inputs(dtype=np.float64):
    """q, k, v, w, b of the output gate."""
    shapes = {"q": (B, H, T, D), "k": (B, G, T, D), "v": (B, G, T, D), "w": (H, 3 * D), "b": (H,)}
    return [normal(name, *shape, dtype=dtype) for name, shape in shapes.items()]


def repeated(x):
    return x.repeat_interleave(H // G, dim=1)


# ---- feature map --------------------------------------------------------------------------------


@by_map
@both_types
def test_feature_map_equals_torch(dtype, feature_map):
    x, w = normal("x", B, G, T, D, dtype=dtype), normal("w", H, D, D, dtype=dtype) / 4
    d = normal("dphi", B, H, T, D, dtype=dtype)
    tx, tw = double(x, w)
    z = torch.einsum("bhti,hij->bhtj", repeated(tx), tw)
    if feature_map == "elu":
        phi = torch.nn.functional.elu(z) + 1 + 1e-6 / D
    else:
        phi = (torch.softmax(z, dim=-1) + 1e-6 / D) / (1 + 1e-6)
    found = (
        ops.feature_map_forward(x, w, feature_map),
        *ops.feature_map_backward(d, x, w, feature_map),
    )
    expected = phi.detach().numpy(), *gradients(phi, d, [tx, tw])
    check(found, expected, tolerance(dtype), "feature map")


@by_map
def test_feature_map_gradients_equal_finite_differences(feature_map):
    arguments = {"x": normal("x", 1, 2, 9, 5), "w": normal("w", 4, 5, 5) / 2}
    if feature_map == "elu":
        off_the_kink(arguments, "x", "w")
    check_derivative(
        lambda x, w: ops.feature_map_forward(x, w, feature_map),
        lambda d: ops.feature_map_backward(d, *arguments.values(), feature_map),
        arguments,
        (1, 4, 9, 5),
    )


@both_types
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0, 1e4])
def test_features_are_a_distribution_away_from_zero(dtype, spread):
    """Whatever the logits: no feature is below the floor, they add up to 1, no product is 0."""
    x, w = normal("x", B, G, T, D, dtype=dtype), normal("w", H, D, D, dtype=dtype)
    phi = ops.feature_map_forward((spread * x).astype(dtype), w)
    assert_close(phi.sum(axis=-1), np.ones((B, H, T)), tolerance(dtype), "sum of features")
    assert phi.min() >= 1e-6 / D * (1 - 1e-5)
    assert (phi[:, :, 1:] * phi[:, :, :-1]).sum(axis=-1).min() > 0


@both_types
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0, 1e4])
def test_features_of_elu_are_away_from_zero(dtype, spread):
    """exp(z) underflows below -87: what is left is the floor, and no product is 0. The gradient
    there is 0, and 1 of what is above 0, however large."""
    x, w = normal("x", B, G, T, D, dtype=dtype), normal("w", H, D, D, dtype=dtype)
    x = (spread * x).astype(dtype)
    phi = ops.feature_map_forward(x, w, "elu")
    assert phi.min() >= 1e-6 / D * (1 - 1e-5)
    assert (phi[:, :, 1:] * phi[:, :, :-1]).sum(axis=-1).min() > 0
    one = np.eye(D, dtype=dtype)[None]
    slope, _ = ops.feature_map_backward(np.ones_like(x[:, :1]), x[:, :1], one, "elu")
    assert_close(slope, np.exp(np.minimum(x[:, :1].astype(np.float64), 0)), tolerance(dtype), "")


@by_map
def test_features_of_nan_are_nan(feature_map):
    x, w = normal("x", 1, 1, 3, 40), np.eye(40)[None]
    x[0, 0, 1] = np.nan
    phi = ops.feature_map_forward(x, w, feature_map)
    dx, _ = ops.feature_map_backward(np.ones_like(phi), x, w, feature_map)
    for found in (phi, dx):
        assert np.isnan(found[0, 0, 1]).all() and np.isfinite(found[0, 0, ::2]).all()


# ---- output gate --------------------------------------------------------------------------------


@both_types
def test_output_gate_equals_torch(dtype):
    arrays, da = gate_inputs(dtype), normal("da", B, H, T, dtype=dtype)
    q, k, v, w, b = tensors = double(*arrays)
    joined = torch.cat([q, repeated(k), repeated(v)], dim=-1)
    a = torch.einsum("bhtj,hj->bht", joined, w) + b[:, None]
    expected = a.detach().numpy(), *gradients(a, da, tensors)
    found = ops.output_gate_forward(*arrays), *ops.output_gate_backward(da, *arrays[:4])
    check(found, expected, tolerance(dtype), "output gate")


def test_output_gate_gradients_equal_finite_differences():
    arguments = dict(zip("qkvwb", gate_inputs(), strict=True))
    check_derivative(
        ops.output_gate_forward,
        lambda d: ops.output_gate_backward(d, *list(arguments.values())[:4]),
        arguments,
        (B, H, T),
    )


@both_types
@pytest.mark.parametrize("biases", [False, True])
def test_a_folded_gate_is_the_gate(dtype, biases):
    """x -> q, k, v -> gate, and x -> gate by the folded projection."""
    width = 48
    x = normal("x", T, width, dtype=dtype)
    weights = [normal(n, s * D, width, dtype=dtype) / 7 for n, s in [("q", H), ("k", G), ("v", G)]]
    shifts = [normal(n, s * D, dtype=dtype) for n, s in [("bq", H), ("bk", G), ("bv", G)]]
    w, b = normal("w", H, 3 * D, dtype=dtype) / 7, normal("b", H, dtype=dtype)

    def heads(y):
        return y.reshape(T, -1, D).transpose(1, 0, 2)[None]

    projected = [x @ m.T + (s if biases else 0) for m, s in zip(weights, shifts, strict=True)]
    expected = ops.output_gate_forward(*map(heads, projected), w, b)[0].T
    folded, bias = ops.fold_output_gate(*weights, w, b, *(shifts if biases else ()))
    assert folded.dtype == bias.dtype == dtype and folded.shape == (H, width)
    assert_close(ops.linear_forward(x, folded, bias), expected, tolerance(dtype), "folded gate")


# ---- mix ----------------------------------------------------------------------------------------


@both_types
def test_mix_equals_torch(dtype):
    hm, hs, dh = (normal(n, B, H, T, D, dtype=dtype) for n in ("hm", "hs", "dh"))
    a = 3 * normal("a", B, H, T, dtype=dtype)
    tm, ts, ta = double(hm, hs, a)
    o = torch.sigmoid(ta)[..., None]
    h = o * tm + (1 - o) * ts
    found = ops.mix_forward(hm, hs, a), *ops.mix_backward(dh, hm, hs, a)
    expected = h.detach().numpy(), *gradients(h, dh, [tm, ts, ta])
    check(found, expected, tolerance(dtype), "mix")


@both_types
def test_a_forced_gate_is_exact(dtype):
    """A pre-activation of -inf is the attention alone and +inf the mLSTM alone, to the last bit."""
    hm, hs = (normal(n, B, H, T, D, dtype=dtype) for n in ("hm", "hs"))
    for a, branch in [(-np.inf, hs), (np.inf, hm), (-1e4, hs), (1e4, hm)]:
        gate = np.full((B, H, T), a, dtype)
        assert np.array_equal(ops.mix_forward(hm, hs, gate), branch)
        dhm, dhs, da = ops.mix_backward(np.ones_like(hm), hm, hs, gate)
        assert not da.any() and np.all(dhm + dhs == 1) and np.isin(dhm, (0, 1)).all()


# ---- promises of all ----------------------------------------------------------------------------


def all_results():
    """Every forward and backward in float32, at sizes that several threads share."""
    x, w = normal("x", B, G, T, D, dtype=np.float32), normal("w", H, D, D, dtype=np.float32)
    q, k, v, gw, gb = gate_inputs(np.float32)
    a = ops.output_gate_forward(q, k, v, gw, gb)
    phi = ops.feature_map_forward(x, w)
    return (
        phi,
        *ops.feature_map_backward(q, x, w),
        ops.feature_map_forward(x, w, "elu"),
        *ops.feature_map_backward(q, x, w, "elu"),
        a,
        *ops.output_gate_backward(a, q, k, v, gw),
        ops.mix_forward(q, phi, a),
        *ops.mix_backward(phi, q, phi, a),
    )


def test_threads_do_not_change_a_bit(runtime):
    runtime.set_threads(1)
    expected = all_results()
    for threads in (2, 3, 8):
        runtime.set_threads(threads)
        for x, y in zip(all_results(), expected, strict=True):
            assert np.array_equal(x, y)


def test_gradients_are_added_and_only_where_wanted():
    x, w, d = normal("x", B, G, T, D), normal("w", H, D, D) / 4, normal("d", B, H, T, D)
    q, k, v, gw, _ = gate_inputs()
    phi, a = ops.feature_map_forward(x, w), normal("a", B, H, T)
    c = core(np.float64)
    cases = [
        (c.feature_map_backward, (d, phi, x, w, 0, 0), ops.feature_map_backward(d, x, w)),
        (c.output_gate_backward, (a, q, k, v, gw), ops.output_gate_backward(a, q, k, v, gw)),
        (c.mix_backward, (d, q, phi, a), ops.mix_backward(d, q, phi, a)),
    ]
    for backward, inputs, expected in cases:
        for only in [None, *range(len(expected))]:
            given = [
                np.full_like(x, 0.5) if only in (None, n) else None for n, x in enumerate(expected)
            ]
            backward(*given, *inputs)
            for x, y in zip(given, expected, strict=True):
                if x is not None:
                    assert_close(x, y + 0.5, OP_F64, "added gradient")


def test_wrong_arguments_are_named():
    q, k, v, w, b = gate_inputs()
    a = normal("a", B, H, T)
    for call, message in [
        (lambda: ops.feature_map_forward(k, w[:, :D]), "w has 2 dimensions"),
        (lambda: ops.feature_map_forward(k, np.zeros((H, D, D + 1))), "w has shape"),
        (
            lambda: ops.feature_map_forward(k, np.zeros((4, D, D))),
            "4 heads are not a multiple of 3",
        ),
        (
            lambda: ops.feature_map_forward(k, np.zeros((H, D, D)), "relu"),
            "feature_map is 'relu', expected one of softmax, elu",
        ),
        (lambda: ops.feature_map_backward(k, k, np.zeros((H, D, D))), "dphi has shape"),
        (lambda: ops.output_gate_forward(q, k, v, w[:, 1:], b), "w has shape"),
        (lambda: ops.output_gate_forward(q, k, v[:, :1], w, b), "v has shape"),
        (lambda: ops.output_gate_forward(q, k, v, w, b[1:]), "b has shape"),
        (lambda: ops.output_gate_backward(a[1:], q, k, v, w), "da has shape"),
        (lambda: ops.mix_forward(q, k, a), "hs has shape"),
        (lambda: ops.mix_forward(q, q, a[:, 1:]), "a has shape"),
        (lambda: ops.mix_backward(k, q, q, a), "dh has shape"),
        (lambda: ops.fold_output_gate(*np.zeros((3, 4, 5)), w, b), "wq has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="q has dtype"):
        ops.output_gate_forward(q.astype(str), k, v, w, b)
