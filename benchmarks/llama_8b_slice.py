"""The whole pipeline on a slice of Llama-3.1-8B's shape with random weights: time and memory a layer.

    python benchmarks/llama_8b_slice.py --folder /tmp/slice

A model of one layer and one of two, of full width and vocabulary (4096 and 14336, 128,256 tokens,
untied), go through fit, validate with a FisherCollector, merge with its evaluation, and test, in
bf16 and in NF4 (which a CPU computes in fp32). Every stage is a process of its own. The difference of
the two models is what a layer costs; 31 times that, added to the first model, predicts the full one,
which is printed beside the planner's figures for the same command. The last line is one JSON object;
memory is bytes, time seconds.

"Measured" is the peak of memory that is not of files, the libraries' pages and the whole of the
model's file. The weights are pages of that mapped file, and how many of them are resident is the
kernel's choice, which in so small a model hides what a layer costs: the two tables of the vocabulary
come in by pieces of any size. "Peak" is all that was resident.

Sequences are short and few (--tokens, --rows), because the machine may be small: activations of
longer ones are the planner's to predict. On a shared machine trust CPU seconds, not seconds.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llama_8b_inputs import RANK, hash_of, make_adapter, modules
from plan_vs_measured import MIB, both, measure, predict, write_data
from torch import Tensor
from transformers import LlamaConfig

from sst_lightning.algebra.files import atomic_folder
from sst_lightning.algebra.tensor_file import write_tensors
from sst_lightning.modules.backbone import resolve

VOCABULARY, LAYERS = 128_256, 32
CONFIGS = Path(__file__).parents[1] / "configs"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def model_config(layers: int, shrink: int) -> LlamaConfig:
    """Llama-3.1-8B's config with fewer layers; widths are divided by ``shrink``."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096 // shrink,
        intermediate_size=14336 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def make_slice(folder: Path, layers: int, shrink: int, tokenizer: Path) -> None:
    """Write the model, bf16, one tensor in memory at a time, with another model's tokenizer.

    Tokens of the vocabulary that the tokenizer does not know are never in a text.
    """
    if folder.exists():
        return
    config = model_config(layers, shrink)
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": shape for name, shape in modules(layers, shrink).items()
    }
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    for name in ("model.embed_tokens", "lm_head"):
        shapes[f"{name}.weight"] = (config.vocab_size, width)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
                continue
            generator = torch.Generator().manual_seed(hash_of(name))
            # Uniform numbers are drawn several times faster than normal ones.
            weight = torch.empty(shape, dtype=torch.bfloat16)
            yield name, weight.uniform_(-0.035, 0.035, generator=generator)

    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        dtypes = dict.fromkeys(shapes, torch.bfloat16)
        file = temporary / "model.safetensors"
        write_tensors(file, shapes, tensors(), {"format": "pt"}, dtypes)
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, temporary / name)


