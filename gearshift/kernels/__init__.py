"""Per-token arithmetic on tensors: no processes of its own, no DeepSpeed, no models.

One module per operation, with the operation's name. Imported eagerly: a lazy attribute would be shadowed by the
module of the same name as soon as anything imported it.
"""

from gearshift.kernels.decode_attention import Columns, decode_attention
from gearshift.kernels.few_rows_linear import few_rows_linear
from gearshift.kernels.flash_decode import FlashKernel, flash_decode
from gearshift.kernels.linear_kl import LinearKL, linear_kl
from gearshift.kernels.linear_logprob import LogProbs, linear_logprob
from gearshift.kernels.losses import Loss
from gearshift.kernels.policy_loss import policy_loss
from gearshift.kernels.ppo_targets import Targets, ppo_targets
from gearshift.kernels.rms_norm import rms_norm
from gearshift.kernels.score_attention import score_attention
from gearshift.kernels.swiglu import swiglu
from gearshift.kernels.value_loss import value_loss

__all__ = [
    "Columns",
    "FlashKernel",
    "LinearKL",
    "LogProbs",
    "Loss",
    "Targets",
    "decode_attention",
    "few_rows_linear",
    "flash_decode",
    "linear_kl",
    "linear_logprob",
    "policy_loss",
    "ppo_targets",
    "rms_norm",
    "score_attention",
    "swiglu",
    "value_loss",
]
