"""What ``sst-merge plan`` prints: memory and disk of stages, and what to change where it is short."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sst_lightning.algebra.fisher_blocks import GIBIBYTE
from sst_lightning.cli.lightning_cli import ParsedCommandLine, run_lightning
from sst_lightning.cli.plan_jobs import Assumptions, guess_stage, read_job
from sst_lightning.cli.shipped_configs import load_config
from sst_lightning.planner.advice import Size, device_size, enough, host_size, suggest
from sst_lightning.planner.architecture import Architecture, PlanError, find_architecture
from sst_lightning.planner.job import Stage
from sst_lightning.planner.phase import Phase, StagePlan
from sst_lightning.planner.program import program_bytes
from sst_lightning.planner.stages import plan_stage

NOTE = (
    "Not counted: fragmentation of a GPU's memory, and reports, logs and answers on disk (megabytes).\n"
    "Sequences are as long as data.max_length and labelled throughout unless --tokens and --labelled "
    "say less."
)


@dataclass(frozen=True)
class Limits:
    """Memory there is.

    Attributes:
        memory: GiB where the model is, for each process; ``None`` asks nothing.
        host: GiB of the host for each process, beside a GPU.
    """

    memory: float | None = None
    host: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--memory", self.memory), ("--host_memory", self.host)):
            if value is not None and not value > 0:
                raise PlanError(f"{flag} must be above 0 (GiB), got {value:g}")


def plan_configs(
    configs: Sequence[str],
    model: str | None,
    stage: Stage | None,
    changes: Sequence[str],
    assumed: Assumptions,
) -> list[tuple[StagePlan, Architecture, int]]:
    """Plan the stage of each configuration.

    Args:
        configs: YAML files.
        model: base that takes the place of theirs.
        stage: what they are for; guessed from their model when not given.
        changes: ``key=value`` that take the place of the files' values, such as ``data.batch_size=2``.
        assumed: what they do not say.

    Raises:
        SSTMergeError: a file or the base is missing, or asks for what is not planned.
    """
    program = program_bytes()
    result = []
    for config in configs:
        own = stage or guess_stage(load_config(config, "the configuration of a command"), config)
        options = [f"--{change}" for change in changes]
        if model is not None:
            options.append(f"--model.base={model}")
        parsed = run_lightning([own, "--config", config, *options], ParsedCommandLine).parsed
        architecture = find_architecture(parsed.model.init_args.base)
        job = read_job(own, parsed, architecture, assumed)
        result.append((plan_stage(job, architecture, program), architecture, program))
    return result


def as_text(plans: Sequence[tuple[StagePlan, Architecture, int]], limits: Limits) -> str:
    """Return the plans as tables."""
    return "\n\n".join([*(_stage_text(*item, limits) for item in plans), NOTE]) + "\n"


def as_json(plans: Sequence[tuple[StagePlan, Architecture, int]], limits: Limits) -> str:
    """Return the plans as JSON; sizes are bytes."""
    return json.dumps([_stage_record(*item, limits) for item in plans], indent=1)


def _stage_text(plan: StagePlan, architecture: Architecture, program: int, limits: Limits) -> str:
    job = plan.job
    lines = [
        f"{job.stage} on {architecture.name} ({architecture.source})",
        f"{job.processes} process(es), {job.quantization or job.dtype}, {job.attention} attention, "
        f"batches of {job.batch_size} x {job.tokens} tokens, {job.labelled} labelled",
    ]
    for adapter in job.adapters:
        lines.append(f"adapter {adapter.name}: rank {adapter.rank}, {len(adapter.modules)} modules")
    where = "CPU process" if job.accelerator == "cpu" else "GPU"
    lines += ["", *_phase_lines(f"{where}, peak: {plan.peak.name}", plan.peak, plan.places)]
    if job.accelerator == "gpu":
        host = plan.host_peak
        lines += ["", *_phase_lines(f"host, each process, peak: {host.name}", host, ("host",))]
    disk = Phase("disk", plan.disk)
    lines += ["", *_phase_lines("disk", disk, ("disk",)), "", "phases"]
    for phase in plan.phases:
        lines.append(_line(phase.name, phase.size(*plan.places)))
    lines += ["", f"largest term: {plan.largest.name}, {_gib(plan.largest.size)}"]
    for name, size, limit in _limits(plan, limits):
        lines += _verdict(plan, architecture, program, name, size, limit)
    return "\n".join(lines)


def _phase_lines(title: str, phase: Phase, places: tuple[str, ...]) -> list[str]:
    terms = sorted(
        (term for term in phase.terms if term.place in places), key=lambda term: -term.size
    )
    return [
        title,
        *(_line(term.name, term.size) for term in terms),
        _line("total", phase.size(*places)),
    ]


def _verdict(
    plan: StagePlan,
    architecture: Architecture,
    program: int,
    name: str,
    size: Size,
    limit: float,
) -> list[str]:
    needed, allowed = size(plan), int(limit * GIBIBYTE)
    if needed <= allowed:
        return [f"{name}: fits into {limit:g} GiB, {_gib(allowed - needed)} are left"]
    lines = [f"{name}: does NOT fit into {limit:g} GiB: {_gib(needed - allowed)} too much", ""]
    lines.append("each of these alone saves")
    for item in suggest(plan, architecture, program, size):
        lines.append(_line(item.text, item.saving) + f"  -> {_gib(size(item.plan))}")
    taken = enough(plan, architecture, program, size, allowed)
    if not taken:
        return [*lines, "nothing that plan knows saves any of it: use a larger device"]
    lines += ["", "together, in this order"]
    lines += [_line(f"{item.text}, then", size(item.plan)) for item in taken]
    fits = size(taken[-1].plan) <= allowed
    return [*lines, "which fits" if fits else "which still does not fit: use a larger device"]


def _limits(plan: StagePlan, limits: Limits) -> list[tuple[str, Size, float]]:
    found: list[tuple[str, Size, float]] = []
    if limits.memory is not None:
        found.append(("memory", device_size, limits.memory))
    if limits.host is not None and plan.job.accelerator == "gpu":
        found.append(("host memory", host_size, limits.host))
    return found


def _stage_record(
    plan: StagePlan, architecture: Architecture, program: int, limits: Limits
) -> dict[str, Any]:
    def terms(phase: Phase) -> list[dict[str, Any]]:
        return [asdict(term) for term in phase.terms]

    record: dict[str, Any] = {
        "stage": plan.job.stage,
        "model": architecture.name,
        "source": architecture.source,
        "job": asdict(plan.job),
        "memory": plan.memory,
        "host_memory": host_size(plan),
        "peak_phase": plan.peak.name,
        "largest_term": asdict(plan.largest),
        "phases": [
            {"name": p.name, "memory": p.size(*plan.places), "terms": terms(p)} for p in plan.phases
        ],
        "disk": sum(term.size for term in plan.disk),
        "disk_terms": [asdict(term) for term in plan.disk],
    }
    for name, size, limit in _limits(plan, limits):
        allowed = int(limit * GIBIBYTE)
        fits = size(plan) <= allowed
        record[name.replace(" ", "_") + "_limit"] = {
            "bytes": allowed,
            "fits": fits,
            "suggestions": []
            if fits
            else [
                {"change": item.text, "saving": item.saving, "memory": size(item.plan)}
                for item in suggest(plan, architecture, program, size)
            ],
            "together": [
                {"change": item.text, "memory": size(item.plan)}
                for item in enough(plan, architecture, program, size, allowed)
            ],
        }
    return record


def _line(name: str, size: int) -> str:
    return f"  {name:<62} {_gib(size):>12}"


def _gib(size: int) -> str:
    return f"{size / GIBIBYTE:.2f} GiB" if size >= GIBIBYTE / 10 else f"{size / 2**20:.2f} MiB"
