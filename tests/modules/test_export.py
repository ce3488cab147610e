"""Exported weights against PEFT's own merge, transformers' loading, and norms written out."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, GemmaForCausalLM

from sst_lightning.algebra.errors import BackboneError, OutputExistsError, SSTMergeError
from sst_lightning.modules.backbone import load_backbone
from sst_lightning.modules.export import export_weights
from sst_lightning.report.export_summary import export_summary
from tests.cli.commands import files, run
from tests.nano import VOCABULARY, nano_model, nano_tokenizer, random_batch, save_nano

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = random_batch([(6, 5), (3, 9)])


def save_adapter(base, folder, targets=PROJECTIONS, **options):
    """A PEFT adapter with random factors, whose scaling differs between modules."""
    defaults = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    config = LoraConfig(target_modules=targets, **{**defaults, **options})
    model = get_peft_model(load_backbone(base, "float32"), config)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    # Of an adapted output layer PEFT would save the base's weight too.
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


@pytest.fixture(scope="module")
def adapter(nano, tmp_path_factory):
    return save_adapter(nano, tmp_path_factory.mktemp("adapters") / "adapter")


def logits(model):
    with torch.no_grad():
        return model(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits.float()


def plain(folder, dtype=torch.float32):
    """The model as anyone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def with_peft(base, adapter, **options):
    return PeftModel.from_pretrained(load_backbone(base, "float32", **options), adapter)


def sharded(nano, folder):
    """The same model in two files with an index."""
    shutil.copytree(nano, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_fp32_export_is_pefts_merge(nano, adapter, tmp_path, shards):
    base = nano if shards == 1 else sharded(nano, tmp_path / "sharded")
    record = export_weights(base, adapter, tmp_path / "full", "float32")
    expected = with_peft(nano, adapter)
    torch.testing.assert_close(
        logits(plain(tmp_path / "full")), logits(expected), atol=1e-4, rtol=0
    )
    merged = expected.merge_and_unload().state_dict()
    written = {}
    for path in (tmp_path / "full").glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == load_file(Path(nano) / "model.safetensors").keys()
    for key, value in written.items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-6)
    assert record["model"]["rounding_of_delta"] == 0
    assert len(list((tmp_path / "full").glob("*.safetensors"))) == shards
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full", local_files_only=True)
    assert tokenizer.chat_template == nano_tokenizer().chat_template
    assert {p.name for p in Path(nano).iterdir()} <= {
        *(p.name for p in (tmp_path / "full").iterdir()), "model.safetensors",
    }  # fmt: skip


