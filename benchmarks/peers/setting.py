"""What every way is given: random models, a tokenizer of one word per token, prompts, and the sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPECIAL = ("<|endoftext|>", "<|pad|>")


@dataclass(frozen=True)
class Setting:
    """The sizes of models and batches, and PPO's numbers where the ways would otherwise differ."""

    vocabulary: int = 8192
    hidden: int = 384
    layers: int = 6
    heads: int = 6
    episodes: int = 16  # over all processes
    prompt_tokens: int = 32
    new_tokens: int = 64
    micro_batch: int = 8  # rows per process in one forward and backward
    learning_rate: float = 1e-5
    kl_coef: float = 0.02

    def save(self, folder: Path) -> None:
        (folder / "setting.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Setting:
        return cls(**json.loads((folder / "setting.json").read_text(encoding="utf-8")))


def prompts_of(folder: Path) -> list[list[int]]:
    """Token ids, `[episodes][prompt_tokens]`."""
    rows = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [[int(word[1:]) for word in json.loads(row)["prompt"].split()] for row in rows]


def make(setting: Setting, folder: Path) -> dict[str, int]:
    """Writes policy/, reward/, prompts.jsonl and setting.json; returns the parameters of each model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    setting.save(folder)
    tokenizer = _tokenizer(setting.vocabulary)
    parameters = {}
    for seed, (name, kind) in enumerate(
        (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification))
    ):
        torch.manual_seed(seed)
        model = kind.from_config(_llama(setting), dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        parameters[name] = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, setting.vocabulary, (setting.episodes, setting.prompt_tokens), generator=generator)
    rows = [json.dumps({"prompt": " ".join(f"w{token}" for token in row)}) for row in tokens.tolist()]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return parameters


def _llama(setting: Setting) -> Any:
    """Without EOS, BOS and pad: nothing ends an answer early, and nothing is mistaken for padding."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 8 // 3,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=4096,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _tokenizer(vocabulary: int) -> Any:
    """Token n is the word `wn`, but for the two special ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate((*SPECIAL, *(f"w{n}" for n in range(2, vocabulary))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[1])
