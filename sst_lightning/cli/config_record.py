"""config.yaml beside the logs: the complete configuration of a run."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from sst_lightning.algebra.files import write_text


class ConfigRecord(SaveConfigCallback):
    """Writes ``config.yaml`` to the logger's folder when the work begins.

    Lightning's own callback writes it in ``setup``, before the model is loaded and the other
    callbacks have checked their outputs, without a logger into the current folder, and not in one
    step.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.already_saved or not trainer.loggers:
            return
        folder = trainer.log_dir  # a collective call
        if trainer.is_global_zero:
            assert folder is not None
            text = self.parser.dump(self.config, skip_none=False)
            write_text(Path(folder) / self.config_filename, text)
        self.already_saved = True
