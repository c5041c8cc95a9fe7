"""Time and peak memory of each operation of `gearshift.kernels` beside its peers: one file per operation.

python -m benchmarks.kernels                    all, each in a process of its own
python -m benchmarks.kernels.linear_logprob     one
"""

OPERATIONS = (
    "linear_logprob",
    "linear_kl",
    "ppo_targets",
    "policy_loss",
    "value_loss",
    "few_rows_linear",
    "decode_attention",
)
