"""FisherCollector through the Trainer, against autograd on one sequence at a time."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from callbacks import FisherCollector
from sst_lightning import SupervisedLoRA
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import FisherError, OutputExistsError
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.data import Alpaca
from sst_lightning.data.rows import fingerprint_rows
from sst_lightning.data.tokenization import encode
from sst_lightning.modules.backbone import backbone_fingerprint, load_backbone
from tests.small_merge import LENGTH, quiet_trainer, save_inputs, small_data, small_module

POINTS = {"utility": "utility", "harmless": "base", "safety": "safety"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def collect(inputs, batch_size=4, points=POINTS, estimator="exact", output=None, **options):
    module, data = small_module(inputs, both=True), small_data(inputs.base, batch_size)
    collector = FisherCollector(points, estimator, output)
    quiet_trainer(callbacks=[collector], **options).validate(module, datamodule=data, verbose=False)
    return collector.statistics, module, data


@pytest.fixture(scope="module")
def collected(inputs):
    return collect(inputs)


def autograd_samples(module, data, name, point):
    """Gradient of each sequence's summed NLL for cores that are parameters in dense weights."""
    model = load_backbone(module.base, "float32")
    cores = {
        key: (torch.zeros(basis.shape) if point is None else point[key].float()).requires_grad_()
        for key, basis in module.space.bases.items()
    }
    result = []
    for row in data.fisher_rows()[name]:
        item = encode(row, data.safety.tokenizer, LENGTH)
        weights = {
            f"{key}.weight": model.get_submodule(key).weight
            + basis.q_out @ cores[key] @ basis.q_in.T
            for key, basis in module.space.bases.items()
        }
        ids, labels = torch.tensor([item.input_ids]), torch.tensor([item.labels])
        logits = torch.func.functional_call(model, weights, (ids,)).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        result.append(torch.autograd.grad(nll, list(cores.values())))
    return {key: [gradients[i] for gradients in result] for i, key in enumerate(cores)}


def second_moment(samples):
    """(1/N) Σ vec(g) vec(g)ᵀ."""
    flat = torch.stack([sample.flatten().double() for sample in samples])
    return flat.T @ flat / len(flat)


@pytest.mark.parametrize("name", ["utility", "harmless", "safety"])
def test_fisher_of_each_point_equals_autograd(collected, name):
    statistics, module, data = collected
    samples = autograd_samples(module, data, name, module.cores_at(POINTS[name]))
    for key, fisher in statistics[name].modules.items():
        expected = second_moment(samples[key])
        scale = float(expected.abs().max())
        torch.testing.assert_close(fisher.dense(), expected, rtol=1e-3, atol=2e-5 * scale)


def test_fisher_does_not_depend_on_batch_size_and_padding(inputs, collected):
    for batch_size in (1, 6):
        statistics, _, _ = collect(inputs, batch_size)
        for name, expected in collected[0].items():
            assert statistics[name].metadata == expected.metadata
            for key, fisher in statistics[name].modules.items():
                dense = expected.modules[key].dense()
                torch.testing.assert_close(
                    fisher.dense(), dense, rtol=1e-3, atol=1e-5 * float(dense.abs().max())
                )


def test_estimators_agree_where_they_must(inputs, collected):
    """The diagonal exactly; K-FAC in its factors' own averages over sequences."""
    exact = collected[0]["utility"].modules
    diagonal = collect(inputs, estimator="diagonal")[0]["utility"].modules
    kfac = collect(inputs, estimator="kfac")[0]["utility"].modules
    for key, fisher in exact.items():
        expected = fisher.dense().diagonal().reshape(fisher.shape)
        torch.testing.assert_close(diagonal[key].diagonal.double(), expected, rtol=1e-3, atol=1e-8)
        assert kfac[key].shape == fisher.shape
        assert kfac[key].count == diagonal[key].count == fisher.count == 6
        assert bool((torch.linalg.eigvalsh(kfac[key].dense()) > -1e-6).all())


