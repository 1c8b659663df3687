"""`Model`: a teacher or a student, its parameters, and every call into the core's model layer.

A teacher is a model whose layers all mix by their pretrained attention; a student differs in
`config.mixers` alone. Arrays of token ids are int32 [B, T]; rows may have their own `lengths`
(right padded).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import checkpoints
from .config import MixerConfig, ModelConfig
from .errors import UserError
from .families import FAMILIES
from .ops.arrays import FEATURE_MAPS
from .parameters import Parameters, aligned_bytes, digest_of
from .rows import IntArray, checked_ids, checked_lengths, checked_reset, next_tokens, positions
from .runtime import core
from .scoring import Scorer
from .state import DecodeState, state_capacity
from .tokenizer import Tokenizer

FloatArray = NDArray[np.float32]
Compute = Literal["f32", "mixed", "bf16", "int8"]
_COMPUTE: tuple[Compute, ...] = ("f32", "mixed", "bf16", "int8")
_TRAINS = ("f32", "mixed")
KlForm = Literal["renormalised", "tail", "sampled"]

Work = Literal["forward", "train", "recompute", "align", "head"]
"""What a workspace is for; numbered as the core numbers them."""

_KINDS = {"attention": 0, "window": 1, "linear": 2, "mlstm": 3, "hybrid": 4, "lolcats": 5}
_KL_FORMS = {"renormalised": 0, "tail": 1, "sampled": 2}
_FORWARD, _TRAIN, _TRAIN_RECOMPUTING, _ALIGN, _HEAD = range(5)
_TOKENS_AT_ONCE = 8192
"""Most tokens of one call into the core; bounds the activations of an inference call."""
_PREFILL_STEP = 2048
"""Steps of a long prefill that are taken at once."""
_OWN_GATE = -1.0
_TAPS = ("o", "f", "q", "k")


def _mixer_row(m: MixerConfig) -> list[int]:
    window = 0 if m.window is None else m.window
    switches = [m.gate == "fixed", m.normalizer == "max", FEATURE_MAPS.index(m.feature_map)]
    return [_KINDS[m.mixer], window, m.sinks, *switches]


def _capsule(core: Any, c: ModelConfig, compute: Compute) -> Any:
    """The core's form of a configuration."""
    family = FAMILIES[c.family]
    sizes = [
        c.hidden_size,
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.intermediate_size,
        c.vocab_size,
        c.tie_word_embeddings,
        c.attention_bias,
        _COMPUTE.index(compute),
        family.post_norm,
        family.qk_norm,
    ]
    scaled = [c.scales_rope(layer) for layer in range(c.num_hidden_layers)]
    ropes = sorted(set(scaled))  # layers that scale RoPE and layers that do not, where there are
    mixers = [
        [*_mixer_row(mixer), window or 0, ropes.index(scales)]
        for mixer, window, scales in zip(c.mixers, c.windows, scaled, strict=True)
    ]
    return core.config_new(
        np.array(sizes, dtype=np.int32),
        c.rms_norm_eps,
        np.array([c.inv_freq(scales) for scales in ropes]),
        np.array([c.attention_factor if scales else 1.0 for scales in ropes]),
        np.array(mixers, dtype=np.int32),
    )


