"""What the part `ppo` of `gpu.py` trains: models with random weights, prompts and a config."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] == str(ROOT / "benchmarks"):
    sys.path[0] = str(ROOT)  # `kernels` of this folder would hide Hugging Face's package of that name from transformers


def main() -> None:
    """Writes policy/, reward/, prompts.jsonl and ppo.yaml: a Llama of 1.1 billion parameters as policy and as reward
    model, with random weights and a tokenizer of a few hundred tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from gearshift.rlhf.data.tokenizers import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts(200), 384)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for seed, (name, kind) in enumerate({
        "policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification
    }.items()):  # fmt: skip
        torch.manual_seed(seed)
        with torch.device("cuda" if on_gpu else "cpu"):
            model = kind.from_config(model_config(options.tiny), dtype=dtype)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters", flush=True)
    config = ppo_config(folder, options.ranks, options.tiny)
    rows = [json.dumps({"prompt": text}) for text in texts(4 * config["ppo"]["batch_size"])]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "ppo.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML


def texts(count: int) -> list[str]:
    nouns = ["cat", "dog", "hill", "river", "number", "word", "house", "road"]
    verbs = ["sees", "finds", "counts", "crosses", "names"]
    return [f"The {nouns[n % 8]} {verbs[n % 5]} the {nouns[n // 8 % 8]} {n} times." for n in range(count)]


def model_config(tiny: bool) -> Any:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    }  # fmt: skip
    if tiny:
        sizes |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 8}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}  # as train_tokenizer numbers them
    return AutoConfig.for_model("llama", num_labels=1, **sizes, **tokens)


def ppo_config(folder: Path, ranks: int, tiny: bool) -> dict[str, Any]:
    """The exact KL, so that `linear_kl` is in it; one replica of the policy over all GPUs where its heads divide."""
    batch = 8 * ranks if tiny else 64 * ranks
    return {
        "run": {"folder": str(folder / "run"), "ranks": ranks},
        "policy": {"init": str(folder / "policy")},
        "reward": {"init": str(folder / "reward")},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": 64},
        "rollout": {"tp_size": ranks if 8 % ranks == 0 else 1, "max_new_tokens": 8 if tiny else 256},
        "ppo": {
            "episodes": 3 * batch, "batch_size": batch, "minibatches": 2, "micro_batch_tokens": 1 << 16,
            "warmup_iterations": 0, "samples_every": 0, "kl": {"estimator": "exact"},
        },
        "optimizer": {"learning_rate": 1e-6},
        "tracking": {"trackers": []},
    }  # fmt: skip


if __name__ == "__main__":
    main()
