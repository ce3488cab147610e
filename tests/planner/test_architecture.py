"""Shapes of models without weights: against loaded models and published sizes."""

import json

import pytest
import torch

from sst_lightning.algebra.errors import BackboneError
from sst_lightning.modules.backbone import ALIASES, load_backbone
from sst_lightning.planner.architecture import PUBLISHED, find_architecture, parameter_bytes
from sst_lightning.planner.quantised import nf4_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameter_bytes_are_those_of_the_loaded_model(nano, architecture, dtype):
    loaded = load_backbone(str(nano), dtype)
    expected = sum(p.numel() * p.element_size() for p in loaded.parameters())
    built = architecture.build(dtype)
    assert sum(p.numel() * p.element_size() for p in built.parameters()) == expected
    buffers = sum(b.numel() * b.element_size() for b in loaded.buffers())
    assert parameter_bytes(built) == expected + buffers
    assert all(p.is_meta for p in built.parameters())


def test_nf4_bytes_are_those_of_bitsandbytes(nano, architecture):
    pytest.importorskip("bitsandbytes")
    loaded = load_backbone(str(nano), "float32", quantization="nf4")
    tensors = {}
    for parameter in loaded.parameters():
        tensors[parameter.data_ptr()] = parameter
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        nested = state.state2
        for part in (state.absmax, state.code, state.offset, nested.absmax, nested.code):
            tensors[part.data_ptr()] = part
    expected = sum(t.numel() * t.element_size() for t in tensors.values())
    expected += sum(b.numel() * b.element_size() for b in loaded.buffers())
    assert parameter_bytes(architecture.build("float32", quantization="nf4")) == expected


def test_nf4_takes_half_a_byte_and_an_eighth_of_a_bit_more():
    # 4096 x 14336: n/2 + n/64 + 4 n/(64*256) + tables.
    weights = 4096 * 14336
    assert nf4_bytes(weights) == 29360128 + 917504 + 14336 + 1092
    assert nf4_bytes(65) == 33 + 2 + 4 + 1092


@pytest.mark.parametrize(
    ("alias", "parameters"),
    [
        # As on the models' pages: 8.03 B, 7.24 B, 14.8 B, 135 M.
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b-v0.2", 7_241_732_096),
        ("qwen-2.5-14b", 14_770_033_664),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_published_models_have_their_published_size(alias, parameters, monkeypatch, tmp_path):
    monkeypatch.setenv("SST_MERGE_CACHE", str(tmp_path))
    architecture = find_architecture(alias)
    assert sum(p.numel() for p in architecture.build().parameters()) == parameters
    assert ALIASES[alias] in architecture.source
    assert architecture.stored == torch.bfloat16


def test_all_aliases_are_known_offline():
    assert set(ALIASES.values()) == set(PUBLISHED)


def test_config_file_alone_is_enough(nano, tmp_path):
    (tmp_path / "config.json").write_text((nano / "config.json").read_text())
    from_folder = find_architecture(str(tmp_path))
    from_file = find_architecture(str(tmp_path / "config.json"))
    assert parameter_bytes(from_folder.build()) == parameter_bytes(from_file.build())


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no config\.json of it in the hub's cache"):
        find_architecture("nobody/nothing-at-all")
    with pytest.raises(BackboneError, match=r"give a folder with config\.json"):
        find_architecture(str(tmp_path / "missing"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="cannot be read as JSON"):
        find_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(BackboneError, match="not a config that transformers reads"):
        find_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"r": 3}))
    with pytest.raises(BackboneError, match="no model_type"):
        find_architecture(str(tmp_path))


def test_a_model_keeps_its_attention_when_another_is_built(architecture):
    eager = architecture.build("float32", "eager")
    architecture.build("float32", "sdpa")
    assert eager.config._attn_implementation == "eager"
