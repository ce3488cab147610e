"""Time and peak memory of merges of adapters with the shapes of Llama-3.1-8B, on random weights.

python benchmarks/merge_8b_shape.py --folder /tmp/merge_8b [--layers 32] [--adapters 2 3]

Every measurement runs in its own process, so that its peak memory (ru_maxrss) is its own. Methods in
core space run on all layers. Methods on the entries of ΔW, and those that read full weights, run on
the first layers only (--dense_layers) and their time is scaled up: a merge goes module by module and
keeps its result on disk, so time is proportional to layers and memory does not depend on them. PEFT
runs its own add_weighted_adapter on modules of one layer, mergekit on full models of one layer with
the adapters added to their weights; both are scaled up by the number of modules. The last line is
one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llama_8b_inputs import (
    LAYERS,
    RANK,
    SEQUENCES,
    SHAPES,
    make_adapter,
    make_fishers,
    make_model,
    modules,
)

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.factor_store import FactorStore
from sst_lightning.algebra.filters import soft_filter
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.methods import METHODS, MergeMethod, MergeProblem, TaskArithmetic
from sst_lightning.algebra.rank import EXACT, RankRule
from sst_lightning.algebra.streaming import merge_folders
from sst_lightning.report.recipe import merge_recipe


@dataclass(frozen=True)
class Job:
    """One merge of ours.

    Attributes:
        make: the method, given the folder of full models.
        rule: rank of the result.
        dense: whether it needs whole weight matrices, so that only the first layers are merged.
    """

    make: Callable[[Path], MergeMethod]
    rule: RankRule = EXACT
    dense: bool = False


def job(name: str, dense: bool = False, rule: RankRule = EXACT, **parameters: object) -> Job:
    return Job(lambda models: METHODS[name](**parameters), rule, dense)


def models_job(name: str) -> Job:
    def make(models: Path) -> MergeMethod:
        return METHODS[name](aligned=str(models / "model1"), unaligned=str(models / "base"))

    return Job(make, EXACT, True)


HEADLINE = {
    "task_arithmetic": job("task_arithmetic"),
    "task_arithmetic_r32": job("task_arithmetic", rule=RankRule(RANK)),
    "sst": job("sst", iterations=0, harmless_share=0.0),
    "ties": job("ties", dense=True, definition="mergekit"),
    "ties_whole_model": job("ties", dense=True),
    "dare": job("dare", dense=True),
}
"""Measured for every number of adapters."""
OTHERS = {
    "ties, --rank full": job("ties", dense=True, rule=RankRule("full")),
    **{
        name: job(name, dense=True)
        for name in (
            "magnitude_pruning",
            "dare_ties",
            "consensus_task_arithmetic",
            "consensus_ties",
            "knots",
        )
    },
    "safe_lora": models_job("safe_lora"),
    "safe_merge": models_job("safe_merge"),
    **{
        name: job(name)
        for name in ("weight_averaging", "expo", "tsv_merge", "iso_c", "subspace_boosting", "resta")
    },
    "sst hard": job("sst", filter="hard", iterations=0, harmless_share=0.0),
    "sst global": job("sst", scope="global", iterations=0, harmless_share=0.0),
    "sst_spectral": job("sst_spectral", harmless_share=0.0),
    **{name: job(name) for name in ("sst_published", "fisher_averaging", "alignguard")},
}
"""Measured for the first of --adapters; RegMean takes other Fishers and is left out."""
PEFT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
"""One module of each shape (gate and up are down's transpose)."""
SHAPE_COUNT = Counter(tuple(sorted(shape)) for shape in SHAPES.values())
MERGEKIT = {
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2, "weight": 1.0}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}},
}


