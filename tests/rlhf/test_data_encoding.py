"""From text to tokens, with the tokenizers that people have: BOS or none, pad equal to EOS, chat template or none."""

from itertools import chain

import pytest
from transformers import PreTrainedTokenizerFast

from gearshift.errors import UserError
from gearshift.rlhf.data.encoding import Block, Comparison, Demonstration, Encoder, PromptRow
from gearshift.rlhf.data.sources import Record
from gearshift.rlhf.data.tokenizers import EOS, load_tokenizer, train_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat. the hat."] * 5, 270)


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str()),
        eos_token=EOS,
        bos_token="<s>",
    )
    other._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", other.bos_token_id)])
    return other


def records(*rows):
    return [Record(row, f"data.jsonl:{number}") for number, row in enumerate(rows, 1)]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompts_keep_their_row_and_text(tokenizer):
    encoded = Encoder(tokenizer, prompt_template="Q: {prompt}\nA:").prompts(
        records({"prompt": "a {cat}", "answer": ["b"]})
    )
    text = "Q: a {cat}\nA:"
    assert encoded.rows == [
        PromptRow(0, ids(tokenizer, text), text, {"prompt": "a {cat}", "answer": ["b"]}, "data.jsonl:1")
    ]


def test_long_prompts_are_left_out_and_counted_never_cut(tokenizer):
    rows = records({"prompt": "xxxx"}, {"prompt": "xxxxx"}, {"prompt": "yyy"})
    encoded = Encoder(tokenizer, max_prompt_tokens=4).prompts(rows)
    assert [(row.id, row.text) for row in encoded.rows] == [(0, "xxxx"), (1, "yyy")]  # an id is a place in `rows`
    assert encoded.dropped == {"over data.max_prompt_tokens=4": ["data.jsonl:2"]}
    assert encoded.describe() == "2 of 3 rows; left out: 1 over data.max_prompt_tokens=4 (data.jsonl:2)"


def test_demonstrations_end_with_eos_and_count_it_in_the_limit(tokenizer):
    rows = records({"prompt": "xx", "completion": "yy"}, {"prompt": "xx", "completion": "yyy"})
    encoded = Encoder(tokenizer, max_tokens=5).demonstrations(rows)
    assert encoded.rows == [Demonstration(ids(tokenizer, "xx"), [*ids(tokenizer, "yy"), tokenizer.eos_token_id])]
    assert encoded.dropped == {"over data.max_tokens=5": ["data.jsonl:2"]}


def test_eos_is_not_added_twice(tokenizer):
    [row] = Encoder(tokenizer).demonstrations(records({"prompt": "x", "completion": "y" + EOS})).rows
    assert row.completion == [*ids(tokenizer, "y"), tokenizer.eos_token_id]


def test_prompt_and_completion_never_merge(tokenizer):
    assert len(ids(tokenizer, "the")) == 1  # else this test shows nothing
    [row] = Encoder(tokenizer).demonstrations(records({"prompt": "t", "completion": "he"})).rows
    assert row.prompt == ids(tokenizer, "t")


def test_only_the_completion_bears_a_loss():
    tokens, targets = Demonstration([5, 6], [7, 8]).shifted()
    assert (tokens, targets) == ([5, 6, 7, 8], [-100, 7, 8, -100])


def test_comparisons_without_a_pair_are_left_out(tokenizer):
    def ranked(*pairs):
        return {"context": "q", "completions": [{"text": text, "rank": rank} for text, rank in pairs]}

    rows = records(ranked(("a", 1), ("b", 0), ("c", 1)), ranked(("a", 1), ("b", 1)), ranked(("a", 0), ("a", 1)))
    encoded = Encoder(tokenizer).comparisons(rows)
    eos = tokenizer.eos_token_id
    answers = [[*ids(tokenizer, text), eos] for text in "abc"]
    assert encoded.rows == [Comparison(ids(tokenizer, "q"), answers, [1.0, 0.0, 1.0])]
    assert encoded.dropped == {"without two different answers of different rank": ["data.jsonl:2", "data.jsonl:3"]}


def test_the_same_answer_twice_is_one_at_its_mean_rank(tokenizer):
    """Two labelers may rank the same words apart: no pair may compare an answer with itself."""
    answers = [("a", 0), ("b", 1), ("a", 3), ("a", 3)]
    row = {"context": "q", "completions": [{"text": text, "rank": rank} for text, rank in answers]}
    [found] = Encoder(tokenizer).comparisons(records(row)).rows
    eos = tokenizer.eos_token_id
    assert found == Comparison(ids(tokenizer, "q"), [[*ids(tokenizer, text), eos] for text in "ab"], [2.0, 1.0])


def test_one_long_answer_leaves_the_comparison_out(tokenizer):
    rows = records({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "bbbb"})
    encoded = Encoder(tokenizer, max_tokens=5).comparisons(rows)
    assert len(encoded.rows) == 1
    assert encoded.dropped == {"over data.max_tokens=5": ["data.jsonl:2"]}


