"""What a stage's YAML asks of memory: the parsed configuration as a planner's job."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy

from sst_lightning.algebra.peft_folder import read_config, targets
from sst_lightning.modules.adapter_evaluation import AdapterEvaluation
from sst_lightning.modules.likelihood import HEAD_POSITIONS
from sst_lightning.modules.lora import SEVEN_PROJECTIONS
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.strategies import NAMES, SHARDED_STAGES, FullyShardedStrategy
from sst_lightning.modules.supervised import SupervisedLoRA
from sst_lightning.planner.architecture import Architecture, PlanError
from sst_lightning.planner.job import ASSUMED_RANK, Accelerator, Adapter, Job, Reading, Stage
from sst_lightning.planner.passes import linear_shapes
from sst_lightning.suites.datamodule import CPU_TOKENS, GPU_TOKENS, SuiteData

STAGES: dict[str, type] = {
    "fit": SupervisedLoRA,
    "validate": MergeModule,
    "merge": MergeModule,
    "test": AdapterEvaluation,
}


@dataclass(frozen=True)
class Assumptions:
    """What no configuration says.

    Attributes:
        accelerator: ``gpu`` or ``cpu``; the Trainer's when not given, else ``gpu``.
        tokens: tokens of the longest sequences; ``max_length`` when not given.
        labelled: predicted positions of a sequence; all of them when not given.
        rank: of adapters that are not there yet.
    """

    accelerator: Accelerator | None = None
    tokens: int | None = None
    labelled: int | None = None
    rank: int = ASSUMED_RANK

    def __post_init__(self) -> None:
        for name in ("tokens", "labelled", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"--{name} must be at least 1, got {value}")


def guess_stage(values: Mapping[str, Any], config: str) -> Stage:
    """Tell which command a YAML file is for.

    Args:
        values: the file's content.
        config: its name.

    Raises:
        PlanError: its model is of none of the planned stages.
    """
    found = _class(_mapping(values.get("model")).get("class_path"), config)
    callbacks = _mapping(values.get("trainer")).get("callbacks") or []
    names = [str(_mapping(item).get("class_path", "")) for item in callbacks]
    collects = any(name.rpartition(".")[2] == "FisherCollector" for name in names)
    for stage, kind in STAGES.items():
        if issubclass(found, kind) and (stage != "validate" or collects):
            return stage  # type: ignore[return-value]
    raise PlanError(
        f"{config}: plan knows fit of SupervisedLoRA, validate and merge of MergeModule and test of "
        f"AdapterEvaluation; its model is {found.__name__}"
    )


def read_job(
    stage: Stage, config: Namespace, architecture: Architecture, assumed: Assumptions
) -> Job:
    """Turn a parsed configuration into a job.

    Args:
        stage: the command.
        config: its configuration, with all defaults.
        architecture: of the base.
        assumed: what the configuration does not say.

    Raises:
        PlanError: the configuration asks for what is not planned.
    """
    model, data, trainer = config.model, config.data, config.trainer
    if not issubclass(_class(model.class_path, stage), STAGES[stage]):
        raise PlanError(
            f"{stage} of {model.class_path} is not planned: only of {STAGES[stage].__name__}"
        )
    reader = _Reader(stage, model.init_args, data, trainer, architecture, assumed)
    job = reader.common()
    return {
        "fit": reader.fit,
        "validate": reader.validate,
        "merge": lambda job: reader.merge(job, config),
        "test": reader.test,
    }[stage](job)


class _Reader:
    def __init__(
        self,
        stage: Stage,
        model: Namespace,
        data: Namespace,
        trainer: Namespace,
        architecture: Architecture,
        assumed: Assumptions,
    ) -> None:
        self.stage = stage
        self.model = model
        self.data = data.init_args
        self.suites = issubclass(_class(data.class_path, stage), SuiteData)
        self.trainer = trainer
        self.assumed = assumed
        self.accelerator: Accelerator = assumed.accelerator or (
            "cpu" if trainer.accelerator == "cpu" else "gpu"
        )
        self.linears = list(linear_shapes(architecture.build()))
        if str(trainer.precision) not in ("32-true", "32", "None"):
            raise PlanError(f"trainer.precision {trainer.precision} is not planned: only 32-true")
        self.processes = _processes(trainer.devices) * int(trainer.num_nodes)
        self.sharded = _is_sharded(trainer.strategy)
        if self.sharded:
            self.check_sharded()

    def common(self) -> Job:
        attention = self.model.attention
        if attention == "auto":
            attention = "eager" if self.accelerator == "cpu" else "sdpa"
        tokens = self.assumed.tokens or self.longest()
        labelled = min(self.assumed.labelled or tokens, tokens)
        return Job(
            stage=self.stage,
            base=self.model.base,
            dtype=self.model.dtype,
            attention="eager" if attention == "eager" else "sdpa",
            quantization=self.model.quantization,
            accelerator=self.accelerator,
            processes=self.processes,
            sharded=self.sharded,
            batch_size=1 if self.suites else self.needed(self.data, "batch_size"),
            tokens=tokens,
            labelled=labelled,
        )

    def check_sharded(self) -> None:
        """Refuse what the program refuses under ``fsdp``."""
        if self.stage not in SHARDED_STAGES:
            raise PlanError(f"trainer.strategy fsdp is for {' and '.join(SHARDED_STAGES)} alone")
        if self.model.quantization is not None:
            raise PlanError("trainer.strategy fsdp cannot shard a base in 4 bits: use ddp")
        if self.model.get("optimizer", "adamw") != "adamw":
            raise PlanError("trainer.strategy fsdp is for model.optimizer: adamw alone")
        if self.processes == 1:
            raise PlanError(
                "trainer.strategy fsdp divides the model among processes: say how many with "
                f"trainer.devices (it is {self.trainer.devices})"
            )

    def longest(self) -> int:
        """``max_length`` of the data, or of its longest part."""
        children = [*(self.data.get("utility") or {}).values(), self.data.get("safety")]
        own = [child.init_args for child in children if child is not None] or [self.data]
        return max(self.needed(item, "max_length") for item in own)

    def needed(self, arguments: Namespace, key: str) -> int:
        value = arguments.get(key)
        if value is None:
            raise PlanError(f"the data has no {key}: plan needs it (or --tokens for max_length)")
        return int(value)

    def fit(self, job: Job) -> Job:
        wanted = self.model.target_modules or list(SEVEN_PROJECTIONS)
        adapter = self.adapter("adapter", self.model.r, wanted)
        return replace(
            job,
            adapters=(adapter,),
            gradient_checkpointing=self.model.gradient_checkpointing,
            accumulate=self.trainer.accumulate_grad_batches,
            optimizer=self.model.get("optimizer", "adamw"),
            checkpoints=self.checkpoints(),
        )

    def checkpoints(self) -> int:
        """Files that checkpoint callbacks keep; Lightning adds one that keeps the last."""
        if self.trainer.enable_checkpointing is False:
            return 0
        if any(item.class_path.endswith(".FitCheckpoint") for item in self.trainer.callbacks or []):
            return 2
        count = [
            max(0, item.init_args.save_top_k) + bool(item.init_args.save_last)
            for item in self.trainer.callbacks or []
            if item.class_path.rpartition(".")[2] == "ModelCheckpoint"
        ]
        return sum(count) if count else 1

    def validate(self, job: Job) -> Job:
        found = [
            item.init_args
            for item in self.trainer.callbacks or []
            if item.class_path.rpartition(".")[2] == "FisherCollector"
        ]
        if not found:
            raise PlanError("validate without a FisherCollector is not planned")
        samples = self.samples()
        if found[0].points is not None:
            samples = tuple(item for item in samples if item[0] in found[0].points)
        if found[0].max_samples is not None:
            samples = tuple((name, min(count, found[0].max_samples)) for name, count in samples)
        return replace(
            job,
            adapters=self.merged_adapters(),
            estimator=found[0].estimator,
            samples=samples,
            fisher_files=found[0].output is not None,
            block_samples=found[0].block_samples,
            memory_budget_gib=found[0].memory_budget_gib,
        )

    def merge(self, job: Job, config: Namespace) -> Job:
        method = _class(config.method.class_path, self.stage)
        arguments = config.method.get("init_args") or Namespace()
        estimator = arguments.get("estimator", "exact") if method.requires_fisher else ""
        samples = self.samples()
        again = tuple(item for item in samples if item[0] != "safety")
        iterates = estimator and arguments.get("iterations", 0) > 0
        readings: tuple[Reading, ...] = self.readings(job) if config.evaluate else ()
        if config.evaluate and config.suites is not None:
            readings += self.suite_readings(config.suites.init_args)
        return replace(
            job,
            adapters=self.merged_adapters(),
            estimator=estimator,
            samples=samples,
            reads_fishers=bool(estimator) and config.fisher is not None,
            # In the output, until the merge is done.
            fisher_files=bool(estimator) and config.fisher is None,
            at_merge=again if iterates else (),
            merges=1,
            readings=readings,
            served_on=self.served_on() if config.evaluate else (),
        )

    def served_on(self) -> tuple[tuple[str, str | None], ...]:
        """The storages of ``model.served_on``."""
        return tuple(
            (self.model.dtype, "nf4") if name == "nf4" else (name, None)
            for name in self.model.served_on or ()
        )

    def test(self, job: Job) -> Job:
        adapters = () if self.model.adapter is None else (self.folder(self.model.adapter),)
        readings = self.suite_readings(self.data) if self.suites else self.readings(job)
        return replace(job, adapters=adapters, readings=readings)

    def samples(self) -> tuple[tuple[str, int], ...]:
        names = ["utility", "harmless", "safety"]
        if not self.data.harmless_calibration:
            names.remove("harmless")
        return tuple((name, self.data.calibration_samples) for name in names)

    def readings(self, job: Job) -> tuple[Reading, ...]:
        """The batches of ``SafetyUtilityData``: rows that are answered, and rows that are scored."""
        data = self.data
        answered = max(data.generation_samples, data.attack_samples, data.harmless_samples)
        sequences = min(data.generation_batch_size, answered)
        return (
            Reading(
                "scores and answers",
                sequences,
                job.tokens,
                sequences * job.labelled,
                self.model.max_new_tokens,
            ),
            Reading("scores", job.batch_size, job.tokens, job.batch_size * job.labelled, 0),
        )

    def suite_readings(self, data: Namespace) -> tuple[Reading, ...]:
        """The largest batch of each suite: full, of its longest items."""
        result = []
        tokens = min(self.assumed.tokens or data.max_length, data.max_length)
        for name, suite in data.suites.items():
            kind = _class(suite.class_path, name)
            usual = CPU_TOKENS[kind.measure] if self.accelerator == "cpu" else GPU_TOKENS
            arguments = suite.get("init_args") or Namespace()
            each = arguments.get("samples_per_item", kind.samples_per_item)
            answer = 0
            if kind.measure == "generation":
                answer = arguments.get("max_new_tokens", kind.max_new_tokens)
            rows = (data.token_budget or usual) // tokens
            sequences = each * max(1, min(rows, data.max_batch) // each)
            scored = {
                "generation": 0,
                "choice": sequences,
                "likelihood": min(HEAD_POSITIONS, sequences * tokens),
            }[kind.measure]
            result.append(
                Reading(f"suite {name}", sequences, max(1, tokens - answer), scored, answer, True)
            )
        return tuple(result)

    def merged_adapters(self) -> tuple[Adapter, ...]:
        return tuple(self.folder(path) for path in (*self.model.utility, self.model.safety))

    def folder(self, path: str) -> Adapter:
        """The adapter in a folder; an assumed one where there is no folder yet."""
        if not Path(path).is_dir():
            return self.adapter(f"{path} (assumed)", self.assumed.rank, list(SEVEN_PROJECTIONS))
        config = read_config(Path(path))
        modules = tuple(name for name in self.linears if targets(config, name))
        if not modules:
            raise PlanError(f"{path}: the base has no module that the adapter names")
        return Adapter(path, int(config["r"]), modules)

    def adapter(self, name: str, rank: int, wanted: list[str]) -> Adapter:
        modules = tuple(n for n in self.linears if targets({"target_modules": wanted}, n))
        if not modules:
            raise PlanError(f"the base has no module called {', '.join(wanted)}")
        return Adapter(name, rank, modules)


def _processes(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    return max(1, int(devices)) if str(devices).lstrip("-").isdigit() else 1


def _is_sharded(strategy: Any) -> bool:
    """Whether a strategy divides the model's layers.

    Raises:
        PlanError: it is neither ``ddp`` nor ``fsdp``, by name or by class.
    """
    if isinstance(strategy, str) and strategy in NAMES:
        return strategy == "fsdp"
    path = strategy if isinstance(strategy, str) else strategy.class_path
    kind = _class(path, "trainer.strategy") if "." in path else None
    if kind is not None and issubclass(kind, FullyShardedStrategy | DDPStrategy):
        return issubclass(kind, FullyShardedStrategy)
    raise PlanError(f"trainer.strategy {path} is not planned: only ddp and fsdp")


def _class(path: Any, config: str) -> Any:
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"{config}: there is no class '{path}'") from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
