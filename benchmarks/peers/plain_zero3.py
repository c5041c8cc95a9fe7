"""The plain way on DeepSpeed: step 3 of DeepSpeed-Chat, written straightforwardly.

    python -m benchmarks.peers.plain_zero3 FOLDER     (one process per rank; `ppo_step.py` starts them)

Four ZeRO-3 engines with DeepSpeed-Chat's settings; `transformers` generates on the actor's, with sampling (which
DeepSpeed-Chat leaves off for Llama). As there: old log-probs by another forward of the actor, KL in the reward, GAE
without whitening, one update of actor and critic for each mini-batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.setting import Setting, prompts_of
from benchmarks.peers.worker import Channel, Clock, rank_and_size, turns

CLIP = VALUE_CLIP = 0.2
GAMMA, LAM = 1.0, 0.95


def main() -> None:
    channel = Channel()
    folder = Path(sys.argv[1])
    trainer = Trainer(Setting.load(folder), folder)
    rank, size = rank_and_size()
    prompts = torch.tensor(prompts_of(folder)[rank::size])
    for clock in turns(channel):
        trainer.iteration(prompts, clock)


@dataclass
class Experience:
    """Letters: B rows, S tokens of a sequence. `tokens [B, S]` int64; the others of each token but the first."""

    tokens: Tensor
    logprobs: Tensor  # [B, S-1]
    ref_logprobs: Tensor  # [B, S-1]
    values: Tensor  # [B, S-1]
    scores: Tensor  # [B]


class ValueModel(nn.Module):
    """A backbone with a head of one output, as DeepSpeed-Chat wraps it. `tokens [B, S]` -> `[B, S]`."""

    def __init__(self, classifier: Any):
        super().__init__()
        self.backbone, self.head = classifier.model, classifier.score
        self.config = classifier.config

    def forward(self, tokens: Tensor) -> Tensor:
        values: Tensor = self.head(self.backbone(tokens, use_cache=False).last_hidden_state).squeeze(2)
        return values


class Trainer:
    """The four engines, and an iteration with them."""

    def __init__(self, setting: Setting, folder: Path):
        import deepspeed
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed(verbose=False)
        self.setting = setting
        config = zero3(setting)
        self._partitions = HfDeepSpeedConfig(config)  # while it is there, models are loaded in shards
        policy, reward = str(folder / "policy"), str(folder / "reward")
        self.actor = _engine(AutoModelForCausalLM.from_pretrained(policy), config, setting)
        self.reference = _engine(AutoModelForCausalLM.from_pretrained(policy), config)
        self.critic = _engine(ValueModel(AutoModelForSequenceClassification.from_pretrained(reward)), config, setting)
        self.reward = _engine(ValueModel(AutoModelForSequenceClassification.from_pretrained(reward)), config)

    def iteration(self, prompts: Tensor, clock: Clock) -> None:
        """Generate, score, train."""
        tokens = self.generate(prompts)
        clock.ends("generation")
        experience = self.score(tokens)
        clock.ends("score")
        self.train(experience, prompts.shape[1] - 1)
        clock.ends("train")

    def generate(self, prompts: Tensor) -> Tensor:
        """[B, S]. Collective: a step gathers every layer."""
        self.actor.eval()
        with torch.no_grad():
            tokens = self.actor.module.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.setting.new_tokens,
                min_new_tokens=self.setting.new_tokens,
                pad_token_id=0,
                synced_gpus=True,
            )
        self.actor.train()
        return tokens

    def score(self, tokens: Tensor) -> Experience:
        for engine in (self.actor, self.critic):
            engine.eval()
        with torch.no_grad():
            logprobs = _logprobs(self.actor, tokens)
            ref_logprobs = _logprobs(self.reference, tokens)
            scores = self.reward(tokens)[:, -1]
            values = self.critic(tokens)[:, :-1]
        for engine in (self.actor, self.critic):
            engine.train()
        return Experience(tokens, logprobs, ref_logprobs, values, scores)

    def train(self, experience: Experience, start: int) -> None:
        """One step of each engine over all rows; `start`: the first of the S-1 places that is an answer's."""
        rewards = -self.setting.kl_coef * (experience.logprobs - experience.ref_logprobs)
        rewards[:, -1] += experience.scores
        advantages, returns = _advantages(experience.values[:, start:], rewards[:, start:])
        for rows in torch.arange(len(experience.tokens)).split(self.setting.micro_batch):
            tokens = experience.tokens[rows]
            logprobs = _logprobs(self.actor, tokens)[:, start:]
            ratio = torch.exp(logprobs - experience.logprobs[rows, start:])
            surrogate = torch.max(
                -advantages[rows] * ratio, -advantages[rows] * torch.clamp(ratio, 1.0 - CLIP, 1.0 + CLIP)
            )
            self.actor.backward(surrogate.mean())
            self.actor.step()
            old = experience.values[rows, start:]
            values = self.critic(tokens)[:, :-1][:, start:]
            clipped = torch.clamp(values, old - VALUE_CLIP, old + VALUE_CLIP)
            errors = torch.max((values - returns[rows]) ** 2, (clipped - returns[rows]) ** 2)
            self.critic.backward(0.5 * errors.mean())
            self.critic.step()


def zero3(setting: Setting) -> dict[str, Any]:
    """DeepSpeed-Chat's `get_train_ds_config` with stage 3, in fp32."""
    _, size = rank_and_size()
    rows = setting.episodes // size
    micro = min(setting.micro_batch, rows)
    return {
        "train_batch_size": setting.episodes,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": rows // micro,
        "steps_per_print": 1_000_000,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 30_000_000,
            "stage3_prefetch_bucket_size": 30_000_000,
            "memory_efficient_linear": False,
        },
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _engine(model: Any, config: dict[str, Any], setting: Setting | None = None) -> Any:
    """Trained where it is given a setting, else frozen."""
    import deepspeed

    if setting is None:
        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        return engine
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _logprobs(engine: Any, tokens: Tensor) -> Tensor:
    """[B, S-1]: of each token but the first."""
    logits = engine(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return torch.log_softmax(logits[:, :-1], dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def _advantages(values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, [B, L] each."""
    last, reversed_advantages = 0.0, []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        after = values[:, t + 1] if t < length - 1 else 0.0
        last = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAM * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


if __name__ == "__main__":
    main()
