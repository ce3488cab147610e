"""Oracles: AdamW written out, an uninterrupted run, and the checkpoint file itself."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sst_lightning.modules.optimizer import check_optimizer, make_optimizer
from tests.modules.test_supervised import loader, module_for, trainer_for
from tests.nano import save_nano

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LARGE, SMALL = (64, 80), (8, 16)
"""More and fewer than the 4,096 elements from which on bitsandbytes keeps 8 bits."""


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


@pytest.mark.parametrize(
    ("name", "fused", "bits"),
    [("adamw", False, 32), ("adamw", True, 32), ("adamw_8bit", False, 8)],
)
def test_steps_are_those_of_adamw_and_the_state_has_its_size(name, fused, bits):
    """A matrix that is quantised and one that is not, against the update written out."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in (LARGE, SMALL)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = make_optimizer(name, parameters, 1e-2, weight_decay=0.1, fused=fused)
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(1, 4):
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            update = first[index] / (1 - 0.9**step)
            scale = (second[index] / (1 - 0.999**step)).sqrt() + 1e-8
            weights[index] = weights[index] * (1 - 1e-2 * 0.1) - 1e-2 * update / scale
        optimizer.step()
    # An 8-bit moment is off by some percent of its block's largest value.
    tolerance = 1e-6 if bits == 32 else 5e-3
    assert (parameters[0] - weights[0]).square().mean().sqrt() < tolerance
    torch.testing.assert_close(parameters[1].data, weights[1], rtol=1e-4, atol=1e-6)
    kept = {tuple(p.shape): optimizer.state[p] for p in parameters}
    moments = {
        shape: next(v for key, v in state.items() if key in ("exp_avg", "state1"))
        for shape, state in kept.items()
    }
    assert moments[LARGE].element_size() == bits // 8
    assert moments[SMALL].element_size() == 4


@pytest.mark.parametrize(("scaler", "fused"), [(None, True), (object(), False)])
def test_adamw_is_fused_unless_gradients_are_scaled(nano, scaler, fused):
    """With a scaler Lightning refuses to clip the gradients of a fused optimizer."""
    module = module_for(nano)
    module.configure_model()
    trainer = SimpleNamespace(estimated_stepping_batches=4, scaler=scaler)
    module.__dict__["_trainer"] = trainer
    configured = module.configure_optimizers()
    assert configured["optimizer"].defaults["fused"] is fused


def test_the_qlora_optimizer_is_paged():
    from bitsandbytes import optim

    optimizer = make_optimizer("paged_adamw_8bit", [torch.nn.Parameter(torch.zeros(2))], 1e-3, 0.0)
    assert isinstance(optimizer, optim.PagedAdamW8bit)
    assert optimizer.is_paged


def test_what_cannot_run_here_is_refused_with_a_remedy(nano, monkeypatch):
    for name in ("adamw", "adamw_8bit"):
        check_optimizer(name, CPU)
    check_optimizer("paged_adamw_8bit", CUDA)
    check_optimizer("adamw", CUDA, sharded=True)
    with pytest.raises(MisconfigurationException, match=r"fsdp.*model\.optimizer: adamw"):
        check_optimizer("paged_adamw_8bit", CUDA, sharded=True)
    module = module_for(nano, optimizer="paged_adamw_8bit")
    with pytest.raises(MisconfigurationException, match=r"CUDA.*model\.optimizer: adamw"):
        trainer_for().fit(module, loader())
    assert module.model is None  # nothing was loaded
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pip install bitsandbytes"):
        check_optimizer("adamw_8bit", CPU)


def fit(nano, path, checkpoint=None, epochs=2, **options):
    """Train on a 4-bit base with r large enough for 8-bit states; returns the trained weights."""
    seed_everything(1, verbose=False)
    options = {"r": 128, "quantization": "nf4", "optimizer": "adamw_8bit", **options}
    module = module_for(nano, **options)
    trainer = trainer_for(max_epochs=epochs)
    trainer.fit(module, loader(), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(path)
    return [p for p in module.parameters() if p.requires_grad]


def test_resumed_qlora_run_is_the_uninterrupted_one(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sst_lightning.modules.supervised.warmup_then_decay", lambda *args: lambda step: 1.0
    )
    whole = fit(nano, tmp_path / "whole.ckpt")
    fit(nano, tmp_path / "half.ckpt", epochs=1)
    resumed = fit(nano, tmp_path / "resumed.ckpt", tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert "uint8" in str(state[0])
    with pytest.raises(MisconfigurationException, match=r"resume with .*: adamw_8bit"):
        fit(nano, tmp_path / "no.ckpt", tmp_path / "half.ckpt", optimizer="adamw")
