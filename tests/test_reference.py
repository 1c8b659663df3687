"""The specification checks itself: exact gradients, equal forms, facts that hold by definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import CASES, mlstm_case
from tolerances import FORMS_F64, GRADIENT_F64, IDENTITY_F64, OP_F64

from xlstm_distill import reference
from xlstm_distill.testing import assert_close, directional_derivative, inner, seeded

DIFFERENTIABLE = [case for case in CASES if case.wrt]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda c: c.name)
def test_gradients_are_those_of_finite_differences(case):
    """One random direction for each argument, random cotangents of every output."""
    outputs = case.op.forward(reference, case.args)
    cotangents = case.random_cotangents(outputs)
    gradients = case.op.backward(reference, case.args, cotangents)
    assert set(gradients) == set(case.wrt)

    def loss(args):
        values = case.op.forward(reference, args)
        return sum(inner(cotangents[n], values[n]) for n in cotangents)

    for name in case.wrt:
        assert gradients[name].shape == case.args[name].shape
        direction = seeded(case.name, name).standard_normal(case.args[name].shape)
        numeric = directional_derivative(loss, case.args, {name: direction})
        exact = inner(gradients[name], direction)
        assert_close(exact, numeric, GRADIENT_F64, f"finite differences: {case.name} d{name}")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_work_is_done_in_the_dtype_of_the_inputs(case):
    args = case.cast(np.float32)
    outputs = case.op.forward(reference, args)
    found = {n: a.dtype for n, a in outputs.items() if a.ndim and a.dtype.kind == "f"}
    if case.op.backward:
        gradients = case.op.backward(reference, args, case.random_cotangents(outputs))
        found |= {f"d{n}": a.dtype for n, a in gradients.items()}
    assert set(found.values()) <= {np.dtype(np.float32)}, found


# ---- mLSTM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["ratio", "max"])
@pytest.mark.parametrize(("start", "packed"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("steps", [1, 7, 63, 64, 65, 200, 500])
def test_forms_of_the_mlstm_are_equal(steps, start, packed, normalizer):
    case = mlstm_case(steps, normalizer, start=start, packed=packed, heads=(2, 2), widths=(5, 4))
    expected = case.op.forward(reference, {**case.args, "form": "recurrent"})
    others = [("parallel", 64), *(("chunkwise", chunk) for chunk in (16, 32, 64))]
    for form, chunk in others:
        found = case.op.forward(reference, {**case.args, "form": form, "chunk": chunk})
        for name, value in expected.items():
            assert_close(found[name], value, FORMS_F64, f"{form} {chunk} {name}")


def test_a_document_start_is_a_fresh_mlstm():
    case = mlstm_case(30, start=True)
    arrays = [case.args[n] for n in "qkvif"]
    reset = np.zeros((2, 30), bool)
    reset[:, 13] = True
    state = (case.args["c0"], case.args["n0"], case.args["m0"])
    packed, last = reference.mlstm_forward(*arrays, state=state, form="recurrent", reset=reset)
    alone, last_alone = reference.mlstm_forward(*(a[:, :, 13:] for a in arrays), form="recurrent")
    assert np.array_equal(packed[:, :, 13:], alone)
    for a, b in zip(last, last_alone, strict=True):
        assert np.array_equal(a, b)


def test_the_mlstm_state_does_not_depend_on_the_stabiliser():
    case = mlstm_case(20, "max", start=True)
    moved = {**case.args, "m0": case.args["m0"] + 3.0}
    moved["c0"], moved["n0"] = (case.args[n] * np.exp(-3.0) for n in ("c0", "n0"))
    expected = case.op.forward(reference, case.args)
    for name, value in case.op.forward(reference, moved).items():
        assert_close(value, expected[name], OP_F64, f"another m0: {name}")


@pytest.mark.parametrize("normalizer", ["ratio", "max"])
@pytest.mark.parametrize("packed", [False, True])
def test_identities_for_the_gate_gradients_of_the_mlstm(normalizer, packed):
    """di = k . dk, and d log f the reverse sum of q . dq - k . dk within a document."""
    case = mlstm_case(60, normalizer, packed=packed, last=False)
    a, reset = case.args, case.args["reset"]
    d = case.random_cotangents(case.op.forward(reference, a))
    g = case.op.backward(reference, a, d)
    along_k = np.sum(a["k"] * g["k"], axis=-1)
    assert_close(g["i"], along_k, IDENTITY_F64, "di = k . dk")
    x = np.sum(a["q"] * g["q"], axis=-1) - along_k
    total = np.zeros_like(x[:, :, 0])
    for t in reversed(range(60)):
        total = total + x[:, :, t]
        if packed:
            total = np.where(reset[:, None, t], 0.0, total)
        df = total * reference.scalars.sigmoid(-a["f"][:, :, t])
        assert_close(g["f"][:, :, t], df, IDENTITY_F64, "df from q . dq - k . dk")
        if packed:
            assert not g["f"][:, :, t][reset[:, t]].any()
            total = np.where(reset[:, None, t], 0.0, total)


def test_the_ratio_ignores_the_scale_and_a_shift_of_all_input_gates():
    case = mlstm_case(25, "ratio", last=False)
    h = case.op.forward(reference, case.args)["h"]
    for change in ({"scale": 7.0}, {"i": case.args["i"] + 40.0}):
        moved = case.op.forward(reference, {**case.args, **change})["h"]
        assert_close(moved, h, OP_F64, f"ratio under {next(iter(change))}")


def test_tiny_input_gates_are_a_weighted_mean_in_float32():
    case = mlstm_case(40, "ratio", "recurrent", gates="tiny i", last=False)
    h = case.op.forward(reference, case.cast(np.float32))["h"]
    v = case.args["v"]
    assert np.isfinite(h).all() and np.abs(h).max() <= np.abs(v).max() * (1 + 1e-5)


# ---- sLSTM --------------------------------------------------------------------------------------


def test_a_document_start_is_a_fresh_slstm():
    rng = seeded("slstm documents")
    x, r = rng.standard_normal((2, 3, 20, 4, 5)), rng.standard_normal((3, 4, 5, 5))
    reset = np.zeros((2, 20), bool)
    reset[:, 8] = True
    y, last = reference.slstm_forward(x, r, reset=reset)
    alone, last_alone = reference.slstm_forward(x[:, :, 8:], r)
    assert np.array_equal(y[:, :, 8:], alone)
    for a, b in zip(last, last_alone, strict=True):
        assert np.array_equal(a, b)


def test_slstm_in_two_pieces_equals_one():
    rng = seeded("slstm pieces")
    x, r = rng.standard_normal((2, 3, 20, 4, 5)), rng.standard_normal((3, 4, 5, 5))
    whole, last = reference.slstm_forward(x, r)
    first, state = reference.slstm_forward(x[:, :, :9], r)
    second, state = reference.slstm_forward(x[:, :, 9:], r, state)
    assert np.array_equal(np.concatenate([first, second], axis=2), whole)
    for a, b in zip(state, last, strict=True):
        assert np.array_equal(a, b)


# ---- attention ----------------------------------------------------------------------------------


def test_number_of_visible_keys():
    """min(t + 1, W) + clip(t + 1 - W, 0, S), counted from the start of the document."""
    reset = np.zeros((1, 40), bool)
    reset[0, 11] = True
    for window, sinks in itertools.product([1, 3, 8, 50], [0, 2, 9]):
        seen = reference.attention.visible(1, 40, window, sinks, reset)[0].sum(axis=1)
        t = np.concatenate([np.arange(11), np.arange(29)])
        expected = np.minimum(t + 1, window) + np.clip(t + 1 - window, 0, sinks)
        assert np.array_equal(seen, expected)


def test_attention_of_equal_scores_is_the_mean_of_what_is_seen():
    rng = seeded("equal scores")
    v = rng.standard_normal((1, 1, 12, 3))
    o = reference.attention_forward(np.zeros_like(v), v, v, window=4, sinks=2)
    for t in range(12):
        seen = sorted({*range(max(0, t - 3), t + 1), *range(min(2, t + 1))})
        assert_close(o[0, 0, t], v[0, 0, seen].mean(axis=0), OP_F64, "mean of seen values")


def test_query_heads_read_their_group():
    rng = seeded("groups")
    q = rng.standard_normal((1, 6, 8, 4))
    k, v = rng.standard_normal((2, 1, 2, 8, 4))
    together = reference.attention_forward(q, k, v)
    for h in range(6):
        one = np.s_[:, h // 3 : h // 3 + 1]
        alone = reference.attention_forward(q[:, h : h + 1], k[one], v[one])
        assert_close(together[:, h : h + 1], alone, OP_F64, "head of a group")


def test_rope_scores_depend_on_the_distance_alone():
    rng = seeded("rope")
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    freq = 100.0 ** (-np.arange(4) / 4)

    def score(a, b):
        rotate = reference.rope_forward
        return inner(rotate(q, np.array([[a]]), freq), rotate(k, np.array([[b]]), freq))

    assert_close(score(903, 900), score(3, 0), OP_F64, "rope, same distance")
    assert abs(score(903, 900) - score(4, 0)) > 1e-3
    there = reference.rope_forward(q, np.array([[77]]), freq)
    back = reference.rope_forward(there, np.array([[77]]), freq, inverse=True)
    assert_close(back, q, OP_F64, "rope and its inverse")


def test_features_are_positive_and_sum_to_one():
    rng = seeded("features")
    x, w = rng.standard_normal((1, 1, 6, 8)), 60 * rng.standard_normal((2, 8, 8))
    phi = reference.feature_map_forward(x.astype(np.float32), w.astype(np.float32))
    assert (phi >= 0.99e-6 / 8).all()
    assert_close(phi.astype(np.float64).sum(axis=-1), np.ones((1, 2, 6)), 1e-6, "sum of features")


# ---- gates and losses ---------------------------------------------------------------------------


def test_the_folded_gate_is_the_gate():
    rng = seeded("fold")
    b, h, g, t, d, width = 2, 6, 2, 5, 4, 9
    x = rng.standard_normal((b, t, width))
    weights = [rng.standard_normal((n * d, width)) for n in (h, g, g)]
    biases = [rng.standard_normal(n * d) for n in (h, g, g)]
    w, bias = rng.standard_normal((h, 3 * d)), rng.standard_normal(h)
    q, k, v = (
        (x @ m.T + s).reshape(b, t, -1, d).swapaxes(1, 2)
        for m, s in zip(weights, biases, strict=True)
    )
    folded, shift = reference.fold_output_gate(*weights, w, bias, *biases)
    expected = reference.output_gate_forward(q, k, v, w, bias)
    assert_close((x @ folded.T + shift).swapaxes(1, 2), expected, OP_F64, "folded gate")


def _head(k):
    rng = seeded("forms", k)
    x, w = rng.standard_normal((9, 6)), rng.standard_normal((23, 6))
    z = x @ w.T + rng.standard_normal((9, 23))
    logp = z - reference.scalars.log_sum_exp(z)[:, None]
    ids = np.argsort(-logp, axis=1)[:, :k].astype(np.int32)
    return x, w, z, rng.integers(0, 23, 9, dtype=np.int32), ids, np.take_along_axis(logp, ids, 1)


def test_kl_over_all_tokens_is_the_divergence():
    """With every token a target, renormalising changes nothing."""
    x, w, z, labels, ids, logp = _head(23)
    _, kl, count, _, _ = reference.head_loss(x, w, labels, ids, logp, 0.0, 1.0)
    exact, _, nll, _ = reference.divergence(z, x @ w.T, labels)
    assert count == 9
    assert_close(kl, exact.sum(), OP_F64, "kl of all targets")
    ce, _, _, _, _ = reference.head_loss(x, w, labels)
    assert_close(ce, nll.sum(), OP_F64, "cross-entropy")


def test_tail_is_between_nothing_and_the_divergence():
    """Merging outcomes lowers a KL; the less is merged, the closer."""
    full = 0.0
    found = []
    for k in (2, 8, 22):
        x, w, z, labels, ids, logp = _head(22)
        ids, logp = ids[:, :k], logp[:, :k]
        found.append(reference.head_loss(x, w, labels, ids, logp, 0, 1, "tail")[1])
        full = float(reference.divergence(z, x @ w.T, labels)[0].sum())
    assert 0 < found[0] < found[1] < found[2]
    assert_close(found[2], full, OP_F64, "tail of one token is exact")  # its bucket is that token


def test_sampled_with_the_teachers_probabilities_is_the_cross_entropy_of_the_two():
    x, w, z, labels, ids, logp = _head(23)
    kl = reference.head_loss(x, w, labels, ids, logp, 0, 1, "sampled")[1]
    entropy = -np.sum(np.exp(logp) * logp)
    exact = reference.divergence(z, x @ w.T, labels)[0].sum()
    assert_close(kl, exact + entropy, OP_F64, "sampled over all tokens")


@pytest.mark.parametrize("form", ["renormalised", "tail", "sampled"])
def test_padding_and_uncounted_rows_change_nothing(form):
    x, w, _, labels, ids, logp = _head(7)
    expected = reference.head_loss(x, w, labels, ids, logp, 0.4, 0.6, form)
    padded_ids = np.concatenate([ids, ids[:, :2]], axis=1)
    padded = np.concatenate([logp, np.full((9, 2), -np.inf)], axis=1)
    found = reference.head_loss(x, w, labels, padded_ids, padded, 0.4, 0.6, form)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)
    labels = labels.copy()
    labels[4] = -1
    rest = np.arange(9) != 4
    found = reference.head_loss(x, w, labels, ids, logp, 0.4, 0.6, form)
    alone = reference.head_loss(x[rest], w, labels[rest], ids[rest], logp[rest], 0.4, 0.6, form)
    assert found[:3] == alone[:3]
    assert not found[3][4].any()


def test_adamw_first_step_is_the_sign_of_the_gradient():
    """Bias correction makes the first moment the gradient itself and the root of the second |g|."""
    p, g = np.array([1.0, -2.0, 3.0]), np.array([0.5, -4.0, 1e-3])
    rates = {"beta1": 0.9, "beta2": 0.999, "eps": 0.0, "weight_decay": 0.5}
    after = p.copy()
    reference.adamw_step(after, g, np.zeros(3), np.zeros(3), lr=0.01, step=1, scale=0.1, **rates)
    assert_close(after, p - 0.01 * (np.sign(g) + 0.5 * p), OP_F64, "first step of AdamW")
