"""What collecting a Fisher costs beside the passes it needs, and beside kronfluence and dattri-llm.

python benchmarks/fisher_overhead.py [--sequences 16] [--batch_size 4] [--rounds 5] [--threads 1]

One base model, one set of rows in the same batches, two random LoRA adapters of rank 16 on all seven
projections (cores of 32 x 32). In every round each of these runs once, in turn:

- plain: trainer.validate through the model with the utility adapter's core in its hooks; the summed
  completion NLL, and its gradient down to the embeddings. Nothing is captured.
- exact, kfac: the same with FisherCollector, in the core space of both adapters.
- lora: forward and backward pass with the gradients of one adapter's LoRA weights (PEFT, as in
  training), without an optimizer.
- kronfluence: its covariance pass (strategy kfac, data labels) over lora_A and lora_B of that adapter.
- dattri: dattri-llm's per-sequence gradients of lora_A and lora_B, and the Gram matrix of all
  sequences; ours next to it is exact with the Gram matrix of its samples.

The other two packages see one adapter of rank 16, the smaller job: a core space of two adapters is
ours alone. All use the same loss, with the head at labelled positions only. What a run does once
(loading, fingerprints, eigendecompositions) is not in it. Ratios are medians over rounds of the
ratio within a round, of wall time and of CPU time; the last line is one JSON object.

The two packages go into this project's virtual environment or, better, another one like it:
pip install --constraint constraints.txt kronfluence==1.0.1 dattri-llm==0.1.0
pip uninstall torchvision    # kronfluence asks for it; one that does not fit torch breaks imports
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from callbacks import FisherCollector
from sst_lightning.data import Alpaca, SafetyUtilityData, Security
from sst_lightning.modules.backbone import load_backbone
from sst_lightning.modules.causal_lm import completion_nll
from sst_lightning.modules.core_hooks import EmbeddingLeaf
from sst_lightning.modules.lora import SEVEN_PROJECTIONS
from sst_lightning.modules.merge import MergeModule

PACKAGES = ("kronfluence", "dattri_llm")
INSTALL = "pip install --constraint constraints.txt kronfluence==1.0.1 dattri-llm==0.1.0"


class Clock:
    """Wall and CPU seconds of the parts of a round."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        before = time.perf_counter(), time.process_time()
        yield
        after = time.perf_counter(), time.process_time()
        spent = after[0] - before[0], after[1] - before[1]
        self.seconds.setdefault(name, []).append(spent)

    def ratio(self, name: str, to: str, clock: int) -> float:
        """Median over rounds of one part's time relative to another's; 0 is wall, 1 is CPU."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one[clock] / two[clock] for one, two in pairs)

    def drop_first(self) -> None:
        """Forget the first round: caches and allocators are cold in it."""
        self.seconds = {name: spent[1:] for name, spent in self.seconds.items()}


class PlainBackward(Callback):
    """The passes a Fisher needs: gradients down to the embeddings, none kept."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leaf = EmbeddingLeaf(pl_module.model)
        pl_module.move_to_point("utility")

    def on_validation_batch_start(self, *arguments: Any) -> None:
        torch.set_grad_enabled(True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *arguments: Any
    ) -> None:
        torch.set_grad_enabled(False)
        with torch.enable_grad():
            total = outputs["sequence_nll"].float().sum()
        torch.autograd.grad(total, self._leaf.output)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leaf.remove()


class LoopTime(Callback):
    """Measures validation from its first hook to its last; the first callback of a Trainer."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def on_validation_start(self, *arguments: Any) -> None:
        self._context = self.clock.measure(self.name)
        self._context.__enter__()

    def stop(self) -> None:
        self._context.__exit__(None, None, None)


class LoopEnd(Callback):
    """Ends a :class:`LoopTime`; the last callback of a Trainer."""

    def __init__(self, timer: LoopTime) -> None:
        self.timer = timer

    def on_validation_end(self, *arguments: Any) -> None:
        self.timer.stop()


def validate(
    module: MergeModule, data: SafetyUtilityData, clock: Clock, name: str, callback: Callback
) -> None:
    timer = LoopTime(clock, name)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        inference_mode=False,
        callbacks=[timer, callback, LoopEnd(timer)],
    )
    trainer.validate(module, datamodule=data, verbose=False)


def gram_of(collector: FisherCollector) -> Tensor:
    """Inner products of all sequences' gradients, over all modules."""
    fishers = collector.statistics["utility"].modules
    return sum(x @ x.T for x in (fisher.samples.flatten(1) for fisher in fishers.values()))


def total_nll(model: PeftModel, batch: dict[str, Any]) -> Tensor:
    lm = model.get_base_model()
    hidden = lm.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    return completion_nll(lm, hidden, batch["labels"])[0].sum()


