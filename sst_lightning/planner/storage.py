"""Bytes of what outlives a step: adapters, optimizer state, core spaces, Fishers, their files."""

import math
from collections.abc import Mapping

from sst_lightning.planner.job import Adapter
from sst_lightning.planner.passes import Shape

FP32, FP64 = 4, 8
SMALLEST_8BIT = 4096
"""bitsandbytes keeps the optimizer state of smaller tensors in fp32."""
OPTIMIZER_BLOCK = 256
SMALLEST_PAGED = 100_000
"""bitsandbytes pages the optimizer state of tensors with so many elements."""

Core = Mapping[str, tuple[Shape, Shape]]
"""Module name to (d_out, p) and (d_in, q)."""


def factor_counts(shapes: Mapping[str, Shape], adapter: Adapter) -> list[int]:
    """Return the number of elements of every A and B of an adapter.

    Args:
        shapes: (d_out, d_in) of the base's linear layers.
        adapter: rank and modules.
    """
    sides = (shapes[name] for name in adapter.modules)
    return [adapter.rank * width for pair in sides for width in pair]


def adapter_bytes(shapes: Mapping[str, Shape], adapter: Adapter) -> int:
    """Return the bytes of an adapter's fp32 factors, in memory and in its file."""
    return FP32 * sum(factor_counts(shapes, adapter))


def optimizer_bytes(counts: list[int], optimizer: str) -> int:
    """Return the bytes of the state of AdamW.

    Args:
        counts: elements of each trained tensor.
        optimizer: ``adamw``: two fp32 moments; ``adamw_8bit`` and ``paged_adamw_8bit``: two of 8
            bits, with an fp32 scale for each block of 256.
    """
    if optimizer == "adamw":
        return 2 * FP32 * sum(counts)
    total = 0
    for count in counts:
        if count < SMALLEST_8BIT:
            total += 2 * FP32 * count
        else:
            total += 2 * (count + FP32 * math.ceil(count / OPTIMIZER_BLOCK))
    return total


def paged_bytes(counts: list[int], optimizer: str) -> int:
    """Return the bytes of the optimizer's state that the driver may move to the host.

    Args:
        counts: elements of each trained tensor.
        optimizer: as of :func:`optimizer_bytes`.
    """
    if not optimizer.startswith("paged"):
        return 0
    return sum(2 * count for count in counts if count >= SMALLEST_PAGED)


def basis_bytes(core: Core) -> int:
    """Return the bytes of the fp32 bases of a core space."""
    return sum(FP32 * rows * columns for sides in core.values() for rows, columns in sides)


def fisher_bytes(core: Core, estimator: str, sequences: int) -> int:
    """Return the bytes of a Fisher that is collected: what its accumulators keep."""
    return sum(_collected(p, q, estimator, sequences) for p, q in _sizes(core))


def fisher_file_bytes(core: Core, estimator: str, sequences: int) -> int:
    """Return the bytes of the tensors of a Fisher's file: bases and estimates."""
    return basis_bytes(core) + sum(_kept(p, q, estimator, sequences) for p, q in _sizes(core))


def finished_bytes(core: Core, estimator: str, sequences: int) -> int:
    """Return the bytes of a finished Fisher in memory."""
    return sum(_kept(p, q, estimator, sequences) for p, q in _sizes(core))


def module_bytes(core: Core, sequences: int) -> int:
    """Return the bytes of one set's gradients of the largest module."""
    return max(FP32 * sequences * p * q for p, q in _sizes(core))


def filter_bytes(core: Core, estimator: str, safety: int, utility: int) -> int:
    """Return the bytes that the soft filter of the largest module takes.

    Args:
        core: the modules.
        estimator: of the Fishers.
        safety: sequences of F_s.
        utility: sequences of F_u's parts together.
    """
    return max(_filtered(p, q, estimator, safety, utility) for p, q in _sizes(core))


def _sizes(core: Core) -> list[tuple[int, int]]:
    return [(out[1], into[1]) for out, into in core.values()]


def _collected(p: int, q: int, estimator: str, sequences: int) -> int:
    samples = FP32 * sequences * p * q
    # Both factors, and the numbers of sequences and tokens.
    kronecker = FP64 * (p * p + q * q) + FP32 + FP64
    return {
        "exact": samples,
        "kfac": kronecker,
        "ekfac": kronecker + samples,
        "diagonal": FP64 * p * q + FP32,
        "vila": 2 * FP64 * p * q + FP32,
    }[estimator]


def _kept(p: int, q: int, estimator: str, sequences: int) -> int:
    # The exact one's file has a weight for each sample, and a scale.
    return {
        "exact": FP32 * sequences * p * q + FP64 * sequences + FP64,
        "kfac": FP64 * (p * p + q * q),
        "ekfac": FP64 * (p * p + q * q + p * q),
        "diagonal": FP64 * p * q,
        "vila": FP64 * p * q,
    }[estimator]


def _filtered(p: int, q: int, estimator: str, safety: int, utility: int) -> int:
    size, both = p * q, safety + utility
    if estimator in ("diagonal", "vila"):
        return 4 * FP64 * size
    if estimator == "kfac":
        return 8 * FP64 * (p * p + q * q)
    # The mixture of F_u's samples, and all samples in fp64.
    samples = FP32 * utility * size + FP64 * both * size if estimator == "exact" else 0
    if estimator == "exact" and both < size:
        # Stacked once more, with their Gram matrix.
        return samples + FP64 * both * size + FP64 * both * both
    # Both Fishers, their sum and its Cholesky factor.
    return samples + 4 * FP64 * size * size
