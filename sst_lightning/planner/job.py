"""What a run of one stage asks for: the numbers that its memory depends on."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["fit", "validate", "merge", "test"]
Accelerator = Literal["gpu", "cpu"]

ASSUMED_RANK = 32
"""Rank of adapters that are not there yet: the default of ``SupervisedLoRA``."""


@dataclass(frozen=True)
class Adapter:
    """Shape of one adapter.

    Attributes:
        name: folder, or what it is.
        rank: r of every module.
        modules: names of the base's modules that have factors.
    """

    name: str
    rank: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """A forward pass without gradients over a batch, and perhaps greedy answers to it.

    Attributes:
        name: what is read.
        sequences: sequences of a batch.
        tokens: tokens of the longest sequence.
        scored: positions of a batch whose logits are in memory together.
        answer: most tokens of an answer; 0 without answers.
        suite: of an evaluation suite, which runs on the first storage of the base alone.
    """

    name: str
    sequences: int
    tokens: int
    scored: int
    answer: int
    suite: bool = False


@dataclass(frozen=True)
class Job:
    """One stage.

    Attributes:
        stage: what is run.
        base: name of the base model.
        dtype: of the base weights.
        attention: ``sdpa`` or ``eager``.
        quantization: ``nf4``, or none.
        accelerator: where the model is.
        processes: processes of all nodes together; each has a whole model, unless it is sharded.
        batch_size: sequences of a batch in training and Fisher passes.
        tokens: tokens of the longest of them.
        labelled: positions of a sequence that predict a label.
        adapters: adapters that are trained, merged or tested.
        readings: batches that are read without gradients.
        gradient_checkpointing: of ``fit``.
        accumulate: batches of an optimizer step.
        optimizer: ``adamw``, ``adamw_8bit`` or ``paged_adamw_8bit``.
        checkpoints: checkpoint files that are kept.
        estimator: Fisher estimator; empty without Fishers.
        samples: sequences of each calibration set, in the order they are collected.
        at_merge: the same for one iteration at the merge; empty without iterations.
        merges: merged adapters that are written.
        fisher_files: whether Fishers are written: the gradients of a block are in memory then, and
            those of an exact Fisher never all together.
        block_samples: sequences of a block, of all processes together.
        memory_budget_gib: GiB of gradients that a process keeps.
        reads_fishers: whether a merge reads ``samples`` from Fisher files.
        sharded: whether the decoder layers are divided among the processes (``fsdp``).
        served_on: dtype and quantization of the bases that a merge's models are read on, the first
            one with suites; empty where none are given: its own base alone.
    """

    stage: Stage
    base: str
    dtype: str
    attention: str
    quantization: str | None
    accelerator: Accelerator
    processes: int
    batch_size: int
    tokens: int
    labelled: int
    adapters: tuple[Adapter, ...] = ()
    readings: tuple[Reading, ...] = ()
    gradient_checkpointing: bool = False
    accumulate: int = 1
    optimizer: str = "adamw"
    checkpoints: int = 0
    estimator: str = ""
    samples: tuple[tuple[str, int], ...] = ()
    at_merge: tuple[tuple[str, int], ...] = ()
    merges: int = 0
    fisher_files: bool = False
    block_samples: int = 64
    memory_budget_gib: float = 4.0
    reads_fishers: bool = False
    sharded: bool = False
    served_on: tuple[tuple[str, str | None], ...] = ()

    @property
    def shards(self) -> int:
        """Parts of every decoder layer; 1 where layers are not divided."""
        return self.processes if self.sharded else 1
