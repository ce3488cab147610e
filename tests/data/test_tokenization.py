import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.rows import Row
from sst_lightning.data.tokenization import PLAIN_TEMPLATE, encode, end_of_turn, render_prompt
from tests.nano import CHAT_TEMPLATE, SPECIAL, nano_tokenizer

NANO = nano_tokenizer()
HEADER = "<|im_start|>user\n"
FOOTER = "<|im_end|>\n<|im_start|>assistant\n"
FRAME = 1 + len("user\n") + 1 + 1 + 1 + len("assistant\n")
"""Tokens of the chat header with one token per character."""


def byte_tokenizer():
    """One token per byte: a character of several bytes can be cut in the middle."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def row(prompt: str, response: str) -> Row:
    return Row("id", prompt, response, "utility", "group")


def completion(item) -> list[int]:
    return [label for label in item.labels if label != -100]


def test_labels_are_the_completion_and_the_end_of_turn():
    item = encode(row("What is it?", " a cat "), NANO, 512)
    assert NANO.decode(completion(item)) == "a cat<|im_end|>"
    assert NANO.decode(item.input_ids) == f"{HEADER}What is it?{FOOTER}a cat<|im_end|>"
    assert item.labels[: item.prompt_length] == [-100] * item.prompt_length
    assert item.labels[item.prompt_length :] == item.input_ids[item.prompt_length :]


def test_prompt_is_the_chat_template_up_to_the_answer():
    item = encode(row("Hi", "Yo"), NANO, 512)
    rendered = NANO.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=True, add_generation_prompt=True
    )["input_ids"]
    assert item.input_ids[: item.prompt_length] == rendered


def test_row_without_response_is_a_prompt_without_labels():
    item = encode(row("Hi", ""), NANO, 512)
    assert completion(item) == []
    assert item.prompt_length == len(item)


def test_tokenizer_without_chat_template_gets_a_plain_one():
    plain = nano_tokenizer(chat_template=False)
    item = encode(row("Hi", "Yo"), plain, 512)
    expected = "<|im_start|>" + PLAIN_TEMPLATE.format(prompt="Hi") + "Yo<|im_end|>"
    assert plain.decode(item.input_ids) == expected
    assert plain.decode(completion(item)) == "Yo<|im_end|>"


def test_end_of_turn_is_the_templates_token_and_not_the_end_of_sequence():
    tokenizer = nano_tokenizer()
    tokenizer.eos_token = "<unk>"
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"


def test_tokenizer_without_any_end_is_refused():
    tokenizer = nano_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        encode(row("Hi", "Yo"), tokenizer, 512)


def test_document_is_cut_and_question_answer_and_header_stay():
    item = encode(row("d" * 500 + "\n\nQuestion: who?", "Ann"), NANO, 100)
    text = NANO.decode(item.input_ids)
    assert len(item) == 100
    assert text.startswith(HEADER + "dd")
    assert text.endswith(f"dd\n\nQuestion: who?{FOOTER}Ann<|im_end|>")


def test_cut_completion_has_no_end_of_turn():
    item = encode(row("Why?", "b" * 500), NANO, 100)
    assert NANO.decode(completion(item)) == "b" * (100 - FRAME - len("Why?"))


def test_too_small_max_length_is_refused():
    with pytest.raises(DataError, match=f"Use at least {FRAME + 2}"):
        encode(row("a long prompt", "answer"), NANO, FRAME + 1)
    assert completion(encode(row("a long prompt", "answer"), NANO, FRAME + 2))


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)


@settings(max_examples=200, deadline=None)
@given(
    prompt=text.map(lambda s: s.strip() or "x"),
    response=text.map(lambda s: s.strip() or "x"),
    repeat=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    max_length=st.integers(FRAME + 2, 150),
    tokenizer=st.sampled_from([NANO, byte_tokenizer()]),
)
def test_truncation_keeps_header_and_some_completion(
    prompt, response, repeat, max_length, tokenizer
):
    prompt, response = prompt * repeat[0], response * repeat[1]
    item = encode(row(prompt, response), tokenizer, max_length)
    assert len(item) <= max_length
    labelled = completion(item)
    assert labelled
    header = tokenizer(HEADER, add_special_tokens=False)["input_ids"]
    footer = tokenizer(FOOTER, add_special_tokens=False)["input_ids"]
    assert item.input_ids[: len(header)] == header
    assert item.input_ids[item.prompt_length - len(footer) : item.prompt_length] == footer
    full = tokenizer(response, add_special_tokens=False)["input_ids"] + [end_of_turn(tokenizer)]
    assert labelled == full[: len(labelled)]
    # What is left of the prompt is its end.
    kept = item.input_ids[len(header) : item.prompt_length - len(footer)]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert kept == ids[len(ids) - len(kept) :]
    # Nothing is cut without need.
    whole = len(tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"])
    if whole + len(full) <= max_length:
        assert len(item) == whole + len(full)
