"""The NLL in chunks against the plain one: values, gradients, and the logits that are kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sst_lightning.modules.head_nll import CHUNK, token_nll

POSITIONS, WIDTH, VOCABULARY = 2 * CHUNK + 7, 8, 300


def inputs(dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=dtype)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    weights = torch.randn(POSITIONS, generator=generator)
    return head, hidden.requires_grad_(requires_grad), targets, weights


def plain(head, hidden, targets):
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_loss(dtype):
    head, hidden, targets, weights = inputs(dtype)
    expected, found = plain(head, hidden, targets), token_nll(head, hidden, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad((weights * expected).sum(), hidden)
    (gradient,) = torch.autograd.grad((weights * found).sum(), hidden)
    assert gradient.dtype == dtype
    # The factors are multiplied in after rounding, not before.
    close = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (3e-2, 2e-2)}[dtype]
    torch.testing.assert_close(gradient, wanted, rtol=close[0], atol=close[1])


def test_without_gradients_too():
    head, hidden, targets, _ = inputs(torch.float32, requires_grad=False)
    with torch.no_grad():
        found = token_nll(head, hidden, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain(head, hidden, targets))


def test_a_trained_head_gets_its_gradient():
    head, hidden, targets, weights = inputs(torch.float32)
    head.weight.requires_grad_()
    pair = hidden, head.weight
    expected = torch.autograd.grad((weights * plain(head, hidden, targets)).sum(), pair)
    found = torch.autograd.grad((weights * token_nll(head, hidden, targets)).sum(), pair)
    torch.testing.assert_close(found, expected)


def test_no_positions_have_no_loss():
    head, hidden, targets, _ = inputs(torch.float32)
    nll = token_nll(head, hidden[:0], targets[:0])
    assert nll.shape == (0,)
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    assert not gradient.any()
    with torch.no_grad():
        assert token_nll(head, hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_logits_of_a_chunk_at_a_time(requires_grad):
    head, hidden, targets, _ = inputs(torch.float32, requires_grad)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        token_nll(head, hidden, targets)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    logits = 4 * CHUNK * VOCABULARY
    assert logits < highest < 3.5 * logits < 2 * 4 * POSITIONS * VOCABULARY
