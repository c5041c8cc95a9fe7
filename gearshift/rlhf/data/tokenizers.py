"""Tokenizers: loaded from a folder or hub name, or trained from text as byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gearshift.errors import UserError

EOS = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, EOS and pad: no text is ever unknown


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub name. Without a pad token, pad is set equal to EOS: no mask here reads it.

    Raises UserError if there is none, if it is a slow one, or if it has no EOS (nothing could end a response).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a bad folder, no network, a hub name that is not there: many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.tokenizer: cannot load a tokenizer from {name}: {reason[0]}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"data.tokenizer: {name} has no fast tokenizer, with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"data.tokenizer: {name} has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; EOS is token 0 and pad token 1.

    At 258, the smallest, every byte is a token and none is merged. Raises UserError below that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size: {vocab_size} is too small; all bytes, EOS and pad need {SMALLEST_VOCABULARY}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
