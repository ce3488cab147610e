"""Oracle: the folder that PEFT itself writes."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.modules.live_adapter import live_adapter
from sst_lightning.modules.supervised import SupervisedLoRA
from tests.nano import save_nano


@pytest.fixture
def module(tmp_path):
    module = SupervisedLoRA(str(save_nano(tmp_path / "nano")), r=3, lora_alpha=5, use_rslora=True)
    module.configure_model()
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return module


def test_live_adapter_is_the_saved_one(module, tmp_path):
    module.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    saved = LoraAdapter.load(tmp_path / "adapter")
    live = live_adapter(module.model, module.base)
    assert set(live.factors) == set(saved.factors)
    assert len(live.factors) == 14
    assert live.fingerprint == saved.fingerprint


def test_live_adapter_does_not_change_with_training(module):
    live = live_adapter(module.model)
    before = live.factors["model.layers.1.mlp.up_proj"].A.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(live.factors["model.layers.1.mlp.up_proj"].A, before)


def test_fisher_during_training_is_taken_at_the_training_point(module):
    module.core_space().check(live_adapter(module.model))
    metadata = module.fisher_metadata("training")
    assert metadata["adapter_fingerprints"] == [live_adapter(module.model).fingerprint]
    module.move_to_point("training")
    with pytest.raises(MisconfigurationException, match="'training', not 'safety'"):
        module.move_to_point("safety")
