"""Fishers of all modules with what identifies them, and their safetensors file."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.eigen_fisher import EigenFisher
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.files import atomic_file
from sst_lightning.algebra.fisher import (
    DiagonalFisher,
    ExactFisher,
    KroneckerFisher,
    ModuleFisher,
    mix_modules,
)
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.algebra.tensor_file import TensorFile, write_tensors

FORMAT = "sst-merge fisher 1"


@dataclass(frozen=True)
class FisherMetadata:
    """Identity of a Fisher.

    Attributes:
        base_model: hub id or path of the base model.
        base_fingerprint: hash of the base weights.
        adapter_fingerprints: hashes of the adapters that span the core space, utility first.
        data_name: calibration set.
        data_fingerprint: hash of its rows.
        count: number of sequences.
        estimator: ``exact``, ``kfac``, ``ekfac``, ``diagonal`` or ``vila``.
        point: the weights the gradients were taken at.
        point_fingerprint: hash of these weights; empty in files of earlier versions.
        available: number of rows of the calibration set; ``None`` means ``count``.
        stopped: why fewer rows were taken, ``max_samples`` or ``converged``; empty if all were.
        similarity: similarity of the leading eigenspaces of two halves at the end
            (:class:`~sst_lightning.algebra.eigenspace.EigenspaceMonitor`), where it was measured.
        sequences: numbers of the rows taken, if fewer than all.
    """

    base_model: str
    base_fingerprint: str
    adapter_fingerprints: list[str]
    data_name: str
    data_fingerprint: str
    count: int
    estimator: str
    point: str
    point_fingerprint: str = ""
    available: int | None = None
    stopped: str = ""
    similarity: float | None = None
    sequences: list[int] | None = None


@dataclass(frozen=True)
class FisherStatistics:
    """One Fisher: an estimate per module, the core space it is expressed in, its identity.

    Attributes:
        modules: module name to estimate.
        space: core space of the estimates.
        metadata: identity.
        path: file it was read from.
    """

    modules: Mapping[str, ModuleFisher]
    space: CoreSpace
    metadata: FisherMetadata
    path: Path | None = None

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the metadata in its header, atomically."""
        tensors = self.space.state()
        for name, fisher in self.modules.items():
            for key, tensor in _tensors(fisher).items():
                tensors[f"{key}/{name}"] = tensor.contiguous()
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=_header(self.metadata))

    @classmethod
    def load(cls, path: str | Path) -> "FisherStatistics":
        """Read what :meth:`save` wrote.

        Raises:
            FisherError: the file is missing, truncated, or not a Fisher file.
        """
        opened = cls.open(path)
        return replace(
            opened, modules=dict(opened.modules), space=CoreSpace(dict(opened.space.bases))
        )

    @classmethod
    def open(cls, path: str | Path) -> "FisherStatistics":
        """Read what :meth:`save` wrote, each module when it is asked for.

        Raises:
            FisherError: the file is missing, truncated, or not a Fisher file.
        """
        path = Path(path)
        if not path.is_file():
            raise FisherError(f"{path}: no such Fisher file; collect it with sst-merge validate")
        try:
            file = TensorFile(path)
        except SSTMergeError as error:
            raise FisherError(f"{error}; collect it again") from error
        if file.metadata.get("format") != FORMAT:
            raise FisherError(f"{path}: not a Fisher file of this program ('{FORMAT}' expected)")
        try:
            metadata = FisherMetadata(**json.loads(file.metadata["metadata"]))
            keys = _keys(metadata.estimator)
        except (KeyError, TypeError, ValueError) as error:
            raise FisherError(
                f"{path}: incomplete Fisher file ({error}); collect it again"
            ) from error
        space = CoreSpace.streamed_state(file.shapes, file.read)
        if metadata.estimator == "exact" and not any(
            key.startswith("weights/") for key in file.shapes
        ):
            keys = ("samples",)
        for key in (f"{key}/{name}" for name in space.bases for key in ("q_in", *keys)):
            if key not in file.shapes:
                raise FisherError(
                    f"{path}: incomplete Fisher file ('{key}' is missing); collect it again"
                )

        def read(name: str) -> ModuleFisher:
            return _fisher([file.read(f"{key}/{name}") for key in keys], metadata)

        return cls(LazyMapping(space.bases, read), space, metadata, path)

    def check_matches(
        self,
        base_fingerprint: str,
        adapter_fingerprints: Sequence[str],
        point: str,
        data_fingerprint: str,
        count: int,
    ) -> None:
        """Refuse a Fisher of another merge: other weights, another point, other rows.

        Args:
            base_fingerprint: hash of the base weights.
            adapter_fingerprints: hashes of the adapters, utility first.
            point: the weights the gradients must have been taken at.
            data_fingerprint: hash of the calibration rows.
            count: number of calibration rows, of which the Fisher may have taken a part.

        Raises:
            FisherError: names the file and what differs.
        """
        expected = {
            "base_fingerprint": base_fingerprint,
            "adapter_fingerprints": list(adapter_fingerprints),
            "point": point,
            "data_fingerprint": data_fingerprint,
            "count": count,
        }
        for field, value in expected.items():
            found = getattr(self.metadata, field)
            if field == "count" and self.metadata.available is not None:
                found = self.metadata.available
            if found != value:
                raise FisherError(
                    f"{self.path}: {field} is {_short(found)}, but this merge has {_short(value)}: "
                    "the Fisher belongs to another merge. Collect it again with sst-merge validate"
                )

    def to_space(self, space: CoreSpace) -> "FisherStatistics":
        """Express the Fisher in the bases of ``space``, which must span the same modules' ΔW.

        A core space is computed again from the adapters whenever they are loaded; on another
        machine its axes may differ in sign, and near-equal singular values in direction.

        Raises:
            FisherError: names the file and the module whose bases span something else.
        """
        return replace(self.streamed_to_space(space), modules=dict(self._in_space(space)))

    def streamed_to_space(self, space: CoreSpace) -> "FisherStatistics":
        """Express the Fisher in the bases of ``space``, each module when it is asked for."""
        return replace(self, modules=self._in_space(space), space=space)

    def _in_space(self, space: CoreSpace) -> Mapping[str, ModuleFisher]:
        if set(space.bases) != set(self.modules):
            differing = sorted(set(space.bases) ^ set(self.modules))
            raise FisherError(
                f"{self.path}: module '{differing[0]}' is only in the Fisher or only in the "
                "merge's core space; collect the Fisher again with these adapters"
            )

        def rotated(name: str) -> ModuleFisher:
            new, old, fisher = space.bases[name], self.space.bases[name], self.modules[name]
            if torch.equal(new.q_out, old.q_out) and torch.equal(new.q_in, old.q_in):
                return fisher
            change = new.change_from(old)
            if change is None:
                raise FisherError(
                    f"{self.path}: the core space of module '{name}' is not that of this merge; "
                    "collect the Fisher again with these adapters"
                )
            try:
                return fisher.rotated(*change)
            except FisherError as error:
                raise FisherError(f"{self.path}: module '{name}': {error}") from error

        return LazyMapping(self.modules, rotated)


