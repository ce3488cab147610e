"""Fisher collection during validation passes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from sst_lightning.algebra.accumulators import Estimator, FisherAccumulator, make_accumulator
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.files import refuse_overwrite
from sst_lightning.algebra.fisher_file import FisherMetadata, FisherStatistics
from sst_lightning.modules.core_hooks import CoreGradientCapture, EmbeddingLeaf

DEFAULT_POINTS = {"utility": "utility", "harmless": "utility", "safety": "safety"}


@runtime_checkable
class FisherModule(Protocol):
    """What a LightningModule offers so that :class:`FisherCollector` can work on it."""

    model: nn.Module | None

    def core_space(self) -> CoreSpace:
        """Return the core space that gradients are taken in."""
        ...

    def move_to_point(self, point: str) -> None:
        """Put the adapters' weights at the named point (or check that they are there)."""
        ...

    def fisher_metadata(self, point: str) -> dict[str, Any]:
        """Return base_model, base_fingerprint, adapter_fingerprints and the point's full name."""
        ...


class FisherCollector(Callback):
    """Collects one Fisher per validation dataloader, from per-sequence core-space gradients.

    The gradient of sequence n is that of its *summed* completion NLL, in eval mode, taken from the
    forward inputs and output gradients of the target modules (docs/mathematics.md section 3): the
    result does not depend on the batch size or on padding. Works in ``validate`` and, with
    ``during_fit=True``, in the validation passes of ``fit``; ``trainer.fit``'s own gradients and
    weights are untouched.

    Needs ``Trainer(inference_mode=False)``, a module with the methods of :class:`FisherModule`
    whose ``validation_step`` returns ``{"sequence_nll": (B,)}``, and a datamodule with
    ``validation_names`` (one per dataloader).

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
        overwrite: allow files that exist in ``output`` before the run to be replaced.

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
    ) -> None:
        self.points = dict(DEFAULT_POINTS if points is None else points)
        self._default_points = points is None
        self.estimator = estimator
        self.output = None if output is None else Path(output)
        self.during_fit = during_fit
        self.overwrite = overwrite
        self.statistics: dict[str, FisherStatistics] = {}
        self._accumulators: dict[str, dict[str, FisherAccumulator]] = {}
        self._capture: CoreGradientCapture | None = None
        self._leaf: EmbeddingLeaf | None = None
        self._space: CoreSpace | None = None
        self._current: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check preconditions before any work (see :meth:`check`)."""
        self.check(trainer, pl_module, getattr(trainer, "datamodule", None), stage)

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
                "core_space(), move_to_point() and fisher_metadata(); use MergeModule or SupervisedLoRA"
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
        if self.output is not None:
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
        self._space = pl_module.core_space()
        self._accumulators = {
            name: {module: make_accumulator(self.estimator) for module in self._space.bases}
            for name in self.points
        }
        self._capture = CoreGradientCapture(pl_module.model, self._space, self._receive)
        self._leaf = EmbeddingLeaf(pl_module.model)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move to the dataloader's point and let the validation step build a graph."""
        if self._capture is None:
            return
        name = trainer.datamodule.validation_names[dataloader_idx]  # type: ignore[attr-defined]
        self._current = name if name in self.points else None
        if self._current is None:
            return
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
        self._current = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the statistics of all processes, and write them on rank zero."""
        if self._capture is None:
            return
        self._remove_hooks()
        assert isinstance(pl_module, FisherModule)
        assert self._space is not None
        for name, point in self.points.items():
            accumulators = self._accumulators.pop(name)
            _gather(accumulators)
            try:
                modules = {key: value.finish() for key, value in accumulators.items()}
            except FisherError as error:
                raise FisherError(f"Fisher of '{name}': {error}") from error
            metadata = FisherMetadata(
                data_name=name,
                data_fingerprint=trainer.datamodule.validation_fingerprint(name),  # type: ignore[attr-defined]
                count=next(iter(modules.values())).count,
                estimator=self.estimator,
                **pl_module.fisher_metadata(point),
            )
            statistics = FisherStatistics(modules, self._space, metadata)
            self.statistics[name] = statistics
            if self.output is not None and trainer.is_global_zero:
                statistics.save(self._file(name))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the model without hooks."""
        # The loop's own no_grad context has given gradients back their setting by now.
        self._current = None
        self._remove_hooks()

    def _receive(self, name: str, inputs: Tensor, gradients: Tensor) -> None:
        assert self._current is not None
        self._accumulators[self._current][name].update(inputs, gradients)

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


def _gather(accumulators: Mapping[str, FisherAccumulator]) -> None:
    """Merge every process's accumulators into each process's own, sums and counts together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    for accumulator in accumulators.values():
        states: list[Any] = [None] * world
        torch.distributed.all_gather_object(states, accumulator.state())
        accumulator.load_states(states)
