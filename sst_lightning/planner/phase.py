"""A plan: the phases of a stage, and the terms that are in memory in each."""

from dataclasses import dataclass
from typing import Any

from sst_lightning.planner.job import Job


@dataclass(frozen=True)
class Term:
    """Some bytes.

    Attributes:
        name: what they hold.
        size: bytes.
        place: ``device``, ``host`` or ``disk``; on the CPU device and host are one process.
    """

    name: str
    size: int
    place: str = "device"


@dataclass(frozen=True)
class Phase:
    """A part of a stage with everything that is in memory at its peak.

    Attributes:
        name: what is done.
        terms: what is in memory.
        products: shapes of half-precision matrix products that are taken.
        holes: bytes that a CPU's allocator has free between the tensors of a pass.
    """

    name: str
    terms: tuple[Term, ...]
    products: frozenset[tuple[Any, ...]] = frozenset()
    holes: int = 0

    def size(self, *places: str) -> int:
        """Return the bytes in some places."""
        return sum(term.size for term in self.terms if term.place in places)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        job: the stage.
        phases: its phases in order.
        disk: what it reads and writes.
    """

    job: Job
    phases: tuple[Phase, ...]
    disk: tuple[Term, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """Places that share the memory in which the model is."""
        return ("device", "host") if self.job.accelerator == "cpu" else ("device",)

    @property
    def peak(self) -> Phase:
        """Phase with most memory where the model is."""
        return max(self.phases, key=lambda phase: phase.size(*self.places))

    @property
    def memory(self) -> int:
        """Bytes of a process where the model is, at the peak."""
        return self.peak.size(*self.places)

    @property
    def host_peak(self) -> Phase:
        """Phase with most host memory."""
        return max(self.phases, key=lambda phase: phase.size("host"))

    @property
    def largest(self) -> Term:
        """Largest term of the peak."""
        terms = [term for term in self.peak.terms if term.place in self.places]
        return max(terms, key=lambda term: term.size)
