"""Every stage on a nano model, one command line after the other, in as many processes as asked for.

As a script it is what Lightning starts again for each further process: what it works on is in the
environment, because its command line is that of the stage.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from sst_lightning.cli.main import main
from sst_lightning.modules.supervised import SupervisedLoRA
from tests.cli.commands import TINY
from tests.nano import VOCABULARY, nano_model, nano_tokenizer, random_batch

ROWS = 22
GLOBAL_BATCH = 6
NAN_TOKEN = VOCABULARY["~"]


def write_rows(folder: Path) -> Path:
    """An instruction file of unequal lengths; some answers lie beyond ``max_length``."""
    rows = [
        {
            "instruction": f"Count to {n} in words, please." + " Really." * (n % 5),
            "input": "",
            "output": " ".join(["one", "two", "three", "four", "five"][: 1 + n % 5]) + ".",
        }
        for n in range(ROWS + 20)
    ]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def sharded(made, folder: Path, output: Path) -> list[list[str]]:
    """The same training and Fishers with every decoder layer divided among two processes.

    Once from the beginning, once from a checkpoint of the single process; the last has answers.
    """
    measured = {
        "class_path": "tests.distributed.stages.Share",
        "init_args": {"folder": str(output)},
    }
    fitting = [
        *fit(made, folder, output, 2), "--model.gradient_checkpointing=true",
        f"--trainer.callbacks={json.dumps([*json.loads(callbacks(output)), measured])}",
    ]  # fmt: skip
    resumed = [
        *fit(made, folder, output / "resumed", 2),
        f"--ckpt_path={folder / '1' / 'checkpoints' / 'step=3.ckpt'}",
    ]
    validate = [
        "validate", "--config=configs/fisher_a6_a7.yaml", *merging(made, 2),
        f"--trainer.callbacks.output={output / 'fisher'}",
    ]  # fmt: skip
    answers = [
        *fit(made, folder, output / "answers", 2),
        "--trainer.callbacks=callbacks.SampleLogger",
    ]
    head = [*fit(made, folder, output / "head", 2), "--model.target_modules=[q_proj, lm_head]"]
    quantised = [*fit(made, folder, output / "nf4", 2), "--model.quantization=nf4"]
    common = [*TINY["trainer"], "--trainer.devices=2", "--trainer.strategy=fsdp"]
    commands = [fitting, resumed, validate, answers, head, quantised]
    return [[*command, *common] for command in commands]


def fit(made, folder: Path, output: Path, processes: int) -> list[str]:
    """Six steps of two batches; the Fisher of each validation pass comes along."""
    return [
        "fit", "--config=configs/a6_alpaca.yaml", f"--model.base={made['base']}",
        "--model.dtype=float32", "--model.r=4", "--model.learning_rate=1e-2",
        "--data.source=local", f"--data.path={folder / 'rows.json'}", f"--data.max_samples={ROWS}",
        "--data.calibration_share=0.2", "--data.test_share=0.1", "--data.calibration_samples=7",
        f"--data.batch_size={GLOBAL_BATCH // processes}", "--data.max_length=140",
        "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2",
        f"--trainer.logger.save_dir={output}", f"--trainer.callbacks={callbacks(output)}",
    ]  # fmt: skip


def callbacks(output: Path) -> str:
    """Export, a checkpoint in the middle of the run, and a Fisher at the trained weights."""
    return json.dumps(
        [
            {
                "class_path": "callbacks.AdapterExport",
                "init_args": {"path": str(output / "adapter")},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "dirpath": str(output / "checkpoints"),
                    "filename": "{step}",
                    "every_n_train_steps": 1,
                    "save_top_k": -1,
                },
            },
            {
                "class_path": "callbacks.FisherCollector",
                "init_args": {
                    "points": {"calibration": "training"},
                    "during_fit": True,
                    "overwrite": True,
                    "output": str(output / "fisher_in_fit"),
                },
            },
        ]
    )


def merging(made, processes: int) -> list[str]:
    """Options of validate, merge and compare: seven rows of each set, three or two a batch."""
    return [
        f"--model.base={made['base']}", "--model.dtype=float32", "--model.max_new_tokens=3",
        f"--model.utility=[{made['utility']}]", f"--model.safety={made['safety']}",
        f"--data.batch_size={GLOBAL_BATCH // processes}", "--data.calibration_samples=7",
        "--data.test_samples=5", "--data.generation_samples=4", "--data.attack_samples=4",
        "--data.harmless_samples=3", "--data.utility.a6.init_args.max_length=200",
        "--data.safety.init_args.max_length=200",
    ]  # fmt: skip


def commands(made, folder: Path, output: Path, processes: int) -> list[list[str]]:
    """Return the command lines in order; the last two are errors that every process must see."""
    fitting = fit(made, folder, output, processes)
    merge = merging(made, processes)
    compare = [
        "compare", "--config=configs/merge_a6_a7.yaml", *merge, f"--output={output / 'compare'}",
        "--methods=[{class_path: SST, init_args: {iterations: 1}}, task_arithmetic]",
        "--alphas=[0.5]", f"--suites={made['suites']}",
    ]  # fmt: skip
    budget = [
        "merge", "--config=configs/merge_a6_a7.yaml", *merge, f"--output={output / 'budget'}",
        f"--fisher={output / 'fisher'}", "--max_utility_drop=0.5", "--evaluate=false",
        "--data.budget_samples=11",
    ]  # fmt: skip
    # Nine rows: one of two processes has a batch that is larger than all of the other's.
    monitored = [
        "validate", "--config=configs/fisher_a6_a7.yaml", *merge, "--data.calibration_samples=9",
        f"--data.batch_size={4 // processes}", f"--trainer.callbacks.output={output / 'monitored'}",
        "--trainer.callbacks.stop_similarity=0.999", "--trainer.callbacks.block_samples=8",
    ]  # fmt: skip
    plain = ["merge", "--config=configs/merge_a6_a7.yaml", *merge, "--method=task_arithmetic"]
    first = [*plain, f"--output={output / 'first'}", "--evaluate=false"]
    nothing = [*plain, f"--output={output / 'nothing'}", "--model.utility_weights=[0]"]
    common = [
        *TINY["trainer"],
        f"--trainer.devices={processes}",
        f"--trainer.strategy={'ddp' if processes > 1 else 'auto'}",
    ]
    return [
        [*command, *common]
        for command in (
            first,
            fitting,
            ["validate", "--config=configs/fisher_a6_a7.yaml", *merge,
             f"--trainer.callbacks.output={output / 'fisher'}"],
            compare,
            budget,
            ["test", "--config", made["suites"], "--adapter", made["safety"],
             f"--output={output / 'test'}"],
            monitored,
            nothing,
            compare,
        )
    ]  # fmt: skip


class Share(Callback):
    """Writes how many bytes of weights, adapter and optimizer state this process holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer, module) -> None:
        def size(tensors) -> int:
            own = {id(t): t.to_local() if isinstance(t, DTensor) else t for t in tensors}
            return sum(t.numel() * t.element_size() for t in own.values())

        state = trainer.optimizers[0].state.values()
        found = {
            "base weights": size(
                t
                for t in (*module.model.parameters(), *module.model.buffers())
                if not t.requires_grad
            ),
            "adapter": size(p for p in module.model.parameters() if p.requires_grad),
            "optimizer state": size(
                t for values in state for t in values.values() if t.ndim > 0
            ),
        }  # fmt: skip
        (self.folder / f"share-{trainer.global_rank}.json").write_text(json.dumps(found))


