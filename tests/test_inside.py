"""What is measured inside a student, against the reference on weights written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from models import MIXERS, TINY, random_batch, random_model
from tolerances import OP_F64

from xlstm_distill import reference
from xlstm_distill.inside import look_inside, median_gates
from xlstm_distill.reference.attention import visible
from xlstm_distill.reference.scalars import log_sigmoid, sigmoid, softmax
from xlstm_distill.testing import assert_close

STEPS = 40
LAYERS, HEADS, WIDTH = 2, TINY["num_attention_heads"], TINY["head_dim"]


def first_layer(model, ids, reset):
    """By the reference, of the first layer: the mixer's input [N, d], q and k after RoPE, q, k and
    v before it, [B, H or G, T, D], and positions [B, T]."""
    rows, steps = ids.shape
    c, p = model.config, model.params
    name = "model.layers.0"
    x = reference.embedding_forward(ids.reshape(-1), p["model.embed_tokens.weight"])
    x, _ = reference.rmsnorm_forward(x, p[f"{name}.input_layernorm.weight"], c.rms_norm_eps)
    q, k, v = (
        reference.linear_forward(x, p[f"{name}.self_attn.{part}_proj.weight"])
        .reshape(rows, steps, -1, c.head_dim)
        .swapaxes(1, 2)
        for part in "qkv"
    )
    t = np.arange(steps)
    positions = t - np.maximum.accumulate(np.where(reset, t, 0), axis=1)
    turned = [reference.rope_forward(y, positions, c.inv_freq()) for y in (q, k)]
    return x, *turned, (q, k, v), positions


@pytest.fixture(scope="module", params=[False, True], ids=["one document", "packed"])
def text(request):
    ids, reset, _ = random_batch(random_model("hybrid"), 3, STEPS)
    if not request.param:
        reset[:, 1:] = False
    return ids, reset


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_the_first_layer_is_what_the_reference_says(mixer, text):
    ids, reset = text
    model = random_model(mixer, dtype=np.float64)
    found = look_inside(model, ids, reset, sinks=2)
    x, q, k, raw, position = first_layer(model, ids, reset)
    m, prefix = model.config.mixers[0], "model.layers.0.mixer"

    def same(part, expected):
        assert_close(getattr(found, part)[0], expected, OP_F64, f"{mixer}: {part}")

    def nothing(*parts):
        assert all(np.isnan(getattr(found, part)).all() for part in parts)

    if m.mixer in ("attention", "window", "hybrid"):
        seen = visible(len(ids), STEPS, m.window, m.sinks, reset)[:, None]
        scores = q @ np.repeat(k, HEADS // k.shape[1], axis=1).swapaxes(2, 3) / np.sqrt(WIDTH)
        weights = softmax(np.where(seen, scores, -np.inf))
        left = position >= 2 + (0 if m.window is None else m.window - 1)
        means = [
            [
                weights[b, h, t, t - position[b, t] : t - position[b, t] + 2].sum()
                for b, t in np.argwhere(left)
            ]
            for h in range(HEADS)
        ]
        same("sinks", np.mean(means, axis=1))
    else:
        nothing("sinks")
    if m.mixer in ("linear", "mlstm", "hybrid", "lolcats"):
        for part, y in (("q", q), ("k", k)):
            weight = model.params[f"{prefix}.map_{part}"]
            phi = reference.feature_map_forward(y, weight, m.feature_map)
            phi /= phi.sum(-1, keepdims=True)  # their shares; softmax's add up to 1
            entropy = -(phi * np.log(phi)).sum(-1).mean((0, 2)) / np.log(WIDTH)
            same(f"entropy_{part}", entropy)
    else:
        nothing("entropy_q", "entropy_k")
    if m.mixer in ("mlstm", "hybrid"):
        weight, bias = (model.params[f"{prefix}.f_proj.{w}"] for w in ("weight", "bias"))
        f = reference.linear_forward(x, weight, bias).reshape(*ids.shape, HEADS)
        same("horizon", -1 / log_sigmoid(f)[~reset].mean(0))
    elif m.mixer == "linear":
        assert np.isposinf(found.horizon).all()
    else:
        nothing("horizon")
    if m.mixer == "hybrid":
        bias = model.params[f"{prefix}.o_gate.bias"]
        o = np.broadcast_to(bias[:, None], (len(ids), HEADS, STEPS))
        if m.gate == "data":
            o = reference.output_gate_forward(*raw, model.params[f"{prefix}.o_gate.weight"], bias)
        same("gate", np.median(sigmoid(o), axis=(0, 2)))
        batches = [(ids[:1], reset[:1]), (ids[1:], reset[1:])]
        assert_close(median_gates(model, batches), found.gate, OP_F64, f"{mixer}: median gates")
    else:
        nothing("gate")


def test_every_layer_has_its_own_place():
    """Where the first layer adds nothing, the second with its weights does what the first does."""
    model = random_model("hybrid")
    for name in model.params.names():
        if name.startswith("model.layers.1."):
            model.params[name] = model.params[name.replace("layers.1", "layers.0")]
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        model.params[f"model.layers.0.{part}.weight"] *= 0
    found = look_inside(model, random_batch(model, 2, STEPS)[0])
    for first, second in found:
        assert np.array_equal(first, second) and len(np.unique(first)) == HEADS


def test_what_the_figures_mean():
    """Maps of 0 tell nothing, large ones pick a feature; a gate of 1/2 forgets within two tokens;
    without queries attention is even."""
    model = random_model("hybrid", dtype=np.float64)
    ids, _, _ = random_batch(model, 1, STEPS)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        model.params[f"{prefix}.mixer.map_q"] = np.zeros((HEADS, WIDTH, WIDTH))
        model.params[f"{prefix}.mixer.map_k"] = 1e6 * model.params[f"{prefix}.mixer.map_k"]
        model.params[f"{prefix}.mixer.f_proj.weight"] = np.zeros((HEADS, TINY["hidden_size"]))
        model.params[f"{prefix}.mixer.f_proj.bias"] = np.zeros(HEADS)
        model.params[f"{prefix}.self_attn.q_proj.weight"] *= 0
    found = look_inside(model, ids)
    assert_close(found.entropy_q, np.ones((LAYERS, HEADS)), OP_F64, "entropy of even features")
    assert found.entropy_k.max() < 1e-4  # the floor of the features is all that is left
    horizon = np.full((LAYERS, HEADS), 1 / np.log(2))
    assert_close(found.horizon, horizon, OP_F64, "horizon of a gate of 1/2")
    assert_close(found.sinks, np.full((LAYERS, HEADS), 2 / 9), OP_F64, "2 sinks beside 7 tokens")


def test_a_text_within_the_window_says_nothing_of_sinks():
    model = random_model("hybrid")
    ids, _, _ = random_batch(model, 2, 8)
    assert np.isnan(look_inside(model, ids).sinks).all()
    assert np.isfinite(look_inside(model, ids, sinks=1).sinks).all()
    none = random_model("hybrid without sinks")
    assert np.isnan(look_inside(none, random_batch(none, 1, STEPS)[0]).sinks).all()
    assert np.isfinite(look_inside(random_model(), ids, sinks=2).sinks).all()
