"""The examples in docstrings are correct."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import rednet

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    ".".join(("rednet", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for folder in ("model", "service")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
EXPORTED = [name for name in rednet.__all__ if name not in ("model", "service") and not name.endswith("Error")]


@pytest.mark.parametrize("name", ["rednet", *MODULES])
def test_examples_in_docstrings_print_what_they_show(name: str) -> None:
    """All examples of a module, unchanged."""
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_names_have_an_example(name: str) -> None:
    """Every function and class of `rednet` except exceptions."""
    assert "Example:\n" in getattr(rednet, name).__doc__
