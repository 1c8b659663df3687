"""The recurrent cells, mLSTM (in three forms) and sLSTM: forward and exact backward.

`xlstm_distill.reference` has the same functions in plain NumPy; it is the specification. Shapes:
B batch, H heads, T steps, D head width of q and k, E head width of v. The maths is in
docs/math/mlstm.md and docs/math/slstm.md.

Arrays may be anything NumPy can convert. The work is done in float64 if any input is float64 and in
float32 otherwise, and results have that dtype. Wrong dimensions, sizes that disagree and unknown
options raise ValueError, a wrong kind of dtype raises TypeError, in one line that names the
argument. Nothing is written into what is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xlstm_distill.ops.arrays import FEATURE_MAPS, Array, choice, common_dtype, floats, same_shape
from xlstm_distill.runtime import core

NORMALIZERS = ("ratio", "max")
FORMS = ("chunkwise", "parallel", "recurrent")
SLSTM_TAPE = 7  # arrays of the size of y that the sLSTM's forward keeps for its backward

MlstmState = tuple[Array, Array, Array]
SlstmState = tuple[Array, Array, Array, Array]


def _reset(reset: ArrayLike | None, batch: int, steps: int) -> Array | None:
    if reset is None:
        return None
    given = np.asarray(reset)
    if given.dtype.kind not in "biu":
        raise TypeError(f"reset has dtype {given.dtype}, expected bool")
    same_shape("reset", given, (batch, steps))
    return np.require(given, dtype=bool, requirements=["C", "A"])


def _parts(
    name: str,
    names: str,
    given: Sequence[ArrayLike] | None,
    shapes: Sequence[tuple[int, ...]],
    dtype: Any,
) -> list[Array | None]:
    """The arrays of a state or of its gradient in their shapes; Nones where there is none."""
    if given is None:
        return [None] * len(shapes)
    if len(given) != len(shapes):
        raise ValueError(f"{name} has {len(given)} parts, expected {len(shapes)}: {names}")
    found = []
    for part, array, shape in zip(names.split(", "), given, shapes, strict=True):
        found.append(floats(f"{name} {part}", array, len(shape), dtype))
        same_shape(f"{name} {part}", found[-1], shape)
    return [*found]


def _members(state: Sequence[ArrayLike] | None) -> Sequence[ArrayLike]:
    return () if state is None else tuple(state)


# ---- mLSTM --------------------------------------------------------------------------------------


class _Mlstm:
    """Converted and checked arguments that forward and backward share."""

    def __init__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        i: ArrayLike,
        f: ArrayLike,
        state: Sequence[ArrayLike] | None,
        normalizer: str,
        scale: float | None,
        form: str,
        chunk: int,
        reset: ArrayLike | None,
        mixed: bool,
        *more: ArrayLike,
        key_heads: bool = False,
    ) -> None:
        """key_heads: k may have fewer heads than q, each for a group of them."""
        self.dtype = common_dtype(q, k, v, i, f, *_members(state), *more)
        self.q, self.v = floats("q", q, 4, self.dtype), floats("v", v, 4, self.dtype)
        self.k = floats("k", k, 4, self.dtype)
        self.i, self.f = floats("i", i, 3, self.dtype), floats("f", f, 3, self.dtype)
        batch, heads, steps, width = self.q.shape
        groups = self.k.shape[1] if key_heads else heads
        same_shape("k", self.k, (batch, groups, steps, width))
        same_shape("v", self.v, (batch, heads, steps, self.v.shape[3]))
        same_shape("i", self.i, (batch, heads, steps))
        same_shape("f", self.f, (batch, heads, steps))
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1")
        self.shapes = (
            (batch, heads, width, self.v.shape[3]),
            (batch, heads, width),
            (batch, heads),
        )
        self.state = _parts("state", "C, n, m", state, self.shapes, self.dtype)
        self.inputs = (self.q, self.k, self.v, self.i, self.f)
        self.options = (
            choice("normalizer", normalizer, NORMALIZERS),
            1 / math.sqrt(max(1, width)) if scale is None else float(scale),
            choice("form", form, FORMS),
            min(int(chunk), max(1, steps)),  # a longer chunk is the whole row
            _reset(reset, batch, steps),
            None,  # lengths: rows of the public functions are full
            int(mixed),
        )


def mlstm_forward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    i: ArrayLike,
    f: ArrayLike,
    state: Sequence[ArrayLike] | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    form: str = "chunkwise",
    chunk: int = 64,
    reset: ArrayLike | None = None,
    mixed: bool = False,
) -> tuple[Array, MlstmState]:
    """(h [B, H, T, E], state): matrix memory with exponential input gate and sigmoid forget gate.

    q, k [B, H, T, D] after the feature maps, v [B, H, T, E], i, f gate pre-activations [B, H, T];
    `scale` multiplies q (None: 1/sqrt(D)). state = (C [B, H, D, E], n [B, H, D], m [B, H]), C and n
    scaled by exp(-m); None is m = -inf, the same as a reset. normalizer "ratio" divides by n.q,
    "max" by max(|n.q|, exp(-m)); neither has an eps, and 0/0 gives 0. form "chunkwise" (`chunk`
    steps at a time, linear in T), "parallel" (quadratic) or "recurrent" (a step at a time): the
    same to rounding. reset bool [B, T]: True where a document starts and the state is forgotten.
    mixed: the operands of the chunkwise form's products are rounded to bf16 where the processor
    gains by it; gates, normaliser and state are not. Source: arXiv:2405.04517 (max),
    arXiv:2603.15590 equations (8)-(10) (ratio).
    """
    a = _Mlstm(q, k, v, i, f, state, normalizer, scale, form, chunk, reset, mixed)
    c, n, m = (np.empty(shape, a.dtype) for shape in a.shapes)
    h = np.empty_like(a.v)
    core(a.dtype).mlstm_forward(h, c, n, m, *a.inputs, *a.state, *a.options, None, None, 0)
    return h, (c, n, m)


def mapped_mlstm_forward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    i: ArrayLike,
    f: ArrayLike,
    w_q: ArrayLike,
    w_k: ArrayLike,
    state: Sequence[ArrayLike] | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    form: str = "chunkwise",
    chunk: int = 64,
    reset: ArrayLike | None = None,
    feature_map: str = "softmax",
    mixed: bool = False,
) -> tuple[Array, MlstmState]:
    """`mlstm_forward` of `feature_map_forward(q, w_q)` and `feature_map_forward(k, w_k)`, bit by
    bit, made a chunk at a time: features are never in memory as a whole.

    q [B, H, T, D], k [B, G, T, D], w_q, w_k [H, D, D]; form "chunkwise" or "parallel"; the rest as
    there.
    """
    map_form = choice("feature_map", feature_map, FEATURE_MAPS)
    options = (normalizer, scale, form, chunk, reset, mixed)
    a = _Mlstm(q, k, v, i, f, state, *options, w_q, w_k, key_heads=True)
    heads, width = a.q.shape[1], a.q.shape[3]
    maps = [floats(name, w, 3, a.dtype) for name, w in (("w_q", w_q), ("w_k", w_k))]
    for name, w in zip(("w_q", "w_k"), maps, strict=True):
        same_shape(name, w, (heads, width, width))
    c, n, m = (np.empty(shape, a.dtype) for shape in a.shapes)
    h = np.empty_like(a.v)
    core(a.dtype).mlstm_forward(h, c, n, m, *a.inputs, *a.state, *a.options, *maps, map_form)
    return h, (c, n, m)


def mlstm_backward(
    dh: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    i: ArrayLike,
    f: ArrayLike,
    state: Sequence[ArrayLike] | None = None,
    dstate: Sequence[ArrayLike] | None = None,
    normalizer: str = "ratio",
    scale: float | None = None,
    chunk: int = 64,
    reset: ArrayLike | None = None,
    mixed: bool = False,
) -> tuple[Array, Array, Array, Array, Array, MlstmState | None]:
    """(dq, dk, dv, di, df, dstate) of `mlstm_forward`, each of the shape of its input.

    dh [B, H, T, E]; dstate = (dC, dn, dm), gradient on the last state at fixed m (None: zero; dm is
    not read). The last result is the one on the start state at fixed m, with dm = 0, and None if
    there was no state. The gradient of the normaliser is in all of them; df is 0 where a document
    starts. Under "ratio" a shift of i by a constant has no effect: the sum of di is rounding noise.
    """
    options = (normalizer, scale, "chunkwise", chunk, reset, mixed)
    a = _Mlstm(q, k, v, i, f, state, *options, dh, *_members(dstate))
    dh = floats("dh", dh, 4, a.dtype)
    same_shape("dh", dh, a.v.shape)
    dlast = _parts("dstate", "C, n, m", dstate, a.shapes, a.dtype)
    gradients = [np.zeros_like(x) for x in a.inputs]
    dfirst = None if state is None else tuple(np.zeros(shape, a.dtype) for shape in a.shapes)
    core(a.dtype).mlstm_backward(
        *gradients, *(dfirst or (None,) * 3), dh, *a.inputs, *a.state, *dlast, *a.options
    )
    dq, dk, dv, di, df = gradients
    return dq, dk, dv, di, df, dfirst  # type: ignore[return-value]


# ---- sLSTM --------------------------------------------------------------------------------------


class _Slstm:
    """Converted and checked arguments that forward and backward share."""

    def __init__(
        self,
        x: ArrayLike,
        r: ArrayLike,
        state: Sequence[ArrayLike] | None,
        reset: ArrayLike | None,
        *more: ArrayLike,
    ) -> None:
        self.dtype = common_dtype(x, r, *_members(state), *more)
        self.x, self.r = floats("x", x, 5, self.dtype), floats("r", r, 4, self.dtype)
        batch, heads, steps, _, width = self.x.shape
        same_shape("x", self.x, (batch, heads, steps, 4, width))
        same_shape("r", self.r, (heads, 4, width, width))
        self.shapes = ((batch, heads, width),) * 4
        self.state = _parts("state", "y, c, n, m", state, self.shapes, self.dtype)
        self.reset = _reset(reset, batch, steps)
        self.y = np.empty((batch, heads, steps, width), self.dtype)

    def forward(self, tape: Array | None) -> SlstmState:
        y, c, n, m = (np.empty(shape, self.dtype) for shape in self.shapes)
        core(self.dtype).slstm_forward(
            self.y, y, c, n, m, tape, self.x, self.r, *self.state, self.reset
        )
        return y, c, n, m


def slstm_forward(
    x: ArrayLike,
    r: ArrayLike,
    state: Sequence[ArrayLike] | None = None,
    reset: ArrayLike | None = None,
) -> tuple[Array, SlstmState]:
    """(y [B, H, T, D], state): scalar memory with exponential gates and recurrent weights.

    x [B, H, T, 4, D]: pre-activations W x + b, gates in the order i, f, z, o; r [H, 4, D, D]
    recurrent weights, input first: gate g of step t is x_t[g] + y_{t-1} r[h, g]. state = (y, c, n,
    m), each [B, H, D], c and n scaled by exp(-m); None is y = 0, m = -inf, the same as a reset.
    reset bool [B, T]: True where a document starts. A decoding step is T = 1 with a state.
    Source: arXiv:2405.04517, section 2.2 (exponential input gate, sigmoid forget gate).
    """
    a = _Slstm(x, r, state, reset)
    last = a.forward(None)
    return a.y, last


def slstm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    r: ArrayLike,
    state: Sequence[ArrayLike] | None = None,
    dstate: Sequence[ArrayLike] | None = None,
    reset: ArrayLike | None = None,
) -> tuple[Array, Array, SlstmState | None]:
    """(dx [B, H, T, 4, D], dr [H, 4, D, D], dstate) of `slstm_forward` for dy [B, H, T, D].

    dstate = (dy, dc, dn, dm), gradient on the last state at fixed m (None: zero; dm is not read).
    The last result is the one on the start state at fixed m, with dm = 0, and None if there was no
    state. Runs the forward again and keeps 7 arrays of the size of y.
    """
    a = _Slstm(x, r, state, reset, dy, *_members(dstate))
    dy = floats("dy", dy, 4, a.dtype)
    same_shape("dy", dy, a.y.shape)
    dlast = _parts("dstate", "y, c, n, m", dstate, a.shapes, a.dtype)
    tape = np.empty((*a.y.shape[:3], SLSTM_TAPE, a.y.shape[3]), a.dtype)
    a.forward(tape)
    dx, dr = np.zeros_like(a.x), np.zeros_like(a.r)
    dfirst = None if state is None else tuple(np.zeros(shape, a.dtype) for shape in a.shapes)
    core(a.dtype).slstm_backward(
        dx, dr, *(dfirst or (None,) * 4), dy, a.y, a.r, *a.state, *dlast, tape, a.reset
    )
    return dx, dr, dfirst  # type: ignore[return-value]
