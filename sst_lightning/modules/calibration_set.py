"""One calibration set of a validation pass: its collection is opened, and finished to a Fisher."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.eigenspace import EigenspaceMonitor
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_blocks import BlockStore, remove_blocks
from sst_lightning.algebra.fisher_file import FisherMetadata, FisherStatistics, write_samples
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.modules.collection_limits import CollectionLimits
from sst_lightning.modules.fisher_collection import FisherCollection
from sst_lightning.modules.processes import gather


@dataclass(frozen=True)
class CalibrationSet:
    """A validation dataloader that a Fisher is taken of.

    Attributes:
        trainer: runs the pass.
        name: of the dataloader.
        identity: what ``fisher_metadata`` of the module returns: model, adapters and point.
        space: core space of the gradients.
        limits: of the collection.
    """

    trainer: Trainer
    name: str
    identity: Mapping[str, Any]
    space: CoreSpace
    limits: CollectionLimits

    def open(self, folder: Path | None, overwrite: bool) -> FisherCollection:
        """Return the collection as an interrupted run left it in ``folder``, or a new one.

        Args:
            folder: of the blocks; they are in memory when not given.
            overwrite: drop what is there of another collection.

        Raises:
            FisherError: ``folder`` holds blocks of another collection and ``overwrite`` is false.
        """
        trainer, order = self.trainer, self._order()
        # Of all processes, because blocks must end together. The least of them: where a remainder
        # makes one batch larger, the last process does not get it, and blocks are those of the sampler.
        batch_size = min(gather(max(map(len, order), default=1), trainer))
        sizes = (basis.shape for basis in self.space.bases.values())
        block_batches = self.limits.block_batches(
            batch_size, trainer.world_size, sum(4 * p * q for p, q in sizes)
        )
        module: Any = trainer.lightning_module
        identity = {
            **self.identity,
            "data_name": self.name,
            "data_fingerprint": self._data_fingerprint(),
            "estimator": self.limits.estimator,
            "precision": f"{trainer.precision} {next(module.parameters()).dtype}",
            "order of the rows": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
            "number of batches in a block": block_batches,
        }

        def store() -> BlockStore:
            budget = self.limits.memory_budget_gib
            return BlockStore(folder, identity, trainer.global_rank, budget)

        try:
            blocks = store()
        except FisherError as error:
            # In fit a pass that was interrupted was at other weights than this one.
            if not overwrite and trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"{error}. It is dropped, as FisherCollector.overwrite says")
            assert folder is not None
            remove_blocks(folder, trainer.global_rank)
            blocks = store()
        similarity = self.limits.stop_similarity
        collection = FisherCollection(
            list(self.space.bases),
            self.limits.estimator,
            order,
            block_batches,
            blocks,
            None if similarity is None else EigenspaceMonitor(similarity),
            trainer.strategy.root_device,
        )
        if collection.resumed:
            rank_zero_info(
                f"Fisher of '{self.name}': {collection.resumed} of {len(order)} batches are there "
                "from an interrupted run"
            )
        return collection

    def finish(self, collection: FisherCollection, path: Path | None) -> FisherStatistics:
        """Join what all processes have, and write it; every process must call it.

        Gradients on disk go from there to the file, module by module, and are read likewise.

        Args:
            collection: of this process.
            path: the file; nothing is left on disk when not given.

        Raises:
            FisherError: no sequence was seen, or a gradient was not finite.
        """
        metadata = self._metadata(collection)
        if not (self.limits.estimator == "exact" and collection.store.on_disk):
            statistics = FisherStatistics(dict(collection.estimates()), self.space, metadata)
            if path is not None and self.trainer.is_global_zero:
                statistics.save(path)
            return statistics
        # On each node one process writes what all of its processes read; without a path each
        # process has a temporary folder of its own.
        assert collection.store.folder is not None
        file = path or collection.store.folder / f"{self.name}.safetensors"
        if path is None or self.trainer.local_rank == 0:
            write_samples(file, self.space, metadata, collection.estimates())
        else:
            for _ in collection.estimates():
                pass  # takes part in the exchange
        self.trainer.strategy.barrier()
        opened = FisherStatistics.open(file)

        def read(module: str, store: BlockStore = collection.store) -> Any:
            # The store is held because a temporary folder lives as long as it.
            return opened.modules[module]

        return replace(opened, modules=LazyMapping(opened.modules, read), space=self.space)

    def _metadata(self, collection: FisherCollection) -> FisherMetadata:
        taken = sorted(collection.sequences().tolist()) if len(collection.store) else []
        available = len(self._loader().dataset)
        stopped = ""
        if len(taken) < available:
            most = self.limits.max_samples
            stopped = "max_samples" if most and len(taken) >= most else "limit_val_batches"
            stopped = "converged" if collection.stopped else stopped
        return FisherMetadata(
            data_name=self.name,
            data_fingerprint=self._data_fingerprint(),
            count=len(taken),
            estimator=self.limits.estimator,
            available=available,
            stopped=stopped,
            similarity=None if collection.monitor is None else collection.monitor.similarity,
            sequences=taken if stopped else None,
            **self.identity,
        )

    def _data_fingerprint(self) -> str:
        return self.trainer.datamodule.validation_fingerprint(self.name)  # type: ignore[attr-defined]

    def _index(self) -> int:
        names: list[str] = self.trainer.datamodule.validation_names  # type: ignore[attr-defined]
        return names.index(self.name)

    def _loader(self) -> Any:
        loaders = self.trainer.val_dataloaders
        return loaders[self._index()] if isinstance(loaders, Sequence) else loaders

    def _order(self) -> list[list[int]]:
        """Numbers of the sequences of each batch that this process will see."""
        sampler = self._loader().sampler
        batches = [[item] if isinstance(item, int) else list(item) for item in sampler]
        return batches[: int(self.trainer.num_val_batches[self._index()])]