class Model:
    """Parameters and configuration, ready to run. Made by `load`, `linearize`, `from_tensors`.

    `params` holds everything in one flat buffer. `compute` is one of

    - "f32": weights and products in float32;
    - "mixed": float32 weights, but the operands of their products are rounded to bf16 where the
      processor has instructions for it (elsewhere as "f32"), and so are those inside attention, the
      mLSTM and feature maps; sums, states, norms, softmax, gates, gradients and moments stay
      float32. Trains at up to twice the speed and more;
    - "bf16": matrices also stored as bf16, half the memory; for inference;
    - "int8": matrices stored as signed bytes and a scale for each row, a quarter of the memory;
      for inference. What they meet in a product is rounded to bytes too, a scale a row, both
      rotated first so that single large entries do not set the step; sums are exact. The rest as
      "mixed".

    It can be set to the other of "f32" and "mixed" at any time. dtype float64 exists for gradient
    checks.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        *,
        compute: Compute = "f32",
        dtype: DTypeLike = np.float32,
        provenance: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.dtype = np.dtype(dtype)
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.source = source
        self.core = core(self.dtype)
        self._configure(compute)
        plan, size = self.core.plan_list(self.capsule, 0, 0)
        self.params = Parameters(plan, size, self.dtype)
        self._work = aligned_bytes(0)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        names = ("config", "tokenizer", "compute", "dtype", "provenance", "source", "params")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, given: dict[str, Any]) -> None:
        params = given.pop("params")
        self.__init__(**given)  # type: ignore[misc]  # core, its configuration and lock are new
        self.params = params

    def _configure(self, compute: Compute) -> None:
        if compute not in _COMPUTE:
            raise UserError(f"compute {compute!r} is not known: {', '.join(_COMPUTE)}")
        self.capsule = _capsule(self.core, self.config, compute)
        self._compute = compute

    @property
    def compute(self) -> Compute:
        """How products are computed; see the class."""
        return self._compute

    @compute.setter
    def compute(self, compute: Compute) -> None:
        if compute != self._compute and not {compute, self._compute} <= set(_TRAINS):
            raise UserError(
                f"compute cannot be set from {self._compute} to {compute}: the weights are stored "
                "in another form; use copy(compute=...)"
            )
        self._configure(compute)

    # ---- making and saving --------------------------------------------------------------------

    def fill(self, tensors: Mapping[str, NDArray[Any]]) -> Model:
        """Set every parameter from `tensors`; a missing or an unused tensor is an error."""
        names = set(self.params.names())
        if missing := names - set(tensors):
            raise UserError(f"{self.source or 'checkpoint'}: tensor {min(missing)} is missing")
        if extra := set(tensors) - names:
            raise UserError(f"{self.source or 'checkpoint'}: tensor {min(extra)} is not known")
        for name in self.params.names():
            value = tensors[name]
            expected = self.params.entries[self.params.names().index(name)].shape
            if value.shape != expected:
                raise UserError(
                    f"{self.source or 'checkpoint'}: tensor {name} has shape {value.shape}, "
                    f"expected {expected}"
                )
            self.params[name] = value
        return self

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All parameters by name (views, or float32 copies of bf16 and int8)."""
        return {name: self.params[name] for name in self.params.names()}

    def copy(self, *, compute: Compute | None = None, dtype: DTypeLike | None = None) -> Model:
        """A deep copy, possibly in another compute mode."""
        other = Model(
            self.config,
            self.tokenizer,
            compute=compute or self.compute,
            dtype=self.dtype if dtype is None else dtype,
            provenance=self.provenance,
            source=self.source,
        )
        if (other.compute, other.dtype) == (self.compute, self.dtype):
            other.params.raw[:] = self.params.raw  # int8 rounded once more could differ in a bit
            return other
        return other.fill(self.tensors())

    def fingerprint(self) -> str:
        """sha256 over configuration and parameters."""
        return _fingerprint(self.config, self.params.digest())

    def save(self, directory: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write a Hugging Face layout directory (atomic: a reader sees the old or the new one)."""
        if self.tokenizer is None:
            raise UserError(f"{directory}: a model without a tokenizer cannot be saved")
        checkpoints.save(
            directory,
            config=self.config,
            tensors=self.tensors(),
            tokenizer=self.tokenizer,
            provenance={**self.provenance, **(provenance or {})},
        )

    # ---- calls into the core ------------------------------------------------------------------

    def _workspace(self, need: int) -> NDArray[np.uint8]:
        if need > self._work.nbytes:
            self._work = aligned_bytes(0)  # free the old one first
            self._work = aligned_bytes(need)
        return self._work

    def _need(self, what: int, rows: int, steps: int, k: int = 0, capacity: int = 0) -> int:
        return int(self.core.work_bytes(what, self.capsule, rows, steps, k, capacity))

    def _ids(self, ids: ArrayLike) -> IntArray:
        return checked_ids(ids, self.config.vocab_size)

    @staticmethod
    def _gate(gate: float | None) -> float:
        if gate is not None and not 0 <= gate <= 1:
            raise ValueError(f"gate is {gate}, expected 0 to 1")
        return _OWN_GATE if gate is None else float(gate)

    def _forward(
        self,
        ids: IntArray,
        *,
        gate: float | None = None,
        reset: NDArray[np.bool_] | None = None,
        lengths: IntArray | None = None,
        state: DecodeState | None = None,
        taps: Mapping[str, NDArray[Any]] | None = None,
    ) -> NDArray[Any]:
        """One call of the core: hidden states after the last norm, [B, T, d]. Advances `state`,
        fills `taps` (`taps`)."""
        rows, steps = ids.shape
        hidden = np.empty((rows, steps, self.config.hidden_size), dtype=self.dtype)
        if hidden.size == 0:
            return hidden
        capacity = 0 if state is None else state.capacity
        past = None if state is None else state.lengths
        pos = positions(ids, reset, past)
        with self._lock:
            work = self._workspace(self._need(_FORWARD, rows, steps, capacity=capacity))
            self.core.model_forward(
                self.capsule,
                self.params.raw,
                ids,
                pos,
                reset,
                lengths,
                past,
                None if state is None else state.tensors.raw,
                capacity,
                self._gate(gate),
                hidden,
                *(None if taps is None else taps.get(name) for name in _TAPS),
                work,
            )
        if state is not None:
            valid = np.full(rows, steps, dtype=np.int32) if lengths is None else lengths
            last = pos[np.arange(rows), np.maximum(valid - 1, 0)] + 1
            state.lengths[:] = np.where(valid > 0, last, state.lengths)
        return hidden

    def _groups(self, ids: IntArray) -> Iterable[slice]:
        """Slices of rows of at most _TOKENS_AT_ONCE tokens."""
        step = max(1, _TOKENS_AT_ONCE // max(1, ids.shape[1]))
        return (slice(i, i + step) for i in range(0, max(1, len(ids)), step))

    def hidden(
        self,
        ids: ArrayLike,
        gate: float | None = None,
        reset: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """Hidden states after the last norm, [B, T, d]."""
        tokens = self._ids(ids)
        r, n = checked_reset(reset, tokens), checked_lengths(lengths, tokens)
        parts = [
            self._forward(
                tokens[s],
                gate=gate,
                reset=None if r is None else r[s],
                lengths=None if n is None else n[s],
            )
            for s in self._groups(tokens)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def head_logits(self, hidden: NDArray[Any]) -> NDArray[Any]:
        """Logits [N, V] of hidden states after the last norm, [N, d]."""
        out = np.empty((len(hidden), self.config.vocab_size), dtype=self.dtype)
        self.core.model_logits(self.capsule, self.params.raw, np.ascontiguousarray(hidden), out)
        return out

    def _nll(self, hidden: NDArray[Any], labels: IntArray) -> NDArray[Any]:
        """-log p(label), 0 where the label is -1; hidden [..., d], labels [...]."""
        flat = np.ascontiguousarray(hidden).reshape(-1, self.config.hidden_size)
        wanted = np.ascontiguousarray(labels, dtype=np.int32).reshape(-1)
        out = np.zeros(len(flat), dtype=self.dtype)
        with self._lock:
            work = self._workspace(self._need(_HEAD, 1, len(flat)))
            self.core.model_score(self.capsule, self.params.raw, flat, wanted, out, work)
        return out.reshape(labels.shape)

    # ---- inference ----------------------------------------------------------------------------

    def logits(
        self,
        ids: ArrayLike,
        gate: float | None = None,
        reset: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """Logits [B, T, V].

        ids: int [B, T] (or [T]); gate: 0.0 forces every output gate to attention, 1.0 to the mLSTM;
        reset: bool [B, T], a document starts here; lengths: int [B], valid steps of each row.
        Raises UserError for a token id outside the vocabulary.
        """
        hidden = self.hidden(ids, gate, reset, lengths)
        flat = hidden.reshape(-1, self.config.hidden_size)
        return self.head_logits(flat).reshape(*hidden.shape[:2], self.config.vocab_size)

    def score(
        self,
        ids: ArrayLike,
        reset: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """log p(ids[:, t+1] | ids[:, :t+1]), [B, T-1]; 0 behind a row's length.

        Logits exist for a block of rows at a time only.
        """
        tokens = self._ids(ids)
        labels = next_tokens(tokens, checked_lengths(lengths, tokens))
        return -self._nll(self.hidden(tokens, None, reset, lengths), labels)[:, :-1]

    def new_state(self, rows: int, tokens: int = 0) -> DecodeState:
        """An empty state for `rows` rows, with room for `tokens` tokens (it grows by itself)."""
        return DecodeState(self, rows, state_capacity(self.config, tokens))

    def _extend(
        self, tokens: IntArray, state: DecodeState, lengths: IntArray | None
    ) -> tuple[NDArray[Any], DecodeState]:
        """Hidden states of a segment after `state`; long segments are taken in steps."""
        state.check(self)
        if state.rows != len(tokens):
            raise ValueError(f"the state has {state.rows} rows, ids have {len(tokens)}")
        state = state.grown(self, int(state.lengths.max(initial=0)) + tokens.shape[1])
        parts = []
        for t in range(0, max(1, tokens.shape[1]), _PREFILL_STEP):
            piece = np.ascontiguousarray(tokens[:, t : t + _PREFILL_STEP])
            n = None if lengths is None else np.clip(lengths - t, 0, piece.shape[1])
            n = None if n is None else n.astype(np.int32)
            parts.append(self._forward(piece, lengths=n, state=state))
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)), state

    def hidden_after(
        self, ids: ArrayLike, state: DecodeState, lengths: ArrayLike | None = None
    ) -> tuple[NDArray[Any], DecodeState]:
        """Hidden states after the last norm, [B, T, d], of a segment behind `state`, and the state
        behind it (`state` advanced in place, or a larger one)."""
        tokens = self._ids(ids)
        return self._extend(tokens, state, checked_lengths(lengths, tokens))

    def prefill(
        self, ids: ArrayLike, state: DecodeState | None = None, lengths: ArrayLike | None = None
    ) -> tuple[NDArray[Any], DecodeState]:
        """Read a prompt: (logits [B, V] after each row's last token, state).

        `state` continues earlier tokens (it is advanced in place or replaced by a larger one).
        """
        tokens = self._ids(ids)
        n = checked_lengths(lengths, tokens)
        state = self.new_state(len(tokens), tokens.shape[1]) if state is None else state
        if tokens.shape[1] == 0 or (n is not None and (n == 0).any()):
            raise ValueError("every row of a prefill needs at least one token")
        hidden, state = self._extend(tokens, state, n)
        last = np.full(len(tokens), tokens.shape[1]) if n is None else n
        return self.head_logits(hidden[np.arange(len(tokens)), last - 1]), state

    def step(self, tokens: ArrayLike, state: DecodeState) -> tuple[NDArray[Any], DecodeState]:
        """One token a row: int [B] -> (logits [B, V], state)."""
        return self.prefill(np.asarray(tokens).reshape(-1, 1), state)

    def fork(self, state: DecodeState, rows: Sequence[int]) -> DecodeState:
        """Rows of a state, gathered into a new one; repeats share a prefix."""
        return state.fork(self, rows)

    def score_continuations(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[NDArray[Any]]:
        """Log-probability of every token of each continuation after one context, which is read
        once (`scorer`)."""
        return self.scorer()([(context, continuations)])[0]

    def scorer(self, prefix: Sequence[int] = (), greedy: bool = False) -> Scorer:
        """Scores continuations of many contexts (scoring.py); `prefix`: what most begin with."""
        return Scorer(self, prefix, greedy)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        on_tokens: Callable[[int], None] | None = None,
        ends: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Continue ragged prompts together (generate.py); new tokens only, no stop tokens."""
        from .generate import generate_batch

        return generate_batch(
            self, prompts, max_new_tokens, temperature, top_p, seed, stop_ids, on_tokens, ends
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """Continue one prompt; returns the new text. temperature 0 is greedy."""
        from .generate import generate

        return generate(self, prompt, max_new_tokens, temperature, top_p, seed, stream)

    # ---- measuring ----------------------------------------------------------------------------

    def topk(
        self, ids: ArrayLike, k: int, reset: ArrayLike | None = None, last: int | None = None
    ) -> tuple[IntArray, NDArray[Any], NDArray[Any]]:
        """The k most probable next tokens of every position, or of the `last` so many: ids
        [B, T, k] (best first, ties to the lower id), their log-probabilities under the full
        softmax, and their summed mass [B, T]."""
        hidden = self.hidden(ids, None, reset)
        if last is not None:
            hidden = hidden[:, hidden.shape[1] - last :]
        tid, logp, mass = self._topk(hidden.reshape(-1, hidden.shape[-1]), k)
        shape = hidden.shape[:2]
        return tid.reshape(*shape, k), logp.reshape(*shape, k), mass.reshape(shape)

    def log_likelihoods(self, hidden: NDArray[Any], labels: ArrayLike) -> NDArray[Any]:
        """log p of the tokens `labels` [N] that follow hidden states [N, d], [N]."""
        return -self._nll(hidden, np.asarray(labels, dtype=np.int32))

    def score_hidden(
        self, hidden: NDArray[Any], labels: IntArray, k: int
    ) -> tuple[NDArray[Any], IntArray, NDArray[Any]]:
        """log p of the tokens `labels` [N] that follow hidden states [N, d] and, as `topk`, the k
        most probable ones in their places: log p [N], ids [N, k], their log p [N, k]."""
        tid, logp, _ = self._topk(np.ascontiguousarray(hidden), k)
        return -self._nll(hidden, labels), tid, logp

    def _topk(self, flat: NDArray[Any], k: int) -> tuple[IntArray, NDArray[Any], NDArray[Any]]:
        """`topk` of hidden states [N, d]."""
        tid = np.empty((len(flat), k), dtype=np.int32)
        logp, mass = np.empty((len(flat), k), self.dtype), np.empty(len(flat), self.dtype)
        with self._lock:
            work = self._workspace(self._need(_HEAD, 1, len(flat), k))
            self.core.model_topk(self.capsule, self.params.raw, flat, tid, logp, mass, work)
        return tid, logp, mass

    def draws(
        self, ids: ArrayLike, uniform: NDArray[np.float64], reset: ArrayLike | None = None
    ) -> tuple[IntArray, IntArray]:
        """Draws from the next tokens of the last T positions: those that were drawn, ids [B, T, k]
        by rising id, and how often each was, counts [B, T, k] (0 behind the last one). uniform
        [B, T, k] in [0, 1), rising in the last axis, decides them (ops.head_draws)."""
        hidden = self.hidden(ids, None, reset)
        hidden = hidden[:, hidden.shape[1] - uniform.shape[1] :]
        flat, u = hidden.reshape(-1, hidden.shape[-1]), uniform.reshape(-1, uniform.shape[-1])
        tid, counts = np.empty(u.shape, dtype=np.int32), np.empty(u.shape, dtype=np.int32)
        with self._lock:
            work = self._workspace(self._need(_HEAD, 1, *u.shape))
            self.core.model_draws(self.capsule, self.params.raw, flat, u, tid, counts, work)
        return tid.reshape(uniform.shape), counts.reshape(uniform.shape)

    def divergence(
        self, students: Sequence[Model], ids: ArrayLike, reset: ArrayLike | None = None
    ) -> dict[str, NDArray[Any]]:
        """How far `students` are from this model, their teacher, at every position of ids [B, T].

        Returns kl = KL(self || student) over the whole vocabulary, agree (1 where the most probable
        tokens are the same) and nll of the next token, each [students, B, T], and teacher_nll
        [B, T] (nll 0 at the last position). Raises ValueError for a student of another width.
        """
        tokens = self._ids(ids)
        labels = next_tokens(tokens, None).reshape(-1)
        d, n = self.config.hidden_size, tokens.size
        mine = self.hidden(tokens, None, reset).reshape(n, d)
        hidden = [s.hidden(tokens, None, reset) for s in students]
        theirs = [
            (s.capsule, s.params.raw, h.reshape(n, h.shape[-1]))
            for s, h in zip(students, hidden, strict=True)
        ]
        names = ("kl", "agree", "nll")
        out = {name: np.zeros((len(theirs), n), dtype=self.dtype) for name in names}
        out["teacher_nll"] = np.zeros(n, dtype=self.dtype)
        with self._lock:
            work = self._workspace(self._need(_HEAD, 1, n))
            self.core.model_divergence(
                self.capsule, self.params.raw, mine, theirs, labels, *out.values(), work
            )
        if not theirs:
            out["teacher_nll"] = self._nll(mine, labels)
        return {
            name: value.reshape(*value.shape[:-1], *tokens.shape) for name, value in out.items()
        }

    def taps(
        self, names: Iterable[str], ids: ArrayLike, reset: ArrayLike | None = None
    ) -> dict[str, NDArray[Any]]:
        """What the mixers compute of int ids [B, T]: of the names "o" and "f" the gates before the
        sigmoid, [L, B, T, H], of "q" and "k" queries and keys after RoPE, [L, B, T, H or G, D]. NaN
        in layers without such a gate; f is infinite where nothing is forgotten."""
        tokens, c = self._ids(ids), self.config
        rows = (c.num_hidden_layers, *tokens.shape)
        shapes = {
            "o": (*rows, c.num_attention_heads),
            "f": (*rows, c.num_attention_heads),
            "q": (*rows, c.num_attention_heads, c.head_dim),
            "k": (*rows, c.num_key_value_heads, c.head_dim),
        }
        found = {name: np.empty(shapes[name], dtype=self.dtype) for name in names}
        self._forward(tokens, reset=checked_reset(reset, tokens), taps=found)
        return found

    def gate_values(self, ids: ArrayLike, reset: ArrayLike | None = None) -> NDArray[Any]:
        """Output gates o_t in (0, 1), [L, H, B*T]; NaN in layers without one."""
        pre = self.taps(["o"], ids, reset)["o"]
        with np.errstate(over="ignore"):
            o = 1 / (1 + np.exp(-pre))
        return np.moveaxis(o, 3, 1).reshape(pre.shape[0], pre.shape[3], -1)

    # ---- training -----------------------------------------------------------------------------

    def loss_and_grad(
        self,
        ids: ArrayLike,
        labels: ArrayLike,
        targets: tuple[IntArray, NDArray[Any]] | None = None,
        *,
        ce_weight: float,
        kl_weight: float,
        kl_form: KlForm = "renormalised",
        reset: ArrayLike | None = None,
        grads: Parameters | None = None,
        trainable: set[str] | None = None,
        scale: float = 1.0,
        recompute: bool = False,
        gate: float | None = None,
        state: DecodeState | None = None,
        state_behind: DecodeState | None = None,
    ) -> dict[str, float]:
        """Stage II loss of a batch (paper.md (13)): sums {"ce", "kl", "tokens"} over counted rows.

        labels int [B, T]: the next token, -1 where a position counts nothing. targets: token ids
        int32 [B, T, k] and teacher log-probabilities [B, T, k]. With `grads`, the gradient of
        scale * (ce_weight * ce + kl_weight * kl) is added for the parameters named in `trainable`
        (None: all). recompute: hold one block's activations at a time and make them again on the
        way back: the same bits, about a quarter more time, and memory that hardly grows with depth.
        gate: forces every output gate as `logits` does; such a gate has no gradient.
        state: the rows go on from it, documents and their positions too, but no gradient flows into
        it (truncated backpropagation through time); state_behind, another one as large, is set to
        the state behind them.
        """
        tokens = self._ids(ids)
        r = checked_reset(reset, tokens)
        past = None if state is None else state.lengths
        capacity = 0 if state is None else state.capacity
        self._check_states(tokens, state, state_behind)
        pos = positions(tokens, r, past)
        wanted = np.ascontiguousarray(labels, dtype=np.int32)
        tid = tlogp = None
        if targets is not None:
            tid = np.ascontiguousarray(targets[0], dtype=np.int32)
            tlogp = np.ascontiguousarray(targets[1], dtype=self.dtype)
        weights = np.array([ce_weight, kl_weight, scale], dtype=np.float64)
        sums = np.zeros(3)
        k = 0 if tid is None else tid.shape[-1]
        rows, steps = tokens.shape
        recompute = recompute or grads is None  # the loss alone needs no activations
        what = _TRAIN_RECOMPUTING if recompute else _TRAIN
        with self._lock:
            work = self._workspace(self._need(what, rows, steps, k, capacity))
            self.core.model_train(
                self.capsule,
                self.params.raw,
                tokens,
                pos,
                r,
                None,
                past,
                None if state is None else state.tensors.raw,
                None if state_behind is None else state_behind.tensors.raw,
                capacity,
                None if grads is None else grads.raw,
                self.params.flags(trainable),
                wanted,
                tid,
                tlogp,
                weights,
                _KL_FORMS[kl_form],
                recompute,
                self._gate(gate),
                sums,
                work,
            )
        if state_behind is not None:
            state_behind.lengths[:] = pos[:, -1] + 1
        return {"ce": float(sums[0]), "kl": float(sums[1]), "tokens": float(sums[2])}

    def _check_states(
        self, tokens: IntArray, state: DecodeState | None, behind: DecodeState | None
    ) -> None:
        """ValueError unless there are two different states with room for `tokens`, or none."""
        if state is None and behind is None:
            return
        if state is None or behind is None or state is behind:
            raise ValueError("state and state_behind must be two states, or both None")
        seen = int(state.lengths.max(initial=0)) + tokens.shape[1]
        for given in (state, behind):
            given.check(self)
            if given.rows != len(tokens):
                raise ValueError(f"the state has {given.rows} rows, ids have {len(tokens)}")
            room = given.capacity
            if room != state.capacity or state_capacity(self.config, seen) > room:
                raise ValueError(
                    f"the states have room for {state.capacity} and {behind.capacity} tokens, "
                    f"expected the same and {seen} or more (DecodeState.grown)"
                )

    def align_and_grad(
        self,
        ids: ArrayLike,
        reset: ArrayLike | None = None,
        grads: Parameters | None = None,
        trainable: set[str] | None = None,
        scale: float = 1.0,
        layers: Collection[int] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Stage I of a batch (paper.md (12)): per layer, sum ||h - h_T||^2 and sum ||h_T||^2, [L]
        each, and the number of tokens. Each layer's mixer gets the teacher's own layer input; the
        gradient of scale * (sum of the first) is added into the mixers' parameters in `grads`.
        Other layers than `layers` (None: all) are not compared and have sums of 0; what lies behind
        the last compared layer is not computed.

        The weights that the student shares with its teacher must still be the teacher's."""
        return self._align(self._ids(ids), reset, grads, trainable, scale, layers)

    def align_hidden(
        self,
        hidden: NDArray[Any],
        reset: ArrayLike | None = None,
        grads: Parameters | None = None,
        trainable: set[str] | None = None,
        scale: float = 1.0,
        layers: Collection[int] | None = None,
        out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """`align_and_grad` for what enters the first layer, `hidden` [B, T, d] of the model's
        dtype, in place of token ids. `out` [B, T, d] is set to what the teacher's last layer puts
        out: with models of one layer each, a teacher can be gone through without holding it."""
        tokens = np.zeros(hidden.shape[:2], dtype=np.int32)  # never looked at
        return self._align(tokens, reset, grads, trainable, scale, layers, hidden, out)

    def _align(
        self,
        tokens: IntArray,
        reset: ArrayLike | None,
        grads: Parameters | None,
        trainable: set[str] | None,
        scale: float,
        layers: Collection[int] | None,
        hidden: NDArray[Any] | None = None,
        out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        r = checked_reset(reset, tokens)
        count = self.config.num_hidden_layers
        sums = np.zeros((count, 2))
        flags = None if layers is None else np.isin(np.arange(count), list(layers)).view(np.uint8)
        with self._lock:
            work = self._workspace(self._need(_ALIGN, *tokens.shape))
            self.core.model_align(
                self.capsule,
                self.params.raw,
                tokens,
                positions(tokens, r, None),
                r,
                None,
                None if grads is None else grads.raw,
                self.params.flags(trainable),
                hidden,
                out,
                flags,
                scale,
                sums,
                work,
            )
        return sums[:, 0], sums[:, 1], tokens.size


def state_nbytes(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """Memory in bytes of a state (`Model.new_state`) in float32, known without a model."""
    real = core(np.dtype(np.float32))
    capsule = _capsule(real, config, "f32")
    _, size = real.plan_list(capsule, rows, state_capacity(config, tokens))
    return int(size)


def work_nbytes(config: ModelConfig, work: Work, rows: int, steps: int, k: int = 0) -> int:
    """Memory in bytes in which a model of float32 works on `rows` rows of `steps` tokens, with `k`
    targets of each, known without a model. Forward, train (recompute: with activations made again),
    align; head: what becomes of hidden states."""
    real = core(np.dtype(np.float32))
    what = get_args(Work).index(work)
    return int(real.work_bytes(what, _capsule(real, config, "f32"), rows, steps, k, 0))


def _fingerprint(config: ModelConfig, digest: str) -> str:
    return hashlib.sha256((config.model_dump_json() + digest).encode()).hexdigest()


def fingerprint_of(checkpoint: checkpoints.Checkpoint) -> str:
    """`Model.fingerprint` of a model that is read tensor by tensor, not held (float32)."""
    real = core(np.dtype(np.float32))
    plan, _ = real.plan_list(_capsule(real, checkpoint.config, "f32"), 0, 0)
    return _fingerprint(checkpoint.config, digest_of(checkpoint.tensors, [e[0] for e in plan]))


def from_checkpoint(checkpoint: checkpoints.Checkpoint, compute: Compute = "f32") -> Model:
    """A model from a loaded checkpoint; every tensor is consumed, every parameter filled."""
    model = Model(
        checkpoint.config,
        checkpoint.tokenizer,
        compute=compute,
        provenance=checkpoint.provenance,
        source=checkpoint.source,
    )
    return model.fill(checkpoint.tensors)


def load(name_or_path: str | Path, compute: Compute = "f32") -> Model:
    """Load a model directory, a `.gguf` file, or a fetched name such as "smollm2-135m-instruct".

    Raises UserError with one line that names the file or tensor if anything does not fit.
    """
    return from_checkpoint(checkpoints.load(name_or_path), compute)
