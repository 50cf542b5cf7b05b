"""The examples in docstrings are run."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(
    ".".join(("rednet", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for folder in ("model", "service")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_print_what_they_show(name: str) -> None:
    """Every one of a module, as it stands."""
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
