"""The phases of each stage, and what is in memory in them."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedModel

from sst_lightning.algebra.fisher_blocks import GIBIBYTE
from sst_lightning.modules.collection_limits import CollectionLimits
from sst_lightning.planner.architecture import Architecture, parameter_bytes
from sst_lightning.planner.cpu import with_compiled, with_holes
from sst_lightning.planner.job import Job
from sst_lightning.planner.passes import (
    Pass,
    core_shapes,
    fisher_step,
    linear_shapes,
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

CUDA_CONTEXT = 1 << 29
"""CUDA context and kernels of a process, as they are usually; not measured by this project."""


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
        return _Planner(job, architecture, program).plan()


class _Planner:
    def __init__(self, job: Job, architecture: Architecture, program: int) -> None:
        self.job = job
        self.architecture = architecture
        self.model = self.build()
        self.shapes = linear_shapes(self.model)
        self.core = core_shapes(self.model, job.adapters)
        self.weights = parameter_bytes(self.model)
        plain = architecture.build(job.dtype)
        numbers = sum(p.numel() for p in plain.parameters())
        stored = architecture.stored or plain.dtype
        self.file = numbers * torch.empty((), dtype=stored).element_size()
        self.shared = stored == plain.dtype
        self.base = [Term("program: Python and libraries", program, "host")]
        if job.accelerator == "gpu":
            self.base.append(Term("CUDA context (assumed)", CUDA_CONTEXT))
        self.adapters = {a.name: adapter_bytes(self.shapes, a) for a in job.adapters}

    def build(self) -> PreTrainedModel:
        """Return a new model on the meta device: a training step leaves its adapter in it."""
        job = self.job
        return self.architecture.build(job.dtype, job.attention, job.quantization, job.accelerator)

    def plan(self) -> StagePlan:
        stage = {"fit": self.fit, "validate": self.validate, "merge": self.merge, "test": self.test}
        phases, disk = stage[self.job.stage]()
        model_file = Term("base model", self.file, "disk")
        phases = [self.loading(), *phases]
        if self.job.accelerator == "cpu":
            phases = with_holes(with_compiled(phases))
        return StagePlan(self.job, tuple(phases), (model_file, *disk))

    def loading(self) -> Phase:
        """The model's file is mapped; what is not used as it is in the file is copied."""
        file = Term("base model's file, mapped", self.file, "host")
        copied = self.weights
        if self.job.accelerator == "cpu" and self.shared:
            copied -= self._unquantised() if self.job.quantization else self.weights
        weights = (Term("base weights", copied),) if copied else ()
        return Phase("loading the base", (*self.base, file, *weights))

    def standing(self) -> list[Term]:
        """What is there in every phase after loading."""
        terms = [*self.base, Term("base weights", self.weights)]
        if self.job.accelerator == "cpu" and self.shared and self.job.quantization:
            # Weights that are not quantised are views of the file, which so stays mapped; all of it
            # has been read.
            own = self._unquantised()
            terms.append(Term("base model's file, still mapped", self.file - own, "host"))
        return terms

    def fit(self) -> tuple[list[Phase], list[Term]]:
        job = self.job
        (adapter,) = job.adapters
        size = self.adapters[adapter.name]
        counts = factor_counts(self.shapes, adapter)
        state = optimizer_bytes(counts, job.optimizer)
        paged = paged_bytes(counts, job.optimizer)
        standing = [
            *self.standing(),
            Term("adapter", size),
            Term("optimizer state", state - paged),
        ]
        if job.processes > 1:
            standing.append(Term("DDP's buckets of gradients", size))
        gradients = Term("gradients of the adapter", size)
        # Between updates the driver moves it out where the device is full.
        outside = [Term("optimizer state, paged out", paged, "host")] if paged else []
        inside = [Term("optimizer state, paged in", paged)] if paged else []
        phases = [
            _phase("training step", [*standing, *outside], self.training_step()),
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
        step = training_step(self.model, self.job)
        if self.job.accelerator == "cpu" and self.job.gradient_checkpointing:
            kept = training_step(self.build(), replace(self.job, gradient_checkpointing=False))
            step = replace(step, small=kept.small)
        return step

    def validate(self) -> tuple[list[Phase], list[Term]]:
        phases = self.collecting(self.merging(), self.job.samples, "")
        return phases, self.fisher_disk()

    def merge(self) -> tuple[list[Phase], list[Term]]:
        job = self.job
        standing = self.merging()
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
        standing = [*standing, *kept[:1], merged]
        phases.append(Phase("verification", (*standing, *self.verification())))
        phases += self.reading(standing)
        disk = [Term(f"merged adapters ({job.merges})", self.merged() * job.merges, "disk")]
        return phases, [*self.fisher_disk(), *disk]

    def test(self) -> tuple[list[Phase], list[Term]]:
        standing = self.standing()
        for adapter in self.job.adapters:
            standing.append(Term("adapter", self.adapters[adapter.name]))
            standing.append(Term("adapter as it was read", self.adapters[adapter.name], "host"))
        return self.reading(standing), self.input_disk()

    def merging(self) -> list[Term]:
        """Standing terms of ``MergeModule``: adapters, bases, and what its hooks hold."""
        bases = basis_bytes(self.core)
        outputs = sum(FP32 * rows * columns for (rows, columns), _ in self.core.values())
        # Q_out M of the current point; on a GPU also Q_in, and the copies that gradients need.
        hooks = outputs if self.job.accelerator == "cpu" else 2 * bases
        return [
            *self.standing(),
            Term("adapters to merge", sum(self.adapters.values()), "host"),
            Term("core bases", bases, "host"),
            Term("merge in the model's hooks", hooks),
        ]

    def collecting(
        self, standing: list[Term], samples: Iterable[tuple[str, int]], where: str
    ) -> list[Phase]:
        """Collect the sets one after the other, then finish them one after the other."""
        samples = list(samples)
        collected = Term(f"Fishers{where}", self.collected([n for _, n in samples]), "host")
        step = fisher_step(self.model, self.job)
        phases = [_phase(f"Fisher pass{where}", [*standing, collected], step)]
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
        logits = FP32 * rows * job.tokens * self.model.config.vocab_size
        inputs = len(job.adapters) + 1 + (len(job.adapters) > 2)
        return [
            Term("logits of the inputs", inputs * logits),
            Term("logits compared", 3 * logits),
            Term("merged adapter in PEFT", self.merged()),
        ]

    def reading(self, standing: list[Term]) -> list[Phase]:
        adapter = self.job.adapters[0] if self.job.stage == "test" and self.job.adapters else None
        return [
            _phase(r.name, standing, reading_step(self.model, r, adapter))
            for r in self.job.readings
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

    def _unquantised(self) -> int:
        linears = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        head = self.model.get_output_embeddings().weight
        return sum(
            p.numel() * p.element_size()
            for p in self.model.parameters()
            if id(p) not in linears or p is head
        )


def _phase(name: str, standing: Iterable[Term], step: Pass) -> Phase:
    terms = [Term(kind, size) for kind, size in step.peak.items()]
    return Phase(name, (*standing, *terms), step.products, step.small)
