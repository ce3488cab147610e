"""Accumulators that turn projected inputs and output gradients into Fisher estimates."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import (
    DiagonalFisher,
    ExactFisher,
    KroneckerFisher,
    ModuleFisher,
)

Estimator = Literal["exact", "kfac", "diagonal"]


class FisherAccumulator(ABC):
    """Collects one module's Fisher, batch by batch; sums and counts travel together."""

    @abstractmethod
    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: P = x Q_in, (B, T, q); rows of padding tokens are zero.
            gradients: R = δ Q_out, (B, T, p); rows of padding tokens are zero.
        """

    @abstractmethod
    def state(self) -> list[Tensor]:
        """Return the sums, on the CPU."""

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

    def __init__(self) -> None:
        self._samples: list[Tensor] = []

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        self._samples.append(_sequence_gradients(inputs, gradients).cpu())

    def state(self) -> list[Tensor]:
        """Return the samples."""
        return self._samples

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Join the samples of several processes."""
        self._samples = [sample for state in states for sample in state]

    def finish(self) -> ExactFisher:
        """Return the estimate."""
        _check_count(len(self._samples))
        samples = torch.cat(self._samples)
        _check_finite(samples)
        return ExactFisher(samples)


class DiagonalAccumulator(FisherAccumulator):
    """Sums g_n² entry by entry."""

    def __init__(self) -> None:
        self._state: list[Tensor] = []

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        gradient = _sequence_gradients(inputs, gradients).double()
        _add(self._state, [gradient.square().sum(0).cpu(), torch.tensor(float(len(gradient)))])

    def state(self) -> list[Tensor]:
        """Return sum and count."""
        return self._state

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Add up the sums of several processes."""
        self._state = []
        for state in states:
            _add(self._state, state)

    def finish(self) -> DiagonalFisher:
        """Return the estimate."""
        _check_count(len(self._state))
        total, count = self._state
        _check_finite(total)
        return DiagonalFisher(total / count, int(count))


class KroneckerAccumulator(FisherAccumulator):
    """Sums Σ_t P_tᵀP_t and Σ_t R_tᵀR_t, and counts sequences and tokens."""

    def __init__(self) -> None:
        self._state: list[Tensor] = []

    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add a batch."""
        tokens = inputs.flatten(0, 1).double()
        outputs = gradients.flatten(0, 1).double()
        # Padding is zero in inputs and gradients alike; no real token has an all-zero input.
        real = tokens.any(dim=1).sum().double()
        parts = [tokens.T @ tokens, outputs.T @ outputs, torch.tensor(float(len(inputs))), real]
        _add(self._state, [part.cpu() for part in parts])

    def state(self) -> list[Tensor]:
        """Return sums and counts."""
        return self._state

    def load_states(self, states: Sequence[list[Tensor]]) -> None:
        """Add up the sums of several processes."""
        self._state = []
        for state in states:
            _add(self._state, state)

    def finish(self) -> KroneckerFisher:
        """Return the estimate."""
        _check_count(len(self._state))
        inputs, outputs, sequences, tokens = self._state
        _check_finite(inputs)
        _check_finite(outputs)
        # Without a single real token both sums are 0, and so is the Fisher.
        return KroneckerFisher(outputs / tokens.clamp(min=1), inputs / sequences, int(sequences))


def make_accumulator(estimator: Estimator) -> FisherAccumulator:
    """Return a new accumulator.

    Raises:
        FisherError: the estimator is unknown.
    """
    kinds: dict[str, type[FisherAccumulator]] = {
        "exact": ExactAccumulator,
        "kfac": KroneckerAccumulator,
        "diagonal": DiagonalAccumulator,
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


def _check_finite(tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise FisherError(
            "a gradient is NaN or infinite: use dtype bfloat16 or float32, or look for a broken row"
        )
