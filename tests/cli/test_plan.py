"""``sst-merge plan``: stages guessed from the YAML, tables, JSON, and bad input."""

import json

import pytest

from sst_lightning.planner.base import CUDA_CONTEXT
from tests.adapters import random_adapter
from tests.cli.commands import run
from tests.nano import nano_model, save_nano

GIB = 1 << 30


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """Folder of the nano model."""
    return save_nano(tmp_path_factory.mktemp("plan") / "nano")


def records(capfd, *arguments):
    outcome = run(capfd, "plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_every_stage_is_recognised_and_planned(nano, capfd):
    configs = ["a6_alpaca", "fisher_a6_a7", "merge_a6_a7", "test", "eval/minimal"]
    paths = [f"configs/{name}.yaml" for name in configs]
    found = records(capfd, "--model", nano, "--tokens=24", "--config", *paths)
    assert [r["stage"] for r in found] == ["fit", "validate", "merge", "test", "test"]
    for record in found:
        assert record["memory"] == max(phase["memory"] for phase in record["phases"])
        assert record["disk"] == sum(term["size"] for term in record["disk_terms"]) > 0
        assert record["job"]["attention"] == "sdpa"
    # As many Fishers as the YAML asks for, in files of this size.
    fit, validate, merge, *_ = found
    assert dict(validate["job"]["samples"]) == {"utility": 96, "harmless": 96, "safety": 96}
    assert dict(merge["job"]["at_merge"]) == {"utility": 96, "harmless": 96}
    names = {term["name"] for term in validate["disk_terms"]}
    assert {"Fisher file utility", "Fisher file harmless", "Fisher file safety"} <= names
    assert fit["job"]["checkpoints"] == 2
    assert [a["name"] for a in validate["job"]["adapters"]] == [
        "runs/a6_alpaca/adapter (assumed)",
        "runs/a7_security/adapter (assumed)",
    ]


def test_changes_and_assumptions_take_the_place_of_the_file(nano, capfd):
    (record,) = records(
        capfd,
        *("--model", nano, "--config", "configs/a6_alpaca.yaml", "--accelerator", "cpu"),
        *("--labelled", "9", "--set", "data.batch_size=2", "model.r=5", "data.max_length=40"),
    )
    job = record["job"]
    assert (job["batch_size"], job["tokens"], job["labelled"]) == (2, 40, 9)
    assert job["adapters"][0]["rank"] == 5
    assert (job["accelerator"], job["attention"]) == ("cpu", "eager")


def test_adapters_that_are_there_are_read(nano, tmp_path, capfd):
    model = nano_model()
    for name, rank in (("utility", 3), ("safety", 6)):
        random_adapter(model, rank=rank, names=["q_proj"]).save(tmp_path / name)
    (record,) = records(
        capfd,
        *("--model", nano, "--config", "configs/merge_a6_a7.yaml", "--tokens=24", "--set"),
        *(f"model.utility=[{tmp_path}/utility]", f"model.safety={tmp_path}/safety"),
    )
    adapters = record["job"]["adapters"]
    assert [a["rank"] for a in adapters] == [3, 6]
    assert all(len(a["modules"]) == 2 for a in adapters)
    merged = next(t for t in record["disk_terms"] if t["name"].startswith("merged"))
    # Rank 9 of both layers' q projection, 32 x 32, in fp32.
    assert merged["size"] == 4 * 9 * 2 * (32 + 32)


def test_memory_says_whether_it_fits_and_what_to_change(nano, capfd):
    config = ("--model", nano, "--config", "configs/a6_alpaca.yaml", "--tokens=64")
    enough = run(capfd, "plan", *config, "--memory", "1")
    assert "memory: fits into 1 GiB" in enough.out
    assert "largest term: CUDA context (assumed)" in enough.out
    limit = (CUDA_CONTEXT + (1 << 20)) / GIB
    short = run(capfd, "plan", *config, "--memory", limit)
    assert f"does NOT fit into {limit:g} GiB" in short.out
    assert "gradient checkpointing (model.gradient_checkpointing: true)" in short.out
    (record,) = records(capfd, *config, "--memory", limit)
    verdict = record["memory_limit"]
    assert not verdict["fits"]
    for item in verdict["suggestions"]:
        assert item["memory"] == record["memory"] - item["saving"] < record["memory"]
    totals = [item["memory"] for item in verdict["together"]]
    assert totals == sorted(totals, reverse=True)
    hopeless = run(capfd, "plan", *config, "--memory", "0.1")
    assert "still does not fit" in hopeless.out


def test_eight_billion_parameters_offline(capfd):
    (record,) = records(
        capfd,
        *("--model", "llama-3.1-8b", "--config", "configs/a6_alpaca.yaml"),
        *("--set", "model.quantization=nf4", "model.gradient_checkpointing=true"),
    )
    terms = {
        term["name"]: term["size"]
        for phase in record["phases"]
        if phase["name"] == "training step"
        for term in phase["terms"]
    }
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    others = 2 * (2 * 128256 * 4096 + 65 * 4096)
    # 4.127 bits a weight in the linear layers; embeddings, head and norms in bf16.
    assert terms["base weights"] == pytest.approx(linears * 4.127 / 8 + others, rel=2e-4)
    assert terms["adapter"] == 4 * 83_886_080
    assert record["memory"] < 24 * GIB


def test_a_merge_that_is_measured_on_another_storage(capfd):
    """Of 8B: the evaluation on bf16 weights is the peak of a merge on 4 bits."""
    config = ["--model", "llama-3.1-8b", "--config"]
    (record,) = records(capfd, *config, "configs/merge_a6_a7_qlora.yaml")
    assert record["job"]["served_on"] == [["bfloat16", None], ["bfloat16", "nf4"]]
    assert record["peak_phase"].endswith(", in bfloat16")
    assert record["memory"] > 2 * 8_030_000_000
    (own,) = records(
        capfd, *config, "configs/merge_a6_a7_qlora.yaml", "--set", "model.served_on=[nf4]"
    )
    assert own["job"]["served_on"] == [["bfloat16", "nf4"]]
    assert own["memory"] < record["memory"]


def test_a_model_that_is_divided_among_the_processes_of_all_nodes(nano, capfd):
    def memory(strategy, devices, nodes=1):
        (record,) = records(
            capfd,
            *("--model", str(nano), "--config", "configs/a6_alpaca.yaml", "--set"),
            *(f"trainer.strategy={strategy}", f"trainer.devices={devices}"),
            f"trainer.num_nodes={nodes}",
        )
        return record["memory"]

    whole, divided = memory("ddp", 4), memory("fsdp", 4)
    assert divided < memory("fsdp", 2) < whole
    assert memory("sst_lightning.modules.strategies.FullyShardedStrategy", 2, nodes=2) == divided
    assert memory("lightning.pytorch.strategies.DDPStrategy", 2, nodes=2) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--config", "configs/demo/ci.yaml"], "demo/ci.yaml"),
        (["--config", "configs/a6_alpaca.yaml", "--model", "no-such-model"], "no such folder"),
        (["--config", "configs/a6_alpaca.yaml", "--memory", "0"], "--memory must be above 0"),
        (["--config", "configs/a6_alpaca.yaml", "--tokens", "0"], "--tokens must be at least 1"),
        (["--config", "configs/a6_alpaca.yaml", "--stage", "merge"], "merge"),
        (
            ["--config", "configs/a6_alpaca.yaml", "--set", "trainer.precision=bf16-mixed"],
            "trainer.precision bf16-mixed is not planned",
        ),
        (
            ["--config", "configs/a6_alpaca.yaml", "--set", "trainer.strategy=deepspeed"],
            "trainer.strategy deepspeed is not planned: only ddp and fsdp",
        ),
        (
            ["--config", "configs/a6_alpaca.yaml", "--set", "trainer.strategy=fsdp"],
            "say how many with trainer.devices",
        ),
        (
            [
                "--config",
                "configs/test.yaml",
                "--set",
                "trainer.strategy=fsdp",
                "trainer.devices=2",
            ],
            "trainer.strategy fsdp is for fit and validate alone",
        ),
        (
            [
                *("--config", "configs/a6_alpaca_qlora.yaml"),
                *("--set", "trainer.strategy=fsdp", "trainer.devices=2"),
            ],
            "fsdp cannot shard a base in 4 bits",
        ),
        (
            [
                *("--config", "configs/a6_alpaca.yaml", "--set", "trainer.strategy=fsdp"),
                *("trainer.devices=2", "model.optimizer=adamw_8bit"),
            ],
            "trainer.strategy fsdp is for model.optimizer: adamw alone",
        ),
        (
            [
                *("--config", "configs/a6_alpaca.yaml", "--set"),
                "trainer.strategy=lightning.pytorch.strategies.FSDPStrategy",
            ],
            "strategies.FSDPStrategy is not planned: only ddp and fsdp",
        ),
        (
            ["--config", "configs/a6_alpaca.yaml", "--set", "model.target_modules=[nothing]"],
            "the base has no module called nothing",
        ),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capfd):
    outcome = run(capfd, "plan", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_file_that_is_no_yaml(tmp_path, capfd):
    (tmp_path / "bad.yaml").write_text("model: [")
    outcome = run(capfd, "plan", "--config", tmp_path / "bad.yaml")
    assert outcome.code == 2
    assert "cannot be read as YAML" in outcome.err
