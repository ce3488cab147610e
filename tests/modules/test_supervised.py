"""Oracles: an uninterrupted run, torch's AdamW by hand, and the checkpoint file itself."""

import os
from contextlib import suppress

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset
from transformers.models.llama.modeling_llama import LlamaMLP

from sst_lightning.data.batching import LengthBucketBatchSampler
from sst_lightning.data.resumable import ResumableLoader
from sst_lightning.modules.lora import SEVEN_PROJECTIONS
from sst_lightning.modules.schedule import warmup_then_decay
from sst_lightning.modules.supervised import SupervisedLoRA
from tests.nano import random_batch, save_nano

ROWS = 22


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


LENGTHS = [[(3, 4), (2, 5)], [(6, 1)], [(2, 4)]]


class Losses(Callback):
    """Notes the logged loss after each batch."""

    def __init__(self, losses):
        self.losses = losses

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train_loss"].item())


class RandomRows(Dataset):
    """Batches of rows that depend on their indices alone."""

    def __len__(self):
        return ROWS

    def __getitem__(self, indices):
        lengths = [(3 + index % 5, 2 + index % 3) for index in indices]
        return random_batch(lengths, seed=indices[0]) | {"indices": indices}


def loader(loader_class=ResumableLoader):
    sampler = LengthBucketBatchSampler(list(range(ROWS)), batch_size=2, shuffle=True, seed=3)
    return loader_class(RandomRows(), batch_size=None, sampler=sampler)


class Recorder(Callback):
    """Notes epoch, rows and loss of each batch; interrupts before the batch ``stop``."""

    def __init__(self, stop=None):
        self.steps, self.stop = [], stop

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.stop == (trainer.current_epoch, batch_idx):
            raise InterruptedError

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].item()
        self.steps.append((trainer.current_epoch, trainer.global_step, batch["indices"], loss))


def module_for(nano, **options):
    return SupervisedLoRA(nano, **{"dtype": "float32", "r": 4, "learning_rate": 1e-2} | options)


def trainer_for(*callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accumulate_grad_batches": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def run(nano, folder, stop=None, checkpoint=None):
    """Train on 11 batches per epoch, two epochs; returns the recorded steps and the module."""
    seed_everything(1, verbose=False)
    module, recorder = module_for(nano), Recorder(stop)
    every = ModelCheckpoint(folder, "{epoch}-{step}", every_n_train_steps=1, save_top_k=-1)
    rescue = ModelCheckpoint(folder, "rescue", save_on_exception=True, every_n_epochs=100)
    trainer = trainer_for(recorder, every, rescue)
    with suppress(InterruptedError):
        trainer.fit(module, loader(), loader(), ckpt_path=checkpoint, weights_only=True)
    return recorder.steps, module


@pytest.fixture(scope="module")
def uninterrupted(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    steps, module = run(nano, folder)
    return steps, module, folder


def assert_continues(uninterrupted, steps, module, length):
    expected, reference, _ = uninterrupted
    assert len(steps) == length
    assert steps == expected[-length:]
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "left"),
    [("epoch=0-step=1", 18), ("epoch=0-step=2", 14), ("epoch=0-step=3", 11), ("epoch=1-step=4", 7)],
)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(
    nano, uninterrupted, tmp_path, name, left
):
    checkpoint = uninterrupted[2] / f"{name}.ckpt"
    steps, module = run(nano, tmp_path, checkpoint=str(checkpoint))
    assert_continues(uninterrupted, steps, module, left)


@pytest.mark.parametrize(("stop", "left"), [((0, 6), 18), ((0, 4), 18), ((1, 3), 11), ((1, 10), 3)])
def test_interruption_between_two_optimizer_steps_repeats_the_window(
    nano, uninterrupted, tmp_path, stop, left
):
    run(nano, tmp_path / "first", stop=stop)
    newest = max((tmp_path / "first").iterdir(), key=os.path.getmtime)
    steps, module = run(nano, tmp_path / "second", checkpoint=str(newest))
    assert_continues(uninterrupted, steps, module, left)


def test_loader_that_cannot_be_resumed_inside_an_epoch_is_refused(nano, uninterrupted):
    checkpoint = uninterrupted[2] / "epoch=0-step=2.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    del state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    plain = checkpoint.parent / "plain.ckpt"
    torch.save(state, plain)
    with pytest.raises(MisconfigurationException, match="after 8 of 11 batches"):
        trainer_for().fit(module_for(nano), loader(DataLoader), ckpt_path=str(plain))


