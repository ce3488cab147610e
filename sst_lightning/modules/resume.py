"""Exact resumption inside an epoch: what Lightning's own checkpoint leaves open.

A checkpoint has no accumulated gradients, so one written between two optimizer steps (by
``save_on_exception`` after Ctrl-C) is set back to the last step. And Lightning hands its data
loader the saved position only if the loader does not exist yet, but a module that asks for
``trainer.estimated_stepping_batches`` has made it exist: the position is handed over here.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def rewind_to_optimizer_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make a checkpoint's position in the epoch that of its last optimizer step.

    Args:
        checkpoint: as Lightning is about to write it; changed in place.
        trainer: the Trainer in its fit loop.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop["epoch_loop.batch_progress"]
    processed = progress["current"]["processed"]
    last = processed >= trainer.num_training_batches
    extra = 0 if last else processed % trainer.accumulate_grad_batches
    if extra:
        for counters in (progress["current"], progress["total"]):
            end = counters["processed"] - extra
            counters.update(ready=end, started=end, processed=end, completed=end)
        # Lightning adds one to it when it restarts at an optimizer step.
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        loader["batches"] = processed - extra


def restore_position(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Hand the training data loader the position it had when ``checkpoint`` was written.

    Call it when training starts, before the first batch is fetched.

    Raises:
        MisconfigurationException: the checkpoint lies inside an epoch, and the loader cannot skip
            the batches before it.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    states = fit_loop["state_dict"].get("combined_loader", [])
    loader: Any = trainer.train_dataloader
    if len(states) == 1 and hasattr(loader, "load_state_dict"):
        loader.load_state_dict(states[0])
        return
    done = fit_loop["epoch_loop.batch_progress"]["current"]["processed"]
    if 0 < done < trainer.num_training_batches:
        raise MisconfigurationException(
            f"the checkpoint was written after {done} of {trainer.num_training_batches} batches of "
            "an epoch, and the training data loader cannot be resumed there: use "
            "sst_lightning.data.resumable.ResumableLoader, or a checkpoint of an epoch's end"
        )


def use_learning_rate(
    optimizer: dict[str, Any], scheduler: dict[str, Any], learning_rate: float, weight_decay: float
) -> None:
    """Let a checkpoint's optimizer go on with another peak learning rate, at its place in the decay.

    Without this the checkpoint's would win, and a run that ended in a loss that is not finite would
    end there again whatever learning rate is given.

    Args:
        optimizer: state of AdamW in a checkpoint; changed in place.
        scheduler: state of its LambdaLR; changed in place.
        learning_rate: peak learning rate from here on.
        weight_decay: weight decay from here on.
    """
    for group in optimizer["param_groups"]:
        old = group["initial_lr"]
        if old != learning_rate:
            rank_zero_info(
                f"learning_rate {learning_rate:g} in the place of the checkpoint's {old:g}"
            )
            group["lr"] *= learning_rate / old
            group["initial_lr"] = learning_rate
        group["weight_decay"] = weight_decay
    scheduler["base_lrs"] = [learning_rate for _ in scheduler["base_lrs"]]
    scheduler["_last_lr"] = [group["lr"] for group in optimizer["param_groups"]]