class Losses(Callback):
    """Notes the logged loss after each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())


def train(base: str, batches: list, processes: int) -> tuple[list[float], str | None]:
    """Train on global batches, of which each process takes its rows; return losses and error."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    parts = [{key: value[rank::processes] for key, value in batch.items()} for batch in batches]
    losses = Losses()
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[losses],
    )  # fmt: skip
    try:
        module = SupervisedLoRA(base, "float32", r=4, learning_rate=1e-1)
        trainer.fit(module, DataLoader(parts, batch_size=None))
    except (FloatingPointError, MisconfigurationException) as error:
        return losses.losses, str(error)
    return losses.losses, None


def save_poisoned(folder: Path) -> str:
    """Write a base model that gives NaN after one of its tokens."""
    model = nano_model(tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[NAN_TOKEN] = float("nan")
    model.save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    return str(folder)


def uneven_training(base: str, poisoned: str, processes: int) -> dict:
    """Train where one process has no completion token, none has, and one has a loss of NaN."""
    rows = [SimpleNamespace(id=f"row-{n}") for n in range(3)]
    uneven = random_batch([(3, 4), (2, 0), (4, 1)], 0, rows)
    silent = random_batch([(3, 0), (2, 0), (4, 0)], 1, rows)
    broken = random_batch([(3, 4), (2, 5), (4, 1)], 2, rows)
    broken["input_ids"][1] = NAN_TOKEN
    return {
        "uneven": train(base, [uneven, broken, uneven], processes),
        "silent": train(base, [uneven, silent], processes),
        "broken": train(poisoned, [uneven, broken], processes),
    }


def run(folder: Path, processes: int) -> None:
    """Run everything; each process notes its exit codes and what it was told."""
    made = json.loads((folder / "made.json").read_text())
    output = folder / str(processes)
    codes = [main(command) for command in commands(made, folder, output, processes)]
    notes = {"codes": codes}
    if processes == 2:
        notes["sharded"] = [main(command) for command in sharded(made, folder, output / "sharded")]
    notes |= {**uneven_training(made["base"], made["poisoned"], processes)}
    rank = os.environ.get("LOCAL_RANK", "0")
    (output / f"process-{rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    run(Path(os.environ["SST_TEST_FOLDER"]), int(os.environ["SST_TEST_PROCESSES"]))