def job_merge(
    name: str, folders: list[Path], fisher: Path, output: Path, models: Path
) -> dict[str, float]:
    """One merge from files to a file, with the recipe's hashes, as sst-merge merge-files does."""
    wanted = (HEADLINE | OTHERS)[name]
    method = wanted.make(models)
    start = time.perf_counter()
    with TemporaryDirectory(dir=output.parent) as scratch:
        merged = merge_folders(
            folders[:-1], folders[-1], method, 1.0, wanted.rule,
            fisher=fisher if method.requires_fisher else None, store=FactorStore(Path(scratch)),
        )  # fmt: skip
        adapters = [LoraAdapter.open(path) for path in folders]
        merge_recipe(method, 1.0, wanted.rule, merged, adapters, [1.0] * (len(folders) - 1))
        merged.adapter.save(output, overwrite=True)
    return {"seconds": time.perf_counter() - start, "discarded": merged.discarded}


def job_truncate(folders: list[Path], name: str) -> dict[str, float]:
    """Truncation of Σ ΔW_i of one module to r = 32, ours: QR and the SVD of a core."""
    adapters = _module(folders, name)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        problem = MergeProblem(CoreSpace.streamed(adapters), adapters)
        merged = TaskArithmetic().merge(problem, 1.0, RankRule(RANK))
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[4], "error": _error(adapters, merged.adapter, name)}


def job_peft(folders: list[Path], name: str, combination: str) -> dict[str, float]:
    """PEFT's add_weighted_adapter on one module, with its own defaults."""
    from sst_lightning.modules.peft_backend import PeftBackend

    class PeftDefaults(PeftBackend):
        full_matrices = True

    adapters = _module(folders, name)
    problem = MergeProblem(CoreSpace.streamed(adapters), adapters)
    method = PeftDefaults(combination, svd_rank=RANK if combination == "svd" else None)  # type: ignore[arg-type]
    start = time.perf_counter()
    merged = method.merge(problem, 1.0)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "error": _error(adapters, merged.adapter, name)}


