"""Two random adapters on a nano base, tiny data and a quiet trainer: a merge in a second."""

from dataclasses import dataclass
from pathlib import Path

from sst_lightning.data import Alpaca, RepliQA, SafetyUtilityData, Security
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.trainer import SSTTrainer
from tests.adapters import random_adapter
from tests.nano import nano_model, save_nano

LENGTH = 160


@dataclass(frozen=True)
class Inputs:
    """Folders of a base model and two utility adapters and a safety adapter on it."""

    base: str
    utility: str
    second: str
    safety: str


def save_inputs(folder: Path) -> Inputs:
    """Write a nano base and random adapters of different ranks."""
    base = save_nano(folder / "nano")
    paths = {}
    for seed, (name, rank) in enumerate({"utility": 2, "second": 3, "safety": 4}.items()):
        adapter = random_adapter(nano_model(), rank=rank, seed=seed, base_model=str(base))
        paths[name] = folder / name / "adapter"
        adapter.save(paths[name])
    return Inputs(str(base), *(str(paths[name]) for name in ("utility", "second", "safety")))


def small_data(base: str, batch_size: int = 4, utility: int = 1, **options) -> SafetyUtilityData:
    """Embedded rows, a handful of each, short; ``utility`` data sets."""
    sets = {"a6": Alpaca(max_length=LENGTH), "a5": RepliQA(max_length=LENGTH)}
    sizes = {
        "calibration_samples": 6,
        "test_samples": 5,
        "generation_samples": 3,
        "attack_samples": 3,
        "harmless_samples": 3,
    }
    return SafetyUtilityData(
        utility=dict(list(sets.items())[:utility]),
        safety=Security(max_length=LENGTH),
        tokenizer=base,
        batch_size=batch_size,
        **{**sizes, **options},
    )


def small_module(inputs: Inputs, both: bool = False, **options) -> MergeModule:
    """A merge module in fp32."""
    utility = [inputs.utility, inputs.second] if both else [inputs.utility]
    defaults = {"dtype": "float32", "max_new_tokens": 4}
    return MergeModule(utility, inputs.safety, base=inputs.base, **{**defaults, **options})


def quiet_trainer(**options) -> SSTTrainer:
    """A trainer on the CPU that writes and prints nothing by itself."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "inference_mode": False,
    }
    return SSTTrainer(**{**defaults, **options})
