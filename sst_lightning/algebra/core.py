"""Core space: small exact coordinates of a set of adapters (docs/mathematics.md section 2)."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.errors import AdapterError
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.algebra.rank import EXACT, RankRule, balanced, discarded_share

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
        """Span the column spaces and the row spaces of all ΔW_i.

        The bases are the left singular vectors of [ΔW_1, ΔW_2, …] and the right ones of their
        stack, each ΔW_i at norm 1. Unlike those of the stacked factors they do not depend on how
        ΔW_i was factored, so neither does an estimate that lives on coordinates (diagonal Fisher).
        """
        return cls(
            _orthonormal([_column_factor(item) for item in factors]),
            _orthonormal([_row_factor(item) for item in factors]),
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
        """Return max(‖(I − Q_out Q_outᵀ)ΔW‖, ‖ΔW(I − Q_in Q_inᵀ)‖) / ‖ΔW‖; 0 for ΔW = 0.

        From thin factors of ΔW, because ‖ΔW‖² − ‖M‖² would cancel to rounding.
        """
        shares = [0.0]
        for basis, columns in (
            (self.q_out, _column_factor(factors)),
            (self.q_in, _row_factor(factors)),
        ):
            q, norm = basis.double(), float(columns.norm())
            if norm > 0:
                shares.append(float((columns - q @ (q.T @ columns)).norm()) / norm)
        return max(shares)

    def decode(self, core: Tensor, rule: RankRule = EXACT) -> tuple[LoraFactors, float]:
        """Return fp32 factors of Q_out M Q_inᵀ and the share of ‖M‖² that was discarded.

        Args:
            core: (p, q).
            rule: which singular values of M, which are those of ΔW, are kept.

        Raises:
            AdapterError: the core is not finite or has another shape.
        """
        if tuple(core.shape) != self.shape or not torch.isfinite(core).all():
            raise AdapterError(
                f"a core must be finite and {self.shape}, got {tuple(core.shape)} (or NaN in it)"
            )
        u, s, vt = torch.linalg.svd(core.double().cpu(), full_matrices=False)
        keep = rule.keep(s)
        a = vt[:keep] @ self.q_in.double().T
        b = self.q_out.double() @ u[:, :keep]
        return balanced(b, s[:keep], a), discarded_share(s, keep)

    def change_from(self, other: "CoreBasis") -> tuple[Tensor, Tensor] | None:
        """Return T_out (p, p) and T_in (q, q), fp64: a core M of ``other`` is T_out M T_inᵀ here.

        Returns:
            ``None`` if the bases do not span the same space.
        """
        changes = []
        for new, old in ((self.q_out, other.q_out), (self.q_in, other.q_in)):
            if new.shape != old.shape:
                return None
            change = new.double().T @ old.double()
            error = (change @ change.T - torch.eye(len(change), dtype=change.dtype)).abs().max()
            if float(error) > REPRESENTABLE:
                return None
            changes.append(change)
        return changes[0], changes[1]


class CoreSpace:
    """The core bases of all target modules.

    Args:
        bases: module name to basis.
    """

    def __init__(self, bases: Mapping[str, CoreBasis]) -> None:
        self.bases = bases

    @classmethod
    def from_adapters(cls, adapters: Sequence[LoraAdapter]) -> "CoreSpace":
        """Span all adapters; a module that some of them lack is spanned by the others."""
        return cls(dict(cls.streamed(adapters).bases))

    @classmethod
    def streamed(cls, adapters: Sequence[LoraAdapter]) -> "CoreSpace":
        """Span all adapters, each module when it is asked for; only the last one is kept."""

        def span(name: str) -> CoreBasis:
            return CoreBasis.from_factors(
                [adapter.factors[name] for adapter in adapters if name in adapter.factors]
            )

        names = sorted({name for adapter in adapters for name in adapter.factors})
        return cls(LazyMapping(names, span))

    def check(self, adapter: LoraAdapter) -> None:
        """Refuse an adapter whose ΔW this space cannot represent.

        Raises:
            AdapterError: names the folder and the module.
        """
        for name, factors in adapter.factors.items():
            basis = self.bases.get(name)
            if basis is None:
                raise AdapterError(
                    f"{adapter.path}: module '{name}' is not in the core space; the space belongs "
                    "to other adapters"
                )
            shape = basis.q_out.shape[0], basis.q_in.shape[0]
            if shape != (factors.d_out, factors.d_in) or basis.residual(factors) > REPRESENTABLE:
                raise AdapterError(
                    f"{adapter.path}: ΔW of module '{name}' is not in the core space; the space "
                    "belongs to other adapters"
                )

    def encode(self, adapter: LoraAdapter) -> Cores:
        """Return the cores of an adapter; zero for a module it lacks.

        Raises:
            AdapterError: its ΔW does not lie in this space.
        """
        self.check(adapter)
        return {
            name: basis.encode(adapter.factors[name])
            if name in adapter.factors
            else torch.zeros(basis.shape, dtype=torch.float64)
            for name, basis in self.bases.items()
        }

    def decode(
        self, cores: Cores, rule: RankRule = EXACT, base_model: str | None = None
    ) -> tuple[LoraAdapter, float]:
        """Turn cores into an adapter of rank at most the sum of the inputs' ranks.

        Args:
            cores: module name to (p, q).
            rule: rank of each module (SVD of the core).
            base_model: name written into the adapter.

        Returns:
            The adapter and the share of Σ‖ΔW‖² that truncation discarded.
        """
        factors: dict[str, LoraFactors] = {}
        lost = total = 0.0
        for name, core in cores.items():
            factors[name], discarded = self.bases[name].decode(core, rule)
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
    def from_state(cls, tensors: Mapping[str, Tensor]) -> "CoreSpace":
        """Rebuild what :meth:`state` gave."""
        return cls(dict(cls.streamed_state(tensors, tensors.__getitem__).bases))

    @classmethod
    def streamed_state(cls, keys: Iterable[str], read: Callable[[str], Tensor]) -> "CoreSpace":
        """Rebuild what :meth:`state` gave, reading each module when it is asked for."""

        def basis(name: str) -> CoreBasis:
            return CoreBasis(read(f"q_out/{name}"), read(f"q_in/{name}"))

        names = [key.removeprefix("q_out/") for key in keys if key.startswith("q_out/")]
        return cls(LazyMapping(names, basis))


def add(parts: Sequence[tuple[float, Cores]]) -> Cores:
    """Return Σ w_i M_i module by module.

    Raises:
        AdapterError: nothing to add, or cores of different modules.
    """
    if not parts:
        raise AdapterError("a sum of cores needs at least one part")
    names = parts[0][1].keys()
    if any(cores.keys() != names for _, cores in parts):
        raise AdapterError("only cores of the same modules can be added")
    return {
        name: torch.stack([weight * cores[name].double() for weight, cores in parts]).sum(0)
        for name in names
    }


def _column_factor(factors: LoraFactors) -> Tensor:
    """Return L, (d_out, r) fp64, with L Lᵀ = ΔW ΔWᵀ: ΔW = s B Rᵀ Qᵀ where Aᵀ = Q R."""
    triangle = torch.linalg.qr(factors.A.cpu().double().T, mode="r")[1]
    return factors.scaling * factors.B.cpu().double() @ triangle.T


def _row_factor(factors: LoraFactors) -> Tensor:
    """Return L, (d_in, r) fp64, with L Lᵀ = ΔWᵀ ΔW: ΔW = s Q R A where B = Q R."""
    triangle = torch.linalg.qr(factors.B.cpu().double(), mode="r")[1]
    return factors.scaling * factors.A.cpu().double().T @ triangle.T


def _orthonormal(columns: Sequence[Tensor]) -> Tensor:
    """Orthonormal basis of the joint column space of (d, r_i), fp32 rounded from an fp64 SVD."""
    # At norm 1 each, so that an adapter much smaller than another is not taken for rounding.
    scaled = [item / max(float(item.norm()), 1e-300) for item in columns]
    u, s, _ = torch.linalg.svd(torch.cat(scaled, dim=1), full_matrices=False)
    keep = int((s > RANK_TOLERANCE).sum())
    # An adapter with ΔW = 0 (B at its initial value) still needs one column.
    basis = u[:, : max(keep, 1)]
    # A singular vector's sign depends on the LAPACK at hand: make its largest entry positive.
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return (basis * largest.sign()).float().contiguous()


def fingerprint_cores(cores: Mapping[str, Tensor] | None) -> str:
    """Hash of cores; ``None`` is the base model."""
    digest = hashlib.sha256()
    for name, core in sorted((cores or {}).items()):
        digest.update(f"{name}{tuple(core.shape)}".encode())
        digest.update(core.double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
