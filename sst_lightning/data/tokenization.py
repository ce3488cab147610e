"""From rows to token ids: chat template, completion-only labels, truncation that keeps both."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.rows import Row

IGNORED = -100
"""Label of a position that carries no loss (torch's ``ignore_index``)."""

PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""Prompt format of a tokenizer without a chat template."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised row.

    Attributes:
        input_ids: Prompt then completion then end-of-turn token.
        labels: As ``input_ids``, with -100 on the prompt.
        prompt_length: Number of prompt tokens.
        row: Where it came from.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    row: Row

    def __len__(self) -> int:
        return len(self.input_ids)


def render_prompt(prompt: str, tokenizer: Any) -> str:
    """Return the text of a user turn, up to where the assistant's answer starts."""
    if not tokenizer.chat_template:
        return (tokenizer.bos_token or "") + PLAIN_TEMPLATE.format(prompt=prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@lru_cache(maxsize=8)
def end_of_turn(tokenizer: Any) -> int:
    """Return the id of the token that ends an assistant's turn.

    It is read off the chat template (several models have an end-of-turn token that is not their
    end-of-sequence token); without a template, or where the template ends a turn with ordinary
    text, it is the end-of-sequence token.

    Raises:
        DataError: The tokenizer has neither.
    """
    if tokenizer.chat_template:
        prompt, answer = render_prompt("question", tokenizer), "answer"
        messages = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": answer},
        ]
        turn = tokenizer.apply_chat_template(messages, tokenize=False)
        _, found, tail = turn[len(prompt) :].partition(answer)
        ids = _ids(tail.strip(), tokenizer) if found else []
        if ids and ids[0] in set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder):
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has neither a chat template that ends a turn nor an end-of-sequence "
            "token, so a model could not learn where to stop. Set its eos_token"
        )
    return tokenizer.eos_token_id


def encode(row: Row, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise one row to at most ``max_length`` tokens.

    A row that is too long loses the beginning of the user's text first: a document stands before
    its question, and the chat header in front of it stays. The completion keeps at least half of
    the room beside the chat header, or all the prompt does not need; what is left of a cut
    completion carries no end-of-turn token, so that a model does not learn to stop there. A row
    without a response becomes a prompt without labels.

    Args:
        row: The row.
        tokenizer: Any Hugging Face tokenizer.
        max_length: Most tokens of prompt and completion together.

    Raises:
        DataError: The chat header leaves no room for a prompt token and a completion token.
    """
    prompt_ids = _ids(render_prompt(row.prompt, tokenizer), tokenizer)
    response = row.response.strip()
    completion = [*_ids(response, tokenizer), end_of_turn(tokenizer)] if response else []
    if len(prompt_ids) + len(completion) > max_length:
        prompt_ids, completion = _truncate(row, prompt_ids, completion, tokenizer, max_length)
    return Encoded(
        input_ids=prompt_ids + completion,
        labels=[IGNORED] * len(prompt_ids) + completion,
        prompt_length=len(prompt_ids),
        row=row,
    )


def _truncate(
    row: Row, prompt_ids: list[int], completion: list[int], tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    header = len(_ids(render_prompt("", tokenizer), tokenizer))
    room = max_length - header
    if room < 2:
        raise DataError(
            f"max_length {max_length} is too small: the chat template alone takes {header} "
            f"tokens. Use at least {header + 2}"
        )
    user_ids = _ids(row.prompt, tokenizer)
    completion = completion[: max(room - len(user_ids), room // 2)]
    keep = room - len(completion)
    # Text cut between tokens may be tokenised differently when rendered again, hence the loop; it
    # ends because an empty text leaves just the header, which fits.
    while len(prompt_ids) + len(completion) > max_length:
        # A cut inside a multi-byte character leaves a replacement character in front.
        text = tokenizer.decode(user_ids[-keep:]).lstrip("\ufffd") if keep > 0 else ""
        prompt_ids = _ids(render_prompt(text, tokenizer), tokenizer)
        keep -= max(1, len(prompt_ids) + len(completion) - max_length)
    return prompt_ids, completion


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokenise rows with `encode`."""
    return [encode(row, tokenizer, max_length) for row in rows]