def stages(
    folder: Path, layers: int, base: str, storage: str, options: argparse.Namespace
) -> dict[str, list[str]]:
    """Return the command line of each stage on the model of some layers.

    Args:
        folder: of data, adapters and outputs.
        layers: of the model, which the adapters and outputs are named after.
        base: the model.
        storage: ``bf16`` or ``nf4``.
        options: of the benchmark.
    """
    own = folder / f"{storage}-{layers}"
    rows, tokens = options.rows, options.tokens
    common = [
        f"--model.base={base}",
        *(["--model.quantization=nf4"] if storage == "nf4" else []),
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    inputs = [
        f'--model.utility=["{folder}/utility-{layers}"]',
        f"--model.safety={folder}/safety-{layers}",
    ]
    data = [*both(folder, tokens, rows), f"--data.batch_size={options.batch_size}"]
    answers = [f"--data.generation_batch_size={options.batch_size}", "--model.max_new_tokens=4"]
    export = {"class_path": "callbacks.AdapterExport", "init_args": {"path": f"{own}/adapter"}}
    collector = {
        "class_path": "callbacks.FisherCollector",
        "init_args": {"output": f"{own}/fisher"},
    }
    return {
        "fit": [
            *("fit", f"--config={CONFIGS / 'a6_alpaca.yaml'}", *common),
            *("--data.source=local", f"--data.path={folder / 'alpaca.jsonl'}"),
            *(f"--data.max_length={tokens}", f"--data.max_samples={rows}"),
            *(f"--data.batch_size={options.batch_size}", f"--model.r={RANK}"),
            *("--data.calibration_samples=1", "--trainer.max_epochs=1"),
            *("--trainer.accumulate_grad_batches=1", "--trainer.logger=false"),
            *("--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"),
            "--trainer.callbacks=" + json.dumps([export]),
        ],
        "validate": [
            *("validate", f"--config={CONFIGS / 'fisher_a6_a7.yaml'}", *common, *inputs, *data),
            "--trainer.callbacks=" + json.dumps([collector]),
        ],
        "merge": [
            *("merge", f"--config={CONFIGS / 'merge_a6_a7.yaml'}", *common, *inputs, *data),
            *(*answers, f"--output={own}/merge"),
        ],
        "test": [
            *("test", f"--config={CONFIGS / 'test.yaml'}", *common, *data, *answers),
            f"--model.adapter={folder}/utility-{layers}",
        ],
    }


def run(folder: Path, storage: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure and predict every stage with one layer and with two; predict it with all layers."""
    result: dict[str, dict[str, Any]] = {}
    full = folder / f"config-{LAYERS}"
    model_config(LAYERS, options.shrink).save_pretrained(full)
    for layers in (1, 2):
        base = folder / f"model-{layers}"
        for stage, arguments in stages(folder, layers, str(base), storage, options).items():
            if options.stages and stage not in options.stages:
                continue
            entry = result.setdefault(stage, {})
            began = time.perf_counter()
            figures = measure(arguments)
            entry[f"seconds_{layers}"] = time.perf_counter() - began
            entry[f"cpu_seconds_{layers}"] = figures["cpu_seconds"]
            entry[f"peak_{layers}"] = figures["peak"]
            file = (base / "model.safetensors").stat().st_size
            entry[f"measured_{layers}"] = figures["anonymous"] + figures["libraries"] + file
            entry[f"predicted_{layers}"] = predict(arguments)["memory"]
            print(f"{storage} {stage} {layers}: {json.dumps(entry)}", flush=True)
    for stage, arguments in stages(folder, LAYERS, str(full), storage, options).items():
        if stage not in result:
            continue
        entry = result[stage]
        for name in ("seconds", "cpu_seconds", "measured"):
            layer = entry[f"{name}_2"] - entry[f"{name}_1"]
            entry[f"{name}_layer"] = layer
            entry[f"{name}_{LAYERS}"] = entry[f"{name}_1"] + (LAYERS - 1) * layer
        record = predict([*arguments, f"--rank={RANK}"])
        entry[f"predicted_{LAYERS}"] = record["memory"]
        entry["predicted_layer"] = entry["predicted_2"] - entry["predicted_1"]
        entry["largest_term"] = record["largest_term"]["name"]
    return result


def table(storage: str, result: dict[str, dict[str, Any]]) -> list[str]:
    """Return a row for each stage: memory in MiB, CPU seconds."""
    lines = []
    for stage, entry in result.items():
        sizes = [
            f"{entry[f'measured_{n}'] / MIB:,.0f} / {entry[f'predicted_{n}'] / MIB:,.0f}"
            for n in (1, 2, "layer", LAYERS)
        ]
        peaks = " / ".join(f"{entry[f'peak_{n}'] / MIB:,.0f}" for n in (1, 2))
        times = [f"{entry[f'cpu_seconds_{n}']:.0f}" for n in (1, 2, "layer", LAYERS)]
        lines.append(f"| {storage} {stage} | {' | '.join([*sizes, peaks, *times])} |")
    return lines


def main() -> None:
    """Make the models and adapters, run the stages, print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", required=True, help="models, adapters and outputs; must be empty"
    )
    parser.add_argument("--storage", nargs="+", choices=("bf16", "nf4"), default=["bf16", "nf4"])
    parser.add_argument("--stages", nargs="+", choices=("fit", "validate", "merge", "test"))
    parser.add_argument("--tokens", type=int, default=64, help="max_length; all rows are longer")
    parser.add_argument("--rows", type=int, default=4, help="rows of each set")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divides the widths, to try it out")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="base whose tokenizer is used")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, 8 * options.rows)
    for layers in (1, 2):
        make_slice(folder / f"model-{layers}", layers, options.shrink, resolve(options.tokenizer))
        for seed, name in enumerate(("utility", "safety")):
            make_adapter(folder / f"{name}-{layers}", seed, layers, options.shrink)
    results = {storage: run(folder, storage, options) for storage in options.storage}
    columns = [f"{n} layer{'s' * (n > 1)}" for n in (1, 2)]
    heads = [*columns, "each layer", f"{LAYERS} layers"]
    titles = [f"{head}, measured / planned MiB" for head in heads]
    titles += ["peaks of 1 and 2 layers, MiB", *(f"{head}, CPU s" for head in heads)]
    print("| | " + " | ".join(titles) + " |")
    print("|---" * (1 + len(titles)) + "|")
    for storage, result in results.items():
        print("\n".join(table(storage, result)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
