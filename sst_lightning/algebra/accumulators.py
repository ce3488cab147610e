"""Accumulators that turn projected inputs and output gradients into Fisher estimates."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sst_lightning.algebra.eigen_fisher import EigenFisher
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import (
    DiagonalFisher,
    ExactFisher,
    KroneckerFisher,
    ModuleFisher,
)

Estimator = Literal["exact", "kfac", "ekfac", "diagonal", "vila"]


class FisherAccumulator(ABC):
    """Collects one module's Fisher, batch by batch; sums and counts travel together.

    Attributes:
        sums: number of tensors at the start of :meth:`state` that add up over sequences; those
            after them hold a row per sequence.
    """

    sums: ClassVar[int]

    @abstractmethod
    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch; nothing waits for the device.

        Args:
            inputs: P = x Q_in, (B, T, q) fp32; rows of padding tokens are zero.
            gradients: R = δ Q_out, (B, T, p) fp32; rows of padding tokens are zero.
        """

    def offload(self) -> None:
        """Move what grows with the number of sequences to the CPU."""
        return

    @abstractmethod
    def state(self) -> list[Tensor]:
        """Return the sums and the rows, on the CPU; empty before the first sequence."""

    @abstractmethod
    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Replace the sums by those of several processes together."""

    @abstractmethod
    def finish(self) -> ModuleFisher:
        """Return the estimate.

        Raises:
            FisherError: no sequence was seen, or a gradient was not finite.
        """


class ExactAccumulator(FisherAccumulator):
    """Keeps g_n = Σ_t R_ntᵀ P_nt of every sequence."""

    sums = 0

    def __init__(self) -> None:
        self._samples: list[Tensor] = []

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        self._samples.append(_sequence_gradients(inputs, gradients))

    def offload(self) -> None:
        """Move the last batch's samples to the CPU."""
        if self._samples:
            self._samples[-1] = self._samples[-1].cpu()

    def state(self) -> list[Tensor]:
        """Return the samples of all batches, (N, p, q)."""
        return [torch.cat([sample.cpu() for sample in self._samples])] if self._samples else []

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Join the samples of several processes."""
        self._samples = [sample for state in states for sample in state]

    def finish(self) -> ExactFisher:
        """Return the estimate."""
        _check_count(len(self._samples))
        samples = torch.cat(self._samples)
        check_finite(samples)
        return ExactFisher(samples)


class SumAccumulator(FisherAccumulator):
    """Adds up tensors of a fixed shape, and counts."""

    def __init__(self) -> None:
        self._state: list[Tensor] = []

    def state(self) -> list[Tensor]:
        """Return sums and counts."""
        return [part.cpu() for part in self._state]

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Add up the sums of several processes."""
        self._state = []
        for state in states:
            _add(self._state, state)


class DiagonalAccumulator(SumAccumulator):
    """Sums g_n² entry by entry."""

    sums = 2

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        gradient = _sequence_gradients(inputs, gradients).double()
        _add(self._state, [gradient.square().sum(0), torch.tensor(float(len(gradient)))])

    def finish(self) -> DiagonalFisher:
        """Return the estimate."""
        _check_count(len(self._state))
        total, count = self._state
        check_finite(total)
        return DiagonalFisher(total / count, int(count))


class VilaAccumulator(SumAccumulator):
    """Sums g_n and g_n² entry by entry, for the variance max(E[g²] − E[g]², 0).

    The importance of VILA (Kim et al. 2025, arXiv 2508.21300): a Fisher is the second moment of a
    score with mean 0, so the mean is taken out. In its code g is the gradient of a batch's mean
    loss, weighted by tokens, with respect to random factors A, B ~ N(0, σ²) that stand in for the
    full weight. Here g is that of one sequence's summed NLL with respect to the core, which has so
    few coordinates that no random projection is needed, and every sequence counts the same.
    """

    sums = 3

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        gradient = _sequence_gradients(inputs, gradients).double()
        sums = gradient.sum(0), gradient.square().sum(0)
        _add(self._state, [*sums, torch.tensor(float(len(gradient)))])

    def finish(self) -> DiagonalFisher:
        """Return the estimate.

        Raises:
            FisherError: also if fewer than two sequences were seen, whose variance is 0.
        """
        _check_count(len(self._state))
        total, squares, count = self._state
        check_finite(squares)
        if count < 2:
            raise FisherError(
                "estimator 'vila' is a variance: it needs at least 2 calibration rows"
            )
        mean = total / count
        return DiagonalFisher((squares / count - mean.square()).clamp(min=0), int(count))