def lora_backward(model: PeftModel, batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        total_nll(model, batch).backward()
        model.zero_grad()


def kronfluence_pass(model: PeftModel, batches: list[dict[str, Any]]) -> Callable[[], None]:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    names = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[0].endswith(("lora_A", "lora_B"))
    ]

    class CompletionTask(Task):
        def compute_train_loss(self, batch, model, sample=False):
            assert not sample
            return total_nll(model, batch)

        def compute_measurement(self, batch, model):
            return total_nll(model, batch)

        def get_influence_tracked_modules(self):
            return names

        def get_attention_mask(self, batch):
            return batch["attention_mask"]

    task = CompletionTask()
    prepared = prepare_model(model, task)
    arguments = FactorArguments(strategy="kfac", use_empirical_fisher=True)
    tensors = [{k: v for k, v in b.items() if isinstance(v, Tensor)} for b in batches]

    def run() -> None:
        fit_covariance_matrices_with_loader(
            prepared, State(cpu=True), task, tensors, arguments, disable_tqdm=True
        )

    return run


def dattri_gram(model: PeftModel, batches: list[dict[str, Any]]) -> Tensor:
    from dattri_llm import CaptureCallback, HookManager

    capture = CaptureCallback()
    gradients = []
    # The decoder is what is called; its inputs name the samples.
    decoder = model.get_base_model().get_decoder()
    with HookManager(decoder, callbacks=[capture]).collect(deregister_on_exit=True):
        for batch in batches:
            total_nll(model, batch).backward()
            model.zero_grad()
            # The gradients of a batch as matrices: kept as tokens' factors they would be larger.
            gradients.append(capture.record.gradient.materialize())
    rows = [
        torch.cat([one.similarity(two, reduce="all") for two in gradients], 1) for one in gradients
    ]
    return torch.cat(rows)


def save_adapters(base: str, folder: Path, rank: int) -> list[Path]:
    """Write two adapters with random A and B, as PEFT does."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank // 8,
            target_modules=list(SEVEN_PROJECTIONS),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(load_backbone(base, "float32"), config)
        paths.append(folder / f"adapter-{seed}")
        model.save_pretrained(paths[-1])
    return paths


def peft_model(arguments: argparse.Namespace, adapter: Path) -> PeftModel:
    base = load_backbone(arguments.model, arguments.dtype)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours_only", action="store_true", help="without the other two packages")
    arguments = parser.parse_args()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing and not arguments.ours_only:
        print(f"skipped: {' and '.join(missing)} not installed. {INSTALL}; or use --ours_only")
        print(json.dumps({"skipped": missing}))
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured(arguments, Path(scratch))))


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    adapters = save_adapters(arguments.model, folder, arguments.rank)
    module = MergeModule(
        [str(adapters[0])], str(adapters[1]), base=arguments.model, dtype=arguments.dtype
    )
    data = SafetyUtilityData(
        {"a6": Alpaca(max_length=arguments.max_length)},
        Security(max_length=arguments.max_length),
        tokenizer=arguments.model,
        calibration_samples=arguments.sequences,
        batch_size=arguments.batch_size,
    )
    data.select_validation(["utility"])
    data.setup()
    batches = list(data.val_dataloader()[0])
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    clock, model = Clock(), peft_model(arguments, adapters[0])
    others = None
    if not arguments.ours_only:
        others = kronfluence_pass(peft_model(arguments, adapters[0]), batches)

    def collect(name: str, estimator: str) -> FisherCollector:
        collector = FisherCollector({"utility": "utility"}, estimator)
        validate(module, data, clock, name, collector)
        return collector

    for number in range(arguments.rounds + 1):
        validate(module, data, clock, "plain", PlainBackward())
        collector = collect("exact", "exact")
        with clock.measure("gram"):
            gram = gram_of(collector)
        collect("kfac", "kfac")
        with clock.measure("lora"):
            lora_backward(model, batches)
        if others is not None:
            with clock.measure("kronfluence"):
                others()
            with clock.measure("dattri"):
                theirs = dattri_gram(model, batches)
            assert theirs.shape == gram.shape
        times = {name: f"{spent[-1][0]:.2f}" for name, spent in clock.seconds.items()}
        print(f"round {number}{' (warm-up)' if number == 0 else ''}: {times}", file=sys.stderr)
    clock.drop_first()
    exact, gram_times = clock.seconds["exact"], clock.seconds["gram"]
    clock.seconds["exact and gram"] = [
        (one[0] + two[0], one[1] + two[1]) for one, two in zip(exact, gram_times, strict=True)
    ]
    modules = len(module.space.bases)
    print(f"{len(gram)} sequences, {real} tokens, {modules} modules, {arguments.dtype}")
    print("| pass | seconds | to plain (wall) | to plain (CPU) |\n|---|---|---|---|")
    for name in clock.seconds:
        wall = statistics.median(spent[0] for spent in clock.seconds[name])
        ratios = (clock.ratio(name, "plain", which) for which in (0, 1))
        print(f"| {name} | {wall:.2f} | {' | '.join(f'{value:.3f}' for value in ratios)} |")
    result: dict[str, float] = {}
    for suffix, which in (("", 0), ("_cpu", 1)):
        for name in ("exact", "kfac"):
            result[f"overhead_{name}{suffix}"] = clock.ratio(name, "plain", which)
            result[f"overhead_{name}_to_lora{suffix}"] = clock.ratio(name, "lora", which)
        if others is not None:
            result[f"speedup_vs_kronfluence{suffix}"] = clock.ratio("kronfluence", "kfac", which)
            result[f"speedup_vs_dattri{suffix}"] = clock.ratio("dattri", "exact and gram", which)
    return {name: round(value, 4) for name, value in result.items()}


if __name__ == "__main__":
    main()
