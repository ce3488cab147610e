"""A two-layer Llama and a character tokenizer built in code, so that tests need no download.

folder = save_nano(tmp_path / "nano")
model, tokenizer = load_backbone(str(folder)), load_tokenizer(str(folder))
"""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}

# ChatML, as SmolLM2 and Qwen use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def nano_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """One token per ASCII character; ``<|im_end|>`` is end-of-turn, eos and pad (as in SmolLM2)."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def nano_config(**overrides: object) -> LlamaConfig:
    """Two layers, width 32, four query heads on two key-value heads, ~100 tokens."""
    options = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": VOCABULARY["<|im_start|>"],
        "eos_token_id": VOCABULARY["<|im_end|>"],
        "pad_token_id": VOCABULARY["<|im_end|>"],
    }
    return LlamaConfig(**{**options, **overrides})


def nano_model(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """Random fp32 weights, the same for the same ``seed``; the caller's random state is kept.

    The weights are five times wider than a fresh Llama's, whose logits hardly depend on its input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(nano_config(initializer_range=0.1, **overrides))
    return model.eval()


def save_nano(folder: str | Path, seed: int = 0, **overrides: object) -> Path:
    """Write model and tokenizer to ``folder``, where ``load_backbone(str(folder))`` reads them."""
    folder = Path(folder)
    nano_model(seed, **overrides).save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    return folder


def random_batch(
    lengths: list[tuple[int, int]], seed: int = 0, rows: list[object] | None = None
) -> dict[str, object]:
    """A batch as ``sst_lightning.data.batching.collate`` makes it, of random characters.

    Args:
        lengths: (prompt tokens, completion tokens) of each sequence.
        seed: seed of the tokens.
        rows: ``Row`` objects to carry along.
    """
    generator = torch.Generator().manual_seed(seed)
    pad = VOCABULARY["<|im_end|>"]
    total = max(prompt + completion for prompt, completion in lengths)
    longest = max(prompt for prompt, _ in lengths)
    batch: dict[str, Tensor] = {
        "input_ids": torch.full((len(lengths), total), pad),
        "attention_mask": torch.zeros(len(lengths), total, dtype=torch.long),
        "labels": torch.full((len(lengths), total), -100),
        "prompt_ids": torch.full((len(lengths), longest), pad),
        "prompt_mask": torch.zeros(len(lengths), longest, dtype=torch.long),
    }
    for n, (prompt, completion) in enumerate(lengths):
        end = prompt + completion
        ids = torch.randint(len(SPECIAL), len(VOCABULARY), (end,), generator=generator)
        batch["input_ids"][n, :end] = ids
        batch["attention_mask"][n, :end] = 1
        batch["labels"][n, prompt:end] = ids[prompt:]
        batch["prompt_ids"][n, longest - prompt :] = ids[:prompt]
        batch["prompt_mask"][n, longest - prompt :] = 1
    return {**batch, "rows": list(rows) if rows is not None else [None] * len(lengths)}