def test_metadata_identifies_base_adapters_point_and_rows(collected):
    statistics, module, data = collected
    for name, point in {"utility": "utility [1.0, 1.0]", "harmless": "base"}.items():
        metadata = statistics[name].metadata
        assert metadata.point == point
        assert metadata.data_name == name
        assert metadata.data_fingerprint == fingerprint_rows(data.fisher_rows()[name])
        assert metadata.count == len(data.fisher_rows()[name]) == 6
        assert metadata.base_model == str(module.base)
        assert metadata.base_fingerprint == backbone_fingerprint(module.model)
        assert metadata.adapter_fingerprints == [a.fingerprint for a in module.adapters]


@pytest.mark.parametrize("estimator", ["exact", "kfac", "diagonal"])
def test_a_saved_file_round_trips(inputs, tmp_path, estimator):
    statistics, _, _ = collect(inputs, estimator=estimator, output=str(tmp_path / "fisher"))
    assert sorted(p.name for p in (tmp_path / "fisher").iterdir()) == [
        "harmless.safetensors", "safety.safetensors", "utility.safetensors",
    ]  # fmt: skip
    for name, expected in statistics.items():
        loaded = FisherStatistics.load(tmp_path / "fisher" / f"{name}.safetensors")
        assert loaded.metadata == expected.metadata
        for key, fisher in loaded.modules.items():
            torch.testing.assert_close(fisher.dense(), expected.modules[key].dense())
            assert torch.equal(loaded.space.bases[key].q_in, expected.space.bases[key].q_in)


def test_the_model_is_left_without_hooks_and_gradients_off(inputs):
    _, module, _ = collect(inputs)
    inner = [m for m in module.model.modules() if m is not module.model.get_output_embeddings()]
    hooks = sum(len(m._forward_hooks) for m in inner)
    assert hooks == len(module.space.bases)  # the injector's own
    assert not any(p.requires_grad or p.grad is not None for p in module.model.parameters())
    assert torch.is_grad_enabled()


def test_hooks_are_removed_after_an_error_too(inputs, monkeypatch):
    module, data = small_module(inputs), small_data(inputs.base)
    monkeypatch.setattr(module, "validation_step", lambda *a: {"loss": torch.zeros(())})
    with pytest.raises(MisconfigurationException, match="sequence_nll"):
        quiet_trainer(callbacks=[FisherCollector()]).validate(module, datamodule=data)
    assert torch.is_grad_enabled()
    inner = [m for m in module.model.modules() if m is not module.model.get_output_embeddings()]
    assert sum(len(m._forward_hooks) for m in inner) == len(module.space.bases)


def test_inference_mode_is_refused_with_the_remedy(inputs):
    with pytest.raises(MisconfigurationException, match="inference_mode=False"):
        collect(inputs, inference_mode=True)


def test_an_unknown_dataloader_is_named(inputs):
    with pytest.raises(MisconfigurationException, match=r"'utilty'.*utility, harmless, safety"):
        collect(inputs, points={"utilty": "utility"})


def test_an_unknown_point_is_named(inputs):
    with pytest.raises(ValueError, match="unknown point 'utilities'"):
        collect(inputs, points={"utility": "utilities"})


def test_default_points_are_those_the_data_has(inputs):
    module = small_module(inputs)
    data = small_data(inputs.base, harmless_calibration=False)
    collector = FisherCollector()
    quiet_trainer(callbacks=[collector]).validate(module, datamodule=data, verbose=False)
    assert set(collector.statistics) == {"utility", "safety"}


