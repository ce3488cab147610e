"""Which strategies a stage accepts, without starting a process."""

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sst_lightning.modules.strategies import FullyShardedStrategy, check_strategy
from sst_lightning.modules.trainer import SSTTrainer

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "merge", "compare"])
def test_one_device_and_ddp_run_every_stage(stage):
    check_strategy(SSTTrainer(devices=1, **QUIET).strategy, stage)
    check_strategy(SSTTrainer(devices=2, strategy="ddp", **QUIET).strategy, stage)
    check_strategy(SSTTrainer(devices=2, **QUIET).strategy, stage)


@pytest.mark.parametrize(
    "name", ["ddp_spawn", "ddp_fork", "deepspeed", "fsdp_cpu_offload", "nothing"]
)
def test_a_name_that_is_not_supported(name):
    with pytest.raises(MisconfigurationException, match=f"{name} is not supported. Use ddp"):
        SSTTrainer(devices=2, strategy=name, **QUIET)


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy])
def test_an_object_that_is_not_supported(kind):
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} is not supported"):
        check_strategy(kind(), "fit")


def test_fsdp_is_fsdp2_for_training_and_fishers():
    strategy = SSTTrainer(devices=2, strategy="fsdp", **QUIET).strategy
    assert isinstance(strategy, FullyShardedStrategy)
    check_strategy(strategy, "fit")
    check_strategy(strategy, "validate")
    for stage in ("test", "merge", "compare"):
        with pytest.raises(MisconfigurationException, match=f"fsdp: {stage} generates"):
            check_strategy(strategy, stage)
