"""Imports go one way, as docs/architecture.md says: also those inside functions."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHTNING = {"data", "metrics", "suites", "modules", "planner", "report", "callbacks"}
PACKAGES = {"algebra", "cli"} | LIGHTNING
ALLOWED = {
    "algebra": {"algebra"},
    "metrics": {"algebra", "data", "metrics"},
    **{package: {"algebra"} | LIGHTNING for package in LIGHTNING - {"metrics"}},
}


def imported_packages(path):
    """Which of the program's packages a file imports from, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.removeprefix("sst_lightning.").split(".")
            if parts[0] in PACKAGES and (
                name.startswith("sst_lightning.") or parts[0] == "callbacks"
            ):
                yield parts[0], node.lineno


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_one_way(package):
    folder = ROOT / package if package == "callbacks" else ROOT / "sst_lightning" / package
    files = sorted(folder.rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in files
        for other, line in imported_packages(path)
        if other not in ALLOWED[package]
    ]
    assert wrong == []


def test_all_packages_and_configurations_are_in_the_wheel():
    """pyproject.toml lists them by hand; one that is missing is missing only outside a checkout."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    for top in ("sst_lightning", "callbacks"):
        folders = {path.parent for path in (ROOT / top).rglob("*.py")}
        names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
        assert names <= set(setuptools["packages"])
    for file in (ROOT / "configs").rglob("*.yaml"):
        package = ".".join(["sst_lightning", *file.relative_to(ROOT).parent.parts])
        assert package in setuptools["packages"]
        assert package in setuptools["package-data"]
    for file in (ROOT / "sst_lightning").rglob("*.json"):
        package = ".".join(file.relative_to(ROOT).parent.parts)
        assert "*.json" in setuptools["package-data"][package]
