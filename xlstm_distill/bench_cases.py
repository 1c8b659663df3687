"""What `xlstm_distill.bench` measures: the cases of every suite, and how much work each is.

Everything has the shape of SmolLM2-135M unless its name says otherwise, and random contents:
nothing is downloaded. Floating-point operations count the products that the method needs (causal
halves once), not what an implementation happens to do; bytes count what has to come from memory at
least once, for the cases that memory limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ops
from .config import MixerConfig, ModelConfig
from .model import Compute, Model
from .parameters import aligned_bytes
from .runtime import core
from .state import DecodeState

COMPUTE: tuple[Compute, ...] = ("f32", "mixed")
PEAKS: tuple[Compute, ...] = (*COMPUTE, "int8")
"""Operands of products that a peak is measured for, in the order of the core's `peak`."""
CHUNK = 64
WINDOW, SINKS = 64, 4
MIXER_WINDOW = 512
COLD_BYTES = 512 << 20
"""Weights of a product that must find them in memory: far more than any cache holds."""
CONTEXTS = (64, 7800)
"""Tokens behind a step of decoding."""
CHART_CONTEXTS = (1024, 4096, 16384, 65536)
CHART_STEPS = 512
"""Of a context, the last so many tokens are read for the chart of cost against context."""

SMOLLM2_135M: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_ids": [2],
    "pad_token_id": 2,
}


class Case(NamedTuple):
    """One thing to measure. `run` does it once; `sizes` lets a rival do the same; `compute` says
    which peak its share is of; `bytes` is what memory has to give, 0 where it does not limit."""

    suite: str
    name: str
    run: Callable[[], Any]
    flops: float
    tokens: int
    sizes: Mapping[str, int]
    compute: Compute = "f32"
    bytes: float = 0


def _random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


# ---- products -----------------------------------------------------------------------------------

WEIGHTS = ((1536, 576), (576, 1536), (49152, 576), (8192, 2048))
"""Outputs and inputs: MLP up, MLP down, head, and a larger model's."""


