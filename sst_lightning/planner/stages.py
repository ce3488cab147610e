"""The phases of each stage, and what is in memory in them."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from sst_lightning.algebra.fisher_blocks import GIBIBYTE
from sst_lightning.modules.collection_limits import CollectionLimits
from sst_lightning.planner.architecture import Architecture
from sst_lightning.planner.base import Base
from sst_lightning.planner.cpu import TRAINING_HOLES, VALIDATION_HOLES, with_compiled, with_holes
from sst_lightning.planner.job import Job
from sst_lightning.planner.passes import (
    GRADIENTS,
    Pass,
    core_shapes,
    fisher_step,
    reading_step,
    training_step,
)
from sst_lightning.planner.phase import Phase, StagePlan, Term
from sst_lightning.planner.storage import (
    FP32,
    adapter_bytes,
    basis_bytes,
    factor_counts,
    filter_bytes,
    finished_bytes,
    fisher_bytes,
    fisher_file_bytes,
    module_bytes,
    optimizer_bytes,
    paged_bytes,
)

HOOKS = "merge in the model's hooks"


@lru_cache(maxsize=64)
def plan_stage(job: Job, architecture: Architecture, program: int) -> StagePlan:
    """Predict one stage.

    Args:
        job: the stage.
        architecture: of its base.
        program: bytes of the process before it has loaded anything.
    """
    with warnings.catch_warnings():
        # transformers warns of names that PEFT uses.
        warnings.simplefilter("ignore", FutureWarning)
        return _Planner(job, Base(job, architecture, program)).plan()


class _Planner:
    def __init__(self, job: Job, base: Base) -> None:
        self.job = job
        self.base = base
        self.core = core_shapes(base.model, job.adapters)
        self.adapters = {a.name: adapter_bytes(base.shapes, a) for a in job.adapters}

    def plan(self) -> StagePlan:
        stage = {"fit": self.fit, "validate": self.validate, "merge": self.merge, "test": self.test}
        phases, disk = stage[self.job.stage]()
        model_file = Term("base model", self.base.file, "disk")
        phases = [self.base.loading(), *phases]
        if self.job.accelerator == "cpu":
            phases = with_holes(with_compiled(phases))
        return StagePlan(self.job, tuple(phases), (model_file, *disk))

    def fit(self) -> tuple[list[Phase], list[Term]]:
        job = self.job
        (adapter,) = job.adapters
        size = self.adapters[adapter.name]
        counts = factor_counts(self.base.shapes, adapter)
        state = optimizer_bytes(counts, job.optimizer)
        paged = paged_bytes(counts, job.optimizer)
        own = math.ceil(size / job.shards)
        standing = [
            *self.base.standing(),
            Term("adapter", own),
            Term("optimizer state", math.ceil((state - paged) / job.shards)),
        ]
        if job.processes > 1 and not job.sharded:
            standing.append(Term("DDP's buckets of gradients", size))
        gradients = Term("gradients of the adapter", own)
        # Between updates the driver moves it out where the device is full.
        outside = [Term("optimizer state, paged out", paged, "host")] if paged else []
        inside = [Term("optimizer state, paged in", paged)] if paged else []
        step = [*standing, *outside, *self.base.gathered()]
        phases = [
            _phase("training step", step, self.training_step(), TRAINING_HOLES),
            Phase("optimizer step", (*standing, *inside, gradients)),
        ]
        disk = [Term("adapter", size, "disk")]
        if job.checkpoints:
            written = Term("checkpoint being written", size + state, "host")
            phases.append(Phase("checkpoint", (*standing, *outside, gradients, written)))
            disk.append(
                Term(f"checkpoints ({job.checkpoints})", job.checkpoints * (size + state), "disk")
            )
        return phases, disk

    def training_step(self) -> Pass:
        """The step; layers that are computed again leave as many holes as layers that are kept."""
        step = training_step(self.base.model, self.job)
        if self.job.accelerator == "cpu" and self.job.gradient_checkpointing:
            kept = training_step(self.base.build(), replace(self.job, gradient_checkpointing=False))
            step = replace(step, small=kept.small)
        if self.job.sharded and GRADIENTS in step.peak:
            # Each layer's are summed and divided as soon as they are there.
            own = math.ceil(step.peak[GRADIENTS] / self.job.shards)
            step = replace(step, peak={**step.peak, GRADIENTS: own})
        return step

    def validate(self) -> tuple[list[Phase], list[Term]]:
        standing = [*self.base.standing(), *self.merging()]
        return self.collecting(standing, self.job.samples, ""), self.fisher_disk()

    def merge(self) -> tuple[list[Phase], list[Term]]:
        job = self.job
        own = self.merging()
        standing = [*self.base.standing(), *own]
        phases: list[Phase] = []
        kept: list[Term] = []
        if job.estimator:
            kept = [self.fishers("Fishers", job.samples)]
            if job.reads_fishers:
                phases.append(Phase("Fisher files read", (*standing, *kept)))
            else:
                phases += self.collecting(standing, job.samples, "")
            if job.at_merge:
                phases += self.collecting([*standing, *kept], job.at_merge, " at the merge")
                kept.append(self.fishers("Fishers at the merge", job.at_merge))
            samples = dict(job.samples)
            utility = sum(samples.values()) - samples["safety"] + sum(dict(job.at_merge).values())
            solve = filter_bytes(self.core, job.estimator, samples["safety"], utility)
            phases.append(
                Phase("filter", (*standing, *kept, Term("one module's filter", solve, "host")))
            )
        merged = Term("merged adapter", self.merged() * job.merges, "host")
        beside = [*own, *kept[:1], merged]
        verified = [*self.base.standing(), *beside, *self.verification()]
        phases += [Phase("verification", tuple(verified)), *self.served(beside)]
        disk = [Term(f"merged adapters ({job.merges})", self.merged() * job.merges, "disk")]
        return phases, [*self.fisher_disk(), *disk]

    def served(self, beside: list[Term]) -> list[Phase]:
        """Read the models on each storage of the base; that which is loaded is freed before another.

        Args:
            beside: what there is beside the base.
        """
        own = self.job.dtype, self.job.quantization
        storages = self.job.served_on or (own,)
        phases = []
        # As ``Comparison`` does: what is loaded goes first.
        for storage in sorted(storages, key=lambda item: item != own):
            suites = storage == storages[0]
            if storage == own:
                standing = [*self.base.standing(), *beside]
                phases += self.reading(standing, self.base, suites)
                continue
            dtype, quantization = storage
            base = self.base.stored_as(dtype, quantization)
            loading = base.loading()
            unhooked = [term for term in beside if term.name != HOOKS]
            there = [
                replace(loading, terms=(*loading.terms, *unhooked)),
                *self.reading([*base.standing(), *beside], base, suites),
            ]
            phases += [replace(p, name=f"{p.name}, in {quantization or dtype}") for p in there]
        return phases

    def test(self) -> tuple[list[Phase], list[Term]]:
        standing = self.base.standing()
        for adapter in self.job.adapters:
            standing.append(Term("adapter", self.adapters[adapter.name]))
            standing.append(Term("adapter as it was read", self.adapters[adapter.name], "host"))
        return self.reading(standing, self.base), self.input_disk()

    def merging(self) -> list[Term]:
        """What ``MergeModule`` has beside its base: adapters, bases, and what its hooks hold."""
        bases = basis_bytes(self.core)
        outputs = sum(FP32 * rows * columns for (rows, columns), _ in self.core.values())
        # Q_out M of the current point; on a GPU also Q_in, and the copies that gradients need.
        hooks = outputs if self.job.accelerator == "cpu" else 2 * bases
        return [
            Term("adapters to merge", sum(self.adapters.values()), "host"),
            Term("core bases", bases, "host"),
            Term(HOOKS, hooks),
        ]

    def collecting(
        self, standing: list[Term], samples: Iterable[tuple[str, int]], where: str
    ) -> list[Phase]:
        """Collect the sets one after the other, then finish them one after the other."""
        samples = list(samples)
        collected = Term(f"Fishers{where}", self.collected([n for _, n in samples]), "host")
        step = fisher_step(self.base.model, self.job)
        standing_then = [*standing, collected, *self.base.gathered()]
        phases = [_phase(f"Fisher pass{where}", standing_then, step, VALIDATION_HOLES)]
        most = max(count for _, count in samples)
        if self.streams:
            # Blocks and file are mapped; what is joined is in memory twice, in two orders.
            joined = Term("a module's samples joined", 2 * module_bytes(self.core, most), "host")
            return [*phases, Phase(f"Fishers{where} finished", (*standing, joined))]
        # Samples of a set are joined for all modules before its parts are let go.
        joined = Term(
            "a set's samples joined", fisher_bytes(self.core, self.job.estimator, most), "host"
        )
        kept = self.fishers(f"Fishers{where}", samples)
        return [*phases, Phase(f"Fishers{where} finished", (*standing, kept, joined))]

    @property
    def streams(self) -> bool:
        """Whether Fishers are read from their files, module by module."""
        return self.job.estimator == "exact" and (self.job.fisher_files or self.job.reads_fishers)

    def collected(self, counts: list[int]) -> int:
        """Bytes of what is collected and not on disk."""
        job = self.job
        if job.fisher_files:
            limits = CollectionLimits(
                job.estimator,  # type: ignore[arg-type]
                block_samples=job.block_samples,
                memory_budget_gib=job.memory_budget_gib,
            )
            sequence = fisher_bytes(self.core, "exact", 1)
            block = job.batch_size * limits.block_batches(job.batch_size, job.processes, sequence)
            most = max(counts)
            return fisher_bytes(self.core, job.estimator, min(most, block))
        total = sum(fisher_bytes(self.core, job.estimator, count) for count in counts)
        return min(total, int(job.memory_budget_gib * GIBIBYTE))

    def fishers(self, name: str, samples: Iterable[tuple[str, int]]) -> Term:
        if self.streams:
            sizes = [module_bytes(self.core, count) for _, count in samples]
            return Term(f"{name}, one module", sum(sizes), "host")
        sizes = [finished_bytes(self.core, self.job.estimator, count) for _, count in samples]
        return Term(name, sum(sizes), "host")

    def merged(self) -> int:
        """Bytes of a merged adapter: as its rank, the sum of ranks that no truncation lowers."""
        rank = max((out[1] for out, _ in self.core.values()), default=0)
        return sum(FP32 * rank * (out[0] + into[0]) for out, into in self.core.values())

    def verification(self) -> list[Term]:
        """Logits of one row of each set, for every input, the merge, and what compares them."""
        job = self.job
        rows = max(len(job.samples), 2)
        logits = FP32 * rows * job.tokens * self.base.model.config.vocab_size
        inputs = len(job.adapters) + 1 + (len(job.adapters) > 2)
        return [
            Term("logits of the inputs", inputs * logits),
            Term("logits compared", 3 * logits),
            Term("merged adapter in PEFT", self.merged()),
        ]

    def reading(self, standing: list[Term], base: Base, suites: bool = True) -> list[Phase]:
        adapter = self.job.adapters[0] if self.job.stage == "test" and self.job.adapters else None
        return [
            _phase(r.name, standing, reading_step(base.model, r, adapter), VALIDATION_HOLES)
            for r in self.job.readings
            if suites or not r.suite
        ]

    def input_disk(self) -> list[Term]:
        return [Term("adapters read", sum(self.adapters.values()), "disk")] if self.adapters else []

    def fisher_disk(self) -> list[Term]:
        if not (self.job.fisher_files or self.job.reads_fishers):
            return self.input_disk()
        files = [
            Term(f"Fisher file {name}", fisher_file_bytes(self.core, self.job.estimator, n), "disk")
            for name, n in self.job.samples
        ]
        # Blocks and files are there together until all files are complete.
        blocks = sum(fisher_bytes(self.core, self.job.estimator, n) for _, n in self.job.samples)
        passing = [Term("blocks of unfinished Fishers", blocks, "disk")]
        return [*self.input_disk(), *files, *(passing if self.job.fisher_files else [])]


def _phase(name: str, standing: Iterable[Term], step: Pass, holes: float) -> Phase:
    terms = [Term(kind, size) for kind, size in step.peak.items()]
    return Phase(name, (*standing, *terms), step.products, int(holes * step.small))
