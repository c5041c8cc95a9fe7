"""Tokenizers: loaded from a folder or hub name, or trained from text as byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gearshift.errors import SettingError, UserError, one_line

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
        raise UserError(f"data.tokenizer: cannot load a tokenizer from {name}: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"data.tokenizer: {name} has no fast tokenizer, with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError(f"data.tokenizer: {name} has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_vocabulary(name: str, field: str) -> dict[str, int]:
    """Token -> id of whichever tokenizer a folder or hub name has, fast or slow. Raises SettingError."""
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(name).get_vocab()
    except Exception as error:
        raise SettingError(
            field, f"the tokenizer of {name} cannot be loaded, to see whether it is the policy's: {one_line(error)}"
        ) from error
    return vocabulary


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
