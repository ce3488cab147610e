"""Fit, Fisher, merge, test and export on 4-bit weights (NF4), and what is different in bf16.

python benchmarks/nf4_vs_bf16.py --output runs/nf4_vs_bf16

Utility (A6) and safety (A7) adapters are trained on both storages of the base. Then, with the
adapters that were trained on NF4: Fishers and merges on both storages against each other; the merge
of NF4 measured on both (its report.md has the table); its export, and what rounding took. The last
line is one JSON object.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything

from callbacks import AdapterExport, FisherCollector
from sst_lightning import SST, MergeModule, SafetyUtilityData, SSTTrainer, SupervisedLoRA
from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.diagnostics import spectrum
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.data import Alpaca, Security
from sst_lightning.modules.export import export_weights
from sst_lightning.report.export_summary import export_summary

STORAGES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
}
DATA = {"a6": Alpaca, "a7": Security}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "inference_mode": False,
}
DIFFERENCES = ("utility_nll", "attack_refusal_nll", "attack_refusal_rate", "over_refusal_rate")


class Losses(Callback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def fit(options: argparse.Namespace, storage: str, name: str, folder: Path) -> dict[str, float]:
    """Train one adapter; the rows and initial weights are those of the other storage."""
    seed_everything(0, verbose=False)
    module = SupervisedLoRA(
        options.model,
        r=options.r,
        lora_alpha=2 * options.r,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        **STORAGES[storage],
    )
    data = DATA[name](
        tokenizer=options.model, batch_size=options.batch, max_length=options.max_length
    )
    losses = Losses()
    trainer = SSTTrainer(
        max_steps=options.steps,
        limit_val_batches=0,
        callbacks=[losses, AdapterExport(str(folder))],
        **QUIET,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    last = losses.values[-max(1, options.steps // 4) :]
    return {"loss": sum(last) / len(last), "seconds_per_step": seconds / options.steps}


def merge_data(options: argparse.Namespace) -> SafetyUtilityData:
    return SafetyUtilityData(
        utility={"a6": Alpaca(max_length=options.max_length)},
        safety=Security(max_length=options.max_length),
        tokenizer=options.model,
        batch_size=options.batch,
        calibration_samples=options.calibration,
        test_samples=options.test,
        generation_samples=options.test // 2,
        attack_samples=options.test,
        harmless_samples=options.test,
    )


def merge_module(
    options: argparse.Namespace, storage: str, adapters: dict[str, Path], **more: Any
) -> MergeModule:
    return MergeModule(
        [str(adapters["a6"])],
        str(adapters["a7"]),
        base=options.model,
        max_new_tokens=options.max_new_tokens,
        **STORAGES[storage],
        **more,
    )


def fishers(
    options: argparse.Namespace, storage: str, adapters: dict[str, Path], folder: Path
) -> dict[str, FisherStatistics]:
    collector = FisherCollector(output=str(folder))
    trainer = SSTTrainer(callbacks=[collector], **QUIET)
    module = merge_module(options, storage, adapters)
    trainer.validate(module, datamodule=merge_data(options), verbose=False)
    return collector.statistics


def fisher_cosine(first: FisherStatistics, second: FisherStatistics) -> float:
    """Cosine of two Fishers as one block-diagonal matrix: <XᵀX, YᵀY> = ‖X Yᵀ‖²."""

    def inner(a: FisherStatistics, b: FisherStatistics) -> float:
        total = 0.0
        for name, value in a.modules.items():
            other = b.modules[name]
            assert isinstance(value, ExactFisher)
            assert isinstance(other, ExactFisher)
            total += float((value.factor() @ other.factor().T).square().sum())
        return total

    return inner(first, second) / math.sqrt(inner(first, first) * inner(second, second))


def adapter_cosine(first: LoraAdapter, second: LoraAdapter) -> float:
    """Cosine of two ΔW, all modules as one vector."""
    products = {
        (a, b): sum(
            float((x.factors[name].delta() * y.factors[name].delta()).sum()) for name in x.factors
        )
        for a, x in (("1", first), ("2", second))
        for b, y in (("1", first), ("2", second))
    }
    return products["1", "2"] / math.sqrt(products["1", "1"] * products["2", "2"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("runs/nf4_vs_bf16"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=48)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=14)
    parser.add_argument("--alpha", type=float, default=2.0)
    options = parser.parse_args()
    summary: dict[str, Any] = {}
    adapters: dict[str, dict[str, Path]] = {}
    for storage in STORAGES:
        adapters[storage] = {name: options.output / storage / name for name in DATA}
        for name, folder in adapters[storage].items():
            for key, value in fit(options, storage, name, folder).items():
                summary[f"fit_{name}_{key}_{storage}"] = value
    own = adapters["nf4"]
    summary["trained_adapter_cosine"] = {
        name: adapter_cosine(
            LoraAdapter.load(own[name]), LoraAdapter.load(adapters["bfloat16"][name])
        )
        for name in DATA
    }
    collected = {
        storage: fishers(options, storage, own, options.output / f"fisher_{storage}")
        for storage in STORAGES
    }
    one, other = collected["nf4"], collected["bfloat16"]
    summary["fisher_cosine"] = {name: fisher_cosine(one[name], other[name]) for name in one}
    summary["fisher_trace_ratio"] = {
        name: sum(f.trace() for f in one[name].modules.values())
        / sum(f.trace() for f in other[name].modules.values())
        for name in one
    }
    spectra = {
        storage: spectrum(found["safety"].modules, found["utility"].modules)
        for storage, found in collected.items()
    }
    assert spectra["nf4"] is not None
    assert spectra["bfloat16"] is not None
    for kind in ("in_sample", "held_out"):
        pairs = zip(spectra["nf4"][kind], spectra["bfloat16"][kind], strict=True)
        summary[f"spectrum_{kind}_largest_log_ratio"] = max(
            abs(math.log(a / b)) for a, b in pairs if a > 0 and b > 0
        )
    merged, records = {}, {}
    for storage in STORAGES:
        output = options.output / f"merge_{storage}"
        # The merge that was made on NF4 is measured on both.
        served = ["nf4", "bfloat16"] if storage == "nf4" else None
        module = merge_module(options, storage, own, served_on=served)
        records[storage] = SSTTrainer(**QUIET).merge(
            module,
            merge_data(options),
            SST(iterations=0),
            alpha=options.alpha,
            output=str(output),
            fisher=str(options.output / f"fisher_{storage}"),
            evaluate=storage == "nf4",
        )
        merged[storage] = LoraAdapter.load(output / "adapter")
    summary["merged_adapter_cosine"] = adapter_cosine(merged["nf4"], merged["bfloat16"])
    for record in records["nf4"]:
        if record["method"] in ("base", "sst_soft_iterations_0"):
            label = "base" if record["method"] == "base" else "merge"
            for name in DIFFERENCES:
                summary[f"{label}_{name}_nf4"] = record["metrics"][name]
                entry = record["metrics"][f"{name}_difference/bfloat16"]
                summary[f"{label}_{name}_bfloat16_less_nf4"] = entry
    exported = {}
    for quantization in (None, "nf4"):
        folder = options.output / f"export_{quantization or 'bfloat16'}"
        record = export_weights(
            options.model, options.output / "merge_nf4/adapter", folder, quantization=quantization
        )
        print(*export_summary(record), sep="\n")
        exported[quantization or "bfloat16"] = record["model"]
    summary["export"] = exported
    summary["threads"] = torch.get_num_threads()
    print(json.dumps(summary, ensure_ascii=False))


if __name__ == "__main__":
    main()
