"""AdapterExport, SampleLogger and Throughput around a short training run of the nano model.

Oracles: plain PEFT's loading of the exported folder, TensorBoard's own reader, a fake clock.
"""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from callbacks import AdapterExport, SampleLogger, Throughput
from sst_lightning.algebra.errors import OutputExistsError
from sst_lightning.modules.backbone import load_backbone
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.supervised import SupervisedLoRA
from tests.nano import random_batch, save_nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


def batches(count=4):
    # Lightning cannot move the frozen Row to a device; the DataModules do that themselves.
    row = SimpleNamespace(id="id", response="the reference")
    return [random_batch([(5, 3), (2, 6)], seed=seed, rows=[row, row]) for seed in range(count)]


def fit(nano, *callbacks, logger=False, **options):
    seed_everything(0, verbose=False)
    module = SupervisedLoRA(nano, dtype="float32", r=4, learning_rate=1e-2)
    trainer = Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": list(callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 1,
            **options,
        }
    )
    trainer.fit(module, DataLoader(batches(), None), DataLoader(batches(2), None))
    return module


def test_exported_adapter_reloads_through_plain_peft(nano, tmp_path):
    folder = tmp_path / "adapter"
    module = fit(nano, AdapterExport(str(folder)))
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_recipe.json",
    }
    base = load_backbone(nano, dtype="float32")
    ids = torch.arange(3, 20).unsqueeze(0)
    before = base(ids).logits
    reloaded = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(reloaded(ids).logits, module.model.eval()(ids).logits)
    assert not torch.allclose(reloaded(ids).logits, before)
    assert reloaded.peft_config["default"].base_model_name_or_path == nano


def test_recipe_says_what_the_adapter_was_made_from(nano, tmp_path):
    fit(nano, AdapterExport(str(tmp_path / "adapter")))
    recipe = json.loads((tmp_path / "adapter/training_recipe.json").read_text())
    assert recipe["base_model"] == nano
    assert len(recipe["base_fingerprint"]) == 64
    assert recipe["hyperparameters"]["r"] == 4
    assert recipe["seed"] == 0
    assert (recipe["epochs"], recipe["optimizer_steps"]) == (2, 8)
    assert recipe["metrics"]["val_nll"] > 0
    assert recipe["versions"]["peft"]


def test_export_refuses_to_overwrite_before_training(nano, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(OutputExistsError, match=r"AdapterExport\.overwrite"):
        fit(nano, AdapterExport(str(folder)))
    assert (folder / "mine.txt").read_text() == "kept"
    fit(nano, AdapterExport(str(folder), overwrite=True))
    assert not (folder / "mine.txt").exists()
    assert (folder / "adapter_model.safetensors").exists()


def test_export_writes_nothing_in_fast_dev_run(nano, tmp_path):
    fit(nano, AdapterExport(str(tmp_path / "adapter")), fast_dev_run=True)
    assert not (tmp_path / "adapter").exists()


def test_interrupted_run_exports_nothing(nano, tmp_path):
    class Interrupt(Throughput):
        def on_train_batch_end(self, *args):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(nano, AdapterExport(str(tmp_path / "adapter")), Interrupt())
    assert list(tmp_path.iterdir()) == []


def test_export_needs_an_adapter(nano, tmp_path):
    class NoAdapter(CausalLMModule):
        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    trainer = Trainer(
        accelerator="cpu", logger=False, callbacks=[AdapterExport(str(tmp_path / "adapter"))]
    )
    with pytest.raises(MisconfigurationException, match="PEFT model"):
        trainer.fit(NoAdapter(nano), DataLoader(batches(), None))


@pytest.fixture(scope="module")
def events(nano, tmp_path_factory):
    """Everything TensorBoard got from a run of two epochs of four batches."""
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    fit(
        nano,
        SampleLogger(count=3, max_new_tokens=5),
        Throughput(),
        LearningRateMonitor(),
        logger=logger,
    )
    return EventAccumulator(logger.log_dir).Reload()


def test_loss_rate_and_speed_are_in_tensorboard(events):
    tags = set(events.Tags()["scalars"])
    assert {"train_loss", "val_nll", "tokens_per_second", "lr-AdamW"} <= tags
    assert [event.step for event in events.Scalars("train_loss")] == list(range(8))
    assert all(event.value > 0 for event in events.Scalars("tokens_per_second"))
    rates = [event.value for event in events.Scalars("lr-AdamW")]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < rates[1]


def test_samples_are_in_tensorboard(events):
    samples = events.Tensors("samples/text_summary")
    assert [sample.step for sample in samples] == [4, 8]  # none from the sanity check
    text = samples[0].tensor_proto.string_val[0].decode()
    for part, count in (("**Prompt**", 3), ("**Answer**", 3), ("the reference", 3)):
        assert text.count(part) == count


def test_samples_are_the_answers_to_each_prompt_alone(nano, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module = fit(nano, SampleLogger(count=2, max_new_tokens=5), logger=logger, max_epochs=1)
    sample = EventAccumulator(logger.log_dir).Reload().Tensors("samples/text_summary")[-1]
    text = sample.tensor_proto.string_val[0].decode()
    for batch in batches(2):
        first = {"prompt_ids": batch["prompt_ids"][:1], "prompt_mask": batch["prompt_mask"][:1]}
        answer = module.generate_text(first, 5)[0]
        assert "\n".join(f"    {line}" for line in answer.splitlines()) in text


def test_samples_need_tensorboard(nano):
    with pytest.raises(MisconfigurationException, match="TensorBoardLogger"):
        fit(nano, SampleLogger())
    fit(nano, SampleLogger(), fast_dev_run=True)


@pytest.mark.parametrize("options", [{"count": 0}, {"max_new_tokens": 0}])
def test_sample_logger_checks_its_arguments(options):
    with pytest.raises(ValueError, match="at least 1"):
        SampleLogger(**options)


def test_throughput_counts_real_tokens_over_its_window(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    logged = []

    class Module:
        def log(self, name, value, **options):
            logged.append((name, value))

    trainer = type("Trainer", (), {"world_size": 2})()
    callback, module = Throughput(window=2), Module()
    batch = random_batch([(5, 3), (2, 6), (1, 1)])  # 8 + 8 + 2 tokens, 6 of padding
    callback.on_train_start(trainer, module)
    callback.on_train_batch_end(trainer, module, None, batch, 0)  # 1 second
    callback.on_train_batch_end(trainer, module, None, batch, 1)  # 2 seconds
    callback.on_validation_end(trainer, module)  # not counted
    callback.on_train_batch_end(trainer, module, None, batch, 2)  # 4 seconds
    assert logged == [("tokens_per_second", 2 * tokens) for tokens in (18, 36 / 3, 36 / 6)]


def test_throughput_checks_its_window():
    with pytest.raises(ValueError, match="at least 1"):
        Throughput(window=0)
