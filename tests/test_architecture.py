"""Which package imports which: the structure that the code is held to. `python -m tests.architecture` prints it."""

import ast
import re
from pathlib import Path

import pytest

from tests.architecture import ROOT, arrows, picture

# From the bottom up: a package imports only packages above it in its table. An arrow that is not used is not allowed.
MODEL = {
    "native": "",
    "ops": "native",
    "nn": "ops",
    "images": "",
    "inference": "images native nn ops",
    "io": "images inference nn",
    "training": "images inference io nn",
}
SERVICE = {
    "api_keys": "",
    "autoscaling": "",
    "cost_table": "",
    "errors": "",
    "event_loop": "",
    "settings": "",
    "system": "",
    "statuses": "errors",
    "types": "cost_table errors",
    "model_description": "model",
    "scores": "model_description types",
    "decoding": "errors system types model.images",
    "engine": "cost_table errors types model.inference",
    "parsing": "errors types",
    "observability": "model_description model",
    "pipeline": "decoding errors event_loop model_description observability types model.inference",
    "reloading": "api_keys observability pipeline system types",
    "server_timing": "observability pipeline types",
    "open_inference": "errors event_loop model_description parsing pipeline scores types",
    "triton_extensions": "open_inference pipeline types",
    "network": "engine model_description settings system types model model.inference",
    "build": "decoding engine network observability pipeline settings system types",
    "memory_check": "decoding engine system model.io",
    "http": "api_keys errors event_loop model_description observability open_inference parsing pipeline reloading "
    "scores server_timing settings statuses system triton_extensions types",
    "grpc": "api_keys errors model_description observability open_inference parsing reloading server_timing settings "
    "statuses types",
    "main": "api_keys build decoding engine grpc http memory_check network observability pipeline reloading settings "
    "system types",
    "ray": "api_keys autoscaling engine main settings types",
    "processes": "api_keys build decoding engine grpc http model_description network observability pipeline reloading "
    "settings system types model.images model.inference",
    "cli": "api_keys build engine errors grpc main model_description network observability pipeline processes scores "
    "settings system types model model.inference model.io model.training",
}
TABLES = {"model": MODEL, "service": SERVICE}
PAGE = ROOT / "docs/explanation/architecture.md"


def allowed(folder: str, package: str) -> set[str]:
    """The packages that a package may import, by their full names."""
    words = TABLES[folder][package].split()
    return {word if word.split(".")[0] == "model" else f"{folder}.{word}" for word in words}


@pytest.mark.parametrize("folder", TABLES)
def test_packages_import_exactly_what_the_table_allows(folder: str) -> None:
    """No arrow is missing from the table, and none in it is unused."""
    assert arrows(folder) == {f"{folder}.{package}": allowed(folder, package) for package in TABLES[folder]}


@pytest.mark.parametrize("folder", TABLES)
def test_no_import_points_back_up(folder: str) -> None:
    """Packages depend on those above them in the table; `model` knows nothing of `service`."""
    above = {"model", *(f"model.{package}" for package in MODEL)} if folder == "service" else set()
    for package in TABLES[folder]:
        assert allowed(folder, package) <= above
        above.add(f"{folder}.{package}")


def test_the_picture_in_the_docs_shows_the_packages() -> None:
    """`python -m tests.architecture --picture` prints what to put there."""
    assert f"```mermaid\n{picture()}\n```" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_named_in_page_exist(page: Path) -> None:
    """Paths are below the repository's root, or below `service/`."""
    named = set(re.findall(r"`((?:\w+/)*[\w-]+\.(?:py|md)|(?:\w+/)+)`", page.read_text(encoding="utf-8")))
    assert len(named) > 15
    assert not [name for name in named if not any((ROOT / folder / name).exists() for folder in ("", "service"))]


@pytest.mark.parametrize("folder", TABLES)
def test_packages_are_few(folder: str) -> None:
    """A newcomer can hold them in mind. A subfolder belongs to its package, as in the picture."""
    assert len(list((ROOT / folder).glob("*/__init__.py"))) <= 9


def test_only_the_runner_and_the_commands_import_torch() -> None:
    """What answers requests works with NumPy arrays."""
    found = {path.relative_to(ROOT) for path in (ROOT / "service").rglob("*.py") if imports_torch(path)}
    assert found == {Path("service") / path for path in ("engine/runner.py", "engine/transfer.py", "cli/info.py")}


def imports_torch(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names) if any(name.name.split(".")[0] == "torch" for name in names):
                return True
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "torch":
                return True
    return False
