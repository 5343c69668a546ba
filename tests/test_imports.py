"""Imports point one way: shared modules know no family, and no family knows another."""

import ast
import importlib.util
from pathlib import Path

import pytest

import wm

PACKAGE = Path(wm.__file__).parent
FAMILIES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def families_of(module: Path) -> set[str]:
    """The families that a module imports, wherever in it."""
    names, package = [], ".".join(module.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE.parent / module).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{source}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("wm.")} & FAMILIES


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_module_imports_a_family_but_its_own(module):
    own = set(module.parts[1:-1])
    if module.name != "__main__.py":
        assert families_of(module) <= own


def test_the_command_line_is_seen_to_import_a_family():
    assert families_of(Path("wm/__main__.py")) == {"worldmodels"}  # the check above can fail
