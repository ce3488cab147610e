import pytest
import torch

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import AdapterError
from sst_lightning.modules.core_hooks import (
    CoreGradientCapture,
    CoreInjector,
    EmbeddingLeaf,
    GradientCapture,
    InjectedCapture,
    target_modules,
)
from tests.adapters import random_adapter
from tests.nano import nano_model, random_batch


@pytest.fixture
def parts():
    model = nano_model().requires_grad_(False)
    adapters = [random_adapter(model, rank=rank, seed=rank) for rank in (2, 3)]
    return model, adapters, CoreSpace.from_adapters(adapters)


def summed_nll(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    return nll.sum(1)


def test_injected_core_gives_the_logits_of_weights_with_delta_added(parts):
    model, adapters, space = parts
    batch = random_batch([(5, 4), (3, 2)])
    injector = CoreInjector(model, space)
    injector.set(space.encode(adapters[0]))
    injected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    injector.remove()
    for name, factors in adapters[0].factors.items():
        model.get_submodule(name).weight.data += factors.delta().float()
    dense = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(injected, dense, rtol=1e-4, atol=1e-4)


def test_none_is_the_bare_base_model(parts):
    model, adapters, space = parts
    batch = random_batch([(4, 2)])
    before = model(batch["input_ids"]).logits
    injector = CoreInjector(model, space)
    injector.set(space.encode(adapters[1]))
    assert not torch.allclose(model(batch["input_ids"]).logits, before)
    injector.set(None)
    assert torch.equal(model(batch["input_ids"]).logits, before)


@pytest.mark.parametrize("lengths", [[(5, 4), (3, 6), (7, 1)], [(5, 4), (3, 6), (7, 2)]])
@pytest.mark.parametrize("at_base", [False, True])
@pytest.mark.parametrize("injected", [False, True])
def test_gradients_equal_autograd_of_an_explicit_core(parts, injected, at_base, lengths):
    """The oracle puts each core into the forward pass as a parameter, one sequence at a time."""
    model, adapters, space = parts
    batch = random_batch(lengths)
    point = space.encode(adapters[0])
    if at_base:
        point = {name: torch.zeros_like(core) for name, core in point.items()}
    injector = CoreInjector(model, space)
    injector.set(None if at_base else point)
    gradients: dict[str, torch.Tensor] = {}

    def receive(name, inputs, outputs):
        gradients[name] = torch.einsum("btp,btq->bpq", outputs, inputs)

    capture: GradientCapture = (
        InjectedCapture(injector, receive)
        if injected
        else CoreGradientCapture(model, space, receive)
    )
    leaf = EmbeddingLeaf(model)
    capture.start(batch["attention_mask"])
    torch.autograd.grad(summed_nll(model, batch).sum(), leaf.output)
    for part in (capture, leaf, injector):
        part.remove()
    assert all(parameter.grad is None for parameter in model.parameters())

    cores = {name: core.float().requires_grad_(True) for name, core in point.items()}
    handles = []
    for name, module in target_modules(model, space.bases).items():
        basis, core = space.bases[name], cores[name]

        def hook(module, inputs, output, basis=basis, core=core):
            return output + inputs[0] @ basis.q_in @ core.T @ basis.q_out.T

        handles.append(module.register_forward_hook(hook))
    for n in range(3):
        length = int(batch["attention_mask"][n].sum())
        alone = {
            key: batch[key][n : n + 1, :length] for key in ("input_ids", "attention_mask", "labels")
        }
        expected = torch.autograd.grad(summed_nll(model, alone).sum(), list(cores.values()))
        for name, gradient in zip(cores, expected, strict=True):
            torch.testing.assert_close(gradients[name][n], gradient, rtol=1e-3, atol=1e-4)


def test_unknown_module_is_named(parts):
    model = parts[0]
    with pytest.raises(AdapterError, match=r"model\.layers\.7\.self_attn\.q_proj"):
        target_modules(model, ["model.layers.7.self_attn.q_proj"])


def test_cores_of_another_space_are_refused(parts):
    model, adapters, space = parts
    injector = CoreInjector(model, space)
    cores = space.encode(adapters[0])
    cores.pop(next(iter(cores)))
    with pytest.raises(AdapterError, match="one core for each module"):
        injector.set(cores)


def test_a_stopped_capture_sees_and_changes_nothing(parts):
    model, _, space = parts
    batch = random_batch([(4, 2)])
    injector = CoreInjector(model, space)
    bare = model(batch["input_ids"]).logits
    seen = []
    capture, leaf = (
        InjectedCapture(injector, lambda *parts: seen.append(parts)),
        EmbeddingLeaf(model),
    )
    capture.start(batch["attention_mask"])
    assert torch.equal(model(batch["input_ids"]).logits, bare)
    capture.stop()
    torch.autograd.grad(model(batch["input_ids"]).logits.sum(), leaf.output)
    assert seen == []
    assert torch.equal(model(batch["input_ids"]).logits, bare)
