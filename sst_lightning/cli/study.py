"""Studies: a YAML recipe of fit and compare stages, run one after the other into one report."""

import gc
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

import sst_lightning
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import write_text
from sst_lightning.cli.lightning_cli import run_lightning
from sst_lightning.cli.shipped_configs import find_config, load_config
from sst_lightning.report.records import Record, read_records, write_records
from sst_lightning.report.report import log_figures, write_report

MARKER = "study.json"
RESERVED = ("figures", "tensorboard", "evaluations", "report")
COMMANDS = ("fit", "validate", "merge", "test", "compare")


@dataclass(frozen=True)
class Stage:
    """One command of a study.

    Attributes:
        name: key in the recipe; the stage writes to ``<output>/<name>``.
        command: subcommand of ``sst-merge``.
        config: YAML file of the command, shipped or a path.
        arguments: dotted keys and values that override the YAML.
    """

    name: str
    command: str
    config: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def command_line(self) -> list[str]:
        """Return the arguments ``sst-merge`` would get on a shell."""
        values = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.arguments.items()
        ]
        return [self.command, "--config", self.config, *values]

    def fingerprint(self, earlier: str) -> str:
        """Hash of what the stage would do; ``earlier`` is the hash of the stages before it.

        The program's version and the content of files that an argument names are part of it.
        """
        content = Path(find_config(self.config)).read_text(encoding="utf-8")
        # Other rows in the same file are another stage, wherever a file is named.
        texts = _texts([self.arguments, yaml.safe_load(content)])
        files = [sha256(Path(text).read_bytes()).hexdigest() for text in texts if _is_file(text)]
        return sha256(
            json.dumps(
                [sst_lightning.__version__, self.command_line(), content, files, earlier]
            ).encode()
        ).hexdigest()


def load_study(config: str, output: str | None, seed: int | None) -> tuple[Path, str, list[Stage]]:
    """Read a recipe.

    ``{output}``, ``{seed}`` and ``{stage}`` in its values are replaced.

    Args:
        config: YAML file with ``title``, ``output``, ``seed``, ``stages`` and, optionally,
            ``defaults`` (arguments for every stage of a command).
        output: folder that takes the place of the recipe's.
        seed: seed that takes the place of the recipe's.

    Returns:
        Output folder, title and stages.

    Raises:
        SSTMergeError: names the file and the key that is missing or unknown.
    """
    path = find_config(config)
    recipe = load_config(config, "a study; it needs the keys title, output, seed and stages")
    for key in ("title", "output", "seed", "stages"):
        if key not in recipe:
            raise SSTMergeError(f"{path}: key '{key}' is missing")
    unknown = set(recipe) - {"title", "output", "seed", "stages", "defaults"}
    if unknown:
        raise SSTMergeError(f"{path}: unknown key '{sorted(unknown)[0]}'")
    folder = Path(output or recipe["output"])
    seed = recipe["seed"] if seed is None else seed
    defaults = recipe.get("defaults") or {}
    stages = []
    if not isinstance(recipe["stages"], dict) or not recipe["stages"]:
        raise SSTMergeError(f"{path}: 'stages' is not a mapping of names to stages")
    for name, entry in recipe["stages"].items():
        _check_stage(path, str(name), entry)
        arguments = {**defaults.get(entry["command"], {}), **(entry.get("arguments") or {})}
        arguments.setdefault("seed_everything", seed)
        values = {"{output}": str(folder), "{seed}": str(seed), "{stage}": name}
        stages.append(Stage(name, entry["command"], entry["config"], _fill(arguments, values)))
    return folder, recipe["title"], stages