def job_mergekit(folders: list[Path], models: Path, name: str, output: Path) -> dict[str, float]:
    """Merge full models, one for each adapter, by mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    configuration = {
        **MERGEKIT[name],
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"model{number}")} for number in range(len(folders))],
        "dtype": "float32",
    }
    start = time.perf_counter()
    with TemporaryDirectory(dir=output.parent) as scratch:
        run_merge(
            MergeConfiguration.model_validate(configuration),
            scratch,
            MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False),
        )
    return {"seconds": time.perf_counter() - start}


def job_parts(folders: list[Path], layers: int) -> dict[str, float]:
    """Where the time of SST goes, on the first layers."""
    adapters = [LoraAdapter.open(path) for path in folders]
    totals = dict.fromkeys(("read", "bases", "cores", "filter", "decode"), 0.0)
    for name in modules(layers):
        clock = [time.perf_counter()]
        loaded = [LoraAdapter({name: adapter.factors[name]}) for adapter in adapters]
        clock.append(time.perf_counter())
        basis = CoreSpace.from_adapters(loaded).bases[name]
        clock.append(time.perf_counter())
        cores = [basis.encode(adapter.factors[name]) for adapter in loaded]
        clock.append(time.perf_counter())
        fishers = [ExactFisher(torch.randn(SEQUENCES, *basis.shape)) for _ in range(2)]
        begin = time.perf_counter()
        filtered = soft_filter(cores[-1], fishers[0], fishers[1], 10.0, 0.1)
        middle = time.perf_counter()
        basis.decode(cores[0] + filtered)
        steps = [b - a for a, b in pairwise(clock)]
        steps += [middle - begin, time.perf_counter() - middle]
        for key, value in zip(totals, steps, strict=True):
            totals[key] += value
    return totals


def job_floor(folders: list[Path], fisher: Path, output: Path) -> dict[str, float]:
    """Reading all inputs and writing as many bytes as the result, and nothing else."""
    start = time.perf_counter()
    read = 0
    for path in (*(f / "adapter_model.safetensors" for f in folders), *fisher.glob("*")):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                read += len(block)
    size = (output / "adapter_model.safetensors").stat().st_size
    block = bytes(1 << 24)
    with (output.parent / "floor.bin").open("wb") as file:
        for _ in range(size >> 24):
            file.write(block)
    (output.parent / "floor.bin").unlink()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "read_gib": read / 2**30, "written_gib": size / 2**30}


JOBS: dict[str, Callable[..., dict[str, float]]] = {
    "merge": job_merge,
    "truncate": job_truncate,
    "peft": job_peft,
    "mergekit": job_mergekit,
    "parts": job_parts,
    "floor": job_floor,
}


def _module(folders: list[Path], name: str) -> list[LoraAdapter]:
    return [LoraAdapter({name: LoraAdapter.open(path).factors[name]}) for path in folders]


def _error(adapters: list[LoraAdapter], merged: LoraAdapter, name: str) -> float:
    """‖merged − Σ ΔW_i‖ / ‖Σ ΔW_i‖."""
    exact = torch.stack([adapter.factors[name].delta() for adapter in adapters]).sum(0)
    return float((merged.factors[name].delta() - exact).norm() / exact.norm())


def measure(job_name: str, /, **arguments: object) -> dict[str, float]:
    """Run a job in a process of its own."""
    command = [sys.executable, __file__, "--job", job_name]
    command += ["--arguments", json.dumps(arguments, default=str)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{job_name} failed:\n{result.stderr}")
    values: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
    label = [str(arguments[key]) for key in ("name", "combination") if key in arguments]
    print(f"{job_name} {' '.join(label)}: {shown}", flush=True)
    return values


def run_job(name: str, arguments: dict) -> dict[str, float]:
    """Run a job in this process; its figures, and the peak memory of the process."""
    folders = [Path(path) for path in arguments.pop("folders")]
    paths = {k: Path(arguments.pop(k)) for k in ("fisher", "output", "models") if k in arguments}
    values = JOBS[name](folders=folders, **paths, **arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**values, "peak_gib": peak}


class Run:
    """All measurements for one number of adapters.

    Args:
        count: number of adapters.
        options: of the command line.
        summary: gets the figures by name.
    """

    def __init__(self, count: int, options: argparse.Namespace, summary: dict[str, float]) -> None:
        self.count = count
        self.options = options
        self.summary = summary
        whole, few = (
            options.folder / f"{layers}-layers-width-{4096 // options.shrink}"
            for layers in (options.layers, options.dense_layers)
        )
        self.whole = [whole / f"adapter{number}" for number in range(count)]
        self.few = [few / f"adapter{number}" for number in range(count)]
        self.fisher = whole / f"fisher{count}"
        self.output = whole / "merged"
        self.models = few / "models"
        for number in range(count):
            make_adapter(self.whole[number], number, options.layers, options.shrink)
            make_adapter(self.few[number], number, options.dense_layers, options.shrink)
        make_fishers(self.fisher, self.whole)
        self.scale = options.layers / options.dense_layers

    def note(self, name: str, value: float) -> None:
        self.summary[f"{name}_{self.count}"] = value

    def merges(self, jobs: dict[str, Job]) -> list[str]:
        """Rows of our merges; the floor after SST's."""
        rows = []
        for name, wanted in jobs.items():
            folders = self.few if wanted.dense else self.whole
            values = measure(
                "merge", name=name, folders=[*map(str, folders)], fisher=self.fisher,
                output=self.output, models=self.models,
            )  # fmt: skip
            seconds = values["seconds"] * (self.scale if wanted.dense else 1)
            rows.append(
                f"| {name}{self._scaled(wanted)} | {seconds:.1f} | {values['peak_gib']:.2f} |"
            )
            self.note(f"{name}_seconds", seconds)
            self.note(f"{name}_peak_gib", values["peak_gib"])
            if name == "sst":
                rows.append(self._floor())
        return rows

    def _scaled(self, wanted: Job) -> str:
        if not wanted.dense:
            return ""
        return f" ({self.options.dense_layers} of {self.options.layers} layers, scaled)"

    def _floor(self) -> str:
        floor = measure(
            "floor", folders=[*map(str, self.whole)], fisher=self.fisher, output=self.output
        )
        self.note("floor_seconds", floor["seconds"])
        return (
            f"| floor of sst: read {floor['read_gib']:.1f} GiB, write "
            f"{floor['written_gib']:.1f} GiB | {floor['seconds']:.1f} | |"
        )

    def peft(self) -> list[str]:
        """Rows of one module of each shape, and of all modules by their number."""
        rows, names = [], [*map(str, self.few)]
        sums: Counter[str] = Counter()
        whole: Counter[str] = Counter()
        for module in PEFT_MODULES:
            name = f"model.layers.0.{module}"
            results = {"ours, rank 32": measure("truncate", folders=names, name=name)}
            for kind in ("svd", "linear", "cat"):
                results[f"PEFT {kind}"] = measure(
                    "peft", folders=names, name=name, combination=kind
                )
            times = self.options.layers * SHAPE_COUNT[tuple(sorted(SHAPES[module]))]
            ratio = results["PEFT svd"]["seconds"] / results["ours, rank 32"]["seconds"]
            self.note(f"truncate_speedup_vs_peft_svd_{module}", ratio)
            for kind, values in results.items():
                sums[kind] += values["seconds"]
                whole[kind] += values["seconds"] * times
                faster = f", {ratio:,.0f}× slower than ours" if kind == "PEFT svd" else ""
                rows.append(
                    f"| {kind}, {module}, error {values['error']:.4f}{faster} | "
                    f"{values['seconds']:.4f} | {values['peak_gib']:.2f} |"
                )
        for kind, seconds in whole.items():
            rows.append(
                f"| {kind}, all {7 * self.options.layers} modules (scaled) | {seconds:.1f} | |"
            )
            self.note(f"{kind.removeprefix('PEFT ')}_all_modules_seconds", seconds)
        self.note("truncate_speedup_vs_peft_svd", sums["PEFT svd"] / sums["ours, rank 32"])
        self.note(
            "truncate_speedup_vs_peft_svd_all_modules", whole["PEFT svd"] / whole["ours, rank 32"]
        )
        return rows

    def mergekit(self) -> list[str]:
        """Rows of merges of full models."""
        rows = []
        for name in MERGEKIT:
            values = measure(
                "mergekit", folders=[*map(str, self.few)], models=self.models, name=name,
                output=self.output,
            )  # fmt: skip
            seconds = values["seconds"] * self.scale
            rows.append(
                f"| mergekit {name}, full models ({self.options.dense_layers} of "
                f"{self.options.layers} layers, time scaled) | {seconds:.1f} | "
                f"{values['peak_gib']:.2f} |"
            )
            self.note(f"mergekit_{name}_seconds", seconds)
            self.note(f"mergekit_{name}_peak_gib", values["peak_gib"])
        return rows

    def make_models(self) -> None:
        """Write the full models that mergekit and Safe LoRA read."""
        size = self.options.dense_layers, self.options.shrink
        make_model(self.models / "base", *size, None)
        for number, adapter in enumerate(self.few):
            make_model(self.models / f"model{number}", *size, adapter)

    def parts(self) -> str:
        values = measure("parts", folders=[*map(str, self.few)], layers=self.options.dense_layers)
        values.pop("peak_gib")
        total = sum(values.values())
        shares = ", ".join(f"{key} {100 * value / total:.0f} %" for key, value in values.items())
        return f"\nWhere SST's time goes: {shares}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/merge_8b"))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dense_layers", type=int, default=1)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 3])
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide all widths by this, to try the program out"
    )
    parser.add_argument("--job")
    parser.add_argument("--arguments", default="{}")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(options.job, json.loads(options.arguments))))
        return
    summary: dict[str, float] = {"threads": torch.get_num_threads()}
    tables = []
    for index, count in enumerate(options.adapters):
        run = Run(count, options, summary)
        run.make_models()
        rows = [f"### {count} adapters\n", "| merge | seconds | peak GiB |", "|---|---|---|"]
        rows += run.merges(HEADLINE) + run.mergekit() + run.peft()
        rows.append(run.parts())
        if index == 0:
            rows += ["Every other method:\n", "| merge | seconds | peak GiB |", "|---|---|---|"]
            rows += [*run.merges(OTHERS), ""]
        tables.append("\n".join(rows))
    print("\n" + "\n".join(tables))
    first = options.adapters[0]
    for name in ("truncate_speedup_vs_peft_svd", "sst_seconds", "sst_peak_gib", "ties_peak_gib"):
        summary[name] = summary[f"{name}_{first}"]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
