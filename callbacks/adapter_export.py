"""Export of a trained adapter as a PEFT folder."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor

from sst_lightning.algebra.files import atomic_folder, refuse_overwrite
from sst_lightning.modules.backbone import identity
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.processes import on_rank_zero
from sst_lightning.modules.strategies import full_tensors

RECIPE_FILE = "training_recipe.json"
PACKAGES = ("torch", "lightning", "transformers", "peft")


class AdapterExport(Callback):
    """Writes the adapter as it is at the end of ``fit``.

    The folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT and
    whatever builds on it load, and ``training_recipe.json`` with what it was made from. It appears
    in one step; a run that is interrupted writes nothing, nor does ``fast_dev_run``.

    Args:
        path: the folder.
        overwrite: replace a folder that exists before the run.

    Example::

        Trainer(callbacks=[AdapterExport("runs/a7/adapter")]).fit(SupervisedLoRA(), Security())
        PeftModel.from_pretrained(base, "runs/a7/adapter")
    """

    def __init__(self, path: str, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.overwrite = overwrite

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to overwrite before any work.

        Raises:
            OutputExistsError: the folder has files in it and ``overwrite`` is false.
        """
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            refuse_overwrite(self.path, self.overwrite, "AdapterExport.overwrite: true")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is an adapter.

        Raises:
            MisconfigurationException: not a CausalLMModule, or its model is not a PEFT model.
        """
        if not (isinstance(pl_module, CausalLMModule) and isinstance(pl_module.model, PeftModel)):
            raise MisconfigurationException(
                f"AdapterExport needs a CausalLMModule whose model is a PEFT model, such as "
                f"SupervisedLoRA; {type(pl_module).__name__} is none"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on rank zero."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, CausalLMModule)
        model = pl_module.model
        assert isinstance(model, PeftModel)
        # Every process: of a sharded adapter each has a part.
        weights = full_tensors({name: p for name, p in model.named_parameters() if p.requires_grad})
        on_rank_zero(lambda: self._write(trainer, pl_module, model, weights), trainer)

    def _write(
        self,
        trainer: Trainer,
        pl_module: CausalLMModule,
        model: PeftModel,
        weights: dict[str, Tensor],
    ) -> None:
        recipe = _recipe(trainer, pl_module)
        with atomic_folder(self.path) as folder:
            # "auto" would ask the hub about the base's vocabulary; embeddings are never trained.
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
            # PEFT's model card is a form with nothing filled in.
            (folder / "README.md").unlink(missing_ok=True)
            (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(f"Adapter written to {self.path}")


def _recipe(trainer: Trainer, pl_module: CausalLMModule) -> dict[str, Any]:
    """Return what the adapter was made from, as plain JSON values."""
    hparams = dict(pl_module.hparams)
    data: Any = getattr(trainer, "datamodule", None)
    return {
        "base_model": identity(hparams["base"]) if "base" in hparams else None,
        "base_fingerprint": pl_module.base_fingerprint(),
        "module": type(pl_module).__name__,
        "hyperparameters": hparams,
        "data": None if data is None else type(data).__name__,
        "data_fingerprint": data.fingerprint("train") if hasattr(data, "fingerprint") else None,
        "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        "epochs": trainer.current_epoch,
        "optimizer_steps": trainer.global_step,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "metrics": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if bool(torch.isfinite(value))
        },
        "versions": {package: version(package) for package in PACKAGES},
    }
