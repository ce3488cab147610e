"""Core space: small exact coordinates of a set of adapters (DESIGN.md section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.errors import AdapterError

Cores = dict[str, Tensor]
"""Module name to core M, (p, q) in fp64."""

RANK_TOLERANCE = 1e-10
REPRESENTABLE = 1e-4


@dataclass(frozen=True)
class CoreBasis:
    """Orthonormal bases of one module: ΔW_i = Q_out M_i Q_inᵀ for every adapter that takes part.

    Attributes:
        q_out: (d_out, p), orthonormal columns, fp32.
        q_in: (d_in, q), orthonormal columns, fp32.
    """

    q_out: Tensor
    q_in: Tensor

    @classmethod
    def from_factors(cls, factors: Sequence[LoraFactors]) -> "CoreBasis":
        """Span the columns of all B and the rows of all A."""
        return cls(
            _orthonormal(torch.cat([item.B for item in factors], dim=1)),
            _orthonormal(torch.cat([item.A for item in factors], dim=0).T),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q): shape of a core."""
        return self.q_out.shape[1], self.q_in.shape[1]

    def encode(self, factors: LoraFactors) -> Tensor:
        """Return M = Q_outᵀ ΔW Q_in, (p, q) in fp64."""
        left = self.q_out.double().T @ factors.B.double()
        right = factors.A.double() @ self.q_in.double()
        return factors.scaling * (left @ right)

    def residual(self, factors: LoraFactors) -> float:
        """Return ‖ΔW − Q_out M Q_inᵀ‖ / ‖ΔW‖, from the factors alone (0 for ΔW = 0)."""
        total = _frobenius_square(factors)
        if total == 0:
            return 0.0
        kept = float(self.encode(factors).square().sum())
        return max(0.0, 1 - kept / total) ** 0.5

    def decode(self, core: Tensor, rank: int | None = None) -> tuple[LoraFactors, float]:
        """Return factors of Q_out M Q_inᵀ and the share of ‖M‖² that was discarded.

        Args:
            core: (p, q).
            rank: keep this many singular values of M, which are those of ΔW; all when not given.
        """
        u, s, vt = torch.linalg.svd(core.double(), full_matrices=False)
        keep = len(s) if rank is None else min(rank, len(s))
        total = float(s.square().sum())
        discarded = float(s[keep:].square().sum()) / total if total > 0 else 0.0
        root = s[:keep].sqrt()
        a = root[:, None] * vt[:keep] @ self.q_in.double().T
        b = self.q_out.double() @ u[:, :keep] * root
        return LoraFactors(a.float(), b.float(), 1.0), discarded


class CoreSpace:
    """The core bases of all target modules.

    Args:
        bases: module name to basis.
    """

    def __init__(self, bases: dict[str, CoreBasis]) -> None:
        self.bases = bases

    @classmethod
    def from_adapters(cls, adapters: Sequence[LoraAdapter]) -> "CoreSpace":
        """Span all adapters; a module that some of them lack is spanned by the others."""
        names = sorted({name for adapter in adapters for name in adapter.factors})
        return cls(
            {
                name: CoreBasis.from_factors(
                    [adapter.factors[name] for adapter in adapters if name in adapter.factors]
                )
                for name in names
            }
        )

    def encode(self, adapter: LoraAdapter) -> Cores:
        """Return the cores of an adapter; zero for a module it lacks.

        Raises:
            AdapterError: its ΔW does not lie in this space.
        """
        cores: Cores = {}
        for name, basis in self.bases.items():
            factors = adapter.factors.get(name)
            if factors is None:
                cores[name] = torch.zeros(basis.shape, dtype=torch.float64)
                continue
            if basis.residual(factors) > REPRESENTABLE:
                raise AdapterError(
                    f"{adapter.path}: ΔW of module '{name}' is not in the core space; the space "
                    "belongs to other adapters"
                )
            cores[name] = basis.encode(factors)
        return cores

    def decode(
        self, cores: Cores, rank: int | None = None, base_model: str | None = None
    ) -> tuple[LoraAdapter, float]:
        """Turn cores into an adapter of rank at most the sum of the inputs' ranks.

        Args:
            cores: module name to (p, q).
            rank: truncate each module to this rank (SVD of the core); exact when not given.
            base_model: name written into the adapter.

        Returns:
            The adapter and the share of Σ‖ΔW‖² that truncation discarded.
        """
        factors: dict[str, LoraFactors] = {}
        lost = total = 0.0
        for name, core in cores.items():
            factors[name], discarded = self.bases[name].decode(core, rank)
            energy = float(core.double().square().sum())
            lost += discarded * energy
            total += energy
        return LoraAdapter(factors, base_model), lost / total if total > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """Return the bases as tensors for a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, basis in self.bases.items():
            tensors[f"q_out/{name}"] = basis.q_out.contiguous()
            tensors[f"q_in/{name}"] = basis.q_in.contiguous()
        return tensors

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> "CoreSpace":
        """Rebuild what :meth:`state` gave."""
        names = [key.removeprefix("q_out/") for key in tensors if key.startswith("q_out/")]
        return cls(
            {name: CoreBasis(tensors[f"q_out/{name}"], tensors[f"q_in/{name}"]) for name in names}
        )


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis of the column space of (d, k), fp32 rounded from an fp64 SVD."""
    u, s, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    keep = int((s > RANK_TOLERANCE * s[0].clamp(min=1e-300)).sum())
    # A factor that is all zeros (B at its initial value) still needs one column.
    return u[:, : max(keep, 1)].float().contiguous()


def _frobenius_square(factors: LoraFactors) -> float:
    a, b = factors.A.double(), factors.B.double()
    return factors.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())
