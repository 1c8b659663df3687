"""The sLSTM: reference, exact gradients, the public cell, documents, states, threads."""

from __future__ import annotations

import numpy as np
import pytest
import tolerances as tol

from xlstm_distill import ops, reference
from xlstm_distill.runtime import available_isas, core
from xlstm_distill.testing import assert_close, directional_derivative, inner, seeded

STATE = ("y", "c", "n", "m")


def inputs(T, B=3, H=2, D=5, dtype=np.float64):
    """x and r; r is large enough for the recurrence to matter."""
    random = seeded("slstm", T, B, H, D)
    x = random.standard_normal((B, H, T, 4, D)) * 1.5
    r = random.standard_normal((H, 4, D, D)) / np.sqrt(D)
    return x.astype(dtype), r.astype(dtype)


def start_state(x):
    """A random state that a sequence could have left: n > 0."""
    random = seeded("slstm state", x.shape)
    y, c, n, m = (random.standard_normal(x.shape[:2] + x.shape[4:]) for _ in STATE)
    return tuple(a.astype(x.dtype) for a in (np.tanh(y), c, np.exp(n), m))


def documents(x, rate=0.1):
    """Document starts of a packed batch, none at 0 in the last row."""
    reset = seeded("slstm documents", x.shape).random((x.shape[0], x.shape[2])) < rate
    reset[:-1, 0] = True
    return reset


def cotangents(x):
    random = seeded("slstm cotangents", x.shape)
    dstate = tuple(random.standard_normal(x.shape[:2] + x.shape[4:]).astype(x.dtype) for _ in STATE)
    dy = random.standard_normal(x.shape[:3] + x.shape[4:]).astype(x.dtype)
    return dy, dstate


def run(x, r, dy, state=None, dstate=None, reset=None):
    """y, the last state, dx, dr and the gradient on the start state."""
    y, last = ops.slstm_forward(x, r, state, reset)
    dx, dr, dfirst = ops.slstm_backward(dy, x, r, state, dstate, reset)
    return [y, *last, dx, dr, *(dfirst or ())]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---- reference and gradients --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, tol.OP_F64), (np.float32, tol.CELL_F32)]
)
@pytest.mark.parametrize(("T", "D"), [(1, 5), (33, 3), (70, 19)])
def test_forward_and_backward_are_the_reference(T, D, dtype, tolerance):
    x, r = inputs(T, D=D, dtype=dtype)
    dy, dstate = cotangents(x)
    wide = [a.astype(np.float64) for a in (x, r, dy)]
    for state in (None, start_state(x)):
        for reset in (None, documents(x)):
            found = run(x, r, dy, state, dstate, reset)
            w, dw = ([a.astype(np.float64) for a in s] if s else None for s in (state, dstate))
            y, last = reference.slstm_forward(*wide[:2], w, reset)
            dx, dr, dfirst = reference.slstm_backward(wide[2], *wide[:2], w, dw, reset)
            expected = [y, *last, dx, dr, *(dfirst or ())]
            labels = ("y", *STATE, "dx", "dr", *("d" + s for s in STATE))
            for name, a, b in zip(labels, found, expected, strict=False):
                assert a.dtype == dtype
                assert_close(a, b, tolerance, f"slstm {name} {np.dtype(dtype)}")


def loss(at, dy, dstate, m_last, reset):
    """<dy, y> and the products with the last state, brought to the stabiliser m_last."""
    state = tuple(at[s] for s in STATE) if "y" in at else None
    y, (last_y, c, n, m) = ops.slstm_forward(at["x"], at["r"], state, reset)
    unit = np.exp(m - m_last)
    parts = ((dy, y), (dstate[0], last_y), (dstate[1], c * unit), (dstate[2], n * unit))
    return sum(inner(a, b) for a, b in parts)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("T", [1, 6, 40])
def test_gradients_are_directional_derivatives(T, resets):
    x, r = inputs(T)
    state, reset = start_state(x), documents(x) if resets else None
    dy, dstate = cotangents(x)
    _, (_, _, _, m_last) = ops.slstm_forward(x, r, state, reset)
    at = dict(zip(("x", "r", *STATE), (x, r, *state), strict=True))
    # the core adds: the gradients already hold something, which is taken off again
    tape = np.empty((*x.shape[:3], 7, x.shape[4]))
    y, last = np.empty_like(dy), [np.empty_like(a) for a in state]
    core(np.float64).slstm_forward(y, *last, tape, x, r, *state, reset)
    before = [seeded("prefill", n).standard_normal(a.shape) for n, a in enumerate((x, r, *state))]
    grads = [a.copy() for a in before]
    core(np.float64).slstm_backward(*grads, dy, y, r, *state, *dstate, tape, reset)
    for name, gradient, prefill in zip(("x", "r", *STATE[:3]), grads, before, strict=False):
        direction = seeded("direction", name, T).standard_normal(gradient.shape)
        expected = directional_derivative(
            lambda moved: loss(moved, dy, dstate, m_last, reset), at, {name: direction}
        )
        found = inner(gradient - prefill, direction)
        assert_close(found, expected, tol.GRADIENT_F64, f"slstm directional d{name}")


