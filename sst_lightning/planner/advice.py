"""What to change in a run that does not fit, with what each change is predicted to save."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from sst_lightning.planner.architecture import Architecture
from sst_lightning.planner.job import Job
from sst_lightning.planner.phase import StagePlan
from sst_lightning.planner.stages import plan_stage

Size = Callable[[StagePlan], int]
"""The memory that is short: of the device, or of the host."""


@dataclass(frozen=True)
class Suggestion:
    """A change of the configuration.

    Attributes:
        text: the change.
        plan: the stage with the change.
        saving: bytes that the change alone saves.
    """

    text: str
    plan: StagePlan
    saving: int


def device_size(plan: StagePlan) -> int:
    """Bytes where the model is."""
    return plan.memory


def host_size(plan: StagePlan) -> int:
    """Bytes of the host."""
    return plan.host_peak.size("host")


def suggest(
    plan: StagePlan, architecture: Architecture, program: int, size: Size
) -> list[Suggestion]:
    """Return the changes that save memory, the largest saving first.

    Args:
        plan: the stage as it is.
        architecture: of its base.
        program: as of :func:`plan_stage`.
        size: the memory that is short.
    """
    found = []
    for text, job in _changes(plan.job):
        changed = plan_stage(job, architecture, program)
        saving = size(plan) - size(changed)
        if saving > 0:
            found.append(Suggestion(text, changed, saving))
    return sorted(found, key=lambda item: -item.saving)


def enough(
    plan: StagePlan, architecture: Architecture, program: int, size: Size, limit: int
) -> list[Suggestion]:
    """Return changes that fit together, each with the stage after it and all before it.

    The largest saving is taken first, until the stage fits or nothing saves any more.

    Args:
        plan: the stage as it is.
        architecture: of its base.
        program: as of :func:`plan_stage`.
        size: the memory that is short.
        limit: bytes there are.
    """
    taken: list[Suggestion] = []
    while size(plan) > limit:
        better = suggest(plan, architecture, program, size)
        if not better:
            break
        taken.append(better[0])
        plan = better[0].plan
    return taken


def _changes(job: Job) -> Iterator[tuple[str, Job]]:
    if job.quantization is None and not job.sharded:
        yield "4-bit base (model.quantization: nf4)", replace(job, quantization="nf4")
    if job.attention == "eager":
        yield "fused attention (model.attention: sdpa)", replace(job, attention="sdpa")
    if job.stage == "fit" and not job.gradient_checkpointing:
        yield (
            "gradient checkpointing (model.gradient_checkpointing: true)",
            replace(job, gradient_checkpointing=True),
        )
    if job.stage != "test" and job.batch_size > 1:
        half = job.batch_size // 2
        text = f"smaller batches (data.batch_size: {half}"
        if job.stage == "fit":
            text += f", trainer.accumulate_grad_batches: {job.accumulate * job.batch_size // half}"
        accumulate = job.accumulate * job.batch_size // half if job.stage == "fit" else 1
        scoring = tuple(
            replace(r, sequences=min(r.sequences, half), scored=r.scored * half // r.sequences)
            if not r.answer and r.sequences > half
            else r
            for r in job.readings
        )
        yield text + ")", replace(job, batch_size=half, accumulate=accumulate, readings=scoring)
    own = (job.dtype, job.quantization)
    if any(storage != own for storage in job.served_on):
        yield (
            f"measure on the merge's own base alone (served_on: [{job.quantization or job.dtype}])",
            replace(job, served_on=()),
        )
    largest = max((r.sequences for r in job.readings if r.answer), default=1)
    if largest > 1:
        half = largest // 2
        readings = tuple(
            replace(r, sequences=half, scored=r.scored * half // r.sequences)
            if r.answer and r.sequences > half
            else r
            for r in job.readings
        )
        key = "data.generation_batch_size, data.max_batch of suites"
        yield f"smaller batches of answers ({key}: {half})", replace(job, readings=readings)
    whole_on_gpu = job.accelerator == "gpu" and not job.sharded
    if job.optimizer == "adamw" and job.stage == "fit" and whole_on_gpu:
        yield (
            "paged 8-bit AdamW (model.optimizer: paged_adamw_8bit)",
            replace(job, optimizer="paged_adamw_8bit"),
        )
    if job.estimator in ("exact", "ekfac"):
        yield "K-FAC in place of samples (estimator: kfac)", replace(job, estimator="kfac")
        most = max(count for _, count in job.samples)
        if most > 1:
            yield (
                f"fewer Fisher samples (data.calibration_samples: {most // 2})",
                replace(job, samples=_halved(job.samples), at_merge=_halved(job.at_merge)),
            )


def _halved(samples: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, max(1, count // 2)) for name, count in samples)
