"""Which of Lightning's strategies each stage can run under, and sharded training (FSDP2)."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import override

NAMES = (
    *("auto", "fsdp", "ddp", "ddp_find_unused_parameters_true"),
    "ddp_find_unused_parameters_false",
)
"""Strategies that may be asked for by name; others start processes that lose what callbacks hold,
or keep the weights in forms that adapters and Fishers are not taken from."""
SHARDED_STAGES = ("fit", "validate")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


class FullyShardedStrategy(ModelParallelStrategy):
    """``strategy: fsdp``: each process holds its share of every decoder layer (FSDP2).

    Lightning's ModelParallelStrategy with all processes in one data-parallel group, for models of
    which one GPU cannot hold the frozen weights. Checkpoints are the same single files as under
    other strategies: the trained weights alone, gathered on rank zero.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    @override
    def setup_environment(self) -> None:
        """Start the processes' group and its device mesh."""
        # Only now is the number of processes known.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained weights, in full; every process must call it."""
        assert self.lightning_module is not None
        return full_tensors(
            {name: p for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored as under other strategies, after the module's own checks."""
        return True

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> Any:
        """Read the file, in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each process its share of the trained weights."""
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on rank zero, as the optimizer of one process would give it."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        return _renamed(state, {name: n for n, name in enumerate(self._trained())}) if state else {}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its share of the optimizers' states."""
        assert self.model is not None
        names = dict(enumerate(self._trained()))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, _renamed(state, names), options=WHOLE)

    def _trained(self) -> list[str]:
        """Names of the trained weights, in the order in which the optimizer has them."""
        assert self.lightning_module is not None
        return [name for name, p in self.lightning_module.named_parameters() if p.requires_grad]


def _renamed(state: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """Return an optimizer's state with other keys of its parameters."""
    groups = [
        {**group, "params": [names[key] for key in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": groups,
    }


def named_strategy(strategy: str | Strategy) -> str | Strategy:
    """Return the strategy behind ``fsdp``; others as they are.

    Raises:
        MisconfigurationException: no stage can run under the strategy of this name.
    """
    if isinstance(strategy, str) and strategy not in NAMES:
        raise _unsupported(strategy)
    return FullyShardedStrategy() if strategy == "fsdp" else strategy


def check_strategy(strategy: Strategy, stage: str) -> None:
    """Refuse a strategy that a stage cannot run under.

    Args:
        strategy: the Trainer's.
        stage: ``fit``, ``validate``, ``test``, ``merge`` or ``compare``.

    Raises:
        MisconfigurationException: names strategy, stage and remedy.
    """
    if isinstance(strategy, FullyShardedStrategy):
        if stage not in SHARDED_STAGES:
            raise MisconfigurationException(
                f"trainer.strategy fsdp: {stage} generates answers of different lengths and swaps "
                "adapters in and out, which a sharded model cannot do. It is for fit and validate; "
                "use ddp or one device, for a base that does not fit with model.quantization: nf4"
            )
        return
    # Without a launcher something else (torchrun, SLURM) has started the processes.
    launcher = strategy.launcher
    started = launcher is None or isinstance(launcher, _SubprocessScriptLauncher)
    if not (isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and started):
        raise _unsupported(type(strategy).__name__ if started else type(launcher).__name__)


def _unsupported(name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"trainer.strategy: {name} is not supported. Use ddp (any stage), or fsdp for fit and "
        "validate of a base that does not fit on one GPU"
    )


def is_sharded(module: LightningModule) -> bool:
    """Whether the module's Trainer shards its model."""
    trainer = module._trainer
    return trainer is not None and isinstance(trainer.strategy, FullyShardedStrategy)


def shard(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the decoder layers of a model among the processes of a mesh.

    A layer is gathered while it computes. Embeddings, last norm and head, which are called on their
    own and may share a weight, stay whole in each process.

    Args:
        model: on the CPU: a layer at a time goes to the mesh's device.
        mesh: one-dimensional.
        device: this process's, where the rest of the model goes.

    Raises:
        MisconfigurationException: the model has no list of decoder layers, or trains something else.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise MisconfigurationException(
            f"trainer.strategy fsdp: {type(decoder).__name__} has no decoder layers that could be "
            "sharded; use ddp"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    inside = {p for layer in layers for p in layer.parameters()}
    outside = [n for n, p in model.named_parameters() if p.requires_grad and p not in inside]
    if outside:
        raise MisconfigurationException(
            f"trainer.strategy fsdp shards decoder layers alone, and '{outside[0]}' is trained outside "
            "of them: take it out of model.target_modules, or use ddp"
        )
    # With a common root the next layer is gathered while one computes.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - inside)
    model.to(device)  # type: ignore[arg-type]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor of a sharded one; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached whole tensors on the CPU; every process must call it."""
    return {name: full_tensor(tensor.detach()).cpu() for name, tensor in tensors.items()}
