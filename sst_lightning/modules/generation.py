"""The one way this project generates: greedily, until the end of the turn."""

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

# End-of-turn tokens of the chat formats in use; a base that ends its turns with one of these may
# name another token as end of sequence (Llama 3.1: <|eot_id|> against <|end_of_text|>).
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|endoftext|>")


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return the ids that end an answer: the tokenizer's, the model's and known chat formats'."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    special = tokenizer.get_vocab()
    ids.update(special[token] for token in END_OF_TURN if token in special)
    return sorted(token for token in ids if token is not None)


def prepare_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make ``model.generate`` greedy, and its prefill fast.

    A base's own generation defaults fill whatever a call leaves open: temperature and top-p are
    ignored by greedy search, but a repetition penalty (Qwen 2.5: 1.05) would change its answers.
    """
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop_tokens(tokenizer, model),
        pad_token_id=tokenizer.pad_token_id,
    )
    # generate() gives the head a strided slice, the last position of each prompt, for which torch
    # copies the head's weight once per sequence: the prefill took twice the time (3.4 against 1.6
    # seconds for 16 prompts of SmolLM2).
    model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)


def can_hide(cache: Cache) -> bool:
    """Whether tokens in the cache can be hidden by a mask, as if they had never been read.

    Not where they have pushed others out (sliding windows) or changed a recurrent state.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def continue_greedily(
    model: PreTrainedModel,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    first: Tensor,
    cache: Cache,
    max_new_tokens: int,
) -> Tensor:
    """Answer prompts whose keys and values are in a cache already.

    Args:
        model: prepared by :func:`prepare_generation`.
        input_ids: (B, T) what the cache was filled with, prompts first; the rest is hidden.
        prompt_lengths: (B,) tokens of each prompt.
        first: (B, 1) first token of each answer.
        cache: keys and values of ``input_ids`` (see :func:`can_hide`); extended in place.
        max_new_tokens: upper bound on the length of an answer, in tokens.

    Returns:
        (B, ≤ max_new_tokens) tokens of the answers, padded on the right.
    """
    config = model.generation_config
    assert config is not None, "prepare_generation has not run"
    answers = first
    if max_new_tokens > 1:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        prompt = (positions < prompt_lengths[:, None]).long()
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.cat([input_ids, first], dim=1),
            attention_mask=torch.cat([prompt, torch.ones_like(first)], dim=1),
            past_key_values=cache,
            max_new_tokens=max_new_tokens - 1,
        )
        answers = output[:, input_ids.shape[1] :]
    # generate() does not know that a first token may have ended the answer.
    ended = torch.isin(first, torch.tensor(config.eos_token_id, device=first.device))
    answers[:, 1:][ended.expand(-1, answers.shape[1] - 1)] = config.pad_token_id
    return answers


def _contiguous_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
