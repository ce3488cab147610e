"""Fit, Fisher, merge and test on 4-bit weights, against the dequantised model in fp32."""

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from lightning.pytorch import seed_everything
from transformers.models.llama.modeling_llama import LlamaMLP

from callbacks import AdapterExport, FisherCollector
from sst_lightning import SST, SupervisedLoRA, TaskArithmetic
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.data import Alpaca
from sst_lightning.modules import causal_lm
from sst_lightning.modules.adapter_evaluation import AdapterEvaluation
from sst_lightning.modules.backbone import load_backbone
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.report.records import read_records
from tests.callbacks.test_fisher import autograd_samples, second_moment
from tests.nano import nano_tokenizer
from tests.small_merge import LENGTH, quiet_trainer, save_inputs, small_data, small_module

RATES = ("attack_refusal_rate", "over_refusal_rate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def dequantised(inputs, tmp_path_factory):
    """Folder of the base whose linear layers are the 4-bit ones', in fp32."""
    model = load_backbone(inputs.base, "float32")
    packed = load_backbone(inputs.base, "float32", quantization="nf4")
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = packed.model.layers.get_submodule(name).weight
            module.weight.data = dequantize_4bit(weight, weight.quant_state)
    folder = tmp_path_factory.mktemp("dequantised") / "nano"
    model.save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    return str(folder)


def test_fishers_are_those_of_the_dequantised_model(inputs, dequantised):
    module, data = small_module(inputs, quantization="nf4"), small_data(inputs.base)
    collector = FisherCollector()
    quiet_trainer(callbacks=[collector]).validate(module, datamodule=data, verbose=False)
    reference = SimpleNamespace(base=dequantised, space=module.space)
    for name, point in collector.points.items():
        samples = autograd_samples(reference, data, name, module.cores_at(point))
        for key, fisher in collector.statistics[name].modules.items():
            expected = second_moment(samples[key])
            scale = float(expected.abs().max())
            torch.testing.assert_close(fisher.dense(), expected, rtol=2e-3, atol=1e-4 * scale)


def fit(base, checkpointing, monkeypatch, folder=None):
    """Two steps on 4-bit weights and a validation pass with Fishers; counts layers that ran."""
    calls = {"train": 0, "eval": 0}
    forward = LlamaMLP.forward

    def counted(layer, hidden):
        if len(hidden) == 2:  # not the single sequence that is tried after loading
            calls["train" if layer.training else "eval"] += 1
        return forward(layer, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    seed_everything(0, verbose=False)
    module = SupervisedLoRA(
        base, "float32", quantization="nf4", r=4, gradient_checkpointing=checkpointing
    )
    collector = FisherCollector(points={"calibration": "training"}, during_fit=True)
    data = Alpaca(
        tokenizer=base, max_length=LENGTH, max_samples=12, batch_size=2, calibration_samples=4
    )
    callbacks = [collector] + ([AdapterExport(str(folder))] if folder else [])
    options = {"max_steps": 2, "num_sanity_val_steps": 0, "val_check_interval": 2}
    quiet_trainer(callbacks=callbacks, **options).fit(module, datamodule=data)
    return calls, collector.statistics["calibration"], module


def test_checkpointing_recomputes_in_training_and_changes_no_result(inputs, monkeypatch):
    plain, expected, module = fit(inputs.base, False, monkeypatch)
    monkeypatch.undo()
    recomputed, fisher, other = fit(inputs.base, True, monkeypatch)
    # Two layers, two steps: the backward passes run each layer once more.
    assert plain["train"] == 2 * 2
    assert recomputed["train"] == 2 * plain["train"]
    # In eval mode transformers recomputes nothing, and hooks see every layer once.
    assert recomputed["eval"] == plain["eval"] > 0
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for key, value in fisher.modules.items():
        torch.testing.assert_close(value.samples, expected.modules[key].samples)


def measured(inputs, adapter, output, **options):
    """Figures of ``sst-merge test``, which loads adapter and base through PEFT."""
    module = AdapterEvaluation(
        inputs.base, str(adapter), str(output), dtype="float32", max_new_tokens=4, **options
    )
    quiet_trainer().test(module, datamodule=small_data(inputs.base), verbose=False)
    metrics = read_records(Path(output) / "results.json")[0]["metrics"]
    return {name: entry["value"] for name, entry in metrics.items()}


def merge_on_nf4(inputs, output, method=None, **options):
    module = small_module(inputs, quantization="nf4", **options)
    records = quiet_trainer().merge(
        module, small_data(inputs.base), method or SST(iterations=0), output=str(output)
    )
    return records, module


def test_a_merge_on_nf4_is_measured_on_the_base_it_is_served_on(inputs, tmp_path):
    """Both bases against ``sst-merge test``; the difference is that of the two figures."""
    records, _ = merge_on_nf4(inputs, tmp_path / "out", served_on=["float32", "nf4"])
    adapter = tmp_path / "out" / "adapter"
    served = measured(inputs, adapter, tmp_path / "served")
    other = measured(inputs, adapter, tmp_path / "other", quantization="nf4")
    metrics = records[-1]["metrics"]
    for name in ("utility_nll", "attack_refusal_nll", *RATES):
        assert metrics[name]["value"] == pytest.approx(served[name], rel=1e-4)
        difference = metrics[f"{name}_difference/nf4"]
        assert difference["value"] == pytest.approx(other[name] - served[name], abs=2e-5)
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert abs(metrics["utility_nll_difference/nf4"]["value"]) > 1e-4
    provenance = records[-1]["provenance"]
    assert provenance["evaluation"]["quantization"] is None
    assert provenance["merged_on"]["storage"] == "nf4"
    assert provenance["merged_on"]["base_sha256"] != provenance["base_sha256"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "Measured on the base in float32; merged, with its Fishers, on the base in 4 bits" in text
    )
    assert "base in 4 bits (NF4, double quantisation): difference" in text
    assert "4 bits (NF4" in (tmp_path / "out" / "report.html").read_text()


def test_without_a_served_base_the_own_one_is_measured(inputs, tmp_path):
    records, _ = merge_on_nf4(inputs, tmp_path / "out", TaskArithmetic())
    assert not [name for name in records[-1]["metrics"] if "_difference/" in name]
    assert records[-1]["provenance"]["evaluation"]["quantization"] == "nf4"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Measured on the base in 4 bits (NF4, double quantisation).\n" in text


def test_one_base_is_in_memory_at_a_time_and_fishers_come_from_the_own_one(
    inputs, tmp_path, monkeypatch
):
    loaded, alive, trainers = [], [], []
    load, load_base = causal_lm.load_backbone, CausalLMModule.load_base

    def watched(*arguments, **options):
        gc.collect()
        alive.append([kind for kind, model in loaded if model() is not None])
        model = load(*arguments, **options)
        loaded.append((arguments[3] or arguments[1], weakref.ref(model)))
        return model

    def with_trainer(module):
        trainers.append(module._trainer)
        return load_base(module)

    monkeypatch.setattr(causal_lm, "load_backbone", watched)
    monkeypatch.setattr(CausalLMModule, "load_base", with_trainer)
    _, module = merge_on_nf4(inputs, tmp_path / "one", served_on=["float32", "nf4"])
    # Measured on nf4 first, which is there.
    assert [kind for kind, _ in loaded] == ["nf4", "float32"]
    trainer = quiet_trainer()
    trainer.merge(
        module, small_data(inputs.base), SST(iterations=0), output=str(tmp_path / "two"),
        evaluate=False,
    )  # fmt: skip
    assert [kind for kind, _ in loaded] == ["nf4", "float32", "nf4"]
    assert alive == [[]] * 3
    # Its strategy says on which device.
    assert trainers[-1] is trainer
    adapters = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("one", "two")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize("served_on", [[], ["nf4", "nf4"]])
def test_bad_served_on(inputs, served_on):
    with pytest.raises(SSTMergeError, match=r"served_on.*\[bfloat16, nf4\]"):
        small_module(inputs, served_on=served_on)


def test_fit_fisher_merge_and_test_on_nf4(inputs, tmp_path, monkeypatch):
    """What was trained on 4 bits is merged with Fishers of 4 bits."""
    base = inputs.base
    for name in ("utility", "safety"):
        fit(base, True, monkeypatch, tmp_path / name)
        monkeypatch.undo()
    trained = SimpleNamespace(
        base=base, utility=str(tmp_path / "utility"), safety=str(tmp_path / "safety")
    )
    output = tmp_path / "out"
    records, _ = merge_on_nf4(trained, output, served_on=["nf4", "bfloat16"])
    recipe = json.loads((output / "adapter" / "merge.json").read_text())
    assert recipe["verification"]["logits_rms_difference"] < 1e-4
    assert "utility_nll_difference/bfloat16" in records[-1]["metrics"]
