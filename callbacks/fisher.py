"""Fisher collection during validation passes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from sst_lightning.algebra.accumulators import Estimator
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.files import refuse_overwrite
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.modules.calibration_set import CalibrationSet
from sst_lightning.modules.collection_limits import CollectionLimits
from sst_lightning.modules.core_hooks import EmbeddingLeaf, GradientCapture
from sst_lightning.modules.fisher_collection import FisherCollection
from sst_lightning.modules.fisher_module import FisherModule

DEFAULT_POINTS = {"utility": "utility", "harmless": "utility", "safety": "safety"}

UNFINISHED = "unfinished"
"""Folder of blocks in the output; it is gone when the Fisher files are complete."""

COMPLETE = "complete"
"""File among the blocks when all are there and the Fisher files are being written."""


class FisherCollector(Callback):
    """Collects one Fisher per validation dataloader, from per-sequence core-space gradients.

    The gradient of sequence n is that of its *summed* completion NLL, in eval mode, taken from the
    forward inputs and output gradients of the target modules (docs/mathematics.md section 3): the
    result does not depend on the batch size or on padding. Works in ``validate`` and, with
    ``during_fit=True``, in the validation passes of ``fit``; ``trainer.fit``'s own gradients and
    weights are untouched.

    Needs ``Trainer(inference_mode=False)``, a module with the methods of
    :class:`~sst_lightning.modules.fisher_module.FisherModule` whose ``validation_step`` returns
    ``{"sequence_nll": (B,)}``, and a datamodule with ``validation_names`` (one per dataloader).

    Gradients are kept in blocks (:mod:`~sst_lightning.algebra.fisher_blocks`). With an ``output``
    every complete block is written there, so that a collection that is killed goes on with its next
    block when it is started again, and gives the same Fisher; memory is needed for one block. Without
    one, blocks stay in memory up to the budget and go to a temporary folder beyond it. Files are
    read module by module by what uses them.

    Args:
        points: for each dataloader name, the point its Fisher is taken at (``utility``: the merge
            of the utility adapters; ``safety``: the safety adapter; ``base``; ``merge``: the merge
            the module holds; ``training``: the weights in training). Other dataloaders are ignored.
            When not given: ``utility`` and ``harmless`` at the utility merge, ``safety`` at the
            safety adapter, as far as the datamodule has them.
        estimator: ``exact`` keeps per-sequence gradients, ``kfac`` two Kronecker factors, ``ekfac``
            their eigenbasis with corrected eigenvalues, ``diagonal`` the mean squared gradient
            (``gradient_variance`` in the original), ``vila`` the gradient's variance.
        output: folder for ``<name>.safetensors``; nothing is written when not given.
        during_fit: collect in the validation passes inside ``fit`` too.
        overwrite: allow files that exist in ``output`` before the run to be replaced, and an
            unfinished collection of something else to be dropped.
        max_samples: most sequences of each set, of all processes together; a random sample (seed:
            the datamodule's) of the set.
        stop_similarity: stop a set as soon as its leading eigenspaces have converged: when those of
            two halves of the sequences seen are this similar
            (:class:`~sst_lightning.algebra.eigenspace.EigenspaceMonitor`), at two checks in a row.
            Rows come in random order then. With ``exact`` and ``ekfac``; 0.9 is a strict value.
        block_samples: sequences, of all processes together, between writes and between checks.
        memory_budget_gib: GiB of gradients that a process keeps in memory.

    Example::

        collector = FisherCollector(points={"utility": "utility", "safety": "safety"})
        Trainer(callbacks=[collector], inference_mode=False).validate(module, datamodule)
        collector.statistics["utility"].modules
    """

    def __init__(
        self,
        points: dict[str, str] | None = None,
        estimator: Estimator = "exact",
        output: str | None = None,
        during_fit: bool = False,
        overwrite: bool = False,
        max_samples: int | None = None,
        stop_similarity: float | None = None,
        block_samples: int = 64,
        memory_budget_gib: float = 4.0,
    ) -> None:
        self.limits = CollectionLimits(
            estimator, max_samples, stop_similarity, block_samples, memory_budget_gib
        )
        self.points = dict(DEFAULT_POINTS if points is None else points)
        self._default_points = points is None
        self.output = None if output is None else Path(output)
        self.during_fit = during_fit
        self.overwrite = overwrite
        self.statistics: dict[str, FisherStatistics] = {}
        self._collections: dict[str, FisherCollection] = {}
        self._capture: GradientCapture | None = None
        self._leaf: EmbeddingLeaf | None = None
        self._sets: dict[str, CalibrationSet] = {}
        self._current: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check preconditions before any work (see :meth:`check`), and choose the rows' order."""
        data = getattr(trainer, "datamodule", None)
        self.check(trainer, pl_module, data, stage)
        if not self._collects(trainer, stage):
            return
        random = self.limits.wants_random_order
        if random and not hasattr(data, "random_blocks"):
            raise MisconfigurationException(
                f"{type(data).__name__} cannot give its rows in random order (random_blocks), which "
                "FisherCollector.max_samples and stop_similarity need"
            )
        if hasattr(data, "random_blocks"):
            assert data is not None
            blocks = self.limits.random_blocks(data.batch_size, trainer.world_size)
            data.random_blocks = dict.fromkeys(self.points, blocks) if random else {}

    def check(self, trainer: Trainer, pl_module: LightningModule, data: Any, stage: str) -> None:
        """Check preconditions; the command line does so before Lightning opens any log.

        Args:
            trainer: will run ``stage``.
            pl_module: the module.
            data: the datamodule.
            stage: ``validate`` or ``fit``; others are not collected in.

        Raises:
            MisconfigurationException: inference mode is on, or the module or datamodule lacks
                what collection needs.
            OutputExistsError: a Fisher file exists and ``overwrite`` is false.
        """
        if not self._collects(trainer, stage):
            return
        if stage == "validate" and trainer.validate_loop.inference_mode:
            raise MisconfigurationException(
                "FisherCollector needs gradients in validation: use Trainer(inference_mode=False) "
                "(trainer.inference_mode: false in the YAML)"
            )
        if not isinstance(pl_module, FisherModule):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} cannot be used with FisherCollector: it has no "
                "core_space(), move_to_point(), gradient_capture() and fisher_metadata(); use "
                "MergeModule or SupervisedLoRA"
            )
        names = getattr(data, "validation_names", None)
        if not names:
            raise MisconfigurationException(
                "FisherCollector needs a datamodule with validation_names (one per validation "
                "dataloader), such as sst_lightning.data.SafetyUtilityData"
            )
        if self._default_points:
            self.points = {n: p for n, p in DEFAULT_POINTS.items() if n in names}
        unknown = sorted(set(self.points) - set(names))
        if unknown:
            raise MisconfigurationException(
                f"FisherCollector.points names the dataloader '{unknown[0]}', which the datamodule "
                f"does not have; it has {', '.join(names)}"
            )
        # Where a run was killed while it wrote its files, those that are there are its own.
        if self.output is not None and not (self.output / UNFINISHED / COMPLETE).exists():
            for name in self.points:
                refuse_overwrite(
                    self._file(name), self.overwrite, "FisherCollector.overwrite: true"
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the model and open an accumulator per collected dataloader and module."""
        if not self._collects(trainer, trainer.state.fn):
            return
        assert isinstance(pl_module, FisherModule)
        assert pl_module.model is not None
        space = pl_module.core_space()
        self._sets = {
            name: CalibrationSet(
                trainer, name, pl_module.fisher_metadata(self.points[name]), space, self.limits
            )
            for name in trainer.datamodule.validation_names  # type: ignore[attr-defined]
            if name in self.points
        }
        work = None if self.output is None else self.output / UNFINISHED
        self._collections = {
            name: own.open(work and work / name, self.overwrite) for name, own in self._sets.items()
        }
        self._capture = pl_module.gradient_capture(space, self._receive)
        self._leaf = EmbeddingLeaf(pl_module.model)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move to the dataloader's point and let the validation step build a graph.

        A batch that needs no gradient gets its NLL instead, as ``known_nll``.
        """
        if self._capture is None:
            return
        name = trainer.datamodule.validation_names[dataloader_idx]  # type: ignore[attr-defined]
        self._current = None
        if name not in self.points:
            return
        known = self._collections[name].known(batch_idx)
        if known is not None:
            batch["known_nll"] = known
            return
        self._current = name
        assert isinstance(pl_module, FisherModule)
        pl_module.move_to_point(self.points[name])
        self._capture.start(batch["attention_mask"])
        # The evaluation loop runs under no_grad; on_validation_batch_end turns it off again.
        torch.set_grad_enabled(True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Run the backward pass of the step's summed NLL."""
        if self._capture is None or self._current is None:
            return
        torch.set_grad_enabled(False)
        assert self._leaf is not None
        loss: Tensor | None = outputs.get("sequence_nll") if isinstance(outputs, Mapping) else None
        if loss is None or self._leaf.output is None:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.validation_step must return {{'sequence_nll': (B,)}} "
                "computed with gradients, for FisherCollector"
            )
        # Sequences do not share anything: the gradient of the sum holds each sequence's gradient
        # in its own rows. autograd.grad, because backward() would add to the trained weights' .grad.
        with torch.enable_grad():
            total = loss.float().sum()
        torch.autograd.grad(total, self._leaf.output)
        self._leaf.output = None
        self._capture.stop()
        name, self._current = self._current, None
        collection = self._collections[name]
        try:
            collection.finish_batch(batch_idx, loss, outputs["tokens"])
        except FisherError as error:
            raise FisherError(f"Fisher of '{name}': {error}") from error
        if collection.stopped and collection.monitor is not None:
            rank_zero_info(
                f"Fisher of '{name}': converged after {collection.monitor.sequences} sequences "
                f"(similarity {collection.monitor.similarity:.3f})"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the statistics of all processes, and write them."""
        if self._capture is None:
            return
        self._remove_hooks()
        assert isinstance(pl_module, FisherModule)
        trainer.strategy.barrier()
        if self.output is not None and trainer.local_rank == 0:
            marker = self.output / UNFINISHED / COMPLETE
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        for name in self.points:
            try:
                self.statistics[name] = self._sets[name].finish(
                    self._collections[name], None if self.output is None else self._file(name)
                )
            except FisherError as error:
                raise FisherError(f"Fisher of '{name}': {error}") from error
        trainer.strategy.barrier()
        if self.output is not None and trainer.local_rank == 0:
            # First: what is left if this is interrupted are files that no later run needs.
            (self.output / UNFINISHED / COMPLETE).unlink(missing_ok=True)
        for collection in self._collections.values():
            collection.store.remove()
        trainer.strategy.barrier()
        if self.output is not None and trainer.local_rank == 0:
            remove_empty(self.output / UNFINISHED)
        self._collections, self._sets = {}, {}

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the model without hooks."""
        # The loop's own no_grad context has given gradients back their setting by now.
        self._current = None
        self._remove_hooks()

    def _receive(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        assert self._current is not None
        self._collections[self._current].update(name, inputs, gradients)

    def _collects(self, trainer: Trainer, stage: str | None) -> bool:
        if trainer.sanity_checking:
            return False
        return stage == "validate" or (self.during_fit and stage == "fit")

    def _file(self, name: str) -> Path:
        assert self.output is not None
        return self.output / f"{name}.safetensors"

    def _remove_hooks(self) -> None:
        if self._capture is not None:
            self._capture.remove()
            self._capture = None
        if self._leaf is not None:
            self._leaf.remove()
            self._leaf = None


def remove_empty(folder: Path) -> None:
    """Remove ``folder`` and the empty folders in it."""
    for path in [*folder.glob("*"), folder]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
