"""What the tests of `linear_logprob` and `linear_kl` share: random heads, and how far results are from fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gearshift.kernels.head import CHUNK, Head

T, H, V = 13, 16, 2 * CHUNK + 809  # three chunks, the last one partial
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.0625, "temperature": 1.3},
    {"softcap": 5.0},
    {"scale": 1.5, "softcap": 3.0, "temperature": 0.8},
]


def make(
    dtype: torch.dtype = torch.float32, size: float = 1.0, bias: bool = True, seed: int = 0, prefix: str = "",
    shape: tuple[int, int, int] = (T, H, V),
) -> dict[str, Tensor]:  # fmt: skip
    """`hidden [T, H]`, `weight [V, H]` and perhaps `bias [V]`, their names after `prefix`."""
    rng = torch.Generator().manual_seed(seed)
    tokens, width, vocab = shape
    inputs = {
        "hidden": size * torch.randn(tokens, width, generator=rng),
        "weight": torch.randn(vocab, width, generator=rng),
    }
    if bias:
        inputs["bias"] = torch.randn(vocab, generator=rng)
    return {prefix + name: tensor.to(dtype) for name, tensor in inputs.items()}


def make_targets() -> Tensor:
    """For T tokens; some at the edges of chunks, some ignored."""
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    targets[[0, 1, 2]] = torch.tensor([0, CHUNK, V - 1])
    targets[[4, 9, T - 1]] = -100
    return targets


def run(function: Any, inputs: dict[str, Tensor], targets: Tensor, **options: Any) -> dict[str, Tensor]:
    """Values and, for random incoming gradients, the gradients ("d" + name) of every input that gets one."""
    leaves = {n: t.clone().requires_grad_(not n.startswith("ref_")) for n, t in inputs.items()}
    result = function(**leaves, targets=targets, **options)
    out = {name: value for name, value in result._asdict().items() if value is not None}
    rng = torch.Generator().manual_seed(2)
    loss = sum((v.double() * torch.randn(len(targets), generator=rng, dtype=torch.float64).to(v.device)).sum()
               for v in out.values() if v.requires_grad)  # fmt: skip
    loss.backward()
    gradients = {"d" + n: leaf.grad for n, leaf in leaves.items() if leaf.requires_grad}
    return {name: value.detach().cpu() for name, value in (out | gradients).items()}


def in_fp64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def on(where: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(where) for name, tensor in inputs.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def largest_logit(inputs: dict[str, Tensor], options: dict[str, Any], prefix: str = "") -> float:
    fields = {n: options[prefix + n] for n in ("scale", "softcap") if prefix + n in options}
    head = Head(**fields, temperature=options.get("temperature", 1.0))
    product = inputs[prefix + "hidden"].double() @ inputs[prefix + "weight"].double().T
    z = head.logits(product + inputs.get(prefix + "bias", torch.zeros(1)).double())
    return float(z[z.isfinite()].abs().max())


def assert_close(
    got: dict[str, Tensor], want: dict[str, Tensor], logit: float, gradients: float = 1e-5, values: float = 2e-6
) -> None:
    """Values within `values · max(1, max|z|)`, gradients within a relative norm, as the contract says for fp32."""
    assert set(got) == set(want)
    for name in got:
        if name.startswith("d"):
            assert relative(got[name], want[name]) <= gradients, (name, relative(got[name], want[name]))
        else:
            assert got[name].dtype == torch.float32
            error = (got[name] - want[name]).abs()[want[name].isfinite()]
            assert torch.equal(got[name].isinf(), want[name].isinf()), name
            assert error.max() <= values * max(1.0, logit), (name, error.max())
