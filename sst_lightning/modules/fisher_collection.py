"""The Fisher of one calibration set while it is collected, by any number of processes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed

from sst_lightning.algebra.accumulators import (
    Estimator,
    FisherAccumulator,
    check_finite,
    make_accumulator,
)
from sst_lightning.algebra.eigenspace import EigenspaceMonitor
from sst_lightning.algebra.fisher import ModuleFisher
from sst_lightning.algebra.fisher_blocks import Block, BlockStore, join_states


class FisherCollection:
    """Accumulates batches, closes a block every few of them, and joins what all processes have.

    Every process closes a block at the same batch; there, and only there, processes talk to each
    other before the end.

    Args:
        modules: names of the target modules.
        estimator: kind of Fisher.
        order: for each batch of this process, the numbers of its sequences in the calibration set.
        block_batches: batches of a block.
        store: where blocks go; blocks it has already are not collected again.
        monitor: decides when enough was seen (estimators that keep every gradient); ``None`` sees
            all batches.
        device: where tensors are exchanged (NCCL exchanges none on the CPU).
    """

    def __init__(
        self,
        modules: Sequence[str],
        estimator: Estimator,
        order: Sequence[Sequence[int]],
        block_batches: int,
        store: BlockStore,
        monitor: EigenspaceMonitor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.modules = list(modules)
        self.estimator = estimator
        self.order = order
        self.block_batches = block_batches
        self.store = store
        self.monitor = monitor
        self.device = torch.device(device)
        # A process may have been killed between writing its block and another one doing so.
        store.keep(int(self._reduce(torch.tensor(len(store)), distributed.ReduceOp.MIN)))
        self.resumed = min(len(store) * block_batches, len(order))
        for block in store:
            self._check(block)
        self._open()

    @property
    def stopped(self) -> bool:
        """Whether the remaining batches are left out."""
        return self.monitor is not None and self.monitor.converged

    def known(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Return NLL and tokens of a batch that is not computed, of none of its sequences if it is
        left out; ``None`` for one that is to be computed.
        """
        number = batch // self.block_batches
        if batch < self.resumed:
            block = self.store[number]
            start = sum(map(len, self.order[number * self.block_batches : batch]))
            part = slice(start, start + len(self.order[batch]))
            return block.nll[part].to(self.device), block.tokens[part].to(self.device)
        if self.stopped:
            nothing = torch.zeros(0, device=self.device)
            return nothing, nothing
        return None

    def update(self, module: str, inputs: Tensor, gradients: Tensor) -> None:
        """Add what a module saw of the current batch (see ``FisherAccumulator.update``)."""
        self._accumulators[module].update(inputs, gradients)

    def finish_batch(self, batch: int, nll: Tensor, tokens: Tensor) -> None:
        """End the current batch.

        Args:
            batch: its number.
            nll: summed completion NLL of each sequence, (B,).
            tokens: completion tokens of each sequence, (B,).
        """
        for accumulator in self._accumulators.values():
            accumulator.offload()
        self._indices += self.order[batch]
        self._nll.append(nll.detach().float().cpu())
        self._tokens.append(tokens.detach().cpu())
        if (batch + 1) % self.block_batches == 0 or batch + 1 == len(self.order):
            self._close()

    def estimates(self) -> Iterator[tuple[str, ModuleFisher]]:
        """Join the blocks of all processes, module by module; every process must go through all.

        Samples are in the order of the calibration set, whatever the batches were. What is in memory
        is given up on the way.

        Raises:
            FisherError: no sequence was seen, or a gradient was not finite.
        """
        order = torch.argsort(self.sequences(), stable=True) if len(self.store) else None
        sums = self._sums()
        for name in self.modules:
            accumulator = make_accumulator(self.estimator)
            if order is not None:
                state = sums[name]
                rows = self._rows(name)
                if rows is not None:
                    state = [*state, self._gather(rows)[order]]
                accumulator.load_states([state])
            yield name, accumulator.finish()

    def sequences(self) -> Tensor:
        """Return the numbers of all sequences seen, process after process, (N,)."""
        own = torch.cat([block.indices for block in self.store])
        return self._gather(own)

    def _open(self) -> None:
        self._accumulators: dict[str, FisherAccumulator] = {
            name: make_accumulator(self.estimator) for name in self.modules
        }
        self._indices: list[int] = []
        self._nll: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def _close(self) -> None:
        states = {name: value.state() for name, value in self._accumulators.items()}
        for state in states.values():
            for tensor in state:
                check_finite(tensor)
        indices = torch.tensor(self._indices)
        block = Block(indices, torch.cat(self._nll), torch.cat(self._tokens), states)
        self.store.append(block)
        self._open()
        self._check(block)

    def _check(self, block: Block) -> None:
        """Show a block to the monitor, in an order that does not depend on batches or processes."""
        if self.monitor is None:
            return
        order = torch.argsort(self._gather(block.indices), stable=True)
        self.monitor.check(
            (name, self._gather(block.states[name][-1])[order]) for name in self.modules
        )

    def _sums(self) -> Mapping[str, list[Tensor]]:
        """Add up the sums of all blocks and processes, in one exchange."""
        count = make_accumulator(self.estimator).sums
        own = {
            name: join_states(count, [list(block.states[name][:count]) for block in self.store])
            for name in self.modules
            if len(self.store)
        }
        if count == 0 or not own or _processes() == 1:
            return own
        flat = torch.cat([t.double().flatten() for sums in own.values() for t in sums])
        flat = self._reduce(flat, distributed.ReduceOp.SUM)
        result: dict[str, list[Tensor]] = {}
        start = 0
        for name, sums in own.items():
            result[name] = []
            for tensor in sums:
                part = flat[start : start + tensor.numel()].reshape(tensor.shape)
                result[name].append(part.to(tensor.dtype))
                start += tensor.numel()
        return result

    def _rows(self, name: str) -> Tensor | None:
        """Return this process's gradients of a module, (n, p, q), where the estimator keeps them."""
        count = make_accumulator(self.estimator).sums
        rows = [state for block in self.store for state in block.states[name][count:]]
        for block in self.store:
            block.release(name)
        return torch.cat(rows) if rows else None

    def _gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of ranks."""
        if _processes() == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(_processes())]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        most = max(int(count) for count in counts)
        padded = rows.new_zeros(most, *rows.shape[1:], device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        joined = [part[: int(count)].cpu() for part, count in zip(parts, counts, strict=True)]
        return torch.cat(joined)

    def _reduce(self, tensor: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if _processes() == 1:
            return tensor
        tensor = tensor.to(self.device, copy=True)
        distributed.all_reduce(tensor, op=operation)
        return tensor.cpu()


def _processes() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