class KroneckerAccumulator(SumAccumulator):
    """Sums Σ_t P_tᵀP_t and Σ_t R_tᵀR_t, and counts sequences and tokens.

    A batch's products are taken in fp32, the precision of P and R, and added up in fp64: rounding
    does not grow with the number of batches, and a product in fp64 costs several times as much.
    """

    sums = 4

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        tokens, outputs = inputs.flatten(0, 1), gradients.flatten(0, 1)
        # Padding is zero in inputs and gradients alike; no real token has an all-zero input.
        real = tokens.any(dim=1).sum().double()
        products = (tokens.T @ tokens).double(), (outputs.T @ outputs).double()
        sequences = torch.tensor(float(len(inputs)))
        _add(self._state, [*products, sequences, real])

    def finish(self) -> KroneckerFisher:
        """Return the estimate."""
        _check_count(len(self._state))
        inputs, outputs, sequences, tokens = self._state
        check_finite(inputs)
        check_finite(outputs)
        # A matrix library need not round XᵀX symmetrically.
        inputs, outputs = (inputs + inputs.T) / 2, (outputs + outputs.T) / 2
        # Without a single real token both sums are 0, and so is the Fisher.
        return KroneckerFisher(outputs / tokens.clamp(min=1), inputs / sequences, int(sequences))


class EigenAccumulator(FisherAccumulator):
    """Keeps every g_n beside the Kronecker sums, and only their EK-FAC at the end.

    The eigenbasis is known after the last sequence; with the gradients kept until then one pass
    over the data is enough.
    """

    sums = KroneckerAccumulator.sums

    def __init__(self) -> None:
        self._kronecker = KroneckerAccumulator()
        self._exact = ExactAccumulator()

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        self._kronecker.update(inputs, gradients)
        self._exact.update(inputs, gradients)

    def offload(self) -> None:
        """Move the last batch's samples to the CPU."""
        self._exact.offload()

    def state(self) -> list[Tensor]:
        """Return the Kronecker sums and counts, then the samples."""
        return [*self._kronecker.state(), *self._exact.state()]

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Add up the sums and join the samples of several processes."""
        self._kronecker.load_states([state[: self.sums] for state in states])
        self._exact.load_states([state[self.sums :] for state in states])

    def finish(self) -> EigenFisher:
        """Return the estimate."""
        return EigenFisher.from_parts(self._kronecker.finish(), self._exact.finish())


def make_accumulator(estimator: Estimator) -> FisherAccumulator:
    """Return a new accumulator.

    Raises:
        FisherError: the estimator is unknown.
    """
    kinds: dict[str, type[FisherAccumulator]] = {
        "exact": ExactAccumulator,
        "kfac": KroneckerAccumulator,
        "ekfac": EigenAccumulator,
        "diagonal": DiagonalAccumulator,
        "vila": VilaAccumulator,
    }
    if estimator not in kinds:
        raise FisherError(f"unknown Fisher estimator '{estimator}': use {', '.join(kinds)}")
    return kinds[estimator]()


def _sequence_gradients(inputs: Tensor, gradients: Tensor) -> Tensor:
    return torch.bmm(gradients.transpose(1, 2), inputs)


def _add(state: list[Tensor], parts: list[Tensor]) -> None:
    if not state:
        state.extend(part.clone() for part in parts)
        return
    for total, part in zip(state, parts, strict=False):
        total += part


def _check_count(batches: int) -> None:
    if batches == 0:
        raise FisherError("the calibration set is empty: give at least one row with a completion")


def check_finite(tensor: Tensor) -> None:
    """Refuse sums or samples that hold a NaN or an infinity.

    Raises:
        FisherError: one does.
    """
    if not torch.isfinite(tensor).all():
        raise FisherError(
            "a gradient is NaN or infinite: use dtype bfloat16 or float32, or look for a broken row"
        )
