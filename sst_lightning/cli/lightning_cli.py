"""The LightningCLI subclass behind fit, validate, test, merge and compare."""

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from callbacks import AdapterExport, FisherCollector
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import write_text
from sst_lightning.cli.config_record import ConfigRecord
from sst_lightning.cli.method_names import accept_method_names, complete_method_names
from sst_lightning.cli.shipped_configs import find_config, load_config
from sst_lightning.modules.adapter_evaluation import AdapterEvaluation
from sst_lightning.modules.backbone import resolve
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.optimizer import check_optimizer
from sst_lightning.modules.strategies import FullyShardedStrategy, check_strategy
from sst_lightning.modules.supervised import SupervisedLoRA
from sst_lightning.modules.trainer import SSTTrainer


class SSTCommandLine(LightningCLI):
    """LightningCLI with the ``merge`` and ``compare`` subcommands of :class:`SSTTrainer`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return each subcommand and the arguments of its Trainer method that are not flags."""
        return {
            **{key: value for key, value in LightningCLI.subcommands().items() if key != "predict"},
            "merge": {"model", "datamodule"},
            "compare": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is tokenised for the base model that the module loads."""
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")

    def before_fit(self) -> None:
        """Check what can be checked before Lightning writes anything."""
        self._check("fit")

    def before_validate(self) -> None:
        """Check what can be checked before Lightning writes anything."""
        self._check("validate")

    def before_test(self) -> None:
        """Check what can be checked before Lightning writes anything."""
        self._check("test")

    def after_merge(self) -> None:
        """Record the configuration with the results."""
        self._record(self._parsed().output)

    def after_compare(self) -> None:
        """Record the configuration with the results."""
        self._record(self._parsed().output)

    def after_validate(self) -> None:
        """Record the configuration with the Fisher files."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FisherCollector) and callback.output is not None:
                self._record(callback.output)

    def after_test(self) -> None:
        """Record the configuration with the results, where any are written."""
        if isinstance(self.model, AdapterEvaluation) and self.model.output is not None:
            self._record(self.model.output)

    def _parsed(self) -> Namespace:
        """Return the configuration of the subcommand that runs."""
        return self.config[self.config.subcommand]

    def _record(self, folder: str | Path) -> None:
        """Write ``config.yaml``, which runs the same again, to ``folder`` if anything was written."""
        if self.trainer.is_global_zero and Path(folder).is_dir():
            parser = self._parser(self.config.subcommand)
            text = parser.dump(self._parsed(), skip_none=False)
            write_text(Path(folder) / "config.yaml", text)

    def _check(self, stage: str) -> None:
        """Find the base, read the data and look at the callbacks' outputs.

        Trainer entry points open the loggers first, which creates files.

        Raises:
            SSTMergeError: the base or the data cannot be used, or an output exists.
            MisconfigurationException: the optimizer cannot run on the Trainer's device.
        """
        check_strategy(self.trainer.strategy, stage)
        if stage == "fit" and isinstance(self.model, SupervisedLoRA):
            strategy = self.trainer.strategy
            sharded = isinstance(strategy, FullyShardedStrategy)
            check_optimizer(self.model.optimizer, strategy.root_device, sharded)
        resolve(self.model.base)
        self.datamodule.prepare_data()
        self.datamodule.setup(stage)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FisherCollector):
                callback.check(self.trainer, self.model, self.datamodule, stage)
            elif isinstance(callback, AdapterExport):
                callback.setup(self.trainer, self.model, stage)

    def _parse_ckpt_path(self) -> None:
        """Let the YAML and the command line win over hyperparameters stored in a checkpoint."""


class ParsedCommandLine(SSTCommandLine):
    """The same, parsed and checked; nothing is made and nothing runs."""

    def _set_seed(self) -> None:
        """Leave random states alone."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    @property
    def parsed(self) -> Namespace:
        """The configuration of the subcommand, with all defaults."""
        return self._parsed()


Line = TypeVar("Line", bound=SSTCommandLine)


def run_lightning(
    arguments: Sequence[str],
    kind: type[Line] = SSTCommandLine,  # type: ignore[assignment]
) -> Line:
    """Parse ``arguments`` and run the subcommand.

    A ``--config`` that is not a file here but is the name of a shipped one means the shipped one,
    so that ``--config configs/a5_repliqa.yaml`` works outside a checkout.
    """
    # Strategies that start processes start them with the command line that is in sys.argv.
    saved, sys.argv = sys.argv, [sys.argv[0], *arguments]
    _quiet()
    accept_method_names()
    try:
        return kind(
            CausalLMModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=SSTTrainer,
            # FisherCollector takes gradients in validation.
            trainer_defaults={"inference_mode": False},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=ConfigRecord,
            args=complete_method_names(inline_suites(_shipped(arguments))),
        )
    finally:
        sys.argv = saved


def _shipped(arguments: Sequence[str]) -> list[str]:
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in ("--config", "-c"):
            argument = find_config(argument)
        elif argument.startswith("--config="):
            argument = "--config=" + find_config(argument.removeprefix("--config="))
        result.append(argument)
    return result


def inline_suites(arguments: Sequence[str]) -> list[str]:
    """Let ``--suites FILE`` of merge and compare be a configuration of ``test``, of its data alone.

    Raises:
        SSTMergeError: the file is missing, or has no data.
    """
    result: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        path = value if name == "--suites" and equals else argument
        is_value = bool(equals) if name == "--suites" else result[-1:] == ["--suites"]
        if not is_value or not path.endswith((".yaml", ".yml")):
            result.append(argument)
            continue
        content = load_config(path, "a configuration of sst-merge test")
        if "data" not in content:
            raise SSTMergeError(
                f"--suites {path}: no key 'data'. Give a configuration of sst-merge test, such as "
                "configs/eval/minimal.yaml"
            )
        data = json.dumps(content["data"])
        result.append(f"--suites={data}" if equals else data)
    return result


def _quiet() -> None:
    """Silence what no user can act on; errors and the project's own messages stay."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_NoTips())
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*isinstance.treespec, LeafSpec.*",
        # They are the same.
        ".*LightningCLI's args parameter is intended to run from within Python.*",
        ".*_register_pytree_node.*",
        # What is logged is that of all processes already.
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)


class _NoTips(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text: Any = record.getMessage()
        return "litlogger" not in text and "💡" not in text
