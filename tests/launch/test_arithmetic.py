"""The batch arithmetic that rank 0 prints, figure by figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gearshift.launch.arithmetic import batch_arithmetic
from gearshift.launch.config import load

from .conftest import example, write


def lines(command: str, ranks: int, steps: int | None = None, **sections: Any) -> list[str]:
    return batch_arithmetic(load(command, write({**example(command), **sections})), ranks, steps)


def test_ppo_ptx_with_the_numbers_of_the_paper(here: Path) -> None:
    ppo = {"episodes": 256_000, "batch_size": 512, "minibatches": 8, "micro_batch_size": 3}
    ptx = {"coef": 27.8, "data": "text.txt", "max_tokens": 1024}
    assert lines("ppo", 8, ppo=ppo, ptx=ptx) == [
        "iteration    512 episodes, 64 per rank on 8 ranks; 500 iterations make 256000 episodes",
        "rollouts     4 groups of 2 ranks (tensor parallel), 128 prompts each",
        "minibatch    64 episodes, 8 per rank in 3 micro-batches of at most 3 rows",
        "pretraining  512 examples of 1024 tokens per minibatch, 64 per rank in 22 micro-batches of at most 3 rows",
        "optimizer    8 steps per iteration (8 minibatches x 1 epoch), 4000 in total, by policy and critic each",
    ]


def test_plain_ppo_says_nothing_of_pretraining(here: Path) -> None:
    ppo = {"episodes": 64, "batch_size": 16, "minibatches": 1, "epochs": 4, "micro_batch_size": 8}
    assert lines("ppo", 2, ppo=ppo) == [
        "iteration    16 episodes, 8 per rank on 2 ranks; 4 iterations make 64 episodes",
        "rollouts     1 group of 2 ranks (tensor parallel), 16 prompts each",
        "minibatch    16 episodes, 8 per rank in 1 micro-batch of at most 8 rows",
        "optimizer    4 steps per iteration (1 minibatch x 4 epochs), 16 in total, by policy and critic each",
    ]


def test_several_answers_to_a_prompt(here: Path) -> None:
    ppo = {"episodes": 64, "batch_size": 16, "minibatches": 1, "answers": 4}
    assert (
        lines("ppo", 2, ppo=ppo)[1]
        == "rollouts     1 group of 2 ranks (tensor parallel), 16 answers each (4 to a prompt)"
    )


def test_training_stages(here: Path) -> None:
    train = {
        "batch_size": 32,
        "micro_batch_size": 5,
        "epochs": 2,
        "pretraining_fraction": 0.1,
        "pretraining": "text.txt",
    }
    assert lines("sft", 2, steps=100, train=train) == [
        "step         32 sequences (about 10% pretraining text), 16 per rank on 2 ranks "
        "in 4 micro-batches of at most 5 rows",
        "optimizer    one step per batch, 2 epochs, 100 in total",
    ]
    assert lines("reward", 4, train={"batch_size": 64}) == [
        "step         64 prompts, 16 per rank on 4 ranks in 2 micro-batches of at most 8 prompts",
        "optimizer    one step per batch, 1 epoch",
    ]
