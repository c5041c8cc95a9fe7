"""What the benchmarks of `linear_logprob` and `linear_kl` share: inputs, passes, and the products that are the floor.

Letters: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.measuring import Variant

Function = Callable[[Tensor, Tensor], Any]  # hidden, weight -> results, the first of which is summed up for backward


def shape_of(options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    name = str(options.dtype).removeprefix("torch.")
    return {"T": options.tokens, "H": options.hidden, "V": vocabulary, "dtype": name}


def head(options: argparse.Namespace, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`hidden [T, H]` and `weight [V, H]`, whose logits have a deviation of 1."""
    rng = torch.Generator(options.device).manual_seed(seed)
    like: dict[str, Any] = {"generator": rng, "device": options.device}
    hidden = torch.randn(options.tokens, options.hidden, **like)
    weight = torch.randn(vocabulary, options.hidden, **like) * options.hidden**-0.5
    return hidden.to(options.dtype), weight.to(options.dtype)


def targets_of(options: argparse.Namespace, vocabulary: int) -> Tensor:
    rng = torch.Generator(options.device).manual_seed(1)
    return torch.randint(vocabulary, (options.tokens,), generator=rng, device=options.device)


def forward(function: Function, hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return function(hidden, weight)

    return run


def forward_backward(function: Function, hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    """With gradients of both, of the sum of the first result: what every peer can give gradients of."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]

    def run() -> Any:
        found = function(*leaves)
        found = found if isinstance(found, Tensor) else found[0]
        return found, *torch.autograd.grad(found.sum(), leaves)

    return run


def products(hidden: Tensor, weight: Tensor, heads: int) -> Variant:
    """One product a head: below this no exact forward goes."""
    others = [(hidden, weight)] + [(hidden.clone(), weight.clone()) for _ in range(heads - 1)]
    name = "1 product" if heads == 1 else f"{heads} products"
    return Variant(name, lambda: [x @ w.T for x, w in others], comparable=False)


def products_backward(hidden: Tensor, weight: Tensor, heads: int) -> Variant:
    """As above and the two products of the first head's gradients."""
    others = [(hidden.clone(), weight.clone()) for _ in range(heads - 1)]

    def run() -> Any:
        rest = [x @ w.T for x, w in others]
        z = hidden @ weight.T
        return rest, z @ weight, z.T @ hidden

    return Variant(f"{heads + 2} products", run, comparable=False)
