"""One pass over a batch in which tokens that sequences have in common are computed once."""

from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class PrefixTree(NamedTuple):
    """The distinct prefixes of a batch of B sequences of up to T tokens, N in all, as one sequence.

    Attributes:
        input_ids: (1, N) last token of each prefix; a prefix comes after its own prefixes.
        position_ids: (1, N) its position.
        ancestors: (N, N) bool; row i is true at the prefixes of prefix i and at itself.
        nodes: (B, T) which prefix each position is the end of; without meaning on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    ancestors: Tensor
    nodes: Tensor


def prefix_tree(input_ids: Tensor, attention_mask: Tensor) -> PrefixTree:
    """Find the distinct prefixes of sequences that are padded on the right.

    In causal attention what is computed at a position depends on the tokens up to it. So sequences
    that begin alike (with a chat template's header, with the same document) have equal states there,
    and their gradients add up.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T) 1 on tokens, 0 on padding.
    """
    real = attention_mask.bool()
    rows, width = input_ids.shape
    equal = (input_ids[:, None] == input_ids[None]) & real[:, None] & real[None]
    # argmax gives the first of equal values: the first sequence with the same tokens up to here.
    first = equal.long().cumprod(2).argmax(1)
    row = torch.arange(rows, device=input_ids.device)[:, None]
    own = real & (first == row)
    sequence, position = own.nonzero(as_tuple=True)
    numbers = (own.flatten().long().cumsum(0) - 1).view(rows, width)
    ancestors = (first[sequence][:, position] == sequence) & (position <= position[:, None])
    return PrefixTree(
        input_ids=input_ids[own][None],
        position_ids=position[None],
        ancestors=ancestors,
        nodes=numbers.gather(0, first),
    )


def takes_less_memory(tree: PrefixTree, model: PreTrainedModel) -> bool:
    """Tell whether the activations of a tree are fewer than those of its padded batch.

    A layer keeps about 34 bytes per token and width, and 5 per pair of positions and head (Korthikanti
    et al. 2022, "Reducing activation recomputation in large transformer models", for attention that is
    not fused). The tree has fewer tokens and more pairs: every prefix with every other. Work per
    token and per pair is in favour of the tree, so where it takes less memory it is also faster.
    """
    config = model.config.get_text_config()
    rows, width = tree.nodes.shape
    nodes = tree.input_ids.shape[1]
    saved = (rows * width - nodes) * 34 * config.hidden_size
    return saved > (nodes**2 - rows * width**2) * 5 * config.num_attention_heads


def tree_states(model: PreTrainedModel, tree: PrefixTree) -> Tensor:
    """Return the last hidden state of each prefix (1, N, width)."""
    allowed = tree.ancestors[None, None]
    # Eager attention adds its mask to the scores; sdpa takes such a mask as well.
    mask = torch.zeros_like(allowed, dtype=model.dtype)
    mask = mask.masked_fill(~allowed, torch.finfo(model.dtype).min)
    states: Tensor = model.get_decoder()(
        input_ids=tree.input_ids,
        position_ids=tree.position_ids,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return states


@torch.no_grad()
def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Tell whether the states of a tree are those of its sequences.

    They are in models whose layers all attend to all earlier positions and that take masks and
    positions as they are given: not with sliding windows, recurrent layers, dropout (which would hit
    sequences together) or flash attention. What the configuration does not say shows in a small tree.
    """
    config = model.config.get_text_config()
    # Not that of an adapter, which is in its place already and which the caller knows of.
    drops = any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.get_decoder().modules()
    )
    if (
        not model._supports_attention_backend
        or model._is_stateful
        or "position_ids" not in signature(model.get_decoder().forward).parameters
        or config._attn_implementation not in ("eager", "sdpa")
        or getattr(config, "sliding_window", None) is not None
        or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
        or bool(getattr(config, "attention_dropout", 0))
        or drops
    ):
        return False
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 1, 0]], device=model.device)
    mask = torch.ones_like(ids)
    mask[2, 3] = 0
    plain = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    expected = plain.last_hidden_state[mask.bool()].float()
    tree = prefix_tree(ids, mask)
    found = tree_states(model, tree)[0, tree.nodes[mask.bool()]].float()
    return torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