def test_bf16_export_is_rounded_once_and_says_how_much_of_delta_that_took(nano, adapter, tmp_path):
    record = export_weights(nano, adapter, tmp_path / "full")
    written = load_file(tmp_path / "full" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    before = nano_model().state_dict()
    after = with_peft(nano, adapter).merge_and_unload().state_dict()
    lost = delta = weight = 0.0
    shares = {}
    for name in record["modules"]:
        key = f"{name}.weight"
        update = (after[key].double() - before[key].double()).square().sum()
        rounding = (written[key].double() - after[key].double()).square().sum()
        lost, delta = lost + rounding, delta + update
        weight += before[key].double().square().sum()
        shares[name] = math.sqrt(rounding / update)
        assert record["modules"][name]["rounding_of_delta"] == pytest.approx(shares[name], rel=1e-3)
        torch.testing.assert_close(written[key], after[key].bfloat16(), rtol=0.01, atol=1e-6)
    assert len(shares) == 14
    assert record["model"]["rounding_of_delta"] == pytest.approx(math.sqrt(lost / delta), rel=1e-3)
    assert record["model"]["delta_of_weight"] == pytest.approx(math.sqrt(delta / weight), rel=1e-3)
    assert record["worst_module"]["name"] == max(shares, key=shares.get)
    assert record["model"]["quantization_of_weight"] is None
    assert 0 < record["other_weights"]["rounding_of_weight"] < 0.01
    assert json.loads((tmp_path / "full" / "export.json").read_text()) == record
    (first, *_) = export_summary(record)
    assert f"{100 * math.sqrt(lost / delta):.2g} % of ‖ΔW‖" in first
    assert record["worst_module"]["name"] in first


def packed(nano):
    """Dequantised weights by module, from transformers' own loading."""
    model = load_backbone(nano, "float32", quantization="nf4")
    return {
        name: dequantize_4bit(module.weight, module.weight.quant_state)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    }


def test_nf4_export_is_the_adapter_on_the_base_it_was_trained_on(nano, adapter, tmp_path):
    record = export_weights(nano, adapter, tmp_path / "full", "float32", "nf4")
    exported = plain(tmp_path / "full")
    expected = logits(with_peft(nano, adapter, quantization="nf4"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-3, rtol=0)
    # And not that of the base in full precision.
    assert (expected - logits(with_peft(nano, adapter))).abs().max() > 1e-2
    dequantised, original = packed(nano), nano_model()
    lost = sum(
        (weight - original.get_submodule(name).weight).double().square().sum()
        for name, weight in dequantised.items()
    )
    total = sum(weight.double().square().sum() for weight in dequantised.values())
    share = record["model"]["quantization_of_weight"]
    assert share == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert any("through 4 bits" in line for line in export_summary(record))


def test_modules_without_an_adapter_go_through_4_bits_too(nano, tmp_path):
    adapter = save_adapter(nano, tmp_path / "adapter", ["q_proj"], rank_pattern={})
    record = export_weights(nano, adapter, tmp_path / "full", "float32", "nf4")
    written = load_file(tmp_path / "full" / "model.safetensors")
    original, moved, total = nano_model(), 0.0, 0.0
    for name, weight in packed(nano).items():
        if not name.endswith("q_proj"):
            assert torch.equal(written[f"{name}.weight"], weight)
            before = original.get_submodule(name).weight
            moved += (weight - before).double().square().sum().item()
            total += weight.double().square().sum().item()
    share = record["other_weights"]["quantization_of_weight"]
    assert share == pytest.approx(math.sqrt(moved / total), rel=1e-3)
    assert "through 4 bits they moved by" in list(export_summary(record))[-1]
    embeddings = nano_model().model.embed_tokens.weight
    assert torch.equal(written["model.embed_tokens.weight"], embeddings)


def save_in_4_bits(nano, folder):
    load_backbone(nano, "float32", quantization="nf4").save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_stored_in_4_bits_is_dequantised(nano, adapter, tmp_path, monkeypatch):
    save_in_4_bits(nano, tmp_path / "stored")
    calls = []

    def counted(*arguments):
        calls.append(1)
        return dequantize_4bit(*arguments)

    with monkeypatch.context() as context:
        context.setattr("bitsandbytes.functional.dequantize_4bit", counted)
        record = export_weights(str(tmp_path / "stored"), adapter, tmp_path / "full", "float32")
    # Shapes are read, each weight is dequantised once.
    assert len(calls) == 2 * len(PROJECTIONS)
    assert record["quantization"] == "stored"
    exported = plain(tmp_path / "full")
    assert not getattr(exported, "is_quantized", False)
    assert {value.dtype for value in exported.state_dict().values()} == {torch.float32}
    expected = logits(with_peft(nano, adapter, quantization="nf4"))
    torch.testing.assert_close(logits(exported), expected, atol=1e-3, rtol=0)
    with pytest.raises(BackboneError, match="4 bits already"):
        export_weights(str(tmp_path / "stored"), adapter, tmp_path / "twice", quantization="nf4")


def test_a_damaged_description_of_a_4_bit_weight_is_named(nano, adapter, tmp_path):
    path = save_in_4_bits(nano, tmp_path / "stored") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    tensors[state] = tensors[state][:9]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        BackboneError, match=rf"4-bit weight '{name}' cannot be read .*copy the model"
    ):
        export_weights(str(tmp_path / "stored"), adapter, tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_layer_unties_it(tmp_path, tied):
    base = str(save_nano(tmp_path / "nano", tie_word_embeddings=tied))
    adapter = save_adapter(base, tmp_path / "adapter", ["q_proj", "lm_head"], rank_pattern={})
    record = export_weights(base, adapter, tmp_path / "full", "float32")
    assert record["untied_output_layer"] is tied
    exported = plain(tmp_path / "full")
    torch.testing.assert_close(
        logits(exported), logits(with_peft(base, adapter)), atol=1e-4, rtol=0
    )
    before = nano_model(tie_word_embeddings=tied).model.embed_tokens.weight
    assert torch.equal(exported.model.embed_tokens.weight, before)
    assert any("no longer tied" in line for line in export_summary(record)) is tied


def test_an_architecture_that_ties_by_default_is_untied_too(tmp_path):
    """Its config.json need not say that it ties."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path / "gemma"
    GemmaForCausalLM(GemmaConfig(vocab_size=len(VOCABULARY), **size, **heads)).save_pretrained(
        folder
    )
    nano_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(str(folder), tmp_path / "adapter", ["lm_head"], rank_pattern={})
    record = export_weights(str(folder), adapter, tmp_path / "full", "float32")
    assert record["untied_output_layer"]
    expected = logits(with_peft(str(folder), adapter))
    torch.testing.assert_close(logits(plain(tmp_path / "full")), expected, atol=1e-4, rtol=0)


def test_nothing_but_an_export_is_replaced(nano, adapter, tmp_path):
    output = tmp_path / "full"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            export_weights(nano, adapter, output, overwrite=overwrite)
    assert (output / "precious.txt").read_text() == "mine"
    (output / "precious.txt").unlink()
    export_weights(nano, adapter, output)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export_weights(nano, adapter, output)
    export_weights(nano, adapter, output, "float16", overwrite=True)
    assert json.loads((output / "export.json").read_text())["dtype"] == "float16"


def test_what_cannot_be_exported_leaves_nothing_behind(nano, adapter, tmp_path):
    other = str(save_nano(tmp_path / "wide", intermediate_size=64))
    with pytest.raises(SSTMergeError, match="trained on another model"):
        export_weights(other, adapter, tmp_path / "full")
    config = json.loads((Path(nano) / "config.json").read_text())
    shutil.copytree(nano, tmp_path / "gptq")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"'gptq' cannot be exported.*not quantised"):
        export_weights(str(tmp_path / "gptq"), adapter, tmp_path / "full")
    huge = nano_model()
    huge.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    huge.save_pretrained(tmp_path / "huge")
    with pytest.raises(BackboneError, match=r"up_proj.*not finite in float16; use"):
        export_weights(str(tmp_path / "huge"), adapter, tmp_path / "full", "float16")
    assert not [path for path in tmp_path.iterdir() if "full" in path.name]


def test_from_the_command_line(nano, adapter, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["export", "--base", nano, "--adapter", adapter, "--output", "full"]
    outcome = run(capfd, *words)
    assert outcome.code == 0, outcome.err
    assert "of ‖ΔW‖ (most: " in outcome.out
    before = files(tmp_path)
    again = run(capfd, *words)
    assert again.code == 2
    assert "full already exists" in again.err
    assert files(tmp_path) == before