def gemm_cases() -> Iterator[Case]:
    """Products for 64, 512 and 2,048 rows, and for 1 and 8 with weights that no cache holds; in
    float32, with both operands rounded on the way ("mixed"), and with weights packed in bf16 and
    int8."""
    for m, (n, k) in itertools.product((64, 512, 2048), WEIGHTS):
        a, b, c = _random(m, k), _random(n, k), np.empty((m, n), np.float32)
        sizes = {"m": m, "n": n, "k": k}
        for kind, compute, run in _products(a, b, c):
            yield Case("gemm", f"{m}x{n}x{k} {kind}", run, 2.0 * m * n * k, m, sizes, compute)
    for (n, k), stored in itertools.product(WEIGHTS, _STORED):
        first = _stored(_random(n, k), stored)
        copies = -(-COLD_BYTES // first.nbytes)
        room = aligned_bytes(copies * first.nbytes).view(first.dtype)
        weights = room.reshape(copies, *first.shape)
        weights[...] = first
        for m in (1, 8):
            turn = itertools.cycle(weights)
            a, c = _random(m, k), np.empty((m, n), np.float32)

            def cold(c: Any = c, a: Any = a, turn: Any = turn, stored: Compute = stored) -> None:
                _multiply(c, a, next(turn), stored)

            name = f"{m}x{n}x{k} {stored} cold"
            sizes = {"m": m, "n": n, "k": k, "cold": 1}
            yield Case("gemm", name, cold, 2.0 * m * n * k, m, sizes, _STORED[stored], first.nbytes)


_STORED: dict[Compute, Compute] = {"f32": "f32", "bf16": "mixed", "int8": "int8"}
"""How weights are stored, and the operands of their products."""


def _products(a: Any, b: Any, c: Any) -> Iterator[tuple[Compute, Compute, Callable[[], None]]]:
    yield "mixed", "mixed", lambda: core().matmul(c, a, b, 0, 1, 1.0, 0.0, 1)
    for stored, compute in _STORED.items():
        w = _stored(b, stored)
        yield stored, compute, partial(_multiply, c, a, w, stored)


def _stored(w: NDArray[np.float32], stored: Compute) -> NDArray[Any]:
    """As a model with compute=`stored` stores a matrix."""
    if stored == "f32":
        return w
    to = aligned_bytes(core().packed_size(*w.shape, int(stored == "int8")))
    core().pack_weights(to, w, int(stored == "int8"))
    return to


def _multiply(c: Any, a: Any, w: Any, stored: Compute) -> None:
    if stored == "f32":
        core().matmul(c, a, w, 0, 1, 1.0, 0.0, 0)
    else:
        core().packed_matmul(c, a, w, int(stored == "int8"), 1)


# ---- sequence ops -------------------------------------------------------------------------------


def mlstm_flops(tokens: float, heads: int, d: int, chunk: int, *, backward: bool) -> float:
    """Products of the chunkwise mLSTM: within chunks (causal half) and through the state."""
    inside = chunk * d  # 2 D for each of chunk / 2 keys
    if backward:
        return tokens * heads * (5.0 * inside + 10.0 * d * d)
    return tokens * heads * (2.0 * inside + 4.0 * d * d)


def attention_flops(tokens: float, heads: int, d: int, visible: float, *, backward: bool) -> float:
    """Products of attention over `visible` keys a query."""
    return tokens * heads * visible * d * (10.0 if backward else 4.0)


def visible_keys(steps: int, window: int | None, sinks: int, past: int = 0) -> float:
    """Mean number of keys that each of `steps` queries behind `past` tokens sees."""
    t = past + np.arange(steps)
    reach = past + steps if window is None else window
    return float(np.mean(np.minimum(t + 1, reach) + np.clip(t + 1 - reach, 0, sinks)))


class _Cell(NamedTuple):
    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    i: NDArray[np.float32]
    f: NDArray[np.float32]

    @staticmethod
    def random(heads: int, steps: int, d: int) -> _Cell:
        shape = (1, heads, steps)
        q, k, v = (np.abs(_random(*shape, d)) for _ in range(3))
        return _Cell(q, k, v, _random(*shape), _random(*shape) + 6)


def mlstm_cases() -> Iterator[Case]:
    """The mLSTM at SmolLM2's 9 heads of 64 and at 32 heads of 128, forward and backward."""
    for (heads, steps, d), compute in itertools.product(((9, 2048, 64), (32, 4096, 128)), COMPUTE):
        cell, dh = _Cell.random(heads, steps, d), _random(1, heads, steps, d)
        sizes = {"heads": heads, "steps": steps, "d": d, "chunk": CHUNK}
        options = {"chunk": CHUNK, "mixed": compute == "mixed"}

        def forward(cell: _Cell = cell, options: Any = options) -> None:
            ops.mlstm_forward(*cell, **options)

        def both(dh: Any = dh, cell: _Cell = cell, options: Any = options) -> None:
            ops.mlstm_forward(*cell, **options)
            ops.mlstm_backward(dh, *cell, **options)

        name, flops = f"H{heads} T{steps} D{d}", mlstm_flops(steps, heads, d, CHUNK, backward=False)
        yield Case("mlstm", f"{name} forward {compute}", forward, flops, steps, sizes, compute)
        flops += mlstm_flops(steps, heads, d, CHUNK, backward=True)
        name = f"{name} forward+backward {compute}"
        yield Case("mlstm", name, both, flops, steps, {**sizes, "backward": 1}, compute)


def attention_cases() -> Iterator[Case]:
    """Attention at SmolLM2's heads, full and with window + sinks; and what replaces it: the whole
    hybrid mixer at 32 heads of 128."""
    heads, groups, steps, d = 9, 3, 2048, 64
    q, do = _random(1, heads, steps, d), _random(1, heads, steps, d)
    k, v = _random(1, groups, steps, d), _random(1, groups, steps, d)
    for (window, sinks), compute in itertools.product(((None, 0), (WINDOW, SINKS)), COMPUTE):
        visible = visible_keys(steps, window, sinks)
        sizes = {"heads": heads, "groups": groups, "steps": steps, "d": d}
        if window is not None:
            sizes |= {"window": window, "sinks": sinks}
        options = {"window": window, "sinks": sinks, "mixed": compute == "mixed"}

        def forward(options: Any = options) -> None:
            ops.attention_forward(q, k, v, **options)

        def both(options: Any = options) -> None:
            ops.attention_backward(do, q, k, v, **options)

        kind = "full" if window is None else f"window {window}+{sinks}"
        name, flops = f"H{heads}/{groups} T{steps} D{d} {kind}", 0.0
        flops += attention_flops(steps, heads, d, visible, backward=False)
        yield Case("attention", f"{name} forward {compute}", forward, flops, steps, sizes, compute)
        # the backward has its own forward: it needs the logsumexp of every row
        flops += attention_flops(steps, heads, d, visible, backward=True)
        name = f"{name} forward+backward {compute}"
        yield Case("attention", name, both, flops, steps, {**sizes, "backward": 1}, compute)
    yield from mixer_cases()


def mixer_cases() -> Iterator[Case]:
    """The hybrid mixer between projections: maps, mLSTM, window attention and output gate."""
    heads, d = 32, 128
    maps, gate = _random(heads, d, d), _random(heads, 3 * d)
    for steps, compute in itertools.product((4096, 32768), COMPUTE):
        cell = _Cell.random(heads, steps, d)

        def mixer(cell: _Cell = cell, mixed: bool = compute == "mixed") -> None:
            q, k, v, i, f = cell
            hm, _ = ops.mapped_mlstm_forward(
                q, k, v, i, f, maps, maps, scale=1.0, chunk=CHUNK, mixed=mixed
            )
            hs = ops.attention_forward(q, k, v, MIXER_WINDOW, SINKS, mixed=mixed)
            ops.mix_forward(hm, hs, ops.output_gate_forward(q, k, v, gate, gate[:, 0]))

        visible = visible_keys(steps, MIXER_WINDOW, SINKS)
        flops = 4.0 * steps * heads * d * d + 6.0 * steps * heads * d
        flops += mlstm_flops(steps, heads, d, CHUNK, backward=False)
        flops += attention_flops(steps, heads, d, visible, backward=False)
        sizes = {"heads": heads, "groups": heads, "steps": steps, "d": d, "mixer": 1}
        name = f"hybrid mixer H{heads} T{steps} D{d} {compute}"
        yield Case("attention", name, mixer, flops, steps, sizes, compute)


# ---- whole models -------------------------------------------------------------------------------


def random_model(mixer: MixerConfig, compute: Compute = "f32") -> Model:
    """A model of SmolLM2-135M's shape with random weights and nearly open forget gates."""
    layers = SMOLLM2_135M["num_hidden_layers"]
    model = Model(ModelConfig(**{**SMOLLM2_135M, "mixers": [mixer] * layers}), compute=compute)
    random = np.random.default_rng(0)
    for e in model.params.entries:
        if e.role == "norm":
            model.params[e.name] = np.ones(e.shape, np.float32)
        elif e.role == "map":
            model.params[e.name] = np.broadcast_to(np.eye(e.shape[-1], dtype=np.float32), e.shape)
        elif e.role == "gate":
            model.params[e.name] = np.zeros(e.shape, np.float32)
        elif e.role == "bias":
            start = 6 if e.name.endswith("f_proj.bias") else 0
            model.params[e.name] = np.full(e.shape, start, np.float32)
        else:
            model.params[e.name] = 0.02 * random.standard_normal(e.shape, dtype=np.float32)
    return model


def random_student(compute: Compute = "f32") -> Model:
    """The hybrid student of the quickstart."""
    return random_model(MixerConfig(mixer="hybrid", window=WINDOW, sinks=SINKS), compute)


def random_teacher(compute: Compute = "f32") -> Model:
    """Full attention in every layer."""
    return random_model(MixerConfig(mixer="attention", window=None, sinks=0), compute)


def random_ids(rows: int, steps: int) -> NDArray[np.int32]:
    """Token ids [rows, steps]."""
    vocab = SMOLLM2_135M["vocab_size"]
    return np.random.default_rng(1).integers(0, vocab, (rows, steps), dtype=np.int32)


def model_flops(
    config: ModelConfig,
    tokens: int,
    steps: int,
    *,
    past: int = 0,
    logits: int | None = None,
    backward: bool = False,
) -> float:
    """Products of reading `tokens` tokens in rows of `steps` behind `past` tokens, with logits for
    `logits` of them (None: all); with `backward`, those of a training step on them."""
    c, passes = config, (False, True) if backward else (False,)
    heads, d, matrix = c.num_attention_heads, c.head_dim, 6.0 if backward else 2.0
    projections = c.hidden_size * d * (2 * heads + 2 * c.num_key_value_heads)
    layer = matrix * tokens * (projections + 3 * c.hidden_size * c.intermediate_size)
    total = matrix * (tokens if logits is None else logits) * c.vocab_size * c.hidden_size
    for mixer in c.mixers:
        total += layer
        if mixer.mixer in ("attention", "window", "hybrid", "lolcats"):
            visible = visible_keys(steps, mixer.window, mixer.sinks, past)
            for back in passes:
                total += attention_flops(tokens, heads, d, visible, backward=back)
        if mixer.mixer in ("mlstm", "linear", "hybrid", "lolcats"):
            total += matrix * tokens * 2 * heads * d * d  # feature maps of q and k
            chunk = min(CHUNK, steps)
            for back in passes:
                total += mlstm_flops(tokens, heads, d, chunk, backward=back)
    return total


class TrainingStep:
    """A stage II step with cross-entropy alone, gradient clipping and AdamW on every parameter."""

    def __init__(self, model: Model, ids: NDArray[np.int32]) -> None:
        self.model, self.ids = model, ids
        self.labels = np.full_like(ids, -1)
        self.labels[:, :-1] = ids[:, 1:]
        self.grads = model.params.zeros_like()
        self.m, self.v = (np.zeros_like(model.params.flat) for _ in range(2))
        self.steps = 0

    def computing(self, compute: Compute) -> Callable[[], float]:
        """The step with the model's products computed so."""

        def run() -> float:
            self.model.compute = compute
            return self()

        return run

    def __call__(self) -> float:
        """Takes one step; returns the mean cross-entropy in nats."""
        self.grads.flat.fill(0)
        count = int((self.labels >= 0).sum())
        sums = self.model.loss_and_grad(
            self.ids, self.labels, ce_weight=1, kl_weight=0, grads=self.grads, scale=1 / count
        )
        self.steps += 1
        norm = ops.sumsq(self.grads.flat) ** 0.5
        ops.adamw_step(
            self.model.params.flat,
            self.grads.flat,
            self.m,
            self.v,
            lr=1e-6,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            step=self.steps,
            scale=min(1.0, 1.0 / max(norm, 1e-12)),
        )
        return sums["ce"] / count


def train_cases() -> Iterator[Case]:
    """Training steps of the student on 1 x 2,048 and 4 x 512 tokens."""
    model = random_student()
    for rows, steps in ((1, 2048), (4, 512)):
        flops = model_flops(model.config, rows * steps, steps, backward=True)
        step = TrainingStep(model, random_ids(rows, steps))
        for compute in COMPUTE:
            name, sizes = f"135M {rows}x{steps} step {compute}", {"rows": rows, "steps": steps}
            yield Case("train", name, step.computing(compute), flops, rows * steps, sizes, compute)
        del step  # its moments and gradients


# ---- inference ----------------------------------------------------------------------------------


def prefill_cases() -> Iterator[Case]:
    """Reading a prompt of 2,048 tokens into a state, with the last token's logits."""
    steps = 2048
    ids = random_ids(1, steps)
    for who, make in (("student", random_student), ("teacher", random_teacher)):
        for stored, compute in _STORED.items():
            model = make(stored)
            flops = model_flops(model.config, steps, steps, logits=1)

            def run(model: Model = model) -> None:
                model.prefill(ids)

            name = f"135M {who} {steps} {stored}"
            yield Case("prefill", name, run, flops, steps, {"steps": steps}, compute)


def remembering(model: Model, rows: int, context: int, room: int = 1) -> DecodeState:
    """A state that looks as if each row had read `context` tokens, with room for `room` more."""
    state = model.new_state(rows, context + room)
    random = np.random.default_rng(2)
    for e in state.tensors.entries:
        view = state.tensors.view(e)
        view[...] = 0 if e.name.endswith(".m") else np.abs(random.standard_normal(e.shape))
    state.lengths[:] = context
    return state


def state_bytes(config: ModelConfig, rows: int, context: int) -> float:
    """What a step of decoding reads of its state and writes back."""
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    total = 0.0
    for mixer in config.mixers:
        if mixer.mixer in ("attention", "window", "hybrid", "lolcats"):
            keys = visible_keys(1, mixer.window, mixer.sinks, context)
            total += 2 * 4 * groups * d * keys
        if mixer.mixer in ("mlstm", "linear", "hybrid", "lolcats"):
            total += 2 * 4 * heads * d * (d + 1)
    return rows * total


def decode_cases() -> Iterator[Case]:
    """A step of decoding with weights in bf16 and int8, behind short and long contexts."""
    kinds: tuple[tuple[Callable[[Compute], Model], Compute], ...] = (
        (random_student, "bf16"),
        (random_student, "int8"),
        (random_teacher, "bf16"),
    )
    for make, stored in kinds:
        model, who = make(stored), "teacher" if make is random_teacher else "student"
        for rows, context in ((1, CONTEXTS[0]), (1, CONTEXTS[1]), (64, CONTEXTS[0])):
            state, tokens = remembering(model, rows, context), random_ids(rows, 1)[:, 0]

            def run(
                model: Model = model, state: Any = state, tokens: Any = tokens, at: int = context
            ) -> None:
                state.lengths[:] = at
                model.step(tokens, state)

            flops = model_flops(model.config, rows, 1, past=context)
            need = model.params.raw.nbytes + state_bytes(model.config, rows, context)
            sizes = {"rows": rows, "context": context}
            name = f"135M {who} {rows} rows at {context} {stored}"
            yield Case("decode", name, run, flops, rows, sizes, _STORED[stored], need)
        if who == "student" and stored == "bf16":
            yield generation(model)


def generation(model: Model) -> Case:
    """Whole generations of one row, to be compared with the step: what Python adds."""
    prompt, count = [int(i) for i in random_ids(1, CONTEXTS[0])[0]], 64

    def run() -> None:
        model.generate_batch([prompt], count, temperature=0.0, stop_ids=())

    flops = count * model_flops(model.config, 1, 1, past=CONTEXTS[0])
    need = count * (model.params.raw.nbytes + state_bytes(model.config, 1, CONTEXTS[0]))
    sizes = {"rows": 1, "context": CONTEXTS[0], "count": count}
    name = f"135M student generates {count} bf16"
    return Case("decode", name, run, flops, count, sizes, "mixed", need)


def context_cases() -> Iterator[Case]:
    """What a token costs at the end of contexts from 1K to 64K: reading the last CHART_STEPS of
    them, and generating one more; weights in bf16. `sizes` has the memory of the state."""
    for who, make in (("student", random_student), ("teacher", random_teacher)):
        model = make("bf16")
        for context, steps in itertools.product(CHART_CONTEXTS, (CHART_STEPS, 1)):
            past = context - steps
            state, ids = remembering(model, 1, past, steps), random_ids(1, steps)

            def run(
                model: Model = model, state: Any = state, ids: Any = ids, past: int = past
            ) -> None:
                state.lengths[:] = past
                model.prefill(ids, state)

            flops = model_flops(model.config, steps, steps, past=past, logits=1)
            need = model.params.raw.nbytes + state_bytes(model.config, 1, past)
            sizes = {"context": context, "steps": steps, "state_bytes": state.nbytes}
            name = f"135M {who} {'reads' if steps > 1 else 'writes'} at {context} bf16"
            limit = need if steps == 1 else 0
            yield Case("context", name, run, flops, steps, sizes, "mixed", limit)


def merge_cases() -> Iterator[Case]:
    """The linear merge of two experts of 135M parameters."""
    n = random_student().params.flat.size
    experts, out = [_random(n), _random(n) + 1], np.empty(n, np.float32)

    def run() -> None:
        ops.merge_linear(experts, [0.5, 0.5], out)

    yield Case("merge", "135M of 2 experts", run, 3.0 * n, 0, {"n": n}, "f32", 12.0 * n)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "gemm": gemm_cases,
    "mlstm": mlstm_cases,
    "attention": attention_cases,
    "train": train_cases,
    "prefill": prefill_cases,
    "decode": decode_cases,
    "context": context_cases,
    "merge": merge_cases,
}
