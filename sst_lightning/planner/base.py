"""The base model in memory: while it is loaded, after that, and while its layers are gathered."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from sst_lightning.planner.architecture import Architecture, parameter_bytes
from sst_lightning.planner.job import Job
from sst_lightning.planner.passes import linear_shapes
from sst_lightning.planner.phase import Phase, Term
from sst_lightning.planner.sharding import GATHERED, layer_bytes, outside_bytes, share_bytes

CUDA_CONTEXT = 1 << 29
"""CUDA context and kernels of a process, as they are usually; not measured by this project."""


class Base:
    """A base as a job stores it.

    Args:
        job: says dtype, quantization, accelerator and shards.
        architecture: its shapes.
        program: bytes of the process before it has loaded anything.

    Attributes:
        model: on the meta device.
        shapes: (d_out, d_in) of its linear layers.
        file: bytes of its files.
        views: bytes of its weights that are views of the mapped file.
        layer: bytes of the largest decoder layer before it is divided; 0 where layers are not.
    """

    def __init__(self, job: Job, architecture: Architecture, program: int) -> None:
        self.job = job
        self.architecture = architecture
        self.program = program
        self.model = self.build()
        self.shapes = linear_shapes(self.model)
        self.weights = share_bytes(self.model, job.shards)
        plain = architecture.build(job.dtype)
        numbers = sum(p.numel() for p in plain.parameters())
        stored = architecture.stored or plain.dtype
        self.whole = parameter_bytes(plain)
        self.file = numbers * torch.empty((), dtype=stored).element_size()
        self.shared = stored == plain.dtype
        # Now, because a training step leaves its adapter in the model. Under fsdp the adapter that is
        # trained is divided with the layers; those in a merge's hooks are not.
        self.views = self._views()
        trained = job.adapters[0] if job.stage == "fit" else None
        self.layer = layer_bytes(self.model, self.shapes, trained) if job.sharded else 0
        self.process = [Term("program: Python and libraries", program, "host")]
        if job.accelerator == "gpu":
            self.process.append(Term("CUDA context (assumed)", CUDA_CONTEXT))

    def build(self) -> PreTrainedModel:
        """Return a new model on the meta device: a training step leaves its adapter in it."""
        job = self.job
        return self.architecture.build(job.dtype, job.attention, job.quantization, job.accelerator)

    def loading(self) -> Phase:
        """The model's file is mapped; what is not used as it is in the file is copied."""
        terms = [*self.process, Term("base model's file, mapped", self.file, "host")]
        if self.job.sharded:
            # Each process loads the whole base, which then goes to its device a layer at a time.
            if not self.shared:
                terms.append(Term("base weights before they are divided", self.whole, "host"))
            if self.job.accelerator == "gpu":
                terms.append(Term("a layer before it is divided", self.layer))
        copied = self.weights - self.views
        weights = (Term("base weights", copied),) if copied else ()
        return Phase("loading the base", (*terms, *weights))

    def gathered(self) -> list[Term]:
        """What a pass gathers of the layers of other processes, where layers are divided."""
        if not self.job.sharded:
            return []
        return [Term("layers gathered from all processes", GATHERED * self.layer)]

    def stored_as(self, dtype: str, quantization: str | None) -> "Base":
        """Return the same base in another storage."""
        job = replace(self.job, dtype=dtype, quantization=quantization)
        return Base(job, self.architecture, self.program)

    def standing(self) -> list[Term]:
        """What is there in every phase after loading."""
        terms = [*self.process, Term("base weights", self.weights)]
        if 0 < self.views < self.weights:
            # All of the file has been read, and as long as it has views it stays mapped.
            rest = self.file - self.views
            terms.append(Term("base model's file, still mapped", rest, "host"))
        return terms

    def _views(self) -> int:
        if self.job.accelerator == "gpu" or not self.shared:
            return 0
        if self.job.quantization:
            return self._unquantised()
        return outside_bytes(self.model) if self.job.sharded else self.weights

    def _unquantised(self) -> int:
        linears = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        head = self.model.get_output_embeddings().weight
        return sum(
            p.numel() * p.element_size()
            for p in self.model.parameters()
            if id(p) not in linears or p is head
        )
