"""Oracles: prefixes as tuples in a set, and the pass over the padded batch."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sst_lightning.modules.prefix_tree import can_share_prefixes, prefix_tree
from sst_lightning.modules.supervised import SupervisedLoRA
from tests.nano import nano_model, random_batch, save_nano

HEADER = 12
ROWS = {
    "branches": [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 3, 4], [5, 6, 9, 9]],
    "equal rows": [[1, 2, 3], [1, 2, 3]],
    "one row is a prefix of another": [[1, 2], [1, 2, 3], [4]],
    "nothing in common": [[1, 2, 3], [2, 2, 3, 3]],
    "padding is a token too": [[0, 0], [0, 0, 0], [0]],
}


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_each_distinct_prefix_is_one_node(rows):
    tree = prefix_tree(*padded(rows))
    prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
    assert tree.input_ids.shape == tree.position_ids.shape == (1, len(prefixes))
    for row, nodes in zip(rows, tree.nodes, strict=True):
        for end in range(len(row)):
            path = tree.ancestors[nodes[end]]
            assert tree.input_ids[0, path].tolist() == row[: end + 1]
            assert tree.position_ids[0, path].tolist() == list(range(end + 1))
            assert not path[nodes[end] + 1 :].any()


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


def trained(nano, **options):
    """A module whose adapter is no longer zero, and the widths of what its decoder reads."""
    module = SupervisedLoRA(nano, **{"dtype": "float32", "r": 4} | options)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(module):
        parameter.data.normal_(std=0.1, generator=generator)
    shapes = []
    embedding = module.language_model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return module, shapes


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def header_batch(lengths, header=HEADER):
    """Random rows that begin with the same ``header`` tokens, without labels there."""
    batch = random_batch([(prompt + header, completion) for prompt, completion in lengths])
    batch["input_ids"][:, :header] = batch["input_ids"][:1, :header]
    return batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_padded_batch(
    nano, attention, gradient_checkpointing
):
    module, shapes = trained(
        nano, attention=attention, gradient_checkpointing=gradient_checkpointing
    )
    batch = header_batch([(2, 3), (1, 7), (4, 2)])
    results = []
    for pass_ in (module.sequence_nll, module.training_nll):
        nll, tokens = pass_(batch)
        gradients = torch.autograd.grad((nll * torch.tensor([1, 2, 3])).sum(), trainable(module))
        results.append((nll, tokens, gradients))
    assert shapes == [(3, 20), (1, HEADER + 5 + 8 + 6)]
    (nll, tokens, expected), (shared, shared_tokens, found) = results
    torch.testing.assert_close(shared, nll)
    assert torch.equal(shared_tokens, tokens)
    largest = max(gradient.abs().max() for gradient in expected)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6 * float(largest))


def test_rows_are_read_apart_where_that_takes_less_memory_or_dropout_is_on(nano):
    long = header_batch([(60, 3), (60, 3), (60, 3)], header=1)
    for options, batch in (({}, long), ({"dropout": 0.1}, header_batch([(2, 3), (1, 7)]))):
        module, shapes = trained(nano, **options)
        module.training_nll(batch)
        assert shapes == [tuple(batch["input_ids"].shape)]


def small(config_class, **options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2}
    return config_class(**{**sizes, "num_hidden_layers": 2, "intermediate_size": 24} | options)


def test_models_that_do_more_than_attend_to_what_they_are_told_are_left_alone():
    assert can_share_prefixes(nano_model())
    assert not can_share_prefixes(nano_model(attention_dropout=0.1))
    window = small(MistralConfig, num_key_value_heads=2, sliding_window=4)
    assert not can_share_prefixes(MistralForCausalLM(window).eval())
    dropout = small(GPT2Config, n_embd=16, n_head=2, resid_pdrop=1e-6, attn_pdrop=0, embd_pdrop=0)
    assert not can_share_prefixes(GPT2LMHeadModel(dropout).eval())
    assert not can_share_prefixes(BloomForCausalLM(small(BloomConfig)).eval())
    recurrent = small(JambaConfig, num_key_value_heads=2, use_mamba_kernels=False, num_experts=2)
    assert not can_share_prefixes(JambaForCausalLM(recurrent).eval())


def test_a_model_that_ignores_the_mask_shows_in_a_small_tree(monkeypatch):
    model = nano_model()
    decoder = model.get_decoder()
    forward = type(decoder).forward

    def without_mask(self, input_ids, position_ids=None, attention_mask=None, use_cache=None):
        del attention_mask
        return forward(self, input_ids, position_ids=position_ids, use_cache=use_cache)

    assert can_share_prefixes(model)
    monkeypatch.setattr(type(decoder), "forward", without_mask)
    assert not can_share_prefixes(model)
