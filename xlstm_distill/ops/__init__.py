"""The ops of the C core as functions on NumPy arrays: forward and exact backward.

`xlstm_distill.reference` has the same names and signatures in plain NumPy: read it first. Head
tensors are [B, H, T, D]; the work is done in float64 if any input is float64, else in float32.
Gradients are returned new; nothing is added into the caller's arrays.
"""

from xlstm_distill.ops.attention import (
    attention_backward,
    attention_forward,
    feature_map_backward,
    feature_map_forward,
    fold_output_gate,
    lolcats_backward,
    lolcats_forward,
    mix_backward,
    mix_forward,
    output_gate_backward,
    output_gate_forward,
)
from xlstm_distill.ops.basic import (
    adamw_step,
    embedding_backward,
    embedding_forward,
    head_divergence,
    head_loss,
    head_topk,
    linear_backward,
    linear_forward,
    merge_linear,
    mse_backward,
    mse_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_forward,
    sample,
    sumsq,
    swiglu_backward,
    swiglu_forward,
)
from xlstm_distill.ops.cells import (
    mapped_mlstm_forward,
    mlstm_backward,
    mlstm_forward,
    slstm_backward,
    slstm_forward,
)

__all__ = [
    "adamw_step",
    "attention_backward",
    "attention_forward",
    "embedding_backward",
    "embedding_forward",
    "feature_map_backward",
    "feature_map_forward",
    "fold_output_gate",
    "head_divergence",
    "head_loss",
    "head_topk",
    "linear_backward",
    "linear_forward",
    "lolcats_backward",
    "lolcats_forward",
    "mapped_mlstm_forward",
    "merge_linear",
    "mix_backward",
    "mix_forward",
    "mlstm_backward",
    "mlstm_forward",
    "mse_backward",
    "mse_forward",
    "output_gate_backward",
    "output_gate_forward",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rope_forward",
    "sample",
    "slstm_backward",
    "slstm_forward",
    "sumsq",
    "swiglu_backward",
    "swiglu_forward",
]
