"""What other libraries do for the cases of `xlstm_distill.bench`: functions of a case.

torch gets as many threads as the core has, float32 or, where the case is "mixed", bf16, and inputs
of the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xlstm_distill import runtime
from xlstm_distill.bench import SMOLLM2_135M, Case

Run = Callable[[], Any]


def use_threads() -> None:
    """Gives torch the core's number of threads."""
    torch.set_num_threads(runtime.threads())


def gemm(case: Case) -> dict[str, Run]:
    """torch.mm into a given output; for "mixed" all three are bf16, so half the memory of ours."""
    s, dtype = case.sizes, torch.bfloat16 if case.compute == "mixed" else torch.float32
    a, b = torch.randn(s["m"], s["k"]).to(dtype), torch.randn(s["n"], s["k"]).to(dtype)
    c = torch.empty(s["m"], s["n"], dtype=dtype)
    return {"torch": lambda: torch.mm(a, b.T, out=c)}


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
    backward = case.name.endswith("backward")
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
    """torch's scaled_dot_product_attention: causal, or with a mask where there is a window."""
    s = case.sizes
    heads, groups, steps = s["heads"], s["groups"], s["steps"]
    backward = case.name.endswith("backward")
    q = torch.randn(1, heads, steps, s["d"])
    k, v = (torch.randn(1, groups, steps, s["d"]) for _ in range(2))
    do = torch.randn_like(q)
    mask = None
    if "window" in s:
        t = torch.arange(steps)
        behind = t[:, None] - t[None, :]
        mask = (behind >= 0) & ((behind < s["window"]) | (t[None, :] < s["sinks"]))

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )

    def run() -> None:
        if not backward:
            with torch.no_grad():
                sdpa(q, k, v)
            return
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        sdpa(*leaves).backward(do)

    return {"torch sdpa": run}


def train(case: Case) -> dict[str, Run]:
    """transformers' Llama of the same shape with random weights: forward, backward, AdamW; for
    "mixed" under autocast, which keeps float32 weights as we do."""
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
    model = LlamaForCausalLM(config)
    ids = torch.randint(SMOLLM2_135M["vocab_size"], (case.sizes["rows"], case.sizes["steps"]))
    return {"transformers + torch": training_step(model, ids, autocast=case.compute == "mixed")}


def training_step(model: Any, ids: torch.Tensor, autocast: bool = False) -> Run:
    """The step of `xlstm_distill.bench.TrainingStep`: cross-entropy, clipping, AdamW.

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
}