def test_an_existing_file_is_refused_before_any_work(inputs, tmp_path):
    (tmp_path / "safety.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"safety\.safetensors already exists.*overwrite"):
        collect(inputs, output=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["safety.safetensors"]
    assert (tmp_path / "safety.safetensors").read_text() == "mine"


def test_a_module_without_core_space_is_refused(inputs):
    class Plain(pl.LightningModule):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(MisconfigurationException, match=r"Plain.*core_space"):
        quiet_trainer(callbacks=[FisherCollector()]).validate(
            Plain(), datamodule=small_data(inputs.base)
        )
    module = small_module(inputs)
    loader = DataLoader([0])
    with pytest.raises(MisconfigurationException, match="validation_names"):
        quiet_trainer(callbacks=[FisherCollector()]).validate(module, dataloaders=loader)


def test_nan_gradients_are_an_error_that_names_the_calibration_set(inputs, monkeypatch):
    module, data = small_module(inputs), small_data(inputs.base)
    step = module.sequence_nll

    def broken(batch):
        nll, tokens = step(batch)
        return nll * float("nan"), tokens

    monkeypatch.setattr(module, "sequence_nll", broken)
    with pytest.raises(FisherError, match="Fisher of 'utility'"):
        quiet_trainer(callbacks=[FisherCollector()]).validate(module, datamodule=data)


# In fit.


def fit(base, collect_fisher, **options):
    pl.seed_everything(3, verbose=False)
    module = SupervisedLoRA(base, dtype="float32", r=2, lora_alpha=4, learning_rate=1e-2)
    data = Alpaca(base, max_samples=10, calibration_samples=5, batch_size=2, max_length=LENGTH)
    gradients = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    collector = FisherCollector({"calibration": "training"}, during_fit=True, **options)
    trainer = quiet_trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        val_check_interval=1,
        callbacks=[Watch(), *([collector] if collect_fisher else [])],
    )
    trainer.fit(module, datamodule=data)
    weights = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    return module, data, collector, gradients, weights


@pytest.fixture(scope="module")
def trained(inputs):
    return fit(inputs.base, True)


def test_collection_in_fit_changes_no_gradient_and_no_weight(inputs, trained):
    """Validation runs after every batch, also between the two batches of an optimizer step."""
    _, _, _, gradients, weights = trained
    _, _, _, plain_gradients, plain_weights = fit(inputs.base, False)
    assert len(gradients) == len(plain_gradients) == 3
    for one, two in zip(gradients, plain_gradients, strict=True):
        assert len(one) == len(two) == 28
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))


def test_collection_in_fit_equals_autograd_at_the_last_weights(inputs, trained):
    """The last validation pass of the epoch ran at the final weights."""
    module, data, collector, _, _ = trained
    statistics = collector.statistics["calibration"]
    space = CoreSpace.from_adapters([module._live_adapter()])
    point = space.encode(module._live_adapter())
    model = load_backbone(inputs.base, "float32")
    cores = {key: core.float().requires_grad_() for key, core in point.items()}
    samples = []
    for row in data.rows["calibration"]:
        item = encode(row, data.tokenizer, LENGTH)
        weights = {
            f"{key}.weight": model.get_submodule(key).weight
            + space.bases[key].q_out @ cores[key] @ space.bases[key].q_in.T
            for key in cores
        }
        logits = torch.func.functional_call(
            model, weights, (torch.tensor([item.input_ids]),)
        ).logits
        labels = torch.tensor(item.labels)
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], reduction="sum")
        samples.append(torch.autograd.grad(nll, list(cores.values())))
    assert statistics.metadata.count == 5
    assert statistics.metadata.point == "training"
    assert statistics.metadata.data_fingerprint == data.fingerprint("calibration")
    for i, key in enumerate(cores):
        expected = second_moment([gradients[i] for gradients in samples])
        scale = float(expected.abs().max())
        actual = statistics.modules[key].dense()
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-4 * scale)


def test_fit_without_during_fit_collects_nothing(inputs):
    collector = FisherCollector({"calibration": "training"})
    module = SupervisedLoRA(inputs.base, dtype="float32", r=2)
    data = Alpaca(inputs.base, max_samples=4, calibration_samples=2, max_length=LENGTH)
    quiet_trainer(max_steps=1, callbacks=[collector]).fit(module, datamodule=data)
    assert collector.statistics == {}


def test_sanity_checking_collects_nothing(inputs, monkeypatch):
    counts = []
    monkeypatch.setattr(
        FisherCollector, "_receive", lambda self, *a: counts.append(self._current) or None
    )
    collector = FisherCollector({"calibration": "training"}, during_fit=True)
    module = SupervisedLoRA(inputs.base, dtype="float32", r=2)
    data = Alpaca(inputs.base, max_samples=4, calibration_samples=2, max_length=LENGTH)
    quiet_trainer(
        max_steps=1, num_sanity_val_steps=2, limit_val_batches=0, callbacks=[collector]
    ).fit(module, datamodule=data)
    assert counts == []
