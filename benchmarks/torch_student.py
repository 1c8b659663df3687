"""The hybrid student in plain torch: what a good afternoon's work without this package gives.

Chunkwise mLSTM (a loop over chunk states, everything inside chunks batched), window + sink
attention by a mask, no kernels of its own; autograd makes the gradients. Weights come from one of
our models, whose logits and gradients it reproduces (tests/test_bench.py). A block is a function of
its weights, so that torch.compile compiles one for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.model import Model

FLOOR = 1e-6  # of a feature map: csrc/ops/feature_map.c


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [B, H, T, D], halves side by side."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, chunk: int) -> Tensor:
    """h [B, H, T, D] of positive q, k, normalised by q.n; T is a multiple of the chunk."""
    shape, count = q.shape, q.shape[2] // chunk
    q, k, v = (x.unflatten(2, (count, chunk)) for x in (q, k, v))
    i = i.unflatten(2, (count, chunk))
    b = nn.functional.logsigmoid(f).unflatten(2, (count, chunk)).cumsum(-1)
    total = b[..., -1]
    write = total[..., None] - b + i  # exponent of each step in the state behind its chunk
    top = write.amax(-1)
    update = (k * (write - top[..., None]).exp()[..., None]).transpose(-1, -2)
    c_new, n_new = update @ v, update.sum(-1)
    c, n = torch.zeros_like(c_new[:, :, 0]), torch.zeros_like(n_new[:, :, 0])
    m = torch.full_like(top[:, :, 0], -1e30)
    states = []
    for j in range(count):
        states.append((c, n, m))
        after = torch.maximum(m + total[:, :, j], top[:, :, j])
        keep = (m + total[:, :, j] - after).exp()
        add = (top[:, :, j] - after).exp()
        c = keep[..., None, None] * c + add[..., None, None] * c_new[:, :, j]
        n = keep[..., None] * n + add[..., None] * n_new[:, :, j]
        m = after
    c, n, m = (torch.stack(parts, dim=2) for parts in zip(*states, strict=True))
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (b[..., :, None] - b[..., None, :] + i[..., None, :]).masked_fill(~causal, -torch.inf)
    carry = b + m[..., None]
    scale = torch.maximum(decay.amax(-1), carry)
    scores = (q @ k.transpose(-1, -2)) * (decay - scale[..., None]).exp()
    carried = q * (carry - scale).exp()[..., None]
    above = scores @ v + carried @ c
    below = scores.sum(-1) + (carried @ n[..., None])[..., 0]
    return (above / below[..., None]).reshape(shape)


class TorchStudent(nn.Module):
    """A hybrid student; `forward(input_ids, labels)` is called like a transformers model."""

    def __init__(self, model: Model, steps: int, chunk: int = 64) -> None:
        super().__init__()
        c = self.config = model.config
        self.chunk = chunk
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.from_numpy(value.copy()))
                for name, value in model.tensors().items()
            }
        )
        angle = torch.arange(steps)[:, None] * torch.tensor(c.inv_freq(), dtype=torch.float64)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())
        t = torch.arange(steps)
        behind, mixer = t[:, None] - t[None, :], c.mixers[0]
        near = (behind < (mixer.window or steps)) | (t[None, :] < mixer.sinks)
        self.register_buffer("mask", (behind >= 0) & near)
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(c.num_hidden_layers)]
        for name, value in self.weights.items():
            if name.startswith("model/layers/"):
                _, _, layer, rest = name.split("/", 3)
                self.layers[int(layer)][rest] = value
        self.block = self._block
        """What `forward` calls for a layer: torch.compile(it) is another."""

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.config.head_dim)).transpose(1, 2)

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        z, floor = x @ weight, FLOOR / x.shape[-1]
        if self.config.mixers[0].feature_map == "elu":
            return nn.functional.elu(z) + 1 + floor
        return (torch.softmax(z, dim=-1) + floor) / (1 + FLOOR)

    def _mixer(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        c, steps = self.config, x.shape[1]
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        q = self._heads(x @ w["self_attn/q_proj/weight"].T, heads)
        k = self._heads(x @ w["self_attn/k_proj/weight"].T, groups)
        v = self._heads(x @ w["self_attn/v_proj/weight"].T, groups)
        k, v = (y.repeat_interleave(heads // groups, dim=1) for y in (k, v))
        i, f = (
            (x @ w[f"mixer/{g}_proj/weight"].T + w[f"mixer/{g}_proj/bias"]).transpose(1, 2).float()
            for g in "if"
        )
        gate = torch.einsum("bhtd,hd->bht", torch.cat((q, k, v), -1), w["mixer/o_gate/weight"])
        gate = torch.sigmoid(gate + w["mixer/o_gate/bias"][:, None])[..., None]
        cos, sin = self.cos[:steps].to(q.dtype), self.sin[:steps].to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        near = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask[:steps, :steps]
        )
        phi_q = self._features(q, w["mixer/map_q"])
        phi_k = self._features(k, w["mixer/map_k"])
        far = mlstm(phi_q.float(), phi_k.float(), v.float(), i, f, min(self.chunk, steps))
        h = gate * far.to(near.dtype) + (1 - gate) * near
        return h.transpose(1, 2).flatten(2) @ w["self_attn/o_proj/weight"].T

    def _block(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        x = x + self._mixer(self._norm(x, w["input_layernorm/weight"]), w)
        y = self._norm(x, w["post_attention_layernorm/weight"])
        act = nn.functional.silu(y @ w["mlp/gate_proj/weight"].T)
        return x + (act * (y @ w["mlp/up_proj/weight"].T)) @ w["mlp/down_proj/weight"].T

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        """An object with `logits` [B, T, V] and, with labels, `loss` (mean cross-entropy)."""
        head = self.weights["model/embed_tokens/weight"]
        x = nn.functional.embedding(input_ids, head)
        for w in self.layers:
            x = self.block(x, w)
        logits = self._norm(x, self.weights["model/norm/weight"]) @ head.T
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        return Output(logits, loss)


class Output:
    """As transformers returns it."""

    def __init__(self, logits: Tensor, loss: Tensor | None) -> None:
        self.logits, self.loss = logits, loss
