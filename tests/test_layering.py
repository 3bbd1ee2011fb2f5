"""Imports point down only, and modules stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gradwatch

PACKAGE = Path(__file__).parents[1] / "gradwatch"

LAYERS = [
    {"integrations"},
    {"api"},
    {"attach"},
    {"pipeline"},
    {"reacting", "run", "initialization", "agreement"},
    {"assembly", "judge", "lane", "state", "interventions"},
    {"measure", "probe", "episodes", "diagnosis", "sinks", "transforming", "reactions"},
    {"detectors", "transforms", "trouble"},
    {"table", "transfer", "targets"},
    {"depth", "cadence", "handover"},
    {"history", "opening", "readings", "records", "schema", "errors", "series"},
]
"""From the top; a module may import what lies in its own layer or below."""

WITHOUT_TORCH = [
    "records",
    "history",
    "errors",
    "schema",
    "detectors",
    "diagnosis",
    "episodes",
    "judge",
    "reactions",
    "trouble",
]


def layer(module: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gradwatch"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gradwatch.")}
    return found


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_its_own_layer_or_below(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    above = {module for module in imports(path) if layer(module) < layer(own)}

    assert above == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_records_and_the_judging_side_never_load_torch():
    loads = "; ".join(f"import gradwatch.{name}" for name in WITHOUT_TORCH)
    code = f"import sys; {loads}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_has_the_name_of_a_public_function():
    assert {path.stem for path in MODULES} & set(gradwatch.__all__) == set()
