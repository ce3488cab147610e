"""Peak memory of a Fisher's way from gradients to a filtered core, in memory and through disk.

python benchmarks/fisher_memory.py [--sequences 256] [--modules 224] [--core 64]

The default is the shape of Llama-3.1-8B with two adapters of rank 32 on all seven projections: 3.5
MiB of gradients a sequence. Gradients are random; the model is left out, because its memory is the
same in both cases. Two sets are collected, one after the other, and the soft filter is applied to every
module. ``memory`` keeps all gradients in memory; ``disk`` writes blocks and then Fisher files, and
reads them module by module, as ``validate`` and ``merge`` do. Each runs in a process of its own; its
peak is ru_maxrss, less what the process had before it began. The last line is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sst_lightning.algebra.core import CoreBasis, CoreSpace
from sst_lightning.algebra.filters import soft_filter
from sst_lightning.algebra.fisher_blocks import GIBIBYTE, BlockStore
from sst_lightning.algebra.fisher_file import FisherMetadata, FisherStatistics, write_samples
from sst_lightning.modules.fisher_collection import FisherCollection

BATCH, TOKENS = 8, 8


def collect(
    arguments: argparse.Namespace, space: CoreSpace, name: str, folder: Path | None
) -> FisherStatistics:
    order = [
        list(range(start, min(start + BATCH, arguments.sequences)))
        for start in range(0, arguments.sequences, BATCH)
    ]
    store = BlockStore(
        None if folder is None else folder / f"{name}.blocks", {"name": name}, 0, 10**6
    )
    blocks = arguments.block_samples // BATCH
    collection = FisherCollection(list(space.bases), "exact", order, blocks, store)
    for number, indices in enumerate(order):
        for module in space.bases:
            inputs = torch.randn(len(indices), TOKENS, arguments.core)
            collection.update(module, inputs, torch.randn_like(inputs))
        collection.finish_batch(number, torch.zeros(len(indices)), torch.ones(len(indices)))
    metadata = FisherMetadata("", "", [], name, "", arguments.sequences, "exact", name)
    if folder is None:
        return FisherStatistics(dict(collection.estimates()), space, metadata)
    path = folder / f"{name}.safetensors"
    write_samples(path, space, metadata, collection.estimates())
    store.remove()
    return FisherStatistics.open(path)


def run(arguments: argparse.Namespace, folder: Path | None) -> None:
    torch.set_num_threads(1)
    basis = torch.eye(arguments.core)
    space = CoreSpace({f"layers.{n}": CoreBasis(basis, basis) for n in range(arguments.modules)})
    soft_filter_once(arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    utility, safety = (collect(arguments, space, name, folder) for name in ("utility", "safety"))
    for name in space.bases:
        core = torch.randn(arguments.core, arguments.core)
        soft_filter(core, safety.modules[name], utility.modules[name], mu=10, rho=0.1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"gib": (peak - before) * 1024 / GIBIBYTE}))


def soft_filter_once(arguments: argparse.Namespace) -> None:
    """Load what the filter loads at its first call; not part of the measurement."""
    small = argparse.Namespace(sequences=BATCH, core=4, block_samples=BATCH)
    space = CoreSpace({"m": CoreBasis(torch.eye(4), torch.eye(4))})
    fisher = collect(small, space, "small", None).modules["m"]
    soft_filter(torch.ones(4, 4), fisher, fisher, mu=1, rho=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--modules", type=int, default=224)
    parser.add_argument("--core", type=int, default=64)
    parser.add_argument("--block_samples", type=int, default=64)
    parser.add_argument("--run", choices=["memory", "disk"], help="one case, in this process")
    arguments = parser.parse_args()
    if arguments.run is not None:
        with tempfile.TemporaryDirectory() as scratch:
            run(arguments, Path(scratch) if arguments.run == "disk" else None)
        return
    gradients = 2 * 4 * arguments.sequences * arguments.modules * arguments.core**2 / GIBIBYTE
    block = 4 * arguments.block_samples * arguments.modules * arguments.core**2 / GIBIBYTE
    result = {"gradients_gib": gradients, "block_gib": block}
    for case in ("memory", "disk"):
        command = [sys.executable, __file__, *sys.argv[1:], "--run", case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        result[f"peak_{case}_gib"] = json.loads(output.splitlines()[-1])["gib"]
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