def test_every_element_of_the_gradients():
    x, r = inputs(4, B=1, H=2, D=2)
    reset = np.array([[False, False, True, False]])
    dy, dstate = cotangents(x)
    _, (_, _, _, m_last) = ops.slstm_forward(x, r, None, reset)
    dx, dr, none = ops.slstm_backward(dy, x, r, None, dstate, reset)
    assert none is None
    for name, gradient in (("x", dx), ("r", dr)):
        for where in np.ndindex(gradient.shape):
            unit = np.zeros_like(gradient)
            unit[where] = 1.0
            expected = directional_derivative(
                lambda moved: loss(moved, dy, dstate, m_last, reset), {"x": x, "r": r}, {name: unit}
            )
            assert_close(gradient[where], expected, tol.GRADIENT_F64, f"slstm elements of d{name}")


# ---- the public cell ----------------------------------------------------------------------------


def test_public_vanilla_cell():
    torch = pytest.importorskip("torch")
    cell_module = pytest.importorskip("xlstm.blocks.slstm.cell")
    B, H, T, D = 3, 2, 50, 8
    x, r = inputs(T, B=B, H=H, D=D, dtype=np.float32)
    dy, _ = cotangents(x)
    config = cell_module.sLSTMCellConfig(
        hidden_size=H * D, num_heads=H, backend="vanilla", dtype="float32", batch_size=B
    )
    cell = cell_module.sLSTMCell(config)
    kernel = torch.tensor(r).permute(0, 2, 1, 3)  # its layout is [H, input, gate, output]
    with torch.no_grad():
        cell._recurrent_kernel_.copy_(cell._recurrent_kernel_ext2int(kernel))
        cell._bias_.zero_()
    # its input is [B, T, gate, H, D] as one row of numbers
    flat = torch.tensor(x).permute(0, 2, 3, 1, 4).reshape(B, T, -1).requires_grad_(True)
    y, state = cell(flat)  # [B, H, T, D] and [4, B, H D]
    torch.sum(y * torch.tensor(dy)).backward()
    found, last = ops.slstm_forward(x, r)
    dx, dr, _ = ops.slstm_backward(dy, x, r)
    assert_close(found, y.detach().numpy(), tol.PUBLIC_F32, "slstm public y")
    for name, a, b in zip(STATE, last, state.detach().numpy().reshape(4, B, H, D), strict=True):
        assert_close(a, b, tol.PUBLIC_F32, f"slstm public {name}")
    public_dx = flat.grad.reshape(B, T, 4, H, D).permute(0, 3, 1, 2, 4).numpy()
    assert_close(dx, public_dx, tol.PUBLIC_F32, "slstm public dx")
    public_dr = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_.grad)
    public_dr = public_dr.permute(0, 2, 1, 3).numpy()
    assert_close(dr, public_dr, tol.PUBLIC_F32, "slstm public dr")


# ---- documents, states, steps -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_document_does_not_see_its_neighbours(dtype):
    x, r = inputs(90, B=1, dtype=dtype)
    dy, _ = cotangents(x)
    reset = np.zeros((1, 90), bool)
    reset[0, [0, 30, 70]] = True
    packed = run(x, r, dy, reset=reset)
    inside = np.s_[:, :, 30:70]
    other, dother = seeded("other").standard_normal(x.shape).astype(dtype), np.ones_like(dy)
    other[inside], dother[inside] = x[inside], dy[inside]
    changed = run(other, r, dother, reset=reset)
    alone = run(x[inside], r, dy[inside])
    for j in (0, 5):  # y and dx
        assert np.array_equal(packed[j][inside], changed[j][inside])
        assert np.array_equal(packed[j][inside], alone[j])


def test_a_reset_at_the_first_step_forgets_the_state():
    x, r = inputs(20, B=1)
    dy, dstate = cotangents(x)
    reset = np.zeros((1, 20), bool)
    fresh = run(x, r, dy, None, dstate, reset)
    reset[0, 0] = True
    found = run(x, r, dy, start_state(x), dstate, reset)
    assert equal(found[:7], fresh) and not any(a.any() for a in found[7:])
    assert not found[5][:, :, 0, 1].any()  # f of the first step


@pytest.mark.parametrize("cut", [1, 32, 47])
def test_a_sequence_can_be_cut_with_its_state(cut):
    x, r = inputs(50)
    state, reset = start_state(x), documents(x, 0.03)
    dy, dstate = cotangents(x)
    whole = run(x, r, dy, state, dstate, reset)
    y1, middle = ops.slstm_forward(x[:, :, :cut], r, state, reset[:, :cut])
    y2, last = ops.slstm_forward(x[:, :, cut:], r, middle, reset[:, cut:])
    dx2, dr2, dmiddle = ops.slstm_backward(
        dy[:, :, cut:], x[:, :, cut:], r, middle, dstate, reset[:, cut:]
    )
    dx1, dr1, dstart = ops.slstm_backward(
        dy[:, :, :cut], x[:, :, :cut], r, state, dmiddle, reset[:, :cut]
    )
    y, dx = np.concatenate((y1, y2), axis=2), np.concatenate((dx1, dx2), axis=2)
    assert equal([y, *last, dx], whole[:6]) and equal(dstart, whole[7:])
    assert_close(dr1 + dr2, whole[6], tol.FORMS_F64, "slstm dr in two parts")


