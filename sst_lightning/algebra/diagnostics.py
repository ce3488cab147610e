"""What a report shows of a merge: where safety was kept, and how far the spectrum can be trusted."""

from collections.abc import Mapping

import numpy as np

from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.filters import kept_energy
from sst_lightning.algebra.fisher import ExactFisher, ModuleFisher
from sst_lightning.algebra.gevp import held_out_values, solve

SPECTRUM_DIRECTIONS = 32


def kept_energy_by_module(
    before: Cores, after: Cores, safety: Mapping[str, ModuleFisher] | None = None
) -> dict[str, float]:
    """Return the share of the safety adapter's energy that a filter keeps, module by module.

    With F_s the energy is δᵀF_s δ, the safety that a second-order model says is gained: the soft
    filter never raises it, while ‖δ‖² may grow. Without F_s it is ‖δ‖². 0 where ΔW is 0.

    Args:
        before: safety cores.
        after: filtered cores.
        safety: F_s by module.
    """
    if safety is None:
        return {name: kept_energy(before[name], after[name]) for name in before}
    shares = {}
    for name, core in before.items():
        total = safety[name].rayleigh(core)
        shares[name] = safety[name].rayleigh(after[name]) / total if total > 0 else 0.0
    return shares


def spectrum(
    safety: Mapping[str, ModuleFisher], utility: Mapping[str, ModuleFisher], damping: float = 0.1
) -> dict[str, list[float]] | None:
    """Compare generalised eigenvalues with their Rayleigh quotients on sequences not used for them.

    In-sample eigenvalues overstate (docs/mathematics.md section 4): F_s v = λ F_u v is solved on the
    even-numbered sequences and the quotients vᵀF_s v / vᵀF_u v are taken on the odd-numbered ones.

    Args:
        safety: F_s by module.
        utility: F_u by module.
        damping: relative damping of F_u.

    Returns:
        ``in_sample`` and ``held_out``: for the i-th largest direction of each module, the geometric
        mean over modules. ``None`` for Fishers that do not keep sequences, or with fewer than four.
    """
    in_sample: list[np.ndarray] = []
    held_out: list[np.ndarray] = []
    for name, fisher_safety in safety.items():
        fisher_utility = utility[name]
        if not (isinstance(fisher_safety, ExactFisher) and isinstance(fisher_utility, ExactFisher)):
            return None
        if min(fisher_safety.count, fisher_utility.count) < 4:
            return None
        fit = [half(fisher, 0).normalised() for fisher in (fisher_safety, fisher_utility)]
        test = [half(fisher, 1).normalised() for fisher in (fisher_safety, fisher_utility)]
        eigen = solve(fit[0], fit[1], damping)
        # Beyond the rank of the safety half λ is 0 and the direction arbitrary.
        count = min(SPECTRUM_DIRECTIONS, len(eigen.values), fit[0].count)
        values = held_out_values(eigen.vectors[:, :count], test[0], test[1], damping)
        in_sample.append(np.asarray(eigen.values[:count], dtype=np.float64))
        held_out.append(np.asarray(values, dtype=np.float64))
    count = min(map(len, in_sample))
    return {
        "in_sample": _geometric_mean(in_sample, count),
        "held_out": _geometric_mean(held_out, count),
    }


def half(fisher: ExactFisher, start: int) -> ExactFisher:
    """Return the Fisher of every second sequence, from ``start`` (0 or 1).

    A sequence that was taken at several points is in one half with all of its samples.
    """
    chosen = fisher.numbers() % 2 == start
    weights = None if fisher.weights is None else fisher.weights[chosen]
    return ExactFisher(fisher.samples[chosen], weights)


def _geometric_mean(rows: list[np.ndarray], count: int) -> list[float]:
    stacked = np.stack([row[:count] for row in rows])
    # A quotient of exactly 0 (a direction no held-out sequence touches) must not make the mean 0.
    floor = np.finfo(np.float64).tiny
    return [float(value) for value in np.exp(np.log(np.maximum(stacked, floor)).mean(axis=0))]
