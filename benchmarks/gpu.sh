#!/bin/sh
# All measurements on a GPU, in two calls of under ten minutes each on one H100 or H200, for machines lent by the call:
#
#     sh benchmarks/gpu.sh 1 OUT [WHEELS]    tests of the kernels, products with heads, PPO of 1.1 billion parameters
#     sh benchmarks/gpu.sh 2 OUT [WHEELS]    decoding and rollouts beside transformers' generate, small kernels, the shift
#
# Results go to OUT, named after the GPU. WHEELS: what `python benchmarks/gpu.py wheels WHEELS` has collected, where
# deepspeed or Liger are not installed.
set -eu
call=$1 out=$2
case $call in
1) parts="tests linear_logprob linear_kl ppo" ;;
2) parts="decode rollout ppo_targets policy_loss value_loss shift" ;;
*) echo "gpu.sh: the first argument is 1 or 2, got $call" >&2; exit 2 ;;
esac
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" run "$out" $parts --within 570 ${3:+--wheels "$3"}