def test_steps_are_the_forward_bit_for_bit():
    x, r = inputs(30, dtype=np.float32)
    y, last = ops.slstm_forward(x, r)
    state, steps = None, []
    for t in range(30):
        step, state = ops.slstm_forward(x[:, :, t : t + 1], r, state)
        steps.append(step)
    assert np.array_equal(np.concatenate(steps, axis=2), y) and equal(state, last)


def test_last_state_may_be_the_memory_of_the_first():
    x, r = inputs(9)
    state = start_state(x)
    expected = ops.slstm_forward(x, r, state)
    y, own = np.empty_like(expected[0]), [a.copy() for a in state]
    core(np.float64).slstm_forward(y, *own, None, x, r, *own, None)
    assert np.array_equal(y, expected[0]) and equal(own, expected[1])


# ---- threads, rows, instruction sets ------------------------------------------------------------


@pytest.mark.parametrize("D", [24, 300])
def test_bits_do_not_depend_on_threads_or_batch(runtime, D):
    """D = 300: the recurrent product is summed in two slices."""
    x, r = inputs(40 if D < 100 else 4, B=5, H=4, D=D, dtype=np.float32)
    dy, dstate = cotangents(x)
    state, reset = start_state(x), documents(x)
    results = []
    for threads in (1, 2, 3):
        runtime.set_threads(threads)
        results.append(run(x, r, dy, state, dstate, reset))
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    part = np.s_[1:2, 3:4]
    s, d = (tuple(a[part] for a in p) for p in (state, dstate))
    alone = run(x[part], r[3:4], dy[part], s, d, reset[1:2])
    for j in (0, 1, 2, 3, 4, 5, 7, 8, 9):  # all but dr, a sum over the rows
        assert np.array_equal(results[0][j][part], alone[j])


def test_instruction_sets_agree(runtime):
    x, r = inputs(60, D=40, dtype=np.float32)
    dy, dstate = cotangents(x)
    results = {}
    for isa in available_isas():
        runtime.set_isa(isa)
        results[isa] = run(x, r, dy, None, dstate)
    for isa, found in results.items():
        for a, b in zip(found, results["generic"], strict=True):
            assert_close(a, b, tol.CELL_F32, f"slstm {isa} against generic")


# ---- extremes and wrong arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("i_shift", "f_shift"), [(-300, 0), (300, 0), (0, 60), (0, -60), (-np.inf, 0)]
)
def test_extreme_gates_stay_finite(i_shift, f_shift):
    x, r = inputs(100, dtype=np.float32)
    dy, _ = cotangents(x)
    x[:, :, :, 0] += np.float32(i_shift)
    x[:, :, :, 1] += np.float32(f_shift)
    y, (_, c, n, _) = ops.slstm_forward(x, r)
    dx, dr, _ = ops.slstm_backward(dy, x, r)
    assert all(np.all(np.isfinite(a)) for a in (y, c, n, dx, dr))
    assert np.all(np.abs(y) <= 1 + 1e-6)  # sigmoid times a mean of tanh


def test_an_unwanted_gradient_changes_nothing():
    x, r = inputs(10)
    dy, _ = cotangents(x)
    dx, dr, _ = ops.slstm_backward(dy, x, r)
    none, tape = (None,) * 4, np.empty((*x.shape[:3], 7, x.shape[4]))
    y, only = np.empty_like(dy), np.zeros_like(r)
    core(np.float64).slstm_forward(y, *none, tape, x, r, *none, None)
    core(np.float64).slstm_backward(None, only, *none, dy, y, r, *none, *none, tape, None)
    assert np.array_equal(only, dr)
    only = np.zeros_like(x)
    core(np.float64).slstm_backward(only, None, *none, dy, y, r, *none, *none, tape, None)
    assert np.array_equal(only, dx)


def test_wrong_arguments_are_named():
    x, r = inputs(6)
    for arguments, options, message in [
        ((x[:, :, :, :3], r), {}, r"x has shape .*, expected \(3, 2, 6, 4, 5\)"),
        ((x, r[:1]), {}, r"r has shape \(1, 4, 5, 5\), expected \(2, 4, 5, 5\)"),
        ((x[0], r), {}, "x has 4 dimensions, expected 5"),
        ((x, r), {"reset": np.zeros((3, 5), bool)}, "reset has shape"),
        ((x, r), {"state": (x,) * 3}, "state has 3 parts, expected 4: y, c, n, m"),
        ((x[..., :0], r[..., :0, :0]), {}, "head width 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.slstm_forward(*arguments, **options)
    with pytest.raises(ValueError, match="dy has shape"):
        ops.slstm_backward(x[:, :, :, 0, :3], x, r)