def test_checkpoint_holds_lora_weights_and_optimizer_state_only(uninterrupted):
    state = torch.load(uninterrupted[2] / "epoch=1-step=6.ckpt", weights_only=True)
    assert len(state["state_dict"]) == 2 * 7 * 2  # A and B of seven projections in two layers
    assert all("lora_" in name for name in state["state_dict"])
    moments = state["optimizer_states"][0]["state"]
    assert len(moments) == 28
    assert {tuple(sorted(m)) for m in moments.values()} == {("exp_avg", "exp_avg_sq", "step")}


def test_checkpoint_of_other_target_modules_or_base_is_refused(nano, uninterrupted, tmp_path):
    checkpoint = str(uninterrupted[2] / "epoch=0-step=3.ckpt")
    with pytest.raises(MisconfigurationException, match=r"other target_modules.*lora_"):
        trainer_for().fit(
            module_for(nano, target_modules=["q_proj"]), loader(), None, None, checkpoint
        )
    other = str(save_nano(tmp_path / "other", seed=1))
    with pytest.raises(MisconfigurationException, match="another base model"):
        trainer_for().fit(module_for(other), loader(), None, None, checkpoint)


def test_load_from_checkpoint_restores_weights_without_a_trainer(uninterrupted):
    _, module, folder = uninterrupted
    restored = SupervisedLoRA.load_from_checkpoint(
        folder / "epoch=1-step=6.ckpt", weights_only=True
    )
    for ours, theirs in zip(restored.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_lora_weights_train_in_fp32_over_a_bf16_base(nano):
    module = module_for(nano, dtype="bfloat16")
    module.configure_model()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert {p.dtype for p in trained.values()} == {torch.float32}
    base = [p for name, p in module.named_parameters() if name not in trained]
    assert {p.dtype for p in base} == {torch.bfloat16}
    assert {name.split(".")[-4] for name in trained} == set(SEVEN_PROJECTIONS)


def test_initial_weights_depend_on_the_seed_alone(nano):
    def weights(seed, draws):
        seed_everything(seed, verbose=False)
        torch.rand(draws)
        module = module_for(nano)
        state = torch.get_rng_state()
        module.configure_model()
        assert torch.equal(torch.get_rng_state(), state)
        return next(p for p in module.parameters() if p.requires_grad)

    assert torch.equal(weights(5, 0), weights(5, 100))
    assert not torch.equal(weights(5, 0), weights(6, 0))


def test_rslora_and_alpha_scale_the_update(nano):
    module = module_for(nano, r=4, lora_alpha=6, use_rslora=True)
    module.configure_model()
    layer = module.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 / 4**0.5


def test_optimizer_steps_are_those_of_adamw_with_warm_up(nano):
    """One batch, two steps: the weights after plain torch AdamW with the documented factors."""
    batch = random_batch([(4, 3), (2, 5)])
    seed_everything(2, verbose=False)
    module = module_for(nano, warmup_ratio=0.5, weight_decay=0.1)
    trainer_for(max_epochs=4, accumulate_grad_batches=1).fit(module, DataLoader([batch], None))

    seed_everything(2, verbose=False)
    oracle = module_for(nano)
    oracle.configure_model()
    parameters = [p for p in oracle.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for factor in (0.5, 1.0, 1.0, 0.5):
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        logits = oracle.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = [p for p in module.parameters() if p.requires_grad]
    for ours, theirs in zip(trained, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_step_is_that_of_its_rows_however_they_are_divided_into_batches(nano):
    """Batches of 9, 1 and 4 completion tokens in steps of two; the last step has one batch."""
    batches = [random_batch(rows, seed=n) for n, rows in enumerate(LENGTHS)]
    width = max(batch["input_ids"].shape[1] for batch in batches)

    def joined(key, fill):
        parts = [
            torch.nn.functional.pad(b[key], (0, width - b[key].shape[1]), value=fill)
            for b in batches[:2]
        ]
        return torch.cat(parts)

    keys = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    first = {key: joined(key, fill) for key, fill in keys.items()} | {"rows": [None] * 3}
    runs = []
    for data, accumulated in ((batches, 2), ([first, batches[2]], 1)):
        seed_everything(2, verbose=False)
        losses, module = [], module_for(nano)
        trainer_for(Losses(losses), accumulate_grad_batches=accumulated).fit(
            module, DataLoader(data, None)
        )
        weights = [p.detach() for p in module.parameters() if p.requires_grad]
        runs.append((losses[accumulated - 1 :: accumulated][:2], weights))
    (losses, weights), (expected, oracle) = runs
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert any(weight.abs().max() > 1e-3 for weight in weights)
    for ours, theirs in zip(weights, oracle, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_schedule():
    linear = [warmup_then_decay(10, 0.2, "linear")(step) for step in range(11)]
    assert linear == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    cosine = warmup_then_decay(10, 0.2, "cosine")
    assert [cosine(step) for step in (2, 6, 10)] == pytest.approx([1, 0.5, 0])
    assert [warmup_then_decay(1, 0.1, "linear")(step) for step in (0, 1)] == [1, 0]


def test_gradient_checkpointing_recomputes_each_layer(nano, monkeypatch):
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    gradients = {}
    for checkpointing in (False, True):
        seed_everything(0, verbose=False)
        module = module_for(nano, gradient_checkpointing=checkpointing)
        module.configure_model()
        module.on_train_start()
        calls.clear()
        parameters = [p for p in module.parameters() if p.requires_grad]
        loss = module.sequence_nll(random_batch([(4, 3)]))[0].sum()
        gradients[checkpointing] = torch.autograd.grad(loss, parameters)
        assert len(calls) == (4 if checkpointing else 2)
    for a, b in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(a, b)


def test_inactive_gradient_checkpointing_is_an_error(nano):
    module = module_for(nano, gradient_checkpointing=True)
    module.configure_model()
    module.eval()
    with pytest.raises(MisconfigurationException, match="not active"):
        module.on_train_start()


def test_nan_loss_names_the_rows(nano):
    module = module_for(nano)
    module.configure_model()
    batch = random_batch([(3, 2), (2, 2)])
    batch["rows"] = [type("Row", (), {"id": name}) for name in ("a5-7", "a5-9")]
    leaf = module.model.get_input_embeddings()
    poison = batch["input_ids"][1, 0]
    leaf.weight.data[poison] = float("nan")
    with pytest.raises(FloatingPointError, match="a5-9"):
        trainer_for().fit(module, DataLoader([batch], None))


def test_batch_without_labels_names_the_rows(nano):
    batch = random_batch([(3, 0)])
    with pytest.raises(MisconfigurationException, match="no completion tokens"):
        trainer_for().fit(module_for(nano), DataLoader([batch], None))


def test_unknown_target_module(nano):
    with pytest.raises(MisconfigurationException, match="no module called 'c_attn'"):
        module_for(nano, target_modules=["c_attn"]).configure_model()


def test_qlora_step_on_the_cpu(nano):
    module = module_for(nano, quantization="nf4")
    trainer_for(max_epochs=1).fit(module, loader())
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)


class LearningRates(Callback):
    """Notes what the optimizer's groups are about to be stepped with."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen += [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def test_a_resumed_run_goes_on_with_the_learning_rate_it_is_given(nano, uninterrupted):
    """At its place in the schedule: as the rest of a run that had that rate from the start."""
    checkpoint = uninterrupted[2] / "epoch=0-step=2.ckpt"
    options = {"learning_rate": 3e-3, "weight_decay": 0.5}
    seen = []
    for path in (None, checkpoint):
        rates = LearningRates()
        trainer = trainer_for(rates)
        trainer.fit(module_for(nano, **options), loader(), ckpt_path=path, weights_only=True)
        seen.append(rates.seen)
    factor = warmup_then_decay(6, 0.1, "linear")
    assert seen[0] == [(pytest.approx(3e-3 * factor(step)), 0.5) for step in range(6)]
    assert seen[1] == [(pytest.approx(rate), decay) for rate, decay in seen[0][2:]]


def test_weights_that_are_not_finite_are_not_saved(nano, tmp_path):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            if trainer.global_step == 2:
                weight = next(p for n, p in module.named_parameters() if "lora_B" in n)
                weight.data[0, 0] = float("inf")

    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = trainer_for(Spoil(), every)
    with pytest.raises(
        FloatingPointError, match=r"1 LoRA weights are not finite after step 2, .*B"
    ):
        trainer.fit(module_for(nano), loader())
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]
