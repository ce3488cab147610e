"""Checkpoints that ``fit`` is continued from."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from sst_lightning.algebra.files import disk_is_full
from sst_lightning.modules.interruption import Interrupted


class FitCheckpoint(ModelCheckpoint):
    """Saves every few optimizer steps, and when ``fit`` is interrupted: a kill costs those few steps.

    ``last.ckpt`` (``--ckpt_path last``) and ``epoch=…-step=….ckpt`` hold the same state, one written
    after the other, so that at any time one of them is whole.

    Unlike ``ModelCheckpoint(save_on_exception=True)`` it saves on an exception only a state that
    training can be continued from: never after a loss that is not finite, in the middle of an
    optimizer step, or before this run has made one; and with several processes only after
    a signal, because saving waits for all processes and one that failed is not there.

    Args:
        dirpath: folder of the checkpoints; the logger's when not given.
        every_n_train_steps: optimizer steps between two checkpoints.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 20) -> None:
        super().__init__(
            dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=1,
            save_on_exception=True,
        )
        self._stepping_from: int | None = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the step: until it is counted, weights and optimizer may be halfway through it."""
        self._stepping_from = trainer.global_step

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the state before ``exception``, where that is one to continue from."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._can_save(trainer, exception):
            candidates = self._monitor_candidates(trainer)
            try:
                self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)
            except (OSError, ValueError, ArithmeticError) as error:
                # It must not hide what ended the run.
                rank_zero_warn(f"no checkpoint of this moment could be saved: {error}")
        if self.last_model_path:
            rank_zero_info(f"fit stopped; --ckpt_path {self.last_model_path} continues it")

    def _can_save(self, trainer: Trainer, exception: BaseException) -> bool:
        if trainer.world_size > 1 and not isinstance(exception, Interrupted):
            return False
        if isinstance(exception, ArithmeticError | KeyboardInterrupt) or disk_is_full(exception):
            return False
        stepped = self._stepping_from is not None and trainer.global_step > self._stepping_from
        return stepped and self._last_global_step_saved != trainer.global_step
