"""config.yaml of a run: the old one or the new one, whatever happens while it is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sst_lightning.cli.config_record import ConfigRecord


def test_config_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    written = []

    def dump(config, skip_none):
        written.append((config, skip_none))
        return "new"

    record = ConfigRecord(SimpleNamespace(dump=dump), "the configuration")
    trainer = SimpleNamespace(loggers=["one"], log_dir=str(tmp_path), is_global_zero=True)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            record.on_validation_start(trainer, None)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["config.yaml"]
    record.on_validation_start(trainer, None)
    assert path.read_text() == "new"
    # Once a run: a merge validates and tests many times.
    record.on_test_start(trainer, None)
    assert written == [("the configuration", False)] * 2