def write_samples(
    path: str | Path,
    space: CoreSpace,
    metadata: FisherMetadata,
    estimates: Iterable[tuple[str, ModuleFisher]],
) -> None:
    """Write a Fisher file of samples of equal weight, one module in memory after the other.

    Args:
        path: file; replaced in one step.
        space: core space of the estimates.
        metadata: identity; its ``count`` is that of every module's samples.
        estimates: each module of ``space``, in its order, with its exact Fisher.
    """
    shapes: dict[str, tuple[int, ...]] = {
        f"samples/{name}": (metadata.count, *basis.shape) for name, basis in space.bases.items()
    }
    bases = space.state()
    shapes |= {name: tuple(tensor.shape) for name, tensor in bases.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, fisher in estimates:
            assert isinstance(fisher, ExactFisher)
            assert fisher.weights is None
            yield f"samples/{name}", fisher.samples
        yield from bases.items()

    with atomic_file(path) as temporary:
        write_tensors(temporary, shapes, tensors(), _header(metadata))


def mix(parts: Sequence[tuple[float, FisherStatistics]]) -> Mapping[str, ModuleFisher]:
    """Return Σ w_i F_i / Σ w_i in the first part's core space, each module when it is asked for.

    See :func:`~sst_lightning.algebra.fisher.mix_modules`.

    Raises:
        FisherError: nothing to mix, or Fishers of different estimators, spaces or modules.
    """
    if not parts:
        raise FisherError("a Fisher mixture needs at least one part")
    first = parts[0][1]
    # ``diagonal`` and ``vila`` are of one class, but not one estimate.
    if any(part.metadata.estimator != first.metadata.estimator for _, part in parts):
        raise FisherError("only Fishers of one estimator can be mixed")
    if any(set(part.modules) != set(first.modules) for _, part in parts):
        raise FisherError("only Fishers of the same modules can be mixed")
    # Everything is expressed in the first part's bases, which costs nothing where they are equal.
    rotated = [(weight, part.streamed_to_space(first.space)) for weight, part in parts]
    return LazyMapping(
        first.modules,
        lambda name: mix_modules([(weight, part.modules[name]) for weight, part in rotated]),
    )


def _header(metadata: FisherMetadata) -> dict[str, str]:
    return {"format": FORMAT, "metadata": json.dumps(asdict(metadata))}


def _tensors(fisher: ModuleFisher) -> dict[str, Tensor]:
    if isinstance(fisher, ExactFisher):
        weights = torch.ones(fisher.count) if fisher.weights is None else fisher.weights
        scale = torch.tensor(fisher.scale, dtype=torch.float64)
        return {"samples": fisher.samples, "weights": weights.double(), "scale": scale}
    if isinstance(fisher, KroneckerFisher):
        return {"output_factor": fisher.output_factor, "input_factor": fisher.input_factor}
    if isinstance(fisher, EigenFisher):
        bases = {"output_basis": fisher.output_basis, "input_basis": fisher.input_basis}
        return {**bases, "values": fisher.values}
    assert isinstance(fisher, DiagonalFisher)
    return {"diagonal": fisher.diagonal}


def _keys(estimator: str) -> tuple[str, ...]:
    """Names of an estimate's tensors, in the order :func:`_fisher` takes them."""
    keys = {
        "exact": ("samples", "weights", "scale"),
        "kfac": ("output_factor", "input_factor"),
        "ekfac": ("output_basis", "input_basis", "values"),
        "diagonal": ("diagonal",),
        "vila": ("diagonal",),
    }
    if estimator not in keys:
        raise ValueError(f"unknown estimator '{estimator}'")
    return keys[estimator]


def _fisher(tensors: Sequence[Tensor], metadata: FisherMetadata) -> ModuleFisher:
    if metadata.estimator == "exact":
        taken = None if metadata.sequences is None else torch.tensor(metadata.sequences)
        if len(tensors) == 1:
            return ExactFisher(tensors[0], sequences=taken)
        samples, weights, scale = tensors
        return ExactFisher(samples, weights, float(scale), taken)
    if metadata.estimator == "kfac":
        return KroneckerFisher(tensors[0], tensors[1], metadata.count)
    if metadata.estimator == "ekfac":
        return EigenFisher(tensors[0], tensors[1], tensors[2], metadata.count)
    return DiagonalFisher(tensors[0], metadata.count)


def _short(value: object) -> str:
    texts = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return ", ".join(text if len(text) < 40 else f"{text[:12]}…" for text in texts)
