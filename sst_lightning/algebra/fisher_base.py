"""What a Fisher estimate of one module offers (docs/mathematics.md section 3).

With g_n (p, q) the gradient of sequence n's summed completion NLL with respect to the core M, the
Fisher is F = E[vec(g) vec(g)ᵀ]. vec is row-major: entry (i, j) of g is entry i·q + j of vec(g).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar, cast

from torch import Tensor

from sst_lightning.algebra.errors import FisherError

FisherType = TypeVar("FisherType", bound="ModuleFisher")


class ModuleFisher(ABC):
    """An estimate of one module's Fisher.

    Attributes:
        count: number of sequences it was taken from.
    """

    count: int

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(p, q)."""

    @abstractmethod
    def trace(self) -> float:
        """Tr F = E‖g‖²."""

    @abstractmethod
    def matvec(self, core: Tensor) -> Tensor:
        """F vec(core), as (p, q) in fp64."""

    @abstractmethod
    def dense(self) -> Tensor:
        """F, (pq, pq) in fp64."""

    @abstractmethod
    def scaled(self, factor: float) -> "ModuleFisher":
        """Factor · F."""

    @abstractmethod
    def rotated(self, outputs: Tensor, inputs: Tensor) -> "ModuleFisher":
        """F in other orthonormal bases of the same space, where a core M is T_out M T_inᵀ.

        Args:
            outputs: T_out, (p, p).
            inputs: T_in, (q, q).
        """

    @classmethod
    @abstractmethod
    def mixture(
        cls: type[FisherType], shares: Sequence[float], fishers: Sequence[FisherType]
    ) -> FisherType:
        """Σ share_i F_i of one class and shape; see :func:`mix_modules`."""

    @property
    def size(self) -> int:
        """Number of coordinates pq."""
        p, q = self.shape
        return p * q

    def mean_eigenvalue(self) -> float:
        """Return tr F / (pq)."""
        return self.trace() / self.size

    def rayleigh(self, core: Tensor) -> float:
        """Return vec(core)ᵀ F vec(core)."""
        return float((core.double() * self.matvec(core)).sum())

    def normalised(self: FisherType) -> FisherType:
        """Return F divided by its mean eigenvalue.

        Raises:
            FisherError: F is zero or not finite.
        """
        mean = self.mean_eigenvalue()
        if not 0 < mean < math.inf:
            raise FisherError(
                f"a Fisher has mean eigenvalue {mean}: its calibration rows give no gradient here"
            )
        return cast(FisherType, self.scaled(1 / mean))
