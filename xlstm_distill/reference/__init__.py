"""The specification: every op in plain NumPy, forward and exact backward.

`xlstm_distill.ops` has the same names and signatures in C and is compared with this package by
tests/test_ops.py. Nothing here is fast and nothing is clever: one formula, one line where that is
possible. The formulas and the derivations of the backwards are in docs/math/.

The work is done in the dtype of the inputs (float32 or float64; use float64 to check something).
Inputs are NumPy arrays of one floating dtype, their shapes are not checked; results are new arrays,
only `adamw_step` writes into what it is given.

    N rows   K inputs   M outputs   d model width   F MLP width   V vocabulary   k targets of a row
    B batch  T steps    H query heads   G key/value heads (H = G * rep)   D, E head widths
"""

from xlstm_distill.reference.attention import (
    attention_backward,
    attention_forward,
    feature_map_backward,
    feature_map_forward,
    rope_forward,
)
from xlstm_distill.reference.gates import (
    fold_output_gate,
    mix_backward,
    mix_forward,
    output_gate_backward,
    output_gate_forward,
)
from xlstm_distill.reference.lolcats import lolcats_backward, lolcats_forward
from xlstm_distill.reference.losses import (
    divergence,
    head_divergence,
    head_draws,
    head_loss,
    head_topk,
    mse_backward,
    mse_forward,
)
from xlstm_distill.reference.mlstm import mapped_mlstm_forward, mlstm_backward, mlstm_forward
from xlstm_distill.reference.rows import (
    adamw_step,
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
    merge_linear,
    rmsnorm_backward,
    rmsnorm_forward,
    sumsq,
    swiglu_backward,
    swiglu_forward,
)
from xlstm_distill.reference.sampling import sample
from xlstm_distill.reference.slstm import slstm_backward, slstm_forward

__all__ = [
    "adamw_step",
    "attention_backward",
    "attention_forward",
    "divergence",
    "embedding_backward",
    "embedding_forward",
    "feature_map_backward",
    "feature_map_forward",
    "fold_output_gate",
    "head_divergence",
    "head_draws",
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