def test_blocks_predict_every_token_of_the_text_once(tokenizer):
    texts = ["the cat sat", "on the mat, mat, mat.", "x"]
    blocks = Encoder(tokenizer, max_tokens=4).blocks(records(*({"text": text} for text in texts))).rows
    stream = [token for text in texts for token in [*ids(tokenizer, text), tokenizer.eos_token_id]]
    inputs, targets = zip(*(block.shifted() for block in blocks), strict=True)
    assert list(chain.from_iterable(inputs)) == stream[:-1]
    assert list(chain.from_iterable(targets)) == stream[1:]
    assert {len(row) for row in inputs[:-1]} == {4}


def test_a_text_of_exactly_one_block_makes_one_block(tokenizer):
    [block] = Encoder(tokenizer, max_tokens=3).blocks(records({"text": "xyz"})).rows
    assert isinstance(block, Block)
    assert block.shifted()[1] == [*ids(tokenizer, "yz"), tokenizer.eos_token_id]


def test_bos_is_where_the_tokenizer_puts_it(tokenizer):
    tokenizer = with_bos(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    x, y = ids(tokenizer, "x")[0], ids(tokenizer, "y")[0]
    encoder = Encoder(tokenizer, max_tokens=8)
    assert encoder.prompts(records({"prompt": "x"})).rows[0].tokens == [bos, x]
    assert encoder.demonstrations(records({"prompt": "x", "completion": "y"})).rows == [
        Demonstration([bos, x], [y, eos])
    ]
    assert encoder.blocks(records({"text": "x"}, {"text": "y"})).rows[0].tokens.tolist() == [bos, x, eos, bos, y, eos]


def test_pad_equal_to_eos_changes_nothing(tokenizer):
    row = {"prompt": "the cat", "completion": "sat"}
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=EOS, pad_token=EOS)
    assert other.pad_token_id == other.eos_token_id
    assert Encoder(other).demonstrations(records(row)).rows == Encoder(tokenizer).demonstrations(records(row)).rows


def test_truncation_in_the_tokenizer_file_cuts_nothing(tokenizer):
    other = with_bos(tokenizer)
    other._tokenizer.enable_truncation(2)
    other._tokenizer.enable_padding(length=9)
    assert Encoder(other).prompts(records({"prompt": "xxxxx"})).rows[0].tokens[1:] == ids(tokenizer, "xxxxx")


def test_chat_template_writes_the_prompt_and_its_own_bos(tokenizer):
    tokenizer = with_bos(tokenizer)
    tokenizer.chat_template = TEMPLATE
    encoder = Encoder(tokenizer, chat_template=True)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    [prompt] = encoder.prompts(records({"prompt": "x"})).rows
    [demonstration] = encoder.demonstrations(records({"messages": messages})).rows
    assert prompt.text == "<s><user>x<assistant>"
    assert prompt.tokens == demonstration.prompt == [tokenizer.bos_token_id, *ids(tokenizer, "<user>x<assistant>")]
    assert demonstration.completion == [*ids(tokenizer, "y"), tokenizer.eos_token_id]


def test_messages_need_no_chat_template(tokenizer):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    one, many = Encoder(tokenizer).prompts(records({"messages": turns[:1]}, {"messages": turns})).rows
    assert one.text == "x"
    assert many.text == "\n\nHuman: x\n\nAssistant: y\n\nHuman: z\n\nAssistant:"


def test_what_cannot_work_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data.jsonl:2: the prompt is empty"):
        Encoder(tokenizer).prompts(records({"prompt": "x"}, {"prompt": ""}))
    with pytest.raises(UserError, match=r"data.jsonl:1: the prompt is empty"):
        Encoder(with_bos(tokenizer)).prompts(records({"prompt": ""}))  # BOS alone asks nothing
    with pytest.raises(UserError, match=r"no row of the data is left.*1 over data.max_prompt_tokens=1"):
        Encoder(tokenizer, max_prompt_tokens=1).prompts(records({"prompt": "xx"}))
    with pytest.raises(UserError, match=r"data.prompt_template: must hold \{prompt\} once"):
        Encoder(tokenizer, prompt_template="Q:")
    with pytest.raises(UserError, match=r"data.chat_template: is on, but the tokenizer has no chat template"):
        Encoder(tokenizer, chat_template=True)
    with pytest.raises(UserError, match=r"data.max_tokens: must be set"):
        Encoder(tokenizer).blocks(records({"text": "x"}))
    with pytest.raises(UserError, match="no EOS"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer))


def test_trained_tokenizer_knows_every_text_and_survives_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "the catfish 漢字\n\t <ok>"
    assert loaded.decode(ids(loaded, text)) == text
    assert ids(loaded, text) == ids(tokenizer, text)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, 270)
    with pytest.raises(UserError, match=r"data.vocab_size: 257 is too small"):
        train_tokenizer(["x"], 257)


def test_the_smallest_tokenizer_has_one_token_per_byte():
    assert len(ids(train_tokenizer(["the the the"], 258), "the the")) == 7


def test_a_tokenizer_that_is_not_there_or_never_ends(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data.tokenizer: cannot load"):
        load_tokenizer(str(tmp_path / "none"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_pad_gets_eos(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=EOS).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0