def run_study(folder: Path, title: str, stages: list[Stage], fresh: bool = False) -> Path:
    """Run the stages that are not finished yet, then write one report of all comparisons.

    A stage counts as finished when its mark holds the hash of what it would do now. An unfinished
    ``fit`` goes on from its last checkpoint; another unfinished or outdated stage starts over
    (evaluations of identical weights come from the cache).

    Returns:
        Path of ``report.md``.

    Raises:
        SSTMergeError: ``fresh`` on a folder that is not a study's.
    """
    console = Console()
    if folder.exists() and not folder.is_dir():
        raise SSTMergeError(f"{folder} is a file: choose another --output")
    if fresh and folder.exists():
        if not (folder / MARKER).exists():
            raise SSTMergeError(
                f"{folder} is not the folder of a study: --fresh will not delete it"
            )
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise SSTMergeError(f"{folder} holds other files: choose another --output")
    marks = _read_marks(folder)
    started = time.monotonic()
    fingerprint = ""
    for number, stage in enumerate(stages, 1):
        fingerprint = stage.fingerprint(fingerprint)
        head = f"[{number}/{len(stages)}] {stage.command} {stage.name}"
        mark = marks.get(stage.name, {})
        if mark.get("fingerprint") == fingerprint and (folder / stage.name).is_dir():
            console.print(f"[bold]{head}[/bold]: finished earlier")
            continue
        console.rule(f"[bold]{head}", align="left")
        goes_on = mark.get("started") == fingerprint and stage.command == "fit"
        if not goes_on:
            shutil.rmtree(folder / stage.name, ignore_errors=True)
        marks[stage.name] = {"started": fingerprint}
        _write_marks(folder, marks)
        begin = time.monotonic()
        run_lightning([*stage.command_line(), *(["--ckpt_path=last"] if goes_on else [])])
        gc.collect()
        marks[stage.name] = {
            "fingerprint": fingerprint,
            "seconds": round(time.monotonic() - begin, 1),
            "command": stage.command_line(),
        }
        _write_marks(folder, marks)
    records = _all_records(folder, stages)
    write_records(records, folder / "results.json")
    report = write_report(records, folder, title)
    log_figures(records, folder / "tensorboard" / "report")
    console.print(f"{time.monotonic() - started:.0f} s. Report: {report}")
    return report


def _all_records(folder: Path, stages: list[Stage]) -> list[Record]:
    """Records of all comparisons; two stages of one setting are told apart by the stage's name."""
    records: list[Record] = []
    for stage in stages:
        if stage.command != "compare":
            continue
        taken = {record["setting"] for record in records}
        for record in read_records(folder / stage.name / "results.json"):
            if record["setting"] in taken:
                record["setting"] += f" ({stage.name})"
            records.append(record)
    return records


def _check_stage(path: str, name: str, entry: Any) -> None:
    # A stage that starts over deletes its folder: <output>/<name> must be that and nothing else.
    if not re.fullmatch(r"[\w+-][\w.+-]*", name) or name in RESERVED:
        raise SSTMergeError(
            f"{path}: stage name '{name}' is not usable as a folder name (letters, digits, + - _ .; "
            f"not {', '.join(RESERVED)})"
        )
    if not isinstance(entry, dict) or entry.get("command") not in COMMANDS or "config" not in entry:
        raise SSTMergeError(
            f"{path}: stage '{name}' needs 'config' and a 'command' out of {', '.join(COMMANDS)}"
        )
    unknown = set(entry) - {"command", "config", "arguments"}
    if unknown:
        raise SSTMergeError(f"{path}: stage '{name}' has an unknown key '{sorted(unknown)[0]}'")


def _texts(value: Any) -> list[str]:
    """All strings in nested lists and mappings."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a path
        return False


def _fill(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, str):
        for key, text in values.items():
            value = value.replace(key, text)
        return value
    if isinstance(value, list):
        return [_fill(item, values) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, values) for key, item in value.items()}
    return value


def _read_marks(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise SSTMergeError(f"{path}: not valid JSON; run again with --fresh") from error


def _write_marks(folder: Path, marks: dict[str, Any]) -> None:
    write_text(folder / MARKER, json.dumps(marks, indent=1) + "\n")
